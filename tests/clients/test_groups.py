"""Kafka's clients in consumer groups on our broker: they share partitions, commit, and go on.

And read-process-write by each of them: offsets in transactions, aborted now and then, crashed in
the middle, and every record once in the output.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import aiokafka
import confluent_kafka
import kafka as kafka_python
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from ledgerstream.broker.embedded import Broker
from tests.peers import kafka

PARTITIONS, RECORDS = 4, 200
java = pytest.mark.skipif(kafka.why_absent() is not None, reason=str(kafka.why_absent()))
TOOLS = "org.apache.kafka.tools."


def filled(address: str, *topics: str, records: int = RECORDS) -> None:
    """The first has numbers 0, 1, … by turns in its partitions; all have four of them."""
    admin = AdminClient({"bootstrap.servers": address})
    for future in admin.create_topics([NewTopic(each, PARTITIONS, 1) for each in topics]).values():
        future.result(30)
    producer = confluent_kafka.Producer({"bootstrap.servers": address, "linger.ms": 1})
    for n in range(records):
        producer.produce(topics[0], b"%d" % n, partition=n % PARTITIONS)
    assert producer.flush(30) == 0


def consumer(address: str, group: str, **more: Any) -> confluent_kafka.Consumer:
    return confluent_kafka.Consumer({
        "bootstrap.servers": address, "group.id": group, "auto.offset.reset": "earliest",
        "enable.auto.commit": False, "session.timeout.ms": 6_000, "heartbeat.interval.ms": 100,
        "isolation.level": "read_committed", **more,
    })  # fmt: skip


def drained(consumers: Iterable[confluent_kafka.Consumer], count: int) -> Counter[bytes]:
    """What they get together until so many are there."""
    found: Counter[bytes] = Counter()
    deadline = time.monotonic() + 60
    while sum(found.values()) < count:
        assert time.monotonic() < deadline, f"{sum(found.values())} of {count}"
        for each in consumers:
            message = each.poll(0.02)
            if message is not None:
                assert message.error() is None, message.error()
                found[message.value()] += 1
    return found


def settled(consumers: list[confluent_kafka.Consumer]) -> list[set[int]]:
    """Their partitions, once each has its share."""
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        for each in consumers:
            each.poll(0.02)
        shares = [{place.partition for place in each.assignment()} for each in consumers]
        if sorted(map(len, shares)) == [PARTITIONS // len(consumers)] * len(consumers):
            return shares


ALL = Counter(b"%d" % n for n in range(RECORDS))


@pytest.mark.parametrize("strategy", ["range", "cooperative-sticky"])
def test_librdkafka(our_broker: Broker, topic: str, strategy: str) -> None:
    address = our_broker.address
    filled(address, topic)
    how = {"partition.assignment.strategy": strategy}
    first = consumer(address, topic, **how)
    first.subscribe([topic])
    assert drained([first], RECORDS) == ALL
    first.commit(asynchronous=False)
    second = consumer(address, topic, **how)
    second.subscribe([topic])
    shares = settled([first, second])
    assert shares[0] | shares[1] == set(range(PARTITIONS)) and not shares[0] & shares[1]
    first.close()
    assert settled([second]) == [set(range(PARTITIONS))]
    second.close()
    admin = AdminClient({"bootstrap.servers": address})
    described = admin.describe_consumer_groups([topic])[topic].result(30)
    assert described.state is confluent_kafka.ConsumerGroupState.EMPTY
    asked = [confluent_kafka.ConsumerGroupTopicPartitions(topic)]
    committed = admin.list_consumer_group_offsets(asked)[topic].result(30).topic_partitions
    assert sorted((p.partition, p.offset) for p in committed) == [
        (p, RECORDS // PARTITIONS) for p in range(PARTITIONS)
    ]
    assert admin.delete_consumer_groups([topic])[topic].result(30) is None


def test_librdkafka_static_members_come_again_without_a_rebalance(
    our_broker: Broker, topic: str
) -> None:
    address = our_broker.address
    filled(address, topic)
    rebalances: list[str] = []

    def member(name: str) -> confluent_kafka.Consumer:
        made = consumer(address, topic, **{"group.instance.id": name})
        made.subscribe([topic], on_assign=lambda *_: rebalances.append(name))
        return made

    first, second = member("i"), member("j")
    drained([first, second], RECORDS)
    settled([first, second])
    first.poll(0)
    before = {place.partition for place in second.assignment()}
    rebalances.clear()
    second.close()  # a static member does not leave
    second = member("j")
    shares = settled([first, second])
    assert shares[1] == before
    assert rebalances == ["j"]
    first.close()
    second.close()


async def test_aiokafka(our_broker: Broker, topic: str) -> None:
    await asyncio.to_thread(filled, our_broker.address, topic)

    def member() -> aiokafka.AIOKafkaConsumer:
        return aiokafka.AIOKafkaConsumer(
            topic, bootstrap_servers=our_broker.address, group_id=topic,
            auto_offset_reset="earliest", enable_auto_commit=False, heartbeat_interval_ms=100,
            session_timeout_ms=6_000,
        )  # fmt: skip

    first, second = member(), member()
    await first.start()
    found: Counter[bytes] = Counter()
    async with asyncio.timeout(60):
        while found != ALL:
            for messages in (await first.getmany(timeout_ms=200)).values():
                found.update(message.value for message in messages)
        await first.commit()
        await second.start()
        while not (len(first.assignment()) == len(second.assignment()) == PARTITIONS // 2):
            await first.getmany(timeout_ms=20)
            await second.getmany(timeout_ms=20)
    await first.stop()
    await second.stop()
    third = member()
    await third.start()
    assert await third.getmany(timeout_ms=300) == {}
    places = [aiokafka.TopicPartition(topic, p) for p in range(PARTITIONS)]
    assert [await third.committed(place) for place in places] == [RECORDS // PARTITIONS] * 4
    await third.stop()


def test_kafka_python(our_broker: Broker, topic: str) -> None:
    filled(our_broker.address, topic)

    def member() -> kafka_python.KafkaConsumer:
        return kafka_python.KafkaConsumer(
            topic, bootstrap_servers=our_broker.address, group_id=topic,
            auto_offset_reset="earliest", enable_auto_commit=False, heartbeat_interval_ms=100,
            session_timeout_ms=6_000,
        )  # fmt: skip

    first = member()
    found: Counter[bytes] = Counter()
    deadline = time.monotonic() + 60
    while found != ALL:
        assert time.monotonic() < deadline
        for records in first.poll(200).values():
            found.update(record.value for record in records)
    first.commit()
    first.close()
    second = member()
    while not second.assignment():
        assert second.poll(100) == {}
    places = [kafka_python.TopicPartition(topic, p) for p in range(PARTITIONS)]
    assert [second.committed(place) for place in places] == [RECORDS // PARTITIONS] * 4
    second.close()


# -- read, process, write


def librdkafka_loop(address: str, topic: str, out: str, seed: int) -> None:
    """Copies until all is in the output: transactions end well, are aborted, or are left open."""
    rng = random.Random(seed)
    copied = 0
    while copied < RECORDS:
        reader = consumer(address, topic + "-copy")
        reader.subscribe([topic])
        producer = confluent_kafka.Producer({
            "bootstrap.servers": address, "transactional.id": topic, "linger.ms": 0,
        })  # fmt: skip
        producer.init_transactions(30)
        while True:
            messages = [m for m in reader.consume(20, 0.2) if m.error() is None]
            if not messages:
                copied = out_count(address, out)
                if copied >= RECORDS:
                    break
                continue
            producer.begin_transaction()
            for message in messages:
                producer.produce(out, message.value(), partition=message.partition())
            places = reader.position(reader.assignment())
            producer.send_offsets_to_transaction(places, reader.consumer_group_metadata(), 30)
            fate = rng.random()
            if fate < 0.15:
                break  # crashed: nobody ends it but the next of this id
            if fate < 0.35:
                producer.abort_transaction(30)
                back = reader.committed(reader.assignment(), 30)
                for place in back:
                    place.offset = max(place.offset, 0)
                    reader.seek(place)
            else:
                producer.commit_transaction(30)
        reader.close()
        del producer


def out_count(address: str, out: str) -> int:
    reader = consumer(address, "unused")
    ends = [reader.get_watermark_offsets(confluent_kafka.TopicPartition(out, p), 10)[1]
            for p in range(PARTITIONS)]  # fmt: skip
    reader.close()
    if not any(ends):
        return 0
    return len(all_committed(address, out))


def all_committed(address: str, out: str) -> list[bytes]:
    reader = consumer(address, "unused", **{"enable.partition.eof": True})
    reader.assign([confluent_kafka.TopicPartition(out, p, 0) for p in range(PARTITIONS)])
    found, ended = [], set()
    while len(ended) < PARTITIONS:
        message = reader.poll(30)
        assert message is not None
        if message.error() is None:
            found.append(message.value())
        else:
            ended.add(message.partition())
    reader.close()
    return found


def test_librdkafka_reads_processes_and_writes_exactly_once(our_broker: Broker, topic: str) -> None:
    """Items 93 to 95 and 101."""
    filled(our_broker.address, topic, topic + "-out")
    librdkafka_loop(our_broker.address, topic, topic + "-out", seed=1)
    assert Counter(all_committed(our_broker.address, topic + "-out")) == ALL


async def test_aiokafka_reads_processes_and_writes_exactly_once(
    our_broker: Broker, topic: str
) -> None:
    """Item 97: TxnOffsetCommit of version 0, without a member."""
    address, out = our_broker.address, topic + "-out"
    await asyncio.to_thread(filled, address, topic, out)
    reader = aiokafka.AIOKafkaConsumer(
        topic, bootstrap_servers=address, group_id=topic, auto_offset_reset="earliest",
        enable_auto_commit=False, isolation_level="read_committed",
    )  # fmt: skip
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=address, transactional_id=topic)
    await reader.start()
    await producer.start()
    done, turn = 0, 0
    async with asyncio.timeout(60):
        while done < RECORDS:
            batches = await reader.getmany(timeout_ms=200, max_records=20)
            turn += 1
            count = sum(map(len, batches.values()))
            if not count:
                continue
            await producer.begin_transaction()
            for place, messages in batches.items():
                for message in messages:
                    await producer.send(out, message.value, partition=place.partition)
            offsets = {place: messages[-1].offset + 1 for place, messages in batches.items()}
            await producer.send_offsets_to_transaction(offsets, topic)
            if turn % 4 == 0:
                await producer.abort_transaction()
                for place, messages in batches.items():
                    reader.seek(place, messages[0].offset)
            else:
                await producer.commit_transaction()
                done += count
    places = [aiokafka.TopicPartition(topic, p) for p in range(PARTITIONS)]
    assert [await reader.committed(place) for place in places] == [RECORDS // PARTITIONS] * 4
    await reader.stop()
    await producer.stop()
    assert Counter(await asyncio.to_thread(all_committed, address, out)) == ALL


def test_kafka_python_reads_processes_and_writes_exactly_once(
    our_broker: Broker, topic: str
) -> None:
    """Items 93 to 95."""
    address, out = our_broker.address, topic + "-out"
    filled(address, topic, out)
    reader = kafka_python.KafkaConsumer(
        topic, bootstrap_servers=address, group_id=topic, auto_offset_reset="earliest",
        enable_auto_commit=False, isolation_level="read_committed",
    )  # fmt: skip
    producer = kafka_python.KafkaProducer(bootstrap_servers=address, transactional_id=topic)
    producer.init_transactions()
    done = turn = 0
    deadline = time.monotonic() + 60
    while done < RECORDS:
        assert time.monotonic() < deadline
        batches = reader.poll(200, max_records=20)
        turn += 1
        count = sum(map(len, batches.values()))
        if not count:
            continue
        producer.begin_transaction()
        for place, records in batches.items():
            for record in records:
                producer.send(out, record.value, partition=place.partition)
        offsets = {
            place: kafka_python.OffsetAndMetadata(records[-1].offset + 1, "", -1)
            for place, records in batches.items()
        }
        producer.send_offsets_to_transaction(offsets, topic)
        if turn % 4 == 0:
            producer.abort_transaction()
            for place, records in batches.items():
                reader.seek(place, records[0].offset)
        else:
            producer.commit_transaction()
            done += count
    reader.close()
    producer.close()
    assert Counter(all_committed(address, out)) == ALL


# -- Java


@pytest.mark.slow
@java
def test_consumer_performance(our_broker: Broker, topic: str) -> None:
    filled(our_broker.address, topic, records=20_000)
    said = kafka.tool(
        TOOLS + "ConsumerPerformance", "--bootstrap-server", our_broker.address, "--topic", topic,
        "--num-records", 20_000, "--group", topic, "--timeout", 60_000,
    )  # fmt: skip
    columns = said.strip().splitlines()[-1].split(",")
    assert int(columns[4]) >= 20_000, said


@pytest.mark.slow
@java
def test_verifiable_consumer_and_the_command_of_groups(our_broker: Broker, topic: str) -> None:
    """It is killed, and another goes on where it had committed."""
    address = our_broker.address
    filled(address, topic)

    def group(*arguments: Any) -> str:
        return kafka.tool(
            TOOLS + "consumer.group.ConsumerGroupCommand", "--bootstrap-server", address,
            *arguments,
        )  # fmt: skip

    def consume(count: int, *more: str) -> list[dict[str, Any]]:
        said = kafka.tool(
            TOOLS + "VerifiableConsumer", "--bootstrap-server", address, "--topic", topic,
            "--group-id", topic, "--max-messages", count, "--reset-policy", "earliest", *more,
        )  # fmt: skip
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    def consumed(events: list[dict[str, Any]]) -> int:
        """Its own sum counts what it fetched beyond its limit, too."""
        found = (e["partitions"] for e in events if e["name"] == "records_consumed")
        return sum(part["count"] for parts in found for part in parts)

    first = consume(RECORDS // 2)
    assert consumed(first) == RECORDS // 2
    second = consume(RECORDS // 2, "--group-instance-id", "i", "--session-timeout", "6000")
    assert consumed(second) == RECORDS // 2
    commits = [e for e in second if e["name"] == "offsets_committed"]
    assert commits and all(event["success"] for event in commits)
    described = group("--describe", "--group", topic)
    lags = re.findall(rf"{topic}\s+{topic}\s+\d\s+(\d+)\s+(\d+)\s+0\b", described)
    assert len(lags) == PARTITIONS, described
    assert topic in group("--list").split()
    assert re.search(rf"{topic}\s+\S+.*", group("--describe", "--group", topic, "--state"))
    group("--describe", "--group", topic, "--members", "--verbose")
    # its static member is still there until its session ends
    admin = AdminClient({"bootstrap.servers": address})
    deadline = time.monotonic() + 60
    empty = confluent_kafka.ConsumerGroupState.EMPTY
    while admin.describe_consumer_groups([topic])[topic].result(30).state is not empty:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    reset = group("--reset-offsets", "--group", topic, "--topic", topic, "--to-earliest",
                  "--execute")  # fmt: skip
    assert len(re.findall(rf"{topic}\s+{topic}\s+\d\s+0\b", reset)) == PARTITIONS, reset
    group("--delete-offsets", "--group", topic, "--topic", topic)
    group("--delete", "--group", topic)
    assert topic not in group("--list").split()


@pytest.mark.slow
@java
@pytest.mark.parametrize("metadata", [False, True])
def test_transactional_message_copier(our_broker: Broker, topic: str, metadata: bool) -> None:
    """Items 93 to 97: with group metadata and without, random aborts, and killed once.

    Where it has no group metadata it assigns its partition itself and is fenced by its id.
    """
    address, out = our_broker.address, topic + "-out"
    filled(address, topic, out)
    copied: list[int] = []
    for partition in range(PARTITIONS):
        arguments = [
            "--transactional-id", f"{topic}-{partition}", "--consumer-group", topic,
            "--broker-list", address, "--input-topic", topic, "--input-partition", partition,
            "--output-topic", out, "--transaction-size", 7, "--enable-random-aborts",
            "--max-messages", RECORDS // PARTITIONS,
        ]  # fmt: skip
        if metadata:
            arguments.append("--group-mode")
            arguments.append("--use-group-metadata")
            del arguments[arguments.index("--max-messages") :][:2]
            break
        said = kafka.tool(TOOLS + "TransactionalMessageCopier", *arguments)
        last = json.loads(said.strip().splitlines()[-1])
        copied.append(last["consumed"])
    if metadata:
        process = subprocess.Popen(
            [*kafka._java("256m"), TOOLS + "TransactionalMessageCopier", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while len(all_committed(address, out)) < RECORDS:
            assert time.monotonic() < deadline and process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert Counter(all_committed(address, out)) == ALL


@pytest.mark.slow
@java
def test_transactional_message_copier_is_killed_in_the_middle_and_started_again(
    our_broker: Broker, topic: str
) -> None:
    """Its successor has its transactional id: what was under way is aborted, and done again."""
    address, out, records = our_broker.address, topic + "-out", 4_000
    filled(address, topic, out, records=records)
    arguments = [
        "--transactional-id", topic, "--consumer-group", topic, "--broker-list", address,
        "--input-topic", topic, "--input-partition", 0, "--output-topic", out,
        "--transaction-size", 10, "--enable-random-aborts",
    ]  # fmt: skip
    mine = Counter(b"%d" % n for n in range(0, records, PARTITIONS))
    for part in (1, 2, 3, 4):
        process = subprocess.Popen(
            [*kafka._java("256m"), TOOLS + "TransactionalMessageCopier", *map(str, arguments)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while len(all_committed(address, out)) < len(mine) * part // 4:
            assert time.monotonic() < deadline and process.poll() is None
        process.kill()
        process.wait()
    assert Counter(all_committed(address, out)) == mine
