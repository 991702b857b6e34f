"""Of encoded rows of several batches, those that one transaction must write.

A row of a table with a key that a later one of the same step replaces is never seen.
For bars, half of what was rewritten were windows that were open between two batches of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ledgerstream.stream.digest import mix
from ledgerstream.stream.kernels import BOOLS, I64, U8, kernel
from ledgerstream.stream.keyed import slot_of
from ledgerstream.stream.tables import Table

_PRIME = np.uint64(0x9E3779B97F4A7C15)


class NewRows(bytes):
    """COPY bytes of rows whose keys are not in the table, nor in what was encoded before them."""


def newest(table: type[Table], parts: Sequence[bytes], count: int) -> tuple[list[bytes], int]:
    """What `encode` gave for batches of one partition, one after the other (`count` rows), as if
    they had been one: of a table with a key the last row of each, new where its first one was."""
    if not table.key_columns() or len(parts) <= 2:  # 2: what one call of `encode` gives
        return list(parts), count
    data = np.frombuffer(b"".join(parts), np.uint8)
    ends = np.cumsum([len(part) for part in parts])
    fresh = np.array([isinstance(part, NewRows) for part in parts])
    key = np.array([column.primary_key for column in table.relation().columns])
    new, known, kept = _newest_rows(data, ends, fresh, key, count)
    return [NewRows(new.tobytes()), known.tobytes()], kept


@kernel
def _newest_rows(data: U8, ends: I64, fresh: BOOLS, key: BOOLS, count: int) -> tuple[U8, U8, int]:
    """The bytes of the last row of each key, those of keys that began in a fresh part apart, in
    the order in which keys were first met; and how many rows they are."""
    slots = 16
    while slots < 2 * count:
        slots *= 2
    index = np.zeros(slots, np.int64)  # key + 1
    last = np.empty((count, 2), np.int64)  # of each key: where its last row begins and ends
    new = np.empty(count, np.bool_)
    keys = at = part = 0
    sizes = np.zeros(2, np.int64)
    while at < len(data):
        while at >= ends[part]:
            part += 1
        end, tag = _row_end(data, at, key)
        slot = slot_of(tag, slots - 1)
        while index[slot] != 0 and not _same_key(data, last[index[slot] - 1, 0], at, key):
            slot = (slot + 1) & (slots - 1)
        if index[slot] == 0:
            new[keys] = fresh[part]
            last[keys, 0] = last[keys, 1] = 0
            keys += 1
            index[slot] = keys
        which = index[slot] - 1
        sizes[np.int64(new[which])] += end - at - (last[which, 1] - last[which, 0])
        last[which, 0], last[which, 1] = at, end
        at = end
    known_rows, new_rows = np.empty(sizes[0], np.uint8), np.empty(sizes[1], np.uint8)
    known_at = new_at = 0
    for k in range(keys):
        size = last[k, 1] - last[k, 0]
        row = data[last[k, 0] : last[k, 1]]
        if new[k]:
            new_rows[new_at : new_at + size] = row
            new_at += size
        else:
            known_rows[known_at : known_at + size] = row
            known_at += size
    return new_rows, known_rows, keys


@kernel
def _field(data: U8, at: int) -> int:
    """The length of the field that begins here."""
    size = 0
    for i in range(4):
        size = size << 8 | np.int64(data[at + i])  # type: ignore[assignment]
    return size


@kernel
def _row_end(data: U8, at: int, key: BOOLS) -> tuple[int, int]:
    """Where the row that begins here ends, and a hash of its key."""
    at += 2
    tag = np.uint64(0)
    for field in range(len(key)):
        end = at + 4 + _field(data, at)
        if key[field]:
            for i in range(at, end):  # the length too
                tag = mix(tag, np.uint64(data[i]), _PRIME)
        at = end
    return at, np.int64(tag)  # type: ignore[return-value]


@kernel
def _same_key(data: U8, a: int, b: int, key: BOOLS) -> bool:
    """Whether the rows that begin at a and b have the same key."""
    a += 2
    b += 2
    for field in range(len(key)):
        size = 4 + _field(data, a)
        other = 4 + _field(data, b)
        if key[field]:
            if size != other:
                return False
            for i in range(size):
                if data[a + i] != data[b + i]:
                    return False
        a += size
        b += other
    return True
