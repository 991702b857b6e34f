"""A coordinator over an internal topic: a toy machine under the contract that real ones obey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from kio.schema.errors import ErrorCode

from ledgerstream.broker.node import Node
from ledgerstream.broker.settings import Settings
from ledgerstream.broker.shards import Origin, Shard, Shards, Unavailable, Writing
from ledgerstream.errors import DecodeError
from ledgerstream.limits import Limits
from ledgerstream.machine import Decision
from ledgerstream.wire.markers import Marker, coordinator_partition, java_hash
from tests.broker.fulldisk import full_for

TOPIC = "__consumer_offsets"
QUICK = Limits(
    storage_retry_ms=20, tick_ms=10, coordinator_partitions=4,
    round_journal_bytes=0, round_direct_files_max=10_000,  # a failing file fails its round
)  # fmt: skip
Pair = tuple[str, int]


class Counts:
    """Sums a name; what a transaction adds counts when its marker commits."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}
        self.open: dict[int, list[Pair]] = {}
        self.seen: list[Origin] = []
        self.ends: list[tuple[Marker, int]] = []

    def replay(self, record: Pair, origin: Origin) -> None:
        self.seen.append(origin)
        if origin.producer_id >= 0:
            self.open.setdefault(origin.producer_id, []).append(record)
        else:
            self._add(record)

    def end(self, marker: Marker, offset: int) -> None:
        self.ends.append((marker, offset))
        for record in self.open.pop(marker.producer_id, ()):
            if marker.committed:
                self._add(record)

    def _add(self, record: Pair) -> None:
        self.sums[record[0]] = self.sums.get(record[0], 0) + record[1]

    def decide_add(self, name: str, number: int) -> Decision[Pair, int]:
        return Decision(((name, number),), self.sums.get(name, 0) + number)

    def decide_read(self, name: str) -> Decision[Pair, int]:
        return Decision((), self.sums.get(name, 0))


class Format:
    def encode(self, record: Pair) -> tuple[bytes, bytes | None]:
        return b"\x00\x00" + record[0].encode(), b"%d" % record[1]

    def decode(self, key: bytes, value: bytes | None) -> Pair | None:
        if key[:2] != b"\x00\x00":
            return None
        if value is None:
            raise DecodeError("no number")
        return key[2:].decode(), int(value)


class NewerFormat(Format):
    """Writes keys of a version that `Format` does not know."""

    def encode(self, record: Pair) -> tuple[bytes, bytes | None]:
        key, value = super().encode(record)
        return b"\x00\x09" + key[2:], value


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[tuple[Node, Shards[Counts, Pair]]]:
    node = Node(Settings(data_dir=directory, port=0), QUICK)
    shards: Shards[Counts, Pair] = Shards(node, TOPIC, Counts, Format())
    node.coordinators[TOPIC] = shards
    await node.start()
    try:
        yield node, shards
    finally:
        await node.stop()


def writing(shard: Shard[Counts, Pair], pid: int, epoch: int) -> Writing:
    return Writing(pid, epoch, shard.begin_verification(pid, epoch))


async def found(shards: Shards[Counts, Pair], key: str) -> Shard[Counts, Pair]:
    shard = await shards.find(key)
    assert isinstance(shard, Shard)
    return shard


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """`full_disk(True)`: no room for the internal topic, until `full_disk(False)`."""
    return full_for(monkeypatch, TOPIC)


def test_keys_go_to_the_partition_that_java_gives_them() -> None:
    """Item 61. Values of String.hashCode as Java prints them."""
    assert java_hash("") == 0
    assert java_hash("hello") == 99162322
    assert java_hash("polygenelubricants") == -(2**31)
    assert java_hash("\U0001f600") == 1772899
    assert coordinator_partition("polygenelubricants", 50) == 0
    assert coordinator_partition("hello", 50) == 99162322 % 50


async def test_the_topic_is_created_when_first_needed_and_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, shards):
        assert TOPIC not in node.catalog.topics
        both = await asyncio.gather(shards.find("a"), shards.find("b"))
        assert all(isinstance(shard, Shard) for shard in both)
        topic = node.catalog.topics[TOPIC]
        assert topic.partitions == 4
        assert topic.config["cleanup.policy"] == "compact"
        refused = await node.perform(node.catalog.decide_delete(topic))
        assert refused.error is ErrorCode.invalid_request
        refused = await node.perform(node.catalog.decide_add_partitions(TOPIC, 9))
        assert refused.error is ErrorCode.invalid_request
    async with running(tmp_path) as (_, shards):
        assert len(list(shards)) == 4


async def test_a_decision_is_replayed_at_once_and_told_when_durable(tmp_path: Path) -> None:
    """Item 45: nothing is told before it is durable, nothing waits to be decided."""
    async with running(tmp_path) as (_, shards):
        shard = await found(shards, "a")
        first = shard.act(shard.machine.decide_add("a", 1))
        second = shard.machine.decide_add("a", 2)
        assert second.reply == 3
        assert shard.replica.partition.high_watermark < first
        assert await shard.perform(second) == 3
        assert await shard.perform(shard.machine.decide_read("a")) == 3
        assert shard.coordinator_epoch == shard.replica.partition.leader_epoch


async def test_a_reply_without_records_waits_for_what_it_saw(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, shards):
        shard = await found(shards, "a")
        end = shard.act(shard.machine.decide_add("a", 1))
        assert await shard.perform(shard.machine.decide_read("a")) == 1
        assert shard.replica.partition.high_watermark == end


async def test_a_restart_is_a_replay_with_offsets_transactions_and_markers(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, shards):
        shard = await found(shards, "a")
        await shard.perform(shard.machine.decide_add("a", 1))
        for pid, committed in ((7, True), (8, False)):
            await shard.perform(shard.machine.decide_add("a", pid), writing(shard, pid, 0))
            await shard.wait_durable(shard.act_end(Marker(pid, 0, 3, committed)))
        await shard.perform(shard.machine.decide_add("open", 5), writing(shard, 9, 2))
        before = vars(shard.machine)
        assert before["sums"] == {"a": 8}
    async with running(tmp_path) as (_, shards):
        shard = await found(shards, "a")
        after = vars(shard.machine)
        assert [origin[::2] for origin in after["seen"]] == [o[::2] for o in before["seen"]]
        assert {**after, "seen": 0} == {**before, "seen": 0}
        assert after["open"] == {9: [("open", 5)]}


async def test_records_of_unknown_versions_are_skipped(tmp_path: Path) -> None:
    """Item 60."""
    async with running(tmp_path) as (_, shards):
        shard = await found(shards, "a")
        shard._codec = NewerFormat()
        await shard.perform(Decision((("a", 5),), None))
        shard._codec = Format()
        await shard.perform(Decision((("a", 6),), None))
    async with running(tmp_path) as (_, shards):
        assert (await found(shards, "a")).machine.sums == {"a": 6}


async def test_a_damaged_record_fails_the_shard_and_loses_nothing_silently(tmp_path: Path) -> None:
    """Item 60: Kafka logs it and drops the rest."""
    async with running(tmp_path) as (_, shards):
        shard = await found(shards, "a")
        await shard.perform(Decision((("a", 5),), None))
        shard._codec.encode = lambda record: (b"\x00\x00a", None)  # type: ignore[method-assign]
        await shard.perform(Decision((("a", 6),), None))
    async with running(tmp_path) as (node, shards):
        assert await shards.find("a") is ErrorCode.not_coordinator
        assert list(node.read_failures.values()) == ["no number"]
        assert shards.partition_of("b") != shards.partition_of("a")
        assert isinstance(await shards.find("b"), Shard)


async def test_a_load_that_fails_as_nobody_foresaw_is_told_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as (_, shards):
        await (await found(shards, "a")).perform(Decision((("a", 5),), None))

    def decode(self: Format, key: bytes, value: bytes | None) -> Pair | None:
        raise AttributeError("ours")

    monkeypatch.setattr(Format, "decode", decode)
    async with running(tmp_path) as (node, shards):
        assert await shards.find("a") is ErrorCode.not_coordinator
        assert list(node.read_failures.values()) == ["AttributeError('ours')"]


async def test_a_failed_append_throws_the_machine_away_and_the_log_gives_it_back(
    tmp_path: Path, full_disk: Callable[[bool], None]
) -> None:
    """Items 45, 46: what was not durable has never been."""
    async with running(tmp_path) as (_, shards):
        shard = await found(shards, "a")
        await shard.perform(shard.machine.decide_add("a", 1))
        full_disk(True)
        with pytest.raises(Unavailable) as failed:
            await shard.perform(shard.machine.decide_add("a", 10))
        assert failed.value.code is ErrorCode.not_coordinator
        assert not shard.ready
        assert await shards.find("a") is ErrorCode.not_coordinator
        full_disk(False)
        async with asyncio.timeout(10):
            while not isinstance(again := await shards.find("a"), Shard):
                await asyncio.sleep(0.01)
        assert again.machine.sums == {"a": 1}
        assert await again.perform(again.machine.decide_add("a", 2)) == 3


async def test_a_fenced_producer_writes_no_offsets_and_the_machine_stays(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, shards):
        shard = await found(shards, "a")
        await shard.perform(shard.machine.decide_add("a", 1), writing(shard, 7, 5))
        with pytest.raises(Unavailable) as refused:
            await shard.perform(shard.machine.decide_add("a", 1), writing(shard, 7, 4))
        assert refused.value.code is ErrorCode.invalid_producer_epoch
        assert shard.machine.open == {7: [("a", 1)]}


async def test_requests_wait_for_a_coordinator_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items 28, 59: COORDINATOR_LOAD_IN_PROGRESS only after a while."""
    async with running(tmp_path) as (_, shards):
        shard = await found(shards, "a")
        await shard.perform(shard.machine.decide_add("a", 1))
    async with running(tmp_path) as (node, shards):
        shards_a = await found(shards, "a")
        shards_a._throw_away()
        real, gate = node.loop.run_in_executor, asyncio.Event()

        async def slow(*arguments: Any) -> Any:
            await gate.wait()
            return await real(*arguments)

        monkeypatch.setattr(node.loop, "run_in_executor", slow)
        shards_a._load()
        monkeypatch.setattr(node, "limits", Limits(coordinator_load_wait_ms=1))
        assert await shards.find("a") is ErrorCode.coordinator_load_in_progress
        monkeypatch.setattr(node, "limits", QUICK)
        asking = asyncio.ensure_future(shards.find("a"))
        gate.set()
        assert isinstance(await asking, Shard)
