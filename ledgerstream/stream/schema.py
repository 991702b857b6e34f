"""The tables that the runtime keeps in Postgres, made in one place.

ls_topics           a small number for each topic id, so that result rows are compact
ls_progress         one row a (processor, topic, partition): how far, whose, and the digest
ls_steps            the audit: one row a step and partition; old ones are merged
ls_dead_letters     records that could not be processed, each once
ls_snapshots        one row a snapshot; `valid` makes it count
ls_snapshot_pages   its bytes, in pages, each under the snapshot that wrote it
ls_processors       how each processor is imported, and its tables: for `explain` and `status`
ls_slots            the transactional ids of workers that emit events, and who holds each
ls_watch            one row a partition: what its worker last saw, and why it stopped; outside steps

And views, for people who have only psql:

ls_lag              how far each partition is, and behind what; who is at it, and why it stopped
ls_dead             dead letters, without their bytes, and what became of them
ls_explain          the steps by range of offsets, to be joined with a result row's ls_… columns:
                    SELECT a.*, e.rule_version, e.committed_at FROM fraud_alert a JOIN ls_explain e
                      ON (e.ls_topic_id, e.ls_partition) = (a.ls_topic_id, a.ls_partition)
                     AND a.ls_offset >= e.first_offset AND a.ls_offset < e.next_offset
"""

from __future__ import annotations

import asyncpg
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from ledgerstream.errors import ConfigError, StoppedPartition
from ledgerstream.stream.pgcopy import widths
from ledgerstream.stream.tables import Table

_DDL_LOCK = 0x4C454447  # serialises CREATE … IF NOT EXISTS, which otherwise races with itself

_DDL = """
CREATE TABLE IF NOT EXISTS ls_topics (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic_id uuid NOT NULL UNIQUE,
    name text NOT NULL
);
CREATE TABLE IF NOT EXISTS ls_progress (
    processor text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    topic_id uuid NOT NULL,
    first_offset bigint NOT NULL,  -- where this processor began
    next_offset bigint NOT NULL,
    owner_epoch bigint NOT NULL DEFAULT 0,
    owner uuid,
    leader_epoch integer NOT NULL DEFAULT -1,
    digest bytea,               -- of the state at next_offset
    code_version text,          -- that computed it
    system_id bigint,           -- of the database cluster that the last owner wrote to
    timeline integer,
    transactional_id text,      -- of the log transaction that belongs to the last step, if any
    producer_id bigint,
    producer_epoch smallint,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (processor, topic, partition)
) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS ls_steps (
    processor text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    first_offset bigint NOT NULL,
    next_offset bigint NOT NULL,
    steps bigint NOT NULL DEFAULT 1,  -- how many steps were merged into this row
    events bigint NOT NULL,
    rows bigint NOT NULL,
    dead bigint NOT NULL,
    rule_version text NOT NULL,
    code_version text NOT NULL,
    owner_epoch bigint NOT NULL,
    digest bytea NOT NULL,
    committed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (processor, topic, partition, next_offset)
);
CREATE TABLE IF NOT EXISTS ls_code_changes (
    processor text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    first_offset bigint NOT NULL,     -- the range that was replayed with the new code; one without
    next_offset bigint NOT NULL,      -- width: the state that stood there was migrated
    old_code_version text,
    new_code_version text NOT NULL,
    accepted_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS ls_dead_letters (
    topic_id uuid NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    processor text NOT NULL,
    topic text NOT NULL,
    timestamp_ms bigint NOT NULL,
    key bytea,
    payload bytea,
    error text NOT NULL,
    dead_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic_id, partition, "offset", processor)
);
CREATE TABLE IF NOT EXISTS ls_snapshots (
    snapshot_id uuid PRIMARY KEY,
    processor text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    topic_id uuid NOT NULL,
    state_offset bigint NOT NULL,
    owner_epoch bigint NOT NULL,
    digest bytea NOT NULL,
    code_version text NOT NULL,
    layout text NOT NULL,       -- JSON: the state declaration that the pages follow
    pages integer NOT NULL,
    valid boolean NOT NULL DEFAULT false,
    taken_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS ls_snapshots_of
    ON ls_snapshots (processor, topic, partition, state_offset DESC);
CREATE TABLE IF NOT EXISTS ls_snapshot_pages (
    snapshot_id uuid NOT NULL,
    page integer NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (snapshot_id, page)
);
ALTER TABLE ls_snapshot_pages ALTER COLUMN data SET STORAGE EXTERNAL;
CREATE TABLE IF NOT EXISTS ls_processors (
    processor text PRIMARY KEY,
    class text NOT NULL,        -- module:Class
    topic text NOT NULL,
    tables text[] NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS ls_watch (
    processor text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    owner_epoch bigint NOT NULL,
    pid integer,                -- the owner's backend, and since when: whether he lives
    backend_start timestamptz,
    log_end bigint,
    event_time bigint,          -- ns, the greatest of the last step
    seen_at timestamptz NOT NULL DEFAULT now(),
    stopped_at timestamptz,
    why text,
    remedy text,
    PRIMARY KEY (processor, topic, partition)
) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS ls_slots (
    processor text NOT NULL,
    slot integer NOT NULL,      -- its transactional id is ls.<processor>.<slot>
    holder uuid NOT NULL,
    pid integer NOT NULL,       -- the holder's backend, and since when: whether he lives
    backend_start timestamptz NOT NULL,
    taken_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (processor, slot)
);
CREATE TABLE IF NOT EXISTS ls_results (
    processor text NOT NULL,
    name text NOT NULL,         -- a result table that it has made, or found
    PRIMARY KEY (processor, name)
);
ALTER TABLE ls_progress
    ADD COLUMN IF NOT EXISTS witness bigint; -- up to where outputs are in the log, as last known
ALTER TABLE ls_watch
    ADD COLUMN IF NOT EXISTS watermark bigint,           -- ns, of the windows, after the last step
    ADD COLUMN IF NOT EXISTS step_ms double precision,   -- of the last step: decoded and computed,
    ADD COLUMN IF NOT EXISTS commit_ms double precision; -- and committed
ALTER TABLE ls_snapshots
    ADD COLUMN IF NOT EXISTS writers uuid[],  -- the snapshots that wrote its pages; without them
                                              -- it has written all itself
    ADD COLUMN IF NOT EXISTS refs bytea,      -- int32 pairs: of each page, which of these, and its
                                              -- number there
    ADD COLUMN IF NOT EXISTS bytes bigint,     -- of all its pages,
    ADD COLUMN IF NOT EXISTS new_bytes bigint; -- and of those that it wrote
ALTER TABLE ls_dead_letters
    ADD COLUMN IF NOT EXISTS retry_from bigint,      -- a retry was begun when the log ended here,
    ADD COLUMN IF NOT EXISTS retry_at timestamptz,   -- at this time,
    ADD COLUMN IF NOT EXISTS retried_offset bigint,  -- and the record stands again at this offset
    ADD COLUMN IF NOT EXISTS retried_at timestamptz;
CREATE OR REPLACE VIEW ls_lag AS
SELECT p.processor, p.topic, p.partition, p.next_offset, w.log_end,
       CASE WHEN w.log_end IS NOT NULL  -- greatest() would pass a null over
            THEN greatest(w.log_end - p.next_offset, 0) END AS lag,
       to_timestamp(w.event_time / 1000000000.0) AS event_time, p.updated_at, w.seen_at,
       w.owner_epoch = p.owner_epoch AND EXISTS (
           SELECT FROM pg_stat_activity a
            WHERE a.pid = w.pid AND a.backend_start = w.backend_start) AS owner_alive,
       w.stopped_at, w.why, w.remedy, to_timestamp(w.watermark / 1000000000.0) AS watermark
  FROM ls_progress p LEFT JOIN ls_watch w USING (processor, topic, partition);
CREATE OR REPLACE VIEW ls_dead AS
SELECT processor, topic, partition, "offset", to_timestamp(timestamp_ms / 1000.0) AS record_time,
       octet_length(payload) AS bytes, error, dead_at, retried_at, retried_offset
  FROM ls_dead_letters;
CREATE OR REPLACE VIEW ls_explain AS
SELECT s.processor, s.topic, t.id AS ls_topic_id, s.partition AS ls_partition, s.first_offset,
       s.next_offset, s.steps, s.events, s.rows, s.dead, s.rule_version, s.code_version,
       s.committed_at
  FROM ls_steps s JOIN ls_progress p USING (processor, topic, partition)
  JOIN ls_topics t ON t.topic_id = p.topic_id;
"""


async def create(connection: asyncpg.Connection) -> None:
    """Make what is not there."""
    newest = """SELECT EXISTS (SELECT FROM pg_attribute
                 WHERE attrelid = to_regclass('ls_progress') AND attname = 'witness')"""
    if await connection.fetchval(newest):
        return
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _DDL_LOCK)
        await connection.execute(_DDL)


async def create_table(
    connection: asyncpg.Connection, table: type[Table], processor: str | None = None
) -> None:
    """Make a result table if it is not there, and check its columns and its key if it is; note
    that `processor` writes to it.

    Raises ConfigError where they differ in name or type, StoppedPartition where a table is gone
    into which something was committed.
    """
    widths(table)
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    model = table.relation()
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _DDL_LOCK)
        if await connection.fetchval("SELECT to_regclass($1)", f'"{model.name}"') is None:
            await _check_never_there(connection, str(model.name))
            await connection.execute(str(CreateTable(model).compile(dialect=dialect)))
            if (
                table.key_columns()
            ):  # room beside each row, so that a new version needs no new entry
                #                      in the index: measured, a third less work for bars
                await connection.execute(f'ALTER TABLE "{model.name}" SET (fillfactor = 50)')
            for index in sorted(model.indexes, key=lambda each: str(each.name)):
                await connection.execute(str(CreateIndex(index).compile(dialect=dialect)))
        if processor is not None:
            await connection.execute(
                "INSERT INTO ls_results VALUES ($1, $2) ON CONFLICT DO NOTHING",
                processor, str(model.name),
            )  # fmt: skip
    found = await connection.fetch(
        """SELECT attname AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute
           WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped ORDER BY attnum""",
        f'"{model.name}"',
    )
    there = {row["name"]: row["type"].lower() for row in found}
    for column in model.columns:
        wanted = _type_name(column.type.compile(dialect))
        if there.get(column.name, "nothing") != wanted:
            raise ConfigError(
                f"table {model.name!r} in Postgres has {there.get(column.name, 'no column')} "
                f"where {table.__name__}.{column.name} is {wanted}.",
                "Rename the table (__tablename__), or migrate the one that is there.",
            )
    if not table.key_columns():
        return
    key = await connection.fetch(
        """SELECT a.attname AS name FROM pg_index i JOIN pg_attribute a
               ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
           WHERE i.indrelid = to_regclass($1) AND i.indisprimary""",
        f'"{model.name}"',
    )
    if {row["name"] for row in key} != set(table.key_columns()):
        names = ", ".join(sorted(row["name"] for row in key)) or "none"
        raise ConfigError(
            f"table {model.name!r} in Postgres has the primary key ({names}) where "
            f"{table.__name__} has ({', '.join(table.key_columns())}).",
            "Rename the table (__tablename__), or migrate the one that is there.",
        )


async def _check_never_there(connection: asyncpg.Connection, name: str) -> None:
    """An empty table in the place of one that held results would hide that they are gone."""
    if await connection.fetchval("SELECT to_regclass('ls_results')") is None:
        return
    processor = await connection.fetchval(
        """SELECT r.processor FROM ls_results r JOIN ls_progress p USING (processor)
            WHERE r.name = $1 AND p.next_offset > p.first_offset LIMIT 1""",
        name,
    )
    if processor is not None:
        raise StoppedPartition(
            f"table {name!r} is gone from Postgres: {processor} has committed results into it, and "
            "an empty one in its place would hide that.",
            "Bring it back from a backup, or make it anew with CREATE TABLE if its rows may be "
            "missing, or give the processor another name to begin anew.",
        )


async def create_staging(connection: asyncpg.Connection, table: type[Table], staging: str) -> None:
    """Make the temporary table, of this connection, that an upsert table's rows are copied into."""
    await connection.execute(
        f'CREATE TEMPORARY TABLE "{staging}" (LIKE "{table.relation().name}") ON COMMIT DELETE ROWS'
    )


def merge(table: type[Table], staging: str) -> str:
    """The statement that moves staged rows into their table: the last of each key, by offset, then
    n; keys in order, so that two that write the same ones wait for each other and never in a ring.
    """
    names = [f'"{column.name}"' for column in table.relation().columns]
    key = [f'"{name}"' for name in table.key_columns()]
    others = [name for name in names if name not in key]
    return f"""
INSERT INTO "{table.relation().name}" ({", ".join(names)})
SELECT DISTINCT ON ({", ".join(key)}) {", ".join(names)} FROM "{staging}"
 ORDER BY {", ".join(key)}, ls_offset DESC, ls_n DESC, ls_partition DESC
ON CONFLICT ({", ".join(key)}) DO UPDATE SET
       {", ".join(f"{name} = EXCLUDED.{name}" for name in others)}"""


def _type_name(compiled: str) -> str:
    name = compiled.lower()
    if name.startswith("varchar"):
        return "character varying" + name[len("varchar") :]
    return "double precision" if name.startswith(("float", "double")) else name
