"""A declaration is checked when it is made, and says what is wrong in a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ledgerstream.errors import ConfigError
from ledgerstream.events import Event, Text, Timestamp
from ledgerstream.money import EUR
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.durations import duration_ns
from ledgerstream.stream.processor import Keyed, Processor, Sliding, State, Topic
from ledgerstream.stream.state import Windows
from tests.stream.spending import Spending


class Trade(Event):
    at: Timestamp
    account: int
    price: float
    amount: EUR
    venue: Text[4]  # type: ignore[valid-type]


class Timeless(Event):
    account: int


class Busy(Event):
    at: Timestamp
    offset: int


SOURCE = Topic("trades", Trade, key="account")


def declare(**members: Any) -> type[Processor]:
    members.setdefault("source", SOURCE)
    members.setdefault("process", lambda self, batch, state: None)
    return type("Wrong", (Processor,), members)


@pytest.mark.parametrize(
    ("member", "sentence"),
    [
        (Sliding(by="client", over="1d"), "by='client' is not a column of Trade"),
        (Sliding(by="price", over="1d"), "by='price' is float; state is kept by integer or text"),
        (Sliding(by="account", over="1d", sum="fee"), "sum='fee' is not a column of Trade"),
        (Sliding(by="account", over="1d", sum="price"), "sums are exact"),
        (Sliding(by="account", over="one day"), "'one day' is not a length of time"),
        (Sliding(by="account", over="0s"), "a window of no length"),
        (Sliding(by="account", over=()), "at least one window"),
        (Sliding(by="account", over="1d", count=False), "neither a sum nor a count"),
        (Sliding(by="account", over="1d", delay="soon"), "'soon' is not a length of time"),
        (Keyed(by="client", n=int), "by='client' is not a column"),
        (Keyed(by="account"), "keeps nothing"),
        (Keyed(by="account", row=int), "cannot be named 'row'"),
        (Keyed(by="account", note=str), "Wrong.state: note: <class 'str'> has no column"),
    ],
)
def test_what_is_wrong_with_state_is_said(member: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        declare(state=member)
    assert sentence in str(refused.value)


def test_what_is_wrong_with_a_source_is_said() -> None:
    with pytest.raises(ConfigError, match="key='client' is not a column of Trade"):
        Topic("trades", Trade, key="client")
    with pytest.raises(ConfigError, match="'price' is not a Timestamp"):
        Topic("trades", Trade, key="account", time="price")
    with pytest.raises(ConfigError, match="encoding is 'fixed' or 'json'"):
        Topic("trades", Trade, key="account", encoding="avro")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a batch uses that name itself"):
        Topic("trades", Busy, key="offset")
    with pytest.raises(ConfigError, match="is not an event type"):
        Topic("trades", dict, key="account")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be a Topic"):
        declare(source="trades")
    with pytest.raises(ConfigError, match="windows need an event time"):
        declare(
            source=Topic("timeless", Timeless, key="account"),
            state=Sliding(by="account", over="1d"),
        )
    with pytest.raises(ConfigError, match=r"no process\(self, batch, state\)"):
        type("Empty", (Processor,), {"source": SOURCE})


def test_a_batch_has_columns_and_says_which() -> None:
    rows = np.zeros(3, Trade.dtype())
    rows["amount"] = [1, 2, 3]
    batch = Batch(SOURCE, rows, np.array([4, 5, 9]))
    assert batch.amount.flags.c_contiguous
    assert batch.amount is batch.amount
    assert batch["amount"].tolist() == [1, 2, 3]
    assert batch.take(batch.amount > 1).offset.tolist() == [5, 9]
    with pytest.raises(AttributeError, match="no column 'fee'; it has at, account, price"):
        _ = batch.fee


def test_a_window_answers_in_the_shape_that_was_declared() -> None:
    shapes = {
        "plain": Sliding(by="account", over="1d", sum="amount"),
        "counted": Sliding(by="account", over="1d"),
        "both": Sliding(by="account", over="1d", sum="amount", count=True),
        "several": Sliding(by="account", over=("1d", "2d"), sum="amount"),
    }
    state = State({name: each.resolve(name, SOURCE) for name, each in shapes.items()})
    rows = np.zeros(2, Trade.dtype())
    rows["amount"] = [5, 6]
    batch = Batch(SOURCE, rows, np.arange(2))
    state.begin(2)
    assert state.plain.add(batch).tolist() == [5, 11]
    assert state.counted.add(batch).tolist() == [1, 2]
    both: Windows = state.both.add(batch)
    assert (both.sum.tolist(), both.count.tolist()) == ([[5], [11]], [[1], [2]])
    several: Windows = state.several.add(batch)
    assert several.sum.tolist() == [[5, 5], [11, 11]]
    with pytest.raises(ConfigError, match="without count=True"):
        _ = several.count
    with pytest.raises(AttributeError, match="no state 'other' is declared"):
        _ = state.other


def test_subclasses_keep_state_and_take_their_own_name() -> None:
    class Stricter(Spending):
        pass

    assert Stricter.name == "Stricter"
    assert list(Stricter.states) == ["day", "seen"]


@pytest.mark.parametrize(
    ("text", "ns"), [("24h", 86_400 * 10**9), ("250ms", 250_000_000), ("2w", 14 * 86_400 * 10**9)]
)
def test_lengths_of_time_are_read(text: str, ns: int) -> None:
    assert duration_ns(text) == ns
