"""`on_event`: one event at a time, and the same rows, digests and dead letters as over columns."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Mapped, mapped_column

from ledgerstream.errors import ConfigError, StoppedPartition
from ledgerstream.events import Event, Int16, Text, Timestamp
from ledgerstream.money import EUR
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.processor import Keyed, Processor, Sliding, State, Topic
from ledgerstream.stream.tables import Row, Rows, Table
from ledgerstream.testing import assert_splits_do_not_matter, drive
from tests.stream.spending import LIMIT, Large, Payment, Spending, Spent, payments


class SpendingByEvent(Spending):
    """`Spending`, an event at a time."""

    def on_event(self, event: Any, state: Any) -> list[Row]:
        spent = state.day.add(event)
        seen = state.seen[event.customer]
        seen.payments += 1
        rows = [Spent.row(spent=spent, number=seen.payments)]
        if spent > LIMIT:
            rows.append(Large.row(spent=spent))
        return rows


class Kind(enum.IntEnum):
    BUY = 1
    SELL = 2


class Fill(Event):
    at: Timestamp
    account: int
    kind: Kind
    price: EUR
    share: float
    note: Text[8] = ""  # type: ignore[valid-type]


class Position(Table):
    account: Mapped[int]
    kind: Mapped[int]
    held: Mapped[int]
    mean: Mapped[float]
    last: Mapped[str]
    large: Mapped[bool]


class Positions(Processor):
    """Every type of column, two windows, and windows to which not every event is added."""

    source = Topic("fills", Fill, key="account")
    accounts = Keyed(by="account", held=Int16, volume=EUR, last=Text[8], share=float, seen=bool)
    day = Sliding(by="account", over=("1h", "24h"), sum="price", count=True)
    sales = Sliding(by="account", over="24h")

    def on_event(self, event: Any, state: Any) -> Row | None:
        account = state.accounts[event.account]
        account.held += 1 if event.kind is Kind.BUY else -1
        account.volume += event.price
        account.share = event.share
        account.last, before = event.note, account.last
        account.seen = True
        both = state.day.add(event)
        if event.kind is Kind.BUY:
            return None
        return Position.row(
            held=account.held, mean=both.sum[0] / both.count[0], last=before,
            large=state.sales.add(event) > 3,
        )  # fmt: skip


class PositionsInColumns(Positions):
    """The same over columns."""

    def process(self, batch: Batch, state: State) -> Rows:
        both = state.day.add(batch)
        sold = batch.kind == Kind.SELL
        sales = np.zeros(len(batch), np.int64)
        sales[sold] = state.sales.add(batch.take(sold))
        accounts = state.accounts.at(batch.account)
        held = np.empty(len(batch), np.int64)
        last = np.empty(len(batch), "S8")
        for i, row in enumerate(accounts.row):
            accounts.held[row] += -1 if sold[i] else 1
            accounts.volume[row] += batch.price[i]
            accounts.share[row] = batch.share[i]
            last[i] = accounts.last[row]
            accounts.last[row] = batch.note[i]
            accounts.seen[row] = True
            held[i] = accounts.held[row]
        return Position.rows(
            batch, where=sold, held=held, mean=both.sum[:, 0] / both.count[:, 0], last=last,
            large=sales > 3,
        )  # fmt: skip


def fills(count: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, Fill.dtype())
    rows["at"] = 10**18 + np.cumsum(rng.integers(0, 2 * 10**12, count))
    rows["at"] -= (rng.random(count) < 0.1) * 10**12
    rows["account"] = rng.integers(-2, 5, count)
    rows["kind"] = rng.integers(1, 3, count)
    rows["price"] = rng.integers(1, 10_000, count)
    rows["share"] = rng.random(count)
    rows["note"] = rng.choice([b"", b"a", "größe".encode()], count)
    return rows


def assert_same(one: type[Processor], other: type[Processor], rows: np.ndarray) -> None:
    sides = [drive(one, rows), drive(other, rows, splits=[len(rows) // 3])]
    for table in sides[1].columns:
        pd.testing.assert_frame_equal(*(side.tables[table] for side in sides))
    pd.testing.assert_frame_equal(*(side.dead for side in sides))
    assert sides[0].digest == sides[1].digest


@pytest.mark.parametrize(
    ("by_event", "in_columns", "rows"),
    [
        (SpendingByEvent, Spending, payments(2_000)),
        (Positions, PositionsInColumns, fills(1_000)),
    ],
)
def test_the_same_rows_and_digest_as_over_columns(
    by_event: type[Processor], in_columns: type[Processor], rows: np.ndarray
) -> None:
    assert_same(by_event, in_columns, rows)
    assert_splits_do_not_matter(by_event, rows[:400], rounds=5)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 40), seed=st.integers(0, 1_000))
def test_any_events_any_order(count: int, seed: int) -> None:
    assert_same(Positions, PositionsInColumns, fills(count, seed))


def test_the_event_whose_values_do_not_fit_is_refused_alone() -> None:
    rows = fills(60)
    rows["account"] = 1
    rows["kind"] = Kind.BUY
    rows["price"][[10, 40]] = 2**63 - 1  # the volume, and the sum of the window
    found = drive(Positions, rows)
    assert found.dead["offset"].tolist() == [10, 40]
    state = found.state["accounts"].iloc[0]
    assert state["held"] == 58
    assert state["volume"] == int(np.delete(rows["price"], [10, 40]).sum())


class Held(Table):
    account: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[EUR]
    held: Mapped[int]


class Holds(Processor):
    """A row a key, and columns that are given in some rows only."""

    source = Positions.source
    accounts = Keyed(by="account", held=int)

    def on_event(self, event: Any, state: Any) -> Row:
        account = state.accounts[event.account]
        account.held += 1
        state.accounts[-99].held += 1  # of no event
        if event.kind is Kind.BUY:
            return Held.row(held=account.held, price=0)
        return Held.row(held=account.held)


def test_a_table_with_a_key_keeps_the_last_row_of_each() -> None:
    rows = fills(200)
    found = drive(Holds, rows, splits=[50, 51, 120])
    last = {int(row["account"]): row for row in rows}
    held = found.tables[Held].set_index("account")
    assert sorted(held.index) == sorted(last)
    for account, row in last.items():
        assert held["held"][account] == (rows["account"] == account).sum()
        assert held["price"][account] == (0 if row["kind"] == Kind.BUY else row["price"])
    other = found.state["accounts"].set_index("account")
    assert other["held"][-99] == 200


class TooLarge(Processor):
    source = Spending.source

    def on_event(self, event: Any, state: Any) -> Row:
        return Large.row(spent=event.amount << (60 if event.offset == 7 else 0))


def test_a_result_that_does_not_fit_is_a_dead_letter() -> None:
    rows = payments(20)
    rows["amount"] = 100
    found = drive(TooLarge, rows)
    assert found.dead["offset"].tolist() == [7]
    assert "does not fit Large.spent" in found.dead["error"][0]
    assert len(found.tables[Large]) == 19


class Raises(Processor):
    source = Spending.source

    def on_event(self, event: Any, state: Any) -> None:
        if event.payment_id == 13:
            raise ValueError("unlucky")


class Nothing(Processor):
    source = Spending.source

    def on_event(self, event: Any, state: Any) -> Any:
        return 5


class Half(Processor):
    source = Spending.source
    seen = Keyed(by="customer", payments=int)

    def on_event(self, event: Any, state: Any) -> None:
        state.seen[event.customer].payments += 0.5


class Misses(Processor):
    source = Spending.source

    def on_event(self, event: Any, state: Any) -> Row:
        return Spent.row(spent=1)


@pytest.mark.parametrize(
    ("processor", "kind", "sentence"),
    [
        (Raises, StoppedPartition, r"Raises.on_event raised ValueError: unlucky at offset 13, in"),
        (Nothing, ConfigError, "Nothing.on_event returned int"),
        (Half, ConfigError, "Half.seen.payments is int64, but was given float64"),
        (Misses, ConfigError, "number is neither given nor a field"),
    ],
)
def test_a_processor_at_fault_is_a_sentence(
    processor: type[Processor], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        drive(processor, payments(20))


def test_one_of_process_and_on_event_is_declared() -> None:
    for body in ({}, {"process": lambda *_: None, "on_event": lambda *_: None}):
        with pytest.raises(ConfigError, match="on_event"):
            type("Both", (Processor,), {"source": Spending.source, **body})


def test_events_are_plain_values() -> None:
    seen: list[Any] = []

    class Looks(Processor):
        source = Positions.source

        def on_event(self, event: Any, state: Any) -> None:
            seen.append(event)

    rows = fills(3)
    rows["note"] = "größe".encode()
    drive(Looks, rows)
    assert [type(getattr(seen[0], name)) for name in seen[0].__struct_fields__] == [
        int,
        int,
        Kind,
        int,
        float,
        str,
        int,
    ]
    assert (seen[2].offset, seen[2].note, seen[2].price) == (2, "größe", int(rows["price"][2]))
    assert Payment.dtype() != rows.dtype
