"""Proof by doing it again: committed steps are recomputed from the log under random batch splits.

Each partition is gone through once, from its first offset to its committed one, by several machines
at the same time, each with batches, and restarts, of its own. What must come out again:

- the rows of append-only tables and the final rows of windows, bit by bit and range by range of
  offsets, so that memory stays bounded; other tables with a key by their content at the end;
- the events in output topics, each once and in order, as far as the log is known to have them;
- every state digest that ls_steps and ls_progress recorded, at its offset;
- the same digest from every machine, and, at the end, the digest of the whole content laid out
  anew, which shows a row that was changed without having been asked for.

Where the state was migrated, what came before was computed with another declaration, and the new
columns began as zero there: no recomputation from the first offset leads to what is stored. Such a
partition is verified from its newest snapshot on, and the result says so.

Postgres is read as of one moment, on connections that share a snapshot; nothing is written.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import asyncpg
import numpy as np

from ledgerstream.errors import LedgerStreamError, NotReproduced
from ledgerstream.limits import LIMITS
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.compare import first_difference, settled, stands
from ledgerstream.stream.connect import connect
from ledgerstream.stream.digest import total
from ledgerstream.stream.emitted import Emitted
from ledgerstream.stream.machine import Input, Machine, Piece
from ledgerstream.stream.outbox import group_of
from ledgerstream.stream.outputs import Sends, joined_sends
from ledgerstream.stream.pgread import Columns, RowStream, joined
from ledgerstream.stream.processor import Processor, Topic
from ledgerstream.stream.replay import Committed, Past
from ledgerstream.stream.source import Log
from ledgerstream.stream.state import State
from ledgerstream.stream.tables import Table
from ledgerstream.stream.trial import restarted, results
from ledgerstream.stream.version import code_version
from ledgerstream.stream.warm import run_sample
from ledgerstream.stream.windows import WindowTable

if TYPE_CHECKING:
    from ledgerstream.client import Client

RESTART_SHARE = 0.25  # of the cuts between batches, at which a machine's processor is made anew
BUFFERED_MAX = 16  # pieces of COPY's bytes that wait to be compared, of each table


@dataclass
class Verified:
    """What was found equal, in [first_offset, next_offset) of each partition.

    from_snapshot: the partitions that were verified from a snapshot on, because retention has
                   removed what came before, or the state was migrated.
    migrated_at:   the offset at which a partition's state was migrated, where it was.
    """

    processor: str
    topic: str
    splits: int
    seed: int
    events: int = 0
    rows: int = 0
    sent: int = 0  # events in output topics
    digests: int = 0
    dead: int = 0
    seconds: float = 0.0
    first_offset: dict[int, int] = field(default_factory=dict)
    next_offset: dict[int, int] = field(default_factory=dict)
    from_snapshot: list[int] = field(default_factory=list)
    migrated_at: dict[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """`verified 1,466,282 payments in 3.1 s under 2 random splits (seed 7): 12,309 rows …`"""
        late = [
            f" {self.topic}-{number} from offset {self.first_offset[number]:,} on"
            f"{self._why(number)}."
            for number in self.from_snapshot
        ]
        sent = f", {self.sent:,} event{'' if self.sent == 1 else 's'} in topics" * bool(self.sent)
        return (
            f"verified {self.events:,} {self.topic} in {self.seconds:.1f} s under {self.splits} "
            f"random split{'' if self.splits == 1 else 's'} (seed {self.seed}): {self.rows:,} "
            f"row{'' if self.rows == 1 else 's'}{sent} and every state digest equal.{''.join(late)}"
        )

    def _why(self, partition: int) -> str:
        if partition not in self.migrated_at:
            return ""
        return (
            f" (its state was migrated at {self.migrated_at[partition]:,}: what came before was "
            "computed with another declaration, and is not compared)"
        )


async def verify(
    processor: type[Processor],
    log: Log,
    database: str,
    *,
    splits: int = 2,
    seed: int = 0,
    advance: Callable[[int, float], None] = lambda more, share: None,
) -> Verified:
    """Recompute all that `processor` has committed into `database`, and compare.

    advance: called with how many events more are done, and the share of all.

    Raises NotReproduced with the first difference, ConfigError for a processor that has committed
    nothing, LedgerStreamError where the log lacks events.
    """
    began = time.monotonic()
    done = Verified(processor.name, processor.source.name, splits, seed)
    reading = await connect(database, "verify", patient=True)
    try:
        await reading.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        moment = await reading.fetchval("SELECT pg_export_snapshot()")
        past = await Past.open(processor, log, reading)
        tables = list(dict.fromkeys(await asyncio.to_thread(run_sample, processor)))
        whole = sum(each.next_offset - each.first_offset for each in past.partitions.values())
        offsets = 0

        def tell(given: Input) -> None:
            nonlocal offsets
            offsets += given.stop - given.start
            done.events += len(given.batch)
            advance(len(given.batch), offsets / max(whole, 1))

        for number in past.partitions:
            each = _Partition(past, number, done, database, moment)
            try:
                await each.run(tables, tell)
            finally:
                await each.close()
    finally:
        await reading.close()
    done.seconds = time.monotonic() - began
    return done


class _Partition:
    """One partition's recomputation: several sides over the same ranges, and what Postgres has."""

    def __init__(self, past: Past, number: int, done: Verified, database: str, moment: str) -> None:
        self._past = past
        self._at = past.partitions[number]
        self._done = done
        self._database = database
        self._moment = moment
        self._sides: list[_Side] = []
        self._found: dict[type[Table], _Found] = {}
        self._emitted: dict[Topic, Emitted] = {}

    async def run(self, tables: Iterable[type[Table]], tell: Callable[[Input], None]) -> None:
        at, done, past = self._at, self._done, self._past
        migrated_at = await past.migrated_at(at.partition)
        machine = await past.machine(at.partition, None if migrated_at is None else at.next_offset)
        if migrated_at is not None:
            done.migrated_at[at.partition] = migrated_at
            if machine.position < migrated_at:
                raise LedgerStreamError(
                    f"{at.topic}-{at.partition}: the state of {at.processor} was migrated at "
                    f"offset {migrated_at:,}, and no snapshot from there on is left.",
                    "Stop the processor cleanly, which takes one.",
                )
        start, stop = machine.position, at.next_offset
        done.first_offset[at.partition], done.next_offset[at.partition] = start, stop
        if start > at.first_offset:
            done.from_snapshot.append(at.partition)
        dead = await past.dead(at.partition, start, stop)
        steps = await self._steps(start)
        for side in range(done.splits):
            chance = np.random.default_rng([done.seed, at.partition, side])
            own = machine if side == 0 else restarted(machine)
            self._sides.append(_Side(own, chance, at, steps if side == 0 else {}))
        for table in tables:
            await self._open(table, start)
        await self._read_topics(start)
        async for given in _ranges(past, at.partition, start, stop):
            if given.undecodable:
                letter = given.undecodable[0]
                raise _differs(
                    at, letter.offset, f"is no event, and no dead letter: {letter.error}"
                )
            sides = [asyncio.to_thread(side.run, given) for side in self._sides]
            await self._compare(await asyncio.gather(*sides), start, given.stop)
            tell(given)
        await self._compare_ends()
        done.digests += len(steps)
        done.dead += len(dead)

    async def close(self) -> None:
        for found in self._found.values():
            await found.close()

    async def _steps(self, start: int) -> dict[int, _Step]:
        """What was recorded, by the offset at which the digest was that of the state."""
        at = self._at
        rows = await self._past.connection.fetch(
            """SELECT next_offset, digest, code_version, committed_at FROM ls_steps
                WHERE processor = $1 AND topic = $2 AND partition = $3 AND next_offset > $4""",
            at.processor, at.topic, at.partition, start,
        )  # fmt: skip
        steps = {row["next_offset"]: _Step(row["digest"], row["code_version"]) for row in rows}
        if at.digest is not None and at.next_offset > start:
            steps[at.next_offset] = _Step(at.digest, at.code_version)
        return steps

    async def _open(self, table: type[Table], start: int) -> None:
        if table not in self._found:
            first = start if start > self._at.first_offset else None
            self._found[table] = await _Found.open(
                self._database, self._moment, table, self._at, first
            )

    async def _read_topics(self, start: int) -> None:
        """What was emitted, up to where the log is known to have it: after a crash it may lag."""
        at, processor = self._at, self._past.processor
        if not processor.outputs:
            return
        client = cast("Client", self._past.log)
        place = at.topic, at.partition
        found = await client.committed(
            group_of(at.processor), [place], limit_ms=LIMITS.witness_wait_ms
        )
        stop = min(found.get(place, start), at.next_offset)
        for topic in processor.outputs:
            self._emitted[topic] = await Emitted.read(client, topic, at, start, stop)

    def _compare_sends(self, sides: Sequence[Mapping[Topic, Sends]]) -> None:
        """Events of one range: as `_compare`, with the log."""
        one, *others = sides
        for topic, emitted in self._emitted.items():
            for other in others:
                if not _same(one.get(topic), other.get(topic)):
                    raise NotReproduced(
                        f"{self._at.processor} emits other events to {topic.name} under other "
                        "splits into batches.",
                        _REMEDY,
                    )
            self._done.sent += emitted.compare(one.get(topic))

    async def _compare(self, given: Sequence[_Range], start: int, stop: int) -> None:
        """Rows of one range: each side's with the first one's, and that with Postgres."""
        self._compare_sends([each.sends for each in given])
        sides = [each.rows for each in given]
        at, (one, *others) = self._at, self._sides
        for other in others:
            if other.machine.state.digest() != one.machine.state.digest():
                one.check_handed_out()
                other.check_handed_out()
                raise _differs(
                    at, stop, "is where two splits of the same events into batches lead to "
                    f"different states.\n  {at.processor} depends on where its batches end, or on "
                    "what it remembers outside of its state.",
                )  # fmt: skip
        for table in dict.fromkeys(table for side in sides for table in side):
            await self._open(table, start)
            if not stands(table):
                for each, found in zip(self._sides, sides, strict=True):
                    each.keep(table, found.get(table))
                continue
            rows = [settled(table, side.get(table, joined(table, []))) for side in sides]
            _check(table, rows[0], rows[1:], await self._found[table].upto(stop))
            self._done.rows += len(rows[0]["ls_offset"])

    async def _compare_ends(self) -> None:
        """What is left: tables with a key, rows past the last offset, the state laid out anew."""
        for table, found in self._found.items():
            there: Columns = await found.upto(None)
            rows: list[Columns] = [
                side.newest.get(table, joined(table, [])) for side in self._sides
            ]
            self._done.rows += len(rows[0]["ls_offset"])
            _check(table, rows[0], rows[1:], there)
        for emitted in self._emitted.values():
            emitted.compare_end()
        for side in self._sides:
            side.check_handed_out()


@dataclass(frozen=True)
class _Range:
    """What one side makes of a range."""

    rows: Mapping[type[Table], Columns]
    sends: Mapping[Topic, Sends]


def _same(one: Sends | None, other: Sends | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one.rows, other.rows) and np.array_equal(one.origin, other.origin)


@dataclass(frozen=True)
class _Step:
    digest: bytes
    code_version: str | None


class _Side:
    """One machine with batches and restarts of its own; `steps` are the digests to come out."""

    def __init__(
        self,
        machine: Machine,
        chance: np.random.Generator,
        at: Committed,
        steps: Mapping[int, _Step],
    ) -> None:
        self.machine = machine
        self.newest: dict[type[Table], Columns] = {}  # of tables with a key
        self._chance = chance
        self._at = at
        self._steps = steps

    def run(self, given: Input) -> _Range:
        """The rows and events of one range."""
        machine, pieces = self.machine, list[Piece]()
        stops = {offset for offset in self._steps if given.start < offset < given.stop}
        for part in _cut(given, self._chance, stops):
            if self._chance.random() < RESTART_SHARE:
                machine.processor = type(machine.processor)()
            piece = machine.step(part)
            for _ in piece.inputs:
                machine.forget()
            pieces.append(piece)
            if piece.dead:
                letter = piece.dead[0]
                raise _differs(self._at, letter.offset, f"was counted; now: {letter.error}")
            if machine.position in self._steps:
                self._check_digest(self._steps[machine.position])
        sends = joined_sends([piece.sends for piece in pieces])
        return _Range(results(type(machine.processor), pieces), sends)

    def keep(self, table: type[Table], rows: Columns | None) -> None:
        """The newest row of each key so far."""
        parts = [each for each in (self.newest.get(table), rows) if each is not None]
        self.newest[table] = joined(table, parts)

    def check_handed_out(self) -> None:
        """The digest that was kept up from what was handed out is that of the whole content."""
        state, specs = self.machine.state, self.machine.processor.states
        anew = State(specs)
        anew.load(state.dump())
        for name in specs:
            if total(getattr(anew, name).digests()) != total(getattr(state, name).digests()):
                raise _differs(
                    self._at, self.machine.position, f"is where the content of state {name!r} is "
                    "not what its digest says.\n  "
                    f"{self._at.processor} has changed a row of {name!r} that it had not asked for "
                    "with at(…) in the same call of process.",
                )  # fmt: skip

    def _check_digest(self, step: _Step) -> None:
        found = self.machine.state.digest()
        if found != step.digest:
            self.check_handed_out()
            own = code_version(type(self.machine.processor))
            changed = step.code_version is not None and step.code_version != own
            code = f"\n  It was computed by code {step.code_version}, this is {own}." * changed
            raise _differs(
                self._at, self.machine.position, f"has the state digest {step.digest.hex()} in "
                f"Postgres, and {found.hex()} recomputed.{code}",
            )  # fmt: skip


class _Found:
    """The rows of one table that came from one partition, in the order of (offset, n), as COPY
    sends them; on a connection of its own, and no further ahead than BUFFERED_MAX pieces."""

    def __init__(self, connection: asyncpg.Connection, table: type[Table]) -> None:
        self._connection = connection
        self._table = table
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(BUFFERED_MAX)
        self._stream = RowStream(table)
        self._left = joined(table, [])
        self._copying: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls, database: str, moment: str, table: type[Table], at: Committed, first: int | None
    ) -> _Found:
        """Rows from offset `first` on; without it all, so that no row too many is overlooked."""
        connection = await connect(database, "verify", patient=True)
        found = cls(connection, table)
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        await connection.execute(f"SET TRANSACTION SNAPSHOT '{moment}'")
        name = table.relation().name
        if await connection.fetchval("SELECT to_regclass($1)", f'"{name}"') is None:
            await found._pieces.put(None)
            return found
        names = ", ".join(f'"{column.name}"' for column in table.relation().columns)
        since = "" if first is None else f"AND ls_offset >= {first}"
        if issubclass(table, WindowTable):
            since += " AND final"
        query = f"""SELECT {names} FROM "{name}" WHERE ls_topic_id = {at.topic_number}
                       AND ls_partition = {at.partition} {since} ORDER BY ls_offset, ls_n"""
        found._copying = asyncio.create_task(found._copy(query))
        return found

    async def upto(self, stop: int | None) -> dict[str, np.ndarray]:
        """The next rows, below offset `stop` or all that are left."""
        parts = [self._left]
        while stop is None or not (len(at := parts[-1]["ls_offset"]) and at[-1] >= stop):
            piece = await self._pieces.get()
            if piece is None:
                self._pieces.put_nowait(None)  # for whoever asks next
                if self._copying is not None:
                    await self._copying
                break
            parts.append(await asyncio.to_thread(self._stream.feed, piece))
        names = [column.name for column in self._table.relation().columns]
        every = {name: np.concatenate([part[name] for part in parts]) for name in names}
        count = len(every["ls_offset"])
        cut = count if stop is None else int(np.searchsorted(every["ls_offset"], stop))
        self._left = {name: column[cut:] for name, column in every.items()}
        return {name: column[:cut] for name, column in every.items()}

    async def close(self) -> None:
        if self._copying is not None:
            self._copying.cancel()
            await asyncio.gather(self._copying, return_exceptions=True)
        self._connection.terminate()

    async def _copy(self, query: str) -> None:
        try:
            await self._connection.copy_from_query(query, output=self._pieces.put, format="binary")
        except Exception:
            await self._pieces.put(None)
            raise
        await self._pieces.put(None)  # not when cancelled: then nobody takes from a full queue


def _check(
    table: type[Table], expected: Columns, others: Iterable[Columns], found: Columns
) -> None:
    if difference := first_difference(table, expected, found):
        raise NotReproduced(difference.sentence(), _REMEDY)
    for other in others:
        if difference := first_difference(table, expected, other):
            raise NotReproduced(
                difference.sentence("under some splits", "under others")
                + "\n  The processor depends on where its batches end, or on what it remembers "
                "outside of its state.",
                _REMEDY,
            )


_REMEDY = (
    "Look for clocks, chance, attributes of the processor and changed rules; or for who has "
    "written into the database."
)


def _differs(at: Committed, offset: int, what: str) -> NotReproduced:
    return NotReproduced(f"{at.topic}-{at.partition}: offset {offset:,} {what}", _REMEDY)


async def _ranges(past: Past, partition: int, start: int, stop: int) -> AsyncIterator[Input]:
    """The input in ranges of a step's size or a little more, whatever the fetches brought."""
    waiting: list[Input] = []
    async for given in past.inputs(partition, start, stop):
        waiting.append(given)
        if sum(len(each.batch) for each in waiting) >= LIMITS.step_rows_max:
            yield _together(waiting)
            waiting = []
    if waiting:
        yield _together(waiting)


def _together(parts: Sequence[Input]) -> Input:
    batches = [part.batch for part in parts]
    batch = Batch(
        batches[0].source,
        np.concatenate([each.rows for each in batches]),
        np.concatenate([each.offset for each in batches]),
        np.concatenate([each.timestamp for each in batches]),
    )
    undecodable = [letter for part in parts for letter in part.undecodable]
    return Input(parts[0].partition, parts[0].start, parts[-1].stop, batch, undecodable)


def _cut(given: Input, chance: np.random.Generator, stops: set[int]) -> Iterator[Input]:
    """Batches of any size from one event on, small ones as likely as large ones; `stops` end one
    too."""
    cuts, at = set(stops), 0
    while True:
        at += int(np.exp(chance.uniform(0, np.log(LIMITS.step_rows_max))))
        if at >= len(given.batch):
            break
        cuts.add(int(given.batch.offset[at]))
    for start, stop in pairwise([given.start, *sorted(cuts - {given.start}), given.stop]):
        first, last = np.searchsorted(given.batch.offset, [start, stop])
        yield Input(given.partition, start, stop, given.batch.take(slice(first, last)))
