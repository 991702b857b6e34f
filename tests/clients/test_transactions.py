"""Kafka's clients write transactions to our broker, and read what was committed by assignment."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiokafka
import confluent_kafka
import kafka as kafka_python
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from ledgerstream.broker.embedded import Broker
from ledgerstream.wire.versions import Api
from tests.broker.test_transactions import committed
from tests.differential.raw import Raw
from tests.differential.scenarios import create
from tests.differential.transactions import Producer
from tests.peers import kafka

ROUNDS = 20
WANTED = {
    partition: [b"%d-%d" % (n, i) for n in range(ROUNDS) if n % 4 for i in range(partition, 10, 2)]
    for partition in (0, 1)
}


def make(address: str, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": address})
    for future in admin.create_topics([NewTopic(topic, 2, 1)]).values():
        future.result(30)


def read_committed(address: str, topic: str) -> dict[int, list[bytes]]:
    """By librdkafka, to the end of both partitions."""
    consumer = confluent_kafka.Consumer({
        "bootstrap.servers": address, "group.id": "unused", "enable.auto.commit": False,
        "isolation.level": "read_committed", "enable.partition.eof": True,
    })  # fmt: skip
    found: dict[int, list[bytes]] = {0: [], 1: []}
    consumer.assign([confluent_kafka.TopicPartition(topic, p, 0) for p in found])
    ended = set()
    while len(ended) < 2:
        message = consumer.poll(30)
        assert message is not None
        if message.error() is None:
            found[message.partition()].append(message.value())
        else:
            assert message.error().code() == confluent_kafka.KafkaError._PARTITION_EOF
            ended.add(message.partition())
    consumer.close()
    return found


def test_librdkafka(our_broker: Broker, topic: str) -> None:
    """Items 79, 81."""
    make(our_broker.address, topic)
    settings = {"bootstrap.servers": our_broker.address, "transactional.id": topic, "linger.ms": 0}
    producer = confluent_kafka.Producer(settings)
    producer.init_transactions(30)
    for n in range(ROUNDS):
        producer.begin_transaction()
        for i in range(10):
            producer.produce(topic, b"%d-%d" % (n, i), partition=i % 2)
        producer.commit_transaction(30) if n % 4 else producer.abort_transaction(30)
    assert read_committed(our_broker.address, topic) == WANTED


def test_librdkafka_fences_the_one_before(our_broker: Broker, topic: str) -> None:
    make(our_broker.address, topic)
    settings = {"bootstrap.servers": our_broker.address, "transactional.id": topic}
    first, second = confluent_kafka.Producer(settings), confluent_kafka.Producer(settings)
    first.init_transactions(30)
    first.begin_transaction()
    first.produce(topic, b"lost", partition=0)
    first.flush(30)
    second.init_transactions(30)
    second.begin_transaction()
    second.produce(topic, b"kept", partition=0)
    second.commit_transaction(30)
    with pytest.raises(confluent_kafka.KafkaException) as fenced:
        first.commit_transaction(30)
    assert fenced.value.args[0].fatal()
    assert read_committed(our_broker.address, topic) == {0: [b"kept"], 1: []}


async def test_aiokafka(our_broker: Broker, topic: str) -> None:
    """Items 79, 81."""
    make(our_broker.address, topic)
    producer = aiokafka.AIOKafkaProducer(
        bootstrap_servers=our_broker.address, transactional_id=topic
    )
    await producer.start()
    for n in range(ROUNDS):
        await producer.begin_transaction()
        for i in range(10):
            await producer.send(topic, b"%d-%d" % (n, i), partition=i % 2)
        await (producer.commit_transaction() if n % 4 else producer.abort_transaction())
    await producer.stop()
    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=our_broker.address, isolation_level="read_committed",
        auto_offset_reset="earliest",
    )  # fmt: skip
    await consumer.start()
    consumer.assign([aiokafka.TopicPartition(topic, p) for p in (0, 1)])
    found: dict[int, list[bytes]] = {0: [], 1: []}
    while sum(map(len, found.values())) < sum(map(len, WANTED.values())):
        message = await consumer.getone()
        found[message.partition].append(message.value)
    await consumer.stop()
    assert found == WANTED == read_committed(our_broker.address, topic)


def test_kafka_python(our_broker: Broker, topic: str) -> None:
    """Items 79, 81."""
    make(our_broker.address, topic)
    producer = kafka_python.KafkaProducer(
        bootstrap_servers=our_broker.address, transactional_id=topic
    )
    producer.init_transactions()
    for n in range(ROUNDS):
        producer.begin_transaction()
        for i in range(10):
            producer.send(topic, b"%d-%d" % (n, i), partition=i % 2)
        producer.commit_transaction() if n % 4 else producer.abort_transaction()
    producer.close()
    consumer = kafka_python.KafkaConsumer(
        bootstrap_servers=our_broker.address, isolation_level="read_committed",
        auto_offset_reset="earliest", enable_auto_commit=False,
    )  # fmt: skip
    consumer.assign([kafka_python.TopicPartition(topic, p) for p in (0, 1)])
    found: dict[int, list[bytes]] = {0: [], 1: []}
    while sum(map(len, found.values())) < sum(map(len, WANTED.values())):
        for records in consumer.poll(30_000).values():
            for record in records:
                found[record.partition].append(record.value)
    consumer.close()
    assert found == WANTED == read_committed(our_broker.address, topic)


PATCHED = """
import sys
import ledgerstream.broker.apiversions as told
if sys.argv.pop() == "v1":
    told._FINALIZED, told._SUPPORTED = [], []
from ledgerstream.broker.run import main
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(kafka.why_absent() is not None, reason=str(kafka.why_absent()))
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_java_writes_transactions_with_five_requests_in_flight(
    tmp_path: Path, version: str
) -> None:
    """Items 15, 92. For V1 the feature is taken away by the test."""
    broker = subprocess.Popen(
        [sys.executable, "-c", PATCHED, "--report", f"--data-dir={tmp_path}", "--port=0", version],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert broker.stdout is not None
    where = json.loads(broker.stdout.readline())
    address = f"{where['host']}:{where['port']}"
    with Raw(address) as raw:
        create(raw, "many", 6)
        said = kafka.tool(
            "org.apache.kafka.tools.ProducerPerformance", "--topic", "many", "--num-records",
            50_000, "--record-size", 100, "--throughput", -1, "--transactional-id", "perf",
            "--transaction-duration-ms", 40, "--command-property", f"bootstrap.servers={address}",
            "acks=all",
        )  # fmt: skip
        assert "50000 records sent" in said
        found = [committed(raw, "many", partition) for partition in range(6)]
        assert all(whole for _, whole in found)
        assert sum(len(values) for values, _ in found) == 50_000
        (perf,) = raw.ask(
            Api.LIST_TRANSACTIONS, 0, state_filters=["CompleteCommit"], producer_id_filters=[]
        )["transaction_states"]
        assert perf["transactional_id"] == "perf"
    broker.communicate(timeout=30)
    assert broker.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(kafka.why_absent() is not None, reason=str(kafka.why_absent()))
def test_transactions_command(our_broker: Broker, topic: str) -> None:
    """Item 84: an operator sees and ends what hangs, with Apache Kafka's own tool."""

    def command(*arguments: Any) -> str:
        return kafka.tool(
            "org.apache.kafka.tools.TransactionsCommand", "--bootstrap-server",
            our_broker.address, *arguments,
        )  # fmt: skip

    with Raw(our_broker.address) as raw:
        create(raw, topic)
        producer = Producer(raw, topic)
        producer.init()
        producer.add((topic, 0))
        producer.send(topic)
        listed = command("list", "--transactional-id-pattern", topic)
        assert re.search(rf"{topic}\s+\S+\s+{producer.pid}\s+Ongoing", listed), listed
        described = command("describe", "--transactional-id", topic)
        assert re.search(rf"Ongoing.*\b{topic}-0", described), described
        active = command("describe-producers", "--topic", topic, "--partition", 0)
        assert re.search(rf"{producer.pid}\s+0\s+", active), active
        command("abort", "--topic", topic, "--partition", 0, "--start-offset", 0)
        active = command("describe-producers", "--topic", topic, "--partition", 0)
        assert re.search(rf"{producer.pid}\s+0\s+.*None", active), active
    assert read_committed_end(our_broker.address, topic) == 2


def read_committed_end(address: str, topic: str) -> int:
    from tests.differential.scenarios import offsets

    with Raw(address) as raw:
        found: int = offsets(raw, topic, -1, isolation=1)["topics"][0]["partitions"][0]["offset"]
        return found
