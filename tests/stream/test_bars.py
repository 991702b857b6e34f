"""Bars in Postgres: what a crashed, cut and resumed run leaves is what pandas computes."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

import asyncpg
import numpy as np
import pandas as pd
import pytest

from ledgerstream.limits import LIMITS
from ledgerstream.stream import streaming
from ledgerstream.stream.worker import Worker
from processors.market import MarketData
from processors.trades import Market
from tests.processors.test_market import BAR, WIDTHS, as_they_stand, by_pandas
from tests.stream.cutter import Cutter
from tests.stream.memorylog import MemoryLog

MARKET = Market(
    symbols=12, trades_count=8_000, rate=60.0, late_share=0.03, late_ms_max=8_000,
    corrected_share=0.03, cancelled_share=0.02,
)  # fmt: skip
FINAL = "SELECT * FROM bar WHERE final ORDER BY start, width, version, symbol"


def log_of(rows: np.ndarray) -> MemoryLog:
    log = MemoryLog(MarketData.source, uuid.UUID(int=11))
    log.write(rows)
    return log


async def bars(database: str, query: str) -> pd.DataFrame:
    connection = await asyncpg.connect(database)
    try:
        rows = await connection.fetch(query)
    finally:
        await connection.close()
    return pd.DataFrame([dict(row) for row in rows])


@pytest.mark.parametrize("cut", [None, "before", "after"])
async def test_bars_in_postgres_are_pandas(
    database: str, monkeypatch: pytest.MonkeyPatch, cut: Any
) -> None:
    monkeypatch.setattr(streaming, "LIMITS", dataclasses.replace(LIMITS, step_rows_max=300))
    trades = np.concatenate(list(MARKET.trades()))
    if cut is None:
        await Worker(MarketData, log_of(trades), database, until="end").run()
    else:
        await Worker(MarketData, log_of(trades[:3_000]), database, until="end").run()
        async with Cutter(database, cut, at=3) as cutter:
            await Worker(MarketData, log_of(trades), cutter.url, until="end").run()
            assert cutter.cuts == 1
    newest = await bars(
        database,
        "SELECT DISTINCT ON (start, width, symbol) * FROM bar "
        "ORDER BY start, width, symbol, version DESC",
    )
    for width in WIDTHS:
        mine = newest[(newest["width"] == width) & (newest["trades"] > 0)]
        mine = mine.set_index(["symbol", "start"]).sort_index()
        wanted = by_pandas(pd.DataFrame(as_they_stand(trades)), width)
        wanted.index = wanted.index.set_levels(wanted.index.levels[0].str.decode("utf-8"), level=0)
        pd.testing.assert_frame_equal(mine[BAR], wanted, check_dtype=False)
    assert (newest["version"] > 1).any() and not newest["final"].all()
    shown = await bars(database, "SELECT watermark FROM ls_watch")
    assert shown["watermark"].tolist() == [trades["at"].max() - 2 * 10**9]
    assert (newest["final"] == (newest["start"] + newest["width"] <= shown["watermark"][0])).all()


async def test_another_name_begins_anew_over_what_is_there(database: str) -> None:
    trades = np.concatenate(list(MARKET.trades()))[:3_000]
    await Worker(MarketData, log_of(trades), database, until="end").run()
    first = await bars(database, FINAL)

    class Anew(MarketData):
        pass

    progress = await Worker(Anew, log_of(trades), database, until="end").run()
    assert (progress.events, progress.dead) == (3_000, 0)
    pd.testing.assert_frame_equal(await bars(database, FINAL), first)
