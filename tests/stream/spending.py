"""The processor that tests of the stream use: every payment's total of the last day, and alerts."""

from __future__ import annotations

import uuid
from dataclasses import replace

import numpy as np
from sqlalchemy.orm import Mapped

from ledgerstream.events import Event, Text, Timestamp
from ledgerstream.money import EUR
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.machine import Input
from ledgerstream.stream.processor import Keyed, Processor, Sliding, State, Topic
from ledgerstream.stream.sink import Source
from ledgerstream.stream.tables import Rows, Table

DAY = 86_400 * 10**9
LIMIT = 50_000


class Payment(Event):
    payment_id: int
    at: Timestamp
    customer: int
    terminal: int
    amount: EUR
    note: Text[8] = ""  # type: ignore[valid-type]


class Spent(Table):
    payment_id: Mapped[int]
    customer: Mapped[int]
    spent: Mapped[EUR]
    number: Mapped[int]
    note: Mapped[str]


class Large(Table):
    payment_id: Mapped[int]
    spent: Mapped[EUR]


class Spending(Processor):
    source = Topic("payments", Payment, key="customer")
    day = Sliding(by="customer", over="24h", sum="amount")
    seen = Keyed(by="customer", payments=int)

    def process(self, batch: Batch, state: State) -> list[Rows]:
        spent = state.day.add(batch)
        held = state.seen.at(batch.customer)
        number = np.empty(len(batch), np.int64)
        for i, row in enumerate(held.row):
            held.payments[row] += 1
            number[i] = held.payments[row]
        return [
            Spent.rows(batch, spent=spent, number=number),
            Large.rows(batch, where=spent > LIMIT, spent=spent),
        ]


def spending_of(topic: str) -> type[Spending]:
    """The same processor over another topic."""
    source = replace(Spending.source, name=topic)
    return type("Spending", (Spending,), {"source": source, "__module__": __name__})


SOURCE = Source("payments", uuid.UUID(int=7))


def payments(count: int, seed: int = 1, customers: int = 20) -> np.ndarray:
    """Random payments in the order of their offsets; now and then one is late."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, Payment.dtype())
    rows["payment_id"] = np.arange(count)
    times = np.sort(rng.integers(0, 10 * DAY, count))
    late = rng.random(count) < 0.05
    rows["at"] = times - late * rng.integers(0, DAY // 48, count)
    rows["customer"] = rng.integers(0, customers, count)
    rows["terminal"] = rng.integers(0, 2 * customers, count)
    rows["amount"] = rng.integers(1, 30_000, count)
    rows["note"] = b"card"
    return rows


def given(rows: np.ndarray, start: int = 0, partition: int = 0) -> Input:
    """Rows as the input of a step, at offsets from `start` on."""
    offset = np.arange(start, start + len(rows))
    return Input(partition, start, start + len(rows), Batch(Spending.source, rows, offset))
