"""Kafka's own record formats: both versions are read, the newer one written."""

from __future__ import annotations

import struct

import pytest

from ledgerstream.errors import DecodeError
from ledgerstream.txn import Forgotten, Txn, TxnCodec, TxnState

CODEC = TxnCodec()
FULL = Txn(
    "id-é", 7, 3, TxnState.PREPARE_COMMIT, 60_000, frozenset({("b", 1), ("a", 0), ("b", 0)}),
    111, 222, 2, 5, 9, 4, 2,
)  # fmt: skip


def test_every_field_comes_back() -> None:
    for txn in (FULL, Txn("t", 1, 0), FULL._replace(partitions=frozenset()), Forgotten("t")):
        assert CODEC.decode(*CODEC.encode(txn)) == txn


def test_version_0_is_read() -> None:
    value = struct.pack(">hqhibi", 0, 7, 3, 60_000, 1, 1)
    value += struct.pack(">h1sii", 1, b"a", 1, 4) + struct.pack(">qq", 222, 111)
    found = CODEC.decode(b"\x00\x00\x00\x01t", value)
    assert found == Txn(
        "t", 7, 3, TxnState.ONGOING, 60_000, frozenset({("a", 4)}), started_ms=111, updated_ms=222
    )


def test_unknown_versions_are_skipped_and_unknown_tags_passed_over() -> None:
    """Item 60."""
    key, value = CODEC.encode(FULL)
    assert value is not None
    assert CODEC.decode(b"\x00\x09" + key[2:], value) is None
    assert CODEC.decode(key, b"\x00\x09" + value[2:]) is None
    bare = CODEC.encode(Txn("id-é", 7, 3))[1]
    assert bare is not None and bare.endswith(b"\x00")
    assert CODEC.decode(key, bare[:-1] + b"\x01\x4d\x02ab") == Txn("id-é", 7, 3)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_damage_is_told(cut: int) -> None:
    key, value = CODEC.encode(FULL)
    assert value is not None
    with pytest.raises(DecodeError):
        CODEC.decode(key, value[:cut])
    with pytest.raises(DecodeError):
        CODEC.decode(key[:3], value)
