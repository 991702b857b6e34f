"""Trying a processor on a data frame, and what its own tests can say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledgerstream.errors import ConfigError
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.processor import Processor, State
from ledgerstream.stream.tables import Rows
from ledgerstream.testing import assert_splits_do_not_matter, drive
from tests.stream.spending import DAY, Large, Payment, Spending, Spent, payments
from tests.stream.test_local import LargeAlert, LargeSpenders

FRAME = pd.DataFrame(
    {
        "payment_id": [1, 2, 3, 4],
        "at": pd.to_datetime(
            ["2026-01-01T10:00Z", "2026-01-01T20:00Z", "2026-01-02T09:00Z", "2026-01-02T21:00Z"]
        ),
        "customer": 7,
        "terminal": 1,
        "amount": ["6000.00", "3000.00", "2000.00", "9000.00"],
    }
)


def test_a_frame_in_frames_out() -> None:
    alerts = LargeSpenders.on(FRAME, splits=[3])[LargeAlert]
    assert alerts.to_dict("list") == {
        "payment_id": [3, 4],
        "at": list(FRAME["at"][2:]),
        "customer": [7, 7],
        "spent": [1_100_000, 1_100_000],
    }


def test_a_table_without_rows_is_an_empty_frame_with_its_columns() -> None:
    alerts = LargeSpenders.on(FRAME[:1])[LargeAlert]
    assert len(alerts) == 0
    assert list(alerts) == ["payment_id", "at", "customer", "spent"]


def test_text_and_state_come_back_as_people_write_them() -> None:
    rows = payments(300)
    found = drive(Spending, rows)
    assert found.tables[Spent]["note"].tolist() == ["card"] * 300
    seen = found.state["seen"]
    customers, counts = np.unique(rows["customer"], return_counts=True)
    assert seen["customer"].tolist() == customers.tolist()
    assert seen["payments"].tolist() == counts.tolist()
    assert list(found.state["day"]) == ["customer", "newest", "sum_1d"]


def test_splits_and_crashes_change_nothing() -> None:
    rows = payments(500)
    whole = drive(Spending, rows)
    for splits, crashes in (([100, 300], [300]), ([250], [1, 499]), ([], [0, 250])):
        found = drive(Spending, rows, splits=splits, crashes=crashes)
        assert found.digest == whole.digest
        pd.testing.assert_frame_equal(found.tables[Spent], whole.tables[Spent])
        pd.testing.assert_frame_equal(found.tables[Large], whole.tables[Large])
    assert_splits_do_not_matter(Spending, rows, seed=3, rounds=5)


@settings(max_examples=40, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 2), st.integers(0, 9)), max_size=40
    ),
    cuts=st.lists(st.floats(0, 1), max_size=4),
    crashes=st.lists(st.floats(0, 1), max_size=3),
)
def test_any_events_splits_and_crashes_give_what_plain_python_gives(
    events: list[tuple[int, int, int]], cuts: list[float], crashes: list[float]
) -> None:
    rows = np.zeros(len(events), Payment.dtype())
    hour = 3_600 * 10**9
    late: dict[int, int] = {}
    for at, (time, customer, amount) in enumerate(events):
        # At most an hour behind its customer's newest: what is later is answered by what is kept.
        late[customer] = max(late.get(customer, 0), time)
        rows[at]["at"] = max(time, late[customer] - 1) * hour
        rows[at]["customer"], rows[at]["amount"] = customer, amount
    found = drive(
        Spending,
        rows,
        splits=[int(each * len(rows)) for each in cuts],
        crashes=[int(each * len(rows)) for each in crashes],
    ).tables[Spent]

    wanted = []
    for at, row in enumerate(rows):
        mine = [each for each in rows[: at + 1] if each["customer"] == row["customer"]]
        day = [each for each in mine if row["at"] - DAY < each["at"] <= row["at"]]
        wanted.append((sum(int(each["amount"]) for each in day), len(mine)))
    assert list(zip(found["spent"], found["number"], strict=True)) == wanted


def test_refused_events_are_named_and_the_others_counted() -> None:
    rows = payments(100)
    rows["amount"][40] = 2**63 - 1
    rows["customer"][41] = rows["customer"][40]
    rows["at"][41] = rows["at"][40]
    found = drive(Spending, rows, splits=[7])
    assert found.dead["offset"].tolist() == [41]
    assert "64 bits" in found.dead["error"][0]
    assert len(found.tables[Spent]) == 99


def test_a_row_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"crashes: there is no row 101; the frame has 100\."):
        drive(Spending, payments(100), crashes=[101])


class CountsBatches(Processor):
    """Wrong on purpose: its result depends on where batches end."""

    source = Spending.source
    results = (Spent,)

    def process(self, batch: Batch, state: State) -> Rows:
        return Spent.rows(batch, spent=len(batch), number=0)


class Remembers(Processor):
    """Wrong on purpose: what it remembers is gone when the process dies."""

    source = Spending.source

    def __init__(self) -> None:
        self.count = 0

    def process(self, batch: Batch, state: State) -> Rows:
        number = self.count + np.arange(len(batch))
        self.count += len(batch)
        return Spent.rows(batch, spent=0, number=number)


@pytest.mark.parametrize(("processor", "column"), [(CountsBatches, "spent"), (Remembers, "number")])
def test_a_processor_that_depends_on_batches_is_found(
    processor: type[Processor], column: str
) -> None:
    with pytest.raises(AssertionError, match=rf"splits=\[.*spent: row 0 of .*: {column} is \d+ so"):
        assert_splits_do_not_matter(processor, payments(60), seed=2)


class Sometimes(Spending):
    """Wrong on purpose: a row of state that is only touched in a batch's middle."""

    def process(self, batch: Batch, state: State) -> list[Rows]:
        state.seen.at(np.array([len(batch)]))
        return []


def test_state_that_depends_on_batches_is_found() -> None:
    with pytest.raises(AssertionError, match="the rows are equal, and state 'seen' is not"):
        assert_splits_do_not_matter(Sometimes, payments(60), seed=2)


def test_rows_that_are_no_events_are_a_sentence() -> None:
    with pytest.raises(ConfigError, match="amount"):
        Spending.on(pd.DataFrame({"payment_id": [1], "at": [DAY], "customer": [1], "terminal": 1}))
    assert Payment.dtype() == payments(1).dtype
