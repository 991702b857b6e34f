"""Rows and topics in one atomic step: the same processor on our log and on Apache Kafka."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator

import asyncpg
import numpy as np

from bench.pipeline import OWN, RESULTS
from bench.rows import PAIRS, Row, row
from bench.sides import Side, both, directory
from ledgerstream.client import Client
from ledgerstream.events import Event, Timestamp
from ledgerstream.money import EUR
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.outputs import Events
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.processor import State, Topic
from ledgerstream.stream.tables import Rows
from ledgerstream.stream.worker import Worker
from processors.fraud import Fraud, FraudAlert
from processors.payments import Payment, Simulation
from tests.peers.kafka import VERSION

PAYMENTS = 500_000
_numbers = itertools.count()


class Suspicion(Event):
    """An alert for whoever has to look at it."""

    payment_id: int
    at: Timestamp
    customer: int
    amount: EUR
    score: float
    reasons: int


SUSPICIONS = Topic("suspicions", Suspicion, key="customer")


class Alerting(Fraud):
    """The fraud processor, which emits each alert, too."""

    name = "Alerting"
    source = Topic("payments", Payment, key="customer")
    outputs = (SUSPICIONS,)

    def process(self, payments: Batch, state: State) -> list[Rows | Events]:  # type: ignore[override]
        scored, alerts = super().process(payments, state)
        assert alerts.table is FraudAlert
        columns = {name: alerts.columns[name] for name in ("score", "reasons")}
        return [scored, alerts, SUSPICIONS.emit(payments, of=alerts.event, **columns)]


@row("atomic_kafka")
def atomic_kafka() -> Iterator[Row]:
    """Alerts to a topic and rows to Postgres: fifteen features and rules a payment."""
    with both() as (us, peer):
        ours, theirs = asyncio.run(_measure(us, peer))
    yield Row("atomic_kafka", "payments → alerts in a topic and rows in Postgres, one atomic step",
              "events/s", statistics.median(ours), statistics.median(theirs) if theirs else None,
              f"the same processor on Apache Kafka {VERSION}", "higher", None, 0.9)  # fmt: skip


async def _measure(us: Side, peer: Side | None) -> tuple[list[float], list[float]]:
    payments = np.concatenate(list(Simulation().payments()))[:PAYMENTS]
    rates: dict[str, list[float]] = {us.name: []}
    sides = [us] if peer is None else [us, peer]
    with directory("atomic") as where, EmbeddedPostgres.start(where) as postgres:
        for side in sides:
            async with await Client.connect(side.address) as client:
                for topic in (Alerting.source, SUSPICIONS):
                    await client.create_topic(topic.name, 1, config={"retention.ms": "-1"})
                await client.write(Alerting.source.name, payments, event=Payment, key="customer")
        for pair in range(PAIRS + 1):
            for side in sides if pair % 2 else reversed(sides):
                rate = await _run(side, postgres.url)
                if pair:
                    rates.setdefault(side.name, []).append(rate)
    return rates[us.name], rates[peer.name] if peer is not None else []


async def _run(side: Side, url: str) -> float:
    database = await asyncpg.connect(url)
    await database.execute(f"DROP TABLE IF EXISTS {RESULTS}, {OWN}, ls_slots, ls_results CASCADE")
    await database.execute("CHECKPOINT")
    await database.close()
    name = f"Alerting{next(_numbers)}"  # a witness of its own
    processor = type(name, (Alerting,), {"name": name})
    async with await Client.connect(side.address) as client:
        began = time.perf_counter()
        progress = await Worker(processor, client, url, until="end").run()
        took = time.perf_counter() - began
    assert progress.events == PAYMENTS
    return PAYMENTS / took
