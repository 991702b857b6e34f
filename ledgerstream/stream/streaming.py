"""The stream itself: fetch, compute and commit, overlapped.

While one step commits, the next chunk is computed and the one after it fetched; what is computed
meanwhile is joined into the next step. Commits stay in order on one connection. A step that fails
undoes what was computed after it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from ledgerstream.errors import DeliveryTimeout, KafkaError, Overtaken, StoppedPartition
from ledgerstream.limits import LIMITS
from ledgerstream.stream.committer import Committer
from ledgerstream.stream.faults import DataError, Reload, TransientError, overtaken
from ledgerstream.stream.lookout import Lookout
from ledgerstream.stream.machine import Input, Piece, join
from ledgerstream.stream.partitions import Partitions
from ledgerstream.stream.snapshotter import Snapshotter
from ledgerstream.stream.source import (
    EARLIEST,
    INCONSISTENT_TOPIC_ID,
    LATEST,
    OFFSET_OUT_OF_RANGE,
    Chunk,
    Decoder,
    Log,
    Reader,
    lost_by_log,
)
from ledgerstream.stream.threads import Compute, Endless

log = structlog.get_logger()
T = TypeVar("T")


class Stream:
    """Moves partitions forward until `stopping`, or until each has reached its end in `ends`.

    on_commit: told of each committed step and how many seconds its commit took.
    offsets:   asks the log where each partition begins (EARLIEST) or ends (LATEST) now.
    """

    def __init__(
        self,
        log: Log,
        decoder: Decoder,
        partitions: Partitions,
        compute: Compute,
        committer: Committer,
        snapshotter: Snapshotter,
        lookout: Lookout,
        stopping: asyncio.Event,
        ends: Mapping[int, int] | None,
        on_commit: Callable[[Sequence[Piece], float], None],
        offsets: Callable[[int], Awaitable[Mapping[int, int]]],
    ) -> None:
        self._log = log
        self._decoder = decoder
        self._partitions = partitions
        self._compute = compute
        self._committer = committer
        self._snapshotter = snapshotter
        self._lookout = lookout
        self._taken: set[int] = set()  # partitions that others were seen to own
        self._stopping = stopping
        self._ends = ends
        self._on_commit = on_commit
        self._offsets = offsets
        self._reader: Reader | None = None
        self._reading: set[int] = set()
        self._fetch: asyncio.Task[Chunk | None] | None = None
        self._commit: asyncio.Task[float] | None = None
        self._waiting: list[Piece] = []  # computed, in order
        self._sent: list[Piece] = []  # being committed, one a partition

    async def run(self) -> None:
        """Returns with everything computed also committed. Raises Overtaken and Reload."""
        stopping = asyncio.create_task(self._stopping.wait())
        looking = asyncio.create_task(self._lookout.wait_taken())
        ageing = asyncio.create_task(self._committer.wait_witness_due())
        try:
            while True:
                if self._taken and not self._partitions.active and self._commit is None:
                    raise self._overtaken()
                await self._assign()
                if draining := stopping.done() or self._at_end():
                    await cancelled(self._fetch)
                    self._fetch = None
                else:
                    self._fetch_ahead()
                if self._commit is None and self._waiting:
                    self._sent = joined(self._next_step())
                    self._commit = asyncio.create_task(self._timed_commit(self._sent))
                if ageing.done():
                    ageing = asyncio.create_task(self._committer.wait_witness_due())
                    self._committer.ask_for_witness()
                    if self._commit is None:  # and nothing waits to be committed
                        self._commit = asyncio.create_task(self._timed_carry())
                busy = {each for each in (self._fetch, self._commit) if each is not None}
                if not busy:
                    return
                waits = {*busy, looking, ageing} | (set() if draining else {stopping})
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if looking.done():
                    self._leave(looking.result())
                    looking = asyncio.create_task(self._lookout.wait_taken())
                if self._commit is not None and self._commit.done():
                    done, self._commit = self._commit, None
                    await self._settle(done)
                if self._fetch is not None and self._fetch.done():
                    fetched, self._fetch = self._fetch, None
                    chunk = await self._chunk_of(fetched)
                    if chunk is not None and chunk.partition in self._partitions.active:
                        self._fetch_ahead()
                        await self._process(chunk)
        finally:
            stopping.cancel()
            await cancelled(looking)
            await cancelled(ageing)
            self._lookout.close()
            await cancelled(self._fetch)
            await cancelled(self._commit)
            if self._reader is not None:
                await self._reader.close()

    def _leave(self, taken: set[int]) -> None:
        """Others own these: what we computed of them is worth nothing. A step of them that is
        under way is for its compare-and-set to judge."""
        self._taken |= taken
        self._partitions.leave(taken)
        self._waiting = self._partitions.of(self._waiting)
        log.warning("overtaken", error=str(self._overtaken()))

    def _overtaken(self) -> Overtaken:
        return overtaken(self._committer.sink.processor, self._partitions.topic, self._taken)

    # -- fetch

    async def _assign(self) -> None:
        """Read the partitions that are active, and no others."""
        active = self._partitions.active
        if self._reading == active.keys():
            return
        await cancelled(self._fetch)
        self._fetch = None
        if self._reader is not None:
            await self._reader.close()
        self._reading = set(active)
        positions = {number: each.machine.position for number, each in active.items()}
        source = self._committer.source
        self._reader = (
            self._log.reader(source.name, positions, topic_id=source.known_id)
            if positions
            else None
        )

    def _at_end(self) -> bool:
        return self._ends is not None and all(
            each.machine.position >= self._ends[number]
            for number, each in self._partitions.active.items()
        )

    def _fetch_ahead(self) -> None:
        """Ask for the next chunk, unless enough is waiting to be committed."""
        events = sum(piece.events for piece in self._waiting)
        size = sum(piece.bytes for piece in self._waiting)
        full = events >= LIMITS.step_rows_max or size >= LIMITS.step_bytes_max
        if self._fetch is None and self._reader is not None and not full:
            self._fetch = asyncio.create_task(_next(self._reader))

    async def _chunk_of(self, fetch: asyncio.Task[Chunk | None]) -> Chunk | None:
        try:
            return fetch.result()
        except (KafkaError, DeliveryTimeout) as error:
            if isinstance(error, KafkaError) and error.code == OFFSET_OUT_OF_RANGE:
                await self._stop_lost()
                return None
            if isinstance(error, KafkaError) and error.code == INCONSISTENT_TOPIC_ID:
                self._stop_recreated()
                return None
            if isinstance(error, KafkaError) and not error.retriable:
                raise
            log.warning("log not there", error=str(error))
            await asyncio.sleep(LIMITS.retry_ms_max / 1_000)
            return None

    async def _stop_lost(self) -> None:
        """Stop the partitions whose next events the log does not have, or not any more."""
        starts, ends = await self._offsets(EARLIEST), await self._offsets(LATEST)
        for number, each in list(self._partitions.active.items()):
            position = each.machine.position
            error = lost_by_log(
                self._partitions.topic, number, position, starts[number], ends[number]
            )
            if error is not None:
                self._partitions.stop(number, error)

    def _stop_recreated(self) -> None:
        """The topic is another one now: none of its events belong to what was counted."""
        source = self._committer.source
        for number, each in list(self._partitions.active.items()):
            name = each.machine.processor.name
            self._partitions.stop(number, source.recreated(number, each.committed, name))

    def _next_step(self) -> list[Piece]:
        """Of what waits, in order, as much as one step may hold, and at least one piece."""
        events = size = taken = 0
        for piece in self._waiting:
            events, size = events + piece.events, size + piece.bytes
            if taken and (events > LIMITS.step_rows_max or size > LIMITS.step_bytes_max):
                break
            taken += 1
        step, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return step

    # -- compute

    async def _process(self, chunk: Chunk) -> None:
        partition = self._partitions.active[chunk.partition]
        partition.log_end = chunk.end_offset
        made: list[Piece] = []

        def compute() -> None:
            began = since = time.perf_counter()
            try:
                for given in self._decoder.decode(chunk):
                    piece = partition.machine.step(given)
                    now = time.perf_counter()
                    made.append(replace(piece, compute_s=now - since))
                    since = now
            finally:
                partition.compute_s += time.perf_counter() - began

        await self._guard(chunk, self._compute.limited(compute))
        if not self._compute.endless:  # else the thread may still be adding to it
            self._waiting += made

    async def _guard(self, given: Chunk | Input, work: Awaitable[Any]) -> None:
        """Do something with events of a partition. What fails stops it; what does not end stops
        them all, since the one compute thread cannot be had back."""
        topic, number = self._partitions.topic, given.partition
        name = self._partitions.active[number].machine.processor.name
        stop = given.stop if isinstance(given, Input) else given.next_offset
        try:
            await self._partitions.guard(number, work, name, given.start, stop)
        except Endless as error:
            self._waiting = []
            for each, partition in list(self._partitions.active.items()):
                stopped = StoppedPartition(
                    f"{topic}-{each} stopped at offset {partition.committed:,}.\n  {name}.process "
                    f"does not come to an end over the events [{given.start:,}, {stop:,}) of "
                    f"{topic}-{number}. {error.args[0]} Nothing of them is committed; its thread "
                    "cannot be stopped but with the process.",
                    f"Correct {name} and start it again: it goes on from there.",
                )
                self._partitions.stop(each, stopped)

    # -- commit

    async def _timed_commit(self, pieces: Sequence[Piece]) -> float:
        began = time.perf_counter()
        await self._committer.commit(pieces)
        return time.perf_counter() - began

    async def _timed_carry(self) -> float:
        began = time.perf_counter()
        await self._committer.carry_witness(anew=True)
        return time.perf_counter() - began

    async def _settle(self, commit: asyncio.Task[float]) -> None:
        """Take note of how a commit ended."""
        sent, self._sent = self._sent, []
        error = commit.exception()
        if error is None:
            self._note(sent, commit.result())
        elif isinstance(error, Overtaken):
            self._partitions.leave(error.partitions)
            if not self._partitions.active:
                raise error
            log.warning("overtaken", error=str(error))
            self._waiting = self._partitions.of([*sent, *self._waiting])
        elif isinstance(error, (Reload, TransientError)) or not isinstance(error, Exception):
            raise error
        else:
            await self._commit_apart(sent)

    async def _commit_apart(self, sent: Sequence[Piece]) -> None:
        """A step failed for its rows, or for a reason that we do not know: undo what is computed,
        commit each input of the step alone, and compute again what came after it."""
        await self._snapshotter.cancel()
        late = [given for piece in self._waiting for given in piece.inputs]
        self._waiting = []
        for partition in self._partitions.active.values():
            await self._compute(partition.undo)
        for given in [given for piece in sent for given in piece.inputs]:
            if given.partition in self._partitions.active:
                await self._guard(given, self._bisect(given))
        for given in late:
            if given.partition in self._partitions.active:
                await self._guard(given, self._step(given))

    async def _step(self, given: Input) -> None:
        machine = self._partitions.active[given.partition].machine
        self._waiting.append(await self._compute.limited(machine.step, given))

    async def _bisect(self, given: Input) -> None:
        """Commit one input, or its halves, down to the one event at fault: a dead letter."""
        machine = self._partitions.active[given.partition].machine
        piece = await self._compute.limited(machine.step, given)
        try:
            self._note([piece], await self._timed_commit([piece]))
        except DataError as error:
            for _ in piece.inputs:
                await self._compute(machine.rollback)
            if len(given.batch) == 0:
                raise
            if len(given.batch) == 1:
                await self._bisect(given.without(given.batch.offset, str(error.args[0])))
                return
            for half in given.split():
                await self._bisect(half)

    def _note(self, pieces: Sequence[Piece], seconds: float) -> None:
        """Pieces are committed; the partitions of some may have stopped since."""
        for piece in pieces:
            partition = self._partitions.active.get(piece.partition)
            if partition is not None:
                partition.settle(piece)
        self._snapshotter.note_commit()
        self._on_commit(pieces, seconds)


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece a partition."""
    by_partition: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_partition.setdefault(piece.partition, []).append(piece)
    return [join(some) for some in by_partition.values()]


async def _next(reader: Reader) -> Chunk | None:
    return await reader.next()


async def cancelled(task: asyncio.Task[T] | None) -> None:
    """End a task and wait for it; what it raises is of no interest any more."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
