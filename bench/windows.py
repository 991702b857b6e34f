"""The figures of windows' columns: kernels alone, state and undo included, one thread."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
from sqlalchemy.orm import Mapped, mapped_column

from bench.drive import drive
from bench.rows import PAIRS, Row, row
from ledgerstream import (
    Count,
    Distinct,
    Ewm,
    Processor,
    Rows,
    Session,
    State,
    Sum,
    Topic,
    TopK,
    Tumbling,
    WindowTable,
)
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.machine import Machine
from ledgerstream.stream.state import Declaration
from processors.payments import Payment, Simulation


class Kept(WindowTable):
    customer: Mapped[int] = mapped_column(primary_key=True)


def _processor(declared: Declaration) -> type[Processor]:
    class Windowed(Processor):
        source = Topic("payments", Payment, key="customer")
        windows = declared

        def process(self, payments: Batch, state: State) -> Rows:
            return Kept.versions(state.windows.add(payments))

    return Windowed


def _days(**columns: Any) -> Declaration:
    return Tumbling(by="customer", over="7d", **columns)


KINDS = {
    "count": _days(n=Count()),
    "distinct": _days(n=Distinct("terminal")),
    "approximate": _days(n=Distinct("terminal", approximate=True)),
    "top": _days(n=TopK("terminal", k=3, by=Sum("amount"))),
    "ewm": _days(n=Ewm("amount", halflife="1d")),
    "session": Session(by="customer", gap="6h", n=Count()),
}


@row("window_columns")
def window_columns() -> Iterator[Row]:
    """Payments of 5,000 customers in windows of a week, the kinds in turn."""
    payments = np.concatenate(list(Simulation().payments()))
    processors = {kind: _processor(declared) for kind, declared in KINDS.items()}
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(PAIRS + 1):
        for kind, processor in processors.items():
            took = drive(Machine(processor(), 0, 1), payments, outputs=False)
            if turn:
                rates[kind].append(len(payments) / took)
    for kind, found in rates.items():
        yield Row(f"window_columns.{kind}", f"payments into windows of a week: {kind}", "events/s",
                  statistics.median(found), None, "", "higher", None, None)  # fmt: skip
