"""SASL conversations, without a broker: the examples of the RFCs, and peers that cheat."""

from __future__ import annotations

import pytest
import scramp

from ledgerstream.client.sasl import Conversation, OAuthBearer, Plain, Scram
from ledgerstream.errors import ConfigError, SecurityError

RFC_7677 = (
    "SCRAM-SHA-256",
    "rOprNGfwEbeRWgbNEkqO",
    "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
    "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
    "p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
    "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=",
)
RFC_5802 = (
    "SCRAM-SHA-1",
    "fyko+d2lbbFgONRv9qkxdawL",
    "r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096",
    "c=biws,r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts=",
    "v=rmF9pqV8S7suAoZWja4dJRkFsKQ=",
)


@pytest.mark.parametrize("example", [RFC_7677, RFC_5802], ids=["RFC 7677", "RFC 5802"])
def test_scram_says_what_the_rfc_says(example: tuple[str, ...]) -> None:
    mechanism, nonce, server_first, client_final, server_final = example
    conversation = Scram(mechanism, "user", "pencil", nonce)
    assert conversation.first() == f"n,,n=user,r={nonce}".encode()
    assert conversation.answer(server_first.encode()) == client_final.encode()
    assert conversation.answer(server_final.encode()) is None


@pytest.mark.parametrize(
    "cheat",
    ["v=7rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=", "", "v=", "e=invalid-proof", "\0", "ok"],
)
def test_a_broker_that_does_not_know_the_password_is_found_out(cheat: str) -> None:
    mechanism, nonce, server_first, *_ = RFC_7677
    conversation = Scram(mechanism, "user", "pencil", nonce)
    conversation.first()
    conversation.answer(server_first.encode())
    with pytest.raises(SecurityError, match="did not prove") as caught:
        conversation.answer(cheat.encode())
    assert "pencil" not in str(caught.value)


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (b"r=somebody,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", "nonce"),
        (b"r=rOprNGfwEbeRWgbNEkqO,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", "nonce"),
        (b"r=rOprNGfwEbeRWgbNEkqOx,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=1", "4096"),
        (b"r=rOprNGfwEbeRWgbNEkqOx,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=999999999999", "10000000"),
        (b"\xff", "UTF-8"),
        (b"", "malformed|attribute|message"),
    ],
)
def test_a_broker_that_makes_guessing_easy_or_endless_gets_no_proof(first: bytes, why: str) -> None:
    conversation = Scram(RFC_7677[0], "user", "pencil", RFC_7677[1])
    conversation.first()
    with pytest.raises(SecurityError, match=why):
        conversation.answer(first)


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("name", ["alice", "a=b,c", "Jürgen", "I\u00adX"])
def test_scram_with_a_server_that_knows_the_user(mechanism: str, name: str) -> None:
    known = scramp.ScramMechanism(mechanism).make_auth_info("pass, = \u2168")  # Ⅸ is IX
    server = scramp.ScramMechanism(mechanism).make_server(lambda user: known)
    conversation = Scram(mechanism, name, "pass, = IX")
    server.set_client_first(conversation.first().decode())
    final = conversation.answer(server.get_server_first().encode())
    assert final is not None
    server.set_client_final(final.decode())
    assert conversation.answer(server.get_server_final().encode()) is None


def test_what_saslprep_forbids_is_said_without_the_password() -> None:
    with pytest.raises(ConfigError, match="SASLprep") as caught:
        Scram("SCRAM-SHA-256", "user", "bell\x07")
    assert "bell" not in str(caught.value)


def test_plain_says_it_all_at_once() -> None:
    conversation = Plain("alice", "sécret")
    assert conversation.first() == b"\0alice\0s\xc3\xa9cret"
    assert conversation.answer(b"") is None
    with pytest.raises(ConfigError):
        Plain("alice\0bob", "secret")


def test_a_token_is_said_with_its_extensions_and_a_refusal_is_heard_out() -> None:
    conversation = OAuthBearer("a.b.c", {"logicalCluster": "lkc-1"})
    assert conversation.first() == b"n,,\x01auth=Bearer a.b.c\x01logicalCluster=lkc-1\x01\x01"
    assert conversation.answer(b"") is None
    assert OAuthBearer("t").answer(b'{"status":"invalid_token"}') == b"\x01"
    for nonsense in ("", "a b", "a\x01auth=x", "ü"):
        with pytest.raises(SecurityError):
            OAuthBearer(nonsense)


@pytest.mark.parametrize(
    "conversation",
    [Plain("u", "hunter2"), Scram("SCRAM-SHA-256", "u", "hunter2"), OAuthBearer("hunter2")],
)
def test_no_conversation_shows_its_secret(conversation: Conversation) -> None:
    assert "hunter2" not in repr(conversation)
