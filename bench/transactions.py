"""The transactional path's figures: latency, rate, read-process-write, read_committed."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import statistics
from collections.abc import Iterator
from uuid import uuid4

from bench import librdkafka
from bench.columns import read_by_ours
from bench.rows import PAIRS, Row, in_turn, row
from bench.sides import Side, both
from tests.peers import kafka

KAFKA = f"Apache Kafka {kafka.VERSION}"
COPIED = 30_000
PER_TRANSACTION, TRANSACTIONS, ABORTED = 1_000, 1_000, 5  # each fifth is aborted
COPIER_TIME = "%Y/%m/%d %H:%M:%S:%f"


@row("txn_latency")
def txn_latency() -> Iterator[Row]:
    """Also gives `txn_rate`, from the same runs."""
    with both() as (us, peer):
        for records, count in ((10, 400), (1_000, 100)):
            found = _transact([side for side in (us, peer) if side], records, count)
            mine, theirs = found[us.name], found.get(KAFKA, {})
            if records == 10:
                for name, what in (("p50", "half"), ("p99", "99 of 100")):
                    yield Row(f"txn_latency.{name}",
                              f"transaction of 10 records, confluent-kafka: {what} are faster",
                              "ms", mine[name], theirs.get(name), KAFKA, "lower",
                              1.0, 0.4)  # fmt: skip
            yield Row(f"txn_rate.{records}",
                      f"one producer, {records:,} records of 100 B each, confluent-kafka",
                      "transactions/s", mine["rate"], theirs.get("rate"), KAFKA, "higher",
                      1.0, 2)  # fmt: skip


def _transact(sides: list[Side], records: int, count: int) -> dict[str, dict[str, float]]:
    """By side, the medians of what `librdkafka.transact` gives."""
    runs: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    topics = {side.name: librdkafka.new_topic(side.address) for side in sides}
    for number in range(PAIRS + 1):
        for side in sides if number % 2 else reversed(sides):
            runs[side.name].append(
                librdkafka.run("transact", address=side.address, topic=topics[side.name],
                               count=count, records=records)
            )  # fmt: skip
    return {
        name: {key: statistics.median(run[key] for run in found[1:]) for key in found[0]}
        for name, found in runs.items()
    }


@row("read_process_write")
def read_process_write() -> Iterator[Row]:
    """From its first poll to its end: the start of its virtual machine is nobody's figure."""
    if kafka.why_absent():
        return
    groups = itertools.count()
    with both() as (us, peer):
        assert peer is not None
        topics = {}
        for side in (us, peer):
            topics[side.name] = [librdkafka.new_topic(side.address) for _ in range(2)]
            librdkafka.run("produce", address=side.address, topic=topics[side.name][0],
                           count=COPIED, size=100)  # fmt: skip

        def run(side: Side) -> float:
            source, target = topics[side.name]
            said = kafka.tool(
                "org.apache.kafka.tools.TransactionalMessageCopier",
                "--broker-list", side.address, "--transactional-id", f"copier-{uuid4()}",
                "--consumer-group", f"copier-{next(groups)}", "--input-topic", source,
                "--input-partition", 0, "--output-topic", target, "--transaction-size", 500,
                "--max-messages", COPIED, heap="512m",
            )  # fmt: skip
            lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
            assert lines[-1]["totalProcessed"] == COPIED, lines[-1]
            began, ended = (_clock(line["time"]) for line in (lines[0], lines[-1]))
            return COPIED / (ended - began).total_seconds()

        mine, theirs = in_turn(lambda: run(us), lambda: run(peer), pairs=3)
    yield Row("read_process_write",
              "TransactionalMessageCopier, 500 records of 100 B and their offsets a transaction",
              "records/s", mine, theirs, KAFKA, "higher", 0.8, 1.2)  # fmt: skip


def _clock(text: str) -> dt.datetime:
    return dt.datetime.strptime(text, COPIER_TIME).replace(tzinfo=dt.UTC)


@row("read_committed")
def read_committed() -> Iterator[Row]:
    committed = PER_TRANSACTION * TRANSACTIONS * (ABORTED - 1) // ABORTED
    with both() as (us, peer):
        topics = {}
        for side in (us, peer):
            if side is not None:
                topics[side.name] = librdkafka.new_topic(side.address)
                librdkafka.run("trades", address=side.address, topic=topics[side.name],
                               transactions=TRANSACTIONS, records=PER_TRANSACTION,
                               aborted=ABORTED)  # fmt: skip

        def run(side: Side) -> float:
            rate: float = librdkafka.run(
                "consume", address=side.address, topic=topics[side.name], count=committed,
                isolation="read_committed",
            )  # fmt: skip
            return rate

        mine, theirs = in_turn(
            lambda: run(us),
            (lambda p=peer: run(p)) if peer else None,  # type: ignore[misc]
            pairs=3,
        )
        columns, _ = in_turn(lambda: read_by_ours(us.address, topics[us.name]), None)
    yield Row("read_committed", "48-byte rows, a fifth aborted, by assignment, confluent-kafka",
              "records/s", mine, theirs, KAFKA, "higher", 1.0, 1.2)  # fmt: skip
    yield Row("read_committed.columns", "the same rows from ours: our reader ÷ confluent-kafka's",
              "rows/s", columns, mine, "confluent-kafka", "higher", 8, 15)  # fmt: skip
