"""The node: the catalogue is durable before anything follows it, and nothing is ever guessed."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from kio.schema.errors import ErrorCode

from ledgerstream.broker.node import Node
from ledgerstream.broker.settings import Settings
from ledgerstream.client import Client
from ledgerstream.errors import CorruptError, KafkaError
from ledgerstream.limits import Limits
from tests.broker.fulldisk import full_for

QUICK = Limits(storage_retry_ms=20, tick_ms=10)
DIRECT = replace(QUICK, round_journal_bytes=0)  # one dirty file is synced itself


@asynccontextmanager
async def running(directory: Path, limits: Limits = QUICK) -> AsyncIterator[tuple[Node, Client]]:
    node = Node(Settings(data_dir=directory, port=0), limits)
    await node.start()
    try:
        async with await Client.connect(f"127.0.0.1:{node.port}") as client:
            yield node, client
    finally:
        await node.stop()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """`full_disk(True)`: no room for the catalogue, until `full_disk(False)`."""
    return full_for(monkeypatch, "__cluster_metadata")


async def send(client: Client, topic: str, count: int) -> None:
    producer = await client.producer()
    for n in range(count):
        assert await producer.send(topic, b"%d" % n, partition=0) == n


async def test_what_the_catalogue_could_not_write_has_never_been(
    tmp_path: Path, full_disk: Callable[[bool], None]
) -> None:
    async with running(tmp_path, DIRECT) as (node, client):
        await client.create_topic("before")
        await send(client, "before", 1)
        full_disk(True)
        answer = await node.create_topic("never", 1)
        assert answer.error is ErrorCode.kafka_storage_error
        topic = node.catalog.topics["before"]
        assert (await node.perform(node.catalog.decide_delete(topic))).error is answer.error
        assert list(node.catalog.topics) == ["before"]
        assert await client.list_offsets("before", {0: -1}) == {0: 1}
        full_disk(False)
        async with asyncio.timeout(10):
            while (await node.create_topic("after", 2)).error is not ErrorCode.none:
                await asyncio.sleep(0.01)
        assert [r.partition.key.topic for r in node.replicas][2:] == ["after", "after"]
    async with running(tmp_path) as (node, client):
        assert sorted(node.catalog.topics) == ["after", "before"]
        assert await client.list_offsets("before", {0: -1}) == {0: 1}


async def test_a_lost_catalogue_deletes_nothing(tmp_path: Path) -> None:
    data, kept = tmp_path / "data", tmp_path / "kept"
    async with running(data) as (_, client):
        await client.create_topic("payments")
        await client.create_topic("empty")
        await send(client, "payments", 3)
    (data / "__cluster_metadata-0").rename(kept)
    for _ in range(2):
        with pytest.raises(CorruptError, match="does not know payments-0, which hold records"):
            await Node(Settings(data_dir=data, port=0), QUICK).start()
    shutil.copytree(kept, data / "__cluster_metadata-0")
    async with running(data) as (_, client):
        assert await client.list_offsets("payments", {0: -1}) == {0: 3}


async def test_a_topic_is_made_again_where_a_crash_cut_its_deletion_short(tmp_path: Path) -> None:
    """The catalogue has the new topic, the directory is still the old one's."""
    async with running(tmp_path / "a") as (_, client):
        await client.create_topic("payments")
        await send(client, "payments", 3)
    old = tmp_path / "a" / "payments-0"
    shutil.copytree(old, tmp_path / "kept")
    async with running(tmp_path / "a") as (_, client):
        await client.delete_topic("payments")
        await client.create_topic("payments")
    shutil.rmtree(old)
    (tmp_path / "kept").rename(old)
    (tmp_path / "a" / "clean-stop").unlink()
    async with running(tmp_path / "a") as (_, client):
        assert await client.list_offsets("payments", {0: -1}) == {0: 0}
        await send(client, "payments", 2)
        assert old.exists()
    async with running(tmp_path / "a") as (_, client):
        assert await client.list_offsets("payments", {0: -1}) == {0: 2}
        with pytest.raises(KafkaError):
            await client.create_topic("payments")


async def test_a_tick_that_fails_stops_no_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: failures.append(told))
    ticked: list[str] = []

    def fail(name: str) -> None:
        ticked.append(name)
        if ticked.count(name) == 1:
            raise RuntimeError("ours")

    async with running(tmp_path) as (node, _):
        monkeypatch.setattr(node.groups, "tick", lambda *_: fail("node"))
        connection = next(iter(node.server.connections))
        monkeypatch.setattr(connection, "look", lambda _: fail("server"))
        async with asyncio.timeout(10):
            while {name for name in ticked if ticked.count(name) > 1} != {"node", "server"}:
                await asyncio.sleep(0.001)
    assert len(failures) == 2


async def test_a_waiter_that_fails_keeps_no_other_waiting(tmp_path: Path) -> None:
    async with running(tmp_path) as (node, client):
        await client.create_topic("t")
        replica = node.replicas.named("t", 0)
        assert replica is not None

        def fail(_: bool) -> None:
            raise RuntimeError("ours")

        told: list[bool] = []
        replica.when_durable(1, fail)
        replica.when_durable(1, told.append)
        await send(client, "t", 1)
        assert told == [True]
