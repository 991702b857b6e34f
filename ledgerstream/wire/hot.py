"""Produce requests and the replies of Produce and Fetch by hand: kio is too slow for these.

`tests/wire/test_hot.py` holds them equal to kio, version by version.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from ledgerstream.errors import DecodeError, ProtocolError
from ledgerstream.wire.batches import Buffer, read_unsigned_varint, unsigned_varint
from ledgerstream.wire.messages import skip_tags

FETCH_FLEXIBLE = 12
FETCH_TOPIC_IDS = 13
PRODUCE_FLEXIBLE = 9
PRODUCE_TOPIC_IDS = PRODUCE_VERSION_MAX = 13

_I16 = struct.Struct(">h")
_I32 = struct.Struct(">i")
_ACKS = struct.Struct(">hi")  # acks, timeout in ms
_FRAME = struct.Struct(">ii")  # length, correlation id


class Produced(NamedTuple):
    """What came of one partition of a Produce request. `append_time` in ms, -1 for CreateTime."""

    partition: int
    error: int
    base_offset: int
    append_time: int
    log_start: int
    message: str | None = None


class ProducedTopic(NamedTuple):
    name: str
    topic_id: UUID | None
    partitions: Sequence[Produced]


class Fetched(NamedTuple):
    """What came of one partition of a Fetch request.

    `aborted` pairs (producer id, first offset), None for read_uncommitted; `diverging` (epoch, end
    offset) where the reader's log is not ours.
    """

    partition: int
    error: int
    high_watermark: int
    last_stable: int
    log_start: int
    aborted: Sequence[tuple[int, int]] | None
    records: Sequence[Buffer]
    diverging: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        return sum(map(len, self.records))


class FetchedTopic(NamedTuple):
    name: str
    topic_id: UUID | None
    partitions: Sequence[Fetched]


class ProducePart(NamedTuple):
    """One partition's batch. `records` is a view of the frame and lives no longer than it."""

    partition: int
    records: Buffer | None


class ProduceTopic(NamedTuple):
    """By name up to version 12, by id (None for the zero id) from 13 on."""

    name: str
    topic_id: UUID | None
    partitions: Sequence[ProducePart]


class ProduceRequest(NamedTuple):
    transactional_id: str | None
    acks: int
    timeout_ms: int
    topics: Sequence[ProduceTopic]


def read_produce(frame: Buffer, at: int, version: int) -> ProduceRequest:
    """A Produce request whose header ends at `at`, versions 3 to 13. Raises ProtocolError."""
    try:
        return _read_produce(frame, at, version)
    except (struct.error, IndexError, ValueError, DecodeError) as error:
        raise ProtocolError(f"A ProduceRequest v{version} is malformed: {error!r}") from error


def _read_produce(frame: Buffer, at: int, version: int) -> ProduceRequest:
    flexible, by_id = version >= PRODUCE_FLEXIBLE, version >= PRODUCE_TOPIC_IDS
    end = len(frame)
    transactional_id, at = _read_string(frame, at, flexible)
    acks, timeout_ms = _ACKS.unpack_from(frame, at)
    count, at = _read_count(frame, at + _ACKS.size, flexible)
    topics = []
    for _ in range(count):
        name, topic_id = "", None
        if by_id:
            raw = bytes(frame[at : at + 16])
            topic_id = UUID(bytes=raw) if any(raw) else None
            at += 16
        else:
            named, at = _read_string(frame, at, flexible)
            if named is None:
                raise DecodeError("a topic has no name")
            name = named
        parts_count, at = _read_count(frame, at, flexible)
        parts = []
        for _ in range(parts_count):
            (index,) = _I32.unpack_from(frame, at)
            size, at = _read_length(frame, at + 4, flexible)
            records = None
            if size >= 0:
                if at + size > end:
                    raise DecodeError("a batch runs past the end")
                records = frame[at : at + size]
                at += size
            if flexible:
                at = skip_tags(frame, at) if frame[at] else at + 1
            parts.append(ProducePart(index, records))
        if flexible:
            at = skip_tags(frame, at)
        topics.append(ProduceTopic(name, topic_id, parts))
    if flexible:
        at = skip_tags(frame, at)
    if at > end:
        raise DecodeError("it ends too early")
    return ProduceRequest(transactional_id, acks, timeout_ms, topics)


def _read_length(frame: Buffer, at: int, flexible: bool) -> tuple[int, int]:
    """(length, next position); -1 is null."""
    if flexible:
        size, at = read_unsigned_varint(frame, at)
        return size - 1, at
    (size,) = _I32.unpack_from(frame, at)
    if size < -1:
        raise DecodeError(f"a length of {size}")
    return size, at + 4


def _read_count(frame: Buffer, at: int, flexible: bool) -> tuple[int, int]:
    """(elements of an array that cannot be null, next position); each takes a byte at least."""
    count, at = _read_length(frame, at, flexible)
    if not 0 <= count <= len(frame) - at:
        raise DecodeError(f"an array of {count} elements")
    return count, at


def _read_string(frame: Buffer, at: int, flexible: bool) -> tuple[str | None, int]:
    if flexible:
        size, at = read_unsigned_varint(frame, at)
        size -= 1
    else:
        (size,) = _I16.unpack_from(frame, at)
        at += 2
    if size < 0:
        return None, at
    if at + size > len(frame):
        raise DecodeError("a string runs past the end")
    return bytes(frame[at : at + size]).decode(), at + size


def _string(value: str | None, flexible: bool) -> bytes:
    if value is None:
        return b"\x00" if flexible else b"\xff\xff"
    raw = value.encode()
    return (unsigned_varint(len(raw) + 1) if flexible else struct.pack(">h", len(raw))) + raw


def _count(value: int, flexible: bool) -> bytes:
    return unsigned_varint(value + 1) if flexible else _I32.pack(value)


def _topic(name: str, topic_id: UUID | None, by_id: bool, flexible: bool) -> bytes:
    if by_id:
        return topic_id.bytes if topic_id else bytes(16)
    return _string(name, flexible)


_PRODUCED = struct.Struct(">ihq")


def produce_reply(
    version: int, correlation_id: int, topics: Sequence[ProducedTopic], throttle_ms: int = 0
) -> bytes:
    """A whole Produce reply, versions 3 to 13."""
    flexible, by_id = version >= PRODUCE_FLEXIBLE, version >= PRODUCE_TOPIC_IDS
    out = [b"\x00" if flexible else b"", _count(len(topics), flexible)]
    for topic in topics:
        out += (
            _topic(topic.name, topic.topic_id, by_id, flexible),
            _count(len(topic.partitions), flexible),
        )
        for part in topic.partitions:
            out.append(_PRODUCED.pack(part.partition, part.error, part.base_offset))
            out.append(struct.pack(">q", part.append_time))
            if version >= 5:
                out.append(struct.pack(">q", part.log_start))
            if version >= 8:
                out += (_count(0, flexible), _string(part.message, flexible))
            if flexible:
                out.append(b"\x00")
        if flexible:
            out.append(b"\x00")
    out.append(_I32.pack(throttle_ms))
    if flexible:
        out.append(b"\x00")
    body = b"".join(out)
    return _FRAME.pack(len(body) + 4, correlation_id) + body


_FETCHED = struct.Struct(">ihqq")


def fetch_reply(
    version: int,
    correlation_id: int,
    topics: Sequence[FetchedTopic],
    *,
    error: int = 0,
    session_id: int = 0,
    throttle_ms: int = 0,
) -> list[Buffer]:
    """A whole Fetch reply, versions 4 to 18, as buffers to be written in order."""
    flexible, by_id = version >= FETCH_FLEXIBLE, version >= FETCH_TOPIC_IDS
    pieces: list[Buffer] = []
    head = bytearray(_FRAME.size)
    if flexible:
        head += b"\x00"
    head += _I32.pack(throttle_ms)
    if version >= 7:
        head += struct.pack(">hi", error, session_id)
    head += _count(len(topics), flexible)
    size = 0
    for topic in topics:
        head += _topic(topic.name, topic.topic_id, by_id, flexible)
        head += _count(len(topic.partitions), flexible)
        for part in topic.partitions:
            head += _FETCHED.pack(part.partition, part.error, part.high_watermark, part.last_stable)
            if version >= 5:
                head += struct.pack(">q", part.log_start)
            head += _aborted(part.aborted, flexible)
            if version >= 11:
                head += b"\xff\xff\xff\xff"  # preferred_read_replica: none
            head += _count(part.size, flexible)
            if part.records:
                size += len(head) + part.size
                pieces.append(bytes(head))
                pieces += part.records
                head = bytearray()
            if flexible:
                head += _diverging(part.diverging)
        if flexible:
            head += b"\x00"
    if flexible:
        head += b"\x00"
    size += len(head)
    pieces.append(bytes(head))
    first = bytearray(pieces[0])
    _FRAME.pack_into(first, 0, size - 4, correlation_id)
    pieces[0] = bytes(first)
    return pieces


def produce_request(
    version: int,
    correlation_id: int,
    client_id: str,
    acks: int,
    timeout_ms: int,
    topics: Sequence[tuple[str, UUID | None, Sequence[tuple[int, Sequence[Buffer]]]]],
    transactional_id: str | None = None,
) -> list[Buffer]:
    """A whole Produce request, versions 3 to 13: (name, id, [(partition, batch as buffers)])."""
    flexible, by_id = version >= PRODUCE_FLEXIBLE, version >= PRODUCE_TOPIC_IDS
    name = client_id.encode()
    head = bytearray(4)
    head += struct.pack(">hhih", 0, version, correlation_id, len(name)) + name
    if flexible:
        head += b"\x00"
    head += _string(transactional_id, flexible) + struct.pack(">hi", acks, timeout_ms)
    head += _count(len(topics), flexible)
    pieces: list[Buffer] = []
    size = 0
    for topic, topic_id, parts in topics:
        head += _topic(topic, topic_id, by_id, flexible) + _count(len(parts), flexible)
        for partition, batch in parts:
            batch_size = sum(map(len, batch))
            head += _I32.pack(partition) + _count(batch_size, flexible)
            size += len(head) + batch_size
            pieces.append(bytes(head))
            pieces += batch
            head = bytearray(b"\x00") if flexible else bytearray()
        if flexible:
            head += b"\x00"
    if flexible:
        head += b"\x00"
    size += len(head)
    pieces.append(bytes(head))
    pieces[0] = _I32.pack(size - 4) + bytes(pieces[0])[4:]
    return pieces


def _aborted(aborted: Sequence[tuple[int, int]] | None, flexible: bool) -> bytes:
    if aborted is None:
        return b"\x00" if flexible else b"\xff\xff\xff\xff"
    tag = b"\x00" if flexible else b""
    return _count(len(aborted), flexible) + b"".join(
        struct.pack(">qq", producer_id, first) + tag for producer_id, first in aborted
    )


def _diverging(diverging: tuple[int, int] | None) -> bytes:
    """The tagged fields of a partition: diverging_epoch is tag 0."""
    if diverging is None:
        return b"\x00"
    return b"\x01\x00\x0d" + struct.pack(">iq", *diverging) + b"\x00"
