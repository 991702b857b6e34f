"""State against ten lines of plain Python: any events, any splits, rollbacks and restores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledgerstream.errors import ConfigError
from ledgerstream.events import Event, Text, Timestamp
from ledgerstream.money import EUR
from ledgerstream.stream import arena, keyed
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.processor import Keyed, Sliding, Topic
from ledgerstream.stream.state import BadEvents, State

WINDOWS = (5, 20, 60)
LATE = 15


class Spend(Event):
    at: Timestamp
    who: int
    amount: EUR
    short: Text[5] = ""  # type: ignore[valid-type]
    long: Text[17] = ""  # type: ignore[valid-type]


SOURCE = Topic("spends", Spend, key="who")
NS = tuple(f"{w}ns" for w in WINDOWS)
SPECS = {
    "now": Sliding(by="who", over=NS, sum="amount", count=True, late=f"{LATE}ns"),
    "old": Sliding(by="who", over=NS, sum="amount", count=True, delay="7ns", late=f"{LATE}ns"),
    "books": Keyed(by="who", balance=EUR, entries=int, big=bool),
}
DELAYS = {"now": 0, "old": 7}
RESOLVED = {name: each.resolve(name, SOURCE) for name, each in SPECS.items()}


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that a few events make them grow and compact."""
    monkeypatch.setattr(arena, "_ENTRIES_MIN", 4)
    monkeypatch.setattr(keyed, "_INDEX_SLOTS_MIN", 2)


@dataclass
class Seen:
    """What one run of events showed: totals of each window, balances, and the digest."""

    totals: dict[str, np.ndarray]
    balance: np.ndarray
    digest: bytes


def apply(
    state: State, rows: np.ndarray, first: int, by: str = "who"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    batch = Batch(SOURCE, rows, np.arange(first, first + len(rows)))
    totals = {}
    for name in DELAYS:
        windows = getattr(state, name).add(batch)
        totals[name] = np.concatenate([windows.sum, windows.count], axis=1)
    held = state.books.at(batch[by])
    after = np.empty(len(rows), np.int64)
    for i, row in enumerate(held.row):
        held.balance[row] += batch.amount[i]
        held.entries[row] += 1
        held.big[row] = held.balance[row] > 100
        after[i] = held.balance[row]
    return totals, after


def run(
    rows: np.ndarray,
    cuts: list[int],
    chaos: Iterator[int] | None = None,
    specs: Any = RESOLVED,
    by: str = "who",
) -> Seen:
    """Process rows cut into batches; chaos: 1 and 2 undo one batch, or two; 2 and 3
    restore from a dump; 4 leaves the batch open."""
    state = State(specs)
    bounds = sorted({0, len(rows), *cuts})
    seen = []
    for first, stop in pairwise(bounds):
        act = next(chaos) if chaos is not None else 0
        part = rows[first:stop]
        if act in (1, 2):
            before = state.digest()
            for _ in range(act):
                state.begin(len(rows))
                apply(state, rows[::-1].copy(), first, by)  # other keys too than what comes next
                state.seal()
            for _ in range(act):
                state.rollback()
            assert state.digest() == before
        if act in (2, 3):
            frozen, before = state.freeze(), state.digest()
            state.begin(len(rows))
            apply(state, rows[::-1].copy(), first, by)  # the stream goes on meanwhile
            state = State(specs)
            state.load(frozen())
            assert state.digest() == before
        state.begin(len(part))
        seen.append(apply(state, part, first, by))
        state.seal()
        if act == 4:  # what is computed ahead stays open, and is forgotten later
            continue
        while state.frames:
            state.forget()
    return Seen(
        {name: np.concatenate([totals[name] for totals, _ in seen]) for name in DELAYS},
        np.concatenate([after for _, after in seen]),
        state.digest(),
    )


def expected(rows: np.ndarray) -> tuple[dict[str, np.ndarray], list[int]]:
    """The definition, word for word."""
    totals: dict[str, list[list[int]]] = {name: [] for name in DELAYS}
    balance: dict[int, int] = {}
    balances = []
    for n, (at, who, amount) in enumerate(rows[["at", "who", "amount"]].tolist()):
        balance[who] = balance.get(who, 0) + amount
        balances.append(balance[who])
        for name, delay in DELAYS.items():
            upto = at - delay
            inside = [
                [
                    a
                    for t, w, a, *_ in rows[: n + 1].tolist()
                    if w == who and upto - over < t <= upto
                ]
                for over in WINDOWS
            ]
            totals[name].append([sum(each) for each in inside] + [len(each) for each in inside])
    return {name: np.array(each) for name, each in totals.items()}, balances


def spent(rows: list[tuple[int, int, int]]) -> np.ndarray:
    made = np.zeros(len(rows), Spend.dtype())
    made["at"], made["who"], made["amount"] = np.array(rows, np.int64).T
    return made


@st.composite
def spends(draw: st.DrawFn, late: int = LATE) -> np.ndarray:
    count = draw(st.integers(1, 60))
    rows = np.zeros(count, Spend.dtype())
    now = 1_000
    for n in range(count):
        now += draw(st.sampled_from([0, 0, 1, 2, 5, 7, 19, 20, 21, 80]))
        rows[["at", "who", "amount"]][n] = (
            now - draw(st.sampled_from([0, 0, 0, 1, late // 2, late - 1])),
            draw(st.integers(0, 3)),
            draw(st.integers(-50, 200)),
        )
    return rows


cuts = st.lists(st.integers(0, 60), max_size=12)
chaos = st.lists(st.integers(0, 4), min_size=20, max_size=20)
thorough = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@thorough
@given(spends())
def test_each_event_sees_exactly_its_windows(rows: np.ndarray) -> None:
    seen = run(rows, [])
    totals, balances = expected(rows)
    for name in DELAYS:
        np.testing.assert_array_equal(seen.totals[name], totals[name])
    assert seen.balance.tolist() == balances


@thorough
@given(spends(late=90), cuts, chaos)
def test_splits_rollbacks_and_restores_change_no_bit(
    rows: np.ndarray, where: list[int], acts: list[int]
) -> None:
    whole = run(rows, [])
    cut = run(rows, [each for each in where if each < len(rows)], iter(acts))
    for name in DELAYS:
        np.testing.assert_array_equal(whole.totals[name], cut.totals[name])
    np.testing.assert_array_equal(whole.balance, cut.balance)
    assert whole.digest == cut.digest


def test_windows_equal_pandas_rolling() -> None:
    rng = np.random.default_rng(5)
    rows = np.zeros(20_000, Spend.dtype())
    rows["at"] = np.sort(rng.choice(90 * 86_400, 20_000, replace=False)) * 10**9
    rows["who"] = rng.integers(0, 50, len(rows))
    rows["amount"] = rng.integers(1, 100_000, len(rows))
    over = ("1d", "7d", "30d")
    plain = Sliding(by="who", over=over, sum="amount", count=True).resolve("p", SOURCE)
    delayed = Sliding(by="who", over=over, sum="amount", count=True, delay="7d").resolve(
        "d", SOURCE
    )
    state = State({"plain": plain, "delayed": delayed})
    batch = Batch(SOURCE, rows, np.arange(len(rows)))
    state.begin(len(rows))
    now, old = state.plain.add(batch), state.delayed.add(batch)
    state.seal()
    frame = pd.DataFrame(rows).assign(time=pd.to_datetime(rows["at"], unit="ns"))
    for _, group in frame.groupby("who"):
        series = group.set_index("time")["amount"]
        at = group.index.to_numpy()
        for w, each in enumerate(over):
            rolling = series.rolling(each.upper())
            np.testing.assert_array_equal(now.sum[at, w], rolling.sum().astype(np.int64))
            np.testing.assert_array_equal(now.count[at, w], rolling.count().astype(np.int64))
            longer = series.rolling(pd.Timedelta(each.upper()) + pd.Timedelta("7D")).sum()
            expected = longer - series.rolling("7D").sum()
            np.testing.assert_array_equal(old.sum[at, w], expected.astype(np.int64))


def test_an_event_later_than_what_is_kept_counts_for_itself() -> None:
    rows = spent([(1_000, 1, 5), (1_070, 1, 7), (980, 1, 11)])
    seen = run(rows, [])
    assert seen.totals["now"][2].tolist() == [11, 11, 11, 1, 1, 1]
    assert run(rows, [1, 2]).digest == seen.digest


def by_text(column: str) -> dict[str, object]:
    specs = {
        "now": Sliding(by=column, over=NS, sum="amount", count=True, late=f"{LATE}ns"),
        "old": Sliding(by=column, over=NS, sum="amount", count=True, delay="7ns", late=f"{LATE}ns"),
        "books": Keyed(by=column, balance=EUR, entries=int, big=bool),
    }
    return {name: each.resolve(name, SOURCE) for name, each in specs.items()}


TEXTS = {  # of 0 to 3; some differ in their last byte alone
    "short": [b"", b"a", b"ab", b"abcde"],
    "long": [b"", b"a", b"same sixteen say", b"same sixteen sayz"],
}


@pytest.mark.parametrize("column", ["short", "long"])
@thorough
@given(rows=spends(late=90), where=cuts, acts=chaos)
def test_text_keys_give_what_integers_give(
    column: str, rows: np.ndarray, where: list[int], acts: list[int]
) -> None:
    rows[column] = np.array(TEXTS[column])[rows["who"]]
    whole = run(rows, [])
    specs = by_text(column)
    texts = run(rows, [], None, specs, column)
    cut = run(rows, [each for each in where if each < len(rows)], iter(acts), specs, column)
    for name in DELAYS:
        np.testing.assert_array_equal(whole.totals[name], texts.totals[name])
        np.testing.assert_array_equal(whole.totals[name], cut.totals[name])
    np.testing.assert_array_equal(whole.balance, texts.balance)
    np.testing.assert_array_equal(whole.balance, cut.balance)
    assert texts.digest == cut.digest


def test_the_digest_of_a_state_is_what_it_always_was() -> None:
    rows = np.zeros(5, Spend.dtype())
    rows["at"], rows["who"] = [1_000, 1_010, 1_012, 1_040, 1_035], [1, 2, 1, 3, 3]
    rows["amount"] = [5, 7, -3, 11, 2]
    specs = {"sums": Sliding(by="who", over="20ns", sum="amount", count=True), **SPECS}
    state = State({name: specs[name].resolve(name, SOURCE) for name in ("sums", "books")})
    state.begin(5)
    batch = Batch(SOURCE, rows, np.arange(5))
    state.sums.add(batch)
    held = state.books.at(batch.who)
    held.balance[held.row], held.big[held.row] = batch.amount, True
    state.seal()
    assert state.digest().hex() == "45a3a0206ba470b68a2e21605b92b991"  # as version 0.1.0 had it


def test_keys_of_another_kind_are_refused() -> None:
    state = State({"numbers": RESOLVED["books"], "texts": by_text("short")["books"]})
    state.begin(3)
    with pytest.raises(ConfigError, match="'who': keys are integers, not float64"):
        state.numbers.at(np.zeros(3))
    with pytest.raises(ConfigError, match="'short': keys are text, not int64"):
        state.texts.at(np.zeros(3, int))
    with pytest.raises(ConfigError, match="text of at most 5 bytes"):
        state.texts.at(np.array(["abcdef"]))
    assert state.texts.at(np.array(["é", "abcde"])).row.tolist() == [0, 1]
    assert state.texts.columns()["short"].tolist() == ["é".encode(), b"abcde"]


def test_a_sum_that_overflows_names_its_event_and_is_undone() -> None:
    most = 2**63 - 1
    rows = spent([(1_000, 1, most), (1_001, 2, 1), (1_002, 1, 1)])
    state = State(RESOLVED)
    before = state.digest()
    state.begin(3)
    with pytest.raises(BadEvents, match="64 bits") as refused:
        apply(state, rows, 0)
    assert refused.value.offsets == [2]
    state.rollback()
    assert state.digest() == before
    state.begin(2)
    totals, _ = apply(state, rows[:2], 0)
    assert totals["now"][:, 0].tolist() == [most, 1]


def test_a_time_beyond_reason_names_its_event() -> None:
    rows = spent([(1_000, 1, 1), (2**62, 1, 1)])
    state = State(RESOLVED)
    state.begin(2)
    with pytest.raises(BadEvents, match="out of range") as refused:
        apply(state, rows, 0)
    assert refused.value.offsets == [1]


def test_a_table_grows_by_many_keys_at_once_and_finds_them_again() -> None:
    keys = np.random.default_rng(2).permutation(np.arange(-50_000, 50_000) * 7_919)
    state = State({"books": RESOLVED["books"]})
    state.begin(len(keys))
    held = state.books.at(keys)
    held.balance[held.row] = keys
    state.seal()
    state.forget()
    state.begin(len(keys))
    again = state.books.at(keys[::-1])
    np.testing.assert_array_equal(again.balance[again.row], keys[::-1])
    assert len(state.books) == len(keys)


def test_more_new_keys_than_there_is_room_for_are_refused_in_a_sentence() -> None:
    state = State({"books": RESOLVED["books"]})
    state.begin(1)
    with pytest.raises(Exception, match="new keys an event"):
        state.books.at(np.arange(10_000))


@pytest.mark.parametrize("follow", [1, 50])  # within the key's block; and through several arrays
def test_a_rollback_takes_late_events_out_from_among_the_earlier(follow: int) -> None:
    state = State(RESOLVED)
    state.begin(2)
    apply(state, spent([(1_000, 1, 5), (1_010, 1, 7)]), 0)
    state.seal()
    before = state.dump()
    state.begin(3 + follow)
    late = [(1_005, 1, 6), (1_002, 1, 8), (1_001, 2, 9)]
    apply(state, spent([*late, *[(1_010, 1 + n % 2, n) for n in range(follow)]]), 2)
    state.seal()
    state.rollback()
    for name, content in state.dump().items():
        for part, array in content.items():
            np.testing.assert_array_equal(array, before[name][part])
