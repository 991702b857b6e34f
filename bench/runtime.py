"""The runtime's figures: kernels alone, growing state, snapshots, restart, latency, the fence."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np

from bench.drive import drive
from bench.pipeline import OWN, RESULTS
from bench.rows import PAIRS, Row, row
from bench.sides import directory
from bench.states import Balances, Posting, postings
from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client
from ledgerstream.stream import snapshotter
from ledgerstream.stream.machine import Machine, Piece
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.processor import Processor
from ledgerstream.stream.sink import Sink
from ledgerstream.stream.worker import Progress, Worker
from processors.fraud import Fraud
from processors.payments import Payment, Simulation

MILLION = 1_000_000


@row("kernels")
def kernels() -> Iterator[Row]:
    """State, undo log and digest included; no log, no encoding, no database; one thread."""
    payments = np.concatenate(list(Simulation().payments()))
    rates = []
    for turn in range(PAIRS + 1):
        machine = Machine(Fraud(), 0, 1)
        took = drive(machine, payments, outputs=False)
        if turn:
            rates.append(len(payments) / took)
    yield Row("kernels", "features and rules of payments, state and undo included, one core",
              "events/s", statistics.median(rates), None, "", "higher",
              1_500_000, 4_000_000)  # fmt: skip


@row("state_growth")
def state_growth() -> Iterator[Row]:
    """Rows encoded for COPY, as the stream does; keys drawn evenly."""
    costs: dict[int, list[float]] = {5_000: [], 5 * MILLION: []}
    machines = {}
    for keys in costs:
        machines[keys] = Machine(Balances(), 0, 1)
        drive(machines[keys], postings(keys, keys, every=True), outputs=False)
    for turn in range(PAIRS + 1):
        for keys, found in costs.items():
            events = postings(2 * MILLION, keys, seed=turn)
            took = drive(machines[keys], events, outputs=True)
            if turn:
                found.append(took / len(events) * 1e9)
    few, many = (statistics.median(found) for found in costs.values())
    yield Row("state_growth", "cost of an event at 5 M keys ÷ at 5,000 keys", "ns", many, few,
              "ours at 5,000 keys", "lower", 3, 1.5)  # fmt: skip


class Running:
    """A log and a Postgres of their own, with the topic of a processor."""

    def __init__(
        self,
        address: str,
        client: Client,
        postgres: EmbeddedPostgres,
        database: asyncpg.Connection,
    ) -> None:
        self.address = address
        self.client = client
        self.url = postgres.url
        self.database = database

    async def fresh(self) -> None:
        await self.database.execute(
            f"DROP TABLE IF EXISTS {RESULTS}, running_balance, {OWN} CASCADE"
        )
        await self.database.execute("CHECKPOINT")


@asynccontextmanager
async def running(name: str, processor: type[Processor]) -> AsyncIterator[Running]:
    with directory(name) as where:
        postgres = EmbeddedPostgres.start(where)
        async with (
            await Broker.embedded(where / "log") as broker,
            await Client.connect(broker.address) as client,
        ):
            await client.create_topic(processor.source.name, partitions=1)
            database = await asyncpg.connect(postgres.url)
            yield Running(broker.address, client, postgres, database)
            await database.close()
        postgres.close(wait=True)


@row("exactly_once_cost")
def exactly_once_cost() -> Iterator[Row]:
    """The peer copies the same rows in the same steps, each in a transaction of its own, and
    writes offsets once a second without claim, fence, audit or digest: at least once."""
    fenced, apart = asyncio.run(_exactly_once_cost())
    yield Row("exactly_once_cost", "rows with the fence ÷ with offsets committed apart", "events/s",
              fenced, apart, "the same pipeline, at least once", "higher", 0.9, 0.97)  # fmt: skip


class Apart(Sink):
    """Rows in one transaction, offsets later: what is usually done."""

    _moved_at = 0.0

    async def commit(self, pieces: Sequence[Piece]) -> None:
        await self.create_tables(table for piece in pieces for table in piece.copies)
        async with self.connection.transaction():
            await self._copy(pieces)
        if time.monotonic() - self._moved_at > 1:
            self._moved_at = time.monotonic()
            await self.connection.execute(
                "UPDATE ls_progress SET next_offset = $1 WHERE processor = $2",
                pieces[-1].stop, self.processor,
            )  # fmt: skip


class ApartWorker(Worker):
    async def _connect(self) -> Sink:
        return await Apart.connect(self._database, self._processor.name)


async def _exactly_once_cost() -> tuple[float, float]:
    payments = np.concatenate(list(Simulation().payments()))[:MILLION]
    found: dict[type[Worker], list[float]] = {Worker: [], ApartWorker: []}
    async with running("fence", Fraud) as here:
        await here.client.write(Fraud.source.name, payments, event=Payment, key="customer")
        for pair in range(PAIRS + 1):
            for kind in found if pair % 2 else reversed(found):
                await here.fresh()
                began = time.perf_counter()
                await kind(Fraud, here.client, here.url, until="end").run()
                if pair:
                    found[kind].append(len(payments) / (time.perf_counter() - began))
    return statistics.median(found[Worker]), statistics.median(found[ApartWorker])


@row("latency")
def latency() -> Iterator[Row]:
    """From the moment at which an event was meant to be sent to the answer of its COMMIT."""
    found = [asyncio.run(_latency(10_000, 10)) for _ in range(PAIRS)]
    for percentile, place, bar, aim in (("p50", 0, 10, 3), ("p99", 1, 40, 10)):
        yield Row(f"latency.{percentile}",
                  f"produced → row visible in Postgres at 10,000 events/s, {percentile}", "ms",
                  statistics.median(each[place] for each in found), None, "", "lower",
                  bar, aim)  # fmt: skip


async def _latency(rate: int, seconds: int) -> tuple[float, float]:
    events = postings(rate * seconds, 10_000)
    visible = np.zeros(len(events), np.int64)  # ns, of each event's commit
    async with running("latency", Balances) as here:
        done = 0

        def note(progress: Progress) -> None:
            nonlocal done
            upto = progress.position[0]
            visible[done:upto] = time.monotonic_ns()
            done = upto
            if done == len(events):
                worker.stop()

        worker = Worker(Balances, here.client, here.url, on_progress=note)
        working = asyncio.create_task(worker.run())
        while not await here.database.fetchval("SELECT to_regclass('running_balance')"):
            await asyncio.sleep(0.01)
        np.save(Path("build/bench/latency.npy"), events)
        producer = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.paced", here.address, "build/bench/latency.npy", str(rate),
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert producer.stdout is not None
        began = int(await producer.stdout.readline())
        await working
        await producer.wait()
    meant = began + np.arange(len(events)) * 1_000_000_000 // rate
    took = (visible - meant)[rate:] / 1e6  # without the first second
    return float(np.percentile(took, 50)), float(np.percentile(took, 99))


@row("snapshot")
def snapshot() -> Iterator[Row]:
    """Postings at 20,000/s over 1 M accounts, a snapshot as often as its share of time allows: the
    longest time between two commits, and the same without snapshots."""
    with_, without = (asyncio.run(_longest_gap(often)) for often in (True, False))
    yield Row("snapshot", "longest time between two commits while snapshots of 1 M keys are taken",
              "ms", with_, None, "", "lower", 100, 20,
              f"without snapshots {without:.0f} ms")  # fmt: skip


async def _longest_gap(often: bool) -> float:
    rate, seconds = 20_000, 15
    before = snapshotter.LIMITS
    snapshotter.LIMITS = replace(before, replay_ms_target=20 if often else 3_600_000)
    commits: list[int] = []
    try:
        async with running("snapshot", Balances) as here:
            await here.client.write(
                "postings", postings(MILLION, MILLION, every=True), event=Posting, key="account"
            )
            await Worker(Balances, here.client, here.url, until="end").run()

            def note(progress: Progress) -> None:
                commits.append(time.monotonic_ns())
                if progress.position[0] == MILLION + rate * seconds:
                    worker.stop()

            worker = Worker(Balances, here.client, here.url, on_progress=note)
            working = asyncio.create_task(worker.run())
            np.save(Path("build/bench/snapshot.npy"), postings(rate * seconds, MILLION))
            producer = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "bench.paced", here.address,
                "build/bench/snapshot.npy", str(rate), stdout=subprocess.PIPE,
            )  # fmt: skip
            await working
            await producer.communicate()
            assert bool(worker.progress.snapshots > 2) is often
    finally:
        snapshotter.LIMITS = before
    settled = [at for at in commits if at > commits[0] + 3_000_000_000]
    return float(np.diff(settled).max()) / 1e6


@row("snapshot_bytes")
def snapshot_bytes() -> Iterator[Row]:
    """Accounts drawn at random, each once; a snapshot before and one after, at clean stops."""
    for share, (written, size) in asyncio.run(_snapshot_bytes()).items():
        yield Row(f"snapshot_bytes.{share:g}",
                  f"written for a snapshot of 1 M keys after {share:.1%} of them changed", "bytes",
                  written, size, "the whole state", "lower", None, None)  # fmt: skip


async def _snapshot_bytes() -> dict[float, tuple[int, int]]:
    found = {}
    async with running("snapshot_bytes", Balances) as here:
        rng = np.random.default_rng(2)
        for share in (1.0, 0.001, 0.01, 0.1, 1.0):
            rows = postings(int(share * MILLION), MILLION, every=True)
            rows["account"] = rng.choice(MILLION, len(rows), replace=False)
            await here.client.write("postings", rows, event=Posting, key="account")
            await Worker(Balances, here.client, here.url, until="end").run()
            row = await here.database.fetchrow(
                "SELECT new_bytes, bytes FROM ls_snapshots WHERE valid"
            )
            found[share] = (row["new_bytes"], row["bytes"])
    return found


@row("restart")
def restart() -> Iterator[Row]:
    """A new process, its imports and all, until `next_offset` has moved."""
    for variant, killed in (("", False), (".killed", True)):
        took = statistics.median(asyncio.run(_restart(killed)))
        what = "after SIGKILL, with a replay" if killed else "after a clean stop"
        yield Row(f"restart{variant}", f"restart with 1 M keys of state → first commit, {what}",
                  "s", took, None, "", "lower", 4, 2)  # fmt: skip


async def _restart(killed: bool) -> list[float]:
    found = []
    async with running("restart", Balances) as here:
        written = 0

        async def write(count: int, **how: Any) -> None:
            nonlocal written
            rows = postings(count, MILLION, **how)
            await here.client.write("postings", rows, event=Posting, key="account")
            written += count

        async def position() -> int:
            if await here.database.fetchval("SELECT to_regclass('ls_progress')") is None:
                return 0
            found = await here.database.fetchval("SELECT next_offset FROM ls_progress")
            return int(found or 0)

        await write(MILLION, every=True)
        worker = await _start(here)
        for _ in range(PAIRS):
            await write(500_000)
            while await position() < written:
                await asyncio.sleep(0.01)
            worker.kill() if killed else worker.terminate()
            await worker.wait()
            await write(1_000)
            before, began = await position(), time.perf_counter()
            worker = await _start(here)
            while await position() == before:
                await asyncio.sleep(0.005)
            found.append(time.perf_counter() - began)
        worker.terminate()
        await worker.wait()
    return found


async def _start(here: Running) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ledgerstream.cli.main", "run", "bench.states:Balances",
        "--log", here.address, "--database", here.url,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
