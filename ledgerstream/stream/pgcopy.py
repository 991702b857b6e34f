"""Rows to bytes of Postgres' binary COPY, by one kernel, from columns.

A binary COPY is a header, then for each row an int16 count of fields and for each field an int32
length and its bytes, big-endian, and a trailer. One compiled kernel serves every table: numbers
come as 64-bit words with a width, text as fixed-size bytes whose padding is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from sqlalchemy import BigInteger, Boolean, Double, Integer, SmallInteger, String
from sqlalchemy import Column as TableColumn
from sqlalchemy.types import Float

from ledgerstream.errors import ConfigError
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.kernels import BOOLS, I64, U8, kernel
from ledgerstream.stream.keyed import same_words, slot_of, tags_of, text_words
from ledgerstream.stream.newest import NewRows
from ledgerstream.stream.state import BadEvents
from ledgerstream.stream.tables import Rows, Table, ordinals

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
_TEXT = 0  # the width of a column whose fields vary
_CHUNK = 2_048  # rows encoded at a time, so that their words stay in the cache


@cache
def widths(table: type[Table]) -> tuple[int, ...]:
    """Bytes of each column's field, in table order; 0 for text. Raises ConfigError."""
    return tuple(_width(table, column) for column in table.relation().columns)


def _width(table: type[Table], column: TableColumn) -> int:
    match column.type:
        case Boolean():
            return 1
        case SmallInteger():
            return 2
        case BigInteger() | Double():
            return 8
        case Integer():
            return 4
        case String():
            return _TEXT
        case Float():
            return 8
    raise ConfigError(
        f"{table.__name__}.{column.name}: {column.type!r} cannot be filled from columns.",
        "Use int, a narrower Int16 or Int32, money, Timestamp, float, bool or str.",
    )


def encode(
    parts: Sequence[Rows], batch: Batch, topic_number: int, partition: int
) -> tuple[list[bytes], int]:
    """The COPY bytes (without header and trailer) of one table's rows from one batch, and how many
    rows.

    Of a table with a key, the last row of each; the others are checked and left out. Raises
    BadEvents for a number that its column cannot hold and for text with a NUL in it, and
    ConfigError for a column whose array is of another kind.
    """
    table = parts[0].table
    fields = []
    for rows, n in zip(parts, ordinals([part.event for part in parts]), strict=True):
        if rows.every and len(rows) != len(batch):
            raise ConfigError(
                f"{table.__name__}.upsert: {len(rows)} rows were given for {len(batch)} events.",
                "Put the batch in front, and say which events they are of: of=….",
            )
        columns = {
            **rows.columns,
            "ls_offset": batch.offset[rows.event],
            "ls_topic_id": np.full(len(rows), topic_number),
            "ls_partition": np.full(len(rows), partition),
            "ls_n": n,
        }
        fields.append(_fields(table, columns, rows.new))
    if not table.key_columns():
        return [_encode(table, each) for each in fields], sum(len(each) for each in fields)
    newest = _newest(table, fields)
    fresh, known = newest.take(newest.new), newest.take(~newest.new)
    return [NewRows(_encode(table, fresh)), _encode(table, known)], len(newest)


@dataclass(frozen=True)
class _Fields:
    """Rows as the kernel takes them: numbers int64[rows] and texts uint8[rows, size], each in table
    order, checked; the offset of each row, and `Rows.new`."""

    words: list[np.ndarray]
    texts: list[np.ndarray]
    offset: np.ndarray
    new: np.ndarray

    def __len__(self) -> int:
        return len(self.offset)

    def take(self, which: np.ndarray) -> _Fields:
        return _Fields(
            [each[which] for each in self.words],
            [each[which] for each in self.texts],
            self.offset[which],
            self.new[which],
        )


def _fields(table: type[Table], columns: dict[str, np.ndarray], new: np.ndarray | None) -> _Fields:
    offset = columns["ls_offset"]
    words, texts = [], []
    for column, width in zip(table.relation().columns, widths(table), strict=True):
        where = f"{table.__name__}.{column.name}"
        value = columns[column.name]
        if width == _TEXT:
            texts.append(_as_text(where, value))
        elif isinstance(column.type, (Double, Float)):
            words.append(_as_float(where, value))
        else:
            words.append(_as_int(where, value, width, isinstance(column.type, Boolean), offset))
    return _Fields(words, texts, offset, np.zeros(len(offset), bool) if new is None else new)


def _newest(table: type[Table], parts: list[_Fields]) -> _Fields:
    """The last row of each key, by offset, then n."""
    together = _together(parts)
    for each in together.texts:
        if (bad := _first_nul(each)) >= 0:
            raise _holds_nul(table, int(together.offset[bad]))
    relation = table.relation()
    assert relation.columns.keys()[-1] == "ls_n"
    keys: list[np.ndarray] = []
    word = text = 0
    for column, width in zip(relation.columns, widths(table), strict=True):
        if width == _TEXT:
            if column.primary_key:
                size = together.texts[text].shape[1]
                keys.append(text_words(together.texts[text].view(f"S{size}")[:, 0], size))
            text += 1
        else:
            if column.primary_key:
                keys.append(together.words[word][:, None])
            word += 1
    n = together.words[-1]
    matrix = np.ascontiguousarray(np.concatenate(keys, axis=1))
    order = np.lexsort((n, together.offset))
    return together.take(order[_last_of_each(matrix[order])])


def _together(parts: list[_Fields]) -> _Fields:
    if len(parts) == 1:
        return parts[0]
    texts = []
    for some in zip(*(part.texts for part in parts), strict=True):
        size = max(each.shape[1] for each in some)
        texts.append(np.concatenate([np.pad(t, ((0, 0), (0, size - t.shape[1]))) for t in some]))
    words = [np.concatenate(some) for some in zip(*(part.words for part in parts), strict=True)]
    offset = np.concatenate([part.offset for part in parts])
    return _Fields(words, texts, offset, np.concatenate([part.new for part in parts]))


def _encode(table: type[Table], fields: _Fields) -> bytes:
    words, texts, offset = fields.words, fields.texts, fields.offset
    count = len(offset)
    sizes = np.array([text.shape[1] for text in texts], np.int64)
    layout = np.array(widths(table), np.int64)
    fixed = 2 + 4 * len(layout) + int(layout.sum())
    out = np.empty(count * (fixed + int(sizes.sum())), np.uint8)
    used = 0
    block = np.empty((len(words), min(count, _CHUNK)), np.int64)
    for first in range(0, count, _CHUNK):
        rows = slice(first, min(first + _CHUNK, count))
        size = rows.stop - first
        for into, word in zip(block, words, strict=True):
            into[:size] = word[rows]
        text = np.concatenate([t[rows] for t in texts], axis=1) if texts else _NO_TEXT
        used, bad = _encode_rows(block, text, layout, sizes, size, out, used)
        if bad >= 0:
            raise _holds_nul(table, int(offset[first + bad]))
    return out[:used].tobytes()


def _holds_nul(table: type[Table], offset: int) -> BadEvents:
    return BadEvents([offset], f"text for {table.__name__} holds a NUL character.")


_NO_TEXT = np.empty((0, 0), np.uint8)


def _as_text(where: str, value: np.ndarray) -> np.ndarray:
    """uint8[n, size], padded with NUL."""
    if value.dtype.kind in "UO":
        value = np.array([str(each).encode() for each in value], dtype=np.bytes_)
    if value.dtype.kind != "S":
        raise ConfigError(f"{where} is text, but was given {value.dtype}.")
    size = value.dtype.itemsize
    return np.ascontiguousarray(value).view(np.uint8).reshape(len(value), size)


def _as_float(where: str, value: np.ndarray) -> np.ndarray:
    if value.dtype.kind not in "fiu":
        raise ConfigError(f"{where} is a float, but was given {value.dtype}.")
    return np.ascontiguousarray(value, np.float64).view(np.int64)


def _as_int(
    where: str, value: np.ndarray, width: int, boolean: bool, offset: np.ndarray
) -> np.ndarray:
    if boolean != (value.dtype.kind == "b") or value.dtype.kind not in "iub":
        raise ConfigError(
            f"{where} is {'bool' if boolean else 'an integer'}, but was given {value.dtype}.",
            "Round or compare in the processor, where the rule can be read.",
        )
    if value.dtype.itemsize > width or value.dtype == np.uint64:
        limit = 2 ** (8 * width - 1)
        outside = (
            (value >= limit) | (value < -limit)
            if value.dtype != np.uint64
            else (value >= np.uint64(limit))
        )
        if outside.any():
            at = int(np.argmax(outside))
            raise BadEvents(
                [int(offset[at])], f"{int(value[at])} does not fit {where} ({width} bytes)."
            )
    return value.astype(np.int64, copy=False)


@kernel
def _first_nul(text: U8) -> int:
    """The first row with a NUL in front of its padding; -1 if there is none."""
    for row in range(len(text)):
        size = text.shape[1]
        while size > 0 and text[row, size - 1] == 0:
            size -= 1
        for i in range(size):
            if text[row, i] == 0:
                return row
    return -1


@kernel
def _last_of_each(keys: I64) -> BOOLS:
    """Whether each row is the last of its key."""
    tags = tags_of(keys)
    slots = 16
    while slots < 2 * len(keys):
        slots *= 2
    index = np.zeros(slots, np.int64)  # row + 1
    last = np.zeros(len(keys), np.bool_)
    for row in range(len(keys) - 1, -1, -1):
        slot = slot_of(tags[row], slots - 1)
        while index[slot] != 0 and not same_words(keys, index[slot] - 1, 0, keys, row):
            slot = (slot + 1) & (slots - 1)
        if index[slot] == 0:
            index[slot] = row + 1
            last[row] = True
    return last


@kernel
def _encode_rows(
    words: I64, texts: U8, widths: I64, sizes: I64, count: int, out: U8, at: int
) -> tuple[int, int]:
    """Encode `count` rows into out[at:]; returns the end, and the row whose text holds a NUL."""
    fields = len(widths)
    for row in range(count):
        out[at] = fields >> 8
        out[at + 1] = fields & 0xFF
        at += 2
        word = 0
        text = 0
        start = 0
        for field in range(fields):
            width = widths[field]
            if width == 0:
                end = start + sizes[text]
                size = sizes[text]
                while size > 0 and texts[row, start + size - 1] == 0:
                    size -= 1
                out[at] = size >> 24
                out[at + 1] = (size >> 16) & 0xFF
                out[at + 2] = (size >> 8) & 0xFF
                out[at + 3] = size & 0xFF
                at += 4
                for i in range(size):
                    byte = texts[row, start + i]
                    if byte == 0:
                        return at, row
                    out[at + i] = byte
                at += size
                start = end
                text += 1
                continue
            value = words[word, row]
            word += 1
            out[at] = 0
            out[at + 1] = 0
            out[at + 2] = 0
            out[at + 3] = width
            at += 4
            if width == 8:
                out[at] = (value >> 56) & 0xFF
                out[at + 1] = (value >> 48) & 0xFF
                out[at + 2] = (value >> 40) & 0xFF
                out[at + 3] = (value >> 32) & 0xFF
                out[at + 4] = (value >> 24) & 0xFF
                out[at + 5] = (value >> 16) & 0xFF
                out[at + 6] = (value >> 8) & 0xFF
                out[at + 7] = value & 0xFF
            else:
                for i in range(width):
                    out[at + i] = (value >> (8 * (width - 1 - i))) & 0xFF
            at += width
    return at, -1
