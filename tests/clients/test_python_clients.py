"""Kafka's other Python clients produce to our broker and read back what they wrote."""

from __future__ import annotations

import os
import uuid
from typing import Any

import aiokafka
import kafka as kafka_python
import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewPartitions, NewTopic

from ledgerstream.broker.embedded import Broker

CODECS = ["none", "gzip", "snappy", "lz4", "zstd"]
Row = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]

ROWS: list[Row] = [
    (b"key", b"value", []),
    (None, b"no key", []),
    (b"tombstone", None, []),
    (None, None, []),
    (b"", b"", []),
    (b"headers", b"x", [("trace", b"\x00\x01"), ("empty", b""), ("trace", b"twice")]),
    *((f"k{i}".encode(), f"value {i}".encode() * 10, []) for i in range(500)),
]
# kafka-python and aiokafka refuse a record with neither key nor value
THEIR_ROWS = [row for row in ROWS if row[0] is not None or row[1] is not None]
LARGE: Row = (b"large", os.urandom(500_000) + b"a" * 499_000, [])


def librdkafka_produce(address: str, topic: str, codec: str, rows: list[Row]) -> None:
    refused: list[Any] = []
    producer = Producer({
        "bootstrap.servers": address,
        "enable.idempotence": True,
        "compression.type": codec,
        "message.max.bytes": 1_000_000_0,
        "linger.ms": 5,
    })  # fmt: skip
    for key, value, headers in rows:
        producer.produce(
            topic,
            value,
            key,
            partition=0,
            headers=headers,
            on_delivery=lambda error, _: refused.append(error) if error else None,
        )
    assert producer.flush(60) == 0
    assert refused == []


def librdkafka_consume(address: str, topic: str, count: int) -> list[Row]:
    consumer = Consumer({
        "bootstrap.servers": address,
        "group.id": "unused",
        "enable.auto.commit": False,
        "enable.partition.eof": False,
    })  # fmt: skip
    consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
    rows: list[Row] = []
    while len(rows) < count:
        for message in consumer.consume(count, 30):
            assert message.error() is None, message.error()
            assert message.offset() == len(rows)
            rows.append((message.key(), message.value(), list(message.headers() or [])))
    consumer.close()
    return rows


@pytest.mark.parametrize("codec", CODECS)
def test_librdkafka_round_trip(our_broker: Broker, topic: str, codec: str) -> None:
    rows = [*ROWS, LARGE]
    librdkafka_produce(our_broker.address, topic, codec, rows)
    assert librdkafka_consume(our_broker.address, topic, len(rows)) == rows


@pytest.mark.parametrize("codec", CODECS)
def test_kafka_python_round_trip(our_broker: Broker, topic: str, codec: str) -> None:
    rows = [*THEIR_ROWS, LARGE]
    producer = kafka_python.KafkaProducer(
        bootstrap_servers=our_broker.address,
        enable_idempotence=True,
        compression_type=None if codec == "none" else codec,
        max_request_size=10_000_000,
    )
    sent = [
        producer.send(topic, value, key, headers=headers, partition=0)
        for key, value, headers in rows
    ]
    assert [future.get(60).offset for future in sent] == list(range(len(rows)))
    producer.close()
    consumer = kafka_python.KafkaConsumer(
        bootstrap_servers=our_broker.address, enable_auto_commit=False, group_id=None
    )
    place = kafka_python.TopicPartition(topic, 0)
    consumer.assign([place])
    consumer.seek_to_beginning(place)
    found: list[Row] = []
    while len(found) < len(rows):
        for records in consumer.poll(30_000).values():
            found += [(r.key, r.value, list(r.headers)) for r in records]
    consumer.close()
    assert found == rows


@pytest.mark.parametrize("codec", CODECS)
async def test_aiokafka_round_trip(our_broker: Broker, topic: str, codec: str) -> None:
    rows = [*THEIR_ROWS, LARGE]
    producer = aiokafka.AIOKafkaProducer(
        bootstrap_servers=our_broker.address,
        enable_idempotence=True,
        compression_type=None if codec == "none" else codec,
        max_request_size=10_000_000,
    )
    await producer.start()
    sent = [
        await producer.send(topic, value, key, headers=headers, partition=0)
        for key, value, headers in rows
    ]
    assert [(await future).offset for future in sent] == list(range(len(rows)))
    await producer.stop()
    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=our_broker.address, enable_auto_commit=False, group_id=None
    )
    await consumer.start()
    place = aiokafka.TopicPartition(topic, 0)
    consumer.assign([place])
    await consumer.seek_to_beginning(place)
    found: list[Row] = []
    while len(found) < len(rows):
        for records in (await consumer.getmany(timeout_ms=30_000)).values():
            found += [(r.key, r.value, list(r.headers)) for r in records]
    await consumer.stop()
    assert found == rows


def finished(futures: dict[Any, Any]) -> None:
    for future in futures.values():
        future.result(30)


def test_librdkafka_administers_topics(our_broker: Broker) -> None:
    admin = AdminClient({"bootstrap.servers": our_broker.address})
    name = f"admin-{uuid.uuid4()}"
    finished(admin.create_topics([NewTopic(name, 2, 1, config={"segment.ms": "1000"})]))
    finished(admin.create_partitions([NewPartitions(name, 5)]))
    assert len(admin.list_topics(name, 30).topics[name].partitions) == 5
    resource = ConfigResource(ConfigResource.Type.TOPIC, name)
    (described,) = admin.describe_configs([resource]).values()
    assert described.result(30)["segment.ms"].value == "1000"
    cluster = admin.describe_cluster().result(30)
    assert [node.id for node in cluster.nodes] == [1]
    finished(admin.delete_topics([name]))
    assert name not in admin.list_topics(timeout=30).topics


def test_offsets_are_found_by_time(our_broker: Broker, topic: str) -> None:
    producer = Producer({"bootstrap.servers": our_broker.address, "linger.ms": 0})
    for second in range(100):
        producer.produce(topic, b"x", partition=0, timestamp=1_500_000_000_000 + 1000 * second)
        producer.poll(0)
    producer.flush(30)
    consumer = Consumer({"bootstrap.servers": our_broker.address, "group.id": "unused"})

    def at(timestamp: int) -> int:
        place = TopicPartition(topic, 0, timestamp)
        return int(consumer.offsets_for_times([place], 30)[0].offset)

    assert at(1_500_000_000_000) == 0
    assert at(1_500_000_042_500) == 43
    assert at(1_500_000_099_000) == 99
    assert at(1_600_000_000_000) == -1  # OFFSET_END
    assert consumer.get_watermark_offsets(TopicPartition(topic, 0), 30) == (0, 100)
    consumer.close()


def test_every_client_reads_what_the_others_wrote(our_broker: Broker, topic: str) -> None:
    for codec in CODECS:
        librdkafka_produce(our_broker.address, topic, codec, ROWS)
    consumer = kafka_python.KafkaConsumer(bootstrap_servers=our_broker.address, group_id=None)
    place = kafka_python.TopicPartition(topic, 0)
    consumer.assign([place])
    consumer.seek_to_beginning(place)
    found: list[Row] = []
    while len(found) < len(ROWS) * len(CODECS):
        for records in consumer.poll(30_000).values():
            found += [(r.key, r.value, list(r.headers)) for r in records]
    consumer.close()
    assert found == ROWS * len(CODECS)
