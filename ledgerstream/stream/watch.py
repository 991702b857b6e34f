"""What a worker writes down for people, beside its steps: where the log ends, and why it stopped.

On a connection of its own and outside of every transaction of a step: nothing depends on it, and
where it fails the stream goes on. A worker that was overtaken does not write over its successor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import asyncpg
import structlog

from ledgerstream.errors import LedgerStreamError
from ledgerstream.limits import LIMITS
from ledgerstream.stream.connect import connect
from ledgerstream.stream.processor import Processor
from ledgerstream.stream.tables import Table

log = structlog.get_logger()


@dataclass
class _Seen:
    """One partition. `pid` is the backend of the connection that holds its claim; the epoch is None
    for one that could not be claimed."""

    owner_epoch: int | None = None
    pid: int | None = None
    log_end: int | None = None
    event_time: int | None = None
    watermark: int | None = None
    step_ms: float | None = None
    commit_ms: float | None = None
    why: str | None = None
    remedy: str | None = None


_LAST_STEP = ", ".join(  # of an earlier owner it may be older than what that one committed
    f"{column} = CASE WHEN w.owner_epoch = EXCLUDED.owner_epoch "
    f"THEN coalesce(EXCLUDED.{column}, w.{column}) ELSE EXCLUDED.{column} END"
    for column in ("event_time", "watermark", "step_ms", "commit_ms")
)
_WRITE = f"""
INSERT INTO ls_watch AS w (processor, topic, partition, owner_epoch, pid, backend_start, log_end,
                           event_time, stopped_at, why, remedy, watermark, step_ms, commit_ms)
SELECT $1, $2, s.partition, coalesce(s.epoch, p.owner_epoch), s.pid, a.backend_start, s.log_end,
       s.event_time, CASE WHEN s.why IS NOT NULL THEN now() END, s.why, s.remedy,
       s.watermark, s.step_ms, s.commit_ms
  FROM unnest($3::int[], $4::bigint[], $5::int[], $6::bigint[], $7::bigint[], $8::text[],
              $9::text[], $10::bigint[], $11::float8[], $12::float8[])
       AS s(partition, epoch, pid, log_end, event_time, why, remedy, watermark, step_ms, commit_ms)
  JOIN ls_progress p ON p.processor = $1 AND p.topic = $2 AND p.partition = s.partition
  LEFT JOIN pg_stat_activity a ON a.pid = s.pid
ON CONFLICT (processor, topic, partition) DO UPDATE SET
       owner_epoch = EXCLUDED.owner_epoch, pid = EXCLUDED.pid,
       backend_start = EXCLUDED.backend_start,
       log_end = coalesce(EXCLUDED.log_end, w.log_end),
       seen_at = now(), {_LAST_STEP},
       stopped_at = EXCLUDED.stopped_at, why = EXCLUDED.why, remedy = EXCLUDED.remedy
 WHERE w.owner_epoch <= EXCLUDED.owner_epoch"""


class Watch:
    """The notes of one worker; `run` writes them, soon after something has changed."""

    def __init__(self, database: str, processor: type[Processor]) -> None:
        self._database = database
        self._processor = processor
        self._seen: dict[int, _Seen] = {}
        self._changed: set[int] = set()
        self._tables: list[str] | None = None
        self._ring = asyncio.Event()
        self._connection: asyncpg.Connection | None = None

    def tables(self, tables: Iterable[type[Table]]) -> None:
        """The result tables that are known now."""
        self._tables = sorted({str(table.relation().name) for table in tables})
        self._ring.set()

    def claimed(self, epochs: Mapping[int, int]) -> None:
        """These partitions begin, or begin again: none of them is stopped."""
        for number, epoch in epochs.items():
            self._seen[number] = _Seen(epoch)
            self._note(number)

    def owned(self, epochs: Mapping[int, int], pid: int) -> None:
        """Their claims are held by that backend."""
        for number, epoch in epochs.items():
            seen = self._seen.setdefault(number, _Seen())
            if (seen.owner_epoch, seen.pid) != (epoch, pid):
                seen.owner_epoch, seen.pid = epoch, pid
                self._note(number)

    def moved(
        self,
        number: int,
        log_end: int,
        event_time: int | None,
        watermark: int | None,
        step_ms: float,
        commit_ms: float,
    ) -> None:
        """A step of it was committed, which took so long to compute and to commit."""
        seen = self._seen.setdefault(number, _Seen())
        seen.log_end, seen.watermark = log_end, watermark
        seen.step_ms, seen.commit_ms = step_ms, commit_ms
        seen.event_time = seen.event_time if event_time is None else event_time
        self._note(number)

    def stopped(self, number: int, error: Exception) -> None:
        """It goes no further."""
        seen = self._seen.setdefault(number, _Seen())
        seen.why = str(error.args[0] if error.args else error)
        seen.remedy = error.remedy if isinstance(error, LedgerStreamError) else ""
        self._note(number)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._ring.wait()
            self._ring.clear()
            await self.flush()
            await asyncio.sleep(LIMITS.watch_ms / 1_000)

    async def flush(self) -> None:
        """Write what has changed; where that fails it is written next time."""
        changed = sorted(self._changed)
        if not changed and self._tables is None:
            return
        self._changed.clear()
        try:
            await self._write(changed)
        except asyncio.CancelledError:
            self._changed.update(changed)
            await self.close()
            raise
        except (
            LedgerStreamError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError,
        ) as error:  # fmt: skip
            log.warning("status not written", processor=self._processor.name, error=str(error))
            self._changed.update(changed)
            await self.close()

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    def _note(self, number: int) -> None:
        self._changed.add(number)
        self._ring.set()

    async def _write(self, changed: list[int]) -> None:
        if self._connection is None:
            self._connection = await connect(self._database, f"{self._processor.name} watch")
        name, topic = self._processor.name, self._processor.source.name
        if self._tables is not None:
            place = f"{self._processor.__module__}:{self._processor.__qualname__}"
            await self._connection.execute(
                """INSERT INTO ls_processors VALUES ($1, $2, $3, $4)
                   ON CONFLICT (processor) DO UPDATE SET class = EXCLUDED.class,
                       topic = EXCLUDED.topic, tables = EXCLUDED.tables, seen_at = now()""",
                name, place, topic, self._tables,
            )  # fmt: skip
            self._tables = None
        if changed:
            seen = [self._seen[number] for number in changed]
            await self._connection.execute(
                _WRITE, name, topic, changed, [each.owner_epoch for each in seen],
                [each.pid for each in seen], [each.log_end for each in seen],
                [each.event_time for each in seen], [each.why for each in seen],
                [each.remedy for each in seen], [each.watermark for each in seen],
                [each.step_ms for each in seen], [each.commit_ms for each in seen],
            )  # fmt: skip
