"""What nobody sends by accident, and what happens to brokers by accident."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import cramjam
import psutil
import pytest
import structlog

from ledgerstream.broker.embedded import Broker
from ledgerstream.broker.node import Node
from ledgerstream.broker.settings import Settings
from ledgerstream.client import Client
from ledgerstream.limits import MIB
from ledgerstream.log import Partition
from ledgerstream.wire import batches, messages
from ledgerstream.wire.batches import ZSTD, seal_batch
from ledgerstream.wire.versions import Api
from tests.broker.test_limits import (
    SMALL,
    closed,
    connect,
    fetch_frame,
    lives,
    produce_frame,
    reply,
    versions_frame,
)  # fmt: skip
from tests.differential.groups import Group, named_twice, once
from tests.differential.raw import Raw
from tests.differential.scenarios import create


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    running = Node(Settings(data_dir=tmp_path, port=0, auto_create_topics=True), SMALL)
    await running.start()
    yield running
    await running.stop()


async def test_a_long_poll_is_answered_when_its_time_is_up(our_broker: Broker, topic: str) -> None:
    """Also where the loop's clock, which counts milliseconds, says that it is not quite up."""
    async with await Client.connect(our_broker.address) as client:
        await client.create_topic(topic)
    host, port = our_broker.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(20):
        for i in range(400):
            writer.write(fetch_frame(topic, i, wait=1 + i % 9, min_bytes=1))
            await reply(reader)
    writer.close()


async def test_a_fetch_that_fails_when_it_is_its_turn_costs_its_connection(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await Client.connect(f"127.0.0.1:{node.port}") as client:
        await client.create_topic("failing")
    other = await connect(node)
    other[1].write(produce_frame("failing", 10, 1))
    await reply(other[0])

    def fail(*_: Any) -> None:
        raise RuntimeError("a bug of ours")

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as lines:
        patch.setattr(Partition, "read", fail)
        reader, writer = await connect(node)
        writer.write(produce_frame("failing", 10, 1) + fetch_frame("failing", 2))
        assert await closed(reader)  # the fetch was put off until the produce was answered
        writer.close()
    assert [line["event"] for line in lines] == ["request failed", "connection closed"]
    other[1].write(produce_frame("failing", 10, 2))
    await reply(other[0])
    other[1].close()


async def test_a_flood_of_connections_is_refused_with_a_line_now_and_then(node: Node) -> None:
    held = [await connect(node) for _ in range(SMALL.connections_max)]
    for reader, writer in held:
        writer.write(versions_frame(1))
        await reply(reader)
    with structlog.testing.capture_logs() as lines:
        for _ in range(200):
            reader, writer = await connect(node)
            assert await closed(reader)
            writer.close()
        async with asyncio.timeout(10):
            while sum(line["count"] for line in lines) < 200:
                await asyncio.sleep(0.01)
    assert {line["event"] for line in lines} == {"connections refused"}
    assert len(lines) < 100
    for _, writer in held:
        writer.close()


LIES = {
    # (api, version): the body up to an array, and its count
    "compact": (Api.METADATA, 9, b"\xff\xff\xff\xff\x7f"),
    "legacy": (Api.METADATA, 1, struct.pack(">i", 2**31 - 1)),
    "as many as there are bytes": (Api.METADATA, 1, struct.pack(">i", 2_000_000)),
    "nested": (Api.FETCH, 4, bytes(17) + struct.pack(">ih", 1, 0) + struct.pack(">i", 2**31 - 1)),
    "of numbers": (
        Api.DELETE_TOPICS, 1, struct.pack(">i", 2**31 - 1),
    ),
    "in a header": (Api.METADATA, 9, b""),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
async def test_an_array_that_lies_about_its_length_costs_its_connection(
    node: Node, lie: str
) -> None:
    """The parser would make room for all that it says it has: hundreds of gigabytes."""
    api, version, body = LIES[lie]
    tags = b"\x00" if version == 9 else b""
    if lie == "in a header":
        tags = b"\xff\xff\xff\xff"
    frame = struct.pack(">hhih", api, version, 1, -1) + tags + body
    if lie.startswith("as many"):
        frame += bytes(2_100_000)
    with structlog.testing.capture_logs() as lines:
        reader, writer = await connect(node)
        writer.write(struct.pack(">i", len(frame)) + frame)
        assert await closed(reader)
        writer.close()
    ((event, why),) = [(line["event"], line["why"]) for line in lines]
    assert event == "connection closed"
    assert ("malformed" if lie == "in a header" else "entries") in why
    await lives(node)


def bomb_of(compressor: Any, inflated: int) -> bytes:
    """One frame of zeros."""
    zeros = bytes(32 * MIB)
    for _ in range(inflated // len(zeros)):
        compressor.compress(zeros)
    return bytes(compressor.finish())


BOMB = """
import resource, sys
from ledgerstream.errors import DecodeError
from ledgerstream.wire.batches import decompress
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decompress(int(sys.argv[1]), data)
except DecodeError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_a_batch_that_inflates_without_end_is_caught_early(codec: str) -> None:
    match codec:
        case "gzip":
            bomb = bomb_of(cramjam.gzip.Compressor(1), 320 * MIB)
        case "snappy":
            block = bytes(cramjam.snappy.compress_raw(bytes(64 * MIB)))
            bomb = batches._XERIAL_HEADER + (struct.pack(">I", len(block)) + block) * 8
        case "lz4":
            bomb = bomb_of(cramjam.lz4.Compressor(), 320 * MIB)
        case _:
            bomb = bomb_of(cramjam.zstd.Compressor(1), 2_048 * MIB)
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(batches.CODECS.index(codec))],
        input=bomb, capture_output=True, check=True,
    )  # fmt: skip
    said, grown = done.stdout.decode().splitlines()
    assert "inflates to more than" in said
    assert int(grown) < 900  # MiB; the limit is 256, held in pieces and joined


async def test_a_bomb_in_a_compacted_topic_is_answered_with_an_error(
    our_broker: Broker, topic: str
) -> None:
    """There, and only there, the broker looks into batches before it takes them."""
    async with await Client.connect(our_broker.address) as client:
        await client.create_topic(topic, config={"cleanup.policy": "compact"})
    data = seal_batch(
        bomb_of(cramjam.zstd.Compressor(1), 2_048 * MIB), count=1, attributes=ZSTD,
        base_timestamp=1_700_000_000_000, max_timestamp=1_700_000_000_000,
    )  # fmt: skip
    fields = {
        "transactional_id": None, "acks": -1, "timeout": 1000,
        "topic_data": [{"name": topic, "partition_data": [{"index": 0, "records": data}]}],
    }  # fmt: skip
    before = psutil.Process(our_broker.pid).memory_info().rss
    host, port = our_broker.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(messages.write_request(Api.PRODUCE, 9, 1, "test", fields))
    found = messages.read_response(Api.PRODUCE, 9, await reply(reader))
    assert found.responses[0].partition_responses[0].error_code.name == "corrupt_message"
    assert psutil.Process(our_broker.pid).memory_info().rss - before < 700 * MIB
    writer.close()


def test_what_is_named_twice_is_told_once(our_broker: Broker, topic: str) -> None:
    """A short request is no way to a long reply."""
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        Group(raw, topic, topic).commit({0: 1})
        replies = list(named_twice(raw, topic))
    assert len(replies) > 7
    for what, told in replies:
        assert told == once(told), what


def test_a_broker_takes_as_many_descriptors_as_it_may_have(tmp_path: Path) -> None:
    """The usual soft limit is for programs of another age."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = subprocess.Popen(
        [sys.executable, "-m", "ledgerstream.broker.run", "--report", f"--data-dir={tmp_path}",
         "--port=0"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)),
    )  # fmt: skip
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
    assert line.split()[3] == str(hard)
    process.communicate(timeout=30)
    assert process.returncode == 0


async def test_a_broker_that_is_stopped_and_goes_on_has_lost_nobody(tmp_path: Path) -> None:
    """SIGSTOP for longer than clients like to wait, then SIGCONT: each record is there once."""
    async with await Broker.embedded(tmp_path) as broker:
        async with await Client.connect(broker.address) as client:
            await client.create_topic("kept")
            producer = await client.producer()
            sending = [asyncio.create_task(producer.send("kept", b"%d" % n)) for n in range(500)]
            os.kill(broker.pid, signal.SIGSTOP)
            more = [asyncio.create_task(producer.send("kept", b"%d" % n)) for n in range(500, 900)]
            done, _ = await asyncio.wait(more, timeout=1)
            assert not done
            os.kill(broker.pid, signal.SIGCONT)
            offsets = await asyncio.gather(*sending, *more)
            assert sorted(offsets) == list(range(900))
            assert await client.list_offsets("kept", {0: -1}) == {0: 900}
