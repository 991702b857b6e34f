"""Kafka's own client property files, as far as they say how to be let in.

Java's names and librdkafka's are both read; what is not about security (bootstrap.servers, acks, …)
is passed over, and what is, and is not known here, is refused: it may have been what kept others
out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ledgerstream.client.security import Security
from ledgerstream.errors import ConfigError

# Java's names, and older ones of librdkafka; the rest is `Security`'s own, with dots
_OTHER_NAMES = {
    "sasl.mechanisms": "sasl_mechanism",
    "ssl.truststore.location": "ssl_ca_location",
    "ssl.keystore.location": "ssl_certificate_location",
    "sasl.oauthbearer.client.credentials.client.id": "sasl_oauthbearer_client_id",
    "sasl.oauthbearer.client.credentials.client.secret": "sasl_oauthbearer_client_secret",
}
_NAMES = {name.replace("_", "."): name for name in Security.model_fields} | _OTHER_NAMES
_ABOUT_SECURITY = ("security.", "sasl.", "ssl.", "enable.ssl.")
# say how Java or librdkafka does it, and nothing that we would do otherwise
_PASSED_OVER = ("sasl.login.", "sasl.client.callback.", "sasl.kerberos.", "sasl.oauthbearer.config")
_STORES = ("ssl.truststore.type", "ssl.keystore.type")
_OPTION = re.compile(r'\s+([\w.]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))')
_MODULE = re.compile(rf"([\w.]+)\s+\w+((?:{_OPTION.pattern})*)\s*;")
_IN_JAAS = {  # by the last part of a login module's name: its options, and what they are here
    "PlainLoginModule": {"username": "sasl_username", "password": "sasl_password"},
    "ScramLoginModule": {"username": "sasl_username", "password": "sasl_password"},
    "OAuthBearerLoginModule": {
        "clientId": "sasl_oauthbearer_client_id",
        "clientSecret": "sasl_oauthbearer_client_secret",
        "scope": "sasl_oauthbearer_scope",
    },
}


def read_properties(file: Path) -> dict[str, Any]:
    """The fields of `Security` that a file gives. Raises ConfigError, without what it holds."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ConfigError(f"{file} cannot be read: {why}.") from error
    try:
        return fields(parse(text))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.args[0]}", error.remedy) from None


def parse(text: str) -> dict[str, str]:
    """Name → value, as java.util.Properties reads them. Raises ConfigError."""
    found = {}
    joined = re.sub(r"(?<!\\)((?:\\\\)*)\\\n[ \t\f]*", r"\1", text.replace("\r\n", "\n"))
    for line in joined.split("\n"):
        line = line.strip(" \t\f")
        if not line or line[0] in "#!":
            continue
        pair = re.fullmatch(r"((?:[^\\:= \t\f]|\\.)+)[ \t\f]*[:=]?[ \t\f]*(.*)", line)
        if pair is None:
            raise ConfigError("a line is no name=value.", "Is it a file of Kafka's properties?")
        found[_plain(pair[1])] = _plain(pair[2])
    return found


def _plain(text: str) -> str:
    controls = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
    return re.sub(
        r"\\(?:u([0-9a-fA-F]{4})|(.))",
        lambda m: chr(int(m[1], 16)) if m[1] else controls.get(m[2], m[2]),
        text,
    )


def fields(properties: Mapping[str, str]) -> dict[str, Any]:
    """What the properties are in `Security`. Raises ConfigError for what it has not."""
    found: dict[str, Any] = {}
    for name, value in properties.items():
        if name in _STORES:
            _check_store(name, value)
        elif name in _READ:
            found |= _READ[name](value)
        elif name in _NAMES:
            found[_NAMES[name]] = value
        elif name.startswith(_ABOUT_SECURITY) and not name.startswith(_PASSED_OVER):
            near = get_close_matches(name, [*_NAMES, *_READ], n=1)
            raise ConfigError(
                f"{name} is not known here{f': is it {near[0]}?' if near else '.'}",
                "Take it out, if all is well without it.",
            )
        elif meant := get_close_matches(_dotted(name), [*_NAMES, *_READ], n=1, cutoff=0.85):
            raise ConfigError(f"{name} is not known: is it {meant[0]}?", "Write it so.")
    for store in _STORES:
        where = store.replace("type", "location")
        if store not in properties and not properties.get(where, ".pem").endswith(".pem"):
            _check_store(store, "JKS")  # Java's default
    return found


def _dotted(name: str) -> str:
    return name.lower().replace("_", ".")


def _check_store(name: str, kind: str) -> None:
    if kind.upper() == "PEM":
        return
    pem = {
        "ssl.truststore.type": "keytool -exportcert -rfc -keystore FILE -alias NAME > ca.pem",
        "ssl.keystore.type": "openssl pkcs12 -in FILE -out client.pem (of a JKS, first: keytool "
        "-importkeystore -srckeystore FILE -destkeystore FILE.p12)",
    }
    raise ConfigError(f"{name} is {kind}, and PEM is read here.", f"Make it one: {pem[name]}")


def _host_names(value: str) -> dict[str, str]:
    return {"ssl_endpoint_identification_algorithm": value.lower() or "none"}


def _verified(value: str) -> dict[str, str]:
    if value.lower() != "true":
        raise ConfigError(
            "enable.ssl.certificate.verification is off, and certificates are always looked at.",
            "Give the authority that signed the broker's: ssl.ca.location.",
        )
    return {}


def _method(value: str) -> dict[str, str]:
    if value.lower() not in ("oidc", "default"):
        raise ConfigError(f"sasl.oauthbearer.method {value} is not known: oidc is.")
    return {}


def _jaas(value: str) -> dict[str, str]:
    """`org.apache.kafka.….PlainLoginModule required username="…" password="…";`"""
    words = _MODULE.fullmatch(value.strip())
    if words is None:
        raise ConfigError(
            "sasl.jaas.config is not understood.",
            'Write: MODULE required name="value" … ; or give sasl.username and sasl.password.',
        )
    module = words[1].rpartition(".")[2]
    if module not in _IN_JAAS:
        raise ConfigError(
            f"sasl.jaas.config names {module}; known here: {', '.join(_IN_JAAS)}.",
        )
    found = {}
    for name, quoted, bare in _OPTION.findall(words[2]):
        if name not in _IN_JAAS[module]:
            raise ConfigError(f"sasl.jaas.config: {module} has no {name!r} here.")
        found[_IN_JAAS[module][name]] = re.sub(r"\\(.)", r"\1", quoted) if quoted else bare
    return found


_READ: dict[str, Callable[[str], dict[str, str]]] = {
    "sasl.jaas.config": _jaas,
    "ssl.endpoint.identification.algorithm": _host_names,
    "enable.ssl.certificate.verification": _verified,
    "sasl.oauthbearer.method": _method,
}
