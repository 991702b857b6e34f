"""The figure of the bars: trades to bars of three widths in Postgres, against pandas in memory.

Pandas does not keep the trades so that later reports could correct them, so neither do we: `Bars`
is `MarketData` without that. What it costs is `bars.reports`, the same trades through `MarketData`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

import asyncpg
import numpy as np
import pandas as pd

from bench.pipeline import OWN
from bench.rows import PAIRS, Row, row
from bench.sides import directory
from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.windows import Tumbling
from ledgerstream.stream.worker import Worker
from processors.market import MarketData
from processors.trades import Market, Trade

TRADES = 2_000_000
MARKET = Market(
    symbols=1_000, trades_count=TRADES, rate=10_000.0, corrected_share=0, cancelled_share=0
)
WIDTHS_NS = (10**9, 60 * 10**9, 300 * 10**9)


KEPT = MarketData.bars


class Bars(MarketData):
    """`MarketData` for trades that nobody corrects."""

    bars = Tumbling(by=KEPT.by, over=KEPT.over, delay=KEPT.delay, late=KEPT.late, **KEPT.columns)


@row("bars")
def bars() -> Iterator[Row]:
    runs, pandas = asyncio.run(_measure(Bars))
    mine, alone = statistics.median(runs), statistics.median(pandas)
    yield Row("bars",
              "trades of 1,000 symbols → bars of 1 s, 1 min, 5 min in Postgres, exactly once",
              "events/s", mine, alone, "pandas, the same bars in memory, a groupby an interval",
              "higher", 0.5, 2.0)  # fmt: skip


@row("bars.reports")
def reports() -> Iterator[Row]:
    runs, _ = asyncio.run(_measure(MarketData))
    yield Row("bars.reports", "the same, each trade kept for later corrections", "events/s",
              statistics.median(runs), None, "", "higher", None, None)  # fmt: skip


async def _measure(processor: type[MarketData]) -> tuple[list[float], list[float]]:
    trades = np.concatenate(list(MARKET.trades()))
    frame = pd.DataFrame(trades)
    runs: list[float] = []
    alone: list[float] = []
    with directory("bars") as where:
        postgres = EmbeddedPostgres.start(where)
        async with (
            await Broker.embedded(where / "log") as broker,
            await Client.connect(broker.address) as client,
        ):
            await client.create_topic(MarketData.source.name, partitions=1)
            await client.write(MarketData.source.name, trades, event=Trade, key="symbol")
            database = await asyncpg.connect(postgres.url)
            for pair in range(PAIRS + 1):
                await database.execute(f"DROP TABLE IF EXISTS bar, {OWN} CASCADE")
                await database.execute("CHECKPOINT")
                started = time.perf_counter()
                await Worker(processor, client, postgres.url, until="end").run()
                took = time.perf_counter() - started
                by_pandas = await asyncio.to_thread(_pandas, frame)
                if pair:  # the first compiles and warms
                    runs.append(len(trades) / took)
                    alone.append(len(trades) / by_pandas)
            await database.close()
        postgres.close(wait=True)
    return runs, alone


def _pandas(frame: pd.DataFrame) -> float:
    """Seconds for the same bars, one groupby an interval."""
    started = time.perf_counter()
    value = frame["price"].astype(float) * frame["size"]
    for width in WIDTHS_NS:
        by = frame.assign(start=frame["at"] // width, value=value).groupby(["symbol", "start"])
        found = by.agg(
            open=("price", "first"), high=("price", "max"), low=("price", "min"),
            close=("price", "last"), volume=("size", "sum"), value=("value", "sum"),
            trades=("size", "count"),
        )  # fmt: skip
        found["vwap"] = found["value"] / found["volume"]
    return time.perf_counter() - started
