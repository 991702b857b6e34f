"""TLS and SASL, against an Apache Kafka with a listener for each; what is said when it fails."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import structlog
from confluent_kafka.admin import (
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)
from pydantic import SecretStr

import ledgerstream
from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client, Security
from ledgerstream.client import connection as connections
from ledgerstream.client.connection import Connection
from ledgerstream.client.sasl import Conversation
from ledgerstream.errors import ConfigError, LedgerStreamError, SecurityError
from ledgerstream.limits import Limits
from tests.peers.kafka import ApacheKafka
from tests.peers.secured import SECRET, SESSION_MS, Certificates, token

IMPATIENT = Limits(connect_ms_max=1_500)
PASSWORDS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
MECHANISMS = (*PASSWORDS, "OAUTHBEARER")


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> Counter[Connection]:
    """How often each connection has said who we are."""
    counted: Counter[Connection] = Counter()
    really = connections.prove

    async def prove(connection: Connection, conversation: Conversation) -> int:
        counted[connection] += 1
        return await really(connection, conversation)

    monkeypatch.setattr(connections, "prove", prove)
    return counted


def sasl(certificates: Certificates | None, mechanism: str, **changed: Any) -> Security:
    """Over TLS, if there are certificates."""
    settings: dict[str, Any] = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": mechanism}
    if certificates is not None:
        settings |= {"security_protocol": "SASL_SSL", "ssl_ca_location": certificates.ca}
    if mechanism == "OAUTHBEARER":
        settings |= {"sasl_oauthbearer_token": token()}
    else:
        settings |= {"sasl_username": "alice", "sasl_password": SECRET}
    return Security(**(settings | changed))


def tls(certificates: Certificates, **more: Any) -> Security:
    settings = {"ssl_ca_location": certificates.ca, "ssl_certificate_location": certificates.client}
    return Security(security_protocol="SSL", **(settings | more))


async def writes_and_reads(address: str, topic: str, security: Security) -> None:
    async with await Client.connect(address, security=security) as client:
        await client.create_topic(topic)
        producer = await client.producer()
        await producer.send(topic, b"paid", key=b"7")
        async with client.reader(topic, {0: 0}) as reader:
            chunk = None
            while chunk is None:
                chunk = await reader.next()
        assert b"paid" in chunk.data
        await client.delete_topic(topic)


async def refused(address: str, security: Security | None = None) -> SecurityError:
    """The error of a connection that is never let in: at once, and for good."""
    with pytest.raises(SecurityError) as caught:
        async with asyncio.timeout(10), await Client.connect(address, security=security):
            pass
    assert not caught.value.retriable
    assert caught.value.remedy
    return caught.value


async def for_ever(act: Callable[[], Awaitable[object]]) -> None:
    while True:
        await act()


# -- ways in


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("listener", ["SASL_SSL", "SASL_PLAINTEXT"])
async def test_each_mechanism_lets_us_in(
    secured_kafka: ApacheKafka,
    certificates: Certificates,
    topic: str,
    listener: str,
    mechanism: str,
) -> None:
    security = sasl(certificates if listener == "SASL_SSL" else None, mechanism)
    await writes_and_reads(secured_kafka.at[listener], topic, security)


async def test_both_sides_show_certificates(
    secured_kafka: ApacheKafka, certificates: Certificates, topic: str
) -> None:
    at = secured_kafka.at["SSL"]
    await writes_and_reads(at, topic, tls(certificates))
    key = {"ssl_key_location": certificates.client_key, "ssl_key_password": "key-secret"}
    async with await Client.connect(at, security=tls(certificates, **key)) as client:
        assert topic not in {each.name for each in await client.topics()}


async def test_a_token_comes_from_a_callable_of_either_kind(
    secured_kafka: ApacheKafka, certificates: Certificates
) -> None:
    asked = []

    def plain() -> str:
        asked.append("plain")
        return token()

    async def slow() -> str:
        await asyncio.sleep(0)
        asked.append("async")
        if len(asked) == 2:
            raise OSError("the issuer is away")  # and is asked again
        return token()

    for source in (plain, slow):
        security = sasl(certificates, "OAUTHBEARER", sasl_oauthbearer_token=source)
        async with await Client.connect(secured_kafka.at["SASL_SSL"], security=security):
            pass
    assert asked == ["plain", "async", "async"]


# -- sessions that end (KIP-368)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_sessions_are_renewed_and_no_request_is_lost(
    secured_kafka: ApacheKafka,
    certificates: Certificates,
    topic: str,
    mechanism: str,
    proofs: Counter[Connection],
) -> None:
    token_source = {"sasl_oauthbearer_token": token} if mechanism == "OAUTHBEARER" else {}
    security = sasl(certificates, mechanism, **token_source)
    count, until = 0, time.monotonic() + 2.5 * SESSION_MS / 1000
    async with await Client.connect(secured_kafka.at["SHORT"], security=security) as client:
        await client.create_topic(topic)
        producer = await client.producer()

        async def produce() -> None:
            nonlocal count
            while time.monotonic() < until:
                numbers = range(count, count := count + 10)
                sent = [producer.send(topic, b"%d" % number) for number in numbers]
                assert sorted(await asyncio.gather(*sent)) == list(numbers)  # none twice, none lost

        writing = asyncio.create_task(produce())
        seen = 0
        async with client.consume("audit", [topic]) as reader:
            while not writing.done() or seen < count:
                _, chunk = await reader.next()
                assert chunk.start == seen
                seen = chunk.next_offset
                await reader.commit()
            assert all(connection.is_open for connection in proofs)
        await writing
        assert await client.committed("audit", [(topic, 0)]) == {(topic, 0): count}
    assert count > 0
    lasting = [times for times in proofs.values() if times >= 3]
    assert len(lasting) >= 2  # what is produced, and what is fetched


@pytest.mark.slow
async def test_who_is_shut_out_meanwhile_learns_it_once(
    secured_kafka: ApacheKafka, certificates: Certificates, topic: str, proofs: Counter[Connection]
) -> None:
    """A user that is deleted: its sessions end, and neither writer nor reader goes on asking."""
    admin = AdminClient({"bootstrap.servers": secured_kafka.address})
    kind = ScramMechanism.SCRAM_SHA_512
    carol = UserScramCredentialUpsertion("carol", ScramCredentialInfo(kind, 4096), b"carol-secret")
    for done in admin.alter_user_scram_credentials([carol]).values():
        done.result(10)
    security = sasl(
        certificates, "SCRAM-SHA-512", sasl_username="carol", sasl_password="carol-secret"
    )
    async with await Client.connect(secured_kafka.at["SHORT"], security=security) as client:
        await client.create_topic(topic)
        producer = await client.producer()
        await producer.send(topic, b"1")
        reader = client.reader(topic, {0: 1})
        gone = UserScramCredentialDeletion("carol", kind)
        for done in admin.alter_user_scram_credentials([gone]).values():
            await asyncio.to_thread(done.result, 10)
        async with asyncio.timeout(30):
            for going_on in (reader.next, lambda: producer.send(topic, b"2")):
                with pytest.raises(SecurityError, match="'carol'"):
                    await for_ever(going_on)
        refusals = proofs.total()
        await asyncio.sleep(1)
        assert proofs.total() == refusals
        assert refusals < 12


# -- settings are Kafka's


async def test_librdkafka_takes_the_same_settings(
    secured_kafka: ApacheKafka, certificates: Certificates
) -> None:
    security = sasl(certificates, "SCRAM-SHA-512")
    same = {"bootstrap.servers": secured_kafka.at["SASL_SSL"]}
    for name in security.model_fields_set:
        value = getattr(security, name)
        plain = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        same[name.replace("_", ".")] = plain
    assert AdminClient(same).list_topics(timeout=10).brokers


# -- no way in, in words


@pytest.mark.parametrize("mechanism", PASSWORDS)
async def test_a_wrong_password_is_final(
    secured_kafka: ApacheKafka,
    certificates: Certificates,
    mechanism: str,
    proofs: Counter[Connection],
) -> None:
    at = secured_kafka.at["SASL_SSL"]
    error = await refused(at, sasl(certificates, mechanism, sasl_password="hunter2"))
    assert error.name == "SASL_AUTHENTICATION_FAILED"
    assert f"{at} does not take 'alice' by {mechanism}." in str(error)
    assert "sasl_password" in error.remedy
    assert "hunter2" not in "".join(traceback.format_exception(error))
    assert proofs.total() == 1


async def test_a_token_that_is_over_is_final(
    secured_kafka: ApacheKafka, certificates: Certificates, proofs: Counter[Connection]
) -> None:
    old = sasl(certificates, "OAUTHBEARER", sasl_oauthbearer_token=token(seconds=-60))
    error = await refused(secured_kafka.at["SASL_SSL"], old)
    assert "does not take the token by OAUTHBEARER" in str(error)
    assert "invalid_token" in str(error)
    assert proofs.total() == 1


async def test_a_mechanism_that_is_off_names_those_that_are_on(
    secured_kafka: ApacheKafka,
) -> None:
    error = await refused(secured_kafka.at["SCRAM"], sasl(None, "SCRAM-SHA-512"))
    assert error.name == "UNSUPPORTED_SASL_MECHANISM"
    assert "does not take SCRAM-SHA-512; what it takes: SCRAM-SHA-256." in str(error)


async def test_certificates_that_do_not_fit(
    secured_kafka: ApacheKafka, certificates: Certificates
) -> None:
    at = secured_kafka.at["SSL"]
    by_number = at.replace("localhost", "127.0.0.1")
    for address, security, words in (
        (at, tls(certificates, ssl_ca_location=certificates.other_ca), "is not trusted: "),
        (at, tls(certificates, ssl_ca_location=None), "is not trusted: "),
        (by_number, tls(certificates), "is for another name: "),
        (secured_kafka.at["EXPIRED"], tls(certificates), "has expired"),
        (at, tls(certificates, ssl_certificate_location=None), "wants a certificate of ours"),
        (
            at,
            tls(certificates, ssl_certificate_location=certificates.stranger),
            "wants a certificate of ours",
        ),
    ):
        assert words in str(await refused(address, security))
    unchecked = tls(certificates, ssl_endpoint_identification_algorithm="none")
    async with await Client.connect(by_number, security=unchecked):
        pass


async def test_the_wrong_protocol_for_a_port_is_named(
    secured_kafka: ApacheKafka, certificates: Certificates, our_broker: Broker
) -> None:
    assert "speaks TLS, and we do not" in str(await refused(secured_kafka.at["SASL_SSL"]))
    for plain in (secured_kafka.address, our_broker.address):
        error = await refused(plain, sasl(None, "SCRAM-SHA-256"))
        assert f"{plain} asks for no SASL." in str(error)
    for address, security, words in (
        (secured_kafka.address, tls(certificates), "if it is a PLAINTEXT listener"),
        (our_broker.address, tls(certificates), "if it is a PLAINTEXT listener"),
        (secured_kafka.at["SASL_PLAINTEXT"], None, "give security_protocol SASL_PLAINTEXT"),
        (secured_kafka.at["SASL_SSL"], Security(
            security_protocol="SSL", ssl_ca_location=certificates.ca
        ), "give security_protocol SASL_SSL"),
    ):  # fmt: skip
        with pytest.raises(LedgerStreamError, match=words):
            await Client.connect(address, security=security, limits=IMPATIENT)


async def test_who_answers_http_does_not_speak_tls(certificates: Certificates) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert "does not speak TLS" in str(await refused(f"127.0.0.1:{port}", tls(certificates)))


async def test_a_peer_that_never_answers_is_given_up_in_time(certificates: Certificates) -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(never, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(LedgerStreamError, match="No broker answers"):
            await Client.connect(address, security=tls(certificates), limits=IMPATIENT)
        assert time.monotonic() - began < 2 * IMPATIENT.connect_ms_max / 1000


# -- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ssl_ca_location": "ca.pem"}, "ssl_ca_location is given, and is not used"),
        ({"sasl_password": "hunter2"}, "sasl_password is given, and is not used"),
        ({"security_protocol": "SASL_SSL"}, "needs a sasl_mechanism"),
        (
            {
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "PLAIN",
                "sasl_password": "hunter2",
            },
            "needs sasl_username",
        ),
        (
            {
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "GSSAPI",
                "sasl_password": "hunter2",
            },
            "'sasl_mechanism' is wrong",
        ),
        ({"sasl_pasword": "hunter2"}, "no setting 'sasl_pasword'"),
        (
            {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"},
            "needs a token, and one source",
        ),
        (
            {
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "OAUTHBEARER",
                "sasl_oauthbearer_token": "hunter2",
                "sasl_oauthbearer_client_id": "us",
            },
            "needs a token, and one source",
        ),
        (
            {"security_protocol": "SSL", "ssl_key_location": "key.pem"},
            "no ssl_certificate_location",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Security(**settings)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


async def test_files_that_are_none(certificates: Certificates, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for settings, words in (
        ({"ssl_ca_location": tmp_path / "absent.pem"}, "No such file"),
        ({"ssl_ca_location": tmp_path / "empty.pem"}, "holds no certificates"),
        ({"ssl_certificate_location": certificates.ca}, "cannot be read"),
        ({"ssl_key_location": certificates.client_key}, "ssl_key_password"),  # and never asks
        ({"ssl_key_location": certificates.server}, "belong together"),
    ):
        with pytest.raises(ConfigError, match=words):
            await Client.connect("127.0.0.1:1", security=tls(certificates, **settings))


def test_secrets_are_not_shown() -> None:
    secrets = {
        "ssl_key_password": "hunter2",
        "sasl_oauthbearer_client_secret": "hunter2",
        "sasl_password": "hunter2",
        "sasl_oauthbearer_token": "hunter2",
    }
    security = Security(
        security_protocol="SASL_SSL", sasl_mechanism="PLAIN", sasl_username="alice", **secrets
    )
    assert security.sasl_password is not None
    assert security.sasl_password.get_secret_value() == "hunter2"
    for shown in (repr(security), str(security), security.model_dump_json()):
        assert "hunter2" not in shown
    assert ledgerstream.Security is Security


async def test_a_secret_in_plain_text_is_warned_of_once(secured_kafka: ApacheKafka) -> None:
    at = secured_kafka.at["SASL_PLAINTEXT"]
    for mechanism, times in (("PLAIN", 1), ("OAUTHBEARER", 1), ("SCRAM-SHA-256", 0)):
        with structlog.testing.capture_logs() as said:
            async with await Client.connect(at, security=sasl(None, mechanism)) as client:
                await client.topics()
                (await client.cluster.dedicated(1)).close()
        assert [each["log_level"] for each in said] == ["warning"] * times
        assert SECRET not in str(said)


# -- client credentials (OIDC)


class Issuer(BaseHTTPRequestHandler):
    """Gives `answers` one after the other, and keeps what it was asked."""

    answers: list[tuple[int, str]]
    asked: list[tuple[str | None, dict[str, list[str]]]]

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.asked.append((self.headers["Authorization"], form))
        code, answer = self.answers.pop(0)
        self.send_response(code)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def issuer() -> Iterator[tuple[str, type[Issuer]]]:
    class Own(Issuer):
        answers, asked = [], []

    with ThreadingHTTPServer(("127.0.0.1", 0), Own) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/token", Own
        server.shutdown()
        thread.join()


def by_client(url: str, certificates: Certificates) -> Security:
    return sasl(
        certificates, "OAUTHBEARER", sasl_oauthbearer_token=None,
        sasl_oauthbearer_token_endpoint_url=url, sasl_oauthbearer_client_id="ledger stream",
        sasl_oauthbearer_client_secret="hunter2", sasl_oauthbearer_scope="kafka",
    )  # fmt: skip


async def test_a_token_of_an_oidc_endpoint_is_kept_for_a_while(
    secured_kafka: ApacheKafka, certificates: Certificates, issuer: tuple[str, type[Issuer]]
) -> None:
    url, seen = issuer
    answer = f'{{"access_token": "{token()}", "expires_in": 3600, "token_type": "Bearer"}}'
    seen.answers = [(503, "not now"), (200, answer)]
    security = by_client(url, certificates)
    async with await Client.connect(secured_kafka.at["SASL_SSL"], security=security) as client:
        await client.topics()
        (await client.cluster.dedicated(1)).close()
    assert seen.asked == [
        (
            "Basic bGVkZ2VyK3N0cmVhbTpodW50ZXIy",  # ledger+stream:hunter2
            {"grant_type": ["client_credentials"], "scope": ["kafka"]},
        )
    ] * 2  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, '{"error": "invalid_client"}'), "refuses a token to client 'ledger stream': 401"),
        ((200, "<html>"), "no access_token"),
        ((200, '{"error": "hunter2"}'), "no access_token"),
    ],
)
async def test_an_issuer_that_refuses_is_final(
    secured_kafka: ApacheKafka,
    certificates: Certificates,
    issuer: tuple[str, type[Issuer]],
    answer: tuple[int, str],
    words: str,
) -> None:
    url, seen = issuer
    seen.answers = [answer]
    error = await refused(secured_kafka.at["SASL_SSL"], by_client(url, certificates))
    assert words in str(error)
    assert "hunter2" not in "".join(traceback.format_exception(error))
    assert len(seen.asked) == 1


def test_a_client_secret_does_not_go_out_in_plain_text(certificates: Certificates) -> None:
    for url in ("http://issuer.example.org/token", "issuer.example.org", "file:///etc/passwd"):
        with pytest.raises(ConfigError, match="is not https"):
            by_client(url, certificates)
