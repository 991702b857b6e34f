"""Logs whose start moves: durable before it is told, files gone behind it, producers kept."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from ledgerstream.log import LogConfig, Partition, Repeat
from ledgerstream.log.epochs import EpochStart
from ledgerstream.log.markers import CHECKPOINT_NAME, read_checkpoint
from tests.log.harness import (
    CONFIG,
    DIRECT,
    JOURNAL,
    MODES,
    SMALL,
    FailingDisk,
    Running,
    log_files,
    offsets_of,
    read_all,
)

Open = Callable[..., Running]
OLD = replace(CONFIG, retention_ms=1_000)


def settled(running: Running, now_ms: int) -> None:
    """Everything is checkpointed; retention has looked at it."""
    running.drain()
    running.store.tick(now_ms)
    running.drain()
    running.drain()  # a start that was raised writes a checkpoint of its own first


def filled(running: Running, batches: int = 900, config: LogConfig = CONFIG) -> Partition:
    partition = running.create(config=config)
    for i in range(batches):
        running.append(partition, pid=9, sequence=3 * i, time=1_000 + i)
    running.settle()
    return partition


@pytest.mark.parametrize("mode", list(MODES))
def test_old_segments_go_and_the_rest_is_read_after_any_stop(open_store: Open, mode: str) -> None:
    running = open_store(MODES[mode])
    partition = filled(running, config=replace(CONFIG, retention_ms=500))
    before = len(partition.segments)
    assert before > 2
    settled(running, 2_200)
    start = partition.log_start_offset
    assert 0 < start == partition.segments[0].base_offset
    assert len(partition.segments) < before
    assert partition.segments[0].max_timestamp >= 1_700
    names = [int(path.stem) for path in log_files(running.directory)]
    assert names == [segment.base_offset for segment in partition.segments]
    for stop in ("abandon", "close"):
        assert read_all(partition) == list(range(start, 2_700))
        getattr(running, stop)()
        running = open_store(MODES[mode])
        partition = running.partition()
        assert partition.log_start_offset == start


def test_retention_by_size_keeps_the_newest_bytes(open_store: Open) -> None:
    running = open_store(DIRECT)
    partition = filled(running, config=replace(CONFIG, retention_bytes=50_000))
    whole = partition.size_bytes
    settled(running, 1)
    assert 50_000 <= partition.size_bytes < 50_000 + CONFIG.segment_bytes
    assert running.store.trims.bytes == whole - partition.size_bytes


def test_the_last_segment_goes_when_all_of_it_has_passed_its_time(open_store: Open) -> None:
    running = open_store(DIRECT)
    partition = filled(running, 5, config=OLD)
    settled(running, 10_000)
    assert partition.log_start_offset == partition.next_offset == 15
    settled(running, 10_000 + DIRECT.retention_check_ms)
    assert [segment.base_offset for segment in partition.segments] == [15]
    running.write(partition, 1, pid=9, sequence=15)
    running.abandon()
    partition = open_store(DIRECT).partition()
    assert read_all(partition) == [15, 16, 17]


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("limits", [DIRECT, JOURNAL])
def test_producers_are_not_forgotten_with_their_records(
    open_store: Open, limits: object, clean: bool
) -> None:
    """Items 21, 110; bug 15. All that the producer wrote is gone; the retry is a repeat."""
    running = open_store(limits)
    partition = filled(running, 5, config=OLD)
    settled(running, 10_000)
    for sequence in range(400):  # another one goes on
        running.append(partition, pid=10, sequence=3 * sequence, time=20_000)
    running.settle()
    settled(running, 10_000 + SMALL.retention_check_ms)
    assert partition.segments[0].base_offset > 15
    kept = partition.producers.records()
    running.close() if clean else running.abandon()
    running = open_store(limits)
    partition = running.partition()
    assert partition.producers.records() == kept
    assert running.append(partition, pid=9, sequence=12, time=1_004) == Repeat(12, 14, 1_006)


def test_producers_survive_however_far_the_checkpoint_file_is_behind(open_store: Open) -> None:
    """Item 18: of the snapshots, one that the file reaches is always there."""
    running = open_store(DIRECT)
    partition = filled(running, 300, config=replace(CONFIG, retention_bytes=0))
    settled(running, 1)
    assert partition.log_start_offset > 0
    running.store.limits = replace(DIRECT, checkpoint_ms=10**9)
    for sequence in range(900):  # many checkpoints of the partition, none of the file
        running.append(partition, pid=10, sequence=3 * sequence)
    running.settle()
    running.drain()
    kept = partition.producers.records()
    file = read_checkpoint(running.store.disk, running.directory)[partition.identity]
    assert file.recovery_point < partition.snapshot_offsets[-2]
    running.abandon()
    assert open_store(DIRECT).partition().producers.records() == kept


def test_nothing_is_told_or_removed_before_the_start_is_durable(open_store: Open) -> None:
    """Item 21."""
    running = open_store(DIRECT)
    partition = filled(running)
    running.drain()
    holding, told = threading.Event(), []
    running.store._background.queue.put(holding.wait)
    running.store.trims.raise_to(partition, 2_000, told.append)
    assert (partition.log_start_offset, told) == (0, [])
    assert log_files(running.directory)[0].stem == f"{0:020d}"
    holding.set()
    running.until(lambda: told)
    assert (partition.log_start_offset, told) == (2_000, [True])
    found = read_checkpoint(running.store.disk, running.directory)
    assert found[partition.identity].log_start_offset == 2_000


def test_a_checkpoint_that_is_written_meanwhile_does_not_lower_it(open_store: Open) -> None:
    running = open_store(DIRECT)
    partition = filled(running)
    told: list[bool] = []
    running.store.trims.raise_to(partition, 5, told.append)
    running.store.trims.raise_to(partition, 7, told.append)
    running.store.checkpoint_due = True
    running.store.tick(10**9)
    running.until(lambda: len(told) == 2)
    running.drain()
    running.abandon()
    assert open_store(DIRECT).partition().log_start_offset == 7


def test_a_start_that_cannot_be_made_durable_is_not_one(open_store: Open) -> None:
    disk = FailingDisk()
    running = open_store(DIRECT, disk=disk)
    partition = filled(running)
    disk.plant("sync", OSError(errno.ENOSPC, "No space left on device"), CHECKPOINT_NAME)
    assert running.trim(partition, 100) is False
    assert partition.log_start_offset == 0
    disk.heal()
    assert running.trim(partition, 100) is True
    assert partition.log_start_offset == 100
    partition.stop("on purpose", retriable=False)
    assert running.trim(partition, 100) is False


def test_readers_of_a_segment_that_goes_read_on(open_store: Open) -> None:
    """With its file open or not; for as long as files are kept, and no longer."""
    running = open_store(DIRECT)
    partition = filled(running)
    settled(running, 1)
    segments = partition.segments
    for segment in segments[1:]:
        running.store.disk.forget(segment.log)  # nobody had it open
    assert running.trim(partition, partition.next_offset)
    running.drain()
    assert len(log_files(running.directory)) == len(partition.segments) == 1
    for segment, following in pairwise(segments):
        data, _ = segment.read(running.store.disk.read, segment.base_offset, 10**6, segment.size)
        assert offsets_of([data]) == list(range(segment.base_offset, following.base_offset))
    assert open_and_removed(running.directory)
    running.store.tick(1 + DIRECT.file_delete_delay_ms)
    running.drain()
    assert not open_and_removed(running.directory)


def test_a_clock_that_jumps_takes_no_file_from_its_readers(open_store: Open) -> None:
    running = open_store(DIRECT)
    partition = filled(running)
    settled(running, 1)
    assert running.trim(partition, partition.next_offset)
    running.drain()
    running.store.tick(10**9, 2)
    running.drain()
    assert open_and_removed(running.directory), "who reads has time left"
    running.store.tick(0, 2 + DIRECT.file_delete_delay_ms)
    running.drain()
    assert not open_and_removed(running.directory)


def open_and_removed(directory: Path) -> list[str]:
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [link for link in links if link.startswith(str(directory)) and "(deleted)" in link]


def test_a_crash_between_the_start_and_the_files_is_finished(open_store: Open) -> None:
    running = open_store(DIRECT)
    partition = filled(running)
    settled(running, 1)
    running.store.drop = lambda partition, segments: None  # type: ignore[method-assign]
    before = log_files(running.directory)
    start = partition.segments[2].base_offset
    assert running.trim(partition, start)
    assert log_files(running.directory) == before
    running.abandon()
    running = open_store(DIRECT)
    assert int(log_files(running.directory)[0].stem) == start
    assert read_all(running.partition()) == list(range(start, 2_700))


def test_the_journal_does_not_bring_back_what_was_removed(open_store: Open) -> None:
    """Its frames hold batches of segments that are gone, and nothing complains of them."""
    running = open_store(replace(JOURNAL, journal_bytes=64 * 1024 * 1024))
    partition = filled(running)
    settled(running, 1)
    assert running.trim(partition, 2_500)
    running.drain()
    running.write(partition, 1, count=9, pid=9, sequence=2_700)
    running.abandon()
    running = open_store(JOURNAL)
    partition = running.partition()
    assert partition.failure is None
    assert partition.log_start_offset == 2_500
    assert read_all(partition) == list(range(2_500, 2_709))


def test_a_log_whose_unsynced_end_was_removed_begins_at_its_start(open_store: Open) -> None:
    """Without a sync before the answer a power cut may take what had been deleted already."""
    running = open_store(DIRECT, sync=False)
    partition = filled(running, 20)
    assert running.trim(partition, 60)
    running.abandon()
    (log,) = log_files(running.directory)
    log.write_bytes(log.read_bytes()[:500])
    running = open_store(DIRECT, sync=False)
    partition = running.partition()
    assert (partition.log_start_offset, partition.next_offset) == (60, 60)
    running.write(partition, 1)
    assert read_all(partition) == [60, 61, 62]


def file_of_epochs(running: Running) -> list[str]:
    path = running.directory / "payments-0" / "leader-epoch-checkpoint"
    return path.read_text().splitlines()[2:]


def in_epochs(running: Running, config: LogConfig = CONFIG) -> Partition:
    """Three epochs of 900 records each."""
    partition = filled(running, 300, config)
    for epoch in (4, 5):
        partition.begin_epoch(epoch)
        for i in range(300):
            running.append(partition, time=1_000 + 300 * (epoch - 3) + i)
        running.settle()
    return partition


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("by", ["retention", "delete records"])
def test_leader_epochs_below_the_start_go_with_it(open_store: Open, by: str, clean: bool) -> None:
    running = open_store(DIRECT)
    partition = in_epochs(running, replace(CONFIG, retention_ms=500))
    assert file_of_epochs(running) == ["0 0", "4 900", "5 1800"]
    if by == "retention":
        settled(running, 2_100)
    else:
        assert running.trim(partition, 1_000)
        running.drain()
    start = partition.log_start_offset
    assert 900 < start < 1_800
    for _ in range(2):
        assert file_of_epochs(running) == [f"4 {start}", "5 1800"]
        assert [partition.epoch_end(e) for e in (0, 4, 5)] == [
            (0, start), (4, 1_800), (5, 2_700),
        ]  # fmt: skip
        running.close() if clean else running.abandon()
        running = open_store(DIRECT)
        partition = running.partition()


@pytest.mark.parametrize("left", ["older", "torn", "none"])
def test_the_file_of_epochs_is_put_right_after_a_crash(open_store: Open, left: str) -> None:
    """One from before the start moved, half of one, or none: its writing was cut short."""
    running = open_store(DIRECT)
    partition = in_epochs(running)
    path = running.directory / "payments-0" / "leader-epoch-checkpoint"
    older = path.read_text()
    assert running.trim(partition, 2_000)
    running.abandon()
    if left == "none":
        path.unlink()
    else:
        path.write_text(older if left == "older" else "0\n1\n5 2")
    for _ in range(2):
        running = open_store(DIRECT)
        partition = running.partition()
        assert partition.epochs.starts() == [EpochStart(5, 2_000)]
        assert file_of_epochs(running) == ["5 2000"]
        running.write(partition, 1)
        running.abandon()
