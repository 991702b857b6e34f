"""Which segments are old enough to go. Pure: it answers with where the log should begin.

Whole segments go, oldest first, as in Apache Kafka: by time those whose newest record is older than
`retention.ms`, by size those without which the partition still has `retention.bytes`. The segment
that is written to stays, unless all of its records have passed their time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ledgerstream.log.config import LogConfig
from ledgerstream.log.segment import Segment


class Start(NamedTuple):
    """Where the log should begin."""

    offset: int
    roll: bool = False  # all of it is past its time: a new segment has to begin first


def below(segments: Sequence[Segment], offset: int) -> int:
    """How many whole segments lie below `offset`; the last, which is written to, never does."""
    count = 0
    while count + 1 < len(segments) and segments[count + 1].base_offset <= offset:
        count += 1
    return count


def start_of(
    segments: Sequence[Segment],
    config: LogConfig,
    *,
    log_start_offset: int,
    next_offset: int,
    high_watermark: int,
    now_ms: int,
) -> Start:
    """By the settings, at `now_ms` (ms since 1970 UTC). Nothing goes that is not durable."""
    count = 0
    if config.deletes:
        decided = below(segments, high_watermark)
        if config.retention_ms >= 0:
            last_ms = now_ms - config.retention_ms
            while count < decided and _newest_ms(segments, count, now_ms) < last_ms:
                count += 1
            active = segments[-1]
            if (
                count == len(segments) - 1
                and active.size
                and next_offset == high_watermark
                and 0 <= active.max_timestamp < last_ms
            ):
                return Start(next_offset, roll=True)
        if config.retention_bytes >= 0:
            spare = sum(each.size for each in segments[count:]) - config.retention_bytes
            while count < decided and spare >= segments[count].size:
                spare -= segments[count].size
                count += 1
    return Start(max(segments[count].base_offset if count else 0, log_start_offset))


def _newest_ms(segments: Sequence[Segment], at: int, now_ms: int) -> int:
    """The time of a sealed segment's newest record; where records have no time, when the next
    segment began, as far as we saw it."""
    if segments[at].max_timestamp >= 0:
        return segments[at].max_timestamp
    return segments[at + 1].created_ms or now_ms
