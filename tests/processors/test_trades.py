"""Generated trades look like a market's, and are the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from ledgerstream.errors import DecodeError
from ledgerstream.events import parse_timestamp
from ledgerstream.stream.reports import ReportKind
from processors.trades import Market, Side, Trade, price, size

MARKET = Market(symbols=50, trades_count=120_000, rate=500.0)


@pytest.fixture(scope="module")
def trades() -> np.ndarray:
    return np.concatenate(list(MARKET.trades()))


def test_the_same_seed_gives_the_same_bytes(trades: np.ndarray) -> None:
    assert np.concatenate(list(MARKET.trades())).tobytes() == trades.tobytes()
    other = Market(symbols=50, trades_count=120_000, rate=500.0, seed=8)
    assert np.concatenate(list(other.trades())).tobytes() != trades.tobytes()


def test_each_trade_happens_once_and_arrives_within_bounds(trades: np.ndarray) -> None:
    assert trades.dtype == Trade.dtype()
    assert sorted(trades["trade_id"].tolist()) == list(range(len(trades)))
    new = trades[trades["kind"] == ReportKind.NEW]
    by_id = new[np.argsort(new["trade_id"])]
    assert (np.diff(by_id["at"]) >= 0).all()
    behind = np.maximum.accumulate(new["at"]) - new["at"]
    assert behind.max() <= MARKET.late_ms_max * 1_000_000
    assert (behind > 0).mean() == pytest.approx(MARKET.late_share, rel=0.15)


def test_some_trades_are_corrected_and_some_cancelled_each_once_and_later(
    trades: np.ndarray,
) -> None:
    shares = [(trades["kind"] == kind).mean() for kind in (ReportKind.CORRECT, ReportKind.CANCEL)]
    assert shares == pytest.approx([MARKET.corrected_share, MARKET.cancelled_share], rel=0.25)
    place = np.argsort(trades["trade_id"])
    amends = np.flatnonzero(trades["kind"] != ReportKind.NEW)
    first = place[trades["original"][amends]]
    assert len(np.unique(first)) == len(first)
    assert (trades["kind"][first] == ReportKind.NEW).all() and (first < amends).all()
    one, other = trades[first], trades[amends]
    assert (one["symbol"] == other["symbol"]).all()
    changed = np.any([one[name] != other[name] for name in ("at", "price", "size")], axis=0)
    cancels = other["kind"] == ReportKind.CANCEL
    assert changed[~cancels].mean() > 0.85 and not changed[cancels].any()
    assert (other["at"] != one["at"]).sum() > 10


def test_rate_and_activity_are_as_asked(trades: np.ndarray) -> None:
    seconds = (trades["at"].max() - parse_timestamp(MARKET.start)) / 1e9
    assert len(trades) / seconds == pytest.approx(MARKET.rate, rel=0.02)
    _, counts = np.unique(trades["symbol"], return_counts=True)
    assert len(counts) == 50
    counts = np.sort(counts)[::-1]
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.15)  # Zipf


def test_prices_walk_on_their_ticks_and_volatility_clusters(trades: np.ndarray) -> None:
    assert (trades["price"] > 0).all() and (trades["price"] % price("0.001") == 0).all()
    assert set(np.unique(trades["side"])) == {Side.BUY, Side.SELL}
    names, counts = np.unique(trades["symbol"], return_counts=True)
    busiest = trades[trades["symbol"] == names[np.argmax(counts)]]
    log = np.log(busiest[np.argsort(busiest["at"], kind="stable")]["price"] / 1e9)
    steps = np.diff(log[:: len(log) // 200])
    assert 0 < np.abs(steps).max() < 0.1  # it moves, and does not jump


def test_prices_and_sizes_are_read_from_their_digits() -> None:
    assert price("4799.25") == 4_799_250_000_000
    assert size("0.000263") == 26_300
    with pytest.raises(DecodeError, match="more than 9 decimals"):
        price("1.0000000001")
