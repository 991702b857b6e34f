"""One segment: a file of batches, the place of the next one, and how to find one of them.

Names are Kafka's: the base offset in twenty digits, `.log`, `.index`, `.timeindex`. The loop places
batches; files are read through a `Source`, either from the page cache or patiently.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from ledgerstream.errors import CorruptError
from ledgerstream.log.aborted import Aborted, AbortedIndex
from ledgerstream.log.config import LogConfig
from ledgerstream.log.disk import Disk, Handle
from ledgerstream.log.index import (
    OFFSET_ENTRY_BYTES,
    TIME_ENTRY_BYTES,
    OffsetIndex,
    ReadAt,
    TimeIndex,
)
from ledgerstream.wire.batches import HEADER_BYTES, Buffer, Header, parse_header

if TYPE_CHECKING:
    from ledgerstream.log.tail import Batch

Source = Callable[[Handle, int, int], bytes | bytearray]  # (handle, position, size)

LOG, INDEX, TIME_INDEX, ABORTED = ".log", ".index", ".timeindex", ".txnindex"
RELATIVE_OFFSET_MAX = 2**31 - 1
_WALK_BYTES = 8 * 1024  # read at once while looking for a batch from an index entry on
_BATCH_BYTES_MIN = HEADER_BYTES


def segment_name(base_offset: int, suffix: str = "") -> str:
    return f"{base_offset:020d}{suffix}"


class SegmentSummary(NamedTuple):
    """What a clean stop leaves of a segment, so that nobody need read it."""

    base_offset: int
    size: int
    index_entries: int
    time_entries: int
    max_timestamp: int
    max_timestamp_offset: int
    first_timestamp: int
    created_ms: int
    aborted_entries: int = 0


class Segment:
    """`size` counts what has been placed, written or not.

    The loop places; a batch then waits in `pending` until some thread flushes it, at the latest
    before the journal that holds it is used again.
    """

    __slots__ = (
        "_aborted_index",
        "_unindexed",
        "aborted",
        "base_offset",
        "created_ms",
        "first_timestamp",
        "gone",
        "index",
        "log",
        "max_timestamp",
        "max_timestamp_offset",
        "named",
        "offsets",
        "pending",
        "size",
        "time_index",
        "times",
        "writing",
        "written",
    )

    def __init__(self, directory: str, base_offset: int, created_ms: int = 0) -> None:
        stem = f"{directory}/{segment_name(base_offset)}"
        self.base_offset = base_offset
        self.size = 0
        self.log = Handle(stem + LOG)
        self.index = Handle(stem + INDEX)
        self.time_index = Handle(stem + TIME_INDEX)
        self._aborted_index: Handle | None = None
        self.offsets = OffsetIndex()
        self.times = TimeIndex()
        self.aborted = AbortedIndex()
        self.max_timestamp = -1
        self.max_timestamp_offset = base_offset
        self.first_timestamp = -1
        self.created_ms = created_ms
        self.pending: list[Batch] = []  # placed and decided, but not in the file yet
        self.written = 0  # the file has everything before this position
        self.writing = threading.Lock()
        self.named = False  # its directory entry is synced
        self.gone = False  # it is no part of the log any more; who has it open reads on
        self._unindexed = 0

    @classmethod
    def from_summary(cls, directory: str, summary: SegmentSummary) -> Segment:
        segment = cls(directory, summary.base_offset, summary.created_ms)
        segment.size = segment.written = summary.size
        segment.named = True
        segment.offsets = OffsetIndex(summary.index_entries)
        segment.times = TimeIndex(summary.time_entries, summary.max_timestamp)
        segment.aborted = AbortedIndex(summary.aborted_entries)
        segment.max_timestamp = summary.max_timestamp
        segment.max_timestamp_offset = summary.max_timestamp_offset
        segment.first_timestamp = summary.first_timestamp
        return segment

    def summary(self) -> SegmentSummary:
        return SegmentSummary(
            self.base_offset,
            self.size,
            len(self.offsets),
            len(self.times),
            self.max_timestamp,
            self.max_timestamp_offset,
            self.first_timestamp,
            self.created_ms,
            len(self.aborted),
        )

    @property
    def aborted_index(self) -> Handle:
        """A file only where there are entries; a handle only where somebody asks."""
        if self._aborted_index is None:
            self._aborted_index = Handle(self.log.path.removesuffix(LOG) + ABORTED)
        return self._aborted_index

    @property
    def handles(self) -> tuple[Handle, Handle, Handle, Handle]:
        return self.log, self.index, self.time_index, self.aborted_index

    # placing

    def is_full(
        self, size: int, last_offset: int, max_timestamp: int, now_ms: int, config: LogConfig
    ) -> bool:
        """Whether a batch has to go into a new segment, by Kafka's rules."""
        if self.size == 0:
            return False
        began_ms, time_ms = self.first_timestamp, max_timestamp
        if began_ms < 0:  # records without a time: count from when we first saw the segment
            self.created_ms = self.created_ms or now_ms
            began_ms, time_ms = self.created_ms, now_ms
        return (
            self.size + size > config.segment_bytes
            or last_offset - self.base_offset > RELATIVE_OFFSET_MAX
            or time_ms - began_ms > config.segment_ms
            or len(self.offsets) * OFFSET_ENTRY_BYTES >= config.segment_index_bytes
            or len(self.times) * TIME_ENTRY_BYTES >= config.segment_index_bytes
        )

    def place(self, last_offset: int, size: int, max_timestamp: int, interval_bytes: int) -> int:
        """The position of the next batch; the indexes learn of it now and then."""
        position = self.size
        if max_timestamp > self.max_timestamp:
            self.max_timestamp = max_timestamp
            self.max_timestamp_offset = last_offset
        if position == 0:
            self.first_timestamp = max_timestamp
        if self._unindexed > interval_bytes:
            self.offsets.add(last_offset - self.base_offset, position)
            self.index_time()
            self._unindexed = 0
        self._unindexed += size
        self.size = position + size
        return position

    def index_time(self) -> None:
        """The time index knows the highest timestamp so far: at a checkpoint it must."""
        self.times.add(self.max_timestamp, self.max_timestamp_offset - self.base_offset)

    # writing

    def flush(self, disk: Disk) -> None:
        """Write what is pending, as one act. For any thread that may block."""
        with self.writing:
            count = len(self.pending)
            if count == 0:
                return
            batches = self.pending[:count]
            data = [batch.data for batch in batches]
            disk.write(disk.open(self.log), data, batches[0].position)
            last = batches[-1]
            self.written = last.position + last.size
            del self.pending[:count]

    def throw_away(self, disk: Disk, position: int) -> None:
        """Nothing from `position` on has ever been: the end of a failed write."""
        with self.writing:
            self.pending[:] = [batch for batch in self.pending if batch.position < position]
        self.flush(disk)
        disk.truncate(self.log, position)

    def discard(self, disk: Disk) -> None:
        """Nothing in it has ever been: a segment that a failed partition had begun."""
        with self.writing:
            self.pending.clear()  # the journal's cover still names it, and must find nothing
        for handle in self.handles:
            disk.forget(handle)
            disk.remove(handle.path)

    # going

    def keep_open(self, disk: Disk) -> None:
        """Before its files' names go. Nothing is pending: it was synced long ago."""
        assert not self.pending
        self.gone = True
        for handle in self.handles:
            with suppress(FileNotFoundError):  # as an index that was never needed
                disk.keep(handle)

    def remove_names(self, disk: Disk) -> None:
        for handle in self.handles:
            disk.remove(handle.path)

    def let_go(self, disk: Disk) -> None:
        """After a while in which whoever read it has finished."""
        for handle in self.handles:
            disk.let_go(handle)

    # finding

    def read(
        self, source: Source, offset: int, bytes_max: int, end_position: int
    ) -> tuple[memoryview, int | None] | None:
        """Whole batches from the one that contains `offset`, before `end_position`.

        At least one, however large; None if the segment holds nothing from `offset` on. With it an
        offset that none of them reaches, where it can be had for nothing.
        """
        start = self.find(source, offset, end_position)
        if start >= end_position:
            return None
        data = source(self.log, start, min(bytes_max, end_position - start))
        whole, bound = self._whole(source, data, start)
        if whole == 0:
            header = _header(source(self.log, start, HEADER_BYTES))
            whole, bound = header.size, header.next_offset
            data = source(self.log, start, whole)
            self._expect(data, whole)
        return memoryview(data)[:whole], bound

    def find(self, source: Source, offset: int, end_position: int) -> int:
        """Where the batch that contains or follows `offset` starts; `end_position` if nowhere."""
        position = self.offsets.floor(offset - self.base_offset, self._reader(source, self.index))
        for at, header in self.walk(source, position, end_position):
            if header.next_offset > offset:
                return at
        return end_position

    def find_end(self, source: Source, end: int) -> int:
        """Where the batches before offset `end` end. Reads nothing of what follows them."""
        relative = end - 1 - self.base_offset
        position = self.offsets.floor(relative, self._reader(source, self.index))
        for at, header in self.walk(source, position, self.size):
            if header.next_offset > end:
                return at
            if header.next_offset == end:
                return at + header.size
        return self.size

    def walk(
        self, source: Source, position: int, end_position: int
    ) -> Iterator[tuple[int, Header]]:
        """(position, header) of each batch in [position, end_position)."""
        chunk: Buffer = b""
        chunk_at = position
        while position < end_position:
            if not chunk_at <= position <= chunk_at + len(chunk) - HEADER_BYTES:
                chunk_at = position
                chunk = source(self.log, position, _WALK_BYTES)
                self._expect(chunk, HEADER_BYTES)
            header = parse_header(chunk, position - chunk_at)
            if header.size < _BATCH_BYTES_MIN:
                raise CorruptError(f"{self.log.path} holds no batch at byte {position}.")
            yield position, header
            position += header.size

    def aborted_since(self, source: Source, offset: int) -> Iterator[Aborted]:
        """Aborted transactions whose marker is in this segment, at or after `offset`."""
        return self.aborted.since(offset, self._reader(source, self.aborted_index))

    def position_before(self, source: Source, timestamp: int) -> int:
        """A position before which every record is earlier than `timestamp`."""
        relative = self.times.before(timestamp, self._reader(source, self.time_index))
        return self.offsets.floor(relative, self._reader(source, self.index))

    def _whole(self, source: Source, data: Buffer, start: int) -> tuple[int, int | None]:
        """Bytes of the whole batches in `data`, which was read at `start`; an offset behind."""
        end = start + len(data)
        hint = self.offsets.floor_position(end, self._reader(source, self.index))
        at = max(hint, start) - start
        bound = None
        while len(data) - at >= HEADER_BYTES:
            header = _header(data, at)
            if at + header.size > len(data):
                bound = header.base_offset
                break
            at += header.size
            bound = header.next_offset
        return at, bound

    def _reader(self, source: Source, handle: Handle) -> ReadAt:
        def read(position: int, size: int) -> bytes | bytearray:
            data = source(handle, position, size)
            self._expect(data, size)
            return data

        return read

    def _expect(self, data: Buffer, size: int) -> None:
        if len(data) < size:
            raise CorruptError(f"A file of segment {self.log.path} ends before its time.")


def _header(data: Buffer, at: int = 0) -> Header:
    if len(data) - at < HEADER_BYTES:
        raise CorruptError("A segment ends inside a batch's header.")
    header = parse_header(data, at)
    if header.size < _BATCH_BYTES_MIN:
        raise CorruptError("A segment holds bytes that are no batch.")
    return header
