"""Sparse indexes of a segment, in Kafka's own file formats.

`.index` holds (relative offset i32, position i32), `.timeindex` (timestamp i64, relative offset
i32), big-endian. The older entries are on the disk and read from there, the newest wait in compact
arrays until a checkpoint or a roll writes them; a sealed or idle segment keeps no array. An entry
that is missing costs a longer walk and nothing else, so readers need not be in step with writers.
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import NamedTuple

assert sys.byteorder == "little"

OFFSET_ENTRY_BYTES = 8
TIME_ENTRY_BYTES = 12
_TIME_ENTRY = struct.Struct(">qi")
_LOW = 0xFFFF_FFFF

ReadAt = Callable[[int, int], bytes | bytearray]  # (position, size) of the index file


class OffsetIndex:
    """Where in the segment a batch near an offset starts; entries name its last offset."""

    __slots__ = ("on_disk", "waiting")

    def __init__(self, on_disk: int = 0) -> None:
        self.on_disk = on_disk  # entries
        self.waiting: array[int] = array("Q")  # relative offset << 32 | position: sorted by both

    def __len__(self) -> int:
        return self.on_disk + len(self.waiting)

    def add(self, relative_offset: int, position: int) -> None:
        self.waiting.append(relative_offset << 32 | position)

    def floor(self, relative_offset: int, read: ReadAt) -> int:
        """The position of the last indexed batch that ends at or before the offset, or 0."""
        return self._last(relative_offset << 32 | _LOW, None, read)

    def floor_position(self, position: int, read: ReadAt) -> int:
        """The position of the last indexed batch that starts at or before `position`, or 0."""
        return self._last(position, _position_of, read)

    def _last(self, bound: int, key: Callable[[int], int] | None, read: ReadAt) -> int:
        on_disk = _Entries(self.on_disk, OFFSET_ENTRY_BYTES, read)
        for entries in (self.waiting, on_disk):
            if at := bisect_right(entries, bound, key=key):
                return entries[at - 1] & _LOW
        return 0

    def packed(self) -> bytes:
        """The waiting entries as the file holds them."""
        out = array("Q", self.waiting)
        out.byteswap()
        return out.tobytes()

    def written(self, entries: int) -> None:
        """The first `entries` that waited are in the file."""
        self.on_disk += entries
        self.waiting = self.waiting[entries:]


def _position_of(entry: int) -> int:
    return entry & _LOW


class _Entries:
    """The file's entries as a sequence for bisect, each the integer that its first 8 bytes are."""

    def __init__(self, count: int, entry_bytes: int, read: ReadAt) -> None:
        self._count = count
        self._entry_bytes = entry_bytes
        self._read = read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: int) -> int:
        return int.from_bytes(self._read(at * self._entry_bytes, 8), "big", signed=True)


class TimeEntry(NamedTuple):
    """Nothing at or below `relative_offset` is later than `timestamp`."""

    timestamp: int
    relative_offset: int


class TimeIndex:
    """The highest timestamp so far, wherever it rises."""

    __slots__ = ("last_timestamp", "on_disk", "waiting_offsets", "waiting_timestamps")

    def __init__(self, on_disk: int = 0, last_timestamp: int = -1) -> None:
        self.on_disk = on_disk
        self.last_timestamp = last_timestamp
        self.waiting_timestamps: array[int] = array("q")
        self.waiting_offsets: array[int] = array("I")

    def __len__(self) -> int:
        return self.on_disk + len(self.waiting_offsets)

    def add(self, timestamp: int, relative_offset: int) -> None:
        """Left out unless the time has risen, as Kafka does."""
        if timestamp > self.last_timestamp:
            self.last_timestamp = timestamp
            self.waiting_offsets.append(relative_offset)
            self.waiting_timestamps.append(timestamp)

    def before(self, timestamp: int, read: ReadAt) -> int:
        """The relative offset up to which everything is earlier than `timestamp`, or 0."""
        timestamps, offsets = self.waiting_timestamps, self.waiting_offsets
        if at := bisect_left(timestamps, timestamp):
            return offsets[at - 1]
        at = bisect_left(_Entries(self.on_disk, TIME_ENTRY_BYTES, read), timestamp)
        return self._on_disk(at - 1, read).relative_offset if at else 0

    def last(self, read: ReadAt) -> TimeEntry | None:
        if self.waiting_offsets:
            return TimeEntry(self.waiting_timestamps[-1], self.waiting_offsets[-1])
        return self._on_disk(self.on_disk - 1, read) if self.on_disk else None

    def _on_disk(self, at: int, read: ReadAt) -> TimeEntry:
        return TimeEntry._make(_TIME_ENTRY.unpack(read(at * TIME_ENTRY_BYTES, TIME_ENTRY_BYTES)))

    def packed(self) -> bytes:
        pairs = zip(self.waiting_timestamps, self.waiting_offsets, strict=True)
        return b"".join(_TIME_ENTRY.pack(timestamp, offset) for timestamp, offset in pairs)

    def written(self, entries: int) -> None:
        self.on_disk += entries
        self.waiting_timestamps = self.waiting_timestamps[entries:]
        self.waiting_offsets = self.waiting_offsets[entries:]
