"""`kill -9` at random moments, of worker, broker and Postgres, and nothing is different.

Payments are written while a worker scores them; one of the three is killed at a random moment,
again and again: while it starts, restores, streams, commits or takes a snapshot. In the end the log
holds each payment once, and rows, offset and state digest are those of a run that nobody disturbed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import pytest

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client
from ledgerstream.limits import LIMITS
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.worker import Worker
from processors.fraud import Fraud
from processors.payments import Payment, Simulation

CHILD = Path(__file__).with_name("worker_child.py")
ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "payments.csv.gz"


def some_payments(count: int) -> np.ndarray:
    """The first payments of the real file, or generated ones where it is absent."""
    if not REAL.exists():
        days = Simulation(customers=max(1_000, count // 200), terminals=2_000).payments()
        rows = np.concatenate(list(islice(days, 1 + count // 1_500)))[:count]
        assert len(rows) == count
        return rows
    import pandas as pd

    frame = pd.read_csv(REAL, nrows=count)
    rows = np.zeros(len(frame), Payment.dtype())
    rows["payment_id"] = frame["tx_id"]
    rows["at"] = pd.to_datetime(frame["event_time"]).astype("datetime64[ns, UTC]").astype("int64")
    rows["customer"], rows["terminal"] = frame["customer_id"], frame["terminal_id"]
    rows["amount"] = (frame["amount"] * 100).round().astype("int64")
    rows["is_fraud"], rows["scenario"] = frame["is_fraud"], frame["fraud_scenario"]
    return rows


class Victims:
    """The broker and the worker, started again after each kill."""

    def __init__(self, directory: Path, server: EmbeddedPostgres, database: str, port: int) -> None:
        self.directory = directory
        self.server = server
        self.database = database
        self.port = port
        self.said = (directory / "worker.log").open("wb")
        self.broker: Broker
        self.worker: asyncio.subprocess.Process

    async def start_broker(self) -> None:
        self.broker = await Broker.embedded(self.directory / "log", port=self.port)

    async def start_worker(self, until: str = "never") -> None:
        self.worker = await asyncio.create_subprocess_exec(
            sys.executable, str(CHILD), self.broker.address, self.database, until,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(Path.home())},
            stdout=asyncio.subprocess.PIPE,
            stderr=self.said,
        )  # fmt: skip

    async def wait_for_progress(self) -> None:
        """Until the worker has committed a step."""
        assert self.worker.stdout is not None
        line = await self.worker.stdout.readline()
        assert line, f"the worker ended by itself: {self.words()}"

    def words(self) -> str:
        return (self.directory / "worker.log").read_text()[-4_000:]

    async def kill_broker(self) -> None:
        await self.broker.kill()
        await self.start_broker()

    async def kill_postgres(self) -> None:
        """Its keeper starts it again; what it had begun is undone, what it committed is there."""
        pid_file = self.server.home / "data" / "postmaster.pid"
        pid = int(pid_file.read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while True:
                try:
                    connection = await asyncpg.connect(self.server.url)
                except (OSError, asyncpg.PostgresError):
                    await asyncio.sleep(0.02)
                else:
                    await connection.close()
                    break
        assert int(pid_file.read_text().split()[0]) != pid

    async def kill_worker(self) -> None:
        assert self.worker.returncode is None, f"the worker ended by itself: {self.words()}"
        self.worker.kill()
        await self.worker.wait()
        await self.start_worker()


async def outcome(database: str) -> list[tuple[Any, ...]]:
    """Counts and fingerprints of all results, and the state's digest."""
    connection = await asyncpg.connect(database)
    try:
        found: list[tuple[Any, ...]] = []
        for table in ("scored_payment", "fraud_alert"):
            rows = await connection.fetch(
                f"""SELECT count(*), count(DISTINCT payment_id),
                           sum(hashtextextended(t::text, 0)) FROM {table} t"""
            )
            found += [tuple(row) for row in rows]
        found += [
            tuple(row)
            for row in await connection.fetch("SELECT next_offset, digest FROM ls_progress")
        ]
        found += [tuple(r) for r in await connection.fetch("SELECT count(*) FROM ls_dead_letters")]
    finally:
        await connection.close()
    return found


async def claims(database: str) -> int:
    """How often a worker got as far as claiming."""
    connection = await asyncpg.connect(database)
    count: int = await connection.fetchval("SELECT owner_epoch FROM ls_progress")
    await connection.close()
    return count


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def directory() -> Iterator[Path]:
    # Not below pytest's own: under root the database is another user, who may not enter there.
    with tempfile.TemporaryDirectory(prefix="ledgerstream-") as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "count"),
    [
        (10, 100_000),
        pytest.param(100, 600_000, marks=[pytest.mark.torture, pytest.mark.timeout(3_600)]),
    ],
)
async def test_kills_change_nothing(directory: Path, kills: int, count: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    rows = some_payments(count)
    with EmbeddedPostgres.start(directory) as server:
        disturbed = await created(server, "disturbed")
        victims = Victims(directory, server, disturbed, free_port())
        killed = dict.fromkeys(("broker", "postgres", "worker"), 0)
        await victims.start_broker()
        patient = dataclasses.replace(LIMITS, connect_ms_max=60_000)
        async with await Client.connect(victims.broker.address, limits=patient) as client:
            await client.create_topic("payments", partitions=1)
            await victims.start_worker()
            for part in np.array_split(rows, kills):
                writing = asyncio.create_task(write(client, part))
                if chance.random() < 0.7:
                    await victims.wait_for_progress()
                    await asyncio.sleep(chance.uniform(0, 0.2))
                else:
                    await asyncio.sleep(chance.uniform(0, 1.5))  # often while it still starts
                (whom,) = chance.choices(list(killed), [3, 3, 4])
                killed[whom] += 1
                await getattr(victims, f"kill_{whom}")()
                await writing
            victims.worker.terminate()
            await victims.worker.wait()
            await victims.start_worker("end")
            assert await victims.worker.wait() == 0, victims.words()

            found = await client.read("payments", Payment, key="customer")
            np.testing.assert_array_equal(found[0].rows, rows)
            undisturbed = await created(server, "undisturbed")
            await Worker(Fraud, client, undisturbed, until="end").run()
        await victims.broker.stop()
        victims.said.close()
        print(f"{await claims(disturbed)} claims, killed {killed}")
        expected = await outcome(undisturbed)
        assert expected[0][:2] == (count, count)
        assert await outcome(disturbed) == expected


async def write(client: Client, rows: np.ndarray) -> None:
    for part in np.array_split(rows, 20):
        await client.write("payments", part, event=Payment, key="customer")


async def created(server: EmbeddedPostgres, name: str) -> str:
    connection = await asyncpg.connect(server.url)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    return server.url.replace("/ledgerstream?", f"/{name}?")
