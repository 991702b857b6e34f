"""Compaction, and the moves of a log's start, under power cuts: before and after every step, with
what was not synced lost in any mixture, in recoveries too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

from ledgerstream.limits import Limits
from ledgerstream.log import Partition
from ledgerstream.log.cleaner import Stopped
from ledgerstream.log.epochs import Epochs, EpochStart
from ledgerstream.log.markers import CLEAN_NAME
from ledgerstream.log.producers import ProducerRecord
from ledgerstream.log.swap import CLEANED_SUFFIX, SWAP_SUFFIX
from tests.log.compacting import COMPACT, Seen, clean, committed, put, roll, table
from tests.log.harness import DIRECT, JOURNAL, Running
from tests.log.powercut import Image, Moment, NeverSyncs, PowerCutDisk, all_images, put_back
from tests.log.test_cleaner import NOW, everywhere, mixed

MERGING = replace(COMPACT, segment_bytes=4_000, delete_retention_ms=500)  # two and two become one
ACTS = ("compact", "compact again", "delete records", "compact what is left", "close half way")


class Truth(NamedTuple):
    """What must be found after a cut, whatever is lost."""

    tables: list[dict[bytes, bytes]]  # of a read_committed reader from each offset
    producers: list[ProducerRecord]
    most: list[Seen]  # what there was before
    least: list[Seen]  # and when the act was done
    starts: set[int]  # where the log may begin
    epochs: list[EpochStart]  # before it does


class Cuts(NamedTuple):
    """An act, at each of whose steps the power may go."""

    root: Path
    moments: list[Moment]
    truth: Truth


def starts_of(partition: Partition) -> set[int]:
    return {partition.log_start_offset}


def cut_while(directory: Path, act: str, limits: Limits = DIRECT) -> Cuts:
    """The acts up to this one, and every moment of it."""
    disk = PowerCutDisk(directory)
    running = Running(directory, limits, disk=disk)
    partition = mixed(running)
    partition.config = MERGING
    steps: dict[str, Callable[[], object]] = {
        "compact": lambda: clean(running, NOW),
        "compact again": lambda: clean(running, NOW + 1_000),
        "delete records": lambda: running.trim(partition, partition.segments[1].base_offset + 3),
        "compact what is left": lambda: clean(running, NOW + 2_000),
        "close half way": lambda: close_half_way(running),
    }
    for pid, name in enumerate(ACTS[: ACTS.index(act)], start=100):
        steps[name]()
        partition.begin_epoch(pid)
        for i in range(12):
            pairs = (f"k{i % 7}", f"{name}{i}" * 10), (f"{name} {i}", "stays")
            put(partition, *pairs, pid=pid, sequence=2 * i, time=100 * pid + i)
        roll(running, partition)
    running.drain()
    tables, before, starts = everywhere(partition), committed(partition, 0), starts_of(partition)
    epochs = partition.epochs.starts()
    disk.armed = True
    steps[act]()
    if not act.startswith("close"):
        running.drain()
    disk.moments.append(disk.moment("the end"))
    disk.armed = False
    starts |= starts_of(partition)
    after = committed(partition, max(starts))
    least = [each for each in after if each.offset >= max(starts)]
    truth = Truth(tables, partition.producers.records(), before, least, starts, epochs)
    running.close()
    return Cuts(directory, disk.moments, truth)


def close_half_way(running: Running) -> None:
    """A clean stop, one exchange of segments done and another one not begun."""
    cleaner, partition = running.store.cleanings.cleaner, running.partition()
    prepare, prepared = cleaner._prepare, []

    def once(*args: Any) -> Any:
        if prepared:
            cleaner._stopping.wait()
            raise Stopped
        prepared.append(prepare(*args))
        return prepared[0]

    cleaner._prepare = once  # type: ignore[method-assign]
    store, before = running.store, partition.segments
    store.write_checkpoint(lambda _: None)
    running.drain()
    store.cleanings._check_at_ms = 0
    store.cleanings.tick(store.partitions(), NOW + 3_000, NOW + 3_000)
    running.until(lambda: partition.segments is not before and not partition.exchanging)
    running.close()


def check(running: Running, truth: Truth, told: object) -> None:
    partition = running.partition()
    assert partition.failure is None, told
    assert partition.producers.records() == truth.producers, told
    start = partition.log_start_offset
    assert start in truth.starts, told
    assert partition.next_offset == len(truth.tables) - 1, told
    epochs = Epochs(truth.epochs)
    epochs.trim(start)
    assert partition.epochs.starts() == epochs.starts(), told
    seen = committed(partition, start)
    assert {each for each in truth.least if each.offset >= start} <= set(seen) <= set(truth.most), (
        told
    )
    for offset in range(start, len(truth.tables)):
        assert table(committed(partition, offset)) == truth.tables[offset], (told, offset)
    check_indexes(partition, told)
    left = [path.name for path in running.directory.rglob("*")]
    assert not [name for name in left if name.endswith((CLEANED_SUFFIX, SWAP_SUFFIX))], told


def check_indexes(partition: Partition, told: object) -> None:
    """Each batch is found by its offset, and the newest time is known."""
    read = partition.host.disk.read
    for segment in partition.segments:
        batches = list(segment.walk(read, 0, segment.size))
        newest = max((header.max_timestamp for _, header in batches), default=-1)
        assert segment.max_timestamp == newest, told
        for at, header in batches:
            assert segment.find(read, header.base_offset, segment.size) == at, told


def recovered(image: Image, root: Path, directory: Path, truth: Truth, told: object) -> None:
    """Opened, read, compacted and opened again."""
    put_back(image, directory, root)
    running = Running(directory, DIRECT, disk=NeverSyncs())
    check(running, truth, told)
    running.partition().config = MERGING
    clean(running, NOW + 3_000)
    running.abandon()
    running = Running(directory, DIRECT, disk=NeverSyncs())
    check(running, truth._replace(least=[]), (told, "and compacted"))
    running.close()
    shutil.rmtree(directory)


@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.torture)])
@pytest.mark.parametrize(
    ("act", "limits"), [*((act, DIRECT) for act in ACTS), ("close half way", JOURNAL)]
)
def test_a_power_cut_at_any_step_loses_and_revives_nothing(
    tmp_path: Path, act: str, limits: Limits, count: int
) -> None:
    """Items 108, 109, 110."""
    cuts = cut_while(tmp_path / "data", act, limits)
    for told, image in some(cuts.moments, count, 40 * count):
        recovered(image, cuts.root, tmp_path / "image", cuts.truth, told)


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.torture)])
@pytest.mark.parametrize(
    ("act", "left"),
    [("compact", SWAP_SUFFIX), ("compact again", CLEANED_SUFFIX), ("close half way", CLEAN_NAME)],
)
def test_a_second_power_cut_is_recovered_from_too(
    tmp_path: Path, act: str, left: str, count: int
) -> None:
    """In the recovery from the first, or in the compaction that follows."""
    cuts = cut_while(tmp_path / "data", act)
    found = [
        each for each in some(cuts.moments, count, 10**9) if any(p.endswith(left) for p in each[1])
    ]
    truth = cuts.truth._replace(least=[])
    for told, image in Random(count).sample(found, min(len(found), count)):
        directory = tmp_path / "first"
        put_back(image, directory, cuts.root)
        disk = PowerCutDisk(directory)
        disk.armed = True
        running = Running(directory, DIRECT, disk=disk)
        running.partition().config = MERGING
        clean(running, NOW + 4_000)
        disk.armed = False
        check(running, truth, told)
        running.abandon()
        for again, later in some(disk.moments, count, 20 * count):
            recovered(later, directory, tmp_path / "image", truth, (told, again))
        shutil.rmtree(directory)


def some(moments: list[Moment], count: int, most: int) -> list[tuple[object, Image]]:
    """`most` images of all that there are, by chance, and what they are of."""
    found = [
        ((moment.what, number), image)
        for number, (moment, image) in enumerate(all_images(moments, count, count))
    ]
    return Random(count).sample(found, min(len(found), most))
