"""A look at a message's lengths before it is parsed.

kio's parser makes room for as many entries as an array says it has, before it looks for them: five
bytes that lie would ask for hundreds of gigabytes, and that ends the process. So every array is
first held against the bytes that are left. Nothing else is judged here.
"""

from __future__ import annotations

import dataclasses
import struct
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any

from ledgerstream.errors import ProtocolError
from ledgerstream.limits import LIMITS
from ledgerstream.wire.batches import Buffer, read_unsigned_varint

Skip = Callable[[Buffer, int], int]  # (frame, position of a field) → the position after it

_I16, _I32 = struct.Struct(">h"), struct.Struct(">i")
_FIXED = {
    "bool": 1, "int8": 1, "int16": 2, "uint16": 2, "error_code": 2, "int32": 4, "uint32": 4,
    "timedelta_i32": 4, "int64": 8, "float64": 8, "timedelta_i64": 8, "datetime_i64": 8,
    "uuid": 16,
}  # fmt: skip


def check_lengths(schema: Any, frame: Buffer, at: int) -> None:
    """Raises ProtocolError for an array with more entries than there are bytes for, or than the
    limit; other errors of the bytes are left to the parser."""
    try:
        _entity(schema)(frame, at)
    except (struct.error, IndexError):
        pass  # it ends too early: the parser says where


@cache
def _entity(schema: Any) -> Skip:
    """Of a whole entity: runs of fixed size are one step."""
    hints = typing.get_type_hints(schema)
    flexible = schema.__flexible__
    steps: list[tuple[int, Skip]] = []  # so many bytes, then what has to be looked at
    size = 0
    tagged: dict[int, Skip] = {}
    for field in dataclasses.fields(schema):
        step = _field(hints[field.name], field.metadata.get("kafka_type"), flexible)
        if "tag" in field.metadata:
            tagged[field.metadata["tag"]] = _fixed(step) if isinstance(step, int) else step
        elif isinstance(step, int):
            size += step
        else:
            steps.append((size, step))
            size = 0
    if flexible:
        steps.append((size, _tags(tagged)))
        size = 0

    def skip(frame: Buffer, at: int) -> int:
        for before, step in steps:
            at = step(frame, at + before)
        return at + size

    return skip


def _field(hint: Any, kind: str | None, flexible: bool) -> int | Skip:
    """How one field is passed over: its size, where that is fixed."""
    nullable = isinstance(hint, types.UnionType)
    if nullable:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return _array(_field(typing.get_args(hint)[0], kind, flexible), flexible)
    if dataclasses.is_dataclass(hint):
        entity = _entity(typing.cast(Any, hint))
        return _optional(entity) if nullable else entity
    assert kind is not None
    if kind in _FIXED:
        return _FIXED[kind]
    if flexible:
        return _compact
    return _short if kind == "string" else _long


def _fixed(size: int) -> Skip:
    return lambda frame, at: at + size


def _optional(entity: Skip) -> Skip:
    return lambda frame, at: entity(frame, at + 1) if frame[at] == 1 else at + 1


def _compact(frame: Buffer, at: int) -> int:
    size = frame[at]
    if size < 0x80:
        return at + (size or 1)
    size, at = read_unsigned_varint(frame, at)
    return at + size - 1


def _short(frame: Buffer, at: int) -> int:
    (size,) = _I16.unpack_from(frame, at)
    return at + 2 + max(int(size), 0)


def _long(frame: Buffer, at: int) -> int:
    (size,) = _I32.unpack_from(frame, at)
    return at + 4 + max(int(size), 0)


def _array(element: int | Skip, flexible: bool) -> Skip:
    def skip(frame: Buffer, at: int) -> int:
        if flexible:
            count = frame[at]
            if count < 0x80:
                at += 1
            else:
                count, at = read_unsigned_varint(frame, at)
            count -= 1
        else:
            count, at = _I32.unpack_from(frame, at)[0], at + 4
        if count > min(len(frame) - at, LIMITS.array_entries_max):
            raise ProtocolError(f"An array says that it has {count:,} entries.")
        if isinstance(element, int):
            return at + max(count, 0) * element
        for _ in range(count):
            at = element(frame, at)
        return at

    return skip


def _tags(known: dict[int, Skip]) -> Skip:
    """Tagged fields (KIP-482); those that the schema knows are looked into."""

    def skip(frame: Buffer, at: int) -> int:
        count = frame[at]
        if count == 0:
            return at + 1
        count, at = read_unsigned_varint(frame, at)
        for _ in range(count):
            tag, at = read_unsigned_varint(frame, at)
            size, at = read_unsigned_varint(frame, at)
            if tag in known:
                known[tag](frame, at)
            at += size
            if at > len(frame):
                raise IndexError
        return at

    return skip
