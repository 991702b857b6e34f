"""SASL conversations as machines: bytes in, bytes out; no IO, no clock.

    conversation = Scram("SCRAM-SHA-256", "alice", password)
    said = conversation.first()
    while said is not None:
        said = conversation.answer(await ask(said))  # None: both sides have proved what they must

That the broker is content is said elsewhere, by the error code of each of its replies.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping

import scramp  # RFC 5802 and 7677, SASLprep included

from ledgerstream.errors import ConfigError, SecurityError

AUTHENTICATION_FAILED = 58, "SASL_AUTHENTICATION_FAILED"


class Conversation(ABC):
    """One proof of who we are. It is spent when it is over."""

    @abstractmethod
    def first(self) -> bytes:
        """What is said first."""

    @abstractmethod
    def answer(self, challenge: bytes) -> bytes | None:
        """What is said next; None when it is over. Raises SecurityError."""


class Plain(Conversation):
    """The password itself (RFC 4616): only a connection that is encrypted keeps it secret."""

    def __init__(self, username: str, password: str) -> None:
        if "\0" in username + password:
            raise ConfigError("A user name or password of PLAIN has no zero character in it.")
        self._said = f"\0{username}\0{password}".encode()

    def first(self) -> bytes:
        return self._said

    def answer(self, challenge: bytes) -> bytes | None:
        return None


class Scram(Conversation):
    """Both sides prove that they know the password, and neither says it (RFC 5802, 7677)."""

    def __init__(self, mechanism: str, username: str, password: str, nonce: str | None = None):
        try:
            self._client = scramp.ScramClient([mechanism], username, password, c_nonce=nonce)
        except scramp.ScramException as error:
            raise ConfigError(
                f"The user name or password cannot be used with {mechanism}: {error.args[0]}.",
                "SASLprep (RFC 4013) says which characters may be in them.",
            ) from None
        self._mechanism = mechanism
        self._proved = False

    def first(self) -> bytes:
        said: str = self._client.get_client_first()
        return said.encode()

    def answer(self, challenge: bytes) -> bytes | None:
        try:
            heard = challenge.decode()
            if self._proved:
                self._client.set_server_final(heard)
                return None
            self._client.set_server_first(heard)
            said: str = self._client.get_client_final()
        except (scramp.ScramException, UnicodeDecodeError) as error:
            code, name = AUTHENTICATION_FAILED
            why = "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else error.args[0]
            raise SecurityError(
                f"The broker did not prove by {self._mechanism} that it knows the password: "
                f"{why.rstrip('.')}.",
                "It may be another one in the broker's place. The password was not told to it.",
                code=code,
                name=name,
            ) from None
        self._proved = True
        return said.encode()


class OAuthBearer(Conversation):
    """A token that somebody else has signed (RFC 7628, KIP-255)."""

    def __init__(self, token: str, extensions: Mapping[str, str] | None = None) -> None:
        if not token or re.search(r"[^\x21-\x7e]", token):
            raise SecurityError(
                "The token for OAUTHBEARER is none: it is empty, or has blanks in it.",
                "Look at what gives it: sasl_oauthbearer_token.",
            )
        said = [f"auth=Bearer {token}", *(f"{k}={v}" for k, v in (extensions or {}).items())]
        self._said = "".join(["n,,", *(f"\x01{each}" for each in said), "\x01\x01"]).encode()

    def first(self) -> bytes:
        return self._said

    def answer(self, challenge: bytes) -> bytes | None:
        # it says why it refuses, and has to be told to say it by an error code too
        return b"\x01" if challenge else None
