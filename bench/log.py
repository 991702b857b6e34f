"""The log's figures: produce, consume, latency over many partitions, memory."""

from __future__ import annotations

import asyncio
import re
import socket
import statistics
from collections.abc import Iterator

from bench import librdkafka
from bench.rows import PAIRS, Row, in_turn, row
from bench.sides import Side, both, ours
from tests.peers import kafka

KAFKA = f"Apache Kafka {kafka.VERSION}"
RECORDS = 1_000_000


@row("produce")
def produce() -> Iterator[Row]:
    """Also gives `produce_cpu`, from the same runs."""
    cpu: dict[str, list[float]] = {}
    with both() as (us, peer):

        def run(side: Side) -> float:
            topic = librdkafka.new_topic(side.address)
            before = side.cpu_seconds()
            rate: float = librdkafka.run(
                "produce", address=side.address, topic=topic, count=RECORDS, size=100
            )
            cpu.setdefault(side.name, []).append(side.cpu_seconds() - before)
            return rate

        mine, theirs = in_turn(
            lambda: run(us),
            (lambda p=peer: run(p)) if peer else None,  # type: ignore[misc]
        )
    yield Row("produce", "produce 100 B, idempotent, acks=all, 1 partition, confluent-kafka",
              "records/s", mine, theirs, KAFKA, "higher", 1.0, 1.3)  # fmt: skip
    used = {name: statistics.median(values[1:]) for name, values in cpu.items()}
    yield Row("produce_cpu", "the broker's CPU for a million of them", "s",
              used["LedgerStream"], used.get(KAFKA), KAFKA, "lower", 0.7, 0.3)  # fmt: skip


@row("produce_java")
def produce_java() -> Iterator[Row]:
    if kafka.why_absent():
        return
    with both() as (us, peer):
        assert peer is not None
        for partitions in (1, 6):

            def run(side: Side, partitions: int = partitions) -> float:
                topic = librdkafka.new_topic(side.address, partitions)
                said = kafka.tool(
                    "org.apache.kafka.tools.ProducerPerformance", "--topic", topic,
                    "--num-records", RECORDS, "--record-size", 100, "--throughput", -1,
                    "--command-property", f"bootstrap.servers={side.address}", "acks=all",
                    "enable.idempotence=true", heap="512m",
                )  # fmt: skip
                return float(re.findall(r"([\d.]+) records/sec", said)[-1])

            mine, theirs = in_turn(lambda r=run: r(us), lambda r=run: r(peer))  # type: ignore[misc]
            yield Row(f"produce_java.{partitions}",
                      f"Java's ProducerPerformance, 100 B, {partitions} partition(s)",
                      "records/s", mine, theirs, KAFKA, "higher", 1.0, 1.5)  # fmt: skip


@row("produce_spread")
def produce_spread() -> Iterator[Row]:
    """Java's producer, record by record to the partitions in turn: it puts all that is ready for a
    broker into one request. (librdkafka sends a request a partition, five at a time: over 1,000
    partitions its p99 is that queue's on either broker.)"""
    if kafka.why_absent():
        return
    found: dict[tuple[str, int], list[float]] = {}
    with both() as (us, peer):
        assert peer is not None
        sides = [us, peer]
        topics = {
            (side.name, n): librdkafka.new_topic(side.address, n)
            for side in sides
            for n in (6, 1000)
        }
        for _ in range(PAIRS):
            for side in sides:
                for partitions in (6, 1000):
                    said = kafka.tool(
                        "org.apache.kafka.tools.ProducerPerformance",
                        "--topic", topics[side.name, partitions], "--num-records", 160_000,
                        "--warmup-records", 60_000, "--record-size", 100, "--throughput", 20_000,
                        "--command-property", f"bootstrap.servers={side.address}", "acks=all",
                        "enable.idempotence=true",
                        "partitioner.class=org.apache.kafka.clients.producer.RoundRobinPartitioner",
                        heap="512m",
                    )  # fmt: skip
                    p99 = float(re.findall(r"(\d+) ms 99th", said)[-1])
                    found.setdefault((side.name, partitions), []).append(p99)
    p99s = {key: statistics.median(values) for key, values in found.items()}
    many, few = p99s["LedgerStream", 1000], p99s["LedgerStream", 6]
    yield Row("produce_spread", "p99 of an acknowledged record at 20,000/s, 1,000 partitions ÷ 6",
              "ms", many, few, "ours at 6 partitions", "lower", 4, 2)  # fmt: skip
    yield Row("produce_spread.kafka", "p99 at 1,000 partitions", "ms", many,
              p99s[KAFKA, 1000], KAFKA, "lower", 4, 2)  # fmt: skip
    yield Row("produce_spread.kafka6", "p99 at 6 partitions", "ms", few, p99s[KAFKA, 6], KAFKA,
              "lower")  # fmt: skip


@row("consume")
def consume() -> Iterator[Row]:
    with both() as (us, peer):
        topics = {}
        for side in (us, peer):
            if side is not None:
                topics[side.name] = librdkafka.new_topic(side.address)
                librdkafka.run("produce", address=side.address, topic=topics[side.name],
                               count=RECORDS, size=100)  # fmt: skip

        def run(side: Side) -> float:
            rate: float = librdkafka.run(
                "consume", address=side.address, topic=topics[side.name], count=RECORDS
            )
            return rate

        mine, theirs = in_turn(
            lambda: run(us),
            (lambda p=peer: run(p)) if peer else None,  # type: ignore[misc]
        )
    yield Row("consume", "consume 100 B by assignment, confluent-kafka", "records/s",
              mine, theirs, KAFKA, "higher", 1.0, 1.2)  # fmt: skip


@row("single_record")
def single_record() -> Iterator[Row]:
    with both() as (us, peer):
        topics = {side.name: librdkafka.new_topic(side.address) for side in (us, peer) if side}

        def run(side: Side) -> float:
            rate: float = librdkafka.run(
                "one_by_one", address=side.address, topic=topics[side.name], count=2000
            )
            return rate

        mine, theirs = in_turn(
            lambda: run(us),
            (lambda p=peer: run(p)) if peer else None,  # type: ignore[misc]
        )
    yield Row("single_record", "one record a request, one client waiting for each", "requests/s",
              mine, theirs, KAFKA, "higher", 0.5, 1)  # fmt: skip


@row("broker_memory")
def broker_memory() -> Iterator[Row]:
    mib = 1024 * 1024
    with ours() as us:
        yield Row("broker_memory.start", "our broker's memory when it has just started", "MiB",
                  us.memory_bytes() / mib, None, "", "lower")  # fmt: skip
        topic = librdkafka.new_topic(us.address)
        for millions in (1, 10):
            for _ in range(1 if millions == 1 else 9):
                librdkafka.run("produce", address=us.address, topic=topic, count=RECORDS, size=100)
            yield Row(f"broker_memory.{millions}M", f"after {millions} M records of 100 B", "MiB",
                      us.memory_bytes() / mib, None, "", "lower")  # fmt: skip
    with ours() as us:
        librdkafka.new_topic(us.address, 1000)
        host, port = us.address.split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(500)]
        asyncio.run(_metadata(us.address))
        yield Row("broker_memory.idle", "with 1,000 idle partitions and 500 connections", "MiB",
                  us.memory_bytes() / mib, None, "", "lower")  # fmt: skip
        for connection in idle:
            connection.close()


async def _metadata(address: str) -> None:
    from ledgerstream.client import Client

    async with await Client.connect(address) as client:
        await client.topics()
