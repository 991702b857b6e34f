"""The aborted transactions of a segment, in Kafka's own `.txnindex` format.

An entry (version i16 = 0, producer id, first offset, last offset, last stable offset: i64,
big-endian) for each abort marker that ended a transaction with data, in the order of the markers.
As with the other indexes, older entries are on the disk and read from there.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from ledgerstream.log.index import ReadAt
from ledgerstream.log.opentxns import Ended

ABORTED_ENTRY_BYTES = 34
_ENTRY = struct.Struct(">hqqqq")
_NONE = bytearray()  # shared by all segments that have none waiting: most of them
_READ_ENTRIES = 128  # at once, while walking


class Aborted(NamedTuple):
    """One aborted transaction: its data lies in [first_offset, last_offset), its marker at last."""

    producer_id: int
    first_offset: int
    last_offset: int
    stable_offset: int


class AbortedIndex:
    __slots__ = ("_parts",)

    def __init__(self, on_disk: int = 0) -> None:
        self._parts = on_disk, _NONE  # one object, so that readers see both of one moment

    def __len__(self) -> int:
        on_disk, waiting = self._parts
        return on_disk + len(waiting) // ABORTED_ENTRY_BYTES

    def add(self, ended: Ended) -> None:
        assert not ended.committed
        if self._parts[1] is _NONE:
            self._parts = self._parts[0], bytearray()
        self._parts[1].extend(_ENTRY.pack(0, *ended[:4]))

    def waiting(self) -> tuple[int, bytes]:
        """(position in the file, bytes) still to be written."""
        on_disk, waiting = self._parts
        return on_disk * ABORTED_ENTRY_BYTES, bytes(waiting)

    def written(self, end: int) -> None:
        """The file now reaches to byte `end`."""
        on_disk, waiting = self._parts
        new = end - on_disk * ABORTED_ENTRY_BYTES
        if new > 0:
            self._parts = end // ABORTED_ENTRY_BYTES, waiting[new:] or _NONE

    def count_below(self, offset: int, read: ReadAt) -> int:
        """How many markers lie below `offset`."""
        entries = _Entries(self._parts, read)
        return bisect_left(entries, offset, key=lambda entry: entry.last_offset)

    def since(self, offset: int, read: ReadAt) -> Iterator[Aborted]:
        """Those whose marker lies at or after `offset`, in the order of their markers."""
        entries = _Entries(self._parts, read)
        at = bisect_left(entries, offset, key=lambda entry: entry.last_offset)
        while at < len(entries):
            some = entries.some(at, _READ_ENTRIES)
            yield from some
            at += len(some)


class _Entries:
    """What bisect needs of a sequence: entries of the file, then those in memory."""

    def __init__(self, parts: tuple[int, bytearray], read: ReadAt) -> None:
        self._on_disk, self._waiting = parts
        self._read = read
        self._count = self._on_disk + len(self._waiting) // ABORTED_ENTRY_BYTES

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: int) -> Aborted:
        return self.some(at, 1)[0]

    def some(self, at: int, count: int) -> list[Aborted]:
        """Up to `count` entries from `at` on, at least one."""
        size = ABORTED_ENTRY_BYTES
        if at < self._on_disk:
            count = min(count, self._on_disk - at)
            data: bytes | bytearray = self._read(at * size, count * size)
        else:
            start = (at - self._on_disk) * size
            data = self._waiting[start : start + count * size]
        return [Aborted._make(entry[1:]) for entry in _ENTRY.iter_unpack(data)]
