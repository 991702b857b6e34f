"""Columns of windows that know their values, or forget them slowly: against ten lines of plain
Python, and against pandas."""

from __future__ import annotations

import dataclasses
import uuid
from collections import Counter
from typing import Any

import asyncpg
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Mapped, mapped_column

from ledgerstream import (
    Count,
    Distinct,
    Event,
    Ewm,
    Hopping,
    Processor,
    ReportKind,
    Reports,
    Rows,
    State,
    Sum,
    Text,
    Timestamp,
    Topic,
    TopK,
    Tumbling,
    WindowTable,
)  # fmt: skip
from ledgerstream.errors import ConfigError
from ledgerstream.limits import LIMITS
from ledgerstream.stream import keyed, streaming
from ledgerstream.stream import verify as verify_module
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.decay import decay
from ledgerstream.stream.sketch import STANDARD_ERROR
from ledgerstream.stream.state import BadEvents
from ledgerstream.stream.verify import verify
from ledgerstream.stream.worker import Worker
from ledgerstream.testing import assert_splits_do_not_matter, drive
from tests.stream.cutter import Cutter
from tests.stream.memorylog import MemoryLog
from tests.stream.windowruns import Seen, apply, assert_same, run

DELAY, LATE, HALF = 4, 15, 6


class Visit(Event):
    at: Timestamp
    who: int
    place: int
    amount: int
    price: float
    shop: Text[11]  # type: ignore[valid-type]
    kind: ReportKind = ReportKind.NEW


SOURCE = Topic("visits-by-window", Visit, key="who")
KEPT: dict[str, Any] = {
    "places": Distinct("place"), "shops": Distinct("shop"),
    "about": Distinct("shop", approximate=True),
    "most": TopK("place", k=2, by=Count()), "best": TopK("shop", k=3, by=Sum("amount")),
    "one": TopK("place", k=1, by=Sum("amount")), "mean": Ewm("price", halflife=f"{HALF}ns"),
    "total": Sum("amount"),
}  # fmt: skip
COMMON: dict[str, Any] = {"delay": f"{DELAY}ns", "late": f"{LATE}ns", **KEPT}
SPECS = {
    "bars": (Tumbling(by="who", over=("5ns", "20ns"), **COMMON), [(5, 5), (20, 20)], LATE),
    "hops": (Hopping(by="shop", over="12ns", every="5ns", **COMMON), [(12, 5)], LATE),
    "once": (Tumbling(by="who", over="5ns", on_late="drop", **COMMON), [(5, 5)], 0),
}  # fmt: skip
RESOLVED = {name: each[0].resolve(name, SOURCE) for name, each in SPECS.items()}
SHOPS = np.array([b"", b"a", b"b", b"the same ej", b"the same ek"])


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "_INDEX_SLOTS_MIN", 2)


def top(k: int, totals: dict[Any, int], nothing: Any) -> tuple[list[Any], list[int]]:
    greatest = sorted(totals.items(), key=lambda each: (-each[1], each[0]))[:k]
    greatest += [(nothing, 0)] * (k - len(greatest))
    return [value for value, _ in greatest], [total for _, total in greatest]


def totals(rows: list[Any], column: str) -> dict[Any, int]:
    found: Counter[Any] = Counter()
    for row in rows:
        found[row[column].item()] += int(row["amount"])
    return found


def result(rows: list[Any]) -> tuple[Any, ...]:
    """What a window keeps of its events, in the order of offsets: the definition of each column."""
    places, shops = ({row[name].item() for row in rows} for name in ("place", "shop"))
    most = top(2, Counter(row["place"].item() for row in rows), 0)
    best, one = top(3, totals(rows, "shop"), b""), top(1, totals(rows, "place"), 0)
    newest = max(int(row["at"]) for row in rows)
    weights = [2.0 ** (-(newest - int(row["at"])) / HALF) for row in rows]
    mean = sum(w * row["price"] for w, row in zip(weights, rows, strict=True)) / sum(weights)
    return (
        len(places), len(shops), len(shops), *most[0], *most[1], *best[0], *best[1], *one[0],
        *one[1], mean, sum(int(row["amount"]) for row in rows),
    )  # fmt: skip


def expected(
    rows: np.ndarray, by: str, widths: list[tuple[int, int]], late: int
) -> tuple[list[Any], dict[Any, Any]]:
    """Final versions and the windows that are open at the end, as in `test_windows`."""
    live: dict[tuple[Any, int, int], list[Any]] = {}
    versions: dict[tuple[Any, int, int], int] = {}
    finals, mark = [], None
    for n, row in enumerate(rows):
        time, key = int(row["at"]), row[by].item()
        mark = time - DELAY if mark is None else max(mark, time - DELAY)
        for window, events in live.items():
            if window[1] + window[2] <= mark and window not in versions:
                versions[window] = 1
                finals.append((n, *window, 1, *result(events)))
        live = {w: e for w, e in live.items() if w[1] + w[2] + late > mark}
        for width, every in widths:
            for start in range(time // every * every, time - width, -every):
                window = (key, start, width)
                if start + width + late <= mark:
                    continue
                live.setdefault(window, []).append(row)
                if start + width <= mark:
                    versions[window] = versions.get(window, 0) + 1
                    finals.append((n, *window, versions[window], *result(live[window])))
    return finals, {(*w, 1): result(e) for w, e in live.items() if w not in versions}


def assert_close(found: list[Any], wanted: list[Any]) -> None:
    """Equal, but for means, whose order of additions is another."""
    found, wanted = sorted(found), sorted(wanted)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        at = len(one) - 2
        assert (*one[:at], one[-1]) == (*other[:at], other[-1])
        assert one[at] == pytest.approx(other[at], rel=1e-13, abs=1e-13)


@st.composite
def visits(draw: st.DrawFn) -> np.ndarray:
    count = draw(st.integers(1, 50))
    rows = np.zeros(count, Visit.dtype())
    now, places = draw(st.sampled_from([-30, 0, 1_000])), draw(st.integers(1, 6))
    for n in range(count):
        now += draw(st.sampled_from([0, 0, 0, 1, 2, 5, 20, 80]))
        back = draw(st.sampled_from([0, 0, 0, 1, 3, 6, 12, 25, 60]))
        rows[n] = (
            now - back, draw(st.integers(0, 2)), draw(st.integers(-places, places)),
            draw(st.integers(-4, 5)), draw(st.floats(-9, 9)), draw(st.sampled_from(SHOPS)), 0,
        )  # fmt: skip
    return rows


cuts = st.lists(st.integers(0, 50), max_size=12)
chaos = st.lists(st.integers(0, 4), min_size=20, max_size=20)
thorough = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def seen_of(rows: np.ndarray, where: list[int], acts: Any = None) -> Seen:
    return run(RESOLVED, SOURCE, rows, where, acts)


@thorough
@given(visits(), cuts)
def test_each_version_is_what_the_definition_says(rows: np.ndarray, where: list[int]) -> None:
    seen = seen_of(rows, where)
    for name, (declared, widths, late) in SPECS.items():
        finals, open_now = expected(rows, declared.by, widths, late)
        assert_close(seen.finals[name], finals)
        assert_close(*([(*w, *r) for w, r in each.items()]
                       for each in (seen.open_now(name), open_now)))  # fmt: skip


@thorough
@given(visits(), cuts, chaos)
def test_splits_rollbacks_and_restores_change_no_bit(
    rows: np.ndarray, where: list[int], acts: list[int]
) -> None:
    assert_same(seen_of(rows, []), seen_of(rows, where, iter(acts)))


@pytest.mark.torture
@settings(thorough, max_examples=3_000)
@given(visits(), cuts, chaos)
def test_each_version_is_what_the_definition_says_again(
    rows: np.ndarray, where: list[int], acts: list[int]
) -> None:
    test_each_version_is_what_the_definition_says.hypothesis.inner_test(rows, where)  # type: ignore[attr-defined]
    assert_same(seen_of(rows, []), seen_of(rows, where, iter(acts)))


def many(count: int, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, Visit.dtype())
    rows["at"] = 1_700_000_000 * 10**9 + np.sort(rng.integers(0, 3_600 * 10**9, count))
    rows["who"], rows["place"] = rng.integers(0, 5, count), rng.zipf(1.3, count) % 4_000
    rows["amount"], rows["price"] = rng.integers(-50, 200, count), rng.normal(100, 3, count)
    rows["shop"] = np.char.add(b"shop ", (rows["place"] % 300).astype("S4"))
    return rows


def pandas_ewm(group: pd.DataFrame, halflife: str) -> float:
    """Of times from the first one on: pandas has them as floats, which hold no ns since 1970."""
    times = pd.to_datetime(group["at"] - group["at"].iloc[0])
    return float(group["price"].ewm(halflife=halflife, times=times).mean().iloc[-1])


def test_columns_equal_pandas() -> None:
    rows = many(20_000)
    spec = Tumbling(
        by="who", over="10min", places=Distinct("place"), mean=Ewm("price", halflife="90s"),
        most=TopK("shop", k=4, by=Count()), best=TopK("place", k=4, by=Sum("amount")),
    ).resolve("bars", SOURCE)  # fmt: skip
    seen = run({"bars": spec}, SOURCE, rows, list(range(0, len(rows), 777)))
    frame = pd.DataFrame(rows).assign(start=rows["at"] // (600 * 10**9) * 600 * 10**9)
    groups = list(frame.groupby(["who", "start"]))
    found = seen.rows["bars"]
    assert len(found) == len(groups) > 30
    for (who, start), group in groups:
        row = found[who, start, 600 * 10**9, 1]
        assert row[0] == group["place"].nunique()
        assert row[1] == pytest.approx(pandas_ewm(group, "90s"), rel=1e-12)
        for at, counts in (
            (2, group["shop"].value_counts()),
            (10, group.groupby("place")["amount"].sum()),
        ):
            greatest = counts.sort_index().nlargest(4, keep="first")
            assert row[at : at + 4] == tuple(greatest.index)
            assert row[at + 4 : at + 8] == tuple(greatest)


def test_late_events_weigh_by_their_age_as_in_pandas() -> None:
    rows = many(2_000)
    rows["at"] += np.random.default_rng(1).integers(-20, 20, len(rows)) * 10**9
    spec = Tumbling(
        by="who", over="2h", late="1h", mean=Ewm("price", halflife="5m")
    ).resolve("bars", SOURCE)  # fmt: skip
    seen = run({"bars": spec}, SOURCE, rows, [1_000])
    frame = pd.DataFrame(rows).sort_values("at", kind="stable")
    for (who, _, _, _), (mean, _) in seen.rows["bars"].items():
        group = frame[frame["who"] == who]
        assert mean == pytest.approx(pandas_ewm(group, "5m"), rel=1e-12)


@pytest.mark.parametrize("count", [10, 1_000, 50_000])
def test_an_approximate_count_is_within_its_standard_error(count: int) -> None:
    errors = []
    for seed in range(20):
        rows = np.zeros(count, Visit.dtype())
        rows["place"] = np.random.default_rng(seed).integers(0, 2 * count, count)
        spec = Tumbling(by="who", over="1s", n=Distinct("place", approximate=True))
        seen = run({"bars": spec.resolve("bars", SOURCE)}, SOURCE, rows, [])
        ((about, _),) = seen.rows["bars"].values()
        errors.append(about / pd.Series(rows["place"]).nunique() - 1)
    assert np.sqrt(np.mean(np.square(errors))) < 1.5 * STANDARD_ERROR  # 20 runs: ±1/√40
    assert abs(np.mean(errors)) < STANDARD_ERROR


@given(st.integers(0, 2**62), st.integers(1, 2**62))
def test_a_decay_is_a_power_of_two(age: int, halflife: int) -> None:
    whole, part = divmod(age, halflife)
    wanted = 2.0 ** (-part / halflife) * 2.0**-whole if whole < 1_000 else 0.0
    assert decay(age, halflife) == pytest.approx(wanted, rel=5e-16, abs=1e-300)


@given(st.integers(0, 2**62), st.integers(1, 2**62))
def test_a_decay_has_the_bits_of_plain_python(age: int, halflife: int) -> None:
    """Nothing was contracted or reordered when it was compiled."""
    assert decay(age, halflife) == decay.py_func(age, halflife)  # type: ignore[attr-defined]


def test_decays_are_what_they_always_were() -> None:
    """They are stored in means: other bits would be another state."""
    found = [decay(age, 7_919).hex() for age in (1, 3_960, 7_919, 50_000)]
    assert found == [
        "0x1.fff4871f1066fp-1",
        "0x1.6a05d80a392bap-1",
        "0x1.0000000000000p-1",
        "0x1.9be0a338a1d30p-7",
    ]


def test_values_go_with_their_windows() -> None:
    rows = many(30_000)
    spec = Tumbling(by="who", over="1min", late="10s", n=Distinct("place")).resolve("n", SOURCE)
    state = State({"n": spec})
    for first in range(0, len(rows), 5_000):
        state.begin(5_000)
        apply(state, {"n": spec}, SOURCE, rows[first : first + 5_000], first)
        state.seal()
        state.forget()
    assert len(state.n) <= 10
    inside = rows[rows["at"] >= rows["at"].max() // (60 * 10**9) * 60 * 10**9 - 60 * 10**9]
    assert 0 < len(state.n.dump()["values"]) <= len(inside)


def crowd(limit: int, kept: Any) -> tuple[State, np.ndarray, dict[str, Any]]:
    rows = np.zeros(limit + 3, Visit.dtype())
    rows["place"][:limit] = np.arange(limit)
    rows["place"][limit:] = [0, limit, 1]
    specs = {"n": Tumbling(by="who", over="1s", n=kept).resolve("n", SOURCE)}
    return State(specs), rows, specs


@pytest.mark.parametrize(
    "kept", [Distinct("place", limit=9), TopK("place", k=1, by=Count(), limit=9)]
)
def test_one_value_too_many_is_refused_and_undone(kept: Any) -> None:
    state, rows, specs = crowd(9, kept)
    before = state.digest()
    state.begin(len(rows))
    with pytest.raises(BadEvents, match="as many different values as it may have") as refused:
        apply(state, specs, SOURCE, rows, 100)
    assert refused.value.offsets == [110]
    state.rollback()
    assert state.digest() == before
    state.begin(11)
    apply(state, specs, SOURCE, np.delete(rows, 10), 100)


def test_a_total_that_overflows_names_its_event() -> None:
    rows = np.zeros(3, Visit.dtype())
    rows["amount"], rows["place"] = [2**63 - 1, 5, 1], [1, 2, 1]
    specs = {"n": Tumbling(by="who", over="1s", n=TopK("place", k=1, by=Sum("amount"))).resolve(
        "n", SOURCE)}  # fmt: skip
    state = State(specs)
    state.begin(3)
    with pytest.raises(BadEvents, match="no longer fits") as refused:
        apply(state, specs, SOURCE, rows, 0)
    assert refused.value.offsets == [2]


def test_what_is_not_finite_is_refused() -> None:
    rows = np.zeros(4, Visit.dtype())
    rows["price"] = [1, np.nan, 1e308, -np.inf]
    state = State(RESOLVED)
    state.begin(4)
    with pytest.raises(BadEvents, match="'price' is not a finite number") as refused:
        state.bars.add(Batch(SOURCE, rows, np.arange(4)))
    assert refused.value.offsets == [1, 3]
    state.rollback()
    rows["price"] = 1.7e308
    state.begin(4)
    with pytest.raises(BadEvents, match="no longer fits") as refused:
        state.bars.add(Batch(SOURCE, rows, np.arange(4)))
    assert refused.value.offsets == [1]


class VisitBar(WindowTable):
    who: Mapped[int] = mapped_column(primary_key=True)
    places: Mapped[int]
    about: Mapped[int]
    best_1: Mapped[str]
    best_2: Mapped[str]
    best_1_total: Mapped[int]
    best_2_total: Mapped[int]
    mean: Mapped[float]


class Visits(Processor):
    source = SOURCE
    bars = Tumbling(
        by="who", over="1min", delay="2s", late="2min", mean=Ewm("price", halflife="5s"),
        places=Distinct("place", limit=6), about=Distinct("shop", approximate=True),
        best=TopK("shop", k=2, by=Sum("amount")),
    )  # fmt: skip

    def process(self, batch: Batch, state: State) -> Rows:
        return VisitBar.versions(state.bars.add(batch))


def test_a_processor_of_them_does_not_depend_on_batches_and_crashes() -> None:
    rows = many(1_500)
    rows["at"] += np.random.default_rng(1).integers(-90, 1, len(rows)) * 10**9
    rows["place"] %= 40  # too many for some windows
    assert_splits_do_not_matter(Visits, rows, rounds=8)
    driven = drive(Visits, rows)
    assert 0 < len(driven.dead) < 500
    assert driven.tables[VisitBar]["places"].max() == 6


async def test_columns_in_postgres_are_verified_after_a_cut_and_dead_letters(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = dataclasses.replace(LIMITS, step_rows_max=300)
    for module in (streaming, verify_module):
        monkeypatch.setattr(module, "LIMITS", limits)
    rows = many(3_000)
    rows["at"] += np.random.default_rng(1).integers(-90, 1, len(rows)) * 10**9
    log = MemoryLog(SOURCE, uuid.UUID(int=12))
    log.write(rows[:1_000])
    await Worker(Visits, log, database, until="end").run()
    log.write(rows[1_000:])
    async with Cutter(database, "after", at=3) as cutter:
        await Worker(Visits, log, cutter.url, until="end").run()
        assert cutter.cuts == 1
    await verify(Visits, log, database, splits=3)
    driven = drive(Visits, rows)
    connection = await asyncpg.connect(database)
    found = await connection.fetch(f"SELECT {', '.join(COLUMNS)} FROM visit_bar WHERE final")
    dead = await connection.fetch('SELECT "offset" FROM ls_dead_letters ORDER BY 1')
    await connection.close()
    assert [each[0] for each in dead] == driven.dead["offset"].tolist() != []
    wanted = driven.columns[VisitBar]
    final = zip(*(wanted[name][wanted["final"]].tolist() for name in COLUMNS), strict=True)
    assert sorted(map(tuple, found)) == sorted(
        tuple(each.decode() if isinstance(each, bytes) else each for each in row) for row in final
    )


COLUMNS = ("start", "version", "who", *(name for name in VisitBar.result_columns()
           if name not in ("start", "width", "version", "final", "who")))  # fmt: skip

REPORTS = Reports(id="place", of="amount", kind="kind")


@pytest.mark.parametrize(
    ("kept", "sentence"),
    [
        (lambda: Distinct("price"), "'price' is float"),
        (lambda: Ewm("shop", halflife="1s"), "'shop' is text"),
        (lambda: Ewm("price", halflife="0s"), "a half-life of nothing"),
        (lambda: Ewm("price", halflife="soon"), "'soon' is not a length of time"),
        (lambda: Distinct("place", limit=0), "limit=0 is not between 1 and"),
        (lambda: Distinct("place", limit=5, approximate=True), "what is approximate has no limit"),
        (lambda: TopK("place", k=0, by=Count()), "k=0 is not between 1 and 100"),
        (lambda: TopK("place", k=2, by=Ewm("price", halflife="1s")), "TopK goes by Count()"),
        (lambda: TopK("place", k=2, by="amount"), "TopK goes by Count()"),  # type: ignore[arg-type]
        (lambda: TopK("place", k=2, by=Sum("price")), "'price' is float"),
        (lambda: TopK("nowhere", k=2, by=Count()), "'nowhere' is not a column of Visit"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_column_is_said(kept: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Tumbling(by="who", over="1s", n=kept()).resolve("Bars.bars", SOURCE)
    assert sentence in str(refused.value)


def test_names_that_collide_and_reports_are_refused() -> None:
    n = TopK("place", k=2, by=Count())
    with pytest.raises(ConfigError, match="two columns are called 'n_1'"):
        Tumbling(by="who", over="1s", n=n, n_1=Count()).resolve("Bars.bars", SOURCE)
    with pytest.raises(ConfigError, match="cannot take an event back"):
        Tumbling(by="who", over="1s", n=n, reports=REPORTS).resolve("Bars.bars", SOURCE)
