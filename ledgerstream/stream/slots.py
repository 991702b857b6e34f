"""Numbers of workers that emit: each has one, and with it a transactional id of its own.

A slot is held by a connection to Postgres, and free when that has ended. Should two workers ever
have one, the log fences the older (`outbox`).
"""

from __future__ import annotations

import uuid

import asyncpg

from ledgerstream.stream.faults import classified

# The lowest slot whose holder's connection is gone, or one more than there are.
_TAKE_SLOT = """
WITH me AS (
    SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()
), free AS (
    SELECT slot FROM ls_slots s WHERE processor = $1 AND NOT EXISTS (
        SELECT FROM pg_stat_activity a WHERE a.pid = s.pid AND a.backend_start = s.backend_start)
     ORDER BY slot LIMIT 1
)
INSERT INTO ls_slots (processor, slot, holder, pid, backend_start)
SELECT $1, coalesce((SELECT slot FROM free),
                    (SELECT coalesce(max(slot) + 1, 0) FROM ls_slots WHERE processor = $1)),
       $2, me.pid, me.backend_start FROM me
ON CONFLICT (processor, slot) DO UPDATE
   SET holder = EXCLUDED.holder, pid = EXCLUDED.pid, backend_start = EXCLUDED.backend_start,
       taken_at = now()
RETURNING slot"""


async def take_slot(connection: asyncpg.Connection, processor: str, holder: uuid.UUID) -> int:
    """A number that no other living worker of this processor has."""
    try:
        async with connection.transaction():
            await connection.execute("LOCK ls_slots IN SHARE ROW EXCLUSIVE MODE")
            slot: int = await connection.fetchval(_TAKE_SLOT, processor, holder)
    except BaseException as error:
        raise classified(error) from error
    return slot


async def keep_slot(
    connection: asyncpg.Connection, processor: str, slot: int, holder: uuid.UUID
) -> None:
    """It is the end of this connection that frees the slot from now on."""
    try:
        await connection.execute(
            """UPDATE ls_slots s SET holder = $3, pid = a.pid, backend_start = a.backend_start
                 FROM pg_stat_activity a
                WHERE a.pid = pg_backend_pid() AND s.processor = $1 AND s.slot = $2""",
            processor, slot, holder,
        )  # fmt: skip
    except BaseException as error:
        raise classified(error) from error


async def slots_of(connection: asyncpg.Connection, processor: str) -> list[int]:
    """All that this processor's workers have ever had."""
    try:
        rows = await connection.fetch(
            "SELECT slot FROM ls_slots WHERE processor = $1 ORDER BY slot", processor
        )
    except BaseException as error:
        raise classified(error) from error
    return [row["slot"] for row in rows]
