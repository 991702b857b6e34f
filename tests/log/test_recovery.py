"""After a crash: nothing acknowledged is lost, what is torn is cut, and all of it fits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ledgerstream.errors import CorruptError
from ledgerstream.log import Appended, LogConfig, Refused, Repeat, Store
from ledgerstream.log.disk import Disk
from ledgerstream.log.markers import CHECKPOINT_NAME, CLEAN_NAME, Point
from ledgerstream.log.recovery import recover
from ledgerstream.log.segment import INDEX, LOG, TIME_INDEX
from tests.log.harness import (
    CONFIG,
    DIRECT,
    JOURNAL,
    MODES,
    SMALL,
    Running,
    batch_of,
    flip,
    key_of,
    last_batch_sizes,
    log_files,
    overwrite,
    read_all,
)

Open = Callable[..., Running]
BATCHES = 12


def crashed(open_store: Open, tmp_path: Path, batches: int = BATCHES) -> Path:
    """A directory as a crash leaves it: one partition of batches of three records."""
    running = open_store(DIRECT)
    partition = running.create()
    for i in range(batches):
        running.append(partition, time=1_000 + 10 * i, pid=9, sequence=3 * i)
    running.settle()
    running.abandon()
    return tmp_path / "data" / "payments-0"


def state_after(
    directory: Path, *, recovery_point: int = 0, durable: int = 0
) -> tuple[int, int, list[int]]:
    """(next offset, bytes, sequences that are remembered)."""
    state = recover(Disk(), DIRECT, str(directory), Point(b"", recovery_point, durable, 0))
    kept = [kept.first_sequence for record in state.producers.records() for kept in record.kept]
    return state.next_offset, sum(segment.size for segment in state.segments), kept


def test_a_tail_torn_at_any_byte_is_cut_before_its_batch(open_store: Open, tmp_path: Path) -> None:
    directory = crashed(open_store, tmp_path)
    (log,) = log_files(directory)
    whole = log.read_bytes()
    last_two = last_batch_sizes(log, 2)
    for length in range(last_two[0][0], len(whole)):
        log.write_bytes(whole[:length])
        for leftover in directory.glob("*.producers"):
            leftover.unlink()
        lost = 2 if length < last_two[1][0] else 1
        batches = BATCHES - lost
        position = last_two[-lost][0]
        sequences = [3 * i for i in range(batches - 5, batches)]
        assert state_after(directory) == (3 * batches, position, sequences)
        assert log.stat().st_size == position


def test_a_damaged_byte_anywhere_in_a_batch_cuts_it(open_store: Open, tmp_path: Path) -> None:
    directory = crashed(open_store, tmp_path)
    (log,) = log_files(directory)
    whole = log.read_bytes()
    position, size = last_batch_sizes(log, 1)[0]
    leader_epoch = range(position + 12, position + 16)  # outside the CRC, and any value is good
    for at in set(range(position, position + size)) - set(leader_epoch):
        log.write_bytes(whole)
        flip(log, at)
        for leftover in directory.glob("*.producers"):
            leftover.unlink()
        assert state_after(directory)[:2] == (3 * (BATCHES - 1), position), at


def test_garbage_and_zeros_after_the_end_are_cut(open_store: Open, tmp_path: Path) -> None:
    directory = crashed(open_store, tmp_path)
    (log,) = log_files(directory)
    whole = log.read_bytes()
    for tail in (bytes(5_000), b"\xff" * 5_000, whole[:200], os.urandom(100)):
        log.write_bytes(whole + tail)
        assert state_after(directory)[:2] == (3 * BATCHES, len(whole))


@pytest.mark.parametrize("known", [{"recovery_point": 36}, {"durable": 36}])
def test_a_log_that_ends_below_what_was_acknowledged_is_not_touched(
    open_store: Open, tmp_path: Path, known: dict[str, int]
) -> None:
    directory = crashed(open_store, tmp_path)
    (log,) = log_files(directory)
    whole = log.read_bytes()
    damaged = whole[:100] + b"?" + whole[101:]
    for content in (damaged, whole[:-1], b""):
        log.write_bytes(content)
        with pytest.raises(CorruptError, match="had been synced"):
            state_after(directory, **known)
        assert log.read_bytes() == content  # nothing was thrown away


def test_a_partition_that_cannot_be_recovered_lets_the_others_run(
    open_store: Open, tmp_path: Path
) -> None:
    running = open_store(DIRECT)
    for index in range(3):
        running.write(running.create(index), 40)
    running.drain()
    running.store.tick(10_000)
    running.drain()
    running.abandon()
    flip(log_files(tmp_path / "data" / "payments-1")[0], 100)
    for start in range(3):  # what had been acknowledged is known at every later start too
        running = open_store(DIRECT)
        failure = running.partition(1).failure
        assert failure is not None
        assert "payments-1 cannot be recovered" in failure
        for index in (0, 2):
            assert read_all(running.partition(index)) == list(range(120 + 3 * start))
            running.write(running.partition(index), 1)
        running.store.tick(10_000)
        running.drain()
        running.abandon() if start else running.close()


def test_a_partition_whose_directory_is_gone_is_stopped_and_not_begun_anew(
    open_store: Open, tmp_path: Path
) -> None:
    running = open_store(DIRECT)
    for index in range(2):
        running.write(running.create(index), 40)
    running.drain()
    running.store.tick(10_000)
    running.drain()
    running.abandon()
    shutil.rmtree(tmp_path / "data" / "payments-1")
    for start in range(3):
        running = open_store(DIRECT)
        lost = running.create(1)  # as the catalogue asks for it
        assert lost.failure is not None
        assert "held acknowledged records below offset 120" in lost.failure
        assert isinstance(running.append(lost), Refused)
        running.write(running.partition(0), 1)
        running.store.tick(10_000)
        running.drain()
        running.abandon() if start else running.close()
    running = open_store(DIRECT)
    running.store.delete(running.create(1).key)  # the operator gives it up
    running.write(running.store.create(key_of(1, topic_id=uuid.UUID(int=8)), CONFIG, 1_000), 1)


def test_a_whole_log_is_read_again_without_snapshot_or_checkpoint(
    open_store: Open, tmp_path: Path
) -> None:
    running = open_store(DIRECT)
    partition = running.create()
    for i in range(600):
        running.append(partition, time=1_000 + 10 * i, pid=9, sequence=3 * i)
    running.settle()
    producers = partition.producers.records()
    segments = [(s.base_offset, s.size) for s in partition.segments]
    assert len(segments) > 1
    running.abandon()
    for suffix in (".producers", INDEX, TIME_INDEX, CHECKPOINT_NAME):
        for path in log_files(tmp_path / "data", suffix):
            path.unlink()
    partition = open_store(DIRECT).partition()
    assert partition.producers.records() == producers
    assert [(s.base_offset, s.size) for s in partition.segments] == segments
    assert read_all(partition) == list(range(1_800))
    assert partition.offset_for_time(3_005, 1_800) == (603, 3_010)


def test_a_damaged_snapshot_is_passed_over(open_store: Open, tmp_path: Path) -> None:
    running = open_store(DIRECT)
    partition = running.create()
    for i in range(600):
        running.append(partition, pid=9, sequence=3 * i)
    running.settle()
    running.drain()
    running.store.tick(10_000)
    running.drain()
    producers = partition.producers.records()
    assert partition.recovery_point > 0
    running.abandon()
    snapshots = log_files(tmp_path / "data", ".producers")
    assert len(snapshots) >= 2
    overwrite(snapshots[-1], 20, b"damage")
    assert open_store(DIRECT).partition().producers.records() == producers


def test_rebuilt_indexes_equal_the_live_ones(open_store: Open, tmp_path: Path) -> None:
    """Byte for byte, but for the entries that checkpoints add to the time index."""
    limits = replace(DIRECT, checkpoint_bytes=10**9)
    running = open_store(limits)
    partition = running.create()
    for i in range(900):
        running.append(partition, time=1_000 + (i * 37) % 500 + i)
    running.settle()
    running.abandon()
    directory = tmp_path / "data" / "payments-0"
    sealed = [s.base_offset for s in partition.segments[:-1]]
    assert sealed
    names = [f"{base:020d}{suffix}" for base in sealed for suffix in (INDEX, TIME_INDEX)]
    live = {name: (directory / name).read_bytes() for name in names}
    for name in names:
        (directory / name).unlink()
    recover(Disk(), limits, str(directory))
    assert {name: (directory / name).read_bytes() for name in names} == live


def test_index_entries_that_a_power_cut_left_as_zeros_are_dropped(
    open_store: Open, tmp_path: Path
) -> None:
    limits = replace(DIRECT, segment_bytes=10**9)
    running = open_store(limits)
    partition = running.create(config=LogConfig(index_interval_bytes=1_000))
    for i in range(300):
        running.append(partition, time=1_000 + 10 * i)
    running.settle()
    running.drain()
    running.store.tick(10_000)
    running.drain()
    recovery_point = partition.recovery_point
    assert 0 < recovery_point < partition.next_offset
    times = [partition.offset_for_time(t, 900) for t in range(900, 4_100, 50)]
    running.abandon()
    for suffix in (INDEX, TIME_INDEX):
        for path in log_files(tmp_path / "data", suffix):
            path.write_bytes(path.read_bytes() + bytes(1_200))
    partition = open_store(limits).partition()
    assert [partition.offset_for_time(t, 900) for t in range(900, 4_100, 50)] == times
    for suffix, size in ((INDEX, 8), (TIME_INDEX, 12)):
        (path,) = log_files(tmp_path / "data", suffix)
        content = path.read_bytes()
        entries = [content[at : at + size] for at in range(0, len(content), size)]
        assert entries == sorted(set(entries))
        assert bytes(size) not in entries


def test_recovery_is_the_same_the_second_time(open_store: Open, tmp_path: Path) -> None:
    directory = crashed(open_store, tmp_path)
    (log,) = log_files(directory)
    log.write_bytes(log.read_bytes()[:-7])
    assert state_after(directory) == state_after(directory)


def test_the_log_start_survives_a_crash(open_store: Open) -> None:
    running = open_store()
    running.write(running.create(), 10)
    assert running.trim(running.partition(), 7)
    running.abandon()
    assert open_store().partition().log_start_offset == 7


def test_leader_epochs_survive_a_crash(open_store: Open, tmp_path: Path) -> None:
    running = open_store()
    partition = running.create()
    running.write(partition, 1)
    partition.begin_epoch(4)
    running.write(partition, 2)
    assert [partition.epoch_end(e) for e in (0, 2, 4, 5)] == [(0, 3), (0, 3), (4, 9), (-1, -1)]
    running.abandon()
    (tmp_path / "data" / "payments-0" / "leader-epoch-checkpoint").unlink()
    running = open_store()
    partition = running.partition()
    assert [partition.epoch_end(e) for e in (0, 2, 4, 5)] == [(0, 3), (0, 3), (4, 9), (-1, -1)]
    assert partition.leader_epoch == 4


# the journal


def journaled(open_store: Open, tmp_path: Path, rounds: int = 20, partitions: int = 4) -> Path:
    """Partitions whose batches are durable in the journal and in no segment."""
    running = open_store(replace(JOURNAL, checkpoint_bytes=10**9))
    logs = [running.create(index) for index in range(partitions)]
    for i in range(rounds):
        for log in logs:
            running.append(log, pid=9, sequence=3 * i)
        running.settle()
    stats = running.store.stats
    assert stats.journal_rounds > 0
    before = tmp_path / "before"
    shutil.copytree(tmp_path / "data", before)  # what a crash at this moment leaves
    running.abandon()
    return before


def test_the_journal_fills_what_the_segments_lost(open_store: Open, tmp_path: Path) -> None:
    before = journaled(open_store, tmp_path)
    assert sum(path.stat().st_size for path in log_files(before)) < 4 * 20 * 100
    store = Store.open(before, JOURNAL)
    for partition in store.partitions():
        assert partition.failure is None
        assert read_all(partition) == list(range(60))
        assert [k.first_sequence for k in partition.producers.records()[0].kept] == [
            45, 48, 51, 54, 57,
        ]  # fmt: skip
    store.close()


@pytest.mark.parametrize("keep", [0, 1, 150, 1_000])
def test_the_journal_goes_on_where_a_segment_is_torn(
    open_store: Open, tmp_path: Path, keep: int
) -> None:
    before = journaled(open_store, tmp_path)
    full = recovered_bytes(before, tmp_path / "full")
    for path in log_files(before):
        path.write_bytes(full[path.parent.name][:keep])
    assert recovered_bytes(before, tmp_path / "again") == full


def recovered_bytes(directory: Path, copy: Path) -> dict[str, bytes]:
    """Of each partition's first segment, after recovery of a copy."""
    shutil.copytree(directory, copy)
    Store.open(copy, JOURNAL).close()
    return {path.parent.name: path.read_bytes() for path in log_files(copy)}


def test_a_torn_frame_is_not_used_beyond_its_whole_batches(
    open_store: Open, tmp_path: Path
) -> None:
    before = journaled(open_store, tmp_path, rounds=3)
    journal = before / "a.journal"
    data = journal.read_bytes()
    used = len(data.rstrip(b"\0"))
    for cut in range(used - 600, used, 7):
        copy = tmp_path / f"cut-{cut}"
        shutil.copytree(before, copy)
        (copy / "a.journal").write_bytes(data[:cut] + bytes(len(data) - cut))
        store = Store.open(copy, JOURNAL)
        for partition in store.partitions():
            assert partition.failure is None
            assert read_all(partition) == list(range(partition.next_offset))
            assert partition.next_offset >= 3
        store.close()
        shutil.rmtree(copy)


def test_a_recovered_journal_is_not_applied_again(open_store: Open, tmp_path: Path) -> None:
    before = journaled(open_store, tmp_path, rounds=2)
    Store.open(before, JOURNAL).close()
    (before / CLEAN_NAME).unlink()
    (before / CHECKPOINT_NAME).unlink()
    for path in log_files(before):
        path.write_bytes(b"")
    store = Store.open(before, JOURNAL)
    assert [partition.next_offset for partition in store.partitions()] == [0] * 4
    store.close()


def test_a_segment_that_ends_early_is_filled_before_the_next_is_read(
    open_store: Open, tmp_path: Path
) -> None:
    """A batch that is in the journal alone, a roll, then a synced batch in the new segment."""
    limits = replace(JOURNAL, checkpoint_bytes=10**9, round_direct_files_max=1)
    running = open_store(limits)
    first, other = running.create(0), running.create(1)
    while len(first.segments) == 1:
        running.append(first, value=b"v" * 3_000)
        running.append(other)
        running.settle()
    running.write(first, 1)  # alone in its round: synced in its own file
    before = tmp_path / "before"
    shutil.copytree(tmp_path / "data", before)
    end = first.next_offset
    running.abandon()
    sealed = log_files(before / "payments-0")[0]
    data = sealed.read_bytes()
    sealed.write_bytes(data[: len(data) // 3])
    (before / CHECKPOINT_NAME).unlink(missing_ok=True)
    store = Store.open(before, limits)
    partition = store.get(key_of(0))
    assert partition is not None
    assert read_all(partition) == list(range(end))
    store.close()


# kill -9


APPENDER = """
import json, sys, random
from pathlib import Path
from tests.log.harness import MODES, Running, batch_of
from ledgerstream.log import Appended, Repeat

directory, mode, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
chance = random.Random(seed)
running = Running(directory, MODES[mode])
logs = running.store.partitions() or [running.create(i) for i in range(12)]
told = {log.key.index: log.next_offset for log in logs}
now = 0
while True:
    for log in chance.sample(logs, chance.choice((1, 3, 12))):
        sequence = log.next_offset
        size = chance.choice((10, 200, 4_000))
        batch = batch_of(3, pid=9, sequence=sequence, value=bytes(size))
        answer = running.append(log, batch)
        assert isinstance(answer, Appended), answer
    if chance.random() < 0.7:
        running.settle()
        moved = {
            log.key.index: log.high_watermark
            for log in logs if log.high_watermark > told[log.key.index]
        }
        told.update(moved)
        print(json.dumps(moved), flush=True)
    if chance.random() < 0.1:
        now += 10_000
        running.store.tick(now)
"""


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.torture)])
@pytest.mark.parametrize("mode", list(MODES))
def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path, mode: str, kills: int) -> None:
    chance = random.Random(mode)
    acknowledged: dict[str, int] = {}
    for kill in range(kills):
        acknowledged |= _append_until_killed(tmp_path / "data", mode, kill, chance)
        running = Running(tmp_path / "data", MODES[mode])
        for partition in running.store.partitions():
            assert partition.failure is None
            end = partition.high_watermark
            assert end >= acknowledged.get(str(partition.key.index), 0), partition.key
            assert read_all(partition) == list(range(end))
            if end:
                again = batch_of(3, pid=9, sequence=end - 3, value=b"")
                assert running.append(partition, again) == Repeat(end - 3, end - 1, 1_002)
        running.close() if kill % 2 else running.abandon()
    assert sum(acknowledged.values()) > 300


def _append_until_killed(
    directory: Path, mode: str, seed: int, chance: random.Random
) -> dict[str, int]:
    child = subprocess.Popen(
        [sys.executable, "-c", APPENDER, str(directory), mode, str(seed)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    acknowledged: dict[str, int] = {}
    for _ in range(chance.randrange(5, 120)):
        acknowledged |= json.loads(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read().splitlines(keepends=True)
    for line in rest:
        if line.endswith(b"\n"):
            acknowledged |= json.loads(line)
    child.stdout.close()
    child.wait()
    return acknowledged


def test_a_crash_in_the_middle_of_recovery_is_recovered_from(
    open_store: Open, tmp_path: Path
) -> None:
    """Half of the partitions recovered, nothing of it noted."""
    before = journaled(open_store, tmp_path)
    store = Store.open(before, JOURNAL)
    store._lock = None
    assert {partition.next_offset for partition in store.partitions()} == {60}
    again = Store.open(before, JOURNAL)
    assert {partition.next_offset for partition in again.partitions()} == {60}
    again.close()


def test_a_store_without_partitions_opens_and_closes(tmp_path: Path) -> None:
    for _ in range(2):
        store = Store.open(tmp_path / "data", SMALL)
        assert store.partitions() == []
        store.close()


def test_a_running_store_can_be_appended_to_after_recovery(
    open_store: Open, tmp_path: Path
) -> None:
    directory = crashed(open_store, tmp_path)
    (log,) = log_files(directory, LOG)
    log.write_bytes(log.read_bytes()[:-1])
    running = open_store(DIRECT)
    end = running.partition().next_offset
    assert running.append(running.partition()) == Appended(end, end + 2, -1)
    running.settle()
    assert read_all(running.partition()) == list(range(end + 3))
