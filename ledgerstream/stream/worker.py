"""The worker: claims partitions, brings their state back, and streams until told to stop.

Fetch, compute and commit overlap: while one step commits, the next chunk is computed and the one
after it fetched; what is computed meanwhile is joined into the next step. Commits stay in order on
one connection. A step that fails undoes what was computed after it.

`except Exception` stands here alone, around a partition: what nobody knows to be harmless stops
that partition, and the others go on.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import structlog

from ledgerstream.errors import (
    DeliveryTimeout,
    KafkaError,
    LedgerStreamError,
    Overtaken,
    StoppedPartition,
)
from ledgerstream.limits import LIMITS
from ledgerstream.stream.machine import Input, Machine, Piece, join
from ledgerstream.stream.processor import Processor
from ledgerstream.stream.restore import OFFSET_OUT_OF_RANGE, Restorer
from ledgerstream.stream.sink import Claim, DataError, Sink, Source, TransientError, overtaken
from ledgerstream.stream.snapshot import Snapshots, freeze
from ledgerstream.stream.source import EARLIEST, LATEST, Chunk, Decoder, Log, Reader
from ledgerstream.stream.threads import Compute
from ledgerstream.stream.version import code_version
from ledgerstream.stream.warm import run_sample, warm

log = structlog.get_logger()
T = TypeVar("T")


@dataclass
class Progress:
    """What a worker has done so far; given to `on_progress` after each commit.

    rows:       by result table.
    position:   the next offset of each partition, committed.
    lag:        of each partition, events that the log has beyond what is committed.
    commit_ms:  how long the last commit took.
    """

    processor: str
    events: int = 0
    dead: int = 0
    commits: int = 0
    snapshots: int = 0
    commit_ms: float = 0.0
    rows: dict[str, int] = field(default_factory=dict)
    position: dict[int, int] = field(default_factory=dict)
    lag: dict[int, int] = field(default_factory=dict)


class Reload(LedgerStreamError):
    """What is in memory may not be what Postgres has: forget it, claim and restore."""


class Partition:
    """One partition under way. `committed` ≤ `machine.position`."""

    def __init__(self, machine: Machine, snapshot_at: int) -> None:
        self.machine = machine
        self.committed = machine.position
        self.snapshot_at = snapshot_at  # offset of the newest snapshot, or where replay began
        self.compute_s = 0.0  # spent since then: what a replay would take
        self.log_end = machine.position

    def undo(self) -> None:
        """Back to what is committed."""
        while self.machine.state.frames:
            self.machine.rollback()


class Worker:
    """One processor over partitions of its topic, from `log` into the Postgres at `database`.

    partitions:       those to work on; without it, all of the topic.
    until:            "end": stop once what the log held at the start is done; "restored": stop
                      with a snapshot as soon as the state is back (lets an old version finish).
    accept_new_code:  replay a range with code that did not compute it; it is recorded.
    on_progress:      called on the loop after each commit.
    say:              gets sentences for people, such as that kernels are being compiled.
    """

    def __init__(
        self,
        processor: type[Processor],
        log: Log,
        database: str,
        *,
        partitions: Sequence[int] | None = None,
        until: Literal["end", "restored"] | None = None,
        accept_new_code: bool = False,
        on_progress: Callable[[Progress], None] = lambda _: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.progress = Progress(processor.name)
        self.stopped: dict[int, Exception] = {}
        self._processor = processor
        self._log = log
        self._database = database
        self._only = partitions
        self._until = until
        self._accept_new_code = accept_new_code
        self._on_progress = on_progress
        self._say = say
        self._code_version = code_version(processor)
        self._stopping = asyncio.Event()
        self._moved = asyncio.Event()  # set, and made anew, at each commit
        self._partitions: dict[int, Partition] = {}
        self._ends: dict[int, int] = {}
        self._snapshot_task: asyncio.Task[None] | None = None
        self._snapshot_of = -1
        self._snapshot_next = 0.0

    def stop(self) -> None:
        """Stop at the end of the step under way, with a snapshot."""
        self._stopping.set()

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT call `stop`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    async def run(self) -> Progress:
        """Work until the end, or until `stop`.

        Raises ConfigError before anything starts, Overtaken when all partitions are with another
        worker, and StoppedPartition for the first that stopped, once the others are done.
        """
        info = await self._log.topic(self._processor.source.name)
        self._processor.check_partitions(info.partitions)
        self._source = Source(self._processor.source.name, info.topic_id or uuid.UUID(int=0))
        self._decoder = Decoder(self._processor.source, info.partitions)
        self._mine = list(range(info.partitions) if self._only is None else self._only)
        self._compute = Compute()
        try:
            await self._compute(warm, self._processor, self._say)
            if self._until == "end":
                self._ends = await self._offsets(LATEST)
            for pause in _pauses():
                if not await self._session() or self._stopping.is_set():
                    break
                await asyncio.sleep(pause)
        finally:
            self._compute.close()
        if self.stopped:
            raise next(iter(self.stopped.values()))
        return self.progress

    # -- one life of the database connection and of the state in memory

    async def _session(self) -> bool:
        """Claim, restore, stream; True if everything must be loaded again."""
        self._sink = await self._retried(self._connect)
        self._snapshots = await self._retried(
            lambda: Snapshots.connect(self._database, self._processor.name, self._source)
        )
        try:
            await self._restore()
            if self._until != "restored":
                await self._stream()
            await self._last_snapshots()
            await self._sink.merge_audit()
        except Reload as reason:
            log.warning("state dropped", processor=self._processor.name, why=str(reason))
            return True
        except TransientError as error:
            log.warning("database not there", processor=self._processor.name, error=str(error))
            return True
        finally:
            await self._cancel_snapshot()
            self._partitions.clear()
            await self._snapshots.close()
            await self._sink.close()
        return False

    async def _connect(self) -> Sink:
        return await Sink.connect(
            self._database, self._processor.name, self._processor.version, self._code_version
        )

    async def _restore(self) -> None:
        alive = [each for each in self._mine if each not in self.stopped]
        starts = await self._offsets(EARLIEST)
        claims = await self._sink.claim(self._source, alive, starts)
        await self._sink.create_tables(await self._compute(run_sample, self._processor))
        restorer = Restorer(
            self._processor(), self._code_version, self._accept_new_code, self._source,
            await self._sink.topic_number(self._source), self._sink, self._snapshots, self._log,
            self._decoder, self._compute,
        )  # fmt: skip
        for number, claim in sorted(claims.items()):
            try:
                began = time.perf_counter()
                machine, snapshot_at = await restorer.restore(claim)
            except StoppedPartition as error:
                self._stop_partition(number, error)
                continue
            partition = Partition(machine, snapshot_at)
            partition.compute_s = (
                time.perf_counter() - began if snapshot_at < claim.next_offset else 0
            )
            self._partitions[number] = partition
            self.progress.position[number] = claim.next_offset

    # -- streaming

    async def _stream(self) -> None:
        """Overlap fetch, compute and commit until stopped, at the end, or out of partitions."""
        fetch: asyncio.Task[Chunk | None] | None = None
        commit: asyncio.Task[None] | None = None
        stopping = asyncio.create_task(self._stopping.wait())
        waiting: list[Piece] = []  # computed, in order
        sent: list[Piece] = []  # being committed
        reader: Reader | None = None
        reading: set[int] = set()
        try:
            while True:
                if reading != set(self._partitions):
                    await _cancelled(fetch)
                    fetch = None
                    if reader is not None:
                        await reader.close()
                    reading = set(self._partitions)
                    reader = self._reader()
                draining = stopping.done() or self._at_end()
                if draining:
                    await _cancelled(fetch)
                    fetch = None
                elif fetch is None and reader is not None and not _is_full(waiting):
                    fetch = asyncio.create_task(_next(reader))
                if commit is None and waiting:
                    sent, waiting = _joined(waiting), []
                    commit = asyncio.create_task(self._commit(sent))
                busy = {each for each in (fetch, commit) if each is not None}
                if not busy:
                    return
                await asyncio.wait(
                    busy if draining else {*busy, stopping},
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if commit is not None and commit.done():
                    done, commit = commit, None
                    waiting = await self._settle(done, sent, waiting)
                if fetch is not None and fetch.done():
                    done_fetch, fetch = fetch, None
                    chunk = await self._chunk_of(done_fetch)
                    if chunk is not None and reader is not None and not _is_full(waiting):
                        fetch = asyncio.create_task(_next(reader))
                    if chunk is not None and chunk.partition in self._partitions:
                        waiting += await self._process(chunk)
        finally:
            stopping.cancel()
            await _cancelled(fetch)
            await _cancelled(commit)
            if reader is not None:
                await reader.close()

    def _reader(self) -> Reader | None:
        if not self._partitions:
            return None
        return self._log.reader(
            self._source.name,
            {number: each.machine.position for number, each in self._partitions.items()},
        )

    def _at_end(self) -> bool:
        return self._until == "end" and all(
            each.machine.position >= self._ends[number] for number, each in self._partitions.items()
        )

    async def _chunk_of(self, fetch: asyncio.Task[Chunk | None]) -> Chunk | None:
        try:
            return fetch.result()
        except (KafkaError, DeliveryTimeout) as error:
            if isinstance(error, KafkaError) and error.code == OFFSET_OUT_OF_RANGE:
                await self._stop_outrun()
                return None
            if isinstance(error, KafkaError) and not error.retriable:
                raise
            log.warning("log not there", processor=self._processor.name, error=str(error))
            await asyncio.sleep(LIMITS.retry_ms_max / 1_000)
            return None

    async def _process(self, chunk: Chunk) -> list[Piece]:
        partition = self._partitions[chunk.partition]
        partition.log_end = chunk.end_offset
        pieces: list[Piece] = []

        def compute() -> None:
            began = time.perf_counter()
            try:
                for given in self._decoder.decode(chunk):
                    pieces.append(partition.machine.step(given))
            finally:
                partition.compute_s += time.perf_counter() - began

        await self._guard(chunk.partition, self._compute(compute))
        return pieces

    async def _commit(self, pieces: Sequence[Piece]) -> None:
        """Commit, however often it takes; the same bytes are sent again."""
        began = time.perf_counter()
        for pause in _pauses():
            try:
                await self._sink.commit(pieces)
                break
            except TransientError as error:
                if self._stopping.is_set():
                    raise
                log.warning("commit retried", processor=self._processor.name, error=str(error))
                await asyncio.sleep(pause)
                if error.lost and await self._claim_again(pieces):
                    break
        self.progress.commit_ms = (time.perf_counter() - began) * 1_000

    async def _claim_again(self, pieces: Sequence[Piece]) -> bool:
        """Settle an ambiguous commit: a new connection, a new claim, and its word on the step.

        True if the step was committed. Raises Overtaken for partitions that others have claimed
        since, and Reload where Postgres is not what it was.
        """
        before = self._sink
        held = dict(before.epochs)

        async def claim() -> dict[int, Claim]:
            self._sink = await self._connect()
            if self._sink.server != before.server:
                raise Reload("this is another database server, or another life of it.")
            return await self._sink.claim(self._source, held, dict.fromkeys(held, 0), held)

        claims = await self._retried(claim)
        lost = held.keys() - claims.keys()
        if lost:
            self._mine = [each for each in self._mine if each not in lost]
            if not self._mine:
                raise overtaken(self._processor.name, self._source.name, set(lost))
            raise Reload(f"another worker has claimed partitions {sorted(lost)}.")
        starts = {number: each.committed for number, each in self._partitions.items()}
        stops = starts | {piece.partition: piece.stop for piece in pieces}
        found = {number: claims[number].next_offset for number in starts}
        if found == starts:
            return False
        if found == stops:
            return True
        raise Reload(f"offsets are {found}, neither {starts} nor {stops}.")

    async def _settle(
        self, commit: asyncio.Task[None], sent: list[Piece], waiting: list[Piece]
    ) -> list[Piece]:
        """Take note of how a commit ended; returns the pieces that are to be committed next."""
        error = commit.exception()
        if error is None:
            self._note(sent)
            return waiting
        if isinstance(error, Overtaken):
            for number in error.partitions:
                self._drop(number)
            self._mine = [each for each in self._mine if each not in error.partitions]
            if not self._partitions:
                raise error
            log.warning("overtaken", processor=self._processor.name, error=str(error))
            return [each for each in [*sent, *waiting] if each.partition in self._partitions]
        if isinstance(error, (Reload, TransientError)) or not isinstance(error, Exception):
            raise error
        # The rows are at fault, or we do not know: each partition, and then each half, alone.
        await self._cancel_snapshot()
        inputs = [given for piece in [*sent, *waiting] for given in piece.inputs]
        for partition in self._partitions.values():
            await self._compute(partition.undo)
        for given in inputs[: sum(len(piece.inputs) for piece in sent)]:
            if given.partition in self._partitions:
                await self._guard(given.partition, self._bisect(given))
        again: list[Piece] = []
        for given in inputs[sum(len(piece.inputs) for piece in sent) :]:
            if given.partition in self._partitions:
                await self._guard(given.partition, self._step(given, again))
        return again

    async def _step(self, given: Input, into: list[Piece]) -> None:
        into.append(await self._compute(self._partitions[given.partition].machine.step, given))

    async def _bisect(self, given: Input) -> None:
        """Commit one input, or its halves, down to the one event at fault: a dead letter."""
        machine = self._partitions[given.partition].machine
        piece = await self._compute(machine.step, given)
        try:
            await self._commit([piece])
        except DataError as error:
            await self._compute(machine.rollback)
            if len(given.batch) > 1:
                for half in given.split():
                    await self._bisect(half)
                return
            if len(given.batch) == 0:
                raise
            await self._bisect(given.without([0], str(error.args[0])))
            return
        self._note([piece])

    def _note(self, pieces: Iterable[Piece]) -> None:
        """Pieces are committed."""
        for piece in pieces:
            partition = self._partitions[piece.partition]
            for _ in piece.inputs:
                partition.machine.forget()
            partition.committed = piece.stop
            self.progress.events += piece.events
            self.progress.dead += len(piece.dead)
            self.progress.position[piece.partition] = piece.stop
            self.progress.lag[piece.partition] = max(partition.log_end - piece.stop, 0)
            for table, (_, rows) in piece.copies.items():
                name = table.relation().name
                self.progress.rows[name] = self.progress.rows.get(name, 0) + rows
        self.progress.commits += 1
        self._moved.set()
        self._moved = asyncio.Event()
        self._begin_snapshot()
        self._on_progress(self.progress)

    # -- partitions that go

    async def _guard(self, number: int, work: Awaitable[T]) -> None:
        """Do something for one partition; an error that nobody knows stops it, and it alone."""
        try:
            await work
        except (Reload, TransientError, Overtaken):
            raise
        except StoppedPartition as error:
            self._stop_partition(number, error)
        except Exception as error:  # noqa: BLE001 - the one supervisor
            where = f"{self._source.name}-{number} stopped"
            partition = self._partitions.get(number)
            if partition is not None:
                where += f" at offset {partition.committed:,}"
            self._stop_partition(
                number,
                StoppedPartition(
                    f"{where}.\n  {type(error).__name__}: {error}",
                    "Nothing of the step was committed: correct the cause and start again.",
                ),
                cause=error,
            )

    def _stop_partition(
        self, number: int, error: Exception, cause: BaseException | None = None
    ) -> None:
        error.__cause__ = cause
        log.error("partition stopped", partition=number, why=str(error))
        self.stopped[number] = error
        self._drop(number)

    def _drop(self, number: int) -> None:
        self._partitions.pop(number, None)
        self._sink.drop(number)
        if self._snapshot_of == number and self._snapshot_task is not None:
            self._snapshot_task.cancel()

    async def _stop_outrun(self) -> None:
        """Stop the partitions whose next event retention has removed."""
        starts = await self._offsets(EARLIEST)
        for number, each in list(self._partitions.items()):
            if each.machine.position < starts[number]:
                self._stop_partition(
                    number,
                    StoppedPartition(
                        f"{self._source.name}-{number} stopped at offset {each.committed:,}.\n"
                        f"  The log begins at {starts[number]:,}: retention removed "
                        f"{starts[number] - each.committed:,} events before they were processed.",
                        "Restore them, or give the processor another name and let it begin anew.",
                    ),
                )

    # -- snapshots

    def _begin_snapshot(self) -> None:
        """Start a snapshot where replay would take too long, within their share of the time."""
        task = self._snapshot_task
        if (task is not None and not task.done()) or time.monotonic() < self._snapshot_next:
            return
        for number, each in self._partitions.items():
            if each.compute_s * 1_000 > LIMITS.replay_ms_target and self._processor.states:
                self._snapshot_of = number
                self._snapshot_task = asyncio.create_task(self._snapshot(number))
                return

    async def _snapshot(self, number: int) -> None:
        partition = self._partitions[number]
        began = time.monotonic()
        machine = partition.machine
        computed, partition.compute_s = partition.compute_s, 0.0
        frozen = await self._compute(
            lambda: freeze(machine.state, number, machine.position, self._code_version)
        )
        try:
            snapshot_id = await self._snapshots.write(
                frozen, self._sink.epochs[number], self._processor.states
            )
            spent = time.monotonic() - began
            while partition.committed < frozen.state_offset:
                await self._moved.wait()
            if await self._snapshots.validate(snapshot_id):
                partition.snapshot_at = frozen.state_offset
                self.progress.snapshots += 1
        except TransientError as error:
            log.warning("snapshot given up", partition=number, error=str(error))
            partition.compute_s += computed
            await self._snapshots.close()
            self._snapshots = await self._retried(
                lambda: Snapshots.connect(self._database, self._processor.name, self._source)
            )
            spent = time.monotonic() - began
        self._snapshot_next = time.monotonic() + spent / LIMITS.snapshot_share_max

    async def _last_snapshots(self) -> None:
        """At a clean stop: a snapshot at next_offset, so that the next start replays nothing."""
        await self._cancel_snapshot()
        for number, each in self._partitions.items():
            if self._processor.states and each.snapshot_at < each.committed:
                assert each.machine.position == each.committed
                await self._snapshot(number)

    async def _cancel_snapshot(self) -> None:
        await _cancelled(self._snapshot_task)
        self._snapshot_task = None

    # -- helpers

    async def _offsets(self, at: int) -> dict[int, int]:
        wanted = dict.fromkeys(self._mine, at)
        return dict(await self._log.list_offsets(self._source.name, wanted))

    async def _retried(self, act: Callable[[], Awaitable[T]]) -> T:
        for pause in _pauses():
            try:
                return await act()
            except TransientError as error:
                if self._stopping.is_set():
                    raise
                log.warning("database not there", processor=self._processor.name, error=str(error))
                await asyncio.sleep(pause)
        raise AssertionError("pauses never end")


def _pauses() -> Iterable[float]:
    """Seconds to wait before each retry: growing, bounded, jittered."""
    pause = LIMITS.postgres_retry_first_ms / 1_000
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, LIMITS.postgres_retry_ms_max / 1_000)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    by_partition: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_partition.setdefault(piece.partition, []).append(piece)
    return [join(some) for some in by_partition.values()]


def _is_full(waiting: Sequence[Piece]) -> bool:
    events = sum(piece.events for piece in waiting)
    return events >= LIMITS.step_rows_max or (
        sum(piece.bytes for piece in waiting) >= LIMITS.step_bytes_max
    )


async def _next(reader: Reader) -> Chunk | None:
    return await reader.next()


async def _cancelled(task: asyncio.Task[T] | None) -> None:
    """End a task and wait for it; what it raises is of no interest any more."""
    if task is None:
        return
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
