"""The disk thread: takes all that waits, writes it, makes it durable once, and says so.

A round with one dirty file, or with a few and much to write, writes and syncs each of them; any
other writes all its batches to the journal and syncs that, and the files follow behind the round.
Orders (create, roll, checkpoint, repair, delete) stand in the same queue, so each finds the files
as the loop had them in mind.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

import structlog

from ledgerstream.errors import CorruptError
from ledgerstream.limits import Limits
from ledgerstream.log.background import RETRIABLE, Background, Failed, Save, stopped
from ledgerstream.log.cleaner import Exchange
from ledgerstream.log.disk import Disk
from ledgerstream.log.epochs import EPOCHS_NAME
from ledgerstream.log.journal import Journal, frame_bytes
from ledgerstream.log.markers import DELETED_SUFFIX, METADATA_NAME, Point, write_metadata
from ledgerstream.log.partition import Durable, Partition, State
from ledgerstream.log.recovery import recover
from ledgerstream.log.segment import Segment
from ledgerstream.log.snapshots import remove_snapshots, write_snapshot
from ledgerstream.log.swap import begin_swap, finish_swap
from ledgerstream.log.tail import Batch


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


log = structlog.get_logger("log")


class Repair(NamedTuple):
    """Put a stopped partition right. What was queued before it belongs to what is thrown away."""

    partition: Partition
    durable: Durable
    point: Point
    on_repaired: Callable[[State], None]


Order = Callable[[], None]
Item = Batch | Order | Repair | None  # None: finish
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
        self.queue: SimpleQueue[list[Item]] = SimpleQueue()
        self._taken: deque[Item] = deque()  # from the queue, not carried out yet
        self._disk = disk
        self._limits = limits
        self._root = root
        self._journal = journal  # None: nothing is synced before it is answered
        self._background = background
        self._on_round = on_round
        self._on_fatal = on_fatal
        self._root_changed = False
        self._saved: list[Save] = []  # in this round: synced behind it, once the data is written
        self.dead = False

    # the thread

    def run(self) -> None:
        try:
            while self._round():
                pass
        except BaseException as error:
            self._die(f"The log's disk thread failed: {error!r}.")
            raise
        if self._journal is not None and self._journal.current is not None:
            self._background.release(self._journal.current)

    def _round(self) -> bool:
        """Everything that waits; False when that was the last."""
        batches, last = self._collect()
        if batches and not self.dead:
            began = time.perf_counter_ns()
            failed: list[Failed] = []
            runs = self._runs(batches)
            self._perform(runs, failed)
            self._count(runs, failed, time.perf_counter_ns() - began)
            if runs or failed:
                self._on_round([run[-1] for run in runs.values()], failed)
        for save in self._saved:
            if not save.partition.broken:
                self._background.checkpoint(save)
        self._saved.clear()
        if isinstance(last, Repair):
            self._repair(last)
        return last is not None

    def _collect(self) -> tuple[list[Batch], Item]:
        """The round's batches, and what ended it. Orders are carried out on the way.

        So a roll does not end the round: its new file is there before the batches that go into it.
        """
        batches: list[Batch] = []
        size, bytes_max = 0, self._limits.round_bytes_max
        taken = self._taken
        if not taken:
            taken += self.queue.get()
        while True:
            while taken:
                item = taken.popleft()
                if isinstance(item, Batch):
                    batches.append(item)
                    size += item.size
                    if size >= bytes_max:
                        return batches, item
                elif item is None or isinstance(item, Repair):
                    return batches, item
                else:
                    item()
            try:
                taken += self.queue.get_nowait()
            except Empty:
                return batches, item

    def _runs(self, batches: list[Batch]) -> dict[Segment, list[Batch]]:
        """By segment, each after what it has pending; without those of stopped partitions."""
        runs: dict[Segment, list[Batch]] = {}
        for batch in batches:
            if batch.partition.broken:
                continue
            segment = batch.segment
            segment.pending.append(batch)
            run = runs.get(segment)
            if run is None:
                runs[segment] = [batch]
            else:
                run.append(batch)
        return runs

    def _perform(self, runs: dict[Segment, list[Batch]], failed: list[Failed]) -> None:
        """Make the runs durable; those that cannot be are taken out."""
        journal = self._journal
        if journal is not None:
            self._each(self._sync_fresh, runs, failed)
            batches = [batch for run in runs.values() for batch in run]
            size = frame_bytes(len(batches), sum([batch.size for batch in batches]))
            if self._is_for_journal(journal, len(runs), size) and self._makes_room(journal, size):
                if not self._write_journal(journal, batches):
                    runs.clear()
                return
        self._each(self._flush, runs, failed)
        if journal is not None:
            self._each(self._sync, runs, failed)

    def _is_for_journal(self, journal: Journal, files: int, size: int) -> bool:
        """Syncs cost more than writing twice, unless there is much to write."""
        limits = self._limits
        if files > limits.round_direct_files_max:
            return size <= limits.journal_bytes
        return (files > 1 or journal.direct) and size <= limits.round_journal_bytes

    def _each(
        self,
        act: Callable[[Segment, Partition], None],
        runs: dict[Segment, list[Batch]],
        failed: list[Failed],
    ) -> None:
        """What fails stops its partition, and takes the partition's runs out of the round."""
        for segment, run in list(runs.items()):
            partition = run[0].partition
            try:
                if not partition.broken:
                    act(segment, partition)
            except OSError as error:
                retriable = act == self._flush and error.errno in RETRIABLE
                failed.append(stopped(self._disk, partition, error, retriable))
            if partition.broken:
                del runs[segment]

    def _flush(self, segment: Segment, _: Partition) -> None:
        segment.flush(self._disk)

    def _sync(self, segment: Segment, partition: Partition) -> None:
        if not segment.named:
            self._disk.sync_directory(partition.directory)
            segment.named = True
        self._disk.sync(self._disk.open(segment.log))
        self.stats.syncs += 1

    def _sync_fresh(self, segment: Segment, partition: Partition) -> None:
        """A new partition's names, before anything in it is answered."""
        if partition.fresh:
            for name in (METADATA_NAME, EPOCHS_NAME):
                self._disk.sync_path(f"{partition.directory}/{name}")
            self._disk.sync_directory(partition.directory)
            if self._root_changed:
                self._disk.sync_directory(str(self._root))
                self._root_changed = False
            partition.fresh = False
            segment.named = True

    def _makes_room(self, journal: Journal, size: int) -> bool:
        """Whether the journal takes a frame of this size; on a full disk it may not."""
        try:
            if not journal.fits(size):
                self._background.wait_until_released()
                full = journal.turn()
                if full is not None:
                    self._background.release(full)
            journal.grow(size)
        except OSError as error:
            log.warning("no room for a journal, every file is synced", why=str(error))
            return False
        return True

    def _write_journal(self, journal: Journal, batches: list[Batch]) -> bool:
        try:
            journal.write(batches)
        except OSError as error:
            self._die(f"The log's journal cannot be written: {error}.")
            return False
        self.stats.syncs += 1
        self.stats.journal_rounds += 1
        return True

    def _die(self, sentence: str) -> None:
        if not self.dead:
            self.dead = True
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
        self._guarded(partition, partial(self._create_anew, partition))

    def _create_anew(self, partition: Partition) -> None:
        path = partition.segments[0].log.path
        if self._disk.size(path):
            raise FileExistsError(errno.EEXIST, "records of another topic are there", path)
        self._create(partition)

    def _create(self, partition: Partition) -> None:
        partition.fresh = self._root_changed = True
        self._disk.make_directory(partition.directory)
        write_metadata(self._disk, partition.directory, partition.key)
        self._write_epochs(partition, partition.epochs.encode(), sync=False)
        self._disk.create(partition.segments[0].log)

    def write_epochs(self, partition: Partition, content: bytes) -> None:
        self._guarded(partition, partial(self._write_epochs, partition, content))

    def _write_epochs(self, partition: Partition, content: bytes, *, sync: bool = True) -> None:
        """The name is synced with the next checkpoint: one that a crash brings back knows too few
        of the last epochs, which are read again from there, and too many of the first."""
        self._disk.write_file(f"{partition.directory}/{EPOCHS_NAME}", content, sync=sync)

    def save(self, save: Save) -> None:
        self._guarded(save.partition, partial(self._save, save))

    def _save(self, save: Save) -> None:
        partition, disk = save.partition, self._disk
        for handle, (position, entries) in save.indexes():
            disk.write(disk.create(handle), [entries], position)
        write_snapshot(disk, partition.directory, save.offset, save.producers)
        remove_snapshots(disk, partition.directory, save.outdated)
        if save.next_segment is not None:
            disk.create(save.next_segment.log)
        self._saved.append(save)

    def _guarded(self, partition: Partition, act: Order) -> None:
        if partition.broken or self.dead:
            return
        try:
            act()
        except OSError as error:
            retriable = error.errno in RETRIABLE
            self._on_round([], [stopped(self._disk, partition, error, retriable)])

    def _repair(self, repair: Repair) -> None:
        """Throw away what is past the durable end, and read the state anew."""
        partition, durable, point, on_repaired = repair
        disk = self._disk
        try:
            if partition.fresh:
                self._create(partition)
            for segment in partition.segments:
                if segment.base_offset < durable.segment.base_offset:
                    segment.flush(disk)
                elif segment is durable.segment:
                    segment.throw_away(disk, durable.position)
                else:
                    segment.discard(disk)
            state = recover(disk, self._limits, partition.directory, point)
        except (OSError, CorruptError) as error:
            sentence = f"Partition {partition.key} cannot be repaired: {error}"
            self._on_round([], [Failed(partition, sentence, isinstance(error, OSError))])
            return
        partition.broken = False
        on_repaired(state)

    def drop(self, partition: Partition, segments: list[Segment], snapshots: list[int]) -> None:
        """Files below the log's start lose their names; those who read them have them open."""
        try:
            self.withdraw(segments)
            for segment in segments:
                segment.remove_names(self._disk)
            remove_snapshots(self._disk, partition.directory, snapshots)
        except OSError as error:  # the next recovery removes what is left
            log.warning("old segments not removed", partition=str(partition.key), why=str(error))

    def exchange(self, exchange: Exchange, told: Callable[[bool], None]) -> None:
        """Compacted segments take the place of others. `told`: whether they did."""
        partition, swap = exchange.job.partition, exchange.swap
        if partition.broken or self.dead:
            told(False)
            return
        try:
            begin_swap(self._disk, partition.directory, swap)
            self.withdraw(exchange.old)
            finish_swap(self._disk, partition.directory, swap)
        except OSError as error:  # done by half, perhaps: the repair finishes it, or throws it away
            self._on_round([], [stopped(self._disk, partition, error, retriable=True)])
            told(False)
        else:
            told(True)

    def withdraw(self, segments: list[Segment]) -> None:
        """Keep them readable for those who have them; the journal need not look after them."""
        for segment in segments:
            segment.keep_open(self._disk)
            if self._journal is not None and self._journal.current is not None:
                self._journal.current.covers.pop(segment, None)

    def delete(self, partition: Partition) -> None:
        partition.broken = True
        key = partition.key  # without the topic's name, which may be as long as a file's can be
        aside = str(self._root / f"{key.topic_id.hex}-{key.index}{DELETED_SUFFIX}")
        for segment in partition.segments:
            for handle in segment.handles:
                self._disk.let_go(handle)
        try:
            self._disk.rename(partition.directory, aside)
        except FileNotFoundError:
            return  # it was never created
        except OSError as error:
            log.error("deleted partition not removed", partition=str(key), why=str(error))
            return
        self._background.remove(aside)

    def flush(self) -> None:
        """Let the second thread write what is in the journal and the memory only."""
        self._background.flush(self._journal.current if self._journal is not None else None)
