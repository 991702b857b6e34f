"""Dead letters to the log again: each once, in order, with its origin in headers.

    ls.origin.topic · ls.origin.partition · ls.origin.offset      as text

State is never changed from the side: the record is read from the log as it was, appended to its own
partition, and counted when its turn comes. Postgres and the log have no transaction in common, so
three steps stand for it, each committed before the next:

1. the letters get an intent: where their partition ended, and when;
2. the records are appended;
3. the letters get their new offsets.

Whoever is killed in between leaves intents. The next retry reads the partition from there on, takes
what it finds by its headers as appended, and appends the rest. A request of the killed one may
still be on its way: so an intent is left alone until it is `LIMITS.request_ms_max` old. The
guarantee: once, unless a broker appends a request later than that after its sender died. Retries
exclude each other with a lock in Postgres.

Every processor of the topic reads the copy. Where another one has counted the original, the retry
is refused unless asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import asyncpg

from ledgerstream.client import LATEST, Client
from ledgerstream.errors import KafkaError, LedgerStreamError
from ledgerstream.limits import LIMITS
from ledgerstream.stream.source import OFFSET_OUT_OF_RANGE
from ledgerstream.wire import batches
from ledgerstream.wire.batches import Record

ORIGIN = "ls.origin."
_LOCK = 0x4C445244
_CHUNK = 500  # letters that are appended before they are marked


@dataclass(frozen=True)
class Place:
    """Where a record stands."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}:{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Place:
        """`payments-0:88213`, as `dead-letters list` prints it. Raises LedgerStreamError."""
        name, _, offset = text.replace(",", "").rpartition(":")
        topic, _, partition = name.rpartition("-")
        numbers = partition.isdigit() and offset.isdigit()
        if not (topic and numbers and int(partition) < 2**31 and int(offset) < 2**63):
            raise LedgerStreamError(
                f"{text!r} names no dead letter.", "Write topic-partition:offset, as the list does."
            )
        return cls(topic, int(partition), int(offset))


@dataclass(frozen=True)
class Retried:
    """One record that was appended again. `found`: an earlier retry had appended it already."""

    origin: Place
    offset: int
    found: bool


@dataclass(frozen=True)
class _Letter:
    origin: Place
    retry_from: int | None
    age_ms: float | None  # of the intent


async def retry(
    connection: asyncpg.Connection,
    client: Client,
    *,
    processor: str | None = None,
    places: Sequence[Place] = (),
    even_if_counted: bool = False,
) -> list[Retried]:
    """Append dead letters again: of a processor, at these places, or all; those not retried yet.

    Raises LedgerStreamError where another retry is under way, where another processor has counted
    one of the records, and where the log no longer has one; nothing is appended then.
    """
    if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):
        raise LedgerStreamError("Another retry is under way.", "Wait until it has ended.")
    try:
        letters = await _letters(connection, processor, places)
        if not even_if_counted:
            await _check_others(connection, letters)
        done: list[Retried] = []
        for (topic, partition), some in groupby(
            letters, lambda each: (each.origin.topic, each.origin.partition)
        ):
            done += await _Partition(connection, client, topic, partition).retry(list(some))
        return done
    finally:
        if not connection.is_closed():
            await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)


async def _letters(
    connection: asyncpg.Connection, processor: str | None, places: Sequence[Place]
) -> list[_Letter]:
    rows = await connection.fetch(
        """SELECT topic, partition, "offset", max(retry_from) AS retry_from,
                  (extract(epoch FROM now() - max(retry_at)) * 1000)::float8 AS age_ms
             FROM ls_dead_letters
            WHERE retried_at IS NULL AND ($1::text IS NULL OR processor = $1)
              AND (cardinality($2::text[]) = 0
                   OR topic || '-' || partition || ':' || "offset" = ANY($2))
            GROUP BY topic, partition, "offset" ORDER BY topic, partition, "offset" """,
        processor, [str(each) for each in places],
    )  # fmt: skip
    return [
        _Letter(
            Place(row["topic"], row["partition"], row["offset"]), row["retry_from"], row["age_ms"]
        )
        for row in rows
    ]


async def _check_others(connection: asyncpg.Connection, letters: Sequence[_Letter]) -> None:
    """Refuse what another processor would count twice."""
    row = await connection.fetchrow(
        """SELECT p.processor, l.topic, l.partition, l.o
             FROM unnest($1::text[], $2::int[], $3::bigint[]) AS l(topic, partition, o)
             JOIN ls_progress p ON p.topic = l.topic AND p.partition = l.partition
            WHERE NOT EXISTS (
                SELECT FROM ls_dead_letters d
                 WHERE d.topic_id = p.topic_id AND d.partition = l.partition AND d."offset" = l.o
                   AND d.processor = p.processor)
            ORDER BY 2, 3, 4, 1 LIMIT 1""",
        [each.origin.topic for each in letters],
        [each.origin.partition for each in letters],
        [each.origin.offset for each in letters],
    )
    if row is not None:
        place = Place(row["topic"], row["partition"], row["o"])
        raise LedgerStreamError(
            f"{row['processor']} reads {row['topic']!r} too, and {place} is no dead letter of it: "
            "appended again, it would be counted twice there.",
            "Let that processor pass such records over, then retry with --even-if-counted.",
        )


class _Partition:
    """The letters of one partition, in the order of their offsets."""

    def __init__(
        self, connection: asyncpg.Connection, client: Client, topic: str, partition: int
    ) -> None:
        self._connection = connection
        self._client = client
        self._topic = topic
        self._partition = partition

    async def retry(self, letters: Sequence[_Letter]) -> list[Retried]:
        done: list[Retried] = []
        begun = [each for each in letters if each.retry_from is not None]
        if begun:
            done += await self._settle(begun)
        settled = {each.origin for each in done}
        left = [each.origin for each in letters if each.origin not in settled]
        for first in range(0, len(left), _CHUNK):
            done += await self._append(left[first : first + _CHUNK])
        return done

    async def _settle(self, begun: Sequence[_Letter]) -> list[Retried]:
        """What an earlier retry has appended, now that nothing of it can come any more."""
        youngest = min(each.age_ms or 0.0 for each in begun)
        await asyncio.sleep(max(LIMITS.request_ms_max - youngest, 0) / 1_000)
        wanted = {each.origin for each in begun}
        start = min(each.retry_from for each in begun if each.retry_from is not None)
        found: dict[Place, int] = {}
        async for record in self._records(start):
            origin = origin_of(record)
            if origin in wanted:
                found.setdefault(origin, record.offset)
        done = [Retried(origin, offset, True) for origin, offset in found.items()]
        await self._mark(done)
        return done

    async def _append(self, origins: Sequence[Place]) -> list[Retried]:
        records = [await self._record(origin) for origin in origins]
        end = (await self._client.list_offsets(self._topic, {self._partition: LATEST}))[
            self._partition
        ]
        await self._connection.execute(
            """UPDATE ls_dead_letters SET retry_from = $1, retry_at = now()
                WHERE topic = $2 AND partition = $3 AND "offset" = ANY($4::bigint[])""",
            end, self._topic, self._partition, [each.offset for each in origins],
        )  # fmt: skip
        producer = await self._client.producer()
        try:
            async with asyncio.TaskGroup() as tasks:
                sends = [
                    tasks.create_task(
                        producer.send(
                            self._topic, record.value, key=record.key, partition=self._partition,
                            timestamp=record.timestamp, headers=_headers(record, origin),
                        )
                    )
                    for record, origin in zip(records, origins, strict=True)
                ]  # fmt: skip
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        offsets = [send.result() for send in sends]
        done = [Retried(o, at, False) for o, at in zip(origins, offsets, strict=True)]
        await self._mark(done)
        return done

    async def _mark(self, done: Sequence[Retried]) -> None:
        await self._connection.execute(
            """UPDATE ls_dead_letters d SET retried_at = now(), retried_offset = r.new
                 FROM unnest($3::bigint[], $4::bigint[]) AS r(o, new)
                WHERE d.topic = $1 AND d.partition = $2 AND d."offset" = r.o""",
            self._topic, self._partition, [each.origin.offset for each in done],
            [each.offset for each in done],
        )  # fmt: skip

    async def _record(self, origin: Place) -> Record:
        """The record as it was written. Raises LedgerStreamError if the log no longer has it."""
        try:
            async for record in self._records(origin.offset):
                if record.offset >= origin.offset:
                    if record.offset > origin.offset:
                        break
                    return record
        except KafkaError as error:
            if error.code != OFFSET_OUT_OF_RANGE:
                raise
        raise LedgerStreamError(
            f"The log no longer has {origin}: retention removed it.",
            "What is kept of it is shown by `ledgerstream dead-letters show`: write it anew.",
        )

    async def _records(self, start: int) -> AsyncIterator[Record]:
        """The records from `start` to the end as it is now."""
        end = (await self._client.list_offsets(self._topic, {self._partition: LATEST}))[
            self._partition
        ]
        async with self._client.reader(self._topic, {self._partition: start}) as reader:
            while start < end:
                chunk = await reader.next()
                if chunk is None:
                    continue
                for at, header in batches.headers(chunk.data):
                    if header.control:
                        continue
                    for record in batches.records(chunk.data, at):
                        if start <= record.offset < end:
                            yield record
                start = chunk.next_offset


def origin_of(record: Record) -> Place | None:
    """Where a retried record first stood; None for any other."""
    found = {name: content or b"" for name, content in record.headers if name.startswith(ORIGIN)}
    try:
        return Place(
            found[f"{ORIGIN}topic"].decode(),
            int(found[f"{ORIGIN}partition"]),
            int(found[f"{ORIGIN}offset"]),
        )
    except (KeyError, ValueError):
        return None


def _headers(record: Record, origin: Place) -> list[tuple[str, bytes | None]]:
    own = [(name, content) for name, content in record.headers if not name.startswith(ORIGIN)]
    return [
        *own,
        (f"{ORIGIN}topic", origin.topic.encode()),
        (f"{ORIGIN}partition", str(origin.partition).encode()),
        (f"{ORIGIN}offset", str(origin.offset).encode()),
    ]
