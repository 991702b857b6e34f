"""Bars equal pandas, on real trades and on generated ones, whatever the splits."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ledgerstream.stream.batch import Batch
from ledgerstream.stream.reports import ReportKind
from ledgerstream.stream.state import State
from processors.market import Bar, MarketData
from processors.trades import Market, price, read_binance, read_databento, size
from tests.conftest import REAL_DATA

SECOND = 10**9
WIDTHS = (SECOND, 60 * SECOND, 300 * SECOND)
DELAY, LATE = 2 * SECOND, 60 * SECOND
BINANCE, DATABENTO = REAL_DATA / "btcusdt-trades.csv.gz", REAL_DATA / "es-futures-mbo.csv.gz"
BAR = ["open", "high", "low", "close", "volume", "vwap", "trades"]


def real(path: Path) -> np.ndarray:
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return read_binance(path) if path == BINANCE else read_databento(path, "ESH4")


def versions(rows: np.ndarray, cuts: list[int]) -> pd.DataFrame:
    """Every row that `MarketData` gives, in order, over batches that end at `cuts`."""
    state, processor, parts = State(MarketData.states), MarketData(), []
    for first, stop in pairwise(sorted({0, len(rows), *cuts})):
        batch = Batch(MarketData.source, rows[first:stop], np.arange(first, stop))
        state.begin(len(batch))
        made = processor.process(batch, state)
        assert made.table is Bar
        parts.append(pd.DataFrame({"event": made.event + first, **made.columns}))
        state.seal()
        state.forget()
    return pd.concat(parts, ignore_index=True)


def newest(bars: pd.DataFrame) -> pd.DataFrame:
    """The newest row of each bar, as its table would show it."""
    return bars.drop_duplicates(["symbol", "width", "start"], keep="last")


def as_they_stand(rows: np.ndarray) -> np.ndarray:
    """The trades after all that corrects and cancels them, in the order of their first reports."""
    new = rows[rows["kind"] == ReportKind.NEW]
    place = {each: at for at, each in enumerate(new["trade_id"].tolist())}
    stands = np.ones(len(new), bool)
    for report in rows[rows["kind"] != ReportKind.NEW]:
        at = place[int(report["original"])]
        if report["kind"] == ReportKind.CANCEL:
            stands[at] = False
        else:
            for name in ("at", "price", "size"):
                new[name][at] = report[name]
    return new[stands]


def by_pandas(trades: pd.DataFrame, width: int) -> pd.DataFrame:
    """The bars of one width over these trades, those of a time in the order of arrival."""
    frame = trades.sort_values("at", kind="stable").assign(start=trades["at"] // width * width)
    frame["value"] = frame["price"].astype(object) * frame["size"].astype(object)
    by = frame.groupby(["symbol", "start"])
    bars = by.agg(
        open=("price", "first"), high=("price", "max"), low=("price", "min"),
        close=("price", "last"), volume=("size", "sum"), trades=("size", "count"),
    )  # fmt: skip
    value = by["value"].sum()
    bars["vwap"] = [float(Fraction(v, s)) for v, s in zip(value, bars["volume"], strict=True)]
    return bars[BAR]


def assert_bars_are_pandas(rows: np.ndarray, cuts: list[int]) -> None:
    bars = newest(versions(rows, cuts))
    for width in WIDTHS:
        mine = bars[(bars["width"] == width) & (bars["trades"] > 0)]
        mine = mine.set_index(["symbol", "start"]).sort_index()
        wanted = by_pandas(pd.DataFrame(as_they_stand(rows)), width)
        pd.testing.assert_frame_equal(mine[BAR], wanted, check_dtype=False)


def random_cuts(rows: np.ndarray, seed: int, most: int = 60) -> list[int]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, len(rows), rng.integers(0, most)).tolist()


@pytest.mark.parametrize("path", [BINANCE, DATABENTO], ids=["btcusdt", "es-futures"])
def test_bars_of_real_trades_are_pandas_whatever_the_splits(path: Path) -> None:
    rows = real(path)
    assert len(rows) > 1_000
    for seed in range(4):
        assert_bars_are_pandas(rows, random_cuts(rows, seed))


@pytest.mark.torture
@pytest.mark.parametrize("path", [BINANCE, DATABENTO], ids=["btcusdt", "es-futures"])
def test_bars_of_real_trades_are_pandas_under_many_splits(path: Path) -> None:
    rows = real(path)
    assert_bars_are_pandas(rows, list(range(len(rows))))
    for seed in range(20):
        assert_bars_are_pandas(rows, random_cuts(rows, seed, most=len(rows)))


def test_real_prices_and_sizes_are_exact() -> None:
    first = real(BINANCE)[0]
    assert (first["price"], first["size"]) == (price("39432.48"), size("0.000263"))
    first = real(DATABENTO)[0]
    assert (first["price"] % price("0.25"), first["size"]) == (0, size("44"))


MARKET = Market(
    symbols=30, trades_count=120_000, rate=400.0, late_share=0.02, late_ms_max=8_000,
    corrected_share=0.03, cancelled_share=0.02,
)  # fmt: skip


@pytest.fixture(scope="module")
def generated() -> np.ndarray:
    return np.concatenate(list(MARKET.trades()))


def test_each_version_covers_the_trades_that_had_arrived(generated: np.ndarray) -> None:
    rows = generated[:40_000]
    bars = versions(rows, random_cuts(rows, seed=1))
    finals = bars[bars["final"]]
    assert (finals["version"] > 1).sum() > 100  # the late ones
    assert (finals["version"] > 3).sum() > 10
    greatest = np.maximum.accumulate(rows["at"])
    # Version 1 covers what came before the event that closed it, a later one what came up to it.
    closing = greatest[finals["event"]] == rows["at"][finals["event"]]
    checked = finals.sample(150, random_state=5)
    for row, closes in zip(checked.itertuples(), closing[finals.index.get_indexer(checked.index)],
                           strict=True):  # fmt: skip
        frame = pd.DataFrame(as_they_stand(rows[: row.event + (0 if closes else 1)]))
        inside = frame[(frame["symbol"] == row.symbol) & (frame["at"] >= row.start)
                       & (frame["at"] < row.start + row.width)]  # fmt: skip
        found = tuple(getattr(row, name) for name in BAR)
        if row.trades == 0:
            assert len(inside) == 0 and found[:5] == (0, 0, 0, 0, 0)
            continue
        (wanted,) = by_pandas(inside, row.width).itertuples(index=False)
        assert found == tuple(wanted)
        watermark = greatest[row.event] - DELAY
        assert watermark >= row.start + row.width
        assert watermark < row.start + row.width + LATE or row.version == 1


def test_the_final_bars_of_generated_trades_are_pandas(generated: np.ndarray) -> None:
    """No trade is later than a bar may be corrected, so the newest versions cover all."""
    assert_bars_are_pandas(generated, random_cuts(generated, seed=2))


def test_splits_change_no_final_version(generated: np.ndarray) -> None:
    rows = generated[:30_000]
    found = [versions(rows, cuts) for cuts in ([], random_cuts(rows, 3), random_cuts(rows, 4))]
    finals = [bars[bars["final"]].reset_index(drop=True) for bars in found]
    for other in finals[1:]:
        pd.testing.assert_frame_equal(finals[0], other)
