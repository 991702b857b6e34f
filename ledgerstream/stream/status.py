"""How each processor's partitions are, as Postgres knows it. Reads only."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg


@dataclass(frozen=True)
class Status:
    """One partition of a processor. Times are ns since 1970 UTC; None is not known.

    log_end:       where the log ended when its worker last looked.
    event_time:    the greatest event time of the last step.
    watermark:     of event-time windows, after the last step: what ends before it is final.
    step_events:   of the last step, or on average where old steps were merged.
    step_ms:       how long the last step took to decode and compute; commit_ms: to commit.
    state_bytes:   of the newest snapshot, taken at `snapshot_offset`.
    owner_alive:   whether the connection that holds the claim is still there.
    why, remedy:   why it stopped, and what to do; None where it has not.
    place:         module:Class, to run it.
    """

    processor: str
    topic: str
    partition: int
    next_offset: int
    log_end: int | None
    event_time: int | None
    watermark: int | None
    commit_time: int | None
    step_events: int | None
    step_ms: float | None
    commit_ms: float | None
    state_bytes: int | None
    snapshot_offset: int | None
    owner_alive: bool
    dead: int
    stopped_time: int | None
    why: str | None
    remedy: str | None
    place: str | None

    @property
    def lag(self) -> int | None:
        return None if self.log_end is None else max(self.log_end - self.next_offset, 0)


async def statuses(connection: asyncpg.Connection) -> list[Status]:
    """All partitions of all processors in this database; none where no processor ever ran."""
    if await connection.fetchval("SELECT to_regclass('ls_lag')") is None:
        return []
    return [Status(**dict(row)) for row in await connection.fetch(_STATUS)]


_STATUS = """
SELECT l.processor, l.topic, l.partition, l.next_offset, l.log_end,
       w.event_time, w.watermark, w.step_ms, w.commit_ms,
       (extract(epoch FROM s.committed_at) * 1000000)::bigint * 1000 AS commit_time,
       s.events / s.steps AS step_events,
       n.state_bytes, n.snapshot_offset,
       coalesce(l.owner_alive, false) AS owner_alive,
       (SELECT count(*) FROM ls_dead_letters d
         WHERE d.processor = l.processor AND d.topic = l.topic AND d.partition = l.partition
           AND d.retried_at IS NULL) AS dead,
       (extract(epoch FROM l.stopped_at) * 1000000)::bigint * 1000 AS stopped_time,
       l.why, l.remedy, c.class AS place
  FROM ls_lag l
  LEFT JOIN ls_watch w USING (processor, topic, partition)
  LEFT JOIN ls_processors c USING (processor)
  LEFT JOIN LATERAL (
      SELECT committed_at, events, steps FROM ls_steps s
       WHERE s.processor = l.processor AND s.topic = l.topic AND s.partition = l.partition
       ORDER BY next_offset DESC LIMIT 1) s ON true
  LEFT JOIN LATERAL (
      SELECT n.state_offset AS snapshot_offset,
             coalesce(n.bytes,  -- a snapshot of an older version has all its pages itself
                      (SELECT coalesce(sum(octet_length(g.data)), 0)::bigint
                         FROM ls_snapshot_pages g
                        WHERE g.snapshot_id = n.snapshot_id)) AS state_bytes
        FROM ls_snapshots n
       WHERE n.processor = l.processor AND n.topic = l.topic AND n.partition = l.partition
         AND n.valid
       ORDER BY state_offset DESC LIMIT 1) n ON true
 ORDER BY 1, 2, 3"""
