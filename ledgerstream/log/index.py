"""Sparse indexes of a segment, in Kafka's own file formats.

`.index` holds (relative offset i32, position i32), `.timeindex` (timestamp i64, relative offset
i32), big-endian. The older entries are on the disk and read from there; the newest wait in memory
until a checkpoint or a roll writes them, so a sealed or idle segment keeps none. An entry that is
missing costs a longer walk and nothing else: readers need not be in step with writers.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

OFFSET_ENTRY_BYTES = 8
TIME_ENTRY_BYTES = 12
_OFFSET_ENTRY = struct.Struct(">II")
_TIME_ENTRY = struct.Struct(">qi")
_LOW = 0xFFFF_FFFF

ReadAt = Callable[[int, int], bytes | bytearray]  # (position, size) of the index file


class _Index:
    """Entries of a fixed size, ordered by the integer that their first eight bytes are."""

    __slots__ = ("_parts",)
    entry_bytes: int

    def __init__(self, on_disk: int = 0) -> None:
        # Entries on the disk and packed entries in memory: one object, so that a reading thread
        # sees both from the same moment.
        self._parts = on_disk, bytearray()

    def __len__(self) -> int:
        on_disk, waiting = self._parts
        return on_disk + len(waiting) // self.entry_bytes

    def waiting(self) -> tuple[int, bytes]:
        """(position in the file, bytes) still to be written."""
        on_disk, waiting = self._parts
        return on_disk * self.entry_bytes, bytes(waiting)

    def written(self, end: int) -> None:
        """The file now reaches to byte `end`."""
        on_disk, waiting = self._parts
        new = end - on_disk * self.entry_bytes
        if new > 0:
            self._parts = end // self.entry_bytes, waiting[new:]

    def _add(self, entry: bytes) -> None:
        self._parts[1].extend(entry)

    def _last(
        self, bound: int, read: ReadAt, key: Callable[[int], int] | None = None
    ) -> bytes | bytearray | None:
        """The last entry whose integer, or the key of it, is at most `bound`."""
        on_disk, waiting = self._parts
        size = self.entry_bytes
        for count, read_at in (
            (len(waiting) // size, lambda at, length: waiting[at : at + length]),
            (on_disk, read),
        ):
            found = bisect_right(_Integers(count, size, read_at), bound, key=key)
            if found:
                return read_at((found - 1) * size, size)
        return None


class _Integers:
    """What bisect needs of a sequence."""

    def __init__(self, count: int, entry_bytes: int, read: ReadAt) -> None:
        self._count = count
        self._entry_bytes = entry_bytes
        self._read = read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: int) -> int:
        return int.from_bytes(self._read(at * self._entry_bytes, 8), "big", signed=True)


class OffsetIndex(_Index):
    """Where in the segment a batch starts; an entry names the batch's last offset."""

    __slots__ = ()
    entry_bytes = OFFSET_ENTRY_BYTES

    def add(self, relative_offset: int, position: int) -> None:
        self._add(_OFFSET_ENTRY.pack(relative_offset, position))

    def floor(self, relative_offset: int, read: ReadAt) -> int:
        """The position of the last indexed batch that ends at or before the offset, or 0."""
        return _position(self._last(relative_offset << 32 | _LOW, read))

    def floor_position(self, position: int, read: ReadAt) -> int:
        """The position of the last indexed batch that starts at or before `position`, or 0."""
        return _position(self._last(position, read, lambda entry: entry & _LOW))

    def count_below(self, position: int, read: ReadAt) -> int:
        """How many entries of the file lie before `position`."""
        entries = _Integers(self._parts[0], self.entry_bytes, read)
        count = bisect_right(entries, position - 1, key=lambda entry: entry & _LOW)
        while count and entries[count - 1] == 0:
            count -= 1  # never written: the file grew and its content was lost
        return count


def _position(entry: bytes | bytearray | None) -> int:
    return 0 if entry is None else int.from_bytes(entry[4:8], "big")


class TimeEntry(NamedTuple):
    """Nothing at or below `relative_offset` is later than `timestamp`."""

    timestamp: int
    relative_offset: int


class TimeIndex(_Index):
    """The highest timestamp so far, wherever it rises."""

    __slots__ = ("last_timestamp",)
    entry_bytes = TIME_ENTRY_BYTES

    def __init__(self, on_disk: int = 0, last_timestamp: int = -1) -> None:
        super().__init__(on_disk)
        self.last_timestamp = last_timestamp

    def add(self, timestamp: int, relative_offset: int) -> None:
        """Left out unless the time has risen, as Kafka does."""
        if timestamp > self.last_timestamp:
            self.last_timestamp = timestamp
            self._add(_TIME_ENTRY.pack(timestamp, relative_offset))

    def before(self, timestamp: int, read: ReadAt) -> int:
        """The relative offset up to which everything is earlier than `timestamp`, or 0."""
        entry = self._last(timestamp - 1, read)
        return 0 if entry is None else parse_time_entry(entry).relative_offset


def parse_time_entry(entry: bytes | bytearray) -> TimeEntry:
    return TimeEntry._make(_TIME_ENTRY.unpack(entry))
