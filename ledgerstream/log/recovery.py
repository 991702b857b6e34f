"""A partition's state from its files, after a crash or a failed write.

Everything below the recovery point was synced and is believed; from the newest producer snapshot at
or below it on, batches are read. The first that is torn (length, CRC, offset) ends a segment, and
the journal is asked for what follows. If the log still ends below what had been acknowledged, that
is no torn tail but a disk that lies: CorruptError, nothing is cut, the partition does not start.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import structlog

from ledgerstream.errors import CorruptError, DecodeError
from ledgerstream.limits import Limits
from ledgerstream.log.aborted import ABORTED_ENTRY_BYTES, AbortedIndex
from ledgerstream.log.disk import Disk, Handle
from ledgerstream.log.epochs import EPOCHS_NAME, Epochs
from ledgerstream.log.index import (
    OFFSET_ENTRY_BYTES,
    TIME_ENTRY_BYTES,
    OffsetIndex,
    ReadAt,
    TimeEntry,
    TimeIndex,
    parse_time_entry,
)
from ledgerstream.log.journal import JournalContents, JournalRow
from ledgerstream.log.markers import Point
from ledgerstream.log.partition import State
from ledgerstream.log.producers import Producers
from ledgerstream.log.retention import below
from ledgerstream.log.segment import LOG, Segment
from ledgerstream.log.snapshots import (
    KEPT,
    read_snapshot,
    remove_snapshots,
    snapshot_offsets,
    sync_snapshot,
    write_snapshot,
)
from ledgerstream.log.swap import finish_swaps, read_cleaned
from ledgerstream.wire.batches import (
    HEADER_BYTES,
    Buffer,
    Header,
    crc_matches,
    parse_header,
)
from ledgerstream.wire.markers import Marker, read_marker

log = structlog.get_logger("log")
UNSYNCED_NAME = "unsynced"  # left by a failed sync: what is read may not be on the disk
NEVER_WRITTEN = TimeEntry(0, 0)  # a file that grew and lost its content reads as zeros
REMEDY = "Restore the directory from a copy, or delete the topic."
_CHUNK_BYTES = 4 * 1024 * 1024


class Journaled(NamedTuple):
    """A partition's part of the journals."""

    contents: JournalContents
    rows: Sequence[JournalRow]


def recover(
    disk: Disk,
    limits: Limits,
    directory: str,
    point: Point | None = None,
    *,
    journaled: Journaled | None = None,
) -> State:
    """Read, cut, fill, index and sync one partition. CorruptError, OSError where that fails."""
    return _Recovery(disk, limits, directory, point or Point(b"", 0, 0, 0)).run(journaled)


class _Recovery:
    def __init__(self, disk: Disk, limits: Limits, directory: str, point: Point) -> None:
        self.disk = disk
        self.limits = limits
        self.directory = directory
        self.recovery_point = point.recovery_point
        self.durable_offset = max(point.recovery_point, point.durable_offset)
        self.log_start_offset = point.log_start_offset
        finish_swaps(disk, directory)
        self.cleaned = read_cleaned(disk, directory)
        names = disk.names(directory)
        bases = sorted(int(name.removesuffix(LOG)) for name in names if name.endswith(LOG))
        self.segments = [Segment(directory, base) for base in bases or [point.log_start_offset]]
        # a crash came before the last step of a retention
        gone = below(self.segments, min(point.log_start_offset, point.recovery_point))
        self.leftover, self.segments = self.segments[:gone], self.segments[gone:]
        self.snapshots = snapshot_offsets(names)
        self.producers = Producers()
        self.epochs = Epochs()
        self.epochs_file = disk.read_file(f"{directory}/{EPOCHS_NAME}")
        self.next_offset = self.segments[0].base_offset
        self.suspect = UNSYNCED_NAME in names
        self.touched: dict[Segment, int] = {}  # and the position from which it was read

    def run(self, journaled: Journaled | None) -> State:
        start = self._load_snapshot()
        at = max(i for i, s in enumerate(self.segments) if i == 0 or s.base_offset <= start)
        for segment in self.segments[:at]:
            self._believe(segment)
        self._load_epochs(start)
        self._scan(at, start, journaled)
        self._check_whole(self.segments[-1])
        if self.next_offset < self.log_start_offset:  # what was removed had not been synced yet
            self._drop(0)
            self.segments = [Segment(self.directory, self.log_start_offset)]
            self.next_offset = self.log_start_offset
        start = max(self.log_start_offset, self.segments[0].base_offset)
        self.epochs.trim(start)
        self._finish()
        return State(
            self.segments,
            start,
            self.next_offset,
            self.epochs,
            self.producers,
            tuple(self.snapshots),
            self.cleaned,
        )

    def _load_snapshot(self) -> int:
        """The offset from which batches are read."""
        for offset in reversed(self.snapshots):
            if self.next_offset <= offset <= self.recovery_point:
                producers = read_snapshot(self.disk, self.directory, offset)
                if producers is not None:
                    self.producers = producers
                    return offset
        return self.next_offset

    def _load_epochs(self, start: int) -> None:
        if self.epochs_file is not None:
            try:
                self.epochs = Epochs.decode(self.epochs_file, start)
            except ValueError:
                pass  # batches carry their epochs: those that are read say it again

    # what was synced before the crash

    def _believe(self, segment: Segment) -> None:
        """A sealed segment: its size, and what the end of its indexes says."""
        size = self.disk.size(segment.log.path)
        segment.offsets = OffsetIndex(self.disk.size(segment.index.path) // OFFSET_ENTRY_BYTES)
        segment.aborted = AbortedIndex(
            self.disk.size(segment.aborted_index.path) // ABORTED_ENTRY_BYTES
        )
        segment.size = size
        entries = self.disk.size(segment.time_index.path) // TIME_ENTRY_BYTES
        if entries:
            position = (entries - 1) * TIME_ENTRY_BYTES
            last = parse_time_entry(
                self.disk.read_once(segment.time_index.path, position, TIME_ENTRY_BYTES)
            )
            segment.times = TimeIndex(entries, last.timestamp)
            segment.max_timestamp = last.timestamp
            segment.max_timestamp_offset = segment.base_offset + last.relative_offset
        if size >= HEADER_BYTES:
            first = self.disk.read_once(segment.log.path, 0, HEADER_BYTES)
            segment.first_timestamp = parse_header(first).max_timestamp

    def _believe_up_to(self, segment: Segment, offset: int) -> int:
        """The position where `offset` starts, with the indexes up to there; 0 to read it all."""
        self._believe(segment)
        position = self._position_of(segment, offset)
        times = self._time_entries_below(segment, offset) if position else 0
        if not times:
            position = 0
        entries = segment.offsets.count_below(position, self._file(segment.index))
        aborted = segment.aborted.count_below(
            offset if position else segment.base_offset, self._file(segment.aborted_index)
        )
        kept = (entries, times, aborted)
        if kept != (len(segment.offsets), len(segment.times), len(segment.aborted)):
            self.touched[segment] = position  # entries of what was thrown away, or is read again
        segment.offsets, segment.times = OffsetIndex(entries), TimeIndex(times)
        segment.aborted = AbortedIndex(aborted)
        segment.max_timestamp, segment.max_timestamp_offset = -1, segment.base_offset
        if times:
            last = self._time_entry(segment, times - 1)
            segment.times.last_timestamp = segment.max_timestamp = last.timestamp
            segment.max_timestamp_offset = segment.base_offset + last.relative_offset
        segment.size = position
        return position

    def _position_of(self, segment: Segment, offset: int) -> int:
        relative = offset - 1 - segment.base_offset
        if relative < 0:
            return 0
        try:
            floor = segment.offsets.floor(relative, self._file(segment.index))
            for at, header in segment.walk(self.disk.read, floor, segment.size):
                if header.next_offset >= offset:
                    return at + header.size if header.next_offset == offset else 0
        except CorruptError:
            pass
        return 0

    def _time_entries_below(self, segment: Segment, offset: int) -> int:
        relative = offset - segment.base_offset
        count = bisect_left(
            range(len(segment.times)),
            relative,
            key=lambda at: self._time_entry(segment, at).relative_offset,
        )
        while count and self._time_entry(segment, count - 1) == NEVER_WRITTEN:
            count -= 1
        return count

    def _time_entry(self, segment: Segment, at: int) -> TimeEntry:
        position = at * TIME_ENTRY_BYTES
        return parse_time_entry(self.disk.read(segment.time_index, position, TIME_ENTRY_BYTES))

    def _file(self, handle: Handle) -> ReadAt:
        return lambda position, size: self.disk.read(handle, position, size)

    # what has to be read

    def _scan(self, at: int, start: int, journaled: Journaled | None) -> None:
        """Read every segment from `at` on, and fill what is missing at the end of each."""
        while at < len(self.segments):
            segment = self.segments[at]
            if segment.base_offset <= start:
                position = self._believe_up_to(segment, start)
                self.next_offset = start if position else segment.base_offset
            size = self.disk.size(segment.log.path)
            for header, marker in self._whole_batches(segment, size):
                self._take(segment, header, marker, start)
            if segment.size < size:
                log.warning("torn end", file=segment.log.path, good=segment.size, size=size)
                self.touched.setdefault(segment, segment.size)
            at += 1
            following = self.segments[at] if at < len(self.segments) else None
            if following is not None and segment.size == size:
                self._pass_gap(following)
            if journaled is not None:
                self._fill(journaled, segment, following)
            if following is not None and following.base_offset != self.next_offset:
                self._check_whole(segment)
                self._drop(at)

    def _pass_gap(self, following: Segment) -> None:
        """Compaction may have taken a segment's last batches."""
        if self.next_offset < following.base_offset <= self.cleaned.gaps_below:
            self.next_offset = following.base_offset

    def _whole_batches(self, segment: Segment, size: int) -> Iterator[tuple[Header, Marker | None]]:
        """Batches from `segment.size` on, until one is not as it should be."""
        chunk, chunk_at = b"", segment.size
        while (position := segment.size) + HEADER_BYTES <= size:
            at = position - chunk_at
            if at + HEADER_BYTES > len(chunk) or at + parse_header(chunk, at).size > len(chunk):
                chunk, chunk_at, at = self._chunk(segment, position), position, 0
            header = parse_header(chunk, at)
            if not (
                header.magic == 2
                and HEADER_BYTES <= header.size <= len(chunk) - at
                and self._follows(header.base_offset)
                and header.last_offset_delta >= 0
                and crc_matches(chunk, at, header)
            ):
                return
            yield header, self._marker(segment, header, chunk, at)

    def _marker(
        self, segment: Segment, header: Header, batch: Buffer, at: int = 0
    ) -> Marker | None:
        """What a control batch says; one with a right CRC that says nothing is a disk that lies."""
        if not header.control:
            return None
        try:
            return read_marker(batch, at)
        except DecodeError as error:
            where = f"{segment.log.path} at offset {header.base_offset:,}"
            raise CorruptError(f"{where}: {error}", REMEDY) from error

    def _follows(self, base_offset: int) -> bool:
        """Offsets, which no CRC covers, have no gaps but where compaction made them."""
        bound = self.cleaned.gaps_below
        return self.next_offset == base_offset or self.next_offset < base_offset < bound

    def _chunk(self, segment: Segment, position: int) -> bytes:
        """Bytes at `position`, at least the whole batch if it is whole."""
        chunk = self.disk.read(segment.log, position, _CHUNK_BYTES)
        size = parse_header(chunk).size
        if len(chunk) == _CHUNK_BYTES < size <= self.limits.frame_bytes_max:
            chunk = self.disk.read(segment.log, position, size)
        return chunk

    def _take(
        self, segment: Segment, header: Header, marker: Marker | None, replay_from: int = 0
    ) -> None:
        """A batch that is in the segment: everything that is known of it."""
        last_offset = header.next_offset - 1
        interval = self.limits.index_interval_bytes
        self.touched.setdefault(segment, segment.size)
        segment.place(last_offset, header.size, header.max_timestamp, interval)
        self.next_offset = header.next_offset
        if header.base_offset >= replay_from:
            ended = self.producers.replay(header, header.base_offset, header.max_timestamp, marker)
            if ended is not None and not ended.committed:
                segment.aborted.add(ended)
        if header.leader_epoch > self.epochs.latest:
            self.epochs.begin(header.leader_epoch, header.base_offset)

    def _check_whole(self, segment: Segment) -> None:
        """The log ends in this segment. Nothing has been cut yet."""
        if self.next_offset < self.durable_offset:
            raise CorruptError(
                f"{segment.log.path} is good up to byte {segment.size:,} (offset "
                f"{self.next_offset:,}) only, though everything below offset "
                f"{self.durable_offset:,} had been synced: the disk has lost data.",
                REMEDY,
            )

    def _drop(self, at: int) -> None:
        """Segments that the log does not reach: what is in them was never answered."""
        gone, self.segments = self.segments[at:], self.segments[:at]
        for segment in gone:
            log.warning("segment beyond the end removed", file=segment.log.path)
            self.touched.pop(segment, None)
            self._remove(segment)

    def _remove(self, segment: Segment) -> None:
        for handle in segment.handles:
            self.disk.forget(handle)
            self.disk.remove(handle.path)

    def _fill(self, journaled: Journaled, segment: Segment, following: Segment | None) -> None:
        """Append to `segment` what the journal has, up to the next segment."""
        for row in journaled.rows:
            if row.base_offset < self.next_offset:
                continue
            if following is not None and row.base_offset >= following.base_offset:
                return
            batch = journaled.contents.batch(row)
            if batch is None:
                return
            if row.base_offset > self.next_offset:
                raise CorruptError(
                    f"{self.directory} ends at offset {self.next_offset:,} and the journal goes on "
                    f"at {row.base_offset:,}: the disk has lost data.",
                    REMEDY,
                )
            self.disk.write(self.disk.create(segment.log), [batch], segment.size)
            header = parse_header(batch)
            self._take(segment, header, self._marker(segment, header, batch))

    def _finish(self) -> None:
        """Write what was rebuilt, and sync it all: the recovery point is the end now."""
        for segment in self.leftover:
            self._remove(segment)
        for segment in self.segments:
            segment.written = segment.size
            segment.named = True
        for segment, start in self.touched.items():
            self.disk.truncate(segment.log, segment.size)
            if self.suspect:
                self._write_again(segment, start)
            segment.index_time()
            for index, handle in (
                (segment.offsets, segment.index),
                (segment.times, segment.time_index),
                (segment.aborted, segment.aborted_index),
            ):
                position, entries = index.waiting()
                if handle is segment.aborted_index and not self._has_aborted(segment):
                    continue
                self.disk.truncate(handle, position)
                self.disk.write(self.disk.create(handle), [entries], position)
                index.written(position + len(entries))
                self.disk.sync(self.disk.open(handle))
            self.disk.sync(self.disk.open(segment.log))
        self._keep_snapshots()
        if (epochs := self.epochs.encode()) != self.epochs_file:
            self.disk.write_file(f"{self.directory}/{EPOCHS_NAME}", epochs, sync=True)
        self.disk.create(self.segments[-1].log)
        self.disk.sync_directory(self.directory)
        if self.suspect:
            self.disk.remove(f"{self.directory}/{UNSYNCED_NAME}")

    def _has_aborted(self, segment: Segment) -> bool:
        """Its file exists only where it has entries, or had some that are no more."""
        return len(segment.aborted) > 0 or self.disk.size(segment.aborted_index.path) > 0

    def _write_again(self, segment: Segment, start: int) -> None:
        """After a failed sync, pages that are only in memory may count as clean."""
        for position in range(start, segment.size, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, segment.size - position)
            content = self.disk.read(segment.log, position, size)
            self.disk.write(self.disk.open(segment.log), [content], position)

    def _keep_snapshots(self) -> None:
        """One of the end, one to fall back on; none of what was never acknowledged."""
        if self.touched or self.next_offset not in self.snapshots:
            write_snapshot(self.disk, self.directory, self.next_offset, self.producers.records())
            sync_snapshot(self.disk, self.directory, self.next_offset)
        older = [offset for offset in self.snapshots if offset < self.next_offset]
        kept = [*older, self.next_offset][-KEPT:]
        remove_snapshots(self.disk, self.directory, {*self.snapshots} - {*kept})
        self.snapshots = kept
