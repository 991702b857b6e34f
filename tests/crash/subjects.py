"""What is killed: a processor, its events, and how its results are told from others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from sqlalchemy.orm import Mapped, mapped_column

from ledgerstream.events import Event
from ledgerstream.money import EUR
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.kernels import kernel
from ledgerstream.stream.outputs import Events
from ledgerstream.stream.processor import Keyed, Processor, State, Topic
from ledgerstream.stream.tables import Rows, Table
from processors.fraud import Fraud
from processors.market import MarketData
from processors.payments import Payment, Simulation
from processors.trades import Market

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


def some_trades(count: int) -> np.ndarray:
    """Many of them late, corrected, cancelled, or corrected when it is too late (dead letters)."""
    market = Market(
        symbols=40, trades_count=count, rate=100.0, late_share=0.05, late_ms_max=10_000,
        corrected_share=0.03, cancelled_share=0.02, amended_ms_max=600_000,
    )  # fmt: skip
    return np.concatenate(list(market.trades()))


class Purse(Table):
    customer: Mapped[int] = mapped_column(primary_key=True)
    spent: Mapped[EUR]
    payments: Mapped[int]


@kernel
def _spend(
    row: np.ndarray, amount: np.ndarray, spent: np.ndarray, payments: np.ndarray, out: np.ndarray
) -> None:
    for i in range(len(row)):
        spent[row[i]] += amount[i]
        payments[row[i]] += 1
        out[0, i], out[1, i] = spent[row[i]], payments[row[i]]


class Purses(Processor):
    """What a customer has spent since he last paid nothing for six hours; a row a customer."""

    source = Topic("payments", Payment, key="customer")
    purses = Keyed(by="customer", spent=EUR, payments=int, expire="6h")

    def process(self, batch: Batch, state: State) -> Rows:
        held = state.purses.at(batch.customer)
        out = np.empty((2, len(batch)), np.int64)
        _spend(held.row, batch.amount, held.spent, held.payments, out)
        return Purse.upsert(batch, customer=batch.customer, spent=out[0], payments=out[1])


class Review(Event):
    payment_id: int
    customer: int
    spent: EUR


REVIEWS = Topic("reviews", Review, key="customer")


class Reviewing(Purses):
    """Rows as before, and two payments of three as events."""

    name = "Reviewing"
    source = Topic("payments", Payment, key="customer")
    outputs = (REVIEWS,)

    def process(self, batch: Batch, state: State) -> list[Rows | Events]:
        held = state.purses.at(batch.customer)
        out = np.empty((2, len(batch)), np.int64)
        _spend(held.row, batch.amount, held.spent, held.payments, out)
        told = out[0] % 3 != 0
        return [
            Purse.upsert(batch, customer=batch.customer, spent=out[0], payments=out[1]),
            REVIEWS.emit(batch, where=told, spent=out[0]),
        ]


@dataclass(frozen=True)
class Subject:
    """fingerprints: by table, what of a row `t` must be equal, and which rows count."""

    processor: type[Processor]
    events: Callable[[int], np.ndarray]
    fingerprints: Mapping[str, tuple[str, str]]

    @property
    def queries(self) -> Sequence[str]:
        return [
            f"SELECT count(*), sum(hashtextextended(({what})::text, 0)) FROM {table} t WHERE {rows}"
            for table, (what, rows) in self.fingerprints.items()
        ]


SUBJECTS = {
    "payments": Subject(
        Fraud, some_payments, {"scored_payment": ("t", "true"), "fraud_alert": ("t", "true")}
    ),
    # A bar that is open was shown as the n-th row of its event, which depends on the batch.
    "trades": Subject(
        MarketData, some_trades, {"bar": ("to_jsonb(t) - CASE WHEN final THEN '' ELSE 'ls_n' END",
                                          "true")},
    ),
    "purses": Subject(Purses, some_payments, {"purse": ("t", "true")}),
    "reviews": Subject(Reviewing, some_payments, {"purse": ("t", "true")}),
}  # fmt: skip
