"""Which part of a log may be compacted, whether it is worth it, and in which pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ledgerstream.log.config import LogConfig
from ledgerstream.log.index import OFFSET_ENTRY_BYTES
from ledgerstream.log.retention import below
from ledgerstream.log.segment import RELATIVE_OFFSET_MAX, Segment


class Cleanable(NamedTuple):
    """The first of a log's segments may be compacted; the dirty ones begin at offset `start`."""

    segments: int  # how many, from the first
    start: int
    end: int  # of them all
    dirty_bytes: int
    ratio: float  # of the bytes that may be compacted, those that never were
    due: bool


def cleanable(
    segments: Sequence[Segment], config: LogConfig, *, clean_below: int, bound: int, now_ms: int
) -> Cleanable:
    """`bound`: neither the last stable offset nor what a recovery believes may be passed.

    Due by `min.cleanable.dirty.ratio`, or by `max.compaction.lag.ms` of the oldest that is dirty.
    """
    count = below(segments, bound)
    lag_ms = config.min_compaction_lag_ms
    for at in range(count):
        young = lag_ms > 0 and segments[at].max_timestamp > now_ms - lag_ms
        if young and segments[at + 1].base_offset > clean_below:
            count = at
            break
    end = segments[count].base_offset
    dirty = [segments[at] for at in range(count) if segments[at + 1].base_offset > clean_below]
    dirty_bytes = sum(segment.size for segment in dirty)
    total = sum(segment.size for segment in segments[:count])
    ratio = dirty_bytes / total if total else 0.0
    late = any(
        0 <= segment.first_timestamp < now_ms - config.max_compaction_lag_ms for segment in dirty
    )
    due = dirty_bytes > 0 and (ratio > config.min_cleanable_dirty_ratio or late)
    start = max(clean_below, segments[0].base_offset)
    return Cleanable(count, min(start, end), end, dirty_bytes, ratio, due)


def groups(segments: Sequence[Segment], end: int, config: LogConfig) -> list[list[Segment]]:
    """Neighbours that fit into one segment together; `end` is where the last of them ends."""
    out: list[list[Segment]] = []
    size = entries = 0
    for at, segment in enumerate(segments):
        following = segments[at + 1].base_offset if at + 1 < len(segments) else end
        size += segment.size
        entries += len(segment.offsets)
        fits = (
            out
            and size <= config.segment_bytes
            and entries * OFFSET_ENTRY_BYTES <= config.segment_index_bytes
            and following - 1 - out[-1][0].base_offset <= RELATIVE_OFFSET_MAX
        )
        if fits:
            out[-1].append(segment)
        else:
            out.append([segment])
            size, entries = segment.size, len(segment.offsets)
    return out
