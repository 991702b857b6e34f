"""The edge to Postgres: claims, and the one transaction of a step.

Postgres is the judge. `claim` makes this connection the owner of partitions; `commit` writes rows,
dead letters, audit and offsets in one transaction whose last statement compares and sets the
offsets; fewer rows set than partitions means that another owner has taken over, and nothing
happened. A claim ends with its connection: after any doubt the connection is thrown away and the
partitions are claimed again, which waits for the old backend and says what became of the step.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import asyncpg
import structlog

from ledgerstream.errors import ConfigError, LedgerStreamError, StoppedPartition
from ledgerstream.limits import LIMITS
from ledgerstream.stream import schema
from ledgerstream.stream.connect import connect
from ledgerstream.stream.faults import TransientError, classified, of_table, overtaken
from ledgerstream.stream.machine import Piece, clip
from ledgerstream.stream.newest import NewRows
from ledgerstream.stream.pgcopy import HEADER, TRAILER
from ledgerstream.stream.tables import Table
from ledgerstream.stream.witness import Offsets, Stored, TxnIdentity

log = structlog.get_logger()
UNKNOWN_SYSTEM = 0
NO_OFFSETS: Offsets = {}


@dataclass(frozen=True)
class Server:
    """Which database cluster, and which life of it.

    Where our role may not ask, `system_id` is UNKNOWN_SYSTEM and the timeline alone tells.
    """

    system_id: int
    timeline: int


@dataclass(frozen=True)
class Source:
    """The topic that a processor reads, as the log knows it now."""

    name: str
    topic_id: uuid.UUID

    @property
    def known_id(self) -> uuid.UUID | None:
        """None where the log gives topics no ids."""
        return self.topic_id if self.topic_id.int else None

    def recreated(self, partition: int, next_offset: int, processor: str) -> StoppedPartition:
        """Why a partition stops whose topic is now another one of the same name."""
        return StoppedPartition(
            f"{self.name}-{partition} stopped at offset {next_offset:,}.\n"
            f"  The events of topic {self.name!r} are not the ones that {processor} has counted:\n"
            "  it was deleted and created again, or this is another log.",
            "Check --log and --dir. To begin anew, give the processor another name (a line "
            f'`name = "{processor}2"` in its class); or bring the old topic back.',
        )


@dataclass(frozen=True)
class Claim:
    """One partition that is ours: where to go on, and what was true there."""

    partition: int
    first_offset: int
    next_offset: int
    owner_epoch: int
    digest: bytes | None
    code_version: str | None
    transactional_id: str | None = None
    producer_id: int | None = None
    producer_epoch: int | None = None
    witness: int | None = None

    @property
    def stored(self) -> Stored:
        """What it says of the log's side, for a processor that emits."""
        identity = None
        if self.transactional_id is not None:
            assert self.producer_id is not None
            assert self.producer_epoch is not None
            identity = TxnIdentity(self.transactional_id, self.producer_id, self.producer_epoch)
        return Stored(self.next_offset, identity, self.witness)


_CLAIM = """
UPDATE ls_progress SET owner_epoch = owner_epoch + 1, owner = $4, system_id = $5, timeline = $6,
       updated_at = now()
 WHERE processor = $1 AND topic = $2 AND partition = ANY($3::int[])
RETURNING partition, first_offset, next_offset, owner_epoch, digest, code_version,
          transactional_id, producer_id, producer_epoch, witness"""

_MOVE = """
WITH step AS (
    SELECT * FROM unnest($4::int[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bytea[],
                         $9::bigint[], $10::bigint[], $11::bigint[], $14::bigint[])
        AS s(partition, start, stop, owner_epoch, digest, events, rows, dead, witness)
), audit AS (
    INSERT INTO ls_steps (processor, topic, partition, first_offset, next_offset, events, rows,
                          dead, rule_version, code_version, owner_epoch, digest)
    SELECT $1, $2, partition, start, stop, events, rows, dead, $12, $13, owner_epoch, digest
      FROM step WHERE start < stop
)
UPDATE ls_progress p SET next_offset = s.stop, digest = s.digest, code_version = $13,
       transactional_id = coalesce($15::text, p.transactional_id),
       producer_id = coalesce($16::bigint, p.producer_id),
       producer_epoch = coalesce($17::smallint, p.producer_epoch),
       witness = coalesce(s.witness, p.witness), updated_at = now()
  FROM step s
 WHERE p.processor = $1 AND p.topic = $2 AND p.partition = s.partition
   AND p.next_offset = s.start AND p.owner_epoch = s.owner_epoch AND p.owner = $3
RETURNING p.partition"""

_BURY = """
INSERT INTO ls_dead_letters (topic_id, partition, "offset", processor, topic, timestamp_ms, key,
                             payload, error)
SELECT $1, d.partition, d.o, $2, $3, d.t, d.key, d.payload, d.error
  FROM unnest($4::int[], $5::bigint[], $6::bigint[], $7::bytea[], $8::bytea[], $9::text[])
    AS d(partition, o, t, key, payload, error)
ON CONFLICT DO NOTHING"""

# Rows of the audit below the newest ones become one row that covers their range.
_MERGE_AUDIT = """
WITH gone AS (
    DELETE FROM ls_steps s WHERE processor = $1 AND topic = $2 AND partition = $3
       AND next_offset <= (SELECT next_offset FROM ls_steps WHERE processor = $1 AND topic = $2
                           AND partition = $3 ORDER BY next_offset DESC OFFSET $4 LIMIT 1)
    RETURNING *)
INSERT INTO ls_steps
SELECT processor, topic, partition, min(first_offset), max(next_offset), sum(steps), sum(events),
       sum(rows), sum(dead), (array_agg(rule_version ORDER BY next_offset DESC))[1],
       (array_agg(code_version ORDER BY next_offset DESC))[1], max(owner_epoch),
       (array_agg(digest ORDER BY next_offset DESC))[1], max(committed_at)
  FROM gone GROUP BY processor, topic, partition"""


class Sink:
    """One connection to Postgres and the claims made on it."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        server: Server,
        processor: str,
        rule_version: str,
        code_version: str,
    ) -> None:
        self.connection = connection
        self.server = server
        self.owner = uuid.uuid4()
        self.claims: dict[int, Claim] = {}
        self.epochs: dict[int, int] = {}  # owner epochs of all claims made here, also when it broke
        self.processor = processor
        self._rule_version = rule_version
        self._code_version = code_version
        self._source: Source | None = None
        self._tables: set[type[Table]] = set()
        self._staging: dict[type[Table], str] = {}  # of tables with a key
        self._met: set[type[Table]] = set()  # of these, where a row was there that should be new
        self._commits = 0
        self._unreplicated = False  # a COMMIT was answered without its standby
        connection.add_log_listener(self._warned)

    @classmethod
    async def connect(
        cls, url: str, processor: str, rule_version: str = "", code_version: str = ""
    ) -> Sink:
        """Connect, check the settings that the promise rests on, make our tables.

        Raises TransientError while the server is not there, ConfigError for one that may forget
        what it has committed.
        """
        connection = await connect(url, processor)
        try:
            await _check_durable(connection)
            server = await _server(connection)
            await schema.create(connection)
        except BaseException as error:
            connection.terminate()
            raise classified(error) from error
        return cls(connection, server, processor, rule_version, code_version)

    async def claim(
        self,
        source: Source,
        partitions: Iterable[int],
        starts: Mapping[int, int],
        owners: Collection[uuid.UUID] | None = None,
    ) -> dict[int, Claim]:
        """Make this connection the owner of partitions; from here on no older owner commits.

        starts: where a partition begins that was never processed (the log's first offset).
        owners: connections on which we have claimed before, or may have: a partition that somebody
                else has claimed since is left to him, and not among the claims.

        Raises StoppedPartition for a recreated topic or a database on an older timeline.
        """
        wanted = sorted(partitions)
        self._source = source
        try:
            async with self.connection.transaction():
                if owners is None:
                    await self._add_progress(source, wanted, starts)
                found = await self._check_lineage(source, wanted)
                if owners is not None:
                    wanted = [p for p in wanted if found.get(p) in owners]
                rows = await self.connection.fetch(
                    _CLAIM, self.processor, source.name, wanted, self.owner,
                    self.server.system_id, self.server.timeline,
                )  # fmt: skip
            self._check_replicated()
        except BaseException as error:
            raise classified(error) from error
        claims = {row["partition"]: Claim(**dict(row)) for row in rows}
        assert sorted(claims) == wanted
        self.claims.update(claims)
        self.epochs.update({number: claim.owner_epoch for number, claim in claims.items()})
        return claims

    async def topic_number(self, source: Source) -> int:
        """The small number of a topic id, given out once."""
        try:
            await self.connection.execute(
                "INSERT INTO ls_topics (topic_id, name) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                source.topic_id, source.name,
            )  # fmt: skip
            number: int = await self.connection.fetchval(
                "SELECT id FROM ls_topics WHERE topic_id = $1", source.topic_id
            )
        except BaseException as error:
            raise classified(error) from error
        return number

    async def create_tables(self, tables: Iterable[type[Table]]) -> None:
        """Make result tables that are not there yet, and check those that are."""
        for table in tables:
            if table not in self._tables:
                try:
                    await schema.create_table(self.connection, table, self.processor)
                    if table.key_columns():
                        staging = f"ls_staging_{len(self._staging)}"
                        await schema.create_staging(self.connection, table, staging)
                        self._staging[table] = staging
                except BaseException as error:
                    raise classified(error) from error
                self._tables.add(table)

    async def commit(
        self,
        pieces: Sequence[Piece],
        identity: TxnIdentity | None = None,
        witness: Offsets = NO_OFFSETS,
    ) -> None:
        """Commit one piece a partition: all of it, or nothing.

        identity:  of the log transaction that belongs to it, for its successor to end.
        witness:   by partition, as it is known; without it the row keeps what it has.

        Raises Overtaken (another owner has the partitions that it names), DataError, or
        TransientError; if `lost`, whether it was committed is for the next claim to say. Anything
        else is not known to be harmless, and comes as it is.
        """
        assert self._source is not None
        assert len({piece.partition for piece in pieces}) == len(pieces)
        await self.create_tables(table for piece in pieces for table in piece.copies)
        try:
            await self.connection.execute("BEGIN")
            await self._copy(pieces)
            await self._bury(pieces)
            lost = await self._move(pieces, identity, witness)
            if lost:
                await self.connection.execute("ROLLBACK")
                raise overtaken(self.processor, self._source.name, lost)
            if await self.connection.execute("COMMIT") != "COMMIT":
                raise TransientError("Postgres rolled the step back.", lost=False)
            self._check_replicated()
        except BaseException as error:
            raise await self._failed(error) from error
        for piece in pieces:
            self.claims[piece.partition] = replace(
                self.claims[piece.partition],
                next_offset=piece.stop,
                digest=piece.digest,
                code_version=self._code_version,
            )
        self._commits += 1
        if self._commits % LIMITS.audit_merge_steps == 0:
            await self._tidy()

    async def merge_audit(self) -> None:
        """Keep the audit's size bounded."""
        assert self._source is not None
        try:
            for partition in sorted(self.claims):
                await self.connection.execute(
                    _MERGE_AUDIT, self.processor, self._source.name, partition,
                    LIMITS.audit_rows_kept,
                )  # fmt: skip
        except BaseException as error:
            raise classified(error) from error

    async def _tidy(self) -> None:
        """Merge the audit; the step before it is committed, so it must not fail for this."""
        try:
            await self.merge_audit()
        except (LedgerStreamError, asyncpg.PostgresError) as error:
            log.warning("audit not merged", processor=self.processor, error=str(error))

    async def accept_code(self, claim: Claim, first_offset: int, digest: bytes) -> None:
        """Record that [first_offset, next_offset) was replayed with this code by consent, and that
        it led to `digest`. Nothing where another owner has the partition."""
        assert self._source is not None
        try:
            await self.connection.execute(
                """WITH mine AS (
                       UPDATE ls_progress SET digest = $8, code_version = $7, updated_at = now()
                        WHERE processor = $1 AND topic = $2 AND partition = $3 AND next_offset = $5
                          AND owner_epoch = $9 AND owner = $10
                       RETURNING 1)
                   INSERT INTO ls_code_changes (processor, topic, partition, first_offset,
                       next_offset, old_code_version, new_code_version)
                   SELECT $1, $2, $3, $4, $5, $6, $7 FROM mine""",
                self.processor, self._source.name, claim.partition, first_offset,
                claim.next_offset, claim.code_version, self._code_version, digest,
                claim.owner_epoch, self.owner,
            )  # fmt: skip
        except BaseException as error:
            raise classified(error) from error

    async def record_migration(self, claim: Claim, at: int) -> None:
        """Record once that the state as it stood at that offset was migrated for this code."""
        assert self._source is not None
        try:
            await self.connection.execute(
                """INSERT INTO ls_code_changes (processor, topic, partition, first_offset,
                       next_offset, old_code_version, new_code_version)
                   SELECT $1, $2, $3, $4::bigint, $4, $5, $6
                    WHERE NOT EXISTS (
                       SELECT FROM ls_code_changes WHERE processor = $1 AND topic = $2
                          AND partition = $3 AND first_offset = $4 AND next_offset = $4)""",
                self.processor, self._source.name, claim.partition, at, claim.code_version,
                self._code_version,
            )  # fmt: skip
        except BaseException as error:
            raise classified(error) from error

    async def dead_offsets(self, source: Source, partition: int, start: int, stop: int) -> set[int]:
        """Offsets in [start, stop) that are dead letters of this processor."""
        try:
            rows = await self.connection.fetch(
                """SELECT "offset" FROM ls_dead_letters WHERE topic_id = $1 AND partition = $2
                   AND processor = $3 AND "offset" >= $4 AND "offset" < $5""",
                source.topic_id, partition, self.processor, start, stop,
            )  # fmt: skip
        except BaseException as error:
            raise classified(error) from error
        return {row["offset"] for row in rows}

    async def close(self) -> None:
        """Give the connection back; claims made on it are over."""
        self.claims.clear()
        try:
            await self.connection.close(timeout=5)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
            self.connection.terminate()

    def abandon(self) -> None:
        """Drop the connection at once, as after a doubt."""
        self.claims.clear()
        self.connection.terminate()

    async def _add_progress(
        self, source: Source, partitions: Sequence[int], starts: Mapping[int, int]
    ) -> None:
        await self.connection.execute(
            """INSERT INTO ls_progress (processor, topic, partition, topic_id, first_offset,
                                        next_offset)
               SELECT $1, $2, n.partition, $3, n.start, n.start
                 FROM unnest($4::int[], $5::bigint[]) AS n(partition, start)
               ON CONFLICT DO NOTHING""",
            self.processor, source.name, source.topic_id,
            list(partitions), [starts[each] for each in partitions],
        )  # fmt: skip

    async def _check_lineage(
        self, source: Source, partitions: Sequence[int]
    ) -> dict[int, uuid.UUID | None]:
        """The owners as they are; the rows are locked, which waits for an old backend."""
        rows = await self.connection.fetch(
            """SELECT partition, topic_id, next_offset, owner, system_id, timeline
                 FROM ls_progress
               WHERE processor = $1 AND topic = $2 AND partition = ANY($3::int[])
               ORDER BY partition FOR UPDATE""",
            self.processor, source.name, list(partitions),
        )  # fmt: skip
        for row in rows:
            where = f"{source.name}-{row['partition']} stopped at offset {row['next_offset']:,}."
            if row["topic_id"] != source.topic_id:
                raise source.recreated(row["partition"], row["next_offset"], self.processor)
            older = (row["timeline"] or 0) > self.server.timeline
            if older and row["system_id"] == self.server.system_id:
                raise StoppedPartition(
                    f"{where}\n  This Postgres is on timeline {self.server.timeline}, results were "
                    f"committed on timeline {row['timeline']}: another primary has taken over.",
                    "Connect to the primary that is now in charge.",
                )
        return {row["partition"]: row["owner"] for row in rows}

    async def _copy(self, pieces: Sequence[Piece]) -> None:
        by_table: dict[type[Table], list[bytes]] = {}
        for piece in pieces:
            for table, (parts, rows) in piece.copies.items():
                if rows:
                    by_table.setdefault(table, []).extend(parts)
        for table in sorted(by_table, key=lambda each: str(each.relation().name)):
            try:
                await self._fill(table, by_table[table])
            except asyncpg.PostgresError as error:
                columns = [column.name for column in table.relation().columns]
                if (known := of_table(table.relation().name, columns, error)) is not None:
                    raise known from error
                raise

    async def _fill(self, table: type[Table], parts: Sequence[bytes]) -> None:
        name = str(table.relation().name)
        staging = self._staging.get(table)
        if staging is None:
            await self._copy_into(name, table, parts)
            return
        new = [part for part in parts if isinstance(part, NewRows) and part]
        known = [part for part in parts if not isinstance(part, NewRows) and part]
        if new and not await self._copy_new(name, table, new):
            known = [*new, *known]
        if known:
            await self._copy_into(staging, table, known)
            await self.connection.execute(schema.merge(table, staging))

    async def _copy_new(self, name: str, table: type[Table], parts: Sequence[bytes]) -> bool:
        """Rows that should not be there yet, straight into their table, which takes half the time.

        False, and nothing done, where some are: the table holds what another processor has written,
        or this one under another name.
        """
        if table in self._met:
            return False
        await self.connection.execute("SAVEPOINT ls_new_rows")
        try:
            await self._copy_into(name, table, parts)
        except asyncpg.UniqueViolationError:
            await self.connection.execute("ROLLBACK TO SAVEPOINT ls_new_rows")
            self._met.add(table)
            return False
        await self.connection.execute("RELEASE SAVEPOINT ls_new_rows")
        return True

    async def _copy_into(self, name: str, table: type[Table], parts: Sequence[bytes]) -> None:
        await self.connection.copy_to_table(
            name,
            source=copy_chunks(parts),
            columns=[column.name for column in table.relation().columns],
            format="binary",
        )

    async def _bury(self, pieces: Sequence[Piece]) -> None:
        assert self._source is not None
        dead = [(piece.partition, letter) for piece in pieces for letter in piece.dead]
        if not dead:
            return
        await self.connection.execute(
            _BURY, self._source.topic_id, self.processor, self._source.name,
            [partition for partition, _ in dead],
            [letter.offset for _, letter in dead],
            [letter.timestamp_ms for _, letter in dead],
            [clip(letter.key) for _, letter in dead],
            [clip(letter.payload) for _, letter in dead],
            [_plain(letter.error) for _, letter in dead],
        )  # fmt: skip

    async def _move(
        self, pieces: Sequence[Piece], identity: TxnIdentity | None, witness: Offsets
    ) -> set[int]:
        """Compare and set all offsets; the partitions that are no longer ours."""
        assert self._source is not None
        moved = await self.connection.fetch(
            _MOVE, self.processor, self._source.name, self.owner,
            [piece.partition for piece in pieces],
            [piece.start for piece in pieces],
            [piece.stop for piece in pieces],
            [self.claims[piece.partition].owner_epoch for piece in pieces],
            [piece.digest for piece in pieces],
            [piece.events for piece in pieces],
            [piece.rows for piece in pieces],
            [len(piece.dead) for piece in pieces],
            self._rule_version, self._code_version,
            [witness.get(piece.partition) for piece in pieces],
            *(identity or (None, None, None)),
        )  # fmt: skip
        return {piece.partition for piece in pieces} - {row["partition"] for row in moved}

    def _warned(self, _: object, message: asyncpg.PostgresLogMessage) -> None:
        """A notice of the server. One kind says that what it commits here, its standby may lack."""
        if getattr(message, "server_source_function", "") == "SyncRepWaitForLSN":
            self._unreplicated = True

    def _check_replicated(self) -> None:
        """A commit whose wait for the standby was cancelled is not acknowledged: a new claim, which
        waits for that standby itself, says what became of it."""
        if self._unreplicated:
            raise TransientError(
                "a COMMIT stands on this server, but its standby may not have it.", lost=True
            )

    async def _failed(self, error: BaseException) -> BaseException:
        """The error as its class; the transaction is over, or the connection is."""
        known = classified(error)
        if (isinstance(known, TransientError) and known.lost) or isinstance(
            error, asyncio.CancelledError
        ):
            self.abandon()
        elif not self.connection.is_closed() and self.connection.is_in_transaction():
            try:
                await self.connection.execute("ROLLBACK")
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
                self.abandon()
                return TransientError(f"the connection to Postgres broke: {error}", lost=True)
        return known


def _plain(text: str) -> str:
    """As Postgres stores text: UTF-8, and no NUL."""
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


async def copy_chunks(parts: Sequence[bytes]) -> AsyncIterator[bytes]:
    """The stream of a COPY: header, rows in pieces of bounded size, trailer."""
    yield HEADER
    for part in parts:
        view = memoryview(part)
        for at in range(0, len(view), LIMITS.copy_chunk_bytes):
            yield view[at : at + LIMITS.copy_chunk_bytes]  # type: ignore[misc]
    yield TRAILER


async def _check_durable(connection: asyncpg.Connection) -> None:
    if await connection.fetchval("SHOW fsync") == "off":
        raise ConfigError(
            "this Postgres has fsync = off: a crash of its machine may lose or spoil what it has "
            "committed, after the log has moved on.",
            "Set fsync = on in postgresql.conf and restart it.",
        )
    setting = await connection.fetchval("SHOW synchronous_commit")
    if setting == "off":
        raise ConfigError(
            "this Postgres has synchronous_commit = off: it may forget a step that it has "
            "acknowledged, after the log has moved on.",
            "Set synchronous_commit = on for this role or database.",
        )
    # For this connection: a reload of the server's settings must not change it under us.
    await connection.execute("SELECT set_config('synchronous_commit', $1, false)", setting)


async def _server(connection: asyncpg.Connection) -> Server:
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        raise TransientError(
            "This Postgres is a standby, and results need the primary.",
            lost=True,
            remedy="Give the URL of the primary.",
        )
    wal = await connection.fetchval("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")
    try:
        system_id = await connection.fetchval("SELECT system_identifier FROM pg_control_system()")
    except asyncpg.InsufficientPrivilegeError:
        system_id = UNKNOWN_SYSTEM
    return Server(system_id, int(wal[:8], 16))
