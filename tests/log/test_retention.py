"""Which segments go, by time and by size: plain decisions over segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledgerstream.log import LogConfig
from ledgerstream.log.retention import Start, below, start_of
from ledgerstream.log.segment import Segment

NOW = 1_000_000


def segments_of(*each: tuple[int, int, int]) -> list[Segment]:
    """Of (base offset, bytes, newest time)."""
    out = []
    for base, size, newest in each:
        segment = Segment("somewhere", base)
        segment.size, segment.max_timestamp = size, newest
        out.append(segment)
    return out


THREE = segments_of((0, 100, NOW - 300), (10, 100, NOW - 200), (20, 50, NOW - 100))


def decided(segments: Sequence[Segment] = THREE, **how: Any) -> Start:
    end = how.pop("end", 25)
    offsets = {"log_start_offset": 0, "high_watermark": end}
    offsets |= {name: how.pop(name) for name in tuple(how) if name in offsets}
    return start_of(segments, LogConfig(**how), next_offset=end, now_ms=NOW, **offsets)


def test_a_topic_keeps_its_events_for_ever_unless_it_says_otherwise() -> None:
    assert decided() == Start(0)


@pytest.mark.parametrize(
    ("retention_ms", "start"), [(400, 0), (300, 0), (299, 10), (200, 10), (199, 20), (100, 20)]
)
def test_by_time_those_go_whose_newest_record_is_too_old(retention_ms: int, start: int) -> None:
    assert decided(retention_ms=retention_ms) == Start(start)


def test_by_time_the_last_segment_goes_too_once_another_has_begun() -> None:
    assert decided(retention_ms=99) == Start(25, roll=True)
    empty = segments_of((0, 100, NOW - 300), (25, 0, -1))
    assert decided(empty, retention_ms=99) == Start(25)


def test_what_is_not_durable_does_not_go() -> None:
    assert decided(retention_ms=0, high_watermark=24) == Start(20)
    assert decided(retention_ms=0, high_watermark=19) == Start(10)


def test_an_older_segment_behind_a_newer_one_stays() -> None:
    """As in Kafka: they go from the front, or times in the future would leave holes."""
    segments = segments_of((0, 1, NOW + 50), (10, 1, NOW - 500), (20, 1, NOW))
    assert decided(segments, retention_ms=100) == Start(0)


def test_records_without_a_time_are_as_old_as_the_segment_after_them() -> None:
    segments = segments_of((0, 1, -1), (10, 1, -1), (20, 1, -1))
    assert decided(segments, retention_ms=100) == Start(0)
    segments[1].created_ms = NOW - 101
    assert decided(segments, retention_ms=100) == Start(10)


@pytest.mark.parametrize(
    ("retention_bytes", "start"), [(250, 0), (151, 0), (150, 10), (51, 10), (50, 20), (0, 20)]
)
def test_by_size_those_go_without_which_enough_remains(retention_bytes: int, start: int) -> None:
    assert decided(retention_bytes=retention_bytes) == Start(start)


def test_a_compacted_topic_is_not_deleted_unless_it_is_both() -> None:
    assert decided(cleanup_policy="compact", retention_ms=0, retention_bytes=0) == Start(0)
    both = decided(cleanup_policy="compact,delete", retention_ms=150)
    assert both == Start(20)


def test_a_start_that_was_raised_never_goes_back() -> None:
    assert decided(retention_ms=250, log_start_offset=15) == Start(15)


@given(
    bases=st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True).map(sorted),
    offset=st.integers(0, 60),
)
def test_below_counts_whole_segments(bases: list[int], offset: int) -> None:
    segments = segments_of(*((base, 1, 0) for base in bases))
    ends = [*bases[1:], None]
    assert below(segments, offset) == sum(end is not None and end <= offset for end in ends)
