"""What a data directory holds when it is opened: by the marker of a clean stop, or by recovery."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import structlog

from ledgerstream.errors import CorruptError
from ledgerstream.limits import Limits
from ledgerstream.log.aborted import ABORTED_ENTRY_BYTES
from ledgerstream.log.config import PartitionKey
from ledgerstream.log.disk import Disk
from ledgerstream.log.epochs import Epochs
from ledgerstream.log.index import OFFSET_ENTRY_BYTES, TIME_ENTRY_BYTES
from ledgerstream.log.journal import JournalContents, JournalRow
from ledgerstream.log.markers import (
    DELETED_SUFFIX,
    PartitionSummary,
    Point,
    read_checkpoint,
    read_clean,
    read_key,
)
from ledgerstream.log.partition import Partition, State
from ledgerstream.log.producers import Producers
from ledgerstream.log.recovery import Journaled, recover
from ledgerstream.log.segment import LOG, Segment, SegmentSummary
from ledgerstream.log.snapshots import read_snapshot

log = structlog.get_logger("log")
STRAY_SUFFIX = ".stray"


class Found(NamedTuple):
    """A partition of the directory."""

    key: PartitionKey
    state: State
    point: Point
    recovered: bool  # its files were looked at, not the marker's word taken
    failure: str | None


class Loading:
    """One look at the directory. Nothing outside the partitions' own directories is changed."""

    def __init__(self, disk: Disk, limits: Limits, root: Path) -> None:
        self.journals = JournalContents(disk, root)
        self.deleted: list[str] = []  # what a crash left of deletions
        self._disk = disk
        self._limits = limits
        self._root = root
        self._points = read_checkpoint(disk, root)
        self._rows: dict[bytes, list[JournalRow]] | None = None  # read when first needed

    def run(self) -> Iterator[Found]:
        names = self._disk.directories(str(self._root))
        clean = {summary.key.directory: summary for summary in read_clean(self._disk, self._root)}
        for name in names:
            found = self._believe(clean[name]) if name in clean else None
            if found is None:
                found = self._look_into(name)
            if found is not None:
                yield found
        for name in clean.keys() - set(names):
            log.error("partition is gone", path=str(self._root / name))

    def _believe(self, summary: PartitionSummary) -> Found | None:
        """The partition as the marker has it; None if somebody changed it since."""
        key = summary.key
        directory = str(self._root / key.directory)
        segments = [Segment.from_summary(directory, segment) for segment in summary.segments]
        producers: Producers | None = Producers()
        if summary.snapshot_offsets:
            producers = read_snapshot(self._disk, directory, summary.snapshot_offsets[-1])
        if producers is None or not all(map(self._is_as_left, segments, summary.segments)):
            return None
        state = State(
            segments,
            summary.log_start_offset,
            summary.next_offset,
            Epochs(summary.epochs),
            producers,
            tuple(summary.snapshot_offsets),
            summary.cleaned,
        )
        return Found(key, state, self._point(key), recovered=False, failure=None)

    def _is_as_left(self, segment: Segment, summary: SegmentSummary) -> bool:
        size = self._disk.size
        return (
            size(segment.log.path) == summary.size
            and size(segment.index.path) == summary.index_entries * OFFSET_ENTRY_BYTES
            and size(segment.time_index.path) == summary.time_entries * TIME_ENTRY_BYTES
            and size(segment.aborted_index.path) == summary.aborted_entries * ABORTED_ENTRY_BYTES
        )

    def _look_into(self, name: str) -> Found | None:
        key = read_key(self._disk, self._root, name)
        if key is not None:
            return self._recover(key)
        if name.endswith(DELETED_SUFFIX):
            self.deleted.append(str(self._root / name))
        elif not name.endswith(STRAY_SUFFIX):
            self._put_aside(str(self._root / name))
        return None

    def _recover(self, key: PartitionKey) -> Found:
        if self._rows is None:
            self._rows = self.journals.rows()
        journaled = Journaled(self.journals, self._rows.get(key.identity, ()))
        directory, point = str(self._root / key.directory), self._point(key)
        try:
            state = recover(self._disk, self._limits, directory, point, journaled=journaled)
        except (CorruptError, OSError) as error:
            start = max(point.recovery_point, point.log_start_offset)
            segments = [Segment(directory, start)]
            state = State(segments, point.log_start_offset, start, Epochs(), Producers(), ())
            return Found(key, state, point, True, f"Partition {key} cannot be recovered: {error}")
        return Found(key, state, point, recovered=True, failure=None)

    def acknowledged(self, except_for: set[bytes]) -> Iterator[Point]:
        """Of other partitions: where records had been acknowledged."""
        for identity, point in self._points.items():
            if identity not in except_for and point.durable_offset > point.log_start_offset:
                yield point

    def _point(self, key: PartitionKey) -> Point:
        return self._points.get(key.identity) or Point(key.identity, 0, 0, 0)

    def _put_aside(self, path: str) -> None:
        """A directory that nothing says the partition of; an empty one is a creation cut short."""
        names = self._disk.names(path)
        if any(self._disk.size(f"{path}/{name}") for name in names if name.endswith(LOG)):
            self._disk.rename(path, path + STRAY_SUFFIX)
            log.error("directory without a topic id put aside", path=path + STRAY_SUFFIX)
        else:
            self._disk.remove(path)


def summary_of(partition: Partition) -> PartitionSummary:
    """What `Loading` will need after a clean stop."""
    return PartitionSummary(
        partition.key.topic,
        partition.key.topic_id.bytes,
        partition.key.index,
        partition.log_start_offset,
        partition.next_offset,
        [segment.summary() for segment in partition.segments],
        partition.epochs.starts(),
        list(partition.snapshot_offsets),
        partition.cleaned,
    )
