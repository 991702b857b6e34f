"""Trades of a market: the event, a seeded generator of them, and readers of two vendors' files.

Prices and sizes are integers of one decimal scale for every symbol, as market-data feeds send them,
so that they compare, add up and average exactly: a price counts 10⁻⁹ of the quote currency, a size
10⁻⁸ of what is traded (a share, a contract, a coin). `price("4799.25")` is 4,799,250,000,000.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from ledgerstream.errors import DecodeError
from ledgerstream.events import Event, Text, Timestamp, parse_timestamp
from ledgerstream.money import Scaled
from ledgerstream.stream.reports import ReportKind

PRICE_DIGITS, SIZE_DIGITS = 9, 8
SECOND_NS = 1_000_000_000
PIECE_TRADES = 50_000  # made at a time
NAMES = 26**4


class Side(enum.IntEnum):
    """Who took the other's price: the buyer, the seller, or nobody (an auction)."""

    NONE = 0
    BUY = 1
    SELL = 2


Price = Annotated[int, Scaled(PRICE_DIGITS)]
Size = Annotated[int, Scaled(SIZE_DIGITS)]


class Trade(Event):
    """One report of a trade: a new one, or one that corrects or cancels what was reported.

    at:        when the trade happened, which may be before trades that arrived earlier.
    trade_id:  of this report; `original` is that of the report that first told of the trade.
    """

    trade_id: int
    at: Timestamp
    symbol: Text[16]  # type: ignore[type-arg, valid-type]
    price: Price
    size: Size
    side: Side = Side.NONE
    kind: ReportKind = ReportKind.NEW
    original: int = 0


_TRADE = Trade.dtype()


def price(digits: str) -> int:
    """A price from its digits, exactly. Raises DecodeError for what has more than nine decimals."""
    return _scaled(digits, PRICE_DIGITS)


def size(digits: str) -> int:
    """A size from its digits, exactly. Raises DecodeError for more than eight decimals."""
    return _scaled(digits, SIZE_DIGITS)


def _scaled(digits: str, scale: int) -> int:
    value = Decimal(digits).scaleb(scale)
    if value != int(value):
        raise DecodeError(f"{digits!r} has more than {scale} decimals.")
    return int(value)


@dataclass(frozen=True, slots=True)
class Market:
    """What is simulated: how many symbols, how busy, how late some trades arrive, and how many are
    corrected or cancelled.

    Log prices are random walks in event time whose volatility clusters (its logarithm returns to
    its mean), on a grid of ticks; the buyer pays the tick above, the seller gets the one below.
    Activity follows Zipf's law: the n-th symbol trades 1/n as often as the first. A correction
    gives the right price, some ticks away, or the right size; one in eight the right time as well.
    """

    symbols: int = 100
    trades_count: int = 1_000_000  # reports
    rate: float = 1_000.0  # trades a second of event time, over all symbols
    start: str = "2024-01-02T14:30:00Z"
    seed: int = 7

    late_share: float = 0.01
    late_ms_max: int = 5_000
    corrected_share: float = 0.002
    cancelled_share: float = 0.001
    amended_ms_max: int = 30_000  # after the trade has arrived
    volatility: float = 2e-4  # of a log price in a second
    clustering: float = 0.95  # how much of its deviation the volatility keeps from piece to piece

    def trades(self) -> Iterator[NDArray]:
        """Pieces of `Trade.dtype()` in the order of arrival. Ids count from 0, piece by piece: of
        its trades in the order of execution, then of its corrections.

        The same market gives the same bytes.
        """
        floor = _Floor(self, np.random.Generator(np.random.PCG64(self.seed)))
        left = self.trades_count
        while left:
            count = min(left, PIECE_TRADES)
            left -= count
            yield floor.piece(count, last=left == 0)


class _Floor:
    """Where each symbol stands, and what has happened but not arrived."""

    def __init__(self, market: Market, rng: np.random.Generator) -> None:
        self.market, self.rng = market, rng
        n = market.symbols
        self.names = _names(n)
        self.busy = np.cumsum(1 / np.arange(1, n + 1))
        self.busy /= self.busy[-1]
        self.now = parse_timestamp(market.start)
        self.log_price = rng.normal(np.log(80), 0.9, n)
        quote = np.exp(self.log_price)
        self.tick = np.where(quote < 20, price("0.001"), price("0.01"))
        self.tick[quote > 200] = price("0.05")
        self.traded_at = np.full(n, self.now)
        self.log_volatility = np.zeros(n)
        self.next_id = 0
        self.waiting = np.zeros(0, _TRADE)
        self.arrives = np.zeros(0, np.int64)

    def piece(self, count: int, last: bool) -> NDArray:
        """What has arrived by the end of the next `count` reports."""
        rng, market = self.rng, self.market
        amended = rng.binomial(count, market.corrected_share + market.cancelled_share)
        amended = min(amended, count // 2)
        count -= amended
        at = self.now + np.cumsum(rng.exponential(SECOND_NS / market.rate, count)).astype(np.int64)
        who = np.searchsorted(self.busy, rng.random(count), side="right")
        rows = np.zeros(count, _TRADE)
        rows["trade_id"] = np.arange(self.next_id, self.next_id + count)
        rows["at"], rows["symbol"] = at, self.names[who]
        rows["side"] = side = rng.integers(Side.BUY, Side.SELL + 1, count)
        rows["size"] = 100 * rng.geometric(0.3, count) * 10**SIZE_DIGITS
        ticks = np.exp(self._walk(at, who)) * 10**PRICE_DIGITS / self.tick[who]
        ticks = np.where(side == Side.BUY, np.ceil(ticks), np.floor(ticks))
        rows["price"] = np.maximum(ticks, 1).astype(np.int64) * self.tick[who]
        self.now, self.next_id = int(at[-1]), self.next_id + count

        late = rng.random(count) < market.late_share
        arrives = at + late * rng.integers(0, market.late_ms_max * 1_000_000 + 1, count)
        which, amendments = self._amendments(rows, self.tick[who], amended)
        self.next_id += amended
        after = rng.integers(0, market.amended_ms_max * 1_000_000 + 1, amended)
        rows = np.concatenate([self.waiting, rows, amendments])
        arrives = np.concatenate([self.arrives, arrives, arrives[which] + after])
        order = np.argsort(arrives, kind="stable")
        here = np.ones(len(rows), bool) if last else arrives[order] <= self.now
        self.waiting, self.arrives = rows[order[~here]], arrives[order[~here]]
        return rows[order[here]]

    def _amendments(self, rows: NDArray, tick: NDArray, count: int) -> tuple[NDArray, NDArray]:
        """Which of the trades are corrected or cancelled, each once, and the reports that do it."""
        rng, market = self.rng, self.market
        which = rng.choice(len(rows), count, replace=False)
        made = rows[which]
        made["original"] = made["trade_id"]
        made["trade_id"] = np.arange(self.next_id, self.next_id + count)
        share = market.corrected_share / max(market.corrected_share + market.cancelled_share, 1e-9)
        corrects = rng.random(count) < share
        made["kind"] = np.where(corrects, ReportKind.CORRECT, ReportKind.CANCEL)
        priced = corrects & (rng.random(count) < 0.7)
        off = rng.integers(1, 21, count) * rng.choice([-1, 1], count) * tick[which]
        made["price"] = np.maximum(made["price"] + priced * off, tick[which])
        sized = corrects & ~priced
        made["size"][sized] = 100 * rng.geometric(0.3, sized.sum()) * 10**SIZE_DIGITS
        moved = corrects & (rng.random(count) < 1 / 8)
        made["at"] -= moved * rng.integers(0, SECOND_NS, count)
        return which, made

    def _walk(self, at: NDArray, who: NDArray) -> NDArray:
        """The log price of each trade, symbol by symbol, by the time since its last one."""
        rng, market = self.rng, self.market
        n = market.symbols
        self.log_volatility *= market.clustering
        self.log_volatility += rng.normal(0, 0.3, n)
        order = np.argsort(who, kind="stable")
        time, symbol = at[order], who[order]
        first = np.flatnonzero(np.diff(symbol, prepend=-1))
        traded, ends = symbol[first], np.append(first[1:], len(symbol)) - 1
        since = np.diff(time, prepend=0)
        since[first] = time[first] - self.traded_at[traded]
        deviation = market.volatility * np.exp(self.log_volatility)[symbol]
        steps = rng.normal(size=len(symbol)) * deviation * np.sqrt(since / SECOND_NS)
        path = np.cumsum(steps)
        begins = self.log_price[traded] - (path[first] - steps[first])
        path += np.repeat(begins, ends - first + 1)
        self.log_price[traded], self.traded_at[traded] = path[ends], time[ends]
        walked = np.empty_like(path)
        walked[order] = path
        return walked


def _names(count: int) -> NDArray:
    """Four letters each, none twice up to 456,976 symbols."""
    if count > NAMES:
        raise ValueError(f"there are names for {NAMES:,} symbols")
    code = (np.arange(count) * 7_919 + 54_321) % NAMES  # 7,919 shares no factor with 26⁴
    letters = np.stack([code // 26**place % 26 for place in (3, 2, 1, 0)], axis=1)
    return (letters + ord("A")).astype(np.uint8).view("S4").ravel()


def read_binance(path: Path) -> NDArray:
    """Rows of `Trade` from a CSV of event_time, trade_id, symbol, side, price, quantity."""
    table = _read_csv(path, {"price": PRICE_DIGITS, "quantity": SIZE_DIGITS})
    rows = np.zeros(len(table), _TRADE)
    rows["trade_id"] = table["trade_id"].to_numpy()
    rows["at"] = [parse_timestamp(each) for each in table["event_time"].to_pylist()]
    rows["symbol"] = np.array(table["symbol"].to_pylist(), np.bytes_)
    rows["price"], rows["size"] = _units(table["price"]), _units(table["quantity"])
    rows["side"] = _sides(table["side"], buy="buy", sell="sell")
    return rows


def read_databento(path: Path, symbol: str) -> NDArray:
    """Rows of `Trade` from the trades (action T) of a CSV of market-by-order events.

    The file has no trade ids: the row's number in it is taken.
    """
    table = _read_csv(path, {"price": PRICE_DIGITS, "size": SIZE_DIGITS})
    number = np.flatnonzero(table["action"].to_numpy() == "T")
    table = table.take(number)
    rows = np.zeros(len(table), _TRADE)
    rows["trade_id"], rows["symbol"] = number, symbol.encode()
    rows["at"] = table["ts_event"].to_numpy()
    rows["price"], rows["size"] = _units(table["price"]), _units(table["size"])
    rows["side"] = _sides(table["side"], buy="B", sell="A")
    return rows


def _read_csv(path: Path, scales: dict[str, int]) -> pa.Table:
    types: dict[str, pa.DataType] = {
        name: pa.decimal128(28, scale) for name, scale in scales.items()
    }
    types["event_time"] = pa.string()
    return pyarrow.csv.read_csv(
        path, convert_options=pyarrow.csv.ConvertOptions(column_types=types)
    ).combine_chunks()


def _units(column: pa.ChunkedArray) -> NDArray:
    """A decimal column's integers, exactly. Raises DecodeError for what is none."""
    units = [None if each is None else int(each.scaleb(column.type.scale)) for each in
             column.to_pylist()]  # fmt: skip
    if None in units:
        raise DecodeError(f"a price or size is empty, in row {units.index(None):,}.")
    return np.array(units, np.int64)


def _sides(column: pa.ChunkedArray, buy: str, sell: str) -> NDArray:
    side = column.to_numpy()
    return np.select([side == buy, side == sell], [Side.BUY, Side.SELL], Side.NONE)
