"""Floods, slow readers, lies and half-open connections cost their connection, never the broker."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import structlog
from kio.schema.errors import ErrorCode

from ledgerstream.broker.node import Node
from ledgerstream.broker.settings import Settings
from ledgerstream.client import Client
from ledgerstream.limits import MIB, Limits
from ledgerstream.wire import batches, messages
from ledgerstream.wire.batches import NewRecord
from ledgerstream.wire.versions import Api

SMALL = Limits(
    frame_bytes_max=4 * MIB,
    connection_bytes_max=4 * MIB,
    requests_bytes_max=8 * MIB,
    connection_requests_max=4,
    connection_idle_ms=300,
    frame_started_ms_max=300,
    connection_stalled_ms=300,
    replies_bytes_max=4 * MIB,
    connections_max=8,
    tick_ms=20,
)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """A broker on this loop, with limits that a test can reach."""
    settings = Settings(data_dir=tmp_path, port=0, auto_create_topics=True)
    running = Node(settings, SMALL)
    await running.start()
    yield running
    await running.stop()


async def connect(node: Node) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", node.port)


def produce_frame(topic: str, size: int, correlation_id: int = 1, acks: int = -1) -> bytes:
    data = batches.encode_batch([NewRecord(None, bytes(size), 1_700_000_000_000)])
    fields = {
        "transactional_id": None, "acks": acks, "timeout": 1000,
        "topic_data": [{"name": topic, "partition_data": [{"index": 0, "records": data}]}],
    }  # fmt: skip
    return messages.write_request(Api.PRODUCE, 9, correlation_id, "test", fields)


def fetch_frame(topic: str, correlation_id: int, wait: int = 0, min_bytes: int = 0) -> bytes:
    part = {
        "partition": 0, "current_leader_epoch": -1, "fetch_offset": 0, "log_start_offset": -1,
        "partition_max_bytes": 8 * MIB,
    }  # fmt: skip
    fields = {
        "replica_id": -1, "max_wait": wait, "min_bytes": min_bytes, "max_bytes": 8 * MIB,
        "isolation_level": 0, "session_id": 0, "session_epoch": -1, "rack_id": "",
        "topics": [{"topic": topic, "partitions": [part]}], "forgotten_topics_data": [],
    }  # fmt: skip
    return messages.write_request(Api.FETCH, 11, correlation_id, "test", fields)


def versions_frame(correlation_id: int) -> bytes:
    return struct.pack(">ihhih", 10, Api.API_VERSIONS, 0, correlation_id, -1)


async def reply(reader: asyncio.StreamReader) -> bytes:
    (size,) = struct.unpack(">i", await reader.readexactly(4))
    return await reader.readexactly(size)


async def closed(reader: asyncio.StreamReader) -> bool:
    """Whether the connection ends; what still comes before that is passed over."""
    async with asyncio.timeout(20):
        try:
            while await reader.read(1 << 20):
                pass
        except ConnectionError:
            pass
    return True


async def lives(node: Node) -> None:
    async with await Client.connect(f"127.0.0.1:{node.port}") as client:
        await client.topics()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">i", -1),
        struct.pack(">i", 2**31 - 1),
        struct.pack(">i", 4 * MIB + 1),
        struct.pack(">ihhih", 10, 999, 0, 1, -1),  # an unknown API
        struct.pack(">ihhih", 10, Api.METADATA, 99, 1, -1),  # an unknown version
        struct.pack(">ih", 2, 3),  # shorter than a header
        struct.pack(">ihhih", 10, Api.METADATA, 9, 1, 5000),  # a client id past the end
        struct.pack(">ihhihi", 14, Api.METADATA, 1, 1, -1, 2**31 - 1),  # 2 billion topics
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS
    ],
)
async def test_what_is_not_the_protocol_is_closed_with_one_line(node: Node, data: bytes) -> None:
    with structlog.testing.capture_logs() as lines:
        reader, writer = await connect(node)
        writer.write(data)
        assert await closed(reader)
        writer.close()
    assert [line["event"] for line in lines] == ["connection closed"]
    assert lines[0]["why"]
    await lives(node)


async def test_replies_keep_the_order_of_requests(node: Node) -> None:
    reader, writer = await connect(node)
    writer.write(
        fetch_frame("ordered", 1, wait=200, min_bytes=1)
        + produce_frame("ordered", 10, 2)
        + versions_frame(3)
        + produce_frame("ordered", 10, 4)
    )
    found = [struct.unpack_from(">i", await reply(reader))[0] for _ in range(4)]
    assert found == [1, 2, 3, 4]
    writer.close()


async def test_a_flood_of_requests_is_read_no_faster_than_it_is_answered(node: Node) -> None:
    async with await Client.connect(f"127.0.0.1:{node.port}") as client:
        await client.create_topic("flood")
    reader, writer = await connect(node)
    held = 0
    frame = produce_frame("flood", 900_000)

    async def watch() -> None:
        nonlocal held
        while True:
            held = max(held, node.server.held_bytes)
            await asyncio.sleep(0)

    watching = asyncio.ensure_future(watch())
    for _ in range(60):
        writer.write(frame)
    for _ in range(60):
        await reply(reader)
    watching.cancel()
    # what one read brings in may come on top
    assert held <= SMALL.connection_bytes_max + SMALL.frame_bytes_max
    assert node.server.held_bytes == 0
    writer.close()


async def test_a_reader_that_does_not_read_holds_one_reply_and_is_closed(node: Node) -> None:
    async with await Client.connect(f"127.0.0.1:{node.port}") as client:
        producer = await client.producer()
        for _ in range(30):
            await producer.send("slow", bytes(900_000), partition=0)
    before = psutil.Process().memory_info().rss
    with structlog.testing.capture_logs() as lines:
        sock = socket.create_connection(("127.0.0.1", node.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for i in range(200):
            sock.sendall(fetch_frame("slow", i))
        async with asyncio.timeout(20):
            while not any("has read nothing" in str(line.get("why")) for line in lines):
                assert psutil.Process().memory_info().rss - before < 60 * MIB
                await asyncio.sleep(0.01)
            while node.server.unsent_bytes:
                await asyncio.sleep(0)  # the loop hears of it a turn later
        sock.close()
    await lives(node)


def offsets_frame(group: str) -> bytes:
    """Commits offsets of 100 partitions, with 1.2 MB of metadata."""
    parts = [
        {"partition_index": index, "committed_offset": 1, "committed_leader_epoch": -1,
         "committed_metadata": "€" * 4_096}
        for index in range(100)
    ]  # fmt: skip
    return messages.write_request(Api.OFFSET_COMMIT, 8, 1, "test", {
        "group_id": group, "generation_id_or_member_epoch": -1, "member_id": "",
        "group_instance_id": None, "topics": [{"name": "many", "partitions": parts}],
    })  # fmt: skip


def fetch_offsets_frame(*groups: str) -> bytes:
    wanted = [{"group_id": group, "topics": None} for group in groups]
    fields = {"groups": wanted, "require_stable": False}
    return messages.write_request(Api.OFFSET_FETCH, 8, 1, "test", fields)


async def committed(node: Node, *groups: str) -> None:
    """These groups have offsets with much metadata."""
    async with await Client.connect(f"127.0.0.1:{node.port}") as client:
        await client.create_topic("many", 100)
        for group in groups:
            await client.commit(group, {("many", 0): 0})  # its coordinator has loaded
    reader, writer = await connect(node)
    for group in groups:
        writer.write(offsets_frame(group))
        found = messages.read_response(Api.OFFSET_COMMIT, 8, await reply(reader))
        codes = {part.error_code for topic in found.topics for part in topic.partitions}
        assert codes == {ErrorCode.none}
    writer.close()


async def test_a_reply_is_no_larger_than_a_frame(node: Node) -> None:
    """And a group that is named often is told of once."""
    groups = ["a", "b", "c", "d"]
    await committed(node, *groups)
    reader, writer = await connect(node)
    writer.write(fetch_offsets_frame(*groups[:2] * 100))
    found = messages.read_response(Api.OFFSET_FETCH, 8, await reply(reader))
    assert [group.group_id for group in found.groups] == groups[:2]
    with structlog.testing.capture_logs() as lines:
        writer.write(fetch_offsets_frame(*groups))
        assert await closed(reader)
    (line,) = lines
    assert line["why"] == "OFFSET_FETCH: A reply has more than 4,194,304 bytes."
    writer.close()
    await lives(node)


async def test_replies_that_nobody_takes_are_not_made(node: Node) -> None:
    await committed(node, "a", "b", "c")
    reader, writer = await connect(node)
    for _ in range(4):
        writer.write(fetch_offsets_frame("a", "b", "c"))
    async with asyncio.timeout(10):
        while not (stuck := [c for c in node.server.connections if c.write_paused]):
            await asyncio.sleep(0)  # the system takes a few megabytes
    for _ in range(20):
        await asyncio.sleep(0)  # all are decided by now
    assert stuck[0].queue
    assert not any(exchange.buffers for exchange in stuck[0].queue)
    for _ in range(4):
        found = messages.read_response(Api.OFFSET_FETCH, 8, await reply(reader))
        assert [len(group.topics[0].partitions) for group in found.groups] == [100] * 3
    writer.close()


async def test_a_frame_that_is_never_finished_is_closed(node: Node) -> None:
    for beginning in (b"\x00\x00", struct.pack(">i", 3 * MIB) + bytes(100)):
        with structlog.testing.capture_logs() as lines:
            reader, writer = await connect(node)
            writer.write(beginning)
            assert await closed(reader)
            writer.close()
        assert "never finished" in lines[0]["why"]
    assert node.server.held_bytes == 0


async def test_an_idle_connection_is_closed_quietly(node: Node) -> None:
    with structlog.testing.capture_logs() as lines:
        reader, writer = await connect(node)
        assert await closed(reader)
        writer.close()
    assert lines == []


async def test_a_half_closed_connection_is_closed(node: Node) -> None:
    reader, writer = await connect(node)
    writer.write(versions_frame(1))
    await reply(reader)
    writer.write_eof()
    assert await closed(reader)
    writer.close()


async def test_too_many_connections_are_refused_and_the_others_go_on(node: Node) -> None:
    held = [await connect(node) for _ in range(SMALL.connections_max)]
    for reader, writer in held:
        writer.write(versions_frame(1))
        await reply(reader)
    reader, writer = await connect(node)
    assert await closed(reader)
    writer.close()
    for reader, writer in held:
        writer.write(versions_frame(2))
        await reply(reader)
        writer.close()


async def test_a_parked_fetch_is_woken_by_the_append(node: Node) -> None:
    async with await Client.connect(f"127.0.0.1:{node.port}") as client:
        await client.create_topic("woken")
        reader, writer = await connect(node)
        writer.write(fetch_frame("woken", 1, wait=60_000, min_bytes=1))
        async with asyncio.timeout(10):
            while not node.parked:
                await asyncio.sleep(0)
            producer = await client.producer()
            await producer.send("woken", b"x", partition=0)
            await reply(reader)
        writer.close()


async def test_a_clean_stop_finishes_what_was_accepted(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, port=0, auto_create_topics=True)
    node = Node(settings)
    await node.start()
    async with await Client.connect(f"127.0.0.1:{node.port}") as client:
        await client.create_topic("last")
    reader, writer = await connect(node)
    waiting = await connect(node)
    waiting[1].write(fetch_frame("last", 9, wait=60_000, min_bytes=10**6))
    for i in range(50):
        writer.write(produce_frame("last", 1000, i))
    async with asyncio.timeout(20):
        first = await reply(reader)
        await node.stop()
        answered = [first]
        while len(answered) < 50:
            try:
                answered.append(await reply(reader))
            except asyncio.IncompleteReadError:
                break
        await reply(waiting[0])  # the parked fetch is answered, not dropped
    for _, w in ((reader, writer), waiting):
        w.close()
    again = Node(settings)
    await again.start()
    async with await Client.connect(f"127.0.0.1:{again.port}") as client:
        end = (await client.list_offsets("last", {0: -1}))[0]
    assert end == len(answered)
    await again.stop()


async def test_metrics_and_health(our_broker_metrics: str) -> None:
    status, body = await get(our_broker_metrics, "/metrics")
    assert status == 200
    assert b"ledgerstream_connections " in body
    assert b"ledgerstream_log_rounds" in body
    status, body = await get(our_broker_metrics, "/healthz")
    assert (status, json.loads(body)) == (200, {"status": "ok", "failed": {}})


@pytest.fixture
def our_broker_metrics(our_broker: object) -> str:
    return f"127.0.0.1:{our_broker.metrics_port}"  # type: ignore[attr-defined]


async def get(address: str, path: str) -> tuple[int, bytes]:
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body
