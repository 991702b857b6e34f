"""`ledgerstream.local()`: the front door's example, as it stands there."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from sqlalchemy.orm import Mapped

import ledgerstream
from ledgerstream import Event, Processor, Rows, Sliding, State, Table, Timestamp, Topic
from ledgerstream.errors import ConfigError
from ledgerstream.money import EUR, eur
from ledgerstream.stream.batch import Batch


class Purchase(Event):
    payment_id: int
    at: Timestamp
    customer: int
    terminal: int
    amount: EUR


class LargeAlert(Table):
    payment_id: Mapped[int]
    at: Mapped[Timestamp]
    customer: Mapped[int]
    spent: Mapped[EUR]


class LargeSpenders(Processor):
    """Customers who spend more than 10,000 EUR within 24 hours."""

    source = Topic("purchases", Purchase, key="customer")
    spent = Sliding(by="customer", over="24h", sum="amount")

    def process(self, payments: Batch, state: State) -> Rows:
        spent = state.spent.add(payments)
        return LargeAlert.rows(payments, where=spent > eur("10000.00"), spent=spent)


def test_a_log_and_a_database_of_ones_own() -> None:
    times = pd.to_datetime(
        ["2026-01-01T10:00:00Z", "2026-01-01T20:00:00Z", "2026-01-02T09:00:00Z",
         "2026-01-02T21:00:00Z"]
    )  # fmt: skip
    frame = pd.DataFrame(
        {
            "payment_id": [1, 2, 3, 4],
            "at": times,
            "customer": [7, 7, 7, 7],
            "terminal": [1, 1, 2, 2],
            "amount": [eur("6000.00"), eur("3000.00"), eur("2000.00"), eur("9000.00")],
        }
    )
    with ledgerstream.local() as ls:
        assert ls.write("purchases", frame) == 4
        progress = ls.run(LargeSpenders, until="end")
        assert progress.events == 4
        alerts = ls.table(LargeAlert)
        verified = ls.verify(LargeSpenders)
        last = ls.read("purchases", last="13h")
        whole = ls.read("purchases")
        path = ls.path
    assert alerts["payment_id"].tolist() == [3, 4]
    assert (verified.events, verified.rows) == (4, 2)
    assert alerts["spent"].tolist() == [eur("11000.00"), eur("11000.00")]
    assert alerts["at"].tolist() == list(times[2:])
    assert last["payment_id"].tolist() == [3, 4]
    assert whole["at"].tolist() == list(times)
    assert not path.exists()


def test_what_a_newcomer_types_wrongly_is_a_sentence(tmp_path: Path) -> None:
    frame = pd.DataFrame({"payment_id": [1], "at": [0], "customer": [1.0], "terminal": [1],
                          "amount": [5]})  # fmt: skip
    with pytest.raises(ConfigError, match="not as list"):
        LargeSpenders.on([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'customer' \(int\) has no value in row 0 \(NaN\)"):
        LargeSpenders.on(frame.assign(customer=[float("nan")]))
    before = ledgerstream.local(tmp_path / "never")
    with pytest.raises(ConfigError, match="are not open here"):
        before.run(LargeSpenders)
    with ledgerstream.local(tmp_path / "data") as ls:
        for wrong in ("LargeSpenders", LargeSpenders(), LargeAlert, None):
            with pytest.raises(ConfigError, match=r"ls\.(run|verify) takes "):
                ls.run(wrong)  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match=r"ls\.verify takes "):
                ls.verify(wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="it is 'end' or None"):
            ls.run(LargeSpenders, until="now")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"ls\.table takes a result table"):
            ls.table("large_alert")  # type: ignore[arg-type]
    for use in (
        lambda: ls.run(LargeSpenders),
        lambda: ls.table(LargeAlert),
        lambda: ls.read("purchases"),
        lambda: ls.verify(LargeSpenders),
        lambda: ls.write("purchases", frame),
    ):
        with pytest.raises(ConfigError, match="are not open here"):
            use()


def test_the_door_stays_open_however_often_it_is_used() -> None:
    """A module of the same name would take the function's place once it is imported."""
    import importlib

    import ledgerstream

    importlib.import_module(ledgerstream.local.__module__)
    assert callable(ledgerstream.local)
    assert callable(ledgerstream.kernel)
