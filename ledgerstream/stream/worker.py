"""The worker: claims partitions, brings their state back, and streams until told to stop."""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import structlog

from ledgerstream.errors import DeliveryTimeout, KafkaError, StoppedPartition
from ledgerstream.stream.committer import Committer
from ledgerstream.stream.faults import Reload, TransientError
from ledgerstream.stream.lookout import Lookout
from ledgerstream.stream.machine import Piece
from ledgerstream.stream.outbox import Outbox
from ledgerstream.stream.outputs import Sends, joined_sends
from ledgerstream.stream.partitions import Partition, Partitions
from ledgerstream.stream.processor import Processor, Topic
from ledgerstream.stream.restore import Restorer
from ledgerstream.stream.retries import awaited, pauses, retried
from ledgerstream.stream.sink import Claim, Sink, Source
from ledgerstream.stream.slots import slots_of
from ledgerstream.stream.snapshots import Snapshots
from ledgerstream.stream.snapshotter import Snapshotter
from ledgerstream.stream.source import EARLIEST, LATEST, Decoder, Log, lost_by_log
from ledgerstream.stream.streaming import Stream, cancelled
from ledgerstream.stream.threads import Compute
from ledgerstream.stream.version import code_version
from ledgerstream.stream.warm import run_sample, warm
from ledgerstream.stream.watch import Watch
from ledgerstream.stream.witness import (
    Abort,
    Effect,
    End,
    EndStored,
    Fence,
    Lost,
    ReadWitness,
    Send,
    Store,
    TakeIdentity,
    performed,
    recovery,
)

if TYPE_CHECKING:
    from ledgerstream.client import Client

log = structlog.get_logger()


@dataclass
class Progress:
    """What a worker has done so far; given to `on_progress` after each commit.

    rows:       by result table.
    position:   the next offset of each partition, committed; of several topics by name and
                partition, as in "payments-0".
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
    position: dict[int | str, int] = field(default_factory=dict)
    lag: dict[int | str, int] = field(default_factory=dict)


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
        self._ends: dict[int, int] | None = None
        self._partitions = Partitions(processor.source.name, ())
        self._watch = Watch(database, processor)

    @property
    def topic(self) -> str:
        return self._processor.source.name

    def stop(self) -> None:
        """Stop at the end of the step under way, with a snapshot."""
        self._stopping.set()

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT call `stop`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    @property
    def stopped(self) -> dict[int, Exception]:
        """The partitions that stopped, and why."""
        return self._partitions.stopped

    async def run(self) -> Progress:
        """Work until the end, or until `stop`.

        Raises ConfigError or TransientError (no database) before anything starts, Overtaken when
        all partitions are with another worker, and StoppedPartition for the first that stopped,
        once the others are done.
        """
        topic = self._processor.source.name
        info = await self._log.topic(topic)
        self._processor.check_partitions(info.partitions)
        self._source = Source(topic, info.topic_id or uuid.UUID(int=0))
        self._decoder = Decoder(self._processor.source, info.partitions)
        numbers = range(info.partitions) if self._only is None else self._only
        self._partitions = Partitions(topic, numbers, self._watch.stopped)
        self._compute = Compute()
        watching = asyncio.create_task(self._watch.run())
        try:
            await self._compute(warm, self._processor, self._say)
            if self._until == "end":
                self._ends = await self._offsets(LATEST)
            (await awaited(self._connect, self._stopping, self._say)).abandon()
            for pause in pauses():
                if not await self._session() or self._stopping.is_set():
                    break
                await asyncio.sleep(pause)
        except StoppedPartition as error:
            for number in self._partitions.startable:
                self._watch.stopped(number, error)
            raise
        finally:
            self._compute.close()
            await cancelled(watching)
            await self._watch.flush()
            await self._watch.close()
        if self.stopped:
            raise next(iter(self.stopped.values()))
        return self.progress

    async def _session(self) -> bool:
        """One life of what is in memory; True if it all must be loaded again."""
        committer = Committer(
            await retried(self._connect, self._stopping),
            self._connect, self._source, self._partitions, self._stopping,
        )  # fmt: skip
        snapshotter = Snapshotter(
            await retried(self._connect_snapshots, self._stopping),
            self._connect_snapshots, self._processor.states, self._code_version,
            self._partitions, committer, self._compute, self._stopping,
        )  # fmt: skip
        taken = self.progress.snapshots
        try:
            if not await self._restore_unless_stopped(committer, snapshotter.snapshots):
                return False
            if self._until != "restored":
                await self._stream(committer, snapshotter).run()
            await committer.carry_witness()
            await snapshotter.take_last()
            await committer.sink.merge_audit()
        except (Reload, TransientError) as reason:
            log.warning("loading state again", processor=self._processor.name, why=str(reason))
            return True
        except (KafkaError, DeliveryTimeout) as error:
            if isinstance(error, KafkaError) and not error.retriable:
                raise
            log.warning("log not there", processor=self._processor.name, why=str(error))
            return True
        finally:
            self._partitions.active.clear()
            await snapshotter.close()
            if committer.outbox is not None:
                await committer.outbox.close()
            await committer.sink.close()
            self.progress.snapshots = taken + snapshotter.taken
        return False

    async def _restore_unless_stopped(self, committer: Committer, snapshots: Snapshots) -> bool:
        """A replay may take long: `stop` ends it, and nothing is lost."""
        restore = asyncio.create_task(self._restore(committer, snapshots))
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({restore, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not restore.done():
                return False
            restore.result()
            return True
        finally:
            stop.cancel()
            await cancelled(restore)

    async def _restore(self, committer: Committer, snapshots: Snapshots) -> None:
        sink = committer.sink
        claims = await sink.claim(
            self._source, self._partitions.startable, await self._offsets(EARLIEST)
        )
        self._watch.claimed(sink.epochs)
        self._watch.owned(sink.epochs, sink.connection.get_server_pid())
        tables = await self._compute(run_sample, self._processor)
        await sink.create_tables(tables)
        self._watch.tables(tables)
        restorer = Restorer(
            self._processor(), self._code_version, self._accept_new_code, self._source,
            await sink.topic_number(self._source), sink, snapshots, self._log, self._decoder,
            self._compute,
        )  # fmt: skip
        ends = await self._offsets(LATEST)
        for number, claim in sorted(claims.items()):
            if lost := lost_by_log(self._source.name, number, claim.next_offset, 0, ends[number]):
                self._partitions.stop(number, lost)
                del claims[number]
        if self._processor.outputs:
            await self._recover(committer, restorer, claims)
        for number, claim in sorted(claims.items()):
            if number not in self._partitions.stopped:
                await self._restore_one(restorer, claim)
        if committer.outbox is not None:
            for number, partition in self._partitions.active.items():
                partition.witness = committer.outbox.witness[number]
                partition.machine.muted_below = partition.witness

    async def _restore_one(
        self, restorer: Restorer, claim: Claim, sent_below: int | None = None
    ) -> Mapping[Topic, Sends]:
        """Its state is there, or it has stopped. What it emits from `sent_below` on."""
        number = claim.partition
        if number in self._partitions.active:
            return {}
        began = time.perf_counter()
        try:
            machine, snapshot_at, sends = await restorer.restore(claim, sent_below)
        except StoppedPartition as error:
            self._partitions.stop(number, error)
            return {}
        replayed_s = time.perf_counter() - began if snapshot_at < claim.next_offset else 0.0
        self._partitions.active[number] = Partition(machine, snapshot_at, replayed_s)
        self.progress.position[number] = claim.next_offset
        return sends

    async def _recover(
        self, committer: Committer, restorer: Restorer, claims: Mapping[int, Claim]
    ) -> None:
        """Outputs and rows say the same afterwards: see `witness`."""
        sink, active = committer.sink, self._partitions.active
        client = cast("Client", self._log)  # which writes, too
        outbox = await Outbox.open(client, self._processor, self._source.name, sink)
        committer.outbox = outbox

        async def perform(effect: Effect) -> Any:
            match effect:
                case EndStored():
                    await outbox.end_stored(effect.identity)
                case ReadWitness():
                    return await outbox.read_witness(effect.partitions)
                case Fence():
                    await outbox.fence(await slots_of(sink.connection, sink.processor))
                case TakeIdentity():
                    await outbox.take_identity()
                case Lost():
                    for number in effect.partitions:
                        self._partitions.stop(number, _witness_gone(self._source, claims[number]))
                case Send():
                    sends = [
                        await self._restore_one(restorer, claims[number], start)
                        for number, (start, _) in sorted(effect.ranges.items())
                    ]
                    there = {n: at for n, at in effect.witness.items() if n in active}
                    return await outbox.send(joined_sends(sends), there)
                case Store():
                    still = [active[n].machine.still() for n in effect.ranges if n in active]
                    await sink.commit(still, effect.identity, effect.witness)
                case End():
                    await outbox.commit(effect.witness)
                case Abort():
                    await outbox.abort()
            return None

        stored = {number: claim.stored for number, claim in claims.items()}
        outbox.witness = await performed(recovery(stored), perform)

    def _stream(self, committer: Committer, snapshotter: Snapshotter) -> Stream:
        def note(pieces: Sequence[Piece], seconds: float) -> None:
            self.progress.snapshots = taken + snapshotter.taken
            sink = committer.sink
            self._watch.owned(
                {piece.partition: sink.epochs[piece.partition] for piece in pieces},
                sink.connection.get_server_pid(),
            )
            self._note(pieces, seconds)

        taken = self.progress.snapshots
        lookout = Lookout(
            self._database, self._processor.name, self._source.name,
            lambda: committer.owners, lambda: self._partitions.active,
        )  # fmt: skip
        return Stream(
            self._log, self._decoder, self._partitions, self._compute, committer, snapshotter,
            lookout, self._stopping, self._ends, note, self._offsets,
        )  # fmt: skip

    def _note(self, pieces: Sequence[Piece], seconds: float) -> None:
        progress = self.progress
        for piece in pieces:
            partition = self._partitions.active.get(piece.partition)
            log_end = piece.stop if partition is None else partition.log_end
            progress.events += piece.events
            progress.dead += len(piece.dead)
            progress.position[piece.partition] = piece.stop
            progress.lag[piece.partition] = max(log_end - piece.stop, 0)
            self._watch.moved(
                piece.partition, log_end, self._event_time(piece), piece.watermark,
                piece.compute_s * 1_000, seconds * 1_000,
            )  # fmt: skip
            for table, (_, rows) in piece.copies.items():
                name = table.relation().name
                progress.rows[name] = progress.rows.get(name, 0) + rows
        progress.commits += 1
        progress.commit_ms = seconds * 1_000
        self._on_progress(progress)

    def _event_time(self, piece: Piece) -> int | None:
        """The greatest of the last events; None without events, or without a time of theirs."""
        name, batch = self._processor.source.time_column, piece.inputs[-1].batch
        return int(batch.rows[name].max()) if name is not None and len(batch) else None

    async def _connect(self) -> Sink:
        return await Sink.connect(
            self._database, self._processor.name, self._processor.version, self._code_version
        )

    async def _connect_snapshots(self) -> Snapshots:
        return await Snapshots.connect(self._database, self._processor.name, self._source)

    async def _offsets(self, at: int) -> dict[int, int]:
        wanted = dict.fromkeys(self._partitions.assigned, at)
        return dict(await self._log.list_offsets(self._source.name, wanted))


def _witness_gone(source: Source, claim: Claim) -> StoppedPartition:
    return StoppedPartition(
        f"{source.name}-{claim.partition} stopped at offset {claim.next_offset:,}.\n"
        f"  The log no longer knows up to where its outputs are in it: that was offset "
        f"{claim.witness:,} or later, kept as the offset of a group that was deleted, or forgotten "
        "after a week without a worker.",
        "Look up the last record of the output topics that came from this partition (its header "
        "ls.from), and set the group's offset behind it; or give the processor another name.",
    )
