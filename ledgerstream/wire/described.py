"""DescribeTransactions replies, read by hand: kio takes no start time of -1, which an id has that
has no transaction yet."""

from __future__ import annotations

import struct
from typing import NamedTuple

from kio.schema.errors import ErrorCode

from ledgerstream.errors import ProtocolError
from ledgerstream.wire.batches import Buffer, read_unsigned_varint
from ledgerstream.wire.messages import BAD_BYTES, skip_tags


class Described(NamedTuple):
    """A transactional id as its coordinator tells of it."""

    error: str  # "none" or the error's name
    txn_id: str
    state: str
    timeout_ms: int
    started_ms: int  # -1 where nothing has been begun
    producer_id: int
    producer_epoch: int
    partitions: tuple[tuple[str, int], ...]


def read_described(frame: Buffer) -> list[Described]:
    """From a reply of version 0, correlation id in front. Raises ProtocolError."""
    try:
        at = skip_tags(frame, 4) + 4  # the correlation id, the header's tags, throttle time
        count, at = read_unsigned_varint(frame, at)
        found = []
        for _ in range(count - 1):
            one, at = _read_one(frame, at)
            found.append(one)
    except (struct.error, *BAD_BYTES) as error:
        raise ProtocolError(f"A DescribeTransactions reply is malformed: {error!r}") from error
    return found


def _read_one(frame: Buffer, at: int) -> tuple[Described, int]:
    (error,) = struct.unpack_from(">h", frame, at)
    txn_id, at = _string(frame, at + 2)
    state, at = _string(frame, at)
    timeout_ms, started_ms, producer_id, epoch = struct.unpack_from(">iqqh", frame, at)
    topics, at = read_unsigned_varint(frame, at + 22)
    partitions = []
    for _ in range(topics - 1):
        topic, at = _string(frame, at)
        indexes, at = read_unsigned_varint(frame, at)
        for _ in range(indexes - 1):
            partitions.append((topic, struct.unpack_from(">i", frame, at)[0]))
            at += 4
        at = skip_tags(frame, at)
    name = ErrorCode(error).name
    one = Described(
        name, txn_id, state, timeout_ms, started_ms, producer_id, epoch, tuple(partitions)
    )
    return one, skip_tags(frame, at)


def _string(frame: Buffer, at: int) -> tuple[str, int]:
    size, at = read_unsigned_varint(frame, at)
    return bytes(frame[at : at + size - 1]).decode(), at + size - 1
