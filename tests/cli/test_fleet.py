"""Several worker processes, one of them killed in the middle: the results are the same."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import pytest
import pytest_asyncio

from ledgerstream.broker.embedded import Broker
from ledgerstream.cli.fleet import Fleet, Task, shares
from ledgerstream.client import Client
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.several import summed
from ledgerstream.stream.worker import Progress, Worker
from tests.cli.conftest import PROGRAM
from tests.stream.spending import Payment, Spending, payments

pytestmark = pytest.mark.slow

PLACE = "tests.stream.spending:Spending"
ROOT = Path(__file__).parents[2]
PARTITIONS = 4
COUNT = 60_000


def test_each_partition_has_one_worker() -> None:
    assert shares({"t": 4}, 2) == [{"t": [0, 2]}, {"t": [1, 3]}]
    assert shares({"t": 3}, 8) == [{"t": [0]}, {"t": [1]}, {"t": [2]}]
    assert shares({"t": 3, "u": 2}, 2) == [{"t": [0, 2], "u": [1]}, {"t": [1], "u": [0]}]


def test_progress_adds_up_and_the_newest_place_counts() -> None:
    told = [
        Progress("P", events=3, commits=1, rows={"a": 2}, position={0: 3}, lag={0: 9}),
        Progress("P", events=4, commits=2, rows={"a": 1, "b": 1}, position={0: 7}, lag={0: 1}),
    ]
    assert summed("P", told) == Progress(
        "P", events=7, commits=3, rows={"a": 3, "b": 1}, position={0: 7}, lag={0: 1}
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[tuple[str, str, str]]:
    """A log with payments in four partitions; its address, and two empty databases."""
    with tempfile.TemporaryDirectory(prefix="ledgerstream-") as name:
        with EmbeddedPostgres.start(Path(name)) as server:
            admin = await asyncpg.connect(server.url)
            urls = []
            for database in ("whole", "shared"):
                await admin.execute(f"CREATE DATABASE {database}")
                urls.append(server.url.replace("/ledgerstream?", f"/{database}?"))
            await admin.close()
            async with await Broker.embedded(Path(name) / "log") as broker:
                async with await Client.connect(broker.address) as client:
                    await client.create_topic("payments", partitions=PARTITIONS)
                    rows = payments(COUNT, customers=500)
                    for part in np.array_split(rows, 30):
                        await client.write("payments", part, event=Payment, key="customer")
                    await Worker(Spending, client, urls[0], until="end").run()
                yield broker.address, urls[0], urls[1]


async def outcome(database: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(database)
    try:
        found = []
        for query in (
            "SELECT count(*), sum(hashtextextended(t::text, 0)) FROM spent t",
            "SELECT count(*), sum(hashtextextended(t::text, 0)) FROM large t",
            "SELECT partition, next_offset, digest FROM ls_progress ORDER BY 1",
        ):
            found += [tuple(row) for row in await connection.fetch(query)]
        return found
    finally:
        await connection.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_one_of_two_workers_is_killed_and_nothing_is_different(
    world: tuple[str, str, str],
) -> None:
    address, whole, shared = world
    said: list[str] = []
    killed: list[int] = []

    def kill_once(worker: int, pid: int) -> None:
        if not killed:
            killed.append(worker)
            os.kill(pid, signal.SIGKILL)

    tasks = [
        Task(PLACE, address, shared, share, "end", False)
        for share in shares({"payments": PARTITIONS}, 2)
    ]
    fleet = Fleet("Spending", tasks, say=said.append, on_tell=kill_once)
    assert await fleet.run() == 0
    places = ", ".join(f"payments-{at}" for at in tasks[killed[0]].partitions["payments"])
    assert said == [f"worker {killed[0]} ({places}) was killed by SIGKILL and is started again."]
    assert sorted(fleet.progress.position) == [0, 1, 2, 3]
    assert await outcome(shared) == await outcome(whole)


@pytest.mark.asyncio(loop_scope="module")
async def test_sigterm_stops_all_and_the_worst_exit_code_is_theirs(
    world: tuple[str, str, str],
) -> None:
    address, whole, _ = world
    run = subprocess.Popen(  # noqa: ASYNC220
        [PROGRAM, "run", "tests.stream.test_explain:Breaks", "--workers", "2", "--log", address,
         "--database", whole, "--json"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    connection = await asyncpg.connect(whole)
    await connection.execute("DELETE FROM ls_watch")
    settled = """SELECT count(*) FROM ls_lag
                  WHERE processor = 'Breaks' AND (lag = 0 OR why IS NOT NULL)"""
    async with asyncio.timeout(90):
        while await connection.fetchval(settled) < PARTITIONS:  # at their ends, and one stopped
            assert run.poll() is None
            await asyncio.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    out, said = await asyncio.to_thread(run.communicate, timeout=60)
    assert run.returncode == 4, said
    assert "Breaks.process raised ValueError: no more" in said
    rows = await connection.fetchval("SELECT sum(events) FROM ls_steps WHERE processor = 'Breaks'")
    assert json.loads(out)["events"] == rows
    snapshots = "SELECT count(*) FROM ls_snapshots WHERE processor = 'Breaks' AND valid"
    assert await connection.fetchval(snapshots) == PARTITIONS - 1, said
    await connection.close()
