"""What the client promises, on our broker and on Apache Kafka alike."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from kafka.partitioner import murmur2 as their_murmur2

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import EARLIEST, LATEST, Client, Reader
from ledgerstream.client.connection import Connection
from ledgerstream.errors import ConfigError, KafkaError, LedgerStreamError
from ledgerstream.limits import LIMITS, Limits
from ledgerstream.wire import batches
from ledgerstream.wire.batches import Record

CODECS = ["none", "gzip", "snappy", "lz4", "zstd"]


async def read_records(reader: Reader, count: int) -> list[Record]:
    """The next `count` records of a reader of one partition, from the offset asked for on."""
    found: list[Record] = []
    while len(found) < count:
        chunk = await reader.next(30_000)
        assert chunk is not None
        for at, header in batches.headers(chunk.data):
            if not header.control:
                found += [r for r in batches.records(chunk.data, at) if r.offset >= chunk.start]
    return found


async def refused(name: str, doing: object) -> KafkaError:
    with pytest.raises(KafkaError) as caught:
        await doing  # type: ignore[misc]
    assert caught.value.name == name
    return caught.value


# -- topics


async def test_a_topic_is_created_described_grown_and_deleted(both: Client, topic: str) -> None:
    made = await both.create_topic(topic, partitions=2, config={"retention.ms": "1000000"})
    assert (made.name, made.partitions) == (topic, 2)
    assert made.topic_id is not None
    assert await both.topic(topic) == made
    assert made in await both.topics()
    assert (await both.topic_config(topic))["retention.ms"] == "1000000"

    await both.alter_topic(topic, {"retention.ms": None, "max.message.bytes": "5000"})

    async def in_force() -> dict[str, str | None]:
        while (config := await both.topic_config(topic))["max.message.bytes"] != "5000":
            await asyncio.sleep(0.01)  # Apache Kafka's brokers hear of it a moment later
        return config

    config = await asyncio.wait_for(in_force(), 30)
    assert config["retention.ms"] != "1000000"

    await both.add_partitions(topic, 5)
    assert (await both.topic(topic)).partitions == 5
    await both.delete_topic(topic)
    await refused("UNKNOWN_TOPIC_OR_PARTITION", both.topic(topic))


async def test_what_the_broker_refuses_is_a_typed_error(both: Client, topic: str) -> None:
    unknown = await refused("UNKNOWN_TOPIC_OR_PARTITION", both.topic(topic))
    assert unknown.code == 3
    assert not unknown.retriable  # the client has asked: waiting does not help
    await refused("UNKNOWN_TOPIC_OR_PARTITION", both.delete_topic(topic))
    await refused("UNKNOWN_TOPIC_OR_PARTITION", both.add_partitions(topic, 3))
    await refused("UNKNOWN_TOPIC_OR_PARTITION", both.topic_config(topic))
    await both.create_topic(topic)
    exists = await refused("TOPIC_ALREADY_EXISTS", both.create_topic(topic))
    assert not exists.retriable
    assert topic in str(exists)
    await refused("INVALID_PARTITIONS", both.add_partitions(topic, 1))
    await refused("INVALID_CONFIG", both.create_topic(topic + "-x", config={"no.such": "1"}))
    await refused("INVALID_TOPIC_EXCEPTION", both.create_topic("no/slashes"))
    await refused("UNKNOWN_TOPIC_OR_PARTITION", both.list_offsets(topic, {7: LATEST}))


async def test_nobody_there_is_said_within_the_time_limit() -> None:
    with pytest.raises(LedgerStreamError, match=r"No broker answers at 127\.0\.0\.1:1"):
        await Client.connect("127.0.0.1:1", limits=Limits(connect_ms_max=200))
    with pytest.raises(LedgerStreamError, match="No broker answers") as found:
        await Client.connect("kafka..local:9092", limits=Limits(connect_ms_max=200))
    assert "is no address" in found.value.remedy
    for nonsense in ("nonsense", "host:0", "host:65536"):
        with pytest.raises(ConfigError, match="not a broker's address"):
            await Client.connect(nonsense)


# -- single records


async def test_records_come_back_as_they_were_sent(both: Client, topic: str) -> None:
    await both.create_topic(topic)
    producer = await both.producer()
    headers = [("trace", b"\x00\x01"), ("none", None), ("trace", b"")]
    rows = [
        (b"key", b"value", ()),
        (None, b"no key", ()),
        (b"tombstone", None, ()),
        (None, None, ()),
        (b"", b"", headers),
    ]
    offsets = await asyncio.gather(*(
        producer.send(topic, value, key=key, partition=0, timestamp=1_000 + i, headers=pairs)
        for i, (key, value, pairs) in enumerate(rows)
    ))  # fmt: skip
    assert offsets == [0, 1, 2, 3, 4]
    found = await read_records(both.reader(topic, {0: 0}), 5)
    assert found == [
        Record(i, 1_000 + i, key, value, tuple(pairs)) for i, (key, value, pairs) in enumerate(rows)
    ]


async def test_keys_go_where_javas_partitioner_sends_them(both: Client, topic: str) -> None:
    await both.create_topic(topic, partitions=7)
    producer = await both.producer()
    everything = range(7)
    keys = [b"", b"a", b"\xff" * 4, *(f"key-{i}".encode() for i in range(100))]
    await asyncio.gather(*(producer.send(topic, b"", key=key) for key in keys))
    ends = await both.list_offsets(topic, dict.fromkeys(everything, LATEST))
    expected = dict.fromkeys(everything, 0)
    for key in keys:
        expected[(their_murmur2(key) & 0x7FFFFFFF) % 7] += 1
    assert ends == expected
    for partition in everything:
        for record in await read_records(both.reader(topic, {partition: 0}), ends[partition]):
            assert (their_murmur2(record.key) & 0x7FFFFFFF) % 7 == partition


@pytest.mark.parametrize("codec", CODECS)
async def test_every_codec_and_records_of_a_megabyte(both: Client, topic: str, codec: str) -> None:
    await both.create_topic(topic, config={"max.message.bytes": "2000000"})
    producer = await both.producer(codec)
    values = [b"a" * 999_000, *(f"value {i}".encode() * 20 for i in range(300)), b"z" * 999_000]
    sent = [producer.send(topic, value, partition=0) for value in values]
    assert await asyncio.gather(*sent) == list(range(len(values)))
    found = await read_records(both.reader(topic, {0: 0}), len(values))
    assert [record.value for record in found] == values


async def test_what_cannot_be_encoded_is_refused_at_once(both: Client, topic: str) -> None:
    await both.create_topic(topic)
    producer = await both.producer()
    for wrong in (
        {"value": "text"},
        {"value": b"", "key": 7},
        {"value": b"", "headers": [(b"name", b"")]},
        {"value": b"", "headers": [("name", 1)]},
        {"value": b"", "headers": [("\ud800", b"")]},
        {"value": b"", "timestamp": -5},
        {"value": b"", "timestamp": 2**63},
        {"value": b"", "timestamp": 1.5},
        {"value": b"", "partition": 1},
        {"value": b"", "partition": 0.5},
    ):
        with pytest.raises(ConfigError):
            await producer.send(topic, **wrong)  # type: ignore[arg-type]
    assert await producer.send(topic, b"right") == 0
    with pytest.raises(ConfigError, match="Use none, gzip, snappy, lz4, zstd"):
        await both.producer("brotli")


async def test_views_and_numpys_integers_are_what_they_stand_for(
    client: Client, topic: str
) -> None:
    await client.create_topic(topic, 1)
    producer = await client.producer()
    numbers = np.arange(3)
    await producer.send(
        topic, numbers.data, key=memoryview(b"abcdef")[::2], partition=np.int32(0),
        timestamp=np.int64(5), headers=(each for each in [("h", bytearray(b"x"))]),
    )  # fmt: skip
    await producer.send(topic, b"", timestamp=np.int64(1))
    async with client.reader(topic, {0: 0}) as reader:
        (record, _) = await read_records(reader, 2)
    assert (record.key, record.value, record.timestamp, record.headers) == (
        b"ace", numbers.tobytes(), 5, (("h", b"x"),),
    )  # fmt: skip


async def test_a_topic_that_is_forgotten_while_a_batch_waits_for_its_connection(
    client: Client, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `delete_topic` forgets one: it is looked up again, and nothing else is harmed."""
    await client.create_topic(topic, 1)
    producer = await client.producer()
    await producer.send(topic, b"0")
    real = client.cluster.connection

    async def forgetful(broker: int) -> Connection:
        found = await real(broker)
        client.cluster.topics.pop(topic, None)
        monkeypatch.setattr(client.cluster, "connection", real)
        return found

    monkeypatch.setattr(client.cluster, "connection", forgetful)
    assert await producer.send(topic, b"1") == 1


async def test_what_is_sent_while_a_topic_is_asked_for_is_not_overtaken(
    server: str, both: Client, topic: str
) -> None:
    """Sends that were begun one after the other, and not awaited in between."""
    await both.create_topic(topic, 1)
    async with await Client.connect(server) as client:  # which does not know the topic yet
        producer = await client.producer()
        sends = []
        for number in range(1_000):
            sends.append(asyncio.create_task(producer.send(topic, b"%d" % number)))
            await asyncio.sleep(0)
        offsets = await asyncio.gather(*sends)
    assert offsets == sorted(offsets)


async def test_all_that_wait_for_a_topic_hear_at_once_that_there_is_none(tmp_path: Path) -> None:
    async with (
        await Broker.embedded(tmp_path, auto_create_topics=False) as broker,
        await Client.connect(broker.address) as client,
    ):
        producer = await client.producer()
        began = time.monotonic()
        sends = [producer.send("none", b"") for _ in range(5)]
        for error in await asyncio.gather(*sends, return_exceptions=True):
            assert isinstance(error, KafkaError)
        assert time.monotonic() - began < 2 * LIMITS.topic_created_ms_max / 1000


async def test_what_waits_for_room_is_not_overtaken(server: str, topic: str) -> None:
    limits = Limits(producer_buffer_bytes=2_000, linger_ms=0)
    async with await Client.connect(server, limits=limits) as client:
        await client.create_topic(topic, 1)
        producer = await client.producer()
        sends = []
        for number in range(300):
            sends.append(asyncio.create_task(producer.send(topic, b"%0500d" % number)))
            await asyncio.sleep(0.0001)
        offsets = await asyncio.gather(*sends)
    assert offsets == sorted(offsets)


async def test_a_closed_producer_says_so_and_what_was_sent_is_there(
    both: Client, topic: str
) -> None:
    await both.create_topic(topic)
    producer = await both.producer()
    sending = [asyncio.ensure_future(producer.send(topic, b"%d" % i)) for i in range(100)]
    await asyncio.sleep(0)
    await producer.close()
    assert await asyncio.gather(*sending) == list(range(100))
    with pytest.raises(LedgerStreamError, match="closed"):
        await producer.send(topic, b"late")
    await producer.close()


async def test_cancelling_a_wait_harms_nobody_else(both: Client, topic: str) -> None:
    await both.create_topic(topic)
    producer = await both.producer()
    first = asyncio.ensure_future(producer.send(topic, b"first"))
    second = asyncio.ensure_future(producer.send(topic, b"second"))
    await asyncio.sleep(0)
    flushing = asyncio.ensure_future(producer.flush())
    await asyncio.sleep(0)
    flushing.cancel()
    first.cancel()
    assert await second == 1
    assert await producer.send(topic, b"third") == 2
    assert producer._buffered == 0


async def test_many_partitions_are_written_and_read(both: Client, topic: str) -> None:
    await both.create_topic(topic, partitions=100)
    producer = await both.producer()
    await asyncio.gather(*(
        producer.send(topic, b"%d %d" % (p, i), partition=p) for i in range(5) for p in range(100)
    ))  # fmt: skip
    found: dict[int, list[bytes | None]] = {p: [] for p in range(100)}
    async with both.reader(topic, dict.fromkeys(range(100), 0)) as reader:
        while sum(map(len, found.values())) < 500:
            chunk = await reader.next(30_000)
            assert chunk is not None
            for at, _ in batches.headers(chunk.data):
                found[chunk.partition] += [r.value for r in batches.records(chunk.data, at)]
    assert found == {p: [b"%d %d" % (p, i) for i in range(5)] for p in range(100)}


# -- offsets


async def test_offsets_are_found_by_time(both: Client, topic: str) -> None:
    await both.create_topic(topic, partitions=2)
    producer = await both.producer()
    for i in range(10):
        await producer.send(topic, b"", partition=0, timestamp=10_000 + 100 * i)

    async def at(when: int) -> int:
        return (await both.list_offsets(topic, {0: when}))[0]

    assert await both.list_offsets(topic, {0: EARLIEST, 1: EARLIEST}) == {0: 0, 1: 0}
    assert await both.list_offsets(topic, {0: LATEST, 1: LATEST}) == {0: 10, 1: 0}
    assert [await at(when) for when in (0, 10_000, 10_001, 10_900)] == [0, 0, 1, 9]
    assert await at(10_901) == 10  # after the last record: the end
    assert await both.list_offsets(topic, {1: 5}) == {1: 0}


# -- reading


async def test_a_reader_at_the_end_wakes_on_new_data(both: Client, topic: str) -> None:
    await both.create_topic(topic)
    producer = await both.producer()
    reader = both.reader(topic, {0: 0})
    assert await reader.next(1) is None
    loop = asyncio.get_running_loop()
    for i in range(20):
        waiting = asyncio.ensure_future(reader.next(30_000))
        await asyncio.sleep(0.005)  # so that it waits at the broker
        began = loop.time()
        await producer.send(topic, b"%d" % i)
        chunk = await waiting
        assert chunk is not None
        assert (chunk.start, chunk.next_offset) == (i, i + 1)
        assert loop.time() - began < 0.4  # not the end of a long poll, which is 0.5 s


async def test_seek_and_drop_take_effect_at_once(both: Client, topic: str) -> None:
    await both.create_topic(topic, partitions=2)
    producer = await both.producer()
    for p in (0, 1):
        await asyncio.gather(*(producer.send(topic, b"%d" % i, partition=p) for i in range(50)))
    reader = both.reader(topic, {0: 0, 1: 0})
    seen = {c.partition for c in [await reader.next(30_000), await reader.next(30_000)] if c}
    assert seen == {0, 1}
    reader.seek(0, 20)
    chunk = await reader.next(30_000)
    assert chunk is not None
    assert (chunk.partition, chunk.start, chunk.next_offset) == (0, 20, 50)
    reader.seek(0, 49)
    reader.seek(1, 0)
    reader.drop(1)
    (record,) = await read_records(reader, 1)
    assert (record.offset, record.value) == (49, b"49")
    assert await reader.next(50) is None  # of partition 1 nothing comes any more


async def test_an_offset_that_is_not_there_is_an_error_until_another_is_sought(
    both: Client, topic: str
) -> None:
    await both.create_topic(topic)
    producer = await both.producer()
    await producer.send(topic, b"only")
    reader = both.reader(topic, {0: 1_000})
    for _ in range(2):
        error = await refused("OFFSET_OUT_OF_RANGE", reader.next(30_000))
        assert not error.retriable
        assert f"{topic}-0 at 1,000" in str(error)
    reader.seek(0, 0)
    assert [r.value for r in await read_records(reader, 1)] == [b"only"]
    await refused("UNKNOWN_TOPIC_OR_PARTITION", both.reader(topic, {3: 0}).next(30_000))
    await refused("UNKNOWN_TOPIC_OR_PARTITION", both.reader(topic + "-x", {0: 0}).next(30_000))


async def test_cancelling_next_loses_nothing(both: Client, topic: str) -> None:
    await both.create_topic(topic)
    producer = await both.producer()
    async with both.reader(topic, {0: 0}) as reader:
        seen: list[int] = []
        for i in range(60):
            await producer.send(topic, b"%d" % i)
            task = asyncio.ensure_future(reader.next(30_000))
            for _ in range(i % 12):
                await asyncio.sleep(0)
            task.cancel()
            outcome = (await asyncio.gather(task, return_exceptions=True))[0]
            if not isinstance(outcome, BaseException):
                assert outcome is not None
                seen += range(outcome.start, outcome.next_offset)
        while len(seen) < 60:
            chunk = await reader.next(30_000)
            assert chunk is not None
            seen += range(chunk.start, chunk.next_offset)
        assert seen == list(range(60))


async def test_a_closed_reader_says_so(both: Client, topic: str) -> None:
    await both.create_topic(topic)
    reader = both.reader(topic, {0: 0})
    waiting = asyncio.ensure_future(reader.next(30_000))
    await asyncio.sleep(0)
    await reader.close()
    with pytest.raises(LedgerStreamError, match="closed"):
        await waiting
