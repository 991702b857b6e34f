"""confluent-kafka as the client of both sides, in a process of its own."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from typing import Any
from uuid import uuid4

WARM = 30  # transactions before those that count
_topics = itertools.count()


def new_topic(address: str, partitions: int = 1) -> str:
    from confluent_kafka.admin import AdminClient, NewTopic

    name = f"bench-{next(_topics)}-{partitions}"
    admin = AdminClient({"bootstrap.servers": address})
    for future in admin.create_topics([NewTopic(name, partitions, 1)]).values():
        future.result(60)
    for _ in range(200):  # until every partition has a leader
        parts = admin.list_topics(name, 30).topics[name].partitions
        if len(parts) == partitions and all(part.leader >= 0 for part in parts.values()):
            return name
        time.sleep(0.05)
    raise RuntimeError(f"{name} has no leaders")


def run(verb: str, **arguments: Any) -> Any:
    """Run one of the functions below in a fresh process; what it returns."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.librdkafka", verb, json.dumps(arguments)],
        stdout=subprocess.PIPE, check=True, timeout=300,
    )  # fmt: skip
    return json.loads(done.stdout)


def produce(address: str, topic: str, count: int, size: int) -> float:
    """Records/s: idempotent, acks=all, to partition 0."""
    from confluent_kafka import Producer

    failed: list[Any] = []
    producer = Producer({
        "bootstrap.servers": address, "enable.idempotence": True, "acks": "all",
        "queue.buffering.max.messages": 1_000_000, "queue.buffering.max.kbytes": 1_000_000,
        "error_cb": failed.append,
    })  # fmt: skip
    producer.list_topics(topic, 30)
    value = bytes(i % 251 for i in range(size))
    started = time.perf_counter()
    for _ in range(count):
        while True:
            try:
                producer.produce(topic, value, partition=0)
                break
            except BufferError:
                producer.poll(0.001)
    assert producer.flush(120) == 0
    assert not failed, failed
    return count / (time.perf_counter() - started)


def consume(address: str, topic: str, count: int, isolation: str = "read_uncommitted") -> float:
    """Records/s by assignment, from the first record's arrival on."""
    from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

    consumer = Consumer({
        "bootstrap.servers": address, "group.id": "bench", "enable.auto.commit": False,
        "isolation.level": isolation,
        "queued.min.messages": 1_000_000,  # by default it pauses a second whenever 100,000 wait
        "queued.max.messages.kbytes": 1_000_000, "fetch.message.max.bytes": 4_194_304,
    })  # fmt: skip
    consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
    seen = 0
    started = time.perf_counter()
    while seen < count:
        for message in consumer.consume(10_000, 30):
            assert message.error() is None
            len(message.value())
            seen += 1
    took = time.perf_counter() - started
    consumer.close()
    return count / took


def one_by_one(address: str, topic: str, count: int) -> float:
    """Requests/s: one record a request, the next when the last is acknowledged."""
    from confluent_kafka import Producer

    producer = Producer({
        "bootstrap.servers": address, "enable.idempotence": True, "acks": "all", "linger.ms": 0,
    })  # fmt: skip
    value = bytes(100)

    def one() -> None:
        producer.produce(topic, value, partition=0)
        assert producer.flush(30) == 0

    for _ in range(50):
        one()
    started = time.perf_counter()
    for _ in range(count):
        one()
    return count / (time.perf_counter() - started)


def transact(address: str, topic: str, count: int, records: int) -> dict[str, float]:
    """Of `count` transactions of `records` of 100 B, one after the other: transactions/s, and the
    median and 99th of a hundred of the ms from begin to committed."""
    producer = _transactional(address)
    value = bytes(100)
    took = []
    for number in range(WARM + count):
        began = time.perf_counter()
        producer.begin_transaction()
        for _ in range(records):
            producer.produce(topic, value, partition=0)
        producer.commit_transaction(60)
        if number >= WARM:
            took.append(time.perf_counter() - began)
    cuts = statistics.quantiles(took, n=100)
    return {"rate": count / sum(took), "p50": cuts[49] * 1000, "p99": cuts[98] * 1000}


def trades(address: str, topic: str, transactions: int, records: int, aborted: int) -> None:
    """Rows of bench.events.Trade, each `aborted`th transaction of them aborted."""
    from bench.columns import rows
    from bench.events import Trade
    from ledgerstream.wire.columns import RowCodec

    codec = RowCodec(Trade, "instrument")
    some = rows(records)
    values = [value.tobytes() for value in codec.values(some)]
    keys = [key.tobytes() for key in codec.keys(some)[0]]
    producer = _transactional(address)
    for number in range(transactions):
        producer.begin_transaction()
        for key, value in zip(keys, values, strict=True):
            producer.produce(topic, value, key, partition=0)
        if number % aborted == aborted - 1:
            producer.flush(60)  # what is aborted stands in the log
            producer.abort_transaction(60)
        else:
            producer.commit_transaction(60)


def _transactional(address: str) -> Any:
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": address, "transactional.id": f"bench-{uuid4()}"})
    producer.init_transactions(60)
    return producer


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
