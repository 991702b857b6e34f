"""The disk thread: takes all that waits, writes it, makes it durable once, and says so.

A round with few dirty files syncs each of them; one with many writes all its batches to the journal
too and syncs that. Orders (create, roll, checkpoint, repair, delete) stand in the same queue, so
each finds the files as the loop had them in mind.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from ledgerstream.errors import CorruptError
from ledgerstream.limits import Limits
from ledgerstream.log.background import Background, Save
from ledgerstream.log.disk import Disk
from ledgerstream.log.epochs import EPOCHS_NAME
from ledgerstream.log.journal import Journal, frame_bytes
from ledgerstream.log.markers import DELETED_SUFFIX, METADATA_NAME, write_metadata
from ledgerstream.log.partition import Durable, Partition, State
from ledgerstream.log.recovery import recover
from ledgerstream.log.segment import Segment
from ledgerstream.log.snapshots import remove_snapshots, write_snapshot
from ledgerstream.log.tail import Batch

# What an operator can put right while we run; anything else needs a restart.
RETRIABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
}


class Failed(NamedTuple):
    """A partition that stopped."""

    partition: Partition
    sentence: str
    retriable: bool


@dataclass(slots=True)
class Stats:
    """Sums since the start, for metrics."""

    rounds: int = 0
    journal_rounds: int = 0
    batches: int = 0
    bytes: int = 0
    files: int = 0  # dirty files, over all rounds
    syncs: int = 0
    failures: int = 0
    round_ns: int = 0
    round_ns_last: int = 0

    @property
    def round_ms_average(self) -> float:
        return self.round_ns / max(self.rounds, 1) / 1e6


Order = Callable[[], None]
OnRound = Callable[[list[Batch], list[Failed]], None]
OnFatal = Callable[[str], None]


class Writer:
    """`post` and `queue` are for the loop; everything else runs in the disk thread."""

    def __init__(
        self,
        disk: Disk,
        limits: Limits,
        root: Path,
        journal: Journal | None,
        background: Background,
        on_round: OnRound,
        on_fatal: OnFatal,
    ) -> None:
        self.stats = Stats()
        self.queue: SimpleQueue[Batch | Order | None] = SimpleQueue()
        self._disk = disk
        self._limits = limits
        self._root = root
        self._journal = journal  # None: nothing is synced before it is answered
        self._background = background
        self._on_round = on_round
        self._on_fatal = on_fatal
        self._root_changed = False
        self._dead = False

    # the thread

    def run(self) -> None:
        try:
            while (item := self.queue.get()) is not None:
                while isinstance(item, Batch):
                    item = self._round(item)
                if item is None:
                    break
                item()
        except BaseException as error:
            self._die(f"The log's disk thread failed: {error!r}.")
            raise
        if self._journal is not None and self._journal.current is not None:
            self._background.release(self._journal.current)

    def _round(self, first: Batch) -> Batch | Order | None:
        """Write what waits. The order that ended the collection, or a no-op."""
        batches, order = self._collect(first)
        if self._dead:
            return order
        began = time.perf_counter_ns()
        failed: list[Failed] = []
        runs = self._write(batches, failed)
        if self._journal is not None and runs:
            self._make_durable(self._journal, runs, failed)
        done = [run[-1] for run in runs.values()]
        self._count(runs, failed, time.perf_counter_ns() - began)
        if done or failed:
            self._on_round(done, failed)
        return order

    def _collect(self, first: Batch) -> tuple[list[Batch], Order | None]:
        get, bytes_max = self.queue.get_nowait, self._limits.round_bytes_max
        batches, size = [first], first.size
        try:
            while size < bytes_max:
                item = get()
                if not isinstance(item, Batch):
                    return batches, item
                batches.append(item)
                size += item.size
        except Empty:
            pass
        return batches, _nothing

    def _write(self, batches: list[Batch], failed: list[Failed]) -> dict[Segment, list[Batch]]:
        """Every file once; the batches that are in the page cache now, by segment."""
        runs: dict[Segment, list[Batch]] = {}
        for batch in batches:
            run = runs.get(batch.segment)
            if run is None:
                runs[batch.segment] = [batch]
            else:
                run.append(batch)
        bad = []
        disk = self._disk
        for segment, run in runs.items():
            partition = run[0].partition
            if partition.broken:
                bad.append(segment)
                continue
            buffers = run[0].buffers if len(run) == 1 else [b for x in run for b in x.buffers]
            try:
                disk.write(disk.open(segment.log), buffers, run[0].position)
                if partition.fresh and self._journal is not None:
                    self._sync_names(partition)
            except OSError as error:
                bad.append(segment)
                failed.append(self._stop(partition, "cannot be written", error))
        for segment in bad:
            del runs[segment]
        return runs

    def _make_durable(
        self, journal: Journal, runs: dict[Segment, list[Batch]], failed: list[Failed]
    ) -> None:
        if len(runs) > self._limits.round_direct_files_max:
            batches = [batch for run in runs.values() for batch in run]
            size = frame_bytes(len(batches), sum([batch.size for batch in batches]))
            if size <= self._limits.journal_bytes:
                self._write_journal(journal, batches, size)
                return
        disk = self._disk
        for segment, run in list(runs.items()):
            try:
                disk.sync(disk.open(segment.log))
                self.stats.syncs += 1
            except OSError as error:
                # Never again: the kernel may have dropped the pages and would now say all is well.
                del runs[segment]
                failed.append(self._stop(run[0].partition, "cannot be synced", error, False))

    def _write_journal(self, journal: Journal, batches: list[Batch], size: int) -> None:
        try:
            if not journal.fits(size):
                self._background.wait_until_released()
                full = journal.turn()
                if full is not None:
                    self._background.release(full)
            journal.write(batches)
        except OSError as error:
            self._die(f"The log's journal cannot be written: {error}.")
            raise SystemExit from error
        self.stats.syncs += 1
        self.stats.journal_rounds += 1

    def _sync_names(self, partition: Partition) -> None:
        """A new partition's names, before anything in it is answered."""
        directory = partition.directory
        self._disk.sync_path(f"{directory}/{METADATA_NAME}")
        self._disk.sync_directory(directory)
        if self._root_changed:
            self._root_changed = False
            self._disk.sync_directory(str(self._root))
        partition.fresh = False

    def _stop(
        self, partition: Partition, what: str, error: OSError, retriable: bool | None = None
    ) -> Failed:
        partition.broken = True
        if retriable is None:
            retriable = error.errno in RETRIABLE
        return Failed(partition, f"Partition {partition.key} {what}: {error}.", retriable)

    def _die(self, sentence: str) -> None:
        if not self._dead:
            self._dead = True
            self._on_fatal(sentence)

    def _count(self, runs: dict[Segment, list[Batch]], failed: list[Failed], round_ns: int) -> None:
        stats = self.stats
        stats.rounds += 1
        stats.files += len(runs)
        stats.failures += len(failed)
        stats.round_ns += round_ns
        stats.round_ns_last = round_ns
        for run in runs.values():
            stats.batches += len(run)
            stats.bytes += run[-1].position + run[-1].size - run[0].position

    # orders

    def create(self, partition: Partition) -> None:
        self._guarded(partition, partial(self._create, partition))

    def _create(self, partition: Partition) -> None:
        partition.fresh = self._root_changed = True
        self._disk.make_directory(partition.directory)
        write_metadata(self._disk, partition.directory, partition.key)
        self._write_epochs(partition, partition.epochs.encode())
        self._disk.create(partition.segments[0].log)

    def write_epochs(self, partition: Partition, content: bytes) -> None:
        self._guarded(partition, partial(self._write_epochs, partition, content))

    def _write_epochs(self, partition: Partition, content: bytes) -> None:
        self._disk.write_file(f"{partition.directory}/{EPOCHS_NAME}", content, sync=False)

    def save(self, save: Save) -> None:
        self._guarded(save.partition, partial(self._save, save))

    def _save(self, save: Save) -> None:
        partition, segment, disk = save.partition, save.segment, self._disk
        for handle, (position, entries) in (
            (segment.index, save.offset_index),
            (segment.time_index, save.time_index),
        ):
            disk.write(disk.create(handle), [entries], position)
        write_snapshot(disk, partition.directory, save.offset, save.producers)
        remove_snapshots(disk, partition.directory, save.outdated)
        if save.next_segment is not None:
            disk.create(save.next_segment.log)
            if self._journal is not None:
                disk.sync_directory(partition.directory)
        self._background.checkpoint(save)

    def _guarded(self, partition: Partition, act: Order) -> None:
        if partition.broken or self._dead:
            return
        try:
            act()
        except OSError as error:
            self._on_round([], [self._stop(partition, "cannot be written", error)])

    def repair(
        self, partition: Partition, durable: Durable, on_repaired: Callable[[State], None]
    ) -> None:
        """Throw away what is past the durable end, and read the state anew."""
        disk = self._disk
        try:
            for segment in partition.segments:
                if segment.base_offset > durable.segment.base_offset:
                    for handle in segment.handles:
                        disk.forget(handle)
                        disk.remove(handle.path)
            if partition.fresh:
                self._create(partition)
            disk.truncate(durable.segment.log, durable.position)
            state = recover(
                disk,
                self._limits,
                partition.directory,
                recovery_point=partition.recovery_point,
                log_start_offset=partition.log_start_offset,
            )
        except (OSError, CorruptError) as error:
            sentence = f"Partition {partition.key} cannot be repaired: {error}"
            self._on_round([], [Failed(partition, sentence, isinstance(error, OSError))])
            return
        partition.broken = False
        on_repaired(state)

    def delete(self, partition: Partition) -> None:
        partition.broken = True
        aside = f"{partition.directory}.{partition.key.topic_id.hex}{DELETED_SUFFIX}"
        self.forget(partition.segments)
        try:
            self._disk.rename(partition.directory, aside)
        except OSError:
            return  # it was never created; the catalogue says that it is gone
        self._background.remove(aside)

    def forget(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            for handle in segment.handles:
                self._disk.forget(handle)


def _nothing() -> None:
    """The order of a round that ended because nothing waited."""
