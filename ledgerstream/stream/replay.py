"""The log again, for those who only look: what a processor was given, and its state at an offset.

Nothing is claimed, written or committed here; `restore` is what a worker does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg
import numpy as np

from ledgerstream.errors import ConfigError, LedgerStreamError
from ledgerstream.stream.machine import Input, Machine
from ledgerstream.stream.migration import migrated
from ledgerstream.stream.processor import Processor
from ledgerstream.stream.snapshot import specs_of, unlike, unpaged
from ledgerstream.stream.snapshots import stored_pages
from ledgerstream.stream.source import EARLIEST, LATEST, Decoder, Log, lost_by_log
from ledgerstream.stream.state import Dump


@dataclass(frozen=True)
class Committed:
    """One partition of a processor as Postgres knows it: its row of ls_progress, and how its
    topic is called in result rows."""

    processor: str
    topic: str
    partition: int
    topic_id: object
    topic_number: int
    first_offset: int
    next_offset: int
    digest: bytes | None
    code_version: str | None


_COMMITTED = """
SELECT processor, topic, partition, p.topic_id, t.id AS topic_number, first_offset, next_offset,
       digest, code_version
  FROM ls_progress p JOIN ls_topics t USING (topic_id)
 WHERE processor = $1 AND topic = $2 ORDER BY partition"""


class Past:
    """A processor's past: its committed partitions and the log that they came from.

    Use `Past.open`. `connection` may be in a transaction that only reads.

    notes: by partition, in what way a state that `machine` gave is not the one that stood there.
    """

    def __init__(
        self,
        processor: type[Processor],
        log: Log,
        connection: asyncpg.Connection,
        decoder: Decoder,
        partitions: dict[int, Committed],
        starts: dict[int, int],
    ) -> None:
        self.processor = processor
        self.log = log
        self.connection = connection
        self.partitions = partitions
        self.starts = starts  # where the log begins
        self.topic_partitions = decoder.partitions
        self.notes: dict[int, str] = {}
        self._decoder = decoder

    @classmethod
    async def open(
        cls, processor: type[Processor], log: Log, connection: asyncpg.Connection
    ) -> Past:
        """Raises ConfigError for a processor that has committed nothing into this database, and
        LedgerStreamError where the log is not the one that it read."""
        topic = processor.source.name
        rows = []
        if await connection.fetchval("SELECT to_regclass('ls_progress')") is not None:
            rows = await connection.fetch(_COMMITTED, processor.name, topic)
        if not rows:
            raise ConfigError(
                f"{processor.name} has committed nothing of {topic!r} into this database.",
                "Run it first, or check --database.",
            )
        partitions = {row["partition"]: Committed(**dict(row)) for row in rows}
        info = await log.topic(topic)
        every = list(partitions)
        starts = dict(await log.list_offsets(topic, dict.fromkeys(every, EARLIEST)))
        ends = await log.list_offsets(topic, dict.fromkeys(every, LATEST))
        for number, each in partitions.items():
            if info.topic_id is not None and info.topic_id != each.topic_id:
                raise LedgerStreamError(
                    f"Topic {topic!r} of this log is not the one that {processor.name} has read: "
                    "it was deleted and created again, or this is another log.",
                    "Check --log.",
                )
            if lost := lost_by_log(topic, number, each.next_offset, 0, ends[number]):
                raise lost
        decoder = Decoder(processor.source, info.partitions)
        return cls(processor, log, connection, decoder, partitions, starts)

    async def machine(self, partition: int, below: int | None = None) -> Machine:
        """The state to replay from: the newest snapshot at an offset ≤ `below` (without it, none
        is taken where the log begins early enough), or nothing.

        Raises LedgerStreamError where the log no longer has what came after it.
        """
        at = self.partitions[partition]
        machine = Machine(self.processor(), partition, at.topic_number)
        machine.position = at.first_offset
        early = self.starts[partition] <= at.first_offset
        snapshot = None
        if self.processor.states and (below is not None or not early):
            limit = at.next_offset if below is None else below
            snapshot = await self._snapshot(at, limit)
        if snapshot is not None:
            machine.position, content = snapshot
            machine.state.load(content)
        elif not self.processor.states:
            machine.position = max(at.first_offset, self.starts[partition])
        if machine.position < self.starts[partition]:
            raise LedgerStreamError(
                f"{at.topic}-{partition} begins at {self.starts[partition]:,} now: retention "
                f"removed events from {machine.position:,} on, which would have to be replayed.",
                "Keep the topic's events longer than a snapshot is old.",
            )
        migrated_at = await self.migrated_at(partition)
        if migrated_at is not None and machine.position < migrated_at:
            self.notes[partition] = (
                f"the state of {at.topic}-{partition} is computed as if it had always been "
                f"declared as it is now; it was migrated at offset {migrated_at:,}, and new "
                "columns began as zero there"
            )
        return machine

    async def _snapshot(self, at: Committed, below: int) -> tuple[int, dict[str, Dump]] | None:
        """Offset and content, migrated where it must be, of the newest snapshot that can be that of
        the state as it is declared now."""
        rows = await self.connection.fetch(
            """SELECT * FROM ls_snapshots
                WHERE processor = $1 AND topic = $2 AND partition = $3 AND topic_id = $4 AND valid
                  AND state_offset <= $5 ORDER BY state_offset DESC""",
            at.processor, at.topic, at.partition, at.topic_id, below,
        )  # fmt: skip
        wanted = self.processor.states
        for row in rows:
            layout = row["layout"]
            if not unlike(at.processor, wanted, layout):
                pages = await stored_pages(self.connection, row)
                content = unpaged(layout, b"".join(pages))
                return row["state_offset"], migrated(specs_of(wanted, layout), wanted, content)
        return None

    async def migrated_at(self, partition: int) -> int | None:
        """The offset of the newest migration of the state, or None."""
        at = self.partitions[partition]
        found: int | None = await self.connection.fetchval(
            """SELECT max(next_offset) FROM ls_code_changes WHERE processor = $1 AND topic = $2
                  AND partition = $3 AND first_offset = next_offset""",
            at.processor, at.topic, partition,
        )  # fmt: skip
        return found

    async def inputs(self, partition: int, start: int, stop: int) -> AsyncIterator[Input]:
        """What stands in [start, stop), in steps, without the dead letters of this processor.

        Undecodable records that are no dead letters stay in `undecodable`.
        """
        dead = await self.dead(partition, start, stop)
        reader = self.log.reader(self.processor.source.name, {partition: start})
        try:
            while start < stop:
                chunk = await reader.next()
                if chunk is None:
                    continue
                for given in self._decoder.decode(chunk, stop):
                    alive = ~np.isin(given.batch.offset, dead)
                    odd = [each for each in given.undecodable if each.offset not in dead]
                    batch = given.batch.take(alive)
                    yield Input(partition, given.start, given.stop, batch, odd)
                    start = given.stop
        finally:
            await reader.close()

    async def dead(self, partition: int, start: int, stop: int) -> np.ndarray:
        """int64: the offsets in [start, stop) that are dead letters of this processor."""
        rows = await self.connection.fetch(
            """SELECT "offset" FROM ls_dead_letters WHERE topic_id = $1 AND partition = $2
               AND processor = $3 AND "offset" >= $4 AND "offset" < $5 ORDER BY 1""",
            self.partitions[partition].topic_id, partition, self.processor.name, start, stop,
        )  # fmt: skip
        return np.array([row["offset"] for row in rows], np.int64)

    async def replay(self, machine: Machine, stop: int) -> None:
        """Move a machine on to `stop`, outputs off."""
        async for given in self.inputs(machine.partition, machine.position, stop):
            for _ in machine.step(given, outputs=False).inputs:
                machine.forget()
