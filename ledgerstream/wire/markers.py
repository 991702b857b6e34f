"""Markers, which end a transaction in a partition (KIP-98), and which partition a key goes to.

A marker is a batch of one control record. Its key is (version i16, type i16: 0 abort, 1 commit),
its value (version i16, coordinator epoch i32), big-endian, as Apache Kafka writes them.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ledgerstream.errors import DecodeError
from ledgerstream.wire.batches import (
    CONTROL,
    TRANSACTIONAL,
    Buffer,
    NewRecord,
    encode_batch,
    parse_header,
    records,
)

ABORT, COMMIT = 0, 1
_KEY = struct.Struct(">hh")
_VALUE = struct.Struct(">hi")


class Marker(NamedTuple):
    """The end of a producer's transaction in one partition."""

    producer_id: int
    producer_epoch: int
    coordinator_epoch: int
    committed: bool


def encode_marker(marker: Marker, now_ms: int) -> bytes:
    """The control batch of a marker, not yet placed."""
    kind = COMMIT if marker.committed else ABORT
    record = NewRecord(_KEY.pack(0, kind), _VALUE.pack(0, marker.coordinator_epoch), now_ms)
    return encode_batch(
        [record],
        producer_id=marker.producer_id,
        producer_epoch=marker.producer_epoch,
        attributes=TRANSACTIONAL | CONTROL,
    )


def read_marker(batch: Buffer, at: int = 0) -> Marker | None:
    """What the control batch at `at` says; None if it is of another kind (a leader change, …).

    Raises DecodeError where it is malformed.
    """
    header = parse_header(batch, at)
    if header.record_count == 0:
        return None  # compaction has taken the whole transaction
    record = next(iter(records(batch, at)))
    try:
        _, kind = _KEY.unpack_from(record.key or b"")
        if kind not in (ABORT, COMMIT):
            return None
        _, coordinator_epoch = _VALUE.unpack_from(record.value or b"")
    except struct.error as error:
        raise DecodeError(f"A control record is malformed: {error}") from error
    return Marker(header.producer_id, header.producer_epoch, coordinator_epoch, kind == COMMIT)


def java_hash(text: str) -> int:
    """Java's String.hashCode: over UTF-16 units, as a signed 32-bit number."""
    value = 0
    units = text.encode("utf-16-be", "surrogatepass")
    for at in range(0, len(units), 2):
        value = (value * 31 + (units[at] << 8 | units[at + 1])) & 0xFFFF_FFFF
    return value - 2**32 if value >= 2**31 else value


def coordinator_partition(key: str, partitions: int) -> int:
    """The partition of an internal topic that a transactional id or a group belongs to."""
    value = java_hash(key)
    return (0 if value == -(2**31) else abs(value)) % partitions
