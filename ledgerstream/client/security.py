"""How a broker is known, and who we are to it: Kafka's client settings, by Kafka's names."""

from __future__ import annotations

import re
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    model_validator,
)

from ledgerstream.errors import ConfigError

_capital = BeforeValidator(lambda name: name.upper() if isinstance(name, str) else name)
Protocol = Annotated[Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"], _capital]
Mechanism = Annotated[Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"], _capital]
Token = Callable[[], str | Awaitable[str]]


class Security(BaseModel):
    """`Security(security_protocol="SASL_SSL", sasl_mechanism="SCRAM-SHA-512", …)`.

    Passwords, secrets and fixed tokens are pydantic's SecretStr (a str may be given): neither repr
    nor an error shows them. Raises ConfigError where settings do not go together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    security_protocol: Protocol = Field(
        default="PLAINTEXT",
        description="PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL: SSL encrypts and proves who the "
        "broker is, SASL says who we are",
    )
    ssl_ca_location: Path | None = Field(
        default=None,
        description="PEM file of the authorities whose brokers are trusted; else those of this "
        "machine",
    )
    ssl_certificate_location: Path | None = Field(
        default=None, description="PEM file of our own certificate, its chain behind it"
    )
    ssl_key_location: Path | None = Field(
        default=None, description="PEM file of its key, if that is not in the same file"
    )
    ssl_key_password: SecretStr | None = Field(default=None, description="what the key needs")
    ssl_endpoint_identification_algorithm: Literal["https", "none"] = Field(
        default="https",
        description="https: the broker's certificate is for the name that we connect to. none: "
        "whoever has any certificate of those authorities can take the broker's place, and read "
        "and change everything",
    )
    sasl_mechanism: Mechanism | None = Field(
        default=None, description="PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER"
    )
    sasl_username: str | None = Field(default=None, description="who we are: PLAIN, SCRAM")
    sasl_password: SecretStr | None = Field(default=None, description="and how we prove it")
    sasl_oauthbearer_token: SecretStr | Token | None = Field(
        default=None,
        description="a token, or in Python what gives one, async or not, each time that one is due",
    )
    sasl_oauthbearer_token_endpoint_url: str | None = Field(
        default=None, description="where a token is to be had for the following (OIDC)"
    )
    sasl_oauthbearer_client_id: str | None = Field(default=None, description="the client's name")
    sasl_oauthbearer_client_secret: SecretStr | None = Field(
        default=None, description="the client's secret"
    )
    sasl_oauthbearer_scope: str | None = Field(default=None, description="what is asked for")
    sasl_oauthbearer_extensions: str | None = Field(
        default=None, description="name=value,… that the broker gets with a token (KIP-342)"
    )

    @property
    def encrypted(self) -> bool:
        return self.security_protocol in ("SSL", "SASL_SSL")

    @property
    def tells_secrets(self) -> bool:
        """Whether everybody on the way can read a password or token."""
        return not self.encrypted and self.sasl_mechanism in ("PLAIN", "OAUTHBEARER")

    @property
    def extensions(self) -> dict[str, str]:
        given = (self.sasl_oauthbearer_extensions or "").split(",")
        pairs = (pair.partition("=") for pair in given)
        return {name.strip(): value.strip() for name, _, value in pairs if name.strip()}

    def ssl_context(self) -> ssl.SSLContext | None:
        """None where nothing is encrypted. Reads files; raises ConfigError if they are none."""
        if not self.encrypted:
            return None
        trusted = self.ssl_ca_location
        try:
            context = ssl.create_default_context(cafile=trusted)
        except OSError as error:  # SSLError is one
            raise ConfigError(
                f"ssl_ca_location: {trusted} holds no certificates ({_why(error)}).",
                "Give a PEM file: -----BEGIN CERTIFICATE----- is in it.",
            ) from error
        context.check_hostname = self.ssl_endpoint_identification_algorithm == "https"
        if self.ssl_certificate_location is not None:
            secret = self.ssl_key_password
            try:
                context.load_cert_chain(
                    self.ssl_certificate_location,
                    self.ssl_key_location,
                    lambda: "" if secret is None else secret.get_secret_value(),  # never asks
                )
            except OSError as error:
                files = dict.fromkeys([self.ssl_certificate_location, self.ssl_key_location])
                raise ConfigError(
                    "Our certificate and its key cannot be read from "
                    f"{' and '.join(str(file) for file in files if file)} ({_why(error)}).",
                    "Both are PEM and belong together; ssl_key_password opens a key that is "
                    "encrypted.",
                ) from error
        return context

    @model_validator(mode="wrap")
    @classmethod
    def _in_words(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(given)
        except ValidationError as error:  # `from None`: what was given may be a password
            first = error.errors(include_input=False)[0]
            name = str(first["loc"][0]) if first["loc"] else "security"
            if first["type"] == "extra_forbidden":
                raise ConfigError(f"There is no setting {name!r} of a connection.") from None
            raise ConfigError(f"The setting {name!r} is wrong: {first['msg']}.") from None

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        """What would be ignored is refused: somebody believes in it."""
        given = self.model_fields_set - {"security_protocol"}
        given = {name for name in given if getattr(self, name) is not None}
        with_sasl = self.security_protocol.startswith("SASL")
        for prefix, meant, instead in (
            ("ssl_", self.encrypted, "SSL or SASL_SSL"),
            ("sasl_", with_sasl, "SASL_SSL or SASL_PLAINTEXT"),
        ):
            vain = sorted(name for name in given if name.startswith(prefix))
            if vain and not meant:
                raise ConfigError(
                    f"{vain[0]} is given, and is not used with "
                    f"security_protocol {self.security_protocol}.",
                    f"Give security_protocol {instead}.",
                )
        if self.ssl_key_location is not None and self.ssl_certificate_location is None:
            raise ConfigError("ssl_key_location is given, and no ssl_certificate_location.")
        if not with_sasl:
            return self
        if self.sasl_mechanism is None:
            raise ConfigError(
                f"security_protocol {self.security_protocol} needs a sasl_mechanism.",
                "One of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, OAUTHBEARER, as the broker has it.",
            )
        if self.sasl_mechanism == "OAUTHBEARER":
            self._has_token()
        elif not self.sasl_username or self.sasl_password is None:
            raise ConfigError(f"{self.sasl_mechanism} needs sasl_username and sasl_password.")
        return self

    def _has_token(self) -> None:
        by_client = (
            self.sasl_oauthbearer_token_endpoint_url,
            self.sasl_oauthbearer_client_id,
            self.sasl_oauthbearer_client_secret,
        )
        some, whole = ([each is not None for each in by_client].count(True) > n for n in (0, 2))
        if some != whole or some == (self.sasl_oauthbearer_token is not None):
            raise ConfigError(
                "OAUTHBEARER needs a token, and one source of it.",
                "Give sasl_oauthbearer_token; or sasl_oauthbearer_token_endpoint_url, "
                "_client_id and _client_secret.",
            )
        url = urlsplit(self.sasl_oauthbearer_token_endpoint_url or "https:")
        local = url.hostname in ("localhost", "127.0.0.1", "::1")
        if url.scheme != "https" and not (url.scheme == "http" and local):
            raise ConfigError(
                "sasl_oauthbearer_token_endpoint_url is not https, and the client's secret would "
                "go there for all to read."
            )
        for name, value in self.extensions.items():
            # RFC 7628: what ends a pair is not in it, and `auth` is the token itself
            if not re.fullmatch("[A-Za-z]+", name) or name == "auth" or "\x01" in value:
                raise ConfigError(f"{name!r} is no name of an extension: letters, and not 'auth'.")


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "it is not PEM"
    return error.strerror or str(error)
