"""The producer and the reader while connections break and the broker dies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import LATEST, Client, Reader
from ledgerstream.errors import DeliveryTimeout, KafkaError, LedgerStreamError
from ledgerstream.limits import Limits
from ledgerstream.wire import batches
from ledgerstream.wire.versions import Api
from tests.client import scripted
from tests.client.events import Trade, trades
from tests.client.scripted import ScriptedBroker
from tests.peers.kafka import free_port
from tests.peers.proxy import Proxy, Verdict

# many small batches, so that much is in flight whenever something breaks
SMALL = Limits(
    producer_batch_bytes=2_048, request_ms_max=1_000, delivery_ms_max=50_000, retry_ms_max=50
)
IMPATIENT = Limits(
    request_ms_max=500, delivery_ms_max=700, connect_ms_max=500, retry_ms_max=50, linger_ms=1
)


class Unreliable(Proxy):
    """Between the client and the broker on `port`; `share` of what passes comes to grief."""

    def __init__(self, port: int, seed: int) -> None:
        super().__init__(lambda: asyncio.open_connection("127.0.0.1", port))
        self._random = random.Random(seed)
        self.share = 0.0
        self.faults = {"cut": 0, "mute": 0, "hang": 0}

    def up(self, data: bytes) -> Verdict:
        return self._fate(["cut", "mute", "mute"])

    def down(self, data: bytes) -> Verdict:
        return self._fate(["cut", "cut", "cut", "hang"])

    def _fate(self, fates: list[Verdict]) -> Verdict:
        if self.faults["hang"] >= 2:
            fates = [fate for fate in fates if fate != "hang"]  # each costs a request's time limit
        if self._random.random() >= self.share:
            return "pass"
        fate = self._random.choice(fates)
        self.faults[fate] += 1
        return fate


@pytest.fixture
async def proxied(tmp_path: Path) -> AsyncIterator[Unreliable]:
    """A broker that tells its clients to come through an unreliable proxy."""
    port = free_port()
    async with Unreliable(port, seed=20_181_001) as proxy:
        async with await Broker.embedded(tmp_path, port=port, advertised_port=proxy.port):
            yield proxy


async def test_broken_connections_neither_lose_nor_double_nor_reorder(
    proxied: Unreliable, topic: str
) -> None:
    async with await Client.connect(f"127.0.0.1:{proxied.port}", limits=SMALL) as client:
        await client.create_topic(topic, partitions=3)
        rows = trades(20_000)
        proxied.share = 0.1
        assert await client.write(topic, rows, event=Trade, key="account") == 20_000
        assert proxied.faults["cut"] + proxied.faults["mute"] > 5, "too quiet to prove anything"
        found = await client.read(topic, Trade, key="account")  # through the same proxy
        proxied.share = 0
        assert sum(map(len, found.values())) == 20_000
        for part in found.values():
            assert part.bad == []
            mine = rows[[a in set(part.rows["account"].tolist()) for a in rows["account"]]]
            assert (part.rows == mine).all()


async def test_single_records_survive_broken_connections(proxied: Unreliable, topic: str) -> None:
    async with await Client.connect(f"127.0.0.1:{proxied.port}", limits=SMALL) as client:
        await client.create_topic(topic)
        producer = await client.producer("lz4")
        proxied.share = 0.1
        values = [b"%06d" % i for i in range(2_000)]
        sends = [producer.send(topic, value, partition=0) for value in values]
        assert await asyncio.gather(*sends) == list(range(2_000))
        proxied.share = 0
        assert proxied.faults["cut"] + proxied.faults["mute"] > 1
        reader = client.reader(topic, {0: 0})
        found: list[bytes | None] = []
        while len(found) < 2_000:
            chunk = await reader.next(30_000)
            assert chunk is not None
            for at, _ in batches.headers(chunk.data):
                records = batches.records(chunk.data, at)
                found += [r.value for r in records if r.offset >= chunk.start]
        assert found == values


async def test_a_broker_killed_twice_during_writes_and_reads(tmp_path: Path, topic: str) -> None:
    broker = await Broker.embedded(tmp_path)
    rows = trades(40_000)
    try:
        async with await Client.connect(broker.address, limits=SMALL) as client:
            await client.create_topic(topic)
            writing = asyncio.create_task(client.write(topic, rows, event=Trade, key="account"))
            seen: list[int] = []

            async def read() -> None:
                stops = {0: len(rows)}
                async for _, part in client.stream(
                    topic, Trade, {0: 0}, key="account", stops=stops
                ):
                    seen.extend(part.rows["number"].tolist())

            reading = asyncio.create_task(read())
            for enough in (5_000, 20_000):
                while len(seen) < enough:
                    await asyncio.sleep(0.001)
                await broker.kill()
                broker = await Broker.embedded(tmp_path, port=broker.port)
            assert await asyncio.wait_for(writing, 50) == len(rows)
            await asyncio.wait_for(reading, 50)
            assert seen == list(range(len(rows)))
            assert await client.list_offsets(topic, {0: LATEST}) == {0: len(rows)}
    finally:
        await broker.stop()


NULL, EMPTY = b"\xff\xff\xff\xff", b"\0\0\0\0"  # an array of an old version, its length alone


async def test_a_null_array_in_a_reply_costs_its_connection_and_no_producer() -> None:
    async with ScriptedBroker() as broker:
        answers = iter([NULL + EMPTY, scripted.produced(0), scripted.produced(1)])
        broker.answers[Api.PRODUCE] = lambda _: next(answers)
        async with await Client.connect(broker.address, limits=SMALL) as client:
            producer = await client.producer()
            assert await producer.send("t", b"one") == 0
            assert await producer.send("t", b"two") == 1
            assert broker.asked[Api.PRODUCE] == 3
            assert broker.asked[Api.API_VERSIONS] > 1  # on a new connection


async def test_a_reply_to_another_question_is_asked_for_again() -> None:
    async with ScriptedBroker() as broker:
        scripts = {
            Api.METADATA: broker.metadata([]),
            Api.FIND_COORDINATOR: {"throttle_time": 0, "coordinators": []},
            Api.OFFSET_FETCH: {"throttle_time": 0, "groups": []},
            Api.OFFSET_COMMIT: {"throttle_time": 0, "topics": []},
            Api.LIST_OFFSETS: {"throttle_time": 0, "topics": []},
            Api.CREATE_TOPICS: {"throttle_time": 0, "topics": []},
        }
        async with await Client.connect(broker.address, limits=IMPATIENT) as client:
            asks = [
                (Api.CREATE_TOPICS, lambda: client.create_topic("u")),
                (Api.OFFSET_FETCH, lambda: client.committed("g", [("t", 0)])),
                (Api.OFFSET_COMMIT, lambda: client.commit("g", {("t", 0): 5})),
                (Api.LIST_OFFSETS, lambda: client.list_offsets("t", {0: LATEST})),
                (Api.FIND_COORDINATOR, lambda: client.committed("h", [("t", 0)])),
                (Api.METADATA, lambda: client.topic("t")),
            ]
            for api, ask in asks:
                broker.answers[api] = lambda _, api=api: scripts[api]
                with pytest.raises(DeliveryTimeout):
                    await ask()
                once = api is Api.CREATE_TOPICS  # nobody knows what became of it
                assert (broker.asked[api] == 1) is once, api


async def _until_it_raises(reader: Reader) -> None:
    for _ in range(10):
        assert await reader.next(200) is None


async def test_a_broker_away_for_too_long_is_a_time_out_and_no_end(
    tmp_path: Path, topic: str
) -> None:
    broker = await Broker.embedded(tmp_path)
    try:
        async with await Client.connect(broker.address, limits=IMPATIENT) as client:
            await client.create_topic(topic)
            producer = await client.producer()
            reader = client.reader(topic, {0: 1})
            assert await producer.send(topic, b"before") == 0
            await broker.kill()
            loop = asyncio.get_running_loop()
            began = loop.time()
            with pytest.raises(DeliveryTimeout) as caught:
                await producer.send(topic, b"during")
            assert loop.time() - began < 1.4  # twice the limit: `send` may ask for the topic first
            assert f"1 records to {topic}-0 were not acknowledged within 0.7 s" in str(caught.value)
            with pytest.raises(DeliveryTimeout, match=r"could not be read|no success within"):
                await _until_it_raises(reader)
            with pytest.raises(DeliveryTimeout):
                await client.topics()
            broker = await Broker.embedded(tmp_path, port=broker.port)
            offset = await producer.send(topic, b"after")
            assert offset in (1, 2)  # "during" may have been on its way when the broker died
            chunk = await reader.next(5_000)
            assert chunk is not None
            assert chunk.next_offset in (1, 2, 3)
    finally:
        await broker.stop()


async def test_a_broker_that_hangs_is_a_time_out_too(proxied: Unreliable, topic: str) -> None:
    proxied.up = lambda data: "pass"  # type: ignore[method-assign]
    async with await Client.connect(f"127.0.0.1:{proxied.port}", limits=IMPATIENT) as client:
        await client.create_topic(topic)
        producer = await client.producer()
        await producer.send(topic, b"before")
        proxied.down = lambda data: "hang"  # type: ignore[method-assign]
        with pytest.raises(DeliveryTimeout, match="may or may not be in the log"):
            await producer.send(topic, b"during")
        with pytest.raises(DeliveryTimeout):
            await client.list_offsets(topic, {0: LATEST})
        with pytest.raises(DeliveryTimeout, match=r"may or may not have been done|no success"):
            await client.alter_topic(topic, {"retention.ms": "1"})
        proxied.down = lambda data: "pass"  # type: ignore[method-assign]
        assert await producer.send(topic, b"after") == 2  # what hung had arrived


async def test_a_batch_refused_for_good_fails_alone(our_broker: Broker, topic: str) -> None:
    async with await Client.connect(our_broker.address, limits=Limits(linger_ms=0)) as client:
        await client.create_topic(topic, partitions=2, config={"max.message.bytes": "1000"})
        producer = await client.producer()
        values = [b"%d" % i if i % 10 else b"x" * 2_000 for i in range(100)]
        sends = []
        for i, value in enumerate(values):
            sends.append(asyncio.ensure_future(producer.send(topic, value, partition=0)))
            sends.append(asyncio.ensure_future(producer.send(topic, b"%d" % i, partition=1)))
            await asyncio.sleep(0.001)  # so that they are batches of their own, several in flight
        outcomes = await asyncio.gather(*sends, return_exceptions=True)
        good = [o for o in outcomes[0::2] if isinstance(o, int)]
        bad = [o for o in outcomes[0::2] if not isinstance(o, int)]
        assert all(isinstance(o, KafkaError) and o.name == "MESSAGE_TOO_LARGE" for o in bad)
        assert not any(isinstance(o, KafkaError) and o.retriable for o in bad)
        assert outcomes[1::2] == list(range(100))  # the other partition noticed nothing
        assert 10 <= len(bad) < 60  # and those that shared a batch with one
        assert good == list(range(len(good)))
        assert await client.list_offsets(topic, {0: LATEST}) == {0: len(good)}
        assert await producer.send(topic, b"later", partition=0) == len(good)


async def leave_on_an_error(broker: Broker, sending: list[asyncio.Future[int]]) -> None:
    async with await Client.connect(broker.address) as client:
        producer = await client.producer()
        await producer.send("left", b"x")
        await broker.kill()
        sending.append(asyncio.ensure_future(producer.send("left", b"y")))
        await asyncio.sleep(0)
        raise RuntimeError("the caller's own")


async def test_leaving_on_an_error_does_not_wait_for_a_broker_that_is_away(tmp_path: Path) -> None:
    broker = await Broker.embedded(tmp_path)
    sending: list[asyncio.Future[int]] = []
    began = asyncio.get_running_loop().time()
    with pytest.raises(RuntimeError, match="the caller's own"):
        await leave_on_an_error(broker, sending)
    assert asyncio.get_running_loop().time() - began < 30  # the delivery limit is 120 s
    with pytest.raises(LedgerStreamError):
        await sending[0]
