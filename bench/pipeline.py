"""The pipeline's figure: payments to scored rows in Postgres, exactly once, against COPY alone."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

import asyncpg
import numpy as np

from bench.rows import PAIRS, Row, row
from bench.sides import directory
from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.machine import Input, Machine
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.sink import copy_chunks
from ledgerstream.stream.worker import Worker
from processors.fraud import Fraud
from processors.payments import Payment, Simulation

PAYMENTS = 1_500_000
RESULTS = "scored_payment, fraud_alert"
OWN = (
    "ls_progress, ls_steps, ls_snapshots, ls_snapshot_pages, ls_topics, ls_dead_letters, "
    "ls_code_changes, ls_processors, ls_watch"
)


@row("pipeline_copy")
def pipeline_copy() -> Iterator[Row]:
    runs, copies = asyncio.run(_measure())
    mine, alone = statistics.median(runs), statistics.median(copies)
    yield Row("pipeline_copy",
              "payments → fifteen features, rules → scored rows, exactly once ÷ COPY alone",
              "events/s", mine, alone, "COPY alone of the same rows in the same steps", "higher",
              0.25, 0.7)  # fmt: skip


async def _measure() -> tuple[list[float], list[float]]:
    payments = np.concatenate(list(Simulation().payments()))[:PAYMENTS]
    runs: list[float] = []
    alone: list[float] = []
    with directory("pipeline") as where:
        postgres = EmbeddedPostgres.start(where)
        async with (
            await Broker.embedded(where / "log") as broker,
            await Client.connect(broker.address) as client,
        ):
            await client.create_topic(Fraud.source.name, partitions=1)
            await client.write(Fraud.source.name, payments, event=Payment, key="customer")
            database = await asyncpg.connect(postgres.url)
            for pair in range(PAIRS + 1):
                await database.execute(f"DROP TABLE IF EXISTS {RESULTS}, {OWN} CASCADE")
                await database.execute("CHECKPOINT")
                steps: list[int] = []
                started = time.perf_counter()
                worker = Worker(
                    Fraud, client, postgres.url, until="end",
                    on_progress=lambda p, steps=steps: steps.append(p.position[0]),
                )  # fmt: skip
                await worker.run()
                took = time.perf_counter() - started
                encoded = await asyncio.to_thread(_encode, payments, steps)
                await database.execute(f"TRUNCATE {RESULTS}")
                await database.execute("CHECKPOINT")
                copied = await _copy(database, encoded)
                if pair:  # the first compiles and warms
                    runs.append(len(payments) / took)
                    alone.append(len(payments) / copied)
            await database.close()
        postgres.close(wait=True)
    return runs, alone


def _encode(payments: np.ndarray, steps: list[int]) -> list[dict]:
    """The bytes that the same steps COPY."""
    machine, encoded, first = Machine(Fraud(), 0, 1), [], 0
    for end in steps:
        batch = Batch(Fraud.source, payments[first:end], np.arange(first, end))
        encoded.append(machine.step(Input(0, first, end, batch)).copies)
        machine.forget()
        first = end
    return encoded


async def _copy(database: asyncpg.Connection, encoded: list[dict]) -> float:
    """Seconds for COPY alone, one transaction a step."""
    started = time.perf_counter()
    for copies in encoded:
        async with database.transaction():
            for table, (parts, _) in copies.items():
                await database.copy_to_table(
                    table.relation().name, source=copy_chunks(parts), format="binary"
                )
    return time.perf_counter() - started
