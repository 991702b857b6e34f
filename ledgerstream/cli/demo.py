"""`ledgerstream demo`: half a year of card payments, scored; a crash that changes nothing; then a
market's trades as bars."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from ledgerstream.cli import show
from ledgerstream.errors import ConfigError, DirectoryInUse, LedgerStreamError

if TYPE_CHECKING:
    import asyncpg
    import numpy as np

    from ledgerstream.client import Client

MARK = "made-by-ledgerstream-demo"  # only a directory with this file in it is ever wiped
DIRECTORY = Path("ledgerstream-data/demo")
PROCESSOR = "processors.fraud:Fraud"
TABLES = ("scored_payment", "fraud_alert")
KILL_FROM = 300_000  # below so many payments there may be one commit: kill as soon as it has begun
POLL_S = 0.01
RELEASE_S_MAX = 10.0


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Payments from this CSV or Parquet file.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    customers: Annotated[int, typer.Option(min=1, help="Customers to simulate.")] = 5_000,
    terminals: Annotated[int, typer.Option(min=1, help="Terminals to simulate.")] = 10_000,
    days: Annotated[int, typer.Option(min=1, help="Days to simulate.")] = 183,
    trades: Annotated[int, typer.Option(min=1, help="Trades to simulate.")] = 500_000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another world.")] = 7,
    directory: Annotated[
        Path, typer.Option("--dir", help="Wiped and made anew, if an earlier demo made it.")
    ] = DIRECTORY,
) -> None:
    """Stream card payments through the fraud processor, then kill it in the middle of a second run.
    In the end, bars of a market's trades.

    Example: [bold]ledgerstream demo --data payments.csv.gz[/bold]

    Starts a broker and a Postgres of its own and needs nothing else.
    """
    from ledgerstream.cli.session import run_async
    from processors.payments import Payment, Simulation

    if data is not None:
        from ledgerstream.client.tabular import read

        pieces: Iterator[tuple[np.ndarray, float]] = read(data, Payment)
        pieces = chain(list(islice(pieces, 1)), pieces)  # another kind of file is refused at once
        what = f"the payments of {data.name}"
    else:
        from ledgerstream.cli.generate import with_share

        simulation = Simulation(customers=customers, terminals=terminals, days=days, seed=seed)
        pieces = with_share(simulation.payments(), days)
        what = f"{days:,} days of {customers:,} customers at {terminals:,} terminals"
    _make_anew(directory)
    run_async(_Demo(directory, what, trades).run(pieces))


class _Demo:
    """The story, a method an act."""

    def __init__(self, directory: Path, what: str, trades: int) -> None:
        self.directory, self.what, self.trades = directory, what, trades
        self.truth = _Truth()

    async def run(self, pieces: Iterator[tuple[np.ndarray, float]]) -> None:
        from ledgerstream.broker.embedded import Broker
        from ledgerstream.client import Client
        from ledgerstream.stream.postgres import EmbeddedPostgres

        began = time.monotonic()
        _act(1, f"A log and a Postgres, in {self.directory}")
        with EmbeddedPostgres.start(self.directory) as postgres:
            async with await Broker.embedded(self.directory / "log") as broker:
                _say(f"broker at {broker.address}, ready after {_since(began)}")
                async with await Client.connect(broker.address) as client:
                    await self.write(client, pieces)
                    first = await self.score(client, postgres.url)
                again = urlsplit(postgres.url)._replace(path="/again").geturl()
                second = await self.score_with_a_crash(broker.address, postgres.url, again)
                _compare(first, second)
                async with await Client.connect(broker.address) as client:
                    await self.bars(client, postgres.url)
        self.where_next(time.monotonic() - began)

    async def write(self, client: Client, pieces: Iterator[tuple[np.ndarray, float]]) -> None:
        from ledgerstream.cli.session import fill
        from processors.payments import Payment

        _act(2, f"Into the log: {self.what}")
        began = time.monotonic()
        with show.bar("writing", "payments") as advance:
            written = await fill(
                client, "payments", Payment, "customer", "fixed", 1, self.truth.tap(pieces), advance
            )
        seconds = time.monotonic() - began
        _say(
            f"{written:,} payments in {show.duration(seconds)} ({written / seconds:,.0f}/s), "
            "each on disk before it was acknowledged"
        )

    async def score(self, client: Client, database: str) -> dict[str, tuple[int, str]]:
        from ledgerstream.cli.live import live
        from ledgerstream.stream.connect import connect
        from ledgerstream.stream.warm import warm
        from ledgerstream.stream.worker import Worker
        from processors.fraud import Fraud

        _act(3, "Fraud: fifteen features, eleven rules and a score for each payment")
        await asyncio.to_thread(warm, Fraud, _say)
        began = time.monotonic()
        worker = Worker(Fraud, client, database, until="end")
        async with live(worker.progress):
            progress = await worker.run()
        seconds = time.monotonic() - began
        _say(
            f"{progress.events:,} payments in {show.duration(seconds)} "
            f"({progress.events / seconds:,.0f}/s), rows and offsets together in "
            f"{show.count(progress.commits, 'commit')}"
        )
        connection = await connect(database, "demo", patient=True)
        try:
            alerts = await connection.fetch("SELECT payment_id, score, reasons FROM fraud_alert")
            self.truth.judge(alerts)
            for payment in await self.truth.examples(connection, alerts):
                _say(f"• {payment}")
            return await _digests(connection)
        finally:
            await connection.close()

    async def score_with_a_crash(
        self, log: str, database: str, again: str
    ) -> dict[str, tuple[int, str]]:
        from ledgerstream.stream.connect import connect

        _act(4, "The same into a second database; its worker is killed in the middle (SIGKILL)")
        connection = await connect(database, "demo", patient=True)
        await connection.execute("CREATE DATABASE again")
        await connection.close()
        connection = await connect(again, "demo", patient=True)
        try:
            with show.bar("second run", "payments") as advance:
                watch = _Watch(connection, self.truth.payments, advance)
                async with _worker(log, again) as worker:
                    at = await watch.wait_middle(worker)
                    worker.kill()
                    await worker.wait()
                _say(f"killed when {at:,} of {self.truth.payments:,} payments were committed")
                began = time.monotonic()
                async with _worker(log, again) as worker:
                    await watch.wait_end(worker)
                _say(f"started again, it did the rest in {_since(began)}")
            return await _digests(connection)
        finally:
            await connection.close()

    async def bars(self, client: Client, database: str) -> None:
        from ledgerstream.cli.generate import with_share
        from ledgerstream.cli.live import live
        from ledgerstream.cli.session import fill
        from ledgerstream.stream.connect import connect
        from ledgerstream.stream.warm import warm
        from ledgerstream.stream.worker import Worker
        from processors.market import MarketData
        from processors.trades import PIECE_TRADES, Market, Trade

        _act(5, "Market data: bars of a second, a minute and five minutes from trades")
        market = Market(symbols=50, trades_count=self.trades)
        pieces = with_share(market.trades(), -(-self.trades // PIECE_TRADES))
        with show.bar("writing", "trades") as advance:
            await fill(client, "trades", Trade, "symbol", "fixed", 1, pieces, advance)
        await asyncio.to_thread(warm, MarketData, _say)
        began = time.monotonic()
        worker = Worker(MarketData, client, database, until="end")
        async with live(worker.progress):
            progress = await worker.run()
        seconds = time.monotonic() - began
        connection = await connect(database, "demo", patient=True)
        try:
            final, late, moving = await connection.fetchrow(
                """SELECT count(*) FILTER (WHERE final AND version = 1),
                          count(*) FILTER (WHERE version > 1), count(*) FILTER (WHERE NOT final)
                     FROM bar"""
            )
            sample = await connection.fetchrow(
                "SELECT * FROM bar ORDER BY version > 1 DESC, final DESC, trades DESC LIMIT 1"
            )
        finally:
            await connection.close()
        _say(
            f"{progress.events:,} trades in {show.duration(seconds)} "
            f"({progress.events / seconds:,.0f}/s): {show.count(final, 'final bar')}, "
            f"{late:,} versions for late and corrected trades, {moving:,} still open. For example:"
        )
        _say(f"• {_bar(sample)}")

    def where_next(self, seconds: float) -> None:
        from processors import fraud, market
        from risk import rules

        here = f"--dir {self.directory}"
        program = "ledgerstream" if shutil.which("ledgerstream") else sys.argv[0]
        event = "--event processors.payments:Payment"
        print(f"\n{show.bold('Where to go next')}   (the demo took {show.duration(seconds)})")
        for line in (
            f"{_path(fraud)} is the processor, {_path(rules)} its rules: read them first",
            f"{program} topic describe payments {here}",
            f"{program} consume payments {event} --limit 3 {here}",
            f"{program} run {PROCESSOR} {here}        goes on where it stopped; Ctrl-C ends it",
            f"{_path(market)} is the processor of the bars",
            f"{program} --help",
        ):
            _say(line)


class _Truth:
    """The labels of what was written, to judge the alerts by."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._scenarios: list[np.ndarray] = []
        self._frauds: list[np.ndarray] = []

    @property
    def payments(self) -> int:
        return sum(map(len, self._ids))

    def tap(self, pieces: Iterator[tuple[np.ndarray, float]]) -> Iterator[tuple[np.ndarray, float]]:
        for rows, share in pieces:
            self._ids.append(rows["payment_id"].copy())
            self._scenarios.append(rows["scenario"].copy())
            self._frauds.append(rows["is_fraud"].copy())
            yield rows, share

    def judge(self, alerts: list[asyncpg.Record]) -> None:
        import numpy as np

        alerted = np.isin(np.concatenate(self._ids), [alert["payment_id"] for alert in alerts])
        fraud = np.concatenate(self._frauds)
        found, frauds = int((alerted & fraud).sum()), int(fraud.sum())
        _say(
            f"{show.count(len(alerts), 'alert')}, {100 * found / max(len(alerts), 1):.0f} % right; "
            f"{100 * found / max(frauds, 1):.0f} % of {show.count(frauds, 'fraud')} alerted. "
            "For example:"
        )

    async def examples(
        self, connection: asyncpg.Connection, alerts: list[asyncpg.Record]
    ) -> list[str]:
        """A sentence each for one sure alert of each fraud scenario, of few reasons."""
        import numpy as np

        from risk.explain import explain

        scenario = dict(
            zip(
                np.concatenate(self._ids).tolist(),
                np.concatenate(self._scenarios).tolist(),
                strict=True,
            )
        )
        clearest: dict[int, int] = {}
        for alert in sorted(alerts, key=_clarity):
            clearest[scenario[alert["payment_id"]]] = alert["payment_id"]
        chosen = [payment for kind, payment in clearest.items() if kind]
        rows = await connection.fetch(
            "SELECT * FROM scored_payment WHERE payment_id = ANY($1) ORDER BY payment_id", chosen
        )
        return [explain(row) for row in rows]


def _clarity(alert: asyncpg.Record) -> tuple[bool, int, int]:
    return alert["score"] >= 0.9, -alert["reasons"].bit_count(), alert["payment_id"]


class _Watch:
    """How far the second run has come, as its progress row says."""

    def __init__(self, connection: asyncpg.Connection, total: int, advance: show.Advance) -> None:
        self.connection, self.total, self.advance = connection, total, advance
        self.seen = 0

    async def wait_middle(self, worker: asyncio.subprocess.Process) -> int:
        """The committed offset when it is time to kill."""
        target = self.total // 2 if self.total >= KILL_FROM else 0
        while (at := await self._look()) is None or at < target:
            if worker.returncode is not None:
                raise await _failure(worker)
            await asyncio.sleep(POLL_S)
        return at

    async def wait_end(self, worker: asyncio.subprocess.Process) -> None:
        ending = asyncio.create_task(worker.wait())
        while not ending.done():
            await self._look()
            await asyncio.wait([ending], timeout=10 * POLL_S)
        if worker.returncode != 0:
            raise await _failure(worker)
        await self._look()

    async def _look(self) -> int | None:
        if await self.connection.fetchval("SELECT to_regclass('ls_progress')") is None:
            return None
        at: int | None = await self.connection.fetchval("SELECT max(next_offset) FROM ls_progress")
        if at is not None:
            self.advance(at - self.seen, at / max(self.total, 1))
            self.seen = at
        return at


@asynccontextmanager
async def _worker(log: str, database: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`ledgerstream run` in a process of its own, which does not outlive the block."""
    arguments = ["run", PROCESSOR, "--until-end", "--log", log, "--database", database]
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ledgerstream.cli.main", *arguments,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield worker
    finally:
        if worker.returncode is None:
            worker.kill()
        await worker.wait()


async def _failure(worker: asyncio.subprocess.Process) -> LedgerStreamError:
    _, said = await worker.communicate()
    return LedgerStreamError(f"The worker ended too early: {said.decode(errors='replace')}")


async def _digests(connection: asyncpg.Connection) -> dict[str, tuple[int, str]]:
    """Rows of each table, and the sum of their hashes over every column."""
    digests = {}
    for table in TABLES:
        rows, total = await connection.fetchrow(
            f"SELECT count(*), sum(hash_record_extended(t, 0)::numeric) FROM {table} t"
        )
        digests[table] = (rows, f"{int(total or 0) % 2**64:016x}")
    return digests


def _compare(first: dict[str, tuple[int, str]], second: dict[str, tuple[int, str]]) -> None:
    for table in TABLES:
        for run, (rows, digest) in (("first", first[table]), ("second", second[table])):
            _say(f"{table:<15} {run:<7} {rows:>9,} rows   hash of all rows {digest}")
    if first != second:
        raise LedgerStreamError("The two runs differ: this must never be. Please report it.")
    _say(show.bold("The same to the last row."))


def _bar(row: asyncpg.Record) -> str:
    """One bar in a sentence; its integers are those of `processors.trades`."""
    from ledgerstream.events import format_timestamp
    from processors.trades import PRICE_DIGITS, SIZE_DIGITS

    names = ("open", "high", "low", "close", "vwap")
    prices = ", ".join(f"{name} {row[name] / 10**PRICE_DIGITS:,.3f}" for name in names)
    volume = row["volume"] // 10**SIZE_DIGITS
    state = f"version {row['version']}, {'final' if row['final'] else 'open'}"
    return (
        f"{row['symbol']}, {row['width'] // 10**9} s from {format_timestamp(row['start'])}: "
        f"{prices}; {volume:,} in {show.count(row['trades'], 'trade')} ({state})"
    )


def _make_anew(directory: Path) -> None:
    """Wipe what an earlier demo made, once its processes have let go; never anything else."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MARK).exists():
            raise ConfigError(
                f"{directory} holds something that no demo made.", "Give another --dir."
            )
        for lock in (directory / "postgres" / "keeper.lock", directory / "log" / ".lock"):
            if lock.exists():
                _wait_released(lock, directory)
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARK).touch()


def _wait_released(lock: Path, directory: Path) -> None:
    """The processes of a demo that was killed need a moment to end."""
    deadline = time.monotonic() + RELEASE_S_MAX
    with lock.open("r+b") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DirectoryInUse(
                        f"{directory} is in use, by another demo or a command on its results.",
                        "End it, or give another --dir.",
                    ) from None
                time.sleep(POLL_S)
            else:
                return


def _act(number: int, title: str) -> None:
    print(f"\n{show.bold(f'{number}  {title}')}", flush=True)


def _say(text: str) -> None:
    print(f"   {text}", flush=True)


def _path(module: ModuleType) -> str:
    """Where its source is, as seen from here."""
    path = str(module.__file__)
    return min(path, os.path.relpath(path), key=len)


def _since(began: float) -> str:
    return show.duration(time.monotonic() - began)
