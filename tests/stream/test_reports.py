"""Windows whose events are corrected and cancelled, against their definition in plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledgerstream import (
    Count,
    Event,
    Hopping,
    ReportKind,
    Reports,
    State,
    Timestamp,
    Topic,
    Tumbling,
)  # fmt: skip
from ledgerstream.errors import ConfigError
from ledgerstream.stream import keyed
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.state import BadEvents
from ledgerstream.stream.windowstate import Changes
from tests.stream.test_windows import KEPT, listed, result, same

DELAY, LATE = 4, 15
NEW, CORRECT, CANCEL = ReportKind


class Told(Event):
    at: Timestamp
    who: int
    trade: int
    price: int
    size: int
    kind: ReportKind = ReportKind.NEW
    original: int = 0


SOURCE = Topic("told", Told, key="who")
REPORTS = Reports(id="trade", of="original", kind="kind")
COMMON: dict[str, Any] = {"delay": f"{DELAY}ns", "late": f"{LATE}ns", "reports": REPORTS, **KEPT}
SPECS = {
    "bars": (Tumbling(by="who", over=("5ns", "20ns"), **COMMON), [(5, 5), (20, 20)], LATE),
    "hops": (
        Hopping(by="who", over=("7ns", "12ns"), every="5ns", **COMMON), [(7, 5), (12, 5)], LATE,
    ),
    "once": (Tumbling(by="who", over="5ns", on_late="drop", **COMMON), [(5, 5)], 0),
}  # fmt: skip
RESOLVED = {name: each[0].resolve(name, SOURCE) for name, each in SPECS.items()}
NOTHING = (0, 0, 0, 0, 0, 0, float("nan"), float("nan"))


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "_INDEX_SLOTS_MIN", 2)


def expected(
    rows: np.ndarray, widths: list[tuple[int, int]], late: int
) -> tuple[set[Any], dict[Any, Any], list[int], int]:
    """Final versions, the windows open at the end, what each width dropped, and the unmatched."""
    trades: dict[tuple[int, int], tuple[int, int, int, int]] = {}  # time, price, size, offset
    made: dict[tuple[int, int, int], int] = {}  # windows that are kept: versions so far
    finals, dropped, unmatched, top = set(), [0] * len(widths), 0, None

    def windows_of(time: int) -> Iterator[tuple[int, int, int]]:
        for number, (width, every) in enumerate(widths):
            for start in range(time // every * every, time - width, -every):
                yield number, start, width

    def content(key: int, start: int, width: int) -> tuple[Any, ...]:
        inside = [t for (k, _), t in trades.items() if k == key and start <= t[0] < start + width]
        return result(inside) if inside else NOTHING

    for n, row in enumerate(rows):
        time, key, kind = int(row["at"]), int(row["who"]), ReportKind(int(row["kind"]))
        name = (key, int(row["trade" if kind is NEW else "original"]))
        if (name in trades) == (kind is NEW):
            unmatched += 1
            continue
        top = time if top is None else max(top, time)
        mark = top - DELAY
        for (k, start, width), version in made.items():
            if version == 0 and start + width <= mark:
                made[k, start, width] = 1
                finals.add((n, k, start, width, 1, *content(k, start, width)))
        made = {w: v for w, v in made.items() if w[1] + w[2] + late > mark}
        old, trade = trades.pop(name, None), None
        touched = dict.fromkeys(windows_of(old[0])) if old else {}
        if kind is not CANCEL:
            touched |= dict.fromkeys(windows_of(time))
            trade = (time, int(row["price"]), int(row["size"]), old[3] if old else n)
            trades[name] = trade
        for number, start, width in touched:
            if start + width + late <= mark:
                dropped[number] += 1
                continue
            window = (key, start, width)
            made.setdefault(window, 0)
            if start + width <= mark:
                made[window] += 1
                finals.add((n, *window, made[window], *content(*window)))
        trades = {
            (k, i): t for (k, i), t in trades.items()
            if any(start + width + late > mark for _, start, width in windows_of(t[0]))
        }  # fmt: skip
    return finals, {w: content(*w) for w, v in made.items() if v == 0}, dropped, unmatched


class Seen:
    def __init__(self) -> None:
        self.finals: dict[str, list[Any]] = {name: [] for name in SPECS}
        self.rows: dict[str, dict[Any, Any]] = {name: {} for name in SPECS}
        self.counts: dict[str, tuple[list[int], int]] = {}
        self.digest = b""

    def take(self, name: str, changes: Changes, first: int) -> None:
        assert (np.diff(changes.event) >= 0).all()
        flags = zip(changes.final.tolist(), changes.new.tolist(), strict=True)
        for row, (final, fresh) in zip(listed(changes, first), flags, strict=True):
            before = self.rows[name].get(row[1:5])
            assert final or (row[4] == 1 and (before is None or not before[-1]))
            assert fresh == (before is None)
            self.rows[name][row[1:5]] = (*row[5:], final)
            if final:
                self.finals[name].append(row)
        self.counts[name] = (changes.dropped.tolist(), changes.unmatched)


def apply(state: State, rows: np.ndarray, first: int) -> dict[str, Changes]:
    batch = Batch(SOURCE, rows, np.arange(first, first + len(rows)))
    return {name: getattr(state, name).add(batch) for name in SPECS}


def run(rows: np.ndarray, cuts: list[int], chaos: Iterator[int] | None = None) -> Seen:
    """As `run` of test_windows: chaos 1 and 2 undo batches, 2 and 3 restore, 4 leaves frames."""
    state, seen = State(RESOLVED), Seen()
    for first, stop in pairwise(sorted({0, len(rows), *cuts})):
        act = next(chaos) if chaos is not None else 0
        if act in (1, 2):
            before = state.digest()
            for turn in range(act):
                wrong = rows[::-1].copy()
                wrong["at"] += 40 * turn
                state.begin(len(wrong))
                apply(state, wrong, first)
                state.seal()
            for _ in range(act):
                state.rollback()
            assert state.digest() == before
        if act in (2, 3):
            frozen, before = state.freeze(), state.digest()
            state.begin(len(rows))
            apply(state, rows[::-1].copy(), first)
            state = State(RESOLVED)
            state.load(frozen())
            assert state.digest() == before
        state.begin(stop - first)
        for name, changes in apply(state, rows[first:stop], first).items():
            seen.take(name, changes, first)
        state.seal()
        while act != 4 and state.frames:
            state.forget()
    seen.digest = state.digest()
    return seen


@st.composite
def told(draw: st.DrawFn) -> np.ndarray:
    """Dense in time, so that windows hold many; most amendments name a trade that was told."""
    count = draw(st.integers(1, 60))
    rows = np.zeros(count, Told.dtype())
    now, keys = draw(st.sampled_from([-30, 0, 1_000])), draw(st.integers(1, 2))
    known: list[tuple[int, int]] = []
    for n in range(count):
        now += draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2, 5, 20, 80]))
        back = draw(st.sampled_from([0, 0, 0, 1, 3, 6, 12, 25, 60]))
        kind = draw(st.sampled_from([NEW, NEW, NEW, CORRECT, CORRECT, CANCEL]))
        key, trade = draw(st.integers(1, keys)), draw(st.sampled_from([n, n, n, 3]))
        original = draw(st.integers(0, n))
        if kind is NEW:
            known.append((key, trade))
        elif known and draw(st.integers(0, 7)):
            key, original = draw(st.sampled_from(known[-12:]))
        rows[n] = (
            now - back, key, trade, draw(st.integers(-40, 40)), draw(st.integers(0, 5)), kind,
            original,
        )  # fmt: skip
    return rows


cuts = st.lists(st.integers(0, 50), max_size=12)
chaos = st.lists(st.integers(0, 4), min_size=20, max_size=20)
thorough = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@thorough
@given(told(), cuts)
def test_each_version_covers_the_trades_as_they_stood(rows: np.ndarray, where: list[int]) -> None:
    seen = run(rows, [each for each in where if each < len(rows)])
    for name, (_, widths, late) in SPECS.items():
        finals, open_now, dropped, unmatched = expected(rows, widths, late)
        assert same(seen.finals[name], finals)
        shown = [(w[:3], r[:-1]) for w, r in seen.rows[name].items() if not r[-1]]
        assert same(shown, list(open_now.items()))
        assert seen.counts[name] == (dropped, unmatched)


@pytest.mark.torture
@settings(thorough, max_examples=5_000)
@given(told(), cuts)
def test_each_version_covers_the_trades_as_they_stood_again(
    rows: np.ndarray, where: list[int]
) -> None:
    test_each_version_covers_the_trades_as_they_stood.hypothesis.inner_test(rows, where)


@thorough
@given(told(), cuts, chaos)
def test_splits_rollbacks_and_restores_change_no_bit(
    rows: np.ndarray, where: list[int], acts: list[int]
) -> None:
    whole = run(rows, [])
    cut = run(rows, [each for each in where if each < len(rows)], iter(acts))
    assert repr(whole.finals) == repr(cut.finals)
    assert {n: sorted(map(repr, each.items())) for n, each in whole.rows.items()} == {
        n: sorted(map(repr, each.items())) for n, each in cut.rows.items()
    }
    assert whole.counts == cut.counts
    assert whole.digest == cut.digest


def reports(*rows: tuple[int, int, int, int, ReportKind, int]) -> np.ndarray:
    """Of one key: (at, trade, price, size, kind, original)."""
    made = np.zeros(len(rows), Told.dtype())
    for at, (time, trade, price, size, kind, original) in enumerate(rows):
        made[at] = (time, 1, trade, price, size, kind, original)
    return made


def test_a_bar_that_lost_all_its_trades_is_shown_with_none() -> None:
    state = State({"bars": RESOLVED["bars"]})
    rows = reports((1, 10, 7, 2, NEW, 0), (1, 11, 0, 0, CANCEL, 10), (30, 12, 5, 1, NEW, 0))
    shown = []
    for at in range(3):
        state.begin(1)
        changes = state.bars.add(Batch(SOURCE, rows[at : at + 1], np.arange(at, at + 1)))
        state.seal()
        shown.append([
            (version, final, close, trades)
            for width, version, final, close, trades in zip(
                changes.width, changes.version, changes.final, changes.close, changes.trades,
                strict=True,
            ) if width == 5
        ])  # fmt: skip
    assert shown == [[(1, False, 7, 1)], [(1, False, 0, 0)], [(1, True, 0, 0), (1, False, 5, 1)]]


def test_what_names_nothing_is_dead_where_that_is_declared() -> None:
    """Exactly those, and they do not move the time."""
    strict = Reports(id="trade", of="original", kind="kind", unknown="dead")
    spec = Tumbling(by="who", over="5ns", late="15ns", reports=strict, n=Count())
    state = State({"bars": spec.resolve("bars", SOURCE)})
    rows = reports(
        (1, 10, 7, 2, NEW, 0), (900, 11, 7, 2, CORRECT, 9), (2, 10, 7, 2, NEW, 0),
        (2, 12, 7, 3, CORRECT, 10), (950, 13, 7, 3, CANCEL, 77),
    )  # fmt: skip
    state.begin(len(rows))
    before = state.digest()
    with pytest.raises(BadEvents, match="no trade that it corrects") as refused:
        state.bars.add(Batch(SOURCE, rows, np.arange(100, 105)))
    assert refused.value.offsets == [101, 102, 104]
    state.rollback()
    assert state.digest() == before
    state.begin(2)
    assert state.bars.add(Batch(SOURCE, rows[[0, 3]], np.array([100, 103]))).n.tolist() == [1]


def test_a_sum_that_a_correction_overflows_names_it_and_is_undone() -> None:
    state = State({"bars": RESOLVED["bars"]})
    most = 2**63 - 1
    rows = reports((1, 1, 1, most, NEW, 0), (2, 2, 1, 0, NEW, 0), (3, 3, 1, 0, NEW, 0),
                   (2, 4, 1, 9, CORRECT, 2))  # fmt: skip
    state.begin(4)
    before = state.digest()
    with pytest.raises(BadEvents, match="no longer fits") as refused:
        state.bars.add(Batch(SOURCE, rows, np.arange(4)))
    assert refused.value.offsets == [3]
    state.rollback()
    assert state.digest() == before


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        (Reports(id="trad", of="original", kind="kind"), "'trad' is not a column of Told"),
        (Reports(id="at", of="original", kind="kind"), "id='at' is timestamp"),
        (Reports(id="trade", of="original", kind="size"), "kind='size' is no ReportKind"),
        (Reports(id="trade", of="original", kind="kind", unknown="x"), "not 'x'"),  # type: ignore[arg-type]
    ],
)
def test_what_is_wrong_with_reports_is_said(declared: Reports, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Tumbling(by="who", over="1s", reports=declared, n=Count()).resolve("Bars.bars", SOURCE)
    assert sentence in str(refused.value)
