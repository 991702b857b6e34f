"""Market data: bars of one second, one minute and five minutes a symbol, as the trades come.

A bar shows from its first trade on and is replaced in place while it is open. It is final, as
version 1, when the trades are two seconds past its end; a trade that comes later than that, by up
to a minute, makes another version at once, and so does a report that corrects or cancels a trade.
One for a trade that is in no bar any more becomes a dead letter.
"""

from __future__ import annotations

from typing import Annotated

from sqlalchemy.orm import Mapped, mapped_column

from ledgerstream.money import Scaled
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.processor import Processor, State, Topic
from ledgerstream.stream.reports import Reports
from ledgerstream.stream.tables import Rows
from ledgerstream.stream.windows import (
    Count,
    First,
    Last,
    Max,
    Mean,
    Min,
    Sum,
    Tumbling,
    WindowTable,
)
from processors.trades import PRICE_DIGITS, Price, Size, Trade


class Bar(WindowTable):
    """One version of a bar; prices and sizes in the units of `processors.trades`."""

    symbol: Mapped[str] = mapped_column(primary_key=True)
    open: Mapped[Price]
    high: Mapped[Price]
    low: Mapped[Price]
    close: Mapped[Price]
    volume: Mapped[Size]
    vwap: Mapped[Annotated[float, Scaled(PRICE_DIGITS)]]  # Σ price · size ÷ Σ size
    trades: Mapped[int]


class MarketData(Processor):
    """Open, high, low, close, volume, volume-weighted average price and number of trades."""

    source = Topic("trades", Trade, key="symbol")
    results = (Bar,)

    bars = Tumbling(
        by="symbol",
        over=("1s", "1min", "5min"),
        delay="2s",
        late="1min",
        reports=Reports(id="trade_id", of="original", kind="kind", unknown="dead"),
        open=First("price"),
        high=Max("price"),
        low=Min("price"),
        close=Last("price"),
        volume=Sum("size"),
        vwap=Mean("price", weight="size"),
        trades=Count(),
    )

    def process(self, trades: Batch, state: State) -> Rows:
        return Bar.versions(state.bars.add(trades))
