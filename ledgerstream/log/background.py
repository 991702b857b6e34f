"""The second thread: syncs what the rounds left to it, behind their backs.

Segments that a journal file covers, before that file is used again; segments and indexes that a
roll or a checkpoint has finished with, which moves the recovery point; files that are to go.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import structlog

from ledgerstream.log.disk import Disk, Handle
from ledgerstream.log.journal import JournalFile, set_aside
from ledgerstream.log.markers import Point, write_checkpoint
from ledgerstream.log.partition import Partition
from ledgerstream.log.producers import ProducerRecord
from ledgerstream.log.segment import Segment

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
    producers: list[ProducerRecord]
    outdated: tuple[int, ...]  # snapshots that this one makes superfluous
    next_segment: Segment | None  # after a roll

    def indexes(self) -> Iterable[tuple[Handle, tuple[int, bytes]]]:
        return (
            (self.segment.index, self.offset_index),
            (self.segment.time_index, self.time_index),
        )


class Background:
    """Its public methods queue; they are called by the loop and the disk thread."""

    def __init__(
        self,
        disk: Disk,
        root: Path,
        on_checkpoint: Callable[[Save], None],
        on_flushed: Callable[[], None],
        on_failure: Callable[[Partition, str, bool], None],
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

    def write_checkpoint(self, points: list[Point]) -> None:
        self.queue.put(partial(self._write_checkpoint, points))

    def remove(self, path: str) -> None:
        self.queue.put(partial(self._remove, path))

    def _checkpoint(self, save: Save) -> None:
        partition, disk = save.partition, self._disk
        if partition.broken:
            return
        try:
            if save.next_segment is not None:
                disk.sync_directory(partition.directory)
            save.segment.flush(disk)
            disk.sync(disk.open(save.segment.log))
            for handle, (_, entries) in save.indexes():
                if entries:
                    disk.sync(disk.open(handle))
        except OSError as error:
            self._stop(partition, error)
            return
        self._on_checkpoint(save)

    def _flush(self, current: JournalFile | None) -> None:
        for segment, partition in list(current.covers.items()) if current else ():
            if segment.pending and not partition.broken:
                try:
                    segment.flush(self._disk)
                except OSError as error:
                    self._stop(partition, error)
        self._on_flushed()

    def _release(self, full: JournalFile) -> None:
        kept = False
        for segment, partition in full.covers.items():
            if partition.deleted:
                continue
            try:
                if not partition.broken:
                    segment.flush(self._disk)
                    self._disk.sync(self._disk.open(segment.log))
            except OSError as error:
                self._stop(partition, error)
            kept |= partition.broken and not partition.deleted
        if kept:
            try:
                set_aside(self._disk, full.path, full.generation)
            except OSError as error:
                self._on_fatal(f"The log's journal cannot be kept: {error}.")
        self._released.set()

    def _stop(self, partition: Partition, error: OSError) -> None:
        if not partition.deleted:
            partition.broken = True
            sentence = f"Partition {partition.key} cannot be written and synced: {error}."
            self._on_failure(partition, sentence, error.errno in RETRIABLE)

    def _write_checkpoint(self, points: list[Point]) -> None:
        try:
            write_checkpoint(self._disk, self._root, points)
        except OSError as error:  # the older one stands: a crash scans more
            log.warning("checkpoint not written", why=str(error))

    def _remove(self, path: str) -> None:
        try:
            self._disk.remove(path)
        except OSError as error:
            log.warning("deleted partition not removed", path=path, why=str(error))
