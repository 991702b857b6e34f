"""The figure against Quix Streams: JSON payments to rows in Postgres."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import numpy as np

from bench.pipeline import OWN, RESULTS
from bench.rows import PAIRS, Row, row
from bench.sides import apache_kafka, directory
from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.processor import Topic
from ledgerstream.stream.worker import Worker
from processors.fraud import Fraud
from processors.payments import Payment, Simulation

PYTHON = Path(__file__).parents[1] / "build" / "quix" / "bin" / "python"
VERSION = "3.28.1"
OURS, THEIRS = 500_000, 60_000  # events: about five seconds of each
TOPIC = "payments_json"


class JsonFraud(Fraud):
    """The fraud processor over the same payments as JSON."""

    source = Topic(TOPIC, Payment, key="customer", encoding="json")


@row("pipeline_quix")
def pipeline_quix() -> Iterator[Row]:
    """Ours with fifteen features, rules and scores, exactly once; theirs a keyed count and mean, at
    least once, from Apache Kafka. Rates are per event, so each side has as many as it needs."""
    ours, theirs = asyncio.run(_measure())
    yield Row("pipeline_quix", "JSON payments → scored rows in Postgres, exactly once",
              "events/s", statistics.median(ours), statistics.median(theirs) if theirs else None,
              f"Quix Streams {VERSION}, at least once, on Apache Kafka", "higher",
              8, 15)  # fmt: skip


async def _measure() -> tuple[list[float], list[float]]:
    payments = np.concatenate(list(Simulation().payments()))[:OURS]
    ours: list[float] = []
    theirs: list[float] = []
    with directory("quix") as where:
        postgres = EmbeddedPostgres.start(where)
        async with (
            await Broker.embedded(where / "log") as broker,
            await Client.connect(broker.address) as client,
        ):
            await _write(client, payments)
            for pair in range(PAIRS + 1):
                rates = await _ours(client, postgres.url), await _theirs(payments, postgres.url)
                if pair:
                    ours.append(rates[0])
                    theirs += [] if rates[1] is None else [rates[1]]
        postgres.close(wait=True)
    return ours, theirs


async def _write(client: Client, payments: np.ndarray) -> None:
    await client.create_topic(TOPIC, partitions=1)
    await client.write(TOPIC, payments, event=Payment, key="customer", encoding="json")


async def _ours(client: Client, url: str) -> float:
    database = await asyncpg.connect(url)
    await database.execute(f"DROP TABLE IF EXISTS {RESULTS}, {OWN} CASCADE")
    await database.execute("CHECKPOINT")
    await database.close()
    began = time.perf_counter()
    await Worker(JsonFraud, client, url, until="end").run()
    return OURS / (time.perf_counter() - began)


async def _theirs(payments: np.ndarray, url: str) -> float | None:
    """From an Apache Kafka of its own each time: a later group on the same one may hang."""
    with apache_kafka() as kafka:
        if kafka is None or not PYTHON.exists():
            return None
        async with await Client.connect(kafka.address) as client:
            await _write(client, payments[:THEIRS])
        return await asyncio.to_thread(_quix, kafka.address, url)


def _quix(address: str, url: str) -> float:
    server = urlsplit(url)
    host = server.hostname or parse_qs(server.query)["host"][0]  # a directory with a socket
    with tempfile.TemporaryDirectory() as state:
        done = subprocess.run(
            [PYTHON, Path(__file__).with_name("quix_app.py"), address, TOPIC, str(THEIRS),
             host, str(server.port or 5432), server.path[1:], server.username or "",
             server.password or "", state],
            capture_output=True, text=True, check=True, timeout=600,
        )  # fmt: skip
    return THEIRS / float(done.stdout.split()[-1])
