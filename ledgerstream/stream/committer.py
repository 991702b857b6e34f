"""Commits that are seen through: retried with the same bytes, and settled when in doubt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from ledgerstream.stream.faults import Reload, TransientError, overtaken
from ledgerstream.stream.machine import Piece
from ledgerstream.stream.outbox import Outbox
from ledgerstream.stream.outputs import joined_sends
from ledgerstream.stream.partitions import Partitions
from ledgerstream.stream.retries import pauses, retried
from ledgerstream.stream.sink import NO_OFFSETS, Claim, Sink, Source
from ledgerstream.stream.slots import keep_slot
from ledgerstream.stream.witness import (
    Abort,
    Effect,
    End,
    Offsets,
    Send,
    Store,
    TxnIdentity,
    carried,
    performed,
    step,
)

log = structlog.get_logger()
IDLE_S = 3_600.0  # of a processor that does not emit: nothing is ever due


class Committer:
    """The sink of a session; another one takes its place when its connection breaks."""

    def __init__(
        self,
        sink: Sink,
        connect: Callable[[], Awaitable[Sink]],
        source: Source,
        partitions: Partitions,
        stopping: asyncio.Event,
    ) -> None:
        self.sink = sink
        self.outbox: Outbox | None = None  # of a processor that emits, once it is recovered
        self._connect = connect
        self.source = source
        self._partitions = partitions
        self._stopping = stopping
        self.owners = {sink.owner}  # of all connections on which we claimed, or may have

    async def commit(self, pieces: Sequence[Piece]) -> None:
        """Commit one piece a partition, and what it emits, however often it takes.

        Raises Overtaken, DataError and Reload, and TransientError only when told to stop.
        """
        outbox = self.outbox
        if outbox is None:
            await self._store(pieces)
            return
        sends = joined_sends([piece.sends for piece in pieces])
        ranges = {piece.partition: (piece.start, piece.stop) for piece in pieces}
        taken = carried(ranges, bool(sends) or outbox.carry_all, outbox.witness)
        assert taken or not sends

        async def perform(effect: Effect) -> TxnIdentity | None:
            match effect:
                case Send():
                    return await outbox.send(sends, effect.witness)
                case Store():
                    await self._store(pieces, effect.identity, effect.witness)
                case End():
                    await outbox.commit(effect.witness)
                case Abort():
                    await outbox.abort()
                case _:
                    raise AssertionError(effect)
            return None

        await performed(step(ranges, taken, outbox.witness), perform)
        for piece in pieces:
            partition = self._partitions.active.get(piece.partition)
            if partition is not None:
                partition.witness = outbox.witness[piece.partition]

    def ask_for_witness(self) -> None:
        """The next step takes the witness along, whether it emits or not."""
        if self.outbox is not None:
            self.outbox.carry_all = True

    async def wait_witness_due(self) -> None:
        """Until it has to be written anew, or the log would forget it; for ever without one."""
        while self.outbox is None or (left_s := self.outbox.carry_s) > 0:
            await asyncio.sleep(IDLE_S if self.outbox is None else left_s)
        self.outbox.put_off()  # whatever becomes of it: there may be nothing to write just now

    async def carry_witness(self, *, anew: bool = False) -> None:
        """Where nothing is under way: bring the witness up to what is committed. `anew`: write it
        also where it is there already."""
        outbox = self.outbox
        if outbox is None:
            return
        outbox.carry_all = True
        behind = [
            each.machine.still()
            for number, each in self._partitions.active.items()
            if anew or outbox.witness[number] < each.committed
        ]
        if behind:
            await self.commit(behind)

    async def _store(
        self,
        pieces: Sequence[Piece],
        identity: TxnIdentity | None = None,
        witness: Offsets = NO_OFFSETS,
    ) -> None:
        for pause in pauses():
            try:
                await self.sink.commit(pieces, identity, witness)
                return
            except TransientError as error:
                if self._stopping.is_set():
                    raise
                log.warning("commit retried", error=str(error))
                await asyncio.sleep(pause)
                if error.lost and await self._claim_again(pieces):
                    return

    async def _claim_again(self, pieces: Sequence[Piece]) -> bool:
        """Settle a commit in doubt: a new connection, a new claim, and its word on the step.

        True if the step was committed. Raises Reload where Postgres is not what it was, or others
        have claimed some partitions since; Overtaken if they have claimed all.
        """
        before = self.sink
        active = self._partitions.active
        held = list(active)

        async def claim() -> dict[int, Claim]:
            self.sink = await self._connect()
            if self.sink.server != before.server:
                raise Reload("this is another database server, or another life of it.")
            self.owners.add(self.sink.owner)
            try:
                if self.outbox is not None:
                    sink, slot = self.sink, self.outbox.slot
                    await keep_slot(sink.connection, sink.processor, slot, sink.owner)
                return await self.sink.claim(self.source, held, {}, self.owners)
            except BaseException:
                self.sink.abandon()
                raise

        claims = await retried(claim, self._stopping)
        lost = set(held) - claims.keys()
        if lost:
            self._partitions.leave(lost)
            if not active:
                raise overtaken(self.sink.processor, self.source.name, set(lost))
            raise Reload(f"another worker has claimed partitions {sorted(lost)}.")
        starts = {number: each.committed for number, each in active.items()}
        stops = starts | {piece.partition: piece.stop for piece in pieces}
        found = {number: claim.next_offset for number, claim in claims.items()}
        if found == starts:
            return False
        if found == stops:
            return True
        raise Reload(f"offsets are {found}, neither {starts} nor {stops}.")
