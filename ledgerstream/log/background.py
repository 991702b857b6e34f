"""The second thread: syncs what the rounds left to it, behind their backs.

Segments that a journal file covers, before that file is used again; segments and indexes that a
roll or a checkpoint has finished with, which moves the recovery point; files that are to go.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import structlog

from ledgerstream.log.disk import Disk, File, Handle
from ledgerstream.log.journal import JournalFile, set_aside
from ledgerstream.log.markers import Point, write_checkpoint
from ledgerstream.log.partition import Partition
from ledgerstream.log.producers import ProducerRecord
from ledgerstream.log.recovery import UNSYNCED_NAME
from ledgerstream.log.segment import Segment
from ledgerstream.log.snapshots import sync_snapshot

log = structlog.get_logger("log")
# What an operator can put right while we run; after anything else only a restart tells what is
# there. A failed sync is never repeated: the kernel may have dropped the pages.
RETRIABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
}


class Save(NamedTuple):
    """A partition as it stood at `offset`, to be put beside its segment."""

    partition: Partition
    segment: Segment
    offset: int
    offset_index: tuple[int, bytes]  # position in the file, entries
    time_index: tuple[int, bytes]
    aborted_index: tuple[int, bytes]
    producers: list[ProducerRecord]
    outdated: tuple[int, ...]  # snapshots that this one makes superfluous
    next_segment: Segment | None  # after a roll

    def indexes(self) -> Iterable[tuple[Handle, tuple[int, bytes]]]:
        yield self.segment.index, self.offset_index
        yield self.segment.time_index, self.time_index
        if self.aborted_index[1]:
            yield self.segment.aborted_index, self.aborted_index


class Failed(NamedTuple):
    """A partition that stopped."""

    partition: Partition
    sentence: str
    retriable: bool


def stopped(disk: Disk, partition: Partition, error: OSError, retriable: bool) -> Failed:
    """Write nothing to it any more; if it may not be tried again, the next start has to know."""
    partition.broken = True
    if not retriable:
        with suppress(OSError):
            disk.write_file(f"{partition.directory}/{UNSYNCED_NAME}", b"", sync=False)
    sentence = f"Partition {partition.key} cannot be written and synced: {error}."
    return Failed(partition, sentence, retriable)


class Background:
    """Its public methods queue; they are called by the loop and the disk thread."""

    def __init__(
        self,
        disk: Disk,
        root: Path,
        on_checkpoint: Callable[[Save], None],
        on_flushed: Callable[[], None],
        on_failure: Callable[[Failed], None],
        on_fatal: Callable[[str], None],
    ) -> None:
        self.queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._disk = disk
        self._root = root
        self._on_checkpoint = on_checkpoint
        self._on_flushed = on_flushed
        self._on_failure = on_failure
        self._on_fatal = on_fatal
        self._released = threading.Event()
        self._released.set()

    def run(self) -> None:
        try:
            while (order := self.queue.get()) is not None:
                order()
        except BaseException as error:
            self._on_fatal(f"The log's background thread failed: {error!r}.")
            self._released.set()
            raise

    def checkpoint(self, save: Save) -> None:
        self.queue.put(partial(self._checkpoint, save))

    def release(self, full: JournalFile) -> None:
        """Sync what the journal file covers, so that it may be used again."""
        self._released.clear()
        self.queue.put(partial(self._release, full))

    def flush(self, current: JournalFile | None) -> None:
        """Write to the segments what so far only the journal and the memory have."""
        self.queue.put(partial(self._flush, current))

    def wait_until_released(self) -> None:
        self._released.wait()

    def write_checkpoint(self, points: list[Point], written: Callable[[bool], None]) -> None:
        """`written`: whether it is on the disk."""
        self.queue.put(partial(self._write_checkpoint, points, written))

    def let_go(self, segments: Sequence[Segment]) -> None:
        """Free the space of files that lost their names a while ago."""
        self.queue.put(partial(self._let_go, segments))

    def remove(self, path: str) -> None:
        self.queue.put(partial(self._remove, path))

    def _checkpoint(self, save: Save) -> None:
        written = [handle for handle, (_, entries) in save.indexes() if entries]
        if save.partition.broken or not self._settle(save.partition, save.segment, written):
            return
        try:
            sync_snapshot(self._disk, save.partition.directory, save.offset)
        except OSError as error:  # the recovery point stays where it is
            log.warning("producers' snapshot not synced", why=str(error))
            return
        self._on_checkpoint(save)

    def _flush(self, current: JournalFile | None) -> None:
        for segment, partition in list(current.covers.items()) if current else ():
            if segment.pending and not partition.broken:
                self._write(partition, segment)
        self._on_flushed()

    def _release(self, full: JournalFile) -> None:
        lost = False
        for segment, partition in full.covers.items():
            if not (partition.deleted or segment.gone):
                settled = not partition.broken and self._settle(partition, segment)
                lost |= not settled and not partition.deleted
        if lost:
            try:
                set_aside(self._disk, full.path, full.generation)
            except OSError as error:
                self._on_fatal(f"The log's journal cannot be kept: {error}.")
        self._released.set()

    def _settle(self, partition: Partition, segment: Segment, also: Sequence[Handle] = ()) -> bool:
        """Whether the segment, and other files of it, are written and synced."""
        files = self._write(partition, segment, also)
        try:
            for file in files:
                self._disk.sync(file)
        except OSError as error:
            self._stop(partition, error, retriable=False)
            return False
        return bool(files)

    def _write(
        self, partition: Partition, segment: Segment, also: Sequence[Handle] = ()
    ) -> list[File]:
        """The segment's file with all that was pending, and the others; none if that failed."""
        try:
            segment.flush(self._disk)
            return [self._disk.open(handle) for handle in (segment.log, *also)]
        except OSError as error:
            self._stop(partition, error, retriable=error.errno in RETRIABLE)
            return []

    def _stop(self, partition: Partition, error: OSError, *, retriable: bool) -> None:
        if not partition.deleted:
            self._on_failure(stopped(self._disk, partition, error, retriable))

    def _write_checkpoint(self, points: list[Point], written: Callable[[bool], None]) -> None:
        try:
            write_checkpoint(self._disk, self._root, points)
        except OSError as error:  # the older one stands: a crash scans more
            log.warning("checkpoint not written", why=str(error))
            written(False)
        else:
            written(True)

    def _let_go(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            segment.let_go(self._disk)

    def _remove(self, path: str) -> None:
        try:
            self._disk.remove(path)
        except OSError as error:
            log.warning("deleted partition not removed", path=path, why=str(error))
