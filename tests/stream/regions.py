"""A processor of two topics, for tests that start it from the command line, too."""

from __future__ import annotations

import numpy as np
from sqlalchemy.orm import Mapped

from ledgerstream import Event, Keyed, Processor, Rows, State, Table, Timestamp, Topic
from ledgerstream.stream.batch import Batch


class Order(Event):
    order: int
    at: Timestamp
    customer: int


class Numbered(Table):
    order: Mapped[int]
    customer: Mapped[int]
    number: Mapped[int]


class Regions(Processor):
    """Each customer's orders by number, in each region for itself."""

    sources = [Topic(f"orders-{region}", Order, key="customer") for region in ("eu", "us")]
    seen = Keyed(by="customer", orders=int)

    def process(self, orders: Batch, state: State) -> Rows:
        held = state.seen.at(orders.customer)
        number = np.empty(len(orders), np.int64)
        for i, row in enumerate(held.row):
            held.orders[row] += 1
            number[i] = held.orders[row]
        return Numbered.rows(orders, number=number)
