"""Write rounds, failures of the disk, starting and stopping."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from kio.schema.errors import ErrorCode

from ledgerstream.errors import DirectoryInUse
from ledgerstream.limits import KIB, LIMITS, MIB
from ledgerstream.log import Appended, LogConfig, Partition, PartitionKey, Refused, Repeat, Store
from ledgerstream.log.disk import Disk
from ledgerstream.log.journal import OWED_NAME
from ledgerstream.log.markers import CLEAN_NAME
from tests.log.harness import (
    CONFIG,
    DIRECT,
    JOURNAL,
    MODES,
    SMALL,
    FailingDisk,
    Running,
    batch_of,
    key_of,
    log_files,
    read_all,
)

Open = Callable[..., Running]
FULL = OSError(errno.ENOSPC, "No space left on device")
BROKEN = OSError(errno.EIO, "Input/output error")


# rounds


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("sync", [True, False])
def test_what_is_appended_is_read_after_any_stop(open_store: Open, mode: str, sync: bool) -> None:
    running = open_store(MODES[mode], sync=sync)
    logs = [running.create(index) for index in range(5)]
    for i in range(150):
        for log in logs[: 1 + i % 5]:
            running.append(log, value=bytes(i * 10), time=1_000 + i)
        if i % 10 == 0:
            running.settle()
    running.settle()
    ends = [log.next_offset for log in logs]
    assert [read_all(log) for log in logs] == [list(range(end)) for end in ends]
    running.close()
    running = open_store(MODES[mode], sync=sync)
    logs = [running.partition(index) for index in range(5)]
    assert [read_all(log) for log in logs] == [list(range(end)) for end in ends]
    assert running.store.stats.rounds == 0


def test_nothing_is_visible_before_its_round_is_done(open_store: Open) -> None:
    running = open_store()
    partition = running.create()
    running.append(partition)
    assert (partition.next_offset, partition.high_watermark) == (3, 0)
    assert partition.read(0, 1_000, partition.high_watermark).data == []
    running.settle()
    assert partition.high_watermark == 3


def test_a_round_tells_which_partitions_moved(open_store: Open) -> None:
    running = open_store()
    first, second = running.create(0), running.create(1)
    running.write(first, 1)
    running.write(second, 1)
    assert running.rounds == [[first], [second]]


def test_one_dirty_file_is_synced_once_a_round(open_store: Open) -> None:
    disk = FailingDisk()
    running = open_store(DIRECT, disk=disk)
    partition = running.create()
    running.write(partition, 1)
    disk.syncs.clear()
    rounds = running.store.stats.rounds
    running.write(partition, 50)
    assert len(disk.syncs) == running.store.stats.rounds - rounds
    assert set(disk.syncs) == {partition.segments[0].log.path}


def test_many_dirty_files_are_one_sync_of_the_journal(open_store: Open) -> None:
    disk = FailingDisk()
    running = open_store(JOURNAL, disk=disk)
    logs = [running.create(index) for index in range(40)]
    for log in logs:
        running.append(log)
    running.settle()
    disk.syncs.clear()
    rounds = running.store.stats.rounds
    for log in logs:
        running.append(log)
    running.settle()
    assert len(disk.syncs) == running.store.stats.rounds - rounds
    assert {Path(path).name for path in disk.syncs} == {"a.journal"}


def test_a_journal_is_used_again_only_when_its_segments_are_synced(open_store: Open) -> None:
    disk = FailingDisk()
    running = open_store(replace(JOURNAL, checkpoint_bytes=10**9), disk=disk)
    logs = [running.create(index, LogConfig()) for index in range(4)]
    used: list[str] = []
    for i in range(400):
        running.append(logs[i % 4], value=bytes(9_000))
        if i % 20 == 0:
            running.settle()
    running.settle()
    running.drain()
    for name in (Path(path).name for path in disk.syncs if "partition.metadata" not in path):
        if not used or used[-1] != name:
            used.append(name)
    turns = [at for at, name in enumerate(used) if name.endswith(".journal")]
    journals = [used[at] for at in turns]
    assert journals.count("a.journal") >= 2
    for path in log_files(running.directory):
        assert str(path) in disk.syncs
    for log in logs:
        assert read_all(log) == list(range(log.next_offset))


def test_without_sync_nothing_is_synced_in_a_round(open_store: Open) -> None:
    disk = FailingDisk()
    running = open_store(SMALL, sync=False, disk=disk)
    running.write(running.create(), 10)
    assert disk.syncs == [str(running.directory / "checkpoint.new")]


def test_segments_roll_by_size_and_their_bases_are_their_names(open_store: Open) -> None:
    running = open_store()
    partition = running.create(config=LogConfig(segment_bytes=1_000))
    running.write(partition, 12)
    bases = [segment.base_offset for segment in partition.segments]
    assert bases == [0, 12, 24]
    directory = running.directory / "payments-0"
    assert [path.name for path in log_files(directory)] == [f"{base:020d}.log" for base in bases]


def test_segments_roll_by_the_records_time(open_store: Open) -> None:
    running = open_store()
    partition = running.create(config=LogConfig(segment_ms=1_000))
    for at in (5_000, 5_500, 6_001, 6_003, 5_000, 8_000):
        running.append(partition, time=at, count=1)
    running.settle()
    assert [segment.base_offset for segment in partition.segments] == [0, 2, 5]


def test_segments_roll_when_an_index_is_full(open_store: Open) -> None:
    running = open_store()
    config = LogConfig(index_interval_bytes=0, segment_index_bytes=8 * 5)
    partition = running.create(config=config)
    running.write(partition, 14)
    assert [segment.base_offset for segment in partition.segments] == [0, 18, 36]


def test_a_batch_larger_than_a_segment_is_refused(open_store: Open) -> None:
    running = open_store()
    partition = running.create(config=LogConfig(segment_bytes=1_000))
    verdict = running.append(partition, value=bytes(2_000))
    assert isinstance(verdict, Refused)
    assert verdict.code == ErrorCode.record_list_too_large
    assert partition.next_offset == 0


def test_a_sealed_segment_is_synced_behind_the_round(open_store: Open) -> None:
    disk = FailingDisk()
    running = open_store(SMALL, sync=False, disk=disk)
    partition = running.create(config=LogConfig(segment_bytes=1_000))
    running.write(partition, 12)
    running.drain()
    for segment in partition.segments[:-1]:
        assert {segment.log.path, segment.time_index.path} <= set(disk.syncs)


def test_log_append_time_is_stamped_into_the_batch(open_store: Open) -> None:
    running = open_store()
    partition = running.create(config=LogConfig(message_timestamp_type="LogAppendTime"))
    batch = batch_of(2, time=5, pid=9, sequence=0)
    assert running.append(partition, batch, now_ms=4_711) == Appended(0, 1, 4_711)
    assert running.append(partition, batch, now_ms=9_999) == Repeat(0, 1, 4_711)
    running.settle()
    assert partition.offset_for_time(4_711, 2) == (0, 4_711)
    running.abandon()
    partition = open_store().partition()
    assert partition.next_offset == 2
    assert running.append(partition, batch) == Repeat(0, 1, 4_711)


# a disk that refuses


@pytest.mark.parametrize("mode", ["direct", "journal"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_stops_its_partition_until_there_is_room(
    open_store: Open, mode: str, code: int
) -> None:
    disk = FailingDisk()
    running = open_store(MODES[mode], disk=disk)
    full, well = running.create(0), running.create(1)
    for i in range(10):
        running.append(full, pid=9, sequence=3 * i)
    running.write(well, 10)
    running.drain()
    partition_path = "payments-0/"
    disk.plant("write", OSError(code, os.strerror(code)), partition_path)
    for i in range(10, 14):
        running.append(full, pid=9, sequence=3 * i)
    running.settle()
    if mode == "journal":  # acknowledged by the journal; the segment refuses behind the round
        assert full.high_watermark == 42
        running.store.tick(10_000)
    running.until(lambda: full.failure)
    assert os.strerror(code) in str(full.failure)
    acknowledged = full.high_watermark
    assert full.next_offset == acknowledged == (42 if mode == "journal" else 30)
    refused = running.append(full)
    assert isinstance(refused, Refused)
    assert refused.code == ErrorCode.kafka_storage_error
    running.write(well, 5)
    assert read_all(well) == list(range(45))

    running.store.tick(20_000)
    running.store.tick(20_000 + LIMITS.storage_retry_ms)
    if mode == "journal":  # it is tried, and refuses again
        running.until(lambda: full.retriable)
        running.store.tick(30_000)
    disk.heal()
    running.store.tick(40_000)
    running.until(lambda: full.failure is None)
    assert full.next_offset == acknowledged
    again = running.append(full, pid=9, sequence=acknowledged - 3)
    assert again == Repeat(acknowledged - 3, acknowledged - 1, 1_002)
    assert isinstance(running.append(full, pid=9, sequence=acknowledged), Appended)
    running.settle()
    assert read_all(full) == list(range(acknowledged + 3))
    running.close()
    assert read_all(open_store(MODES[mode]).partition(0)) == list(range(acknowledged + 3))


@pytest.mark.parametrize("what", ["checkpoint", CLEAN_NAME])
def test_a_stop_on_a_full_disk_is_clean_but_for_its_marker(open_store: Open, what: str) -> None:
    disk = FailingDisk()
    running = open_store(DIRECT, disk=disk)
    log = running.create()
    running.write(log, 20)
    disk.plant("write", FULL, what)
    running.close()
    assert not (running.directory / CLEAN_NAME).exists()
    assert read_all(open_store(DIRECT).partition()) == list(range(60))


def test_a_write_error_that_is_not_about_room_needs_a_restart(open_store: Open) -> None:
    disk = FailingDisk()
    running = open_store(DIRECT, disk=disk)
    partition = running.create()
    running.write(partition, 5)
    disk.plant("write", BROKEN, "payments-0/")
    running.append(partition)
    running.until(lambda: partition.failure)
    disk.heal()
    running.store.tick(10**9)
    running.store.tick(2 * 10**9)
    assert partition.failure is not None
    assert read_all(partition) == list(range(15))
    running.close()
    partition = open_store(DIRECT).partition()
    assert partition.failure is None
    assert partition.next_offset == 15


def test_a_failed_sync_is_never_repeated(open_store: Open) -> None:
    disk = FailingDisk()
    running = open_store(DIRECT, disk=disk)
    broken, well = running.create(0), running.create(1)
    running.write(broken, 5)
    running.write(well, 5)
    path = broken.segments[0].log.path
    disk.plant("sync", FULL, path)
    before = disk.syncs.count(path)
    running.append(broken)
    running.until(lambda: broken.failure)
    disk.heal()
    for now_ms in range(0, 10**6, 10**4):
        running.store.tick(now_ms)
    running.drain()
    running.write(well, 5)
    running.close()
    assert disk.syncs.count(path) == before + 1
    assert broken.failure is not None
    assert broken.high_watermark == 15
    assert read_all(open_store(DIRECT).partition(1)) == list(range(30))


def test_what_waits_behind_a_failed_batch_is_thrown_away_with_it(open_store: Open) -> None:
    disk = FailingDisk()
    running = open_store(DIRECT, disk=disk)
    partition = running.create()
    running.write(partition, 2)
    disk.plant("write", FULL, "payments-0/")
    for _ in range(3):
        running.append(partition)
        running.drain()  # the outcome waits in the loop's queue: these go in before it is known
        if partition.failure is None:
            continue
    running.until(lambda: partition.failure)
    assert partition.next_offset == partition.high_watermark == 6
    assert read_all(partition) == list(range(6))


def test_a_failed_journal_stops_the_store(open_store: Open) -> None:
    disk = FailingDisk()
    running = open_store(JOURNAL, disk=disk)
    logs = [running.create(index) for index in range(12)]
    for log in logs:
        running.append(log)
    running.settle()
    disk.plant("sync", BROKEN, "a.journal")
    for log in logs:
        running.append(log)
    running.until(lambda: running.fatal)
    assert "journal" in running.fatal[0]
    for log in logs:
        assert log.next_offset == log.high_watermark == 3
        assert isinstance(running.append(log), Refused)
    running.close()
    assert not (running.directory / CLEAN_NAME).exists()
    disk.heal()
    running = open_store(JOURNAL)
    assert all(log.next_offset >= 3 for log in running.store.partitions())


def test_a_segment_that_cannot_be_synced_keeps_its_journal(open_store: Open) -> None:
    """Acknowledged by the journal, then the lazy sync fails: the journal is the only copy."""
    disk = FailingDisk()
    limits = replace(JOURNAL, checkpoint_bytes=10**9, journal_bytes=1 * MIB)
    running = open_store(limits, disk=disk)
    broken, well = running.create(0, LogConfig()), running.create(1, LogConfig())
    for i in range(5):
        running.append(broken, pid=9, sequence=3 * i)
    running.settle()
    disk.plant("sync", BROKEN, "payments-0/")
    while broken.failure is None:
        running.write(well, 1, value=bytes(20_000))
    running.drain()
    assert (running.directory / "a.1.journal").exists()
    while running.store.stats.bytes < 4 * MIB:  # every other journal is used again
        running.write(well, 1, value=bytes(20_000))
    running.abandon()
    log_files(running.directory / "payments-0")[0].write_bytes(b"")  # the kernel dropped it
    running = open_store(limits)
    assert read_all(running.partition(0)) == list(range(15))
    assert read_all(running.partition(1)) == list(range(well.next_offset))
    assert [path.name for path in sorted(running.directory.glob("*.journal"))] == [
        "a.journal",
        "b.journal",
    ]


def test_without_room_for_a_journal_every_file_is_synced(open_store: Open) -> None:
    disk = FailingDisk()
    disk.plant("write", FULL, ".journal")
    running = open_store(JOURNAL, disk=disk)
    logs = [running.create(index) for index in range(12)]
    for log in logs:
        running.append(log)
    running.settle()
    assert not running.fatal
    assert running.store.stats.journal_rounds == 0
    assert {log.segments[0].log.path for log in logs} <= set(disk.syncs)
    disk.heal()
    for log in logs:
        running.append(log)
    running.settle()
    assert running.store.stats.journal_rounds > 0


def test_a_journal_goes_on_where_there_is_no_room_to_say_that_it_is_owed(open_store: Open) -> None:
    disk = FailingDisk()
    disk.plant("write", FULL, OWED_NAME)
    running = open_store(JOURNAL, disk=disk)
    log = running.create()
    running.write(log, 1)
    assert not running.fatal
    assert running.store.stats.journal_rounds == 1
    assert not (running.directory / OWED_NAME).exists()
    disk.heal()
    running.write(log, 1)
    assert (running.directory / OWED_NAME).exists()


def test_after_a_failed_sync_the_next_start_writes_again_what_it_believes(
    open_store: Open,
) -> None:
    """Pages that only the memory has may count as clean: a sync alone would not write them."""
    disk = FailingDisk()
    running = open_store(DIRECT, disk=disk)
    partition = running.create()
    running.write(partition, 2)
    disk.plant("sync", BROKEN, "payments-0/")
    running.append(partition)
    running.until(lambda: partition.failure)
    running.close()
    assert (running.directory / "payments-0" / "unsynced").exists()
    disk.heal()
    disk.writes.clear()
    running = open_store(DIRECT, disk=disk)
    log = log_files(running.directory)[0]
    assert (str(log), 0, log.stat().st_size) in disk.writes
    assert read_all(running.partition()) == list(range(9))
    assert not (running.directory / "payments-0" / "unsynced").exists()


def test_a_partition_that_cannot_be_created_is_tried_again(open_store: Open) -> None:
    disk = FailingDisk()
    running = open_store(DIRECT, disk=disk)
    disk.plant("write", FULL, "payments-0/")
    partition = running.create()
    running.until(lambda: partition.failure)
    disk.heal()
    running.store.tick(0)
    running.store.tick(LIMITS.storage_retry_ms)
    running.until(lambda: partition.failure is None)
    running.write(partition, 2)
    running.close()
    assert read_all(open_store(DIRECT).partition()) == list(range(6))


def test_a_write_that_is_cut_short_goes_on(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal or a quota: pwritev may write less than it was given."""
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, some, at: real(fd, [b"".join(some)[:37]], at))
    running = open_store(DIRECT)
    running.write(running.create(), 5)
    assert read_all(running.partition()) == list(range(15))
    running.abandon()
    assert read_all(open_store(DIRECT).partition()) == list(range(15))


# directories


def test_a_second_store_on_the_directory_is_refused_and_names_the_first(
    open_store: Open, tmp_path: Path
) -> None:
    open_store()
    with pytest.raises(DirectoryInUse, match=f"in use by process {os.getpid()}"):
        Store.open(tmp_path / "data")


def test_the_lock_is_held_against_other_processes(open_store: Open, tmp_path: Path) -> None:
    open_store()
    script = "import sys; from pathlib import Path; from ledgerstream.log import Store\n"
    script += "Store.open(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"in use by process {os.getpid()}" in done.stderr


def test_a_deleted_partition_is_gone_and_its_name_is_free(open_store: Open) -> None:
    running = open_store()
    old = running.create()
    running.write(old, 5)
    running.append(old)
    running.store.delete(old.key)
    assert running.store.get(old.key) is None
    key = key_of(0, topic_id=uuid.UUID(int=8))
    new = running.store.create(key, LogConfig(), 1_000)
    running.write(new, 1)
    running.drain()
    assert isinstance(running.append(old), Refused)
    assert read_all(new) == [0, 1, 2]
    names = {path.name for path in running.directory.iterdir() if path.is_dir()}
    assert names == {"payments-0"}
    running.close()
    assert [p.key for p in open_store().store.partitions()] == [key]


def test_a_reader_of_a_deleted_partition_does_not_read_its_successors_files(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has it in its hand still, and one that is about to open its file."""
    running = open_store()
    old = running.create()
    running.write(old, 1)
    running.drain()
    disk = running.store.disk
    disk.forget(old.segments[0].log)
    opening = disk.open_fd

    def overtaken(path: str, flags: int) -> int:
        monkeypatch.undo()
        running.store.delete(old.key)
        key = key_of(0, topic_id=uuid.UUID(int=8))
        running.write(running.store.create(key, CONFIG, 1_000), 1)
        running.drain()
        return opening(path, flags)

    monkeypatch.setattr(disk, "open_fd", overtaken)
    end = old.high_watermark
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            old.read_cold(0, 1_000, end)


def test_a_topic_with_the_longest_name_is_deleted_too(open_store: Open) -> None:
    """Left in place, its records would follow those of the next topic of that name."""
    running = open_store()
    key = key_of(0, "t" * 249)
    running.write(running.store.create(key, CONFIG, 1_000), 5)
    running.store.delete(key)
    running.drain()
    assert not [path.name for path in running.directory.iterdir() if path.is_dir()]


def test_a_new_partition_is_not_put_over_records_that_are_there(open_store: Open) -> None:
    running = open_store()
    directory = running.directory / "payments-0"
    directory.mkdir()
    (directory / f"{0:020d}.log").write_bytes(batch_of())
    partition = running.create()
    running.append(partition)
    running.settle()
    assert partition.failure is not None
    assert "records of another topic are there" in partition.failure


def test_a_deletion_that_a_crash_cut_short_is_finished(open_store: Open) -> None:
    running = open_store()
    running.write(running.create(), 5)
    running.close()
    directory = running.directory / "payments-0"
    directory.rename(directory.with_name("payments-0.0007.delete"))
    running = open_store()
    assert running.store.partitions() == []
    running.drain()
    assert not list(running.directory.glob("*.delete"))


def test_a_directory_without_a_topic_id_is_put_aside_unless_empty(open_store: Open) -> None:
    running = open_store()
    running.write(running.create(0), 1)
    running.create(1)
    running.drain()
    running.abandon()
    for index in (0, 1):
        (running.directory / f"payments-{index}" / "partition.metadata").unlink()
    running = open_store()
    assert running.store.partitions() == []
    names = {path.name for path in running.directory.iterdir() if path.is_dir()}
    assert names == {"payments-0.stray"}


def test_a_clean_start_believes_the_marker_and_an_altered_log_is_read_again(
    open_store: Open,
) -> None:
    running = open_store()
    for index in (0, 1, 2):
        running.write(running.create(index, replace(CONFIG, segment_bytes=3_000)), 50)
    running.close()
    with log_files(running.directory / "payments-1")[-1].open("ab") as log:
        log.write(b"garbage")
    for path in log_files(running.directory / "payments-2", "index"):
        path.unlink()  # of every segment, the sealed ones too
    running = open_store()
    for index in (0, 1, 2):
        assert read_all(running.partition(index)) == list(range(150))
    assert not (running.directory / CLEAN_NAME).exists()


def test_a_clean_stop_keeps_indexes_times_and_epochs(open_store: Open) -> None:
    running = open_store()
    partition = running.create()
    for i in range(300):
        running.append(partition, time=1_000 + 10 * i)
    partition.begin_epoch(3)
    running.write(partition, 300, time=9_000)
    asked = [partition.offset_for_time(t, 1_800) for t in (0, 1_111, 2_500, 9_001, 9_999)]
    assert asked == [(0, 1_000), (34, 1_111), (450, 2_500), (901, 9_001), None]
    running.close()
    partition = open_store().partition()
    assert [partition.offset_for_time(t, 1_800) for t in (0, 1_111, 2_500, 9_001, 9_999)] == asked
    assert partition.latest_by_timestamp(1_800) == (902, 9_002)
    assert partition.epoch_end(0) == (0, 900)
    assert partition.leader_epoch == 3


def test_a_thousand_partitions_of_ten_gigabytes_open_in_under_three_seconds(
    tmp_path: Path,
) -> None:
    """After a clean stop; sparse files stand in for the size."""
    limits = replace(LIMITS, round_direct_files_max=0)
    running = Running(tmp_path / "data", limits)
    batch = batch_of(3, pid=9, sequence=0)
    logs = [running.create(index, LogConfig()) for index in range(1_000)]
    for log in logs:
        running.append(log, batch)
    running.settle()
    sparse = 10 * 1024**3 // len(logs)
    for log in logs:  # as if that much had been written before the last batch
        log.segments[0].size += sparse
        log.segments[0].written += sparse
    running.close()
    for path in log_files(tmp_path / "data"):
        os.truncate(path, len(batch) + sparse)
    began = time.perf_counter()
    store = Store.open(tmp_path / "data", limits)
    seconds = time.perf_counter() - began
    assert {log.next_offset for log in store.partitions()} == {3}
    assert sum(log.size_bytes for log in store.partitions()) > 10 * 1024**3
    assert all(len(log.producers) == 1 for log in store.partitions())
    assert seconds < 3
    assert len(store.disk._open) == 0
    store.close()


def test_files_beyond_the_limit_are_closed_and_opened_again(open_store: Open) -> None:
    limits = replace(SMALL, open_files_max=10)
    running = open_store(limits)
    logs = [running.create(index) for index in range(50)]
    for _ in range(3):
        for log in logs:
            running.append(log)
        running.settle()
    assert len(running.store.disk._open) <= 10
    assert all(read_all(log) == list(range(9)) for log in logs)


def test_the_tail_cache_keeps_to_its_bytes(open_store: Open) -> None:
    for limits in (DIRECT, JOURNAL):
        running = open_store(replace(limits, tail_cache_bytes=200 * KIB))
        logs = [running.create(index) for index in range(3)]
        for i in range(300):
            running.append(logs[i % 3], value=bytes(3_000))
            if i % 20 == 0:
                running.settle()
                running.drain()
        running.settle()
        running.drain()
        running.append(logs[0])
        running.settle()
        assert running.store.tails.size <= 200 * KIB
        assert all(read_all(log) == list(range(log.high_watermark)) for log in logs)
        for log in logs:
            running.store.delete(log.key)
        running.close()


def test_producers_expire_by_the_stores_clock(open_store: Open) -> None:
    running = open_store()
    partition = running.create()
    running.write(partition, 1, pid=9, sequence=0)
    for hours in range(26):
        running.store.tick(hours * 3_600_000)
    assert len(partition.producers) == 0


def test_a_clock_that_jumps_forgets_no_producer(open_store: Open) -> None:
    running = open_store(DIRECT)
    partition = running.create()
    running.append(partition, pid=9, sequence=0)
    running.drain()
    day_ms = LIMITS.producer_id_expiry_ms
    for at_ms, now_ms in enumerate((0, 2 * day_ms, 0, 4 * day_ms)):
        running.store.tick(now_ms, at_ms * LIMITS.producer_id_expiry_check_ms)
    assert len(partition.producers) == 1


def test_names_of_a_new_partition_are_synced_before_it_is_answered(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = Disk.sync_directory
    monkeypatch.setattr(
        Disk, "sync_directory", lambda disk, path: (synced.append(path), real(disk, path))[1]
    )
    running = open_store(DIRECT)
    partition = running.create()
    running.drain()
    synced.clear()
    running.write(partition, 1)
    assert synced == [partition.directory, str(running.directory)]
    running.write(partition, 1)
    assert len(synced) == 2


def test_the_metadata_file_is_kafkas(open_store: Open) -> None:
    running = open_store()
    topic_id = uuid.UUID("6f1b2c3d-0000-4000-8000-00000000000a")
    key = PartitionKey("with-dash", topic_id, 12)
    partition: Partition = running.store.create(key, LogConfig(), 0)
    running.write(partition, 1)
    content = (running.directory / "with-dash-12" / "partition.metadata").read_text()
    assert content == "version: 0\ntopic_id: bxssPQAAQACAAAAAAAAACg"
    running.abandon()
    assert [p.key for p in open_store().store.partitions()] == [key]


def test_what_one_turn_of_the_loop_decides_is_one_round(open_store: Open) -> None:
    """The disk thread hears of it when the turn is over, or when there is much."""
    running = open_store(replace(LIMITS, hand_over_batches=8))
    partition = running.create()
    turns: list[Callable[[], None]] = []
    running.store._later = turns.append
    for _ in range(5):
        running.append(partition)
    assert len(turns) == 1
    assert (partition.high_watermark, running.store.stats.batches) == (0, 0)
    turns.pop()()
    running.settle()
    assert (running.store.stats.rounds, running.store.stats.batches) == (1, 5)
    for _ in range(8):
        running.append(partition)
    running.settle()  # nobody has ended the turn
    turns.pop()()
    assert running.store.stats.batches == 13
