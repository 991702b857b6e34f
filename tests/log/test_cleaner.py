"""The cleaner's files: whatever crash comes in between, beside readers, and in Kafka's tools."""

from __future__ import annotations

import errno
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ledgerstream.limits import MIB
from ledgerstream.log import Partition
from ledgerstream.log.disk import Disk, File
from ledgerstream.log.swap import CLEANED_SUFFIX, SWAP_SUFFIX
from ledgerstream.wire.batches import HEADER_BYTES, Buffer
from tests.log.compacting import (
    COMPACT,
    Open,
    Seen,
    batches_of,
    clean,
    committed,
    end,
    put,
    roll,
    table,
)
from tests.log.harness import (
    DIRECT,
    JOURNAL,
    Running,
    flip,
    last_batch_sizes,
    log_files,
    overwrite,
)
from tests.log.test_kafka_reads_our_files import dump
from tests.peers import kafka

NOW = 100_000


class Images(Disk):
    """Keeps a copy of the directory as it is before and after each thing that is done to it."""

    def __init__(self, directory: Path, images: Path) -> None:
        super().__init__()
        self.directory = directory
        self.images = images
        self.armed = False
        self.taken: list[str] = []

    def _take(self, what: str) -> None:
        if self.armed:
            shutil.copytree(self.directory, self.images / str(len(self.taken)))
            self.taken.append(what)

    def write(self, file: File, buffers: Sequence[Buffer], position: int) -> None:
        self._take("write")
        super().write(file, buffers, position)

    def sync(self, file: File) -> None:
        self._take("sync")
        super().sync(file)

    def rename(self, old: str, new: str) -> None:
        self._take(f"rename {new}")
        super().rename(old, new)

    def remove(self, path: str) -> None:
        self._take(f"remove {path}")
        super().remove(path)

    def sync_directory(self, path: str) -> None:
        self._take("sync directory")
        super().sync_directory(path)


def mixed(running: Running, index: int = 0) -> Partition:
    """Plain, committed and aborted data over several segments, some of it superseded."""
    partition = running.create(index, COMPACT)
    for i in range(30):
        put(partition, (f"k{i % 7}", f"plain{i}" * 10), (f"t{i % 5}", None if i % 3 else "x"))
        if i % 5 == 0:
            put(partition, (f"k{i % 7}", f"txn{i}"), pid=i, sequence=0, transactional=True)
            put(partition, (f"u{i}", f"txn{i}"), pid=i, sequence=1, transactional=True)
        if i % 5 == 4:
            end(partition, i - 4, committed=i % 2 == 0)
    roll(running, partition)
    return partition


def everywhere(partition: Partition) -> list[dict[bytes, bytes]]:
    return [table(committed(partition, start)) for start in range(partition.next_offset + 1)]


def test_a_crash_at_any_step_loses_and_revives_nothing(tmp_path: Path) -> None:
    """Items 108, 109; bug 16. At each, the directory is opened as it was."""
    disk = Images(tmp_path / "data", tmp_path / "images")
    running = Running(tmp_path / "data", DIRECT, disk=disk)
    partition = mixed(running)
    partition.config = replace(COMPACT, segment_bytes=4_000)  # two and two become one
    expected = everywhere(partition)
    producers = partition.producers.records()
    before = committed(partition, 0)
    running.drain()
    disk.armed = True
    clean(running, NOW)
    disk.armed = False
    after = committed(partition, 0)
    assert len(after) < len(before)
    running.close()
    renames = [what for what in disk.taken if what.startswith("rename")]
    assert any(what.endswith(SWAP_SUFFIX) for what in renames)
    assert sum(what.endswith(".log") for what in renames) > 1
    assert any(what.startswith("remove") and what.endswith(".log") for what in disk.taken)
    for number, what in enumerate(disk.taken):
        for clean_stop in (True, False):  # and the second start after that
            reopened = Running(tmp_path / "images" / str(number), DIRECT)
            found = reopened.partition()
            assert found.failure is None, what
            assert found.producers.records() == producers
            seen = committed(found, 0)
            assert set(after) <= set(seen) <= set(before), what
            if clean_stop:
                assert everywhere(found) == expected, what
                assert not list(reopened.directory.rglob(f"*{CLEANED_SUFFIX}"))
                assert not list(reopened.directory.rglob(f"*{SWAP_SUFFIX}"))
                reopened.close()
            else:
                found.config = COMPACT
                clean(reopened, NOW)
                assert everywhere(found) == expected, what
                reopened.close()


def test_readers_of_the_old_segments_read_on(open_store: Open) -> None:
    """With the list of segments that they had, whether their files were open or not."""
    running = open_store(DIRECT)
    partition = mixed(running)
    segments = partition.segments
    before = [committed(partition, 0), [s.size for s in segments]]
    data = [running.store.disk.read(s.log, 0, s.size) for s in segments]
    for segment in segments:
        running.store.disk.forget(segment.log)
    clean(running, NOW)
    assert partition.segments is not segments
    assert [running.store.disk.read(s.log, 0, s.size) for s in segments] == data
    assert len(committed(partition, 0)) < len(before[0])


def test_it_reads_the_same_while_it_is_compacted(open_store: Open) -> None:
    """Item 109. Readers in a thread of their own, from everywhere, without a pause."""
    running = open_store(replace(JOURNAL, tail_cache_bytes=1))
    partition = mixed(running)
    expected = everywhere(partition)
    stop, wrong, rounds = threading.Event(), [], [0]

    def read() -> None:
        while not stop.is_set():
            for start in range(0, len(expected) - 1, 5):
                if table(committed_at_once(partition, start)) != expected[start]:
                    wrong.append(start)
            rounds[0] += 1

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(12):
        partition.cleaned = partition.cleaned._replace(clean_below=0)
        clean(running, NOW + step * 700)
    stop.set()
    reader.join()
    assert wrong == []
    assert rounds[0] > 2
    assert running.store.cleanings.cleaner.stats.bytes_written > 0


def committed_at_once(partition: Partition, start: int) -> list[Seen]:
    """As a fetch: data and index of one compaction, or again."""
    while True:
        segments = partition.segments
        seen = committed(partition, start)
        if partition.segments is segments:
            return seen


def test_a_log_that_was_removed_or_moved_meanwhile_is_left_alone(open_store: Open) -> None:
    for act in ("delete", "trim"):
        running = open_store(DIRECT)
        found = running.store.partitions()
        partition = found[0] if found else mixed(running)
        partition.config = replace(COMPACT, cleanup_policy="compact,delete")
        holding = threading.Event()
        write = running.store.cleanings.cleaner._learn
        running.store.cleanings.cleaner._learn = (  # type: ignore[method-assign]
            lambda *a, write=write, holding=holding: (holding.wait(20), write(*a))[1]
        )
        told: list[bool] = []
        running.store.write_checkpoint(told.append)
        running.until(lambda told=told: told)
        running.store.cleanings._check_at_ms = 0
        running.store.cleanings.tick(running.store.partitions(), NOW, NOW)
        assert running.store.cleanings._busy is partition
        if act == "trim":
            assert running.trim(partition, partition.segments[2].base_offset + 1)
            running.drain()
        else:
            running.store.delete(partition.key)
        holding.set()
        running.until(lambda running=running: running.store.cleanings._busy is None)
        assert running.store.cleanings.uncleanable == {}
        if act == "trim":
            assert committed(partition, partition.log_start_offset)
        running.close()
        if act == "delete":
            running = open_store(DIRECT)
            assert running.store.partitions() == []
            mixed(running)
            running.close()


class Full(Disk):
    """No room for what is prepared."""

    full = False

    def create_anew(self, path: str) -> File:
        if self.full and path.endswith(f".index{CLEANED_SUFFIX}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().create_anew(path)

    def rename(self, old: str, new: str) -> None:
        if self.broken and old.endswith(f".timeindex{CLEANED_SUFFIX}"):
            raise OSError(errno.EIO, "Input/output error")
        super().rename(old, new)

    broken = False


def test_a_full_disk_puts_it_off(open_store: Open) -> None:
    disk = Full()
    running = open_store(DIRECT, disk=disk)
    partition = mixed(running)
    expected, before = everywhere(partition), len(committed(partition, 0))
    disk.full = True
    clean(running, NOW)
    assert running.store.cleanings.cleaner.stats.failures == 1
    assert not list(running.directory.rglob(f"*{CLEANED_SUFFIX}"))
    assert len(committed(partition, 0)) == before
    disk.full = False
    clean(running, NOW)
    assert len(committed(partition, 0)) < before
    assert everywhere(partition) == expected


def test_an_exchange_that_fails_half_way_is_finished_by_the_repair(open_store: Open) -> None:
    disk = Full()
    running = open_store(replace(DIRECT, storage_retry_ms=1), disk=disk)
    partition = mixed(running)
    expected = everywhere(partition)
    disk.broken = True
    clean(running, NOW)
    running.until(lambda: partition.failure is not None)
    disk.broken = False
    for now_ms in (NOW, NOW + 10):
        running.store.tick(now_ms)
    running.until(lambda: partition.failure is None)
    assert everywhere(partition) == expected
    assert not list(running.directory.rglob(f"*{SWAP_SUFFIX}"))
    clean(running, NOW + 20)
    assert everywhere(partition) == expected


def damage(path: Path, how: str) -> None:
    """Of the second batch: a flipped byte of its records, its offset or its size."""
    position = last_batch_sizes(path, 10**6)[1][0]
    if how == "record":
        flip(path, position + HEADER_BYTES + 12)
    elif how == "offset":
        overwrite(path, position, bytes(8))
    elif how == "size":
        overwrite(path, position + 8, b"\x7f\xff\xff\xff")


@pytest.mark.parametrize("how", ["record", "offset", "size"])
def test_a_damaged_batch_stops_the_compaction_of_its_partition_alone(
    open_store: Open, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it is written anew, least of all with a checksum that is right."""
    running = open_store(DIRECT)
    partition, other = mixed(running), mixed(running, 1)
    path = log_files(running.directory)[0]
    damage(path, how)
    content, size = path.read_bytes(), other.size_bytes
    clean(running, NOW)
    clean(running, NOW)
    cleanings = running.store.cleanings
    (damaged,) = cleanings.uncleanable.values()
    assert cleanings.uncleanable.keys() == {partition}
    assert f"{path} at byte" in damaged.why
    assert partition.failure is None
    assert path.read_bytes() == content
    assert cleanings.cleaner.stats.failures == 1  # it is not tried again
    assert other.size_bytes < size
    said = capsys.readouterr().out
    assert said.count(f"or delete the records below offset {damaged.end}") == 1
    running.store.delete(partition.key)
    clean(running, NOW)
    assert cleanings.uncleanable == {}


@pytest.mark.parametrize("by", ["retention", "delete records", "restart"])
def test_a_damaged_partition_is_compacted_again_when_the_damage_is_gone(
    open_store: Open, by: str
) -> None:
    running = open_store(DIRECT)
    partition = mixed(running)
    before = partition.size_bytes
    path = log_files(running.directory)[0]
    content = path.read_bytes()
    damage(path, "record")
    clean(running, NOW)
    (damaged,) = running.store.cleanings.uncleanable.values()
    if by == "retention":  # which goes on meanwhile
        policy = {"cleanup_policy": "compact,delete", "retention_bytes": before - 1_600}
        partition.config = replace(COMPACT, **policy)
        for _ in range(2):
            running.store.trims._check_at_ms = 0
            running.store.trims.tick([partition], NOW, NOW)
            running.drain()
        assert partition.log_start_offset >= damaged.end
    elif by == "delete records":
        assert running.trim(partition, damaged.end)
    else:
        path.write_bytes(content)
        running.close()
        running = open_store(DIRECT)
        partition = running.partition()
        partition.config = COMPACT
    running.drain()
    left = partition.size_bytes
    clean(running, NOW)
    assert running.store.cleanings.uncleanable == {}
    assert partition.size_bytes < left
    assert partition.cleaned.clean_below > damaged.end


def test_it_keeps_to_its_pace_and_stops_at_once(open_store: Open) -> None:
    running = open_store(replace(DIRECT, cleaner_bytes_s=1))
    partition = mixed(running)
    running.store.cleanings._check_at_ms = 0
    told: list[bool] = []
    running.store.write_checkpoint(told.append)
    running.until(lambda: told)
    running.store.cleanings.tick(running.store.partitions(), NOW, NOW)
    assert running.store.cleanings._busy is partition
    running.close()  # in hours otherwise
    assert running.store.cleanings.cleaner.stats.bytes_read < MIB


@pytest.mark.skipif(kafka.why_absent() is not None, reason=str(kafka.why_absent()))
def test_kafkas_own_tool_reads_compacted_segments(open_store: Open) -> None:
    running = open_store(DIRECT)
    partition = mixed(running)
    for now_ms in (NOW, NOW + 10):
        clean(running, now_ms)
        put(partition, ("z", "1"))
        roll(running, partition)
    expected = [each.offset for each in committed(partition, 0)]
    told = batches_of(partition)
    running.close()
    out = dump(*log_files(running.directory), options=("--print-data-log", "--deep-iteration"))
    assert not re.search(r"isvalid: false|invalid|corrupt|Mismatch|Non-monotonic", out, re.I)
    bases = [int(found) for found in re.findall(r"^baseOffset: (\d+)", out, re.M)]
    assert bases == [base for base, *_ in told]
    offsets = {int(found) for found in re.findall(r"^\| offset: (\d+)", out, re.M)}
    assert set(expected) <= offsets
    assert re.search(r"deleteHorizonMs: \D*101000", out)
    indexes = [*log_files(running.directory, ".index"), *log_files(running.directory, ".timeindex"),
               *log_files(running.directory, ".txnindex")]  # fmt: skip
    said = dump(*(path for path in indexes if path.stat().st_size))
    assert not re.search(r"mismatch|out of order|corrupt|error", said, re.I), said
