"""All partitions of a data directory: the loop's side of the write round.

The loop decides and queues; `writer` (the disk thread) makes a round of all that waits durable;
`call_soon` brings the outcome back to the loop, where high watermarks move and `on_round` is told.
`tick` is the clock: call it about once a second.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog

from ledgerstream.limits import LIMITS, Limits
from ledgerstream.log.background import Background, Failed, Save
from ledgerstream.log.cleaner import Exchange
from ledgerstream.log.cleanings import Cleanings
from ledgerstream.log.config import LogConfig, PartitionKey
from ledgerstream.log.disk import Disk, File
from ledgerstream.log.epochs import Epochs
from ledgerstream.log.journal import Journal
from ledgerstream.log.loading import Loading, summary_of
from ledgerstream.log.markers import Point, remove_clean, write_checkpoint, write_clean
from ledgerstream.log.partition import Partition, State
from ledgerstream.log.producers import Producers
from ledgerstream.log.recovery import REMEDY
from ledgerstream.log.segment import Segment
from ledgerstream.log.snapshots import outdated_of
from ledgerstream.log.tail import Batch, TailCache
from ledgerstream.log.trims import Trims
from ledgerstream.log.writer import Item, Repair, Stats, Writer

log = structlog.get_logger("log")


class Store:
    """Made by `open`. Everything is for the loop's thread, `close` for one that may block."""

    def __init__(
        self, directory: Path, limits: Limits, disk: Disk, lock: File, *, sync: bool
    ) -> None:
        self.directory = directory
        self.limits = limits
        self.disk = disk
        self.tails = TailCache(limits.tail_cache_bytes, self._flush_soon)
        self.trims = Trims(self)
        self.failure: str | None = None  # the journal failed: nothing can be written any more
        self.checkpoint_due = False
        self._lock: File | None = lock
        self._sync = sync
        self._partitions: dict[PartitionKey, Partition] = {}
        self._checkpoint_at_ms = 0
        self._expiry_at_ms = 0
        self._flushing = False
        self._call_soon: Callable[[Callable[[], None]], object] = _nobody
        self._on_round: Callable[[list[Partition]], None] = _nobody
        self._on_fatal: Callable[[str], None] = _nobody
        self.cleanings = Cleanings(self)
        self._threads: list[threading.Thread] = []
        self._background = Background(
            disk, directory, self._checkpointed, self._flushed, self._background_failed, self._fatal
        )
        # recovery points in the checkpoint file, and in the one that is being written
        self._reached: dict[bytes, int] = {}
        self._pledged: dict[bytes, int] = {}
        # acknowledged offsets of partitions that could not be recovered, and of lost directories
        self._unrecovered: dict[bytes, Point] = {}
        self._lost: dict[bytes, Point] = {}
        journal = None
        generation, self._leftovers = self._load()
        if sync:
            journal = Journal(disk, directory, limits.journal_bytes, generation)
        self._writer = Writer(
            disk, limits, directory, journal, self._background, self._round_done, self._fatal
        )
        self._orders: list[Item] = []  # not handed to the disk thread yet
        self._later: Callable[[Callable[[], None]], object] | None = None

    # start and stop

    @classmethod
    def open(
        cls,
        directory: Path,
        limits: Limits = LIMITS,
        *,
        sync: bool = True,
        disk: Disk | None = None,
    ) -> Store:
        """Lock the directory and load every partition. DirectoryInUse if another process has it.

        `sync=False` is Kafka's page-cache behaviour: answered when written, synced behind.
        """
        disk = disk or Disk(limits.open_files_max)
        disk.make_directory(str(directory))
        return cls(directory, limits, disk, disk.lock(directory), sync=sync)

    def start(
        self,
        call_soon: Callable[[Callable[[], None]], object],
        on_round: Callable[[list[Partition]], None],
        on_fatal: Callable[[str], None] | None = None,
        later: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        """Begin to write. `call_soon` is the loop's `call_soon_threadsafe`, `later` its
        `call_soon`: what one turn of the loop decides is handed to the disk thread together, which
        wakes once for it and makes one round. Without it, each batch is handed over as it comes.

        `on_round` is told, on the loop, which partitions' high watermark moved, which failed and
        which take writes again; `on_fatal` that the store as a whole can write no more, and why.
        """
        self._call_soon = call_soon
        self._on_round = on_round
        if on_fatal is not None:
            self._on_fatal = on_fatal
        self._later = later
        self._threads = [
            threading.Thread(target=self._writer.run, name="log-disk", daemon=True),
            threading.Thread(target=self._background.run, name="log-background", daemon=True),
            threading.Thread(target=self.cleanings.cleaner.run, name="log-cleaner", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        for path in self._leftovers:
            self._background.remove(path)

    def close(self) -> None:
        """Finish what was accepted, sync, leave the marker of a clean stop. Blocks.

        In another thread than the loop's: after `hand_over`.
        """
        if self._lock is None:
            return
        assert not self._orders
        self._later = None
        if self._threads:
            for partition in self._partitions.values():
                if partition.unchecked_bytes and partition.failure is None:
                    self.checkpoint(partition)
            writer, background, cleaner = self._threads
            self.cleanings.cleaner.stop()
            cleaner.join()
            self._writer.queue.put([None])
            writer.join()
            self._background.queue.put(None)
            background.join()
        if not self._writer.dead:
            try:
                self._write_markers()
            except OSError as error:  # as on a full disk
                log.warning("no marker of a clean stop: the next start scans", why=str(error))
        self._lock = None

    def _write_markers(self) -> None:
        write_checkpoint(self.disk, self.directory, self._points())
        summaries = [
            summary_of(partition)
            for partition in self._partitions.values()
            if partition.failure is None and not partition.broken
        ]
        write_clean(self.disk, self.directory, summaries)

    def _load(self) -> tuple[int, list[str]]:
        """(the highest journal generation so far, directories that are to be removed)"""
        loading = Loading(self.disk, self.limits, self.directory)
        for found in loading.run():
            partition = self._add(found.key, found.state)
            partition.fresh = found.recovered
            if found.failure is not None:
                self._stop_unrecovered(partition, found.point, found.failure)
        here = {partition.identity for partition in self._partitions.values()}
        self._lost = {each.identity: each for each in loading.acknowledged(except_for=here)}
        points = self._points()
        write_checkpoint(self.disk, self.directory, points)
        self._reached = _recovery_points(points)
        remove_clean(self.disk, self.directory)
        if any(partition.failure for partition in self._partitions.values()):
            loading.journals.set_aside()
        else:
            loading.journals.recycle()
        return loading.journals.generation, loading.deleted

    def _stop_unrecovered(self, partition: Partition, point: Point, why: str) -> None:
        self._unrecovered[point.identity] = point
        partition.recovery_point = point.recovery_point
        partition.broken = True
        partition.stop(why, retriable=False)
        log.error("partition stopped", partition=str(partition.key), why=why)

    # partitions

    def create(self, key: PartitionKey, config: LogConfig, now_ms: int) -> Partition:
        """A new partition, led from offset 0; its directory is made in the disk thread.

        One that had records when the store was last open, and has no directory now, is stopped.
        """
        assert key not in self._partitions, key
        directory = str(self.directory / key.directory)
        epochs = Epochs()
        epochs.begin(0, 0)
        state = State([Segment(directory, 0, now_ms)], 0, 0, epochs, Producers(), ())
        partition = self._add(key, state, config)
        lost = self._lost.pop(key.identity, None)
        if lost is not None:
            self._stop_unrecovered(
                partition,
                lost,
                f"Partition {key} has lost its directory {directory}, which held acknowledged "
                f"records below offset {lost.durable_offset:,}. {REMEDY}",
            )
            return partition
        self.write(partial(self._writer.create, partition))
        return partition

    def get(self, key: PartitionKey) -> Partition | None:
        return self._partitions.get(key)

    def partitions(self) -> list[Partition]:
        return list(self._partitions.values())

    def delete(self, key: PartitionKey) -> None:
        """Forget the partition; its directory is renamed, then removed, behind our back."""
        partition = self._partitions.pop(key)
        partition.deleted = True
        partition.stop(f"Partition {key} has been deleted.", retriable=False)
        self.checkpoint_due = True
        self.write(partial(self._writer.delete, partition))

    def _add(self, key: PartitionKey, state: State, config: LogConfig = LogConfig()) -> Partition:
        directory = str(self.directory / key.directory)
        partition = Partition(self, key, config, directory, state)
        self._partitions[key] = partition
        return partition

    @property
    def stats(self) -> Stats:
        return self._writer.stats

    # what partitions ask for

    def roll(self, partition: Partition, full: Segment) -> None:
        self._save(partition, full, partition.segments[-1])

    def checkpoint(self, partition: Partition) -> None:
        self._save(partition, partition.segments[-1], None)

    def _save(self, partition: Partition, segment: Segment, following: Segment | None) -> None:
        segment.index_time()
        offsets = (*(o for o in partition.snapshot_offsets if o != partition.next_offset),)
        offsets += (partition.next_offset,)
        files = self._reached, self._pledged
        outdated = outdated_of(offsets, [each.get(partition.identity, 0) for each in files])
        partition.snapshot_offsets = tuple(o for o in offsets if o not in outdated)
        partition.unchecked_bytes = 0
        save = Save(
            partition,
            segment,
            partition.next_offset,
            segment.offsets.waiting(),
            segment.times.waiting(),
            segment.aborted.waiting(),
            partition.producers.records(),
            outdated,
            following,
        )
        self.write(partial(self._writer.save, save))

    def write_epochs(self, partition: Partition) -> None:
        content = partition.epochs.encode()
        self.write(partial(self._writer.write_epochs, partition, content))

    def write(self, item: Item) -> None:
        """Queue a batch or an order for the disk thread, behind what was queued before."""
        if self._later is None:
            self._writer.queue.put([item])
            return
        orders = self._orders
        orders.append(item)
        if len(orders) == 1:
            self._later(self.hand_over)
        elif len(orders) >= self.limits.hand_over_batches:
            self.hand_over()

    def hand_over(self) -> None:
        """Let the disk thread have what this turn of the loop decided."""
        if self._orders:
            orders, self._orders = self._orders, []
            self._writer.queue.put(orders)

    # the clock

    def tick(self, now_ms: int, at_ms: int | None = None) -> None:
        """What time brings: checkpoints, another try for stopped partitions, producers' expiry.

        now_ms: ms since 1970 UTC, which records are judged by; at_ms: a clock that never jumps, for
        when something is due and how long it was idle. In a simulation they are the same.
        """
        at_ms = now_ms if at_ms is None else at_ms
        if at_ms >= self._checkpoint_at_ms:
            self._checkpoint_at_ms = at_ms + self.limits.checkpoint_ms
            self._flush_soon()
            if self.checkpoint_due:
                self.checkpoint_due = False
                self._lost.clear()  # nobody asked for them since the start: they were deleted
                self.write_checkpoint(_nobody)
        if at_ms >= self._expiry_at_ms:
            self._expiry_at_ms = at_ms + self.limits.producer_id_expiry_check_ms
            for partition in self._partitions.values():
                partition.producers.expire(at_ms, self.limits.producer_id_expiry_ms)
        self.trims.tick(self._partitions.values(), now_ms, at_ms)
        self.cleanings.tick(self._partitions.values(), now_ms, at_ms)
        for partition in self._partitions.values():
            if partition.retriable:
                self._retry(partition, at_ms)

    def write_checkpoint(self, written: Callable[[bool], None]) -> None:
        """`written`, on the loop: whether it is on the disk."""
        points = self._points()
        self._pledged = _recovery_points(points)
        tell = partial(self._checkpoint_written, points, written)
        self._background.write_checkpoint(points, tell)

    def drop(self, partition: Partition, segments: list[Segment]) -> None:
        """They lie below the log's start."""
        first = partition.segments[0].base_offset
        older = [offset for offset in partition.snapshot_offsets if offset < first]
        partition.snapshot_offsets = partition.snapshot_offsets[len(older) :]
        self.write(partial(self._writer.drop, partition, segments, older))

    def leave(self, segments: list[Segment]) -> None:
        """Others have taken their place."""
        self.trims.leave(segments)

    def recoverable_below(self, partition: Partition) -> int:
        """What a recovery would believe without a look at it."""
        return self._reached.get(partition.identity, 0)

    def exchange(self, exchange: Exchange, told: Callable[[bool], None]) -> None:
        """`told`, on the loop: whether it was done."""
        on_loop = partial(self._exchanged, told)
        self.write(partial(self._writer.exchange, exchange, on_loop))

    def let_go(self, segments: list[Segment]) -> None:
        self._background.let_go(segments)

    def _flush_soon(self) -> None:
        if not self._flushing and self._threads:
            self._flushing = True
            self.write(self._writer.flush)

    def _retry(self, partition: Partition, at_ms: int) -> None:
        if partition.retry_at_ms is None:
            partition.retry_at_ms = at_ms + self.limits.storage_retry_ms
        elif at_ms >= partition.retry_at_ms:
            partition.retriable = False
            repaired = partial(self._repaired, partition)
            point = self._point(partition)._replace(log_start_offset=partition.log_start_offset)
            self.write(Repair(partition, partition.durable, point, repaired))

    def _points(self) -> list[Point]:
        points = [self._point(partition) for partition in self._partitions.values()]
        return points + list(self._lost.values())

    def _point(self, partition: Partition) -> Point:
        if unrecovered := self._unrecovered.get(partition.identity):
            return unrecovered
        return Point(
            partition.identity,
            partition.recovery_point,
            partition.high_watermark if self._sync else partition.recovery_point,
            self.trims.start_wanted(partition),
        )

    # called by the threads; each goes on on the loop

    def _round_done(self, done: list[Batch], failed: list[Failed]) -> None:
        self.post(partial(self._on_loop_round, done, failed))

    def _exchanged(self, told: Callable[[bool], None], done: bool) -> None:
        self.post(partial(told, done))

    def _repaired(self, partition: Partition, state: State) -> None:
        self.post(partial(self._on_loop_repaired, partition, state))

    def _checkpointed(self, save: Save) -> None:
        self.post(partial(self._on_loop_checkpointed, save))

    def _checkpoint_written(
        self, points: list[Point], written: Callable[[bool], None], durable: bool
    ) -> None:
        self.post(partial(self._on_loop_checkpoint_written, points, written, durable))

    def _flushed(self) -> None:
        self.post(self._on_loop_flushed)

    def _background_failed(self, failed: Failed) -> None:
        self._round_done([], [failed])

    def _fatal(self, sentence: str) -> None:
        self.post(partial(self._on_loop_fatal, sentence))

    def post(self, act: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: there is nobody to tell
            self._call_soon(act)

    # on the loop

    def _on_loop_round(self, done: list[Batch], failed: list[Failed]) -> None:
        moved = []
        for batch in done:
            partition = batch.partition
            if partition.failure is None:
                partition.advance(batch)
                moved.append(partition)
        for partition, sentence, retriable in failed:
            if not partition.deleted:
                partition.stop(sentence, retriable=retriable)
                log.error("partition stopped", partition=str(partition.key), why=sentence)
                moved.append(partition)
        self.checkpoint_due = True
        self._on_round(moved)

    def _on_loop_repaired(self, partition: Partition, state: State) -> None:
        if not partition.deleted:
            partition.resume(state)
            log.info("partition takes writes again", partition=str(partition.key))
            self._on_round([partition])

    def _on_loop_checkpointed(self, save: Save) -> None:
        for index, (position, entries) in (
            (save.segment.offsets, save.offset_index),
            (save.segment.times, save.time_index),
            (save.segment.aborted, save.aborted_index),
        ):
            index.written(position + len(entries))
        save.partition.recovery_point = save.offset
        self.checkpoint_due = True

    def _on_loop_checkpoint_written(
        self, points: list[Point], written: Callable[[bool], None], durable: bool
    ) -> None:
        if durable:
            self._reached = _recovery_points(points)
        written(durable)

    def _on_loop_flushed(self) -> None:
        self._flushing = False

    def _on_loop_fatal(self, sentence: str) -> None:
        if self.failure is None:
            self.failure = sentence
            log.critical("log stopped", why=sentence)
            for partition in self._partitions.values():
                partition.stop(sentence, retriable=False)
            self._on_round(self.partitions())
            self._on_fatal(sentence)


def _recovery_points(points: list[Point]) -> dict[bytes, int]:
    return {point.identity: point.recovery_point for point in points}


def _nobody(_: object) -> None:
    """Nobody has asked to be told."""
