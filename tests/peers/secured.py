"""An Apache Kafka with a listener for each way in, and the certificates that it takes.

alice's password is SECRET with PLAIN and both SCRAMs; tokens are of Kafka's unsecured kind.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization

from tests.peers.kafka import ApacheKafka

SECRET = "alice secret"
SESSION_MS = 2_000  # of the listener SHORT; Kafka renews no session that is younger than a second
MECHANISMS = "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER"
LISTENERS = {
    "SSL": "SSL",  # wants a certificate of the client's
    "SASL_PLAINTEXT": "SASL_PLAINTEXT",
    "SASL_SSL": "SASL_SSL",
    "SHORT": "SASL_SSL",  # with sessions that end
    "EXPIRED": "SSL",  # with a certificate that is out of its time
    "SCRAM": "SASL_PLAINTEXT",  # SCRAM-SHA-256 alone
}
_SECURITY = "org.apache.kafka.common.security"


@dataclass
class Certificates:
    """PEM files. `ca` has signed all but `stranger`, which another one has."""

    directory: Path
    ca: Path
    other_ca: Path
    client: Path  # certificate and key in one file
    client_key: Path
    server: Path
    expired: Path
    stranger: Path

    @classmethod
    def make(cls, directory: Path) -> Certificates:
        ca, other = trustme.CA(), trustme.CA()
        yesterday = datetime.now(UTC) - timedelta(days=1)
        issued = {
            "client": ca.issue_cert("alice@example.org"),
            "server": ca.issue_cert("localhost"),
            "expired": ca.issue_cert("localhost", not_after=yesterday),
            "stranger": other.issue_cert("mallory@example.org"),
        }
        files = {}
        for name, leaf in issued.items():
            files[name] = directory / f"{name}.pem"
            chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
            files[name].write_bytes(_pkcs8(leaf) + chain)
        (directory / "ca.pem").write_bytes(ca.cert_pem.bytes())
        (directory / "other.pem").write_bytes(other.cert_pem.bytes())
        key = directory / "client.key"
        key.write_bytes(_pkcs8(issued["client"], b"key-secret"))
        return cls(
            directory, directory / "ca.pem", directory / "other.pem", client_key=key, **files
        )


def _pkcs8(leaf: trustme.LeafCert, password: bytes | None = None) -> bytes:
    """The key in the only form that Kafka reads."""
    key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption(),
    )


def token(subject: str = "alice", seconds: int = 3600) -> str:
    """A JWT that nobody has signed."""
    now = int(time.time())
    parts = {"alg": "none"}, {"sub": subject, "iat": now - 1, "exp": now + seconds}
    texts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts]
    return b".".join([*texts, b""]).decode()


def start(directory: Path, certificates: Certificates) -> ApacheKafka:
    settings: dict[str, object] = {
        "sasl.enabled.mechanisms": MECHANISMS,
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": certificates.server,
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": certificates.ca,
        "listener.name.ssl.ssl.client.auth": "required",
        "listener.name.expired.ssl.keystore.type": "PEM",
        "listener.name.expired.ssl.keystore.location": certificates.expired,
        "listener.name.scram.sasl.enabled.mechanisms": "SCRAM-SHA-256",
        "listener.name.short.connections.max.reauth.ms": SESSION_MS,
        "connection.failed.authentication.delay.ms": 20,
    }
    for listener, protocol in LISTENERS.items():
        if "SASL" not in protocol:
            continue
        at = f"listener.name.{listener.lower()}"
        settings |= {
            f"{at}.plain.sasl.jaas.config": f"{_SECURITY}.plain.PlainLoginModule required "
            f'user_alice="{SECRET}";',
            f"{at}.scram-sha-256.sasl.jaas.config": f"{_SECURITY}.scram.ScramLoginModule required;",
            f"{at}.scram-sha-512.sasl.jaas.config": f"{_SECURITY}.scram.ScramLoginModule required;",
            f"{at}.oauthbearer.sasl.jaas.config": f"{_SECURITY}.oauthbearer.OAuthBearerLoginModule "
            "required;",
        }
    return ApacheKafka.start(
        directory,
        heap="512m",
        listeners=LISTENERS,
        scram=[
            f'{mechanism}=[name="alice",password="{SECRET}"]'
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        ],
        **settings,
    )
