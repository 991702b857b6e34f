"""The figure of those who start: `on_event`, an event at a time, through the log to Postgres."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from typing import Any

import asyncpg
import numpy as np
from sqlalchemy.orm import Mapped

from bench.pipeline import OWN
from bench.rows import PAIRS, Row, row
from bench.sides import directory
from ledgerstream import Keyed, Processor, Sliding, Table, Topic
from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client
from ledgerstream.money import EUR
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.tables import Row as Result
from ledgerstream.stream.worker import Worker
from processors.payments import Payment, Simulation

PAYMENTS = 500_000


class Watched(Table):
    """One row a payment."""

    payment_id: Mapped[int]
    customer: Mapped[int]
    spent: Mapped[EUR]
    number: Mapped[int]
    mean: Mapped[float]


class Watch(Processor):
    """Each payment with its customer's day, number and mean, an event at a time."""

    source = Topic("payments", Payment, key="customer")
    spent = Sliding(by="customer", over="24h", sum="amount")
    customers = Keyed(by="customer", payments=int, volume=EUR)

    def on_event(self, event: Any, state: Any) -> Result:
        customer = state.customers[event.customer]
        customer.payments += 1
        customer.volume += event.amount
        return Watched.row(
            spent=state.spent.add(event),
            number=customer.payments,
            mean=customer.volume / customer.payments,
        )


@row("on_event")
def on_event() -> Iterator[Row]:
    rate = statistics.median(asyncio.run(_measure()))
    yield Row("on_event", "plain on_event style: payments → keyed state, a window, a row each",
              "events/s", rate, None, "", "higher", 20_000, 100_000)  # fmt: skip


async def _measure() -> list[float]:
    payments = np.concatenate(list(Simulation().payments()))[:PAYMENTS]
    rates: list[float] = []
    with directory("on_event") as where:
        postgres = EmbeddedPostgres.start(where)
        async with (
            await Broker.embedded(where / "log") as broker,
            await Client.connect(broker.address) as client,
        ):
            await client.create_topic(Watch.source.name, partitions=1)
            await client.write(Watch.source.name, payments, event=Payment, key="customer")
            database = await asyncpg.connect(postgres.url)
            for turn in range(PAIRS + 1):
                await database.execute(f"DROP TABLE IF EXISTS watched, {OWN} CASCADE")
                await database.execute("CHECKPOINT")
                started = time.perf_counter()
                await Worker(Watch, client, postgres.url, until="end").run()
                if turn:  # the first compiles and warms
                    rates.append(len(payments) / (time.perf_counter() - started))
            await database.close()
        postgres.close(wait=True)
    return rates
