"""Windows against their definition in plain Python, and against pandas."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Mapped, mapped_column

from ledgerstream import (
    Count,
    Event,
    First,
    Hopping,
    Last,
    Max,
    Mean,
    Min,
    State,
    Sum,
    Text,
    Timestamp,
    Topic,
    Tumbling,
    WindowTable,
)  # fmt: skip
from ledgerstream.errors import ConfigError
from ledgerstream.stream import keyed, windowkernels
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.pgcopy import encode
from ledgerstream.stream.state import BadEvents
from ledgerstream.stream.windowstate import Changes

DELAY, LATE = 4, 15


class Tick(Event):
    at: Timestamp
    who: int
    price: int
    size: int
    symbol: Text[10]  # type: ignore[valid-type]


KEPT: dict[str, Any] = {
    "open": First("price"), "high": Max("price"), "low": Min("price"), "close": Last("price"),
    "volume": Sum("size"), "trades": Count(), "vwap": Mean("price", weight="size"),
    "mean": Mean("price"),
}  # fmt: skip
SOURCE = Topic("ticks", Tick, key="who")
TUMBLING = (5, 20)
COMMON: dict[str, Any] = {"delay": f"{DELAY}ns", "late": f"{LATE}ns", **KEPT}
SPECS = {
    "bars": (Tumbling(by="who", over=("5ns", "20ns"), **COMMON), [(5, 5), (20, 20)], LATE),
    "text": (Tumbling(by="symbol", over=("5ns", "20ns"), **COMMON), [(5, 5), (20, 20)], LATE),
    "hops": (
        Hopping(by="who", over=("7ns", "12ns"), every="5ns", **COMMON), [(7, 5), (12, 5)], LATE,
    ),
    "once": (Tumbling(by="who", over="5ns", on_late="drop", **COMMON), [(5, 5)], 0),
}  # fmt: skip
RESOLVED = {name: each[0].resolve(name, SOURCE) for name, each in SPECS.items()}
NAMES = list(KEPT)


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "_INDEX_SLOTS_MIN", 2)


def result(events: list[tuple[int, int, int, int]]) -> tuple[Any, ...]:
    """What a window keeps of (time, price, size, offset): the definition of each aggregate."""
    prices = [price for _, price, _, _ in events]
    sizes = [size for _, _, size, _ in events]
    first = min(events, key=lambda e: (e[0], e[3]))
    last = max(events, key=lambda e: (e[0], e[3]))
    weighted = sum(price * size for _, price, size, _ in events)
    vwap = float(Fraction(weighted, sum(sizes))) if sum(sizes) else float("nan")
    return (
        first[1], max(prices), min(prices), last[1], sum(sizes), len(events), vwap,
        float(Fraction(sum(prices), len(prices))),
    )  # fmt: skip


def expected(
    rows: np.ndarray, by: str, widths: list[tuple[int, int]], late: int
) -> tuple[set[Any], dict[Any, Any], list[int]]:
    """Final versions (event, key, start, width, version, result…), the windows open at the end,
    and how many events each width dropped: the definition, word for word."""
    live: dict[tuple[Any, int, int], list[Any]] = {}
    versions: dict[tuple[Any, int, int], int] = {}
    finals, dropped, top = set(), [0] * len(widths), None
    for n, row in enumerate(rows):
        time, key = int(row["at"]), row[by].item()
        top = time if top is None else max(top, time)
        for (k, start, width), events in live.items():
            if start + width <= top - DELAY and (k, start, width) not in versions:
                versions[k, start, width] = 1
                finals.add((n, k, start, width, 1, *result(events)))
        live = {w: e for w, e in live.items() if w[1] + w[2] + late > top - DELAY}
        for number, (width, every) in enumerate(widths):
            for start in range(time // every * every, time - width, -every):
                window = (key, start, width)
                if start + width + late <= top - DELAY:
                    dropped[number] += 1
                    continue
                live.setdefault(window, []).append((time, int(row["price"]), int(row["size"]), n))
                if start + width <= top - DELAY:
                    versions[window] = versions.get(window, 0) + 1
                    finals.add((n, *window, versions[window], *result(live[window])))
    open_now = {w: result(e) for w, e in live.items() if w not in versions}
    return finals, open_now, dropped


def listed(changes: Changes, first: int) -> list[tuple[Any, ...]]:
    columns = [changes.columns[name].tolist() for name in NAMES]
    return list(
        zip(
            (changes.event + first).tolist(), changes.key.tolist(), changes.start.tolist(),
            changes.width.tolist(), changes.version.tolist(), *columns, strict=True,
        )
    )  # fmt: skip


class Seen:
    """What one run showed, by state: finals in order, the newest row of each window, dropped."""

    def __init__(self) -> None:
        self.finals: dict[str, list[Any]] = {name: [] for name in SPECS}
        self.rows: dict[str, dict[Any, Any]] = {name: {} for name in SPECS}
        self.dropped: dict[str, list[int]] = {}
        self.digest = b""
        self.kept: dict[str, dict[str, np.ndarray]] = {}

    def take(self, name: str, changes: Changes, first: int) -> None:
        assert (np.diff(changes.event) >= 0).all()
        final_new = zip(changes.final.tolist(), changes.new.tolist(), strict=True)
        for row, (final, fresh) in zip(listed(changes, first), final_new, strict=True):
            window = row[1:4]
            before = self.rows[name].get((*window, row[4]))
            assert final or (row[4] == 1 and (before is None or not before[-1]))
            assert fresh == (before is None)
            self.rows[name][(*window, row[4])] = (*row[5:], final)
            if final:
                self.finals[name].append(row)
        self.dropped[name] = changes.dropped.tolist()


def apply(state: State, rows: np.ndarray, first: int) -> dict[str, Changes]:
    batch = Batch(SOURCE, rows, np.arange(first, first + len(rows)))
    return {name: getattr(state, name).add(batch) for name in SPECS}


def run(rows: np.ndarray, cuts: list[int], chaos: Iterator[int] | None = None) -> Seen:
    """As `run` of test_state: chaos 1 and 2 undo batches, 2 and 3 restore, 4 leaves frames open."""
    state, seen = State(RESOLVED), Seen()
    for first, stop in pairwise(sorted({0, len(rows), *cuts})):
        act = next(chaos) if chaos is not None else 0
        if act in (1, 2):
            before = state.digest()
            for turn in range(act):
                wrong = rows[::-1].copy()
                wrong["at"] += 40 * turn  # time goes on, and windows with it
                state.begin(len(wrong))
                apply(state, wrong, first)
                state.seal()
            for _ in range(act):
                state.rollback()
            assert state.digest() == before
        if act in (2, 3):
            frozen, before = state.freeze(), state.digest()
            state.begin(len(rows))
            apply(state, rows[::-1].copy(), first)  # the stream goes on meanwhile
            state = State(RESOLVED)
            state.load(frozen())
            assert state.digest() == before
        state.begin(stop - first)
        for name, changes in apply(state, rows[first:stop], first).items():
            seen.take(name, changes, first)
        state.seal()
        while act != 4 and state.frames:
            state.forget()
    seen.digest, seen.kept = state.digest(), state.columns()
    return seen


@st.composite
def ticks(draw: st.DrawFn) -> np.ndarray:
    count = draw(st.integers(1, 50))
    rows = np.zeros(count, Tick.dtype())
    now = draw(st.sampled_from([-30, 0, 1_000]))
    for n in range(count):
        now += draw(st.sampled_from([0, 0, 1, 2, 5, 7, 20, 21, 80]))
        back = draw(st.sampled_from([0, 0, 0, 1, 3, 6, 12, 25, 60]))
        rows[n] = (
            now - back, draw(st.integers(0, 3)), draw(st.integers(-9, 9)), draw(st.integers(0, 5)),
            b"",
        )  # fmt: skip
    rows["symbol"] = np.array([b"", b"a", b"same eight", b"same eighu"])[rows["who"]]
    return rows


cuts = st.lists(st.integers(0, 50), max_size=12)
chaos = st.lists(st.integers(0, 4), min_size=20, max_size=20)
thorough = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def same(one: Any, other: Any) -> bool:
    """Equal, with NaN equal to itself."""
    return repr(sorted(one)) == repr(sorted(other))


@thorough
@given(ticks(), cuts)
def test_each_version_is_what_the_definition_says(rows: np.ndarray, where: list[int]) -> None:
    seen = run(rows, [each for each in where if each < len(rows)])
    for name, (declared, widths, late) in SPECS.items():
        finals, open_now, dropped = expected(rows, declared.by, widths, late)
        assert same(seen.finals[name], finals)
        assert same(
            [(w[:3], r[:-1]) for w, r in seen.rows[name].items() if not r[-1]],
            list(open_now.items()),
        )
        assert seen.dropped[name] == dropped


@thorough
@given(ticks(), cuts, chaos)
def test_splits_rollbacks_and_restores_change_no_bit(
    rows: np.ndarray, where: list[int], acts: list[int]
) -> None:
    whole = run(rows, [])
    cut = run(rows, [each for each in where if each < len(rows)], iter(acts))
    assert repr(whole.finals) == repr(cut.finals)  # in order too
    assert {n: sorted(map(repr, each.items())) for n, each in whole.rows.items()} == {
        n: sorted(map(repr, each.items())) for n, each in cut.rows.items()
    }
    assert whole.dropped == cut.dropped
    assert whole.digest == cut.digest
    for name, kept in whole.kept.items():
        order, other = (np.lexsort((k["start"], k["width"], k[SPECS[name][0].by]))
                        for k in (kept, cut.kept[name]))  # fmt: skip
        for column, values in kept.items():
            np.testing.assert_array_equal(values[order], cut.kept[name][column][other])


def test_bars_equal_pandas() -> None:
    rng = np.random.default_rng(11)
    rows = np.zeros(30_000, Tick.dtype())
    rows["at"] = 1_700_000_000 * 10**9 + np.sort(rng.integers(0, 900 * 10**9, len(rows)))
    rows["who"] = rng.integers(0, 20, len(rows))
    rows["symbol"] = np.char.add(b"SYMBOL", rows["who"].astype("S2"))
    rows["price"], rows["size"] = rng.integers(1, 10**9, len(rows)), rng.integers(1, 10**6, 30_000)
    over = ("1s", "1min", "5min")
    spec = Tumbling(by="symbol", over=over, delay="2s", late="1min", **KEPT)
    state, found = State({"bars": spec.resolve("bars", SOURCE)}), []
    for first in range(0, len(rows), 7_777):
        part = rows[first : first + 7_777]
        state.begin(len(part))
        changes = state.bars.add(Batch(SOURCE, part, np.arange(len(part)) + first))
        state.seal()
        state.forget()
        own = {name: getattr(changes, name) for name in ("start", "width", "final")}
        found.append(pd.DataFrame({**own, **changes.columns}))
    bars = pd.concat(found).drop_duplicates(["symbol", "start", "width"], keep="last")
    assert set(changes.dropped) == {0}
    assert len(state.bars) < 20 * (65 + 4 + 3)  # what may be corrected, and no more
    for each in over:
        width = pd.Timedelta(each).value
        frame = pd.DataFrame(rows).assign(start=rows["at"] // width * width)
        frame["value"] = frame["price"].astype(object) * frame["size"]
        by = frame.groupby(["symbol", "start"])
        wanted = by.agg(
            open=("price", "first"), high=("price", "max"), low=("price", "min"),
            close=("price", "last"), volume=("size", "sum"), trades=("size", "count"),
        )  # fmt: skip
        value = by["value"].sum()
        wanted["vwap"] = [
            float(Fraction(v, s)) for v, s in zip(value, wanted["volume"], strict=True)
        ]
        mine = bars[bars["width"] == width].set_index(["symbol", "start"]).sort_index()
        pd.testing.assert_frame_equal(mine[wanted.columns], wanted, check_dtype=False)


@thorough
@given(
    st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))),
    st.integers(-(2**63), 2**63 - 1),
)
@example([(-(2**63), -(2**63))], 1)
@example([(-(2**63), 2**63 - 1)], -(2**63))
@example([(2**62, 2**62)], 2**63 - 1)
@example([(2**53 + 1, 1)], 1)
@example([(1, 1)], 3)
@example([(2**62, 2**62), (2**62, 2**62 - 1), (1, 1)], 2**62 - 1)
def test_products_and_means_are_exact(pairs: list[tuple[int, int]], weight: int) -> None:
    total = 0
    for a, b in pairs:
        high, low = windowkernels.multiply(a, b)
        assert int(high) * 2**64 + int(low) == a * b
        total += a * b
    total = max(min(total, 2**127 - 1), -(2**127))
    low, high = total % 2**64, total >> 64
    found = windowkernels.quotient(np.uint64(low), high, weight)
    assert repr(found) == repr(float(Fraction(total, weight)) if weight else float("nan"))


def test_a_sum_that_overflows_names_its_event_and_is_undone() -> None:
    rows = np.zeros(3, Tick.dtype())
    rows["size"], rows["who"] = [2**63 - 1, 5, 1], [1, 2, 1]
    rows["symbol"] = [b"one", b"two", b"one"]
    state = State(RESOLVED)
    before = state.digest()
    state.begin(3)
    with pytest.raises(BadEvents, match="no longer fits") as refused:
        apply(state, rows, 100)
    assert refused.value.offsets == [102]
    state.rollback()
    assert state.digest() == before
    state.begin(2)
    assert apply(state, rows[:2], 100)["bars"].volume.tolist() == [2**63 - 1] * 2 + [5, 5]


def test_a_time_beyond_reason_names_its_event() -> None:
    rows = np.zeros(2, Tick.dtype())
    rows["at"] = [0, 2**62]
    state = State(RESOLVED)
    state.begin(2)
    with pytest.raises(BadEvents, match="out of range") as refused:
        apply(state, rows, 0)
    assert refused.value.offsets == [1]


class TickBar(WindowTable):
    symbol: Mapped[str] = mapped_column(primary_key=True)
    open: Mapped[int]
    vwap: Mapped[float]
    desk: Mapped[int]


class Keyless(WindowTable):
    open: Mapped[int]


def test_a_table_of_windows_takes_their_versions() -> None:
    assert TickBar.key_columns() == ("start", "width", "version", "symbol")
    rows = np.zeros(3, Tick.dtype())
    rows["at"], rows["symbol"], rows["size"] = [0, 1, 30], [b"a", b"b", b"a"], 1
    state = State(RESOLVED)
    state.begin(3)
    batch = Batch(SOURCE, rows, np.arange(3))
    changes = state.text.add(batch)
    made = TickBar.versions(changes, desk=4)
    assert made.event.tolist() == [2, 2, 2, 2, 2, 2]
    assert made.columns["final"].tolist() == [True] * 4 + [False] * 2
    assert made.columns["width"].tolist() == [5, 5, 20, 20, 5, 20]
    assert encode([made], batch, 1, 0)[1] == 6
    with pytest.raises(ConfigError, match="desk is not given"):
        TickBar.versions(changes)
    with pytest.raises(ConfigError, match="no column 'dsk'"):
        TickBar.versions(changes, desk=4, dsk=1)
    with pytest.raises(ConfigError, match="does not have 'symbol' in its key"):
        Keyless.versions(changes)
    with pytest.raises(AttributeError, match="no column 'opn'; symbol, open, high"):
        _ = changes.opn


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        (lambda: Tumbling(by="who", over="5s"), "say what to keep"),
        (lambda: Tumbling(by="who", over="0s", n=Count()), "a window of no length"),
        (lambda: Tumbling(by="who", over=(), n=Count()), "at least one window"),
        (lambda: Tumbling(by="who", over=("60s", "1min"), n=Count()), "names a length twice"),
        (lambda: Hopping(by="who", over="1s", every="2s", n=Count()), "would be in none"),
        (lambda: Tumbling(by="who", over="1s", late="365d", n=Count()), "would be live at once"),
        (lambda: Tumbling(by="who", over="1s", key=Count()), "cannot be named 'key'"),
        (lambda: Tumbling(by="who", over="1s", n=Sum("siz")), "'siz' is not a column of Tick"),
        (lambda: Tumbling(by="who", over="1s", n=Sum("symbol")), "'symbol' is text"),
        (lambda: Tumbling(by="who", over="1s", n=3), "is 3"),
        (lambda: Tumbling(by="who", over="1s", on_late="keep", n=Count()), "not 'keep'"),
    ],
)
def test_what_is_wrong_with_windows_is_said(declared: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        declared().resolve("Bars.bars", SOURCE)
    assert sentence in str(refused.value)
