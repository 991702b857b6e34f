"""The fields of Kafka's messages one by one, for the few records whose layouts are ours. Pure.

kio has no schemas for what coordinators write into their own logs. Each `put_…` appends to a
bytearray; a `Fields` takes the same things out again, in order. Flexible forms (KIP-482) have
lengths as unsigned varints of n + 1, 0 for null, and tagged fields at the end.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar
from uuid import UUID

from ledgerstream.errors import DecodeError
from ledgerstream.wire.batches import read_unsigned_varint, unsigned_varint

I8, I16, I32, I64 = (struct.Struct(form) for form in (">b", ">h", ">i", ">q"))
T = TypeVar("T")


def put_varint(out: bytearray, value: int) -> None:
    out += unsigned_varint(value)


def put_bytes(out: bytearray, value: bytes | None) -> None:
    put_varint(out, 0 if value is None else len(value) + 1)
    out += value or b""


def put_string(out: bytearray, value: str | None) -> None:
    put_bytes(out, None if value is None else value.encode())


def put_plain_string(out: bytearray, value: str | None) -> None:
    """Not flexible: a length of 16 bits, −1 for null. Raises ValueError above 32,767 bytes."""
    data = b"" if value is None else value.encode()
    if len(data) > 2**15 - 1:
        raise ValueError("A name of more than 32,767 bytes cannot be written.")
    out += I16.pack(-1 if value is None else len(data)) + data


def put_array(out: bytearray, values: Iterable[T], put: Callable[[bytearray, T], None]) -> None:
    values = list(values)
    put_varint(out, len(values) + 1)
    for value in values:
        put(out, value)


def put_ints(out: bytearray, values: Iterable[int]) -> None:
    """An array of i32."""
    values = list(values)
    put_varint(out, len(values) + 1)
    out += struct.pack(f">{len(values)}i", *values)


def put_tags(out: bytearray, tags: Mapping[int, bytes]) -> None:
    put_varint(out, len(tags))
    for tag in sorted(tags):
        put_varint(out, tag)
        put_varint(out, len(tags[tag]))
        out += tags[tag]


class Fields:
    """A message's fields, taken in order. Every method raises DecodeError where it ends early."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data, self._at = data, at

    def _take(self, form: struct.Struct) -> int:
        try:
            (value,) = form.unpack_from(self._data, self._at)
        except struct.error as error:
            raise DecodeError("A record of a coordinator ends too early.") from error
        self._at += form.size
        return int(value)

    def i8(self) -> int:
        return self._take(I8)

    def i16(self) -> int:
        return self._take(I16)

    def i32(self) -> int:
        return self._take(I32)

    def i64(self) -> int:
        return self._take(I64)

    def varint(self) -> int:
        value, self._at = read_unsigned_varint(self._data, self._at)
        return value

    def raw(self, size: int) -> bytes:
        end = self._at + size
        if size < 0 or end > len(self._data):
            raise DecodeError("A record of a coordinator ends too early.")
        taken, self._at = bytes(self._data[self._at : end]), end
        return taken

    def nullable_bytes(self) -> bytes | None:
        size = self.varint()
        return None if size == 0 else self.raw(size - 1)

    def blob(self) -> bytes:
        return self.nullable_bytes() or b""

    def nullable_string(self) -> str | None:
        return _text(self.nullable_bytes())

    def string(self) -> str:
        return self.nullable_string() or ""

    def nullable_plain_string(self) -> str | None:
        size = self.i16()
        return None if size < 0 else _text(self.raw(size))

    def plain_string(self) -> str:
        return self.nullable_plain_string() or ""

    def plain_array(self, take: Callable[[], T]) -> list[T]:
        """Not flexible: a count of 32 bits; a null one is empty."""
        count = self.i32()
        self._check_count(count)
        return [take() for _ in range(count)]

    def uuid(self) -> UUID:
        return UUID(bytes=self.raw(16))

    def array(self, take: Callable[[], T]) -> list[T]:
        """A null one is empty."""
        return [take() for _ in range(self._count())]

    def ints(self) -> list[int]:
        """An array of i32."""
        count = self._count()
        return list(struct.unpack(f">{count}i", self.raw(4 * count)))

    def _count(self) -> int:
        count = self.varint() - 1
        self._check_count(count)
        return max(count, 0)

    def _check_count(self, count: int) -> None:
        if count > len(self._data) - self._at:  # every entry has a byte at least
            raise DecodeError(f"An array of {count} entries does not fit into its record.")

    def tags(self) -> dict[int, bytes]:
        found = {}
        for _ in range(self.varint()):
            tag = self.varint()
            found[tag] = self.raw(self.varint())
        return found


def _text(data: bytes | None) -> str | None:
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise DecodeError(f"A name in a coordinator's record is not UTF-8: {error}") from error
