"""Kafka's client property files, as people have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from ledgerstream.client import Security
from ledgerstream.client.properties import fields, parse, read_properties
from ledgerstream.errors import ConfigError

JAVA = r"""
# as for kafka-console-consumer --consumer.config
bootstrap.servers=broker:9093
security.protocol = SASL_SSL
sasl.mechanism : SCRAM-SHA-512
sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required \
    username="alice" \
    password="a \\"quoted\\" = secret; \u00fc";
ssl.truststore.type=PEM
ssl.truststore.location=/etc/kafka/ca.pem
ssl.endpoint.identification.algorithm=
sasl.login.callback.handler.class=org.example.Handler
group.id=audit
"""
LIBRDKAFKA = """
security.protocol=sasl_ssl
sasl.mechanisms=OAUTHBEARER
sasl.oauthbearer.method=oidc
sasl.oauthbearer.token.endpoint.url=https://issuer.example.org/token
sasl.oauthbearer.client.id=us
sasl.oauthbearer.client.secret=hunter2
sasl.oauthbearer.scope=kafka
sasl.oauthbearer.extensions=logicalCluster=lkc-1,identityPoolId=pool-1
ssl.ca.location=/etc/kafka/ca.pem
ssl.certificate.location=/etc/kafka/client.crt
ssl.key.location=/etc/kafka/client.key
ssl.key.password=hunter3
enable.ssl.certificate.verification=true
"""


def test_a_file_of_java(tmp_path: Path) -> None:
    (tmp_path / "client.properties").write_text(JAVA)
    security = Security(**read_properties(tmp_path / "client.properties"))
    assert security == Security(
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="alice",
        sasl_password=SecretStr('a "quoted" = secret; ü'),
        ssl_ca_location=Path("/etc/kafka/ca.pem"),
        ssl_endpoint_identification_algorithm="none",
    )


def test_a_file_of_librdkafka() -> None:
    security = Security(**fields(parse(LIBRDKAFKA)))
    assert security.sasl_oauthbearer_client_secret == SecretStr("hunter2")
    assert security.ssl_key_password == SecretStr("hunter3")
    assert security.extensions == {"logicalCluster": "lkc-1", "identityPoolId": "pool-1"}
    assert security.ssl_certificate_location == Path("/etc/kafka/client.crt")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a=b", {"a": "b"}),
        ("  a  =  b  ", {"a": "b"}),
        ("a:b=c", {"a": "b=c"}),
        ("a b c", {"a": "b c"}),
        ("a", {"a": ""}),
        ("! no\n#a=b\n\na=\\\n  b\\\n  c", {"a": "bc"}),
        ("a=b\\\\\nc=d", {"a": "b\\", "c": "d"}),
        (r"a\=b=\tc\u0041\:", {"a=b": "\tcA:"}),
        ("a=1\r\na=2\r\n", {"a": "2"}),
    ],
)
def test_properties_are_read_as_java_reads_them(text: str, found: dict[str, str]) -> None:
    assert parse(text) == found


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"ssl.truststore.location": "/etc/trust.jks"}, "ssl.truststore.type is JKS, and PEM"),
        ({"ssl.keystore.type": "PKCS12"}, "openssl pkcs12"),
        ({"sasl.mechansim": "PLAIN"}, "is it sasl.mechanism?"),
        ({"ssl.cipher.suites": "x"}, "ssl.cipher.suites is not known here"),
        ({"enable.ssl.certificate.verification": "false"}, "always looked at"),
        ({"sasl.jaas.config": "Krb5LoginModule required;"}, "names Krb5LoginModule; known here"),
        ({"sasl.jaas.config": 'PlainLoginModule username="hunter2"'}, "is not understood"),
        (
            {"sasl.jaas.config": 'a.PlainLoginModule required user_alice="hunter2";'},
            "has no 'user_alice'",
        ),
    ],
)
def test_what_is_not_known_is_refused(properties: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fields(properties)
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_properties(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        read_properties(tmp_path / "binary")
    (tmp_path / "other").write_text("= hunter2")
    with pytest.raises(ConfigError, match="no name=value") as caught:
        read_properties(tmp_path / "other")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "right"),
    [("security_protocol", "security.protocol"), ("secuirty.protocol", "security.protocol"),
     ("Sasl.Password", "sasl.password")],
)  # fmt: skip
def test_a_name_that_is_nearly_one_is_no_name_of_something_else(name: str, right: str) -> None:
    """Passed over, it would let everything go in plain text."""
    with pytest.raises(ConfigError, match=rf"is it {right}\?"):
        fields({name: "SSL"})
    assert fields({"bootstrap.servers": "h:1", "acks": "all", "client.id": "x"}) == {}
