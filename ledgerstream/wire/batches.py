"""Record batches, format v2 (KIP-98), as headers, bytes and single records.

Layout of a batch, big-endian (61 bytes of header, then the records, compressed or not):

    base_offset i64 · length i32 (of what follows it) · leader_epoch i32 · magic i8 (2) ·
    crc u32 (of all after it) · attributes i16 · last_offset_delta i32 · base_timestamp i64 ·
    max_timestamp i64 · producer_id i64 · producer_epoch i16 · base_sequence i32 · count i32

base_offset and leader_epoch lie outside the CRC, so the log may set them in a batch that it stores
as it came.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cramjam
from crc32c import crc32c

from ledgerstream.errors import DecodeError
from ledgerstream.limits import KIB, LIMITS

HEADER = struct.Struct(">qiibIhiqqqhii")
HEADER_BYTES = HEADER.size
LOG_OVERHEAD_BYTES = 12  # base_offset and length: what comes before `length` counts
CRC_FROM = 21  # the CRC covers everything from `attributes` on
NO_PRODUCER = -1
NO_SEQUENCE = -1
NO_TIMESTAMP = -1

CODEC_MASK = 0x07
LOG_APPEND_TIME = 0x08
TRANSACTIONAL = 0x10
CONTROL = 0x20
DELETE_HORIZON = 0x40
NONE, GZIP, SNAPPY, LZ4, ZSTD = range(5)
CODECS = ("none", "gzip", "snappy", "lz4", "zstd")

assert HEADER_BYTES == 61

_PREFIX = struct.Struct(">qii")  # base_offset, length, leader_epoch
_U32 = struct.Struct(">I")
Buffer = bytes | bytearray | memoryview


class Header(NamedTuple):
    """The header of one batch, field for field."""

    base_offset: int
    length: int
    leader_epoch: int
    magic: int
    crc: int
    attributes: int
    last_offset_delta: int
    base_timestamp: int  # ms
    max_timestamp: int  # ms
    producer_id: int
    producer_epoch: int
    base_sequence: int
    record_count: int

    @property
    def size(self) -> int:
        """Bytes of the whole batch, header included."""
        return self.length + LOG_OVERHEAD_BYTES

    @property
    def next_offset(self) -> int:
        return self.base_offset + self.last_offset_delta + 1

    @property
    def codec(self) -> int:
        return self.attributes & CODEC_MASK

    @property
    def transactional(self) -> bool:
        return bool(self.attributes & TRANSACTIONAL)

    @property
    def control(self) -> bool:
        return bool(self.attributes & CONTROL)


class Record(NamedTuple):
    """One record, decoded. `timestamp` in ms since 1970 UTC."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


def parse_header(data: Buffer, at: int = 0) -> Header:
    """The header at byte `at`; the caller has seen to it that 61 bytes are there."""
    return Header._make(HEADER.unpack_from(data, at))


def crc_matches(data: Buffer, at: int, header: Header) -> bool:
    return crc32c(memoryview(data)[at + CRC_FROM : at + header.size]) == header.crc


def headers(data: Buffer) -> Iterator[tuple[int, Header]]:
    """(position, header) of each whole batch; a torn one at the end is left out."""
    at, end = 0, len(data)
    while end - at >= HEADER_BYTES:
        header = parse_header(data, at)
        if header.length < HEADER_BYTES - LOG_OVERHEAD_BYTES or at + header.size > end:
            return
        yield at, header
        at += header.size


def placed_prefix(base_offset: int, length: int, leader_epoch: int) -> bytes:
    """The first 16 bytes of a batch that the log has given its place."""
    return _PREFIX.pack(base_offset, length, leader_epoch)


def with_append_time(batch: Buffer, now_ms: int) -> bytes:
    """The batch stamped with the log's time: attributes, max timestamp and CRC are rewritten."""
    out = bytearray(batch)
    header = parse_header(out)
    struct.pack_into(">h", out, 21, header.attributes | LOG_APPEND_TIME)
    struct.pack_into(">q", out, 35, now_ms)
    _U32.pack_into(out, 17, crc32c(memoryview(out)[CRC_FROM:]))
    return bytes(out)


def compress(codec: int, data: bytes) -> bytes:
    """`data` in Kafka's framing of the codec (snappy in xerial's, lz4 frames)."""
    match codec:
        case 0:
            return data
        case 1:
            return bytes(cramjam.gzip.compress(data))
        case 2:
            return _xerial(data)
        case 3:
            framer = cramjam.lz4.Compressor(block_linked=False)  # Kafka reads no linked blocks
            framer.compress(data)
            return bytes(framer.finish())
        case 4:
            return bytes(cramjam.zstd.compress(data, 3))
    raise DecodeError(f"Compression codec {codec} is not one of Kafka's (0 to 4).")


def decompress(codec: int, data: Buffer, bytes_max: int = LIMITS.batch_inflated_bytes_max) -> bytes:
    """A batch's records, inflated. DecodeError if not that codec's, or too large."""
    out: bytes
    try:
        match codec:
            case 0:
                return bytes(data)
            case 1:
                out = _inflate(cramjam.gzip.decompress_into, data, bytes_max)
            case 2:
                out = _unxerial(bytes(data), bytes_max)
            case 3:
                out = _inflate(cramjam.lz4.decompress_into, data, bytes_max)
            case 4:
                out = _inflate(cramjam.zstd.decompress_into, data, bytes_max)
            case _:
                raise DecodeError(f"Compression codec {codec} is not one of Kafka's (0 to 4).")
    except (cramjam.DecompressionError, OSError, ValueError) as error:
        raise DecodeError(f"A batch does not decompress as {CODECS[codec]}: {error}") from error
    return out


def _inflate(into: Callable[[Buffer, bytearray], int], data: Buffer, bytes_max: int) -> bytes:
    """By a decompressor that fills a buffer or says that it is too small: each try has eight times
    the room of the one before, and none has more than `bytes_max`."""
    room = min(max(8 * len(data), 64 * KIB), bytes_max)
    while True:
        out = bytearray(room)
        try:
            size = into(data, out)
        except cramjam.DecompressionError as error:
            if str(error) != _NO_ROOM:
                raise
            if room == bytes_max:
                raise DecodeError(f"A batch inflates to more than {bytes_max:,} bytes.") from error
            room = min(8 * room, bytes_max)
            continue
        return bytes(memoryview(out)[:size])


_NO_ROOM = "failed to write whole buffer"
_XERIAL_MAGIC = b"\x82SNAPPY\x00"
_XERIAL_HEADER = _XERIAL_MAGIC + struct.pack(">ii", 1, 1)
_XERIAL_BLOCK = 32 * 1024


def _xerial(data: bytes) -> bytes:
    """Snappy blocks behind xerial's header, as Java and librdkafka write them."""
    parts = [_XERIAL_HEADER]
    for at in range(0, len(data), _XERIAL_BLOCK):
        block = bytes(cramjam.snappy.compress_raw(data[at : at + _XERIAL_BLOCK]))
        parts += (_U32.pack(len(block)), block)
    return b"".join(parts)


def _unxerial(data: bytes, bytes_max: int) -> bytes:
    if not data.startswith(_XERIAL_MAGIC):
        return _unsnappy(data, bytes_max)
    parts, total, at = [], 0, len(_XERIAL_HEADER)
    while at + 4 <= len(data):
        (size,) = _U32.unpack_from(data, at)
        at += 4
        if at + size > len(data):
            raise DecodeError("A snappy batch ends inside a block.")
        part = _unsnappy(data[at : at + size], bytes_max - total)
        total += len(part)
        parts.append(part)
        at += size
    return b"".join(parts)


def _unsnappy(block: bytes, bytes_max: int) -> bytes:
    inflated, _ = read_unsigned_varint(block, 0)  # snappy states the inflated size in front
    if inflated > bytes_max:
        raise DecodeError(f"A batch inflates to more than {bytes_max:,} bytes.")
    return bytes(cramjam.snappy.decompress_raw(block))


def read_unsigned_varint(data: Buffer, at: int) -> tuple[int, int]:
    """(value, next position)."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise DecodeError("A variable-length number runs past its end.")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def unsigned_varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: Buffer, at: int) -> tuple[int, int]:
    """(value, next position) of a zigzag number."""
    raw, at = read_unsigned_varint(data, at)
    return (raw >> 1) ^ -(raw & 1), at


def write_varint(out: bytearray, value: int) -> None:
    raw = (value << 1) ^ (value >> 63)
    raw &= 0xFFFF_FFFF_FFFF_FFFF
    while raw >= 0x80:
        out.append((raw & 0x7F) | 0x80)
        raw >>= 7
    out.append(raw)


def records(batch: Buffer, at: int = 0) -> Iterator[Record]:
    """The records of the batch at `at`, in order. Raises DecodeError where it is malformed."""
    header = parse_header(batch, at)
    body = decompress(header.codec, memoryview(batch)[at + HEADER_BYTES : at + header.size])
    place = 0
    append_time = header.attributes & LOG_APPEND_TIME
    for _ in range(header.record_count):
        size, place = read_varint(body, place)
        end = place + size
        if size < 0 or end > len(body):
            raise DecodeError("A record is longer than its batch.")
        place += 1  # attributes: unused
        timestamp_delta, place = read_varint(body, place)
        offset_delta, place = read_varint(body, place)
        key, place = _read_nullable(body, place)
        value, place = _read_nullable(body, place)
        pairs: list[tuple[str, bytes | None]] = []
        header_count, place = read_varint(body, place)
        if header_count < 0 or header_count > end - place:
            raise DecodeError("A record states more headers than it has bytes.")
        for _ in range(header_count):
            name, place = _read_nullable(body, place)
            content, place = _read_nullable(body, place)
            try:
                pairs.append(((name or b"").decode(), content))
            except UnicodeDecodeError as error:
                raise DecodeError("A record header's name is not UTF-8.") from error
        if place != end:
            raise DecodeError("A record's parts do not add up to its length.")
        timestamp = header.max_timestamp if append_time else header.base_timestamp + timestamp_delta
        yield Record(header.base_offset + offset_delta, timestamp, key, value, tuple(pairs))
    if place != len(body):
        raise DecodeError("A batch holds more bytes than its records.")


def _read_nullable(body: bytes, at: int) -> tuple[bytes | None, int]:
    size, at = read_varint(body, at)
    if size < 0:
        return None, at
    if at + size > len(body):
        raise DecodeError("A record's key, value or header is longer than its batch.")
    return body[at : at + size], at + size


class NewRecord(NamedTuple):
    """A record to be written. `timestamp` in ms since 1970 UTC."""

    key: bytes | None
    value: bytes | None
    timestamp: int
    headers: Sequence[tuple[str, bytes | None]] = ()


def encode_records(items: Sequence[NewRecord]) -> bytes:
    """The body of a batch: records with deltas to the first one's timestamp, uncompressed."""
    out = bytearray()
    base_timestamp = items[0].timestamp
    for delta, item in enumerate(items):
        body = bytearray(b"\x00")
        write_varint(body, item.timestamp - base_timestamp)
        write_varint(body, delta)
        _write_nullable(body, item.key)
        _write_nullable(body, item.value)
        write_varint(body, len(item.headers))
        for name, content in item.headers:
            _write_nullable(body, name.encode())
            _write_nullable(body, content)
        write_varint(out, len(body))
        out += body
    return bytes(out)


def _write_nullable(out: bytearray, content: bytes | None) -> None:
    if content is None:
        write_varint(out, -1)
    else:
        write_varint(out, len(content))
        out += content


def encode_batch(
    items: Sequence[NewRecord],
    *,
    base_offset: int = 0,
    codec: int = NONE,
    producer_id: int = NO_PRODUCER,
    producer_epoch: int = -1,
    base_sequence: int = NO_SEQUENCE,
    attributes: int = 0,
) -> bytes:
    """A whole batch of at least one record, CRC set."""
    timestamps = [item.timestamp for item in items]
    return seal_batch(
        compress(codec, encode_records(items)),
        count=len(items),
        base_offset=base_offset,
        attributes=attributes | codec,
        base_timestamp=timestamps[0],
        max_timestamp=max(timestamps),
        producer_id=producer_id,
        producer_epoch=producer_epoch,
        base_sequence=base_sequence,
    )


def seal_batch(
    body: Buffer,
    *,
    count: int,
    base_timestamp: int,
    max_timestamp: int,
    base_offset: int = 0,
    attributes: int = 0,
    producer_id: int = NO_PRODUCER,
    producer_epoch: int = -1,
    base_sequence: int = NO_SEQUENCE,
    leader_epoch: int = -1,
    last_offset_delta: int | None = None,
) -> bytes:
    """Put a header with lengths and CRC in front of an encoded (and perhaps compressed) body.

    `last_offset_delta`: where compaction has taken some of the batch's records.
    """
    out = bytearray(HEADER_BYTES + len(body))
    HEADER.pack_into(
        out,
        0,
        base_offset,
        len(out) - LOG_OVERHEAD_BYTES,
        leader_epoch,
        2,
        0,
        attributes,
        count - 1 if last_offset_delta is None else last_offset_delta,
        base_timestamp,
        max_timestamp,
        producer_id,
        producer_epoch,
        base_sequence,
        count,
    )
    out[HEADER_BYTES:] = body
    _U32.pack_into(out, 17, crc32c(memoryview(out)[CRC_FROM:]))
    return bytes(out)
