"""Bring a partition's state to where its offset stands: newest snapshot, then replay.

A snapshot of state that is declared otherwise now is migrated, if `migration` knows how. The replay
runs with outputs off, skips what is dead-lettered, and must end in the digest that was recorded
with the offset; otherwise the partition stops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ledgerstream.errors import KafkaError, StoppedPartition
from ledgerstream.stream import migration
from ledgerstream.stream.machine import Input, Machine
from ledgerstream.stream.outputs import Sends, joined_sends
from ledgerstream.stream.processor import Processor, Topic
from ledgerstream.stream.sink import Claim, Sink, Source
from ledgerstream.stream.snapshot import Snapshot
from ledgerstream.stream.snapshots import Snapshots
from ledgerstream.stream.source import (
    INCONSISTENT_TOPIC_ID,
    OFFSET_OUT_OF_RANGE,
    Chunk,
    Decoder,
    Log,
)
from ledgerstream.stream.state import State
from ledgerstream.stream.threads import Compute, Endless


@dataclass(frozen=True)
class Restorer:
    """What restoring any partition of one processor takes."""

    processor: Processor
    code_version: str
    accept_new_code: bool
    source: Source
    topic_number: int
    sink: Sink
    snapshots: Snapshots
    log: Log
    decoder: Decoder
    compute: Compute

    async def restore(
        self, claim: Claim, sent_below: int | None = None
    ) -> tuple[Machine, int, Mapping[Topic, Sends]]:
        """The machine at `claim.next_offset`, the offset of the snapshot that it came from, and the
        events that [sent_below, next_offset) emits, where that is given."""
        machine = Machine(self.processor, claim.partition, self.topic_number)
        specs = self.processor.states
        sent_below = claim.next_offset if sent_below is None else sent_below
        sends: list[Mapping[Topic, Sends]] = []
        snapshot = await self.snapshots.newest(claim, specs, min(sent_below, claim.next_offset))
        if not specs:
            machine.position = begun_at = min(sent_below, claim.next_offset)
            await self._check_code(claim, snapshot, begun_at)
            await self._replay(machine, claim, sent_below, sends)
            return machine, begun_at, joined_sends(sends)
        machine.position = claim.first_offset if snapshot is None else snapshot.state_offset
        begun_at = machine.position
        recorded = claim.digest
        migrated = snapshot is not None and migration.moves(snapshot.specs, specs)
        if snapshot is not None:
            await self.compute(self._load, machine, snapshot)
            if migrated and begun_at == claim.next_offset and recorded == snapshot.digest:
                recorded = machine.state.digest()  # that of the same state, as it is declared now
        changed = await self._check_code(claim, snapshot, begun_at)
        await self._replay(machine, claim, sent_below, sends)
        digest = machine.state.digest()
        if not changed and recorded is not None and digest != recorded:
            raise self._stopped(
                claim,
                f"Replaying [{begun_at:,}, {claim.next_offset:,}) gives the state digest "
                f"{digest.hex()}, and {recorded.hex()} was recorded: {self.processor.name} "
                "does not depend on state and events alone, or the log or the database changed.",
                "Look for clocks, chance and unordered sums in it; results up to here stand.",
            )
        if migrated and (changed or begun_at == claim.next_offset):
            await self.sink.record_migration(claim, begun_at)
        if changed:
            await self.sink.accept_code(claim, begun_at, digest)
        return machine, begun_at, joined_sends(sends)

    def _load(self, machine: Machine, snapshot: Snapshot) -> None:
        """What was written is checked as it was written, and then migrated, if it must be."""
        specs = self.processor.states
        moves = migration.moves(snapshot.specs, specs)
        stored = State(snapshot.specs) if moves else machine.state
        stored.load(snapshot.content)
        if stored.digest() != snapshot.digest:
            raise StoppedPartition(
                f"{self.source.name}-{snapshot.partition} stopped: its snapshot at offset "
                f"{snapshot.state_offset:,} does not hold what was written to it.",
                "Restore the database, or delete the row from ls_snapshots to replay the log.",
            )
        if moves:
            machine.state.load(migration.migrated(snapshot.specs, specs, snapshot.content))

    async def _check_code(self, claim: Claim, snapshot: Snapshot | None, begun_at: int) -> bool:
        """Whether a replay is due with code that did not compute the range, and is accepted.

        The range is what the last committed step's code computed: it began at the snapshot, or
        replayed what was before it by consent.
        """
        count = claim.next_offset - begun_at
        if count == 0 or claim.code_version in (None, self.code_version):
            return False
        if not self.accept_new_code:
            since = (
                f"its snapshot at offset {begun_at:,}" if snapshot is not None else "it first ran"
            )
            raise self._stopped(
                claim,
                f"{self.processor.name} changed since {since}, and {count:,} "
                f"{self.source.name} would be replayed with the new code.",
                "Either run the old version once with --finish, or accept the new code over that "
                "range with --accept-new-code (recorded).",
            )
        return True

    async def _replay(
        self, machine: Machine, claim: Claim, sent_below: int, sends: list[Mapping[Topic, Sends]]
    ) -> None:
        stop = claim.next_offset
        if machine.position >= stop:
            return
        dead = np.array(
            sorted(
                await self.sink.dead_offsets(self.source, claim.partition, machine.position, stop)
            ),
            np.int64,
        )
        starts = {claim.partition: machine.position}
        reader = self.log.reader(self.source.name, starts, topic_id=self.source.known_id)
        try:
            while machine.position < stop:
                chunk = await reader.next()
                if chunk is not None:
                    await self.compute.limited(
                        self._replay_chunk, machine, chunk, stop, dead, sent_below, sends
                    )
        except Endless as error:
            raise self._stopped(
                claim,
                f"{self.processor.name}.process does not come to an end over the events that "
                f"rebuild its state, from {machine.position:,} on. {error.args[0]}",
                f"Correct {self.processor.name} and start it again.",
            ) from error
        except KafkaError as error:
            if error.code == INCONSISTENT_TOPIC_ID:
                raise self.source.recreated(claim.partition, stop, self.processor.name) from error
            if error.code != OFFSET_OUT_OF_RANGE:
                raise
            raise self._stopped(
                claim,
                f"Offsets from {machine.position:,} on are needed to rebuild its state, and the "
                "log no longer has them: retention removed them.",
                "Keep the topic's events longer than a snapshot is old; to go on without them, "
                "give the processor another name and let it begin anew.",
            ) from error
        finally:
            await reader.close()

    def _replay_chunk(
        self,
        machine: Machine,
        chunk: Chunk,
        stop: int,
        dead: np.ndarray,
        sent_below: int,
        sends: list[Mapping[Topic, Sends]],
    ) -> None:
        machine.muted_below = sent_below
        for given in self.decoder.decode(chunk, stop):
            alive = ~np.isin(given.batch.offset, dead)
            piece = machine.step(
                Input(given.partition, given.start, given.stop, given.batch.take(alive)),
                outputs=given.stop > sent_below,
                tables=False,
            )
            sends.append(piece.sends)
            for _ in piece.inputs:
                machine.forget()

    def _stopped(self, claim: Claim, why: str, remedy: str) -> StoppedPartition:
        return StoppedPartition(
            f"{self.source.name}-{claim.partition} stopped at offset {claim.next_offset:,}.\n"
            f"  {why}",
            remedy,
        )
