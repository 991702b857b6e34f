"""Kafka's own record formats: every version is read, those of Apache Kafka 4.3 are written."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest

from ledgerstream.errors import DecodeError
from ledgerstream.groups import (
    GroupCodec,
    GroupForgotten,
    GroupMetadata,
    MemberMetadata,
    OffsetCommitted,
    OffsetForgotten,
)

CODEC = GroupCodec()
OFFSET = OffsetCommitted("g-é", "t", 3, 2**40, 7, "note", 111)
MEMBER = MemberMetadata("m-1", "i", "client", "/127.0.0.1", 300_000, 10_000, b"sub", b"ass")
GROUP = GroupMetadata(
    "g", "consumer", 5, "range", "m-1", 222, (MEMBER, MEMBER._replace(instance_id=None))
)


def text(value: str | None) -> bytes:
    return b"\xff\xff" if value is None else struct.pack(">h", len(value)) + value.encode()


def test_every_field_comes_back() -> None:
    for record in (
        OFFSET, OFFSET._replace(expires_ms=9, leader_epoch=-1), OffsetForgotten("g", "t", 3),
        OFFSET._replace(topic_id=UUID(int=7)), OFFSET._replace(metadata="é" * 4096), GROUP,
        GROUP._replace(protocol=None, leader=None, members=(), protocol_type=""),
        GroupForgotten("g"),
    ):  # fmt: skip
        assert CODEC.decode(*CODEC.encode(record)) == record


def test_what_is_written_is_what_kafka_writes() -> None:
    key, value = CODEC.encode(OFFSET._replace(group="g"))
    assert key == b"\x00\x01" + text("g") + text("t") + b"\x00\x00\x00\x03"
    assert value == struct.pack(">hqi", 4, 2**40, 7) + b"\x05note" + struct.pack(">q", 111) + b"\0"
    _, value = CODEC.encode(OFFSET._replace(topic_id=UUID(int=7)))
    assert value is not None and value.endswith(b"\x01\x00\x10" + bytes(15) + b"\x07")
    _, value = CODEC.encode(OFFSET._replace(expires_ms=222))
    assert value == struct.pack(">hq", 1, 2**40) + text("note") + struct.pack(">qq", 111, 222)
    key, value = CODEC.encode(GROUP)
    assert key == b"\x00\x02" + text("g")
    assert value is not None
    assert value[:2] == b"\x00\x03"


@pytest.mark.parametrize("version", range(5))
def test_offsets_of_every_version_are_read(version: int) -> None:
    value = struct.pack(">hq", version, 42)
    value += struct.pack(">i", 7) if version >= 3 else b""
    value += b"\x02m" if version == 4 else text("m")
    value += struct.pack(">q", 111) + (struct.pack(">q", 222) if version == 1 else b"")
    value += b"\x01\x05\x02xy" if version == 4 else b""  # a tag that is not known here
    for kind in (b"\x00\x00", b"\x00\x01"):
        found = CODEC.decode(kind + text("g") + text("t") + b"\x00\x00\x00\x03", value)
        assert found == OffsetCommitted(
            "g", "t", 3, 42, 7 if version >= 3 else -1, "m", 111, 222 if version == 1 else -1
        )


@pytest.mark.parametrize("version", range(4))
def test_groups_of_every_version_are_read(version: int) -> None:
    value = struct.pack(">h", version) + text("consumer") + struct.pack(">i", 5)
    value += text("range") + text(None)
    value += struct.pack(">q", 222) if version >= 2 else b""
    value += struct.pack(">i", 1) + text("m") + (text("i") if version >= 3 else b"")
    value += text("c") + text("/h") + (struct.pack(">i", 60) if version >= 1 else b"")
    value += struct.pack(">i", 10) + struct.pack(">i", 1) + b"s" + struct.pack(">i", 0)
    assert CODEC.decode(b"\x00\x02" + text("g"), value) == GroupMetadata(
        "g", "consumer", 5, "range", None, 222 if version >= 2 else -1,
        (MemberMetadata(
            "m", "i" if version >= 3 else None, "c", "/h", 60 if version >= 1 else 10, 10, b"s", b""
        ),),
    )  # fmt: skip


def test_groups_of_the_flexible_version_are_read() -> None:
    value = b"\x00\x04\x09consumer" + struct.pack(">i", 5) + b"\x06range\x00"
    value += struct.pack(">q", 222) + b"\x02" + b"\x02m\x00\x02c\x03/h"
    value += struct.pack(">ii", 60, 10) + b"\x02s\x01" + b"\x00\x00"
    assert CODEC.decode(b"\x00\x02" + text("g"), value) == GroupMetadata(
        "g", "consumer", 5, "range", None, 222,
        (MemberMetadata("m", None, "c", "/h", 60, 10, b"s", b""),),
    )  # fmt: skip


def test_unknown_kinds_and_versions_are_skipped() -> None:
    key, value = CODEC.encode(OFFSET)
    assert value is not None
    assert CODEC.decode(b"\x00\x63" + key[2:], value) is None
    assert CODEC.decode(key, b"\x00\x09" + value[2:]) is None
    key, value = CODEC.encode(GROUP)
    assert value is not None
    assert CODEC.decode(key, b"\x00\x09" + value[2:]) is None


@pytest.mark.parametrize("record", [OFFSET, GROUP])
def test_damage_is_an_error(record: OffsetCommitted | GroupMetadata) -> None:
    """Item 60: never half a machine."""
    key, value = CODEC.encode(record)
    assert value is not None
    for at in range(2, len(value)):
        with pytest.raises(DecodeError):
            CODEC.decode(key, value[:at])
    with pytest.raises(DecodeError):
        CODEC.decode(key[:-1], value)
