"""A batch's records as compaction sees them: keys, and the bytes that may be copied as they are."""

from __future__ import annotations

from typing import NamedTuple

from ledgerstream.errors import DecodeError
from ledgerstream.wire.batches import read_varint, write_varint


class Keyed(NamedTuple):
    """A record in the inflated body of its batch: bytes [start, end) with its length in front."""

    start: int
    end: int
    rest_at: int  # what follows the timestamp
    timestamp_delta: int
    offset_delta: int
    key: bytes | None
    has_value: bool


def keyed_records(body: bytes, count: int) -> list[Keyed]:
    """All records of an inflated body. DecodeError where it is malformed.

    Values and headers are passed over. Numbers of one byte, which most are, are read in place.
    """
    out: list[Keyed] = []
    append = out.append
    at = 0
    try:
        for _ in range(count):
            start = at
            byte = body[at]
            if byte < 0x80:
                size, at = byte >> 1, at + 1
            else:
                size, at = read_varint(body, at)
            end = at + size
            at += 1  # attributes: unused
            byte = body[at]
            if byte < 0x80:
                timestamp_delta, at = (byte >> 1) ^ -(byte & 1), at + 1
            else:
                timestamp_delta, at = read_varint(body, at)
            rest_at = at
            byte = body[at]
            if byte < 0x80:
                offset_delta, at = byte >> 1, at + 1
            else:
                offset_delta, at = read_varint(body, at)
            byte = body[at]
            if byte < 0x80:
                key_size, at = (byte >> 1) ^ -(byte & 1), at + 1
            else:
                key_size, at = read_varint(body, at)
            key = None
            if key_size >= 0:
                key = body[at : at + key_size]
                at += key_size
            null = body[at] & 1  # a length below zero
            if at >= end or end > len(body):
                raise DecodeError("A record's key is longer than the record.")
            append(Keyed(start, end, rest_at, timestamp_delta, offset_delta, key, not null))
            at = end
    except IndexError:
        raise DecodeError("A record is longer than its batch.") from None
    return out


def with_base_time(body: bytes, record: Keyed, shift_ms: int) -> bytes:
    """The record's bytes in a batch whose base timestamp is `shift_ms` later."""
    inner = bytearray(b"\x00")
    write_varint(inner, record.timestamp_delta - shift_ms)
    inner += body[record.rest_at : record.end]
    out = bytearray()
    write_varint(out, len(inner))
    return bytes(out + inner)
