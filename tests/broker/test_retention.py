"""Logs that begin later, over the wire: DeleteRecords, and what readers hear of it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from kio.schema.errors import ErrorCode

from ledgerstream.broker.node import Node
from ledgerstream.broker.settings import Settings
from ledgerstream.client import Client
from ledgerstream.errors import KafkaError
from ledgerstream.limits import Limits
from tests.differential import retention, scenarios
from tests.differential.raw import Raw

QUICK = Limits(tick_ms=10, retention_check_ms=10, file_delete_delay_ms=10, checkpoint_ms=10)


def deleted(raw: Raw, name: str, offset: int, partition: int = 0) -> tuple[int, str]:
    """(where the log begins now, error)"""
    reply = retention.delete_records(raw, {(name, partition): offset})
    (part,) = reply["topics"][0]["partitions"]
    return part["low_watermark"], part["error_code"]


async def asked(node: Node, act: Any, *args: Any) -> Any:
    """A blocking exchange, beside the broker's loop."""

    def ask() -> Any:
        with Raw(f"127.0.0.1:{node.port}") as raw:
            return act(raw, *args)

    return await asyncio.to_thread(ask)


async def test_records_are_deleted_before_the_answer_and_for_good(tmp_path: Path) -> None:
    """Item 21."""
    for start in (0, 4):
        node = Node(Settings(data_dir=tmp_path, port=0))
        await node.start()
        if not start:
            await asked(node, scenarios.create, "t")
            await asked(node, scenarios.produce, "t", scenarios.batch(10))
        assert await asked(node, deleted, "t", start) == (start, "none")
        assert await asked(node, deleted, "t", 11) == (-1, "offset_out_of_range")
        assert await asked(node, deleted, "t", start + 4) == (start + 4, "none")
        fetched = await asked(node, scenarios.fetch, "t", start + 3)
        (part,) = fetched["responses"][0]["partitions"]
        assert part["error_code"] == "offset_out_of_range"
        await node.stop()


async def test_a_thousand_partitions_are_one_or_two_checkpoints(tmp_path: Path) -> None:
    """What comes while one is written goes together into the next."""
    node = Node(Settings(data_dir=tmp_path, port=0))
    await node.start()
    await asked(node, scenarios.create, "many", 50)
    for index in range(50):
        await asked(node, lambda raw, at: scenarios.produce(
            raw, "many", scenarios.batch(2), partition=at), index)  # fmt: skip
    written, write = [], node.store.write_checkpoint
    node.store.write_checkpoint = lambda then: (written.append(1), write(then))  # type: ignore
    reply = await asked(
        node, retention.delete_records, {("many", index): -1 for index in range(50)}
    )
    parts = reply["topics"][0]["partitions"]
    assert [(p["low_watermark"], p["error_code"]) for p in parts] == [(2, "none")] * 50
    assert len(written) == 2
    await node.stop()


async def test_a_disk_that_takes_no_checkpoint_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(Settings(data_dir=tmp_path, port=0))
    await node.start()
    await asked(node, scenarios.create, "t")
    await asked(node, scenarios.produce, "t", scenarios.batch(10))
    held, write_file = threading.Event(), node.store.disk.write_file

    def full(path: str, content: Any, *, sync: bool) -> None:
        if path.endswith("checkpoint"):
            held.set()
            raise OSError(28, "No space left on device")
        write_file(path, content, sync=sync)

    with monkeypatch.context() as patched:
        patched.setattr(node.store.disk, "write_file", full)
        assert await asked(node, deleted, "t", 4) == (-1, "kafka_storage_error")
    assert held.is_set()
    assert await asked(node, deleted, "t", 4) == (4, "none")
    await node.stop()


async def test_the_brokers_own_topics_keep_their_records(tmp_path: Path) -> None:
    node = Node(Settings(data_dir=tmp_path, port=0))
    await node.start()
    await node.transactions.shards.create()
    answer = await asked(node, deleted, "__transaction_state", -1)
    assert answer == (-1, "invalid_topic_exception")
    answer = await asked(node, deleted, "__cluster_metadata", -1)
    assert answer == (-1, "unknown_topic_or_partition")
    await node.stop()


async def test_a_topic_forgets_what_is_too_old_once_it_is_told_to(tmp_path: Path) -> None:
    """The default keeps all; a changed setting is seen at the next look."""
    node = Node(Settings(data_dir=tmp_path, port=0), QUICK)
    await node.start()
    async with await Client.connect(f"127.0.0.1:{node.port}") as client:
        await client.create_topic("t")
        assert (await client.topic_config("t"))["retention.ms"] == "-1"
        await asked(node, scenarios.produce, "t", scenarios.batch(10))  # of the year 2023
        replica = node.replicas.named("t", 0)
        assert replica is not None
        await client.alter_topic("t", {"retention.ms": "1000"})
        async with asyncio.timeout(20):
            while replica.partition.log_start_offset < 10 or len(replica.partition.segments) > 1:
                await asyncio.sleep(0.01)
        assert await client.list_offsets("t", {0: -2}) == {0: 10}
        assert node.store.trims.segments == 1
    await node.stop()


async def test_a_reader_below_the_start_hears_it_and_from_the_start_reads_on(
    tmp_path: Path,
) -> None:
    node = Node(Settings(data_dir=tmp_path, port=0))
    await node.start()
    async with await Client.connect(f"127.0.0.1:{node.port}") as client:
        await client.create_topic("t")
        await asked(node, scenarios.produce, "t", scenarios.batch(10))
        assert await asked(node, deleted, "t", 4) == (4, "none")
        async with client.reader("t", {0: 3}) as reader:
            with pytest.raises(KafkaError, match="not in the log") as heard:
                await reader.next()
        assert heard.value.code == ErrorCode.offset_out_of_range.value
        async with client.reader("t", {0: 4}) as reader:
            chunk = await reader.next()
            assert chunk is not None
            assert (chunk.start, chunk.next_offset, chunk.log_start) == (4, 10, 4)
    await node.stop()
