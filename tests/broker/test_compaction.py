"""Compaction in a running broker: its own topics stay small, and what they say stays true."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from ledgerstream import Event
from ledgerstream.broker.metrics import NodeCollector
from ledgerstream.broker.node import Node
from ledgerstream.broker.settings import Settings
from ledgerstream.broker.shards import Shard, Shards
from ledgerstream.client import Client
from ledgerstream.limits import MIB, Limits
from ledgerstream.machine import Decision
from tests.broker.test_shards import Counts, Format, Pair
from tests.differential import scenarios
from tests.differential.raw import Raw
from tests.differential.transactions import Producer

QUICK = Limits(
    tick_ms=10, cleaner_check_ms=10, checkpoint_ms=10, file_delete_delay_ms=10,
    coordinator_partitions=1, coordinator_segment_bytes=1 * MIB, group_metadata_bytes_max=MIB // 2,
)  # fmt: skip
TOPIC = "__counts"


class Latest(Counts):
    """Keeps the newest number of each name, as a coordinator keeps the newest state of an id."""

    def _add(self, record: Pair) -> None:
        self.sums[record[0]] = record[1]

    def decide_put(self, name: str, number: int) -> Decision[Pair, None]:
        return Decision(((name, number),), None)


class Account(Event):
    number: int
    balance: int


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def test_many_updates_of_few_keys_cost_little_at_a_restart(tmp_path: Path) -> None:
    """Item 61; and what a start reads is bounded by what is alive."""
    names = [f"{index}" + "x" * 3_000 for index in range(5)]
    wrote = 0
    for start in range(2):
        node = Node(Settings(data_dir=tmp_path, port=0), QUICK)
        shards: Shards[Latest, Pair] = Shards(node, TOPIC, Latest, Format())
        node.coordinators[TOPIC] = shards
        await node.start()
        shard = await shards.find(names[0])
        assert isinstance(shard, Shard)
        partition = shard.replica.partition
        if start:
            last = {name: wrote - len(names) + at for at, name in enumerate(names)}
            assert shard.machine.sums == last
            # what the load replayed: a few segments, whatever was written
            assert len(shard.machine.seen) * 3_000 < partition.size_bytes < 2.5 * MIB
        else:
            for wrote in range(1, 4_001):
                shard.act(shard.machine.decide_put(names[(wrote - 1) % 5], wrote - 1))
                if wrote % 200 == 0:
                    await shard.wait_durable(partition.next_offset)
            assert node.store.stats.bytes > 10 * MIB
            await until(lambda partition=partition: partition.size_bytes < 2.5 * MIB)
        await node.stop()


async def test_transactions_are_known_after_their_log_was_compacted(tmp_path: Path) -> None:
    """Items 103 to 106, in Kafka's own records: the id goes on with the epoch that it had."""
    node = Node(Settings(data_dir=tmp_path, port=0), QUICK)
    await node.start()

    def write(raw: Raw, first: bool) -> object:
        if first:
            scenarios.create(raw, "t")
        one = Producer(raw, "one")
        told = one.init()
        for _ in range(20 if first else 1):
            assert one.add(("t", 0)) == ["none"]
            one.send("t")
            assert one.end(True) == "none"
        return told

    async def asked(node: Node, first: bool) -> object:
        def ask() -> object:
            with Raw(f"127.0.0.1:{node.port}") as raw:
                return write(raw, first)

        return await asyncio.to_thread(ask)

    assert await asked(node, True) == ("none", "p0", 0)
    replica = node.replicas.named("__transaction_state", 0)
    assert replica is not None
    partition = replica.partition
    before = partition.size_bytes
    await until(lambda: partition.high_watermark == partition.next_offset)
    partition.begin_segment(node.now_ms())
    await until(lambda: partition.size_bytes < before / 5)
    told = {sample.name for metric in NodeCollector(node).collect() for sample in metric.samples}
    names = {"bytes_read_total", "runs_total", "dirty_ratio_max", "uncleanable_partitions"}
    assert {f"ledgerstream_cleaner_{name}" for name in names} <= told
    await node.stop()
    node = Node(Settings(data_dir=tmp_path, port=0), QUICK)
    await node.start()
    assert await asked(node, False) == ("none", "p0", 1)
    await node.stop()


async def test_a_topic_is_compacted_while_its_readers_read(tmp_path: Path) -> None:
    """As columns, by our own client, from the start, again and again."""
    node = Node(Settings(data_dir=tmp_path, port=0), QUICK)
    await node.start()
    async with await Client.connect(f"127.0.0.1:{node.port}") as client:
        config = {"cleanup.policy": "compact", "segment.bytes": str(MIB)}
        await client.create_topic("accounts", config=config)
        last: dict[int, int] = {}
        for step in range(40):
            frame = pd.DataFrame({"number": np.arange(2_000) * (step % 3 + 1)})
            frame["balance"] = np.arange(2_000) + step
            await client.write("accounts", frame, event=Account, key="number")
            last |= dict(zip(frame["number"], frame["balance"], strict=True))
            if step % 4 == 3:
                rows = (await client.read("accounts", Account, key="number"))[0].rows
                assert dict(zip(rows["number"], rows["balance"], strict=True)) == last
        replica = node.replicas.named("accounts", 0)
        assert replica is not None
        partition = replica.partition
        await until(lambda: partition.cleaned.clean_below > 0)
        assert partition.size_bytes < node.store.stats.bytes
        rows = (await client.read("accounts", Account, key="number"))[0].rows
        assert dict(zip(rows["number"], rows["balance"], strict=True)) == last
        assert len(rows) < 80_000
    await node.stop()
