"""What a connection needs to be let in, and what it says when it is not.

`Access` is made once a client. `prove` says who we are over a connection that nothing else uses
meanwhile; `refused_tls` has the words for what OpenSSL says.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

from kio.schema.errors import ErrorCode

from ledgerstream.client.sasl import Conversation, OAuthBearer, Plain, Scram
from ledgerstream.client.security import Security
from ledgerstream.client.tokens import Tokens
from ledgerstream.errors import LedgerStreamError, SecurityError
from ledgerstream.limits import LIMITS, Limits
from ledgerstream.wire.messages import ms
from ledgerstream.wire.versions import Api

if TYPE_CHECKING:
    from ledgerstream.client.connection import Connection

_NO_SASL = "There, give security_protocol PLAINTEXT or SSL; or give the port of a SASL listener."
_NO_TLS = "Give security_protocol PLAINTEXT or SASL_PLAINTEXT, or the port of an SSL listener."
# what X509_verify_cert_error_string has a number for
_EXPIRED, _NOT_YET = 10, 9
_OTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, …_IP_ADDRESS_MISMATCH


class Access:
    """One client's security, with what was read from files for it."""

    def __init__(self, security: Security, limits: Limits = LIMITS) -> None:
        """Raises ConfigError for files that cannot be read."""
        self.security = security
        self.context = security.ssl_context()
        self._tokens = Tokens(security, limits.connect_ms_max)

    @property
    def proves(self) -> bool:
        """Whether a connection has to say who we are."""
        return self.security.sasl_mechanism is not None

    async def conversation(self) -> Conversation:
        """For one proof. Raises as `Tokens.next` does."""
        security = self.security
        mechanism, username = security.sasl_mechanism, security.sasl_username
        if mechanism == "OAUTHBEARER":
            return OAuthBearer(await self._tokens.next(), security.extensions)
        assert mechanism is not None and username is not None
        assert security.sasl_password is not None
        password = security.sasl_password.get_secret_value()
        if mechanism == "PLAIN":
            return Plain(username, password)
        return Scram(mechanism, username, password)


OPEN = Access(Security())


async def prove(connection: Connection, conversation: Conversation) -> int:
    """Say who we are; how long that holds, in ms, or 0 if it does not end (KIP-368).

    Raises SecurityError if the broker or we are not content.
    """
    security = connection.access.security
    mechanism = security.sasl_mechanism
    try:
        reply = await connection.ask(Api.SASL_HANDSHAKE, {"mechanism": mechanism})
    except LedgerStreamError as error:
        if Api.SASL_HANDSHAKE in connection.versions:
            raise
        raise SecurityError(f"{connection.place} asks for no SASL.", _NO_SASL) from error
    if reply.error_code is ErrorCode.unsupported_sasl_mechanism:
        offered = ", ".join(sorted(reply.mechanisms)) or "none"
        raise _refused(
            reply, f"{connection.place} does not take {mechanism}; what it takes: {offered}.",
            "Give one of them as sasl_mechanism, or switch it on there: sasl.enabled.mechanisms.",
        )  # fmt: skip
    if reply.error_code is ErrorCode.illegal_sasl_state:
        raise _refused(reply, f"{connection.place} asks for no SASL.", _NO_SASL)
    if reply.error_code is not ErrorCode.none:
        raise _refused(reply, f"{connection.place} refuses {mechanism}.")
    said: bytes | None = conversation.first()
    while said is not None:
        reply = await connection.ask(Api.SASL_AUTHENTICATE, {"auth_bytes": said})
        if reply.error_code is not ErrorCode.none:
            who = "the token" if security.sasl_username is None else repr(security.sasl_username)
            why = f" It says: {reply.error_message}" if reply.error_message else ""
            checked = "sasl_username and sasl_password, and that it knows them by this mechanism"
            if security.sasl_username is None:
                checked = "that the token is of an issuer and audience that it knows, and not over"
            raise _refused(
                reply, f"{connection.place} does not take {who} by {mechanism}.{why}",
                f"Check {checked}.",
            )  # fmt: skip
        # in a thread: the peer says how many rounds of hashing it wants
        said = await asyncio.to_thread(conversation.answer, reply.auth_bytes)
    lifetime = getattr(reply, "session_lifetime", None)
    return 0 if lifetime is None else ms(lifetime)


def _refused(reply: Any, sentence: str, remedy: str = "") -> SecurityError:
    code = ErrorCode(reply.error_code)
    return SecurityError(sentence, remedy, code=int(code.value), name=code.name.upper())


def refused_tls(place: str, error: ssl.SSLError) -> Exception:
    """SecurityError, or ConnectionError where it may go better the next time."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _not_trusted(place, error)
    reason = error.reason or ""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError) or "EOF" in reason:
        return cut_in_tls(place)
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return SecurityError(f"{place} does not speak TLS.", _NO_TLS)
    if "ALERT" in reason and (
        "CERT" in reason or "CA" in reason.split("_") or "HANDSHAKE" in reason
    ):
        return SecurityError(
            f"{place} wants a certificate of ours that it trusts ({_spoken(reason)}).",
            "Give ssl_certificate_location and ssl_key_location: a certificate of an authority "
            "that is in the broker's truststore.",
        )
    return SecurityError(
        f"{place} and we find no way to encrypt: {_spoken(reason) or error}.",
        "Here TLS 1.2 and 1.3 are spoken: ssl.enabled.protocols and ssl.cipher.suites say what "
        "the broker speaks.",
    )


def cut_in_tls(place: str) -> ConnectionError:
    return ConnectionError(
        f"{place} closed the connection while TLS began: if it is a PLAINTEXT listener, give "
        "security_protocol PLAINTEXT or SASL_PLAINTEXT"
    )


def speaks_tls(place: str) -> SecurityError:
    return SecurityError(
        f"{place} speaks TLS, and we do not.",
        "Give security_protocol SSL or SASL_SSL, or the port of a PLAINTEXT listener.",
    )


def _not_trusted(place: str, error: ssl.SSLCertVerificationError) -> SecurityError:
    why = error.verify_message.rstrip(".")
    if error.verify_code in _OTHER_NAME:
        return SecurityError(
            f"The certificate of {place} is for another name: {why}.",
            "Connect by a name that is in it (advertised.listeners too), or give the broker one "
            "with this name. ssl_endpoint_identification_algorithm none would not look: then "
            "whoever has a certificate of that authority can take the broker's place.",
        )
    if error.verify_code in (_EXPIRED, _NOT_YET):
        return SecurityError(
            f"The certificate of {place} is out of its time: {why}.",
            "Renew it at the broker; or this machine's clock is wrong.",
        )
    return SecurityError(
        f"The certificate of {place} is not trusted: {why}.",
        "Give the authority that signed it: ssl_ca_location, a PEM file.",
    )


def _spoken(reason: str) -> str:
    return reason.lower().replace("_", " ")
