"""What compaction keeps, seen by readers of the log: transactions.md, part G."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledgerstream.log import LogConfig, Repeat
from ledgerstream.log.cleanable import cleanable, groups
from ledgerstream.log.compaction import Newest
from ledgerstream.log.segment import Segment
from ledgerstream.wire.keyed import Keyed
from tests.log.compacting import (
    COMPACT,
    Open,
    batches_of,
    clean,
    committed,
    end,
    newest_of,
    put,
    roll,
    table,
)
from tests.log.harness import DIRECT, JOURNAL, Running, batch_of

NOW = 100_000
LATER = NOW + COMPACT.delete_retention_ms


def started(open_store: Open, **config: object) -> tuple[Running, object]:
    running = open_store(DIRECT)
    return running, running.create(config=replace(COMPACT, **config))


def kept(partition: object) -> list[tuple[int, str | None]]:
    """(offset, key) of what a read_committed reader sees."""
    return [
        (each.offset, each.key and each.key.decode())
        for each in committed(partition, partition.log_start_offset)
    ]


def test_of_each_key_the_newest_record_stays(open_store: Open) -> None:
    running, partition = started(open_store)
    put(partition, ("a", "1"), ("b", "1"), ("a", "2"))
    put(partition, ("c", "1"), ("a", "3"))
    roll(running, partition)
    put(partition, ("b", "2"))  # in the segment that is written to: it compacts nothing
    running.settle()
    clean(running, NOW)
    assert kept(partition) == [(1, "b"), (3, "c"), (4, "a"), (5, "b")]
    roll(running, partition)
    clean(running, NOW)
    assert kept(partition) == [(3, "c"), (4, "a"), (5, "b")]


@pytest.mark.parametrize("codec", range(5))
def test_offsets_times_and_order_stay_whatever_the_codec(open_store: Open, codec: int) -> None:
    running, partition = started(open_store)
    for i in range(40):
        pairs = [(f"k{(i * 7 + j) % 23}", f"v{i}.{j}" * 5) for j in range(3)]
        put(partition, *pairs, time=5_000 + i, codec=codec)
    roll(running, partition)
    before = committed(partition, 0)
    clean(running, NOW)
    for start in range(0, 120, 7):
        expected = [each for each in newest_of(before, 120) if each.offset >= start]
        assert committed(partition, start) == expected
    assert partition.latest_by_timestamp(120) == (117, 5_039)
    assert partition.offset_for_time(5_020, 120) == min(
        (each.offset, each.timestamp) for each in newest_of(before, 120) if each.timestamp >= 5_020
    )


def test_it_never_passes_the_last_stable_offset(open_store: Open) -> None:
    """Item 103."""
    running, partition = started(open_store)
    put(partition, ("a", "1"))
    put(partition, ("a", "2"))
    roll(running, partition)
    put(partition, ("x", "1"), pid=9, sequence=0, transactional=True)
    put(partition, ("a", "3"))
    put(partition, ("a", "4"))
    roll(running, partition)
    clean(running, NOW)
    assert [base for base, *_ in batches_of(partition)] == [1, 2, 3, 4]
    end(partition, 9, committed=True)
    roll(running, partition)
    clean(running, NOW)
    assert kept(partition) == [(2, "x"), (4, "a")]


def test_aborted_records_go_at_once_and_hide_nothing(open_store: Open) -> None:
    """Item 104. An aborted record is no newer value of its key."""
    running, partition = started(open_store)
    put(partition, ("a", "1"), ("b", "1"))
    put(partition, ("a", "2"), ("only", "1"), pid=9, sequence=0, transactional=True)
    end(partition, 9, committed=False)
    put(partition, ("b", "2"))
    roll(running, partition)
    clean(running, NOW)
    assert kept(partition) == [(0, "a"), (5, "b")]
    counts = [(base, count) for base, count, *_ in batches_of(partition)]
    assert counts == [(0, 1), (2, 0), (4, 1), (5, 1)]  # the producer is known by its empty batch


def test_a_marker_stays_until_its_data_is_gone_and_then_for_a_while(open_store: Open) -> None:
    """Item 105."""
    running, partition = started(open_store)
    put(partition, ("a", "1"), pid=9, sequence=0, transactional=True)
    end(partition, 9, committed=True)  # 1
    put(partition, ("b", "1"), pid=8, sequence=0, transactional=True)
    end(partition, 8, committed=False)  # 3
    for pid in (8, 9):
        partition.producers._by_id.pop(pid)  # forgotten: nothing is kept on their account
    put(partition, ("z", "1"))
    roll(running, partition)
    clean(running, NOW)
    assert [base for base, *_ in batches_of(partition)] == [0, 1, 3, 4]
    put(partition, ("a", "2"), ("z", "2"))
    roll(running, partition)
    clean(running, NOW)  # the data of 9 goes; the marker of 8 is found alone for the first time
    assert [base for base, *_ in batches_of(partition)] == [1, 3, 5]
    put(partition, ("z", "3"))
    roll(running, partition)
    clean(running, LATER - 1)
    assert [base for base, *_ in batches_of(partition)] == [1, 3, 5, 7]
    put(partition, ("z", "4"))
    roll(running, partition)
    clean(running, LATER)
    assert [base for base, *_ in batches_of(partition)] == [1, 5, 8]
    put(partition, ("z", "5"))
    roll(running, partition)
    clean(running, 2 * LATER)
    assert [base for base, *_ in batches_of(partition)] == [5, 9]


def test_a_tombstone_stays_for_a_while(open_store: Open) -> None:
    running, partition = started(open_store)
    put(partition, ("a", "1"))
    put(partition, ("a", None))
    for now_ms, there in ((NOW, True), (LATER - 1, True), (LATER, False)):
        put(partition, ("z", str(now_ms)))
        roll(running, partition)
        clean(running, now_ms)
        assert ((1, "a") in kept(partition)) is there
    assert min(kept(partition)) > (1, "a")


def test_a_tombstones_time_stays_what_it_was(open_store: Open) -> None:
    """The horizon takes the place of the base timestamp; the records' times do not move."""
    running, partition = started(open_store)
    put(partition, ("a", None), ("b", "1"), time=7_000)
    roll(running, partition)
    clean(running, NOW)
    assert [each.timestamp for each in committed(partition, 0)] == [7_000, 7_000]
    assert partition.offset_for_time(7_000, 2) == (0, 7_000)


@pytest.mark.parametrize("snapshot", [True, False])
def test_producers_are_known_by_batches_that_stay(
    open_store: Open, tmp_path: Path, snapshot: bool
) -> None:
    """Items 18, 106: without a snapshot too; all five batches, and the last marker."""
    running, partition = started(open_store)
    for sequence in range(8):
        put(partition, ("a", str(sequence)), pid=7, sequence=sequence)
    put(partition, ("a", "t"), pid=9, epoch=3, sequence=0, transactional=True)
    end(partition, 9, epoch=4, committed=False)
    put(partition, ("a", "newest"))
    roll(running, partition)
    clean(running, NOW)
    clean(running, 3 * LATER)
    before = {each.producer_id: each for each in partition.producers.records()}
    running.abandon()
    if not snapshot:
        for path in tmp_path.rglob("*.producers"):
            path.unlink()
        for path in tmp_path.rglob("checkpoint"):
            path.unlink()
    running = open_store(DIRECT)
    partition = running.partition()
    assert {each.producer_id: each for each in partition.producers.records()} == before
    repeat = batch_of(1, pid=7, sequence=3, epoch=0, value=b"3")
    assert isinstance(running.append(partition, repeat), Repeat)
    assert kept(partition) == [(10, "a")]


def test_markers_are_no_records_of_one_key(open_store: Open) -> None:
    """Item 107; bug 23."""
    running, partition = started(open_store)
    for pid in (1, 2, 3):
        put(partition, (f"k{pid}", "1"), pid=pid, sequence=0, transactional=True)
    for pid in (1, 2, 3):
        end(partition, pid, committed=pid != 2)
    roll(running, partition)
    clean(running, NOW)
    assert [base for base, _, control, _ in batches_of(partition) if control] == [3, 4, 5]
    assert kept(partition) == [(0, "k1"), (2, "k3")]


def test_a_transaction_over_many_segments_and_groups_is_one(open_store: Open) -> None:
    """Item 108; bug 16. Its marker lies in another segment, another group, another pass."""
    for aborted in (True, False):
        running, partition = started(open_store, segment_bytes=400)
        for pid in (5, 6):
            for sequence in range(4):
                put(partition, (f"p{pid}s{sequence}", "x" * 150), pid=pid, sequence=sequence,
                    transactional=True)  # fmt: skip
        running.settle()
        end(partition, 5, committed=True)
        for i in range(4):
            put(partition, (f"f{i}", "x" * 150))
        end(partition, 6, committed=not aborted)
        put(partition, ("last", "x" * 150))
        roll(running, partition)
        assert len(partition.segments) > 5
        before = committed(partition, 0)
        for now_ms in (NOW, LATER, 3 * LATER, 5 * LATER):
            clean(running, now_ms)
            put(partition, ("tick", "1"))
            roll(running, partition)
            for start in range(partition.next_offset):
                expected = [each for each in before if each.offset >= start]
                seen = [e for e in committed(partition, start) if e.key != b"tick"]
                assert seen == expected
        running.close()
        for path in Path(running.directory).rglob("*"):
            if path.is_file():
                path.unlink()
        Path(running.directory, "payments-0").rmdir()


def test_small_segments_become_one(open_store: Open) -> None:
    running, partition = started(open_store)
    for i in range(12):
        put(partition, (f"k{i % 3}", str(i)))
        roll(running, partition)
    assert len(partition.segments) == 13
    clean(running, NOW)
    assert [segment.base_offset for segment in partition.segments] == [0, 12]
    assert kept(partition) == [(9, "k0"), (10, "k1"), (11, "k2")]


def test_a_part_of_the_keys_at_a_time(open_store: Open) -> None:
    """Where there are more keys than a pass may know, it goes on with the next one."""
    running = open_store(replace(DIRECT, cleaner_keys_max=10))
    partition = running.create(config=COMPACT)
    for i in range(60):
        put(partition, (f"k{i % 30}", str(i)), ("hot", str(i)))
    roll(running, partition)
    before = committed(partition, 0)
    cleaned = []
    for _ in range(30):
        clean(running, NOW)
        cleaned.append(partition.cleaned.clean_below)
        assert table(committed(partition, 0)) == table(before)
    assert cleaned == sorted(cleaned)
    assert 0 < cleaned[0] < cleaned[-1] == 120
    assert committed(partition, 0) == newest_of(before, 120)


def test_long_keys_are_told_apart() -> None:
    newest = Newest(10, 0)
    keys = [b"x" * 31, b"x" * 32, b"x" * 40, b"x" * 40 + b"y"]
    newest.add(100, [Keyed(0, 0, 0, 0, i, key, True) for i, key in enumerate(keys)])
    assert [newest.of(key) for key in (*keys, b"other")] == [100, 101, 102, 103, -1]
    assert len(newest) == 4


def test_records_without_a_key_go(open_store: Open) -> None:
    running, partition = started(open_store)
    put(partition, (None, "1"), ("a", "1"))
    roll(running, partition)
    clean(running, NOW)
    assert kept(partition) == [(1, "a")]


def test_a_reader_gets_past_a_part_of_which_nothing_stays(open_store: Open) -> None:
    running, partition = started(open_store)
    put(partition, (None, "1"))
    put(partition, (None, "1"))
    roll(running, partition)
    clean(running, NOW)
    assert [base for base, *_ in batches_of(partition)] == [1]
    assert committed(partition, 0) == []


# what may be compacted


def segments_of(*each: tuple[int, int, int]) -> list[Segment]:
    """Of (base offset, bytes, time)."""
    out = []
    for base, size, time in each:
        segment = Segment("somewhere", base)
        segment.size, segment.max_timestamp, segment.first_timestamp = size, time, time
        out.append(segment)
    return out


FOUR = segments_of((0, 100, 10), (10, 100, 20), (20, 100, 30), (30, 100, 40))


@pytest.mark.parametrize(
    ("clean_below", "bound", "config", "expected"),
    [
        (0, 40, {}, (3, 30, 1.0, True)),
        (0, 30, {}, (3, 30, 1.0, True)),
        (0, 29, {}, (2, 20, 1.0, True)),
        (0, 9, {}, (0, 0, 0.0, False)),
        (20, 40, {}, (3, 30, 1 / 3, False)),
        (10, 40, {}, (3, 30, 2 / 3, True)),
        (20, 40, {"min_cleanable_dirty_ratio": 0.3}, (3, 30, 1 / 3, True)),
        (20, 40, {"max_compaction_lag_ms": 60}, (3, 30, 1 / 3, True)),
        (20, 40, {"max_compaction_lag_ms": 70}, (3, 30, 1 / 3, False)),
        (0, 40, {"min_compaction_lag_ms": 75}, (2, 20, 1.0, True)),
        (30, 40, {}, (3, 30, 0.0, False)),
    ],
)
def test_what_may_be_compacted(
    clean_below: int, bound: int, config: dict[str, float], expected: tuple[int, int, float, bool]
) -> None:
    found = cleanable(
        FOUR, LogConfig(cleanup_policy="compact", **config),
        clean_below=clean_below, bound=bound, now_ms=100,
    )  # fmt: skip
    assert (found.segments, found.end, found.ratio, found.due) == expected


def test_groups_are_no_larger_than_a_segment() -> None:
    bases = [[s.base_offset for s in g] for g in groups(FOUR, 40, LogConfig(segment_bytes=250))]
    assert bases == [[0, 10], [20, 30]]
    far = segments_of((0, 1, 0), (2**31 - 10, 1, 0), (2**31 + 5, 1, 0))
    found = [[s.base_offset for s in g] for g in groups(far, 2**31 + 9, LogConfig())]
    assert found == [[0, 2**31 - 10][:1], [2**31 - 10, 2**31 + 5]]


# any history

KEYS = st.sampled_from(["a", "b", "c", "d", "long" * 20, None])
WRITE = st.tuples(
    st.just("write"), st.sampled_from([-1, -1, 1, 2, 3, 11, 12]),
    st.lists(st.tuples(KEYS, st.sampled_from(["v", "w" * 60, None])), min_size=1, max_size=4),
    st.sampled_from([0, 0, 3, 4]),
)  # fmt: skip
STEP = st.one_of(
    WRITE, WRITE, WRITE,
    st.tuples(st.just("end"), st.sampled_from([1, 2, 3]), st.booleans()),
    st.just(("roll",)),
    st.tuples(st.just("clean"), st.sampled_from([0, 500, 1_500])),
    st.tuples(st.just("restart"), st.booleans()),
)  # fmt: skip


class History:
    """A store under random steps, and what all of its committed records were."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running = Running(directory, JOURNAL)
        self.partition = self.running.create(config=COMPACT)
        self.now_ms = NOW
        self.sequences: dict[int, int] = {}
        self.written: list[tuple[int, int, str | None, str | None]] = []  # pid, offset, key, value
        self.open: set[int] = set()
        self.aborted: set[int] = set()  # offsets
        self.values = 0

    def write(self, pid: int, pairs: list[tuple[str | None, str | None]], codec: int) -> None:
        self.values += 1
        pairs = [(key, value and f"{value}{self.values}") for key, value in pairs]
        transactional = 0 < pid < 10
        sequence = self.sequences.get(pid, 0) if pid >= 0 else -1
        offset = put(self.partition, *pairs, pid=pid, sequence=sequence, codec=codec,
                     transactional=transactional)  # fmt: skip
        if pid >= 0:
            self.sequences[pid] = sequence + len(pairs)
        if transactional:
            self.open.add(pid)
        self.written += [(pid, offset + i, *pair) for i, pair in enumerate(pairs)]

    def end(self, pid: int, committed: bool) -> None:
        offset = end(self.partition, pid, committed=committed)
        since = self.partition.producers
        assert pid not in since.open
        if pid in self.open and not committed:
            began = max((o for p, o, *_ in self.ends(pid)), default=-1)
            self.aborted |= {o for p, o, *_ in self.written if p == pid and began < o < offset}
        self.open.discard(pid)
        self.markers = [*getattr(self, "markers", []), (pid, offset)]

    def ends(self, pid: int) -> list[tuple[int, int]]:
        return [(p, o) for p, o in getattr(self, "markers", []) if p == pid]

    def roll(self) -> None:
        roll(self.running, self.partition)

    def clean(self, later_ms: int) -> None:
        self.now_ms += later_ms
        self.running.settle()
        clean(self.running, self.now_ms)

    def restart(self, clean_stop: bool) -> None:
        self.running.settle()
        self.running.close() if clean_stop else self.running.abandon()
        self.running = Running(self.directory, JOURNAL)
        self.partition = self.running.partition()
        self.partition.config = COMPACT

    def check(self) -> None:
        """ReadCommittedIsTheSameFromEverywhere."""
        self.running.settle()
        stable = self.partition.last_stable_offset
        true = {
            offset: (key and key.encode(), value and value.encode())
            for _, offset, key, value in self.written
            if offset < stable and offset not in self.aborted
        }
        below = self.partition.cleaned.gaps_below
        newest = {key: offset for offset, (key, _) in sorted(true.items())}
        must = {
            offset for offset, (key, value) in true.items()
            if offset >= below or (newest[key] == offset and key is not None and value is not None)
        }  # fmt: skip
        for start in range(0, stable, max(stable // 5, 1)):
            seen = committed(self.partition, start, bytes_max=300)
            for each in seen:
                assert true[each.offset] == (each.key, each.value), each
            offsets = [each.offset for each in seen]
            assert offsets == sorted(set(offsets))
            assert {offset for offset in must if offset >= start} <= set(offsets)
            all_true = {o: kv for o, kv in sorted(true.items()) if o >= start}
            expected = {key: value for key, value in all_true.values() if key is not None}
            assert table(seen) == {k: v for k, v in expected.items() if v is not None}


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(steps=st.lists(STEP, min_size=10, max_size=50))
def test_any_history_reads_the_same_before_and_after(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[object, ...]]
) -> None:
    """Items 103 to 109. Wherever a reader begins, whenever the log is compacted or restarted."""
    play(tmp_path_factory, steps)


@pytest.mark.torture
@settings(max_examples=3_000, deadline=None)
@given(steps=st.lists(STEP, min_size=20, max_size=120))
def test_any_long_history(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[object, ...]]
) -> None:
    """Items 103 to 109."""
    play(tmp_path_factory, steps)


def play(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[object, ...]]) -> None:
    history = History(tmp_path_factory.mktemp("history") / "data")
    try:
        for name, *arguments in steps:
            getattr(history, str(name))(*arguments)
            if name in ("clean", "restart"):
                history.check()
        for _ in range(2):
            history.roll()
            history.clean(1_500)
            history.check()
    finally:
        history.running.close()
