"""Reading: from memory, from the page cache, from the disk; by offset and by time."""

from __future__ import annotations

import errno
import gc
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest

from ledgerstream.errors import CorruptError
from ledgerstream.limits import KIB, LIMITS
from ledgerstream.log import LogConfig, Partition, Read
from ledgerstream.log.disk import Handle, NotCached
from ledgerstream.wire.batches import CODECS, headers
from tests.log.harness import (
    DIRECT,
    JOURNAL,
    SMALL,
    Running,
    batch_of,
    log_files,
    offsets_of,
    overwrite,
)

Open = Callable[..., Running]
NO_TAIL = replace(DIRECT, tail_cache_bytes=0)


def filled(
    open_store: Open, limits: object = SMALL, batches: int = 400
) -> tuple[Running, Partition]:
    """Batches of one to five records of many sizes, over several segments."""
    chance = random.Random(5)
    running = open_store(limits)
    partition = running.create()
    for i in range(batches):
        value = bytes(chance.choice((0, 20, 300, 2_000)))
        running.append(partition, count=chance.randint(1, 5), time=1_000 + i * 7, value=value)
        if chance.random() < 0.2:
            running.settle()
    running.settle()
    assert len(partition.segments) > 2
    return running, partition


def either(partition: Partition, offset: int, bytes_max: int, end: int) -> Read:
    """As the broker reads."""
    return partition.read(offset, bytes_max, end) or partition.read_cold(offset, bytes_max, end)


@pytest.mark.parametrize("limits", [SMALL, NO_TAIL, JOURNAL])
def test_every_offset_is_found_whatever_the_size_and_the_end(
    open_store: Open, limits: object
) -> None:
    """Whole batches from the one with the offset; at least one; never past the end."""
    _, partition = filled(open_store, limits)
    whole = b""
    while (start := len(offsets_of([whole]))) < partition.high_watermark:
        whole += b"".join(partition.read_cold(start, 100_000, partition.high_watermark).data)
    bounds = [(h.base_offset, h.next_offset, at, h.size) for at, h in headers(whole)]
    chance = random.Random(6)
    for _ in range(1_500):
        end = chance.choice([partition.high_watermark, *(b[1] for b in bounds[::9])])
        offset = chance.randrange(end)
        bytes_max = chance.choice((0, 1, 500, 5_000, 100_000))
        data = b"".join(either(partition, offset, bytes_max, end).data)
        first = next(b for b in bounds if b[0] <= offset < b[1])
        assert data == whole[first[2] : first[2] + len(data)]
        assert len(data) <= max(bytes_max, first[3])
        assert len(data) >= first[3]
        got = [b for b in bounds if first[2] <= b[2] < first[2] + len(data)]
        assert sum(b[3] for b in got) == len(data)
        assert got[-1][1] <= end


def test_reading_at_or_past_the_end_gives_nothing(open_store: Open) -> None:
    for limits in (SMALL, NO_TAIL):
        running, partition = filled(open_store, limits)
        end = partition.high_watermark
        for offset in (end, end + 5):
            assert either(partition, offset, 1_000, end).data == []
        running.store.delete(partition.key)
        running.close()


def test_the_newest_batches_are_read_from_memory(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = open_store()
    partition = running.create()
    running.write(partition, 20)
    monkeypatch.setattr(running.store.disk, "read_cached", _no_disk)
    read = partition.read(30, 1_000, 60)
    assert read is not None
    assert offsets_of(read.data)[0] == 30
    assert read.size == sum(map(len, read.data))


def _no_disk(handle: Handle, position: int, size: int) -> bytes:
    raise AssertionError("the disk was asked")


def test_what_is_handed_out_does_not_change(open_store: Open) -> None:
    for limits in (SMALL, NO_TAIL):
        running = open_store(limits)
        partition = running.create()
        running.write(partition, 20, value=bytes(2_000))
        read = either(partition, 0, 30_000, partition.high_watermark)
        before = b"".join(read.data)
        running.write(partition, 100, value=b"other" * 400)
        assert b"".join(read.data) == before
        running.store.delete(partition.key)
        running.close()


def test_a_batch_is_stored_as_it_came_but_for_its_place(open_store: Open) -> None:
    running = open_store()
    partition = running.create()
    partition.begin_epoch(5)
    running.write(partition, 1)
    for size in (10, 20_000):
        batch = batch_of(2, value=bytes(size))
        offset = partition.next_offset
        running.append(partition, batch)
        running.settle()
        stored = b"".join(partition.read_cold(offset, 1, partition.high_watermark).data)
        assert stored[16:] == batch[16:]
        assert stored[:16] == offset.to_bytes(8, "big") + batch[8:12] + (5).to_bytes(4, "big")


def test_the_loop_does_not_wait_for_the_disk(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, partition = filled(open_store, NO_TAIL)
    read = partition.read(0, 1_000, partition.high_watermark)
    assert read is not None  # in the page cache, the file is open

    def not_cached(handle: Handle, position: int, size: int) -> bytes:
        raise NotCached

    monkeypatch.setattr(running.store.disk, "read_cached", not_cached)
    assert partition.read(0, 1_000, partition.high_watermark) is None
    assert offsets_of(partition.read_cold(0, 1, partition.high_watermark).data)[0] == 0


def test_a_read_that_fails_at_once_is_for_the_patient_reader_to_judge(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, partition = filled(open_store, NO_TAIL)

    def fail(handle: Handle, position: int, size: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(running.store.disk, "read_cached", fail)
    assert partition.read(0, 1_000, partition.high_watermark) is None
    assert offsets_of(partition.read_cold(0, 1, partition.high_watermark).data)[0] == 0


def test_a_closed_file_is_opened_by_the_patient_reader_only(open_store: Open) -> None:
    running, partition = filled(open_store, NO_TAIL)
    running.close()
    partition = open_store(NO_TAIL).partition()
    assert partition.read(0, 1_000, partition.high_watermark) is None
    assert partition.read_cold(0, 1_000, partition.high_watermark).data
    assert partition.read(0, 1_000, partition.high_watermark) is not None


def test_damage_in_a_segment_is_an_error_of_its_reader(open_store: Open) -> None:
    running, partition = filled(open_store, NO_TAIL)
    overwrite(log_files(running.directory)[0], 0, bytes(100))
    assert partition.read(0, 10, partition.high_watermark) is None
    with pytest.raises(CorruptError):
        partition.read_cold(0, 10, partition.high_watermark)


@pytest.mark.parametrize("codec", range(len(CODECS)))
def test_the_first_record_at_or_after_a_time_is_found(open_store: Open, codec: int) -> None:
    """Times may go back; offsets before the log start do not count."""
    chance = random.Random(codec)
    running = open_store()
    partition = running.create(config=LogConfig(segment_bytes=8 * KIB, index_interval_bytes=500))
    times: list[int] = []
    for i in range(200):
        base = 1_000 + 10 * i + chance.randrange(-100, 100)
        count = chance.randint(1, 4)
        value = chance.randbytes(100)
        running.append(partition, count=count, time=base, value=value, codec=codec)
        times += [base + n for n in range(count)]
    running.settle()
    assert len(partition.segments) > 3
    ends = [len(times), partition.segments[2].base_offset]
    for start in (0, 50):
        assert running.trim(partition, start)
        for end in ends:
            for time in (0, 900, 1_000, 1_999, 2_000, 2_345, 2_950, 3_100, 10_000):
                found = [(o, t) for o, t in enumerate(times[:end]) if t >= time and o >= start]
                assert partition.offset_for_time(time, end) == (found[0] if found else None)
            latest = max(range(start, end), key=lambda o: (times[o], -o))
            assert partition.latest_by_timestamp(end) == (latest, times[latest])


def test_an_empty_partition_has_no_times(open_store: Open) -> None:
    partition = open_store().create()
    assert partition.offset_for_time(0, 0) is None
    assert partition.latest_by_timestamp(0) is None


def test_records_without_a_time_are_found_by_none(open_store: Open) -> None:
    running = open_store()
    partition = running.create()
    running.write(partition, 5, count=1, time=-1)
    assert partition.offset_for_time(0, 5) is None
    assert partition.latest_by_timestamp(5) == (0, -1)


def test_a_time_is_asked_of_what_only_the_journal_has(open_store: Open) -> None:
    running = open_store(JOURNAL)
    partition, other = running.create(0), running.create(1)
    running.append(partition, time=5_000)
    running.append(other)
    running.settle()
    assert partition.segments[0].pending
    assert partition.offset_for_time(5_001, 3) == (1, 5_001)


def test_epoch_ends_are_those_of_offset_for_leader_epoch(open_store: Open) -> None:
    running = open_store()
    partition = running.create()
    assert partition.epoch_end(0) == (0, 0)
    assert partition.epoch_end(1) == (-1, -1)
    running.write(partition, 2)
    partition.begin_epoch(3)
    partition.begin_epoch(5)  # nothing was written in 3
    running.write(partition, 1)
    assert [partition.epoch_end(e) for e in range(-1, 7)] == [
        (-1, -1), (0, 6), (0, 6), (0, 6), (0, 6), (0, 6), (5, 9), (-1, -1),
    ]  # fmt: skip


def test_sizes_are_those_of_the_files(open_store: Open) -> None:
    running, partition = filled(open_store)
    running.drain()
    partition.read_cold(0, 1, 1)  # the files get what so far only the journal has
    files = log_files(running.directory)
    assert partition.size_bytes == sum(path.stat().st_size for path in files)


def test_an_idle_partition_costs_little(open_store: Open) -> None:
    """No open file, nothing in arrays, after a clean start."""
    running = open_store()
    for index in range(300):
        running.create(index)
    running.settle()
    running.close()
    tracemalloc.start()
    running = open_store()
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(running.store.disk._open) == 0
    assert current / 300 < 4 * KIB


def test_memory_does_not_grow_with_what_was_written(open_store: Open) -> None:
    running = open_store(replace(DIRECT, tail_cache_bytes=100 * KIB))
    partition = running.create(config=LogConfig(segment_bytes=512 * KIB))
    now_ms = [0]

    def write_megabytes(megabytes: int) -> int:
        for _ in range(megabytes):
            running.write(partition, 100, count=10, value=bytes(1_000), pid=-1)
            running.rounds.clear()
            now_ms[0] += LIMITS.checkpoint_ms
            running.store.tick(now_ms[0])
        running.drain()
        running.write(partition, 1)  # the next append lets go of what has been written since
        running.drain()
        gc.collect()  # and the interpreter's free lists
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    first = write_megabytes(3)
    second = write_megabytes(12)
    tracemalloc.stop()
    assert second - first < 250 * KIB  # the tail may hold its 100 at one time and not the other
