"""Sessions against their definition in plain Python, and against pandas."""

from __future__ import annotations

import dataclasses
import math
import uuid
from typing import Any

import asyncpg
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Mapped, mapped_column

from ledgerstream import (
    Count,
    Distinct,
    Event,
    Ewm,
    Last,
    Processor,
    Rows,
    Session,
    State,
    Sum,
    Text,
    Timestamp,
    Topic,
    TopK,
    WindowTable,
)  # fmt: skip
from ledgerstream.errors import ConfigError
from ledgerstream.limits import LIMITS
from ledgerstream.stream import keyed, sessionstate, streaming
from ledgerstream.stream import verify as verify_module
from ledgerstream.stream.state import BadEvents
from ledgerstream.stream.verify import verify
from ledgerstream.stream.worker import Worker
from ledgerstream.testing import assert_splits_do_not_matter, drive
from tests.stream.cutter import Cutter
from tests.stream.memorylog import MemoryLog
from tests.stream.test_windows import KEPT as PLAIN
from tests.stream.test_windows import result
from tests.stream.windowruns import apply, assert_same, run

GAP, DELAY, LATE, HALF = 6, 4, 15, 3
NAN = float("nan")
NOTHING = (0, 0, 0, 0, 0, 0, NAN, NAN, 0, NAN)


class Click(Event):
    at: Timestamp
    who: int
    price: int
    size: int
    name: Text[10]  # type: ignore[valid-type]


SOURCE = Topic("clicks", Click, key="who")
KEPT: dict[str, Any] = {
    **PLAIN, "sizes": Distinct("size", approximate=True),
    "ewm": Ewm("price", halflife=f"{HALF}ns"),
}  # fmt: skip
COMMON: dict[str, Any] = {"gap": f"{GAP}ns", "late": f"{LATE}ns", **KEPT}
SPECS = {
    "visits": (Session(by="who", delay=f"{DELAY}ns", **COMMON), DELAY, LATE, False),
    "prompt": (Session(by="name", **COMMON), 0, LATE, False),
    "punctual": (Session(by="who", **{**COMMON, "late": "0s"}), 0, 0, False),
    "once": (Session(by="who", delay=f"{DELAY}ns", on_late="drop", **COMMON), DELAY, 0, True),
}
RESOLVED = {name: each[0].resolve(name, SOURCE) for name, each in SPECS.items()}
NAMES = np.array([b"", b"a", b"same eight", b"same eighu"])


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "_INDEX_SLOTS_MIN", 2)
    monkeypatch.setattr(sessionstate, "_HEAP_MIN", 1)


def ewm(events: list[tuple[int, int, int, int]]) -> float:
    newest = max(time for time, *_ in events)
    weights = [2.0 ** (-(newest - time) / HALF) for time, *_ in events]
    return sum(w * e[1] for w, e in zip(weights, events, strict=True)) / sum(weights)


def runs(events: list[tuple[int, int, int, int]]) -> dict[int, list[tuple[int, int, int, int]]]:
    """Sessions by start: the definition."""
    found: list[list[tuple[int, int, int, int]]] = []
    for event in sorted(events):
        if not found or event[0] - found[-1][-1][0] >= GAP:
            found.append([])
        found[-1].append(event)
    return {each[0][0]: each for each in found}


def content(events: list[tuple[int, int, int, int]]) -> tuple[Any, ...]:
    sizes = len({size for _, _, size, _ in events})
    return (events[-1][0] + GAP, *result(events), sizes, ewm(events))


def expected(
    rows: np.ndarray, by: str, delay: int, late: int, drop: bool
) -> tuple[list[Any], dict[Any, Any], int]:
    """Final versions, the sessions that are open at the end, and how many events were dropped.
    Nothing is ever forgotten here."""
    taken: dict[Any, list[tuple[int, int, int, int]]] = {}
    version: dict[tuple[Any, int], int] = {}  # of each session; the latest is final or not
    final: dict[tuple[Any, int], bool] = {}
    finals, dropped, mark = [], 0, None
    for n, row in enumerate(rows):
        time, key = int(row["at"]), row[by].item()
        mark = time - delay if mark is None else max(mark, time - delay)
        for k, events in taken.items():
            for start, inside in runs(events).items():
                if inside[-1][0] + GAP <= mark and not final[k, start]:
                    final[k, start] = True
                    finals.append((n, k, start, GAP, version[k, start], *content(inside)))
        event = (time, int(row["price"]), int(row["size"]), n)
        before = runs(taken.get(key, []))
        after = runs([*taken.get(key, []), event])
        ((start, inside),) = [each for each in after.items() if event in each[1]]
        joined = [s for s, events in before.items() if set(events) <= set(inside)]
        if time + GAP + late <= mark or (drop and any(final[key, s] for s in joined)):
            dropped += 1
            continue
        taken.setdefault(key, []).append(event)
        for s in joined:
            version[key, s] += final[key, s]
            if s != start:
                finals.append((n, key, s, GAP, version[key, s], s, *NOTHING))
        version.setdefault((key, start), 1)
        final[key, start] = inside[-1][0] + GAP <= mark
        if final[key, start]:
            finals.append((n, key, start, GAP, version[key, start], *content(inside)))
    open_now = {
        (k, start, GAP, version[k, start]): content(inside)
        for k, events in taken.items()
        for start, inside in runs(events).items()
        if not final[k, start]
    }
    return finals, open_now, dropped


def assert_close(found: list[Any], wanted: list[Any]) -> None:
    """Equal, but for the weighted means at the end, whose order of additions is another."""
    found, wanted = (sorted(each, key=repr) for each in (found, wanted))
    assert [repr(each[:-1]) for each in found] == [repr(each[:-1]) for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one[-1] == pytest.approx(other[-1], rel=1e-12, abs=1e-12, nan_ok=True)


@st.composite
def clicks(draw: st.DrawFn) -> np.ndarray:
    count = draw(st.integers(1, 50))
    rows = np.zeros(count, Click.dtype())
    now, keys = draw(st.sampled_from([-30, 0, 1_000])), draw(st.integers(0, 3))
    for n in range(count):
        now += draw(st.sampled_from([0, 0, 1, 2, 3, 5, 6, 7, 13, 40]))
        back = draw(st.sampled_from([0, 0, 0, 1, 3, 5, 6, 12, 20, 25]))
        rows[n] = (
            now - back, draw(st.integers(0, keys)), draw(st.integers(-9, 9)),
            draw(st.integers(0, 5)), b"",
        )  # fmt: skip
    rows["name"] = NAMES[rows["who"]]
    return rows


def at(*times: int) -> np.ndarray:
    """Events of one key."""
    rows = np.zeros(len(times), Click.dtype())
    rows["at"], rows["price"], rows["size"] = times, np.arange(len(times)) + 1, 1
    return rows


cuts = st.lists(st.integers(0, 50), max_size=12)
chaos = st.lists(st.integers(0, 4), min_size=20, max_size=20)
thorough = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@thorough
@given(clicks(), cuts)
@example(at(100, 110, 105), [])  # joins two
@example(at(100, 110, 105), [1, 2])
@example(at(100, 130, 105), [2])  # final, and longer now
@example(at(100, 113, 112, 106), [1, 2, 3])  # final, joined to one that is open
@example(at(100, 140, 96, 92), [1, 2, 3])  # begins earlier, and earlier again
@example(at(100, 300, 100, 287, 288), [1])  # the same start, much later
def test_each_version_is_what_the_definition_says(rows: np.ndarray, where: list[int]) -> None:
    seen = run(RESOLVED, SOURCE, rows, where)
    for name, (declared, delay, late, drop) in SPECS.items():
        finals, open_now, dropped = expected(rows, declared.by, delay, late, drop)
        assert_close(seen.finals[name], finals)
        assert_close(*([(*w, *r) for w, r in each.items()]
                       for each in (seen.open_now(name), open_now)))  # fmt: skip
        assert seen.dropped[name] == [dropped]


@thorough
@given(clicks(), cuts, chaos)
def test_splits_rollbacks_and_restores_change_no_bit(
    rows: np.ndarray, where: list[int], acts: list[int]
) -> None:
    assert_same(run(RESOLVED, SOURCE, rows, []), run(RESOLVED, SOURCE, rows, where, iter(acts)))


@pytest.mark.torture
@settings(thorough, max_examples=5_000)
@given(clicks(), cuts, chaos)
def test_each_version_is_what_the_definition_says_again(
    rows: np.ndarray, where: list[int], acts: list[int]
) -> None:
    test_each_version_is_what_the_definition_says.hypothesis.inner_test(rows, where)  # type: ignore[attr-defined]
    assert_same(run(RESOLVED, SOURCE, rows, []), run(RESOLVED, SOURCE, rows, where, iter(acts)))


def many(count: int, late_s: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    rows = np.zeros(count, Click.dtype())
    rows["at"] = 1_700_000_000 * 10**9 + np.sort(rng.integers(0, 86_400 * 10**9, count))
    rows["at"] -= rng.integers(0, late_s * 10**9, count) * (rng.random(count) < 0.2)
    rows["who"] = rng.integers(0, 60, count)
    rows["price"], rows["size"] = rng.integers(1, 10**9, count), rng.integers(1, 10**6, count)
    return rows


@pytest.mark.parametrize("delay", ["0s", "5min"])
def test_sessions_equal_pandas_whatever_the_order(delay: str) -> None:
    """No event is later than it may be, so the newest versions are the sessions of all."""
    rows = many(12_000, late_s=1_800)
    spec = Session(by="who", gap="10min", delay=delay, late="30min", **KEPT)
    seen = run({"visits": spec.resolve("v", SOURCE)}, SOURCE, rows, list(range(0, 12_000, 997)))
    assert seen.dropped["visits"] == [0]
    newest: dict[Any, Any] = {}
    for (who, start, _, version), found in sorted(seen.rows["visits"].items()):
        newest[who, start] = (version, *found)
    frame = pd.DataFrame(rows).sort_values(["who", "at"], kind="stable")
    begins = frame.groupby("who")["at"].diff().fillna(np.inf) >= 600 * 10**9
    groups = frame.groupby(begins.cumsum())
    wanted = groups.agg(
        who=("who", "first"), start=("at", "first"), last=("at", "last"), open=("price", "first"),
        high=("price", "max"), low=("price", "min"), close=("price", "last"),
        volume=("size", "sum"), trades=("size", "count"),
    )  # fmt: skip
    mine = {session: found for session, found in newest.items() if found[7] > 0}
    assert len(mine) == len(wanted) > 500
    for row in wanted.itertuples(index=False):
        found = mine[row.who, row.start]
        assert found[1:8] == (row.last + 600 * 10**9, *tuple(row)[3:])
    assert max(found[0] for found in newest.values()) > 3
    assert len(newest) > len(mine)  # some were taken in


class Visit(WindowTable):
    who: Mapped[int] = mapped_column(primary_key=True)
    end: Mapped[Timestamp]
    clicks: Mapped[int]
    mean: Mapped[float]


class Visits(Processor):
    source = SOURCE
    visits = Session(
        by="who", gap="10min", delay="1min", late="20min", clicks=Count(),
        mean=Ewm("price", halflife="1min"),
    )  # fmt: skip

    def process(self, batch: Any, state: State) -> Rows:
        return Visit.versions(state.visits.add(batch))


def test_a_processor_of_sessions_does_not_depend_on_batches_and_crashes() -> None:
    rows = many(3_000, late_s=1_500)
    assert_splits_do_not_matter(Visits, rows, rounds=10)
    visits = drive(Visits, rows).tables[Visit]
    assert (visits["version"] > 1).any() and (visits["clicks"] == 0).any()
    taken_in = visits[visits["clicks"] == 0]
    assert taken_in["final"].all() and (taken_in["end"] == taken_in["start"]).all()


@pytest.mark.parametrize("cut", ["before", "after"])
async def test_sessions_in_postgres_are_verified_after_a_cut(
    database: str, monkeypatch: pytest.MonkeyPatch, cut: Any
) -> None:
    limits = dataclasses.replace(LIMITS, step_rows_max=300)
    for module in (streaming, verify_module):
        monkeypatch.setattr(module, "LIMITS", limits)
    rows = many(3_000, late_s=1_500)
    log = MemoryLog(SOURCE, uuid.UUID(int=12))
    log.write(rows[:1_000])
    await Worker(Visits, log, database, until="end").run()
    log.write(rows[1_000:])
    async with Cutter(database, cut, at=3) as cutter:
        await Worker(Visits, log, cutter.url, until="end").run()
        assert cutter.cuts == 1
    done = await verify(Visits, log, database, splits=3)
    assert done.events == 3_000
    connection = await asyncpg.connect(database)
    found = await connection.fetch(f"SELECT {', '.join(COLUMNS)} FROM visit")
    await connection.close()
    wanted = drive(Visits, rows).columns[Visit]
    rows_of = zip(*(wanted[name.strip('"')].tolist() for name in COLUMNS), strict=True)
    assert repr(sorted(map(tuple, found))) == repr(sorted(rows_of))  # NaN too


COLUMNS = ("start", "width", "version", "who", "final", '"end"', "clicks", "mean")


def test_sessions_and_their_keys_go() -> None:
    rows = many(20_000, late_s=60)
    rows["who"] = np.arange(len(rows)) // 4  # keys that never come again
    specs = {"v": Session(by="who", gap="1min", late="1min", n=Count()).resolve("v", SOURCE)}
    state = State(specs)
    for first in range(0, len(rows), 2_000):
        state.begin(2_000)
        apply(state, specs, SOURCE, rows[first : first + 2_000], first)
        state.seal()
        state.forget()
    assert 0 < len(state.v) < 100
    assert state.v._keys.live <= len(state.v)
    assert state.v._due < 300


def test_a_sum_that_overflows_as_sessions_join_names_its_event_and_is_undone() -> None:
    rows = at(100, 110, 105)
    rows["size"] = [2**62, 2**62, 1]
    specs = {"v": Session(by="who", gap="6ns", late="1us", n=Sum("size")).resolve("v", SOURCE)}
    state = State(specs)
    before = state.digest()
    state.begin(3)
    with pytest.raises(BadEvents, match="no longer fits") as refused:
        apply(state, specs, SOURCE, rows, 50)
    assert refused.value.offsets == [52]
    state.rollback()
    assert state.digest() == before
    state.begin(2)
    assert apply(state, specs, SOURCE, rows[:2], 50)["v"].n.tolist() == [2**62, 2**62]


def test_a_time_beyond_reason_names_its_event() -> None:
    state = State(RESOLVED)
    state.begin(2)
    with pytest.raises(BadEvents, match="out of range") as refused:
        apply(state, RESOLVED, SOURCE, at(0, 2**62), 0)
    assert refused.value.offsets == [1]


def test_sessions_are_shown_as_rows_a_key() -> None:
    state = State(RESOLVED)
    state.begin(3)
    apply(state, RESOLVED, SOURCE, at(100, 103, 120), 0)
    found = state.visits.columns()
    assert found["start"].tolist() == [100, 120] and found["end"].tolist() == [109, 126]
    assert found["final"].tolist() == [True, False] and found["trades"].tolist() == [2, 1]
    assert found["width"].tolist() == [GAP, GAP] and not math.isnan(found["ewm"][0])
    assert state.visits.watermark == 116


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        (lambda: Session(by="who", gap="5s"), "say what to keep"),
        (lambda: Session(by="who", gap="0s", n=Count()), "with a gap of nothing"),
        (lambda: Session(by="who", gap="1ms", late="365d", n=Count()), "could be live at once"),
        (lambda: Session(by="who", gap="1s", on_late="keep", n=Count()), "not 'keep'"),
        (lambda: Session(by="who", gap="1s", end=Count()), "cannot be named 'end'"),
        (lambda: Session(by="who", gap="1s", n=Distinct("size")), "could not unite them"),
        (lambda: Session(by="who", gap="1s", n=TopK("size", k=1, by=Count())), "could not unite"),
        (lambda: Session(by="who", gap="1s", n=Last("siz")), "'siz' is not a column of Click"),
        (lambda: Session(by="nobody", gap="1s", n=Count()), "by='nobody' is not a column"),
        (lambda: Session(by="who", gap="soon", n=Count()), "'soon' is not a length of time"),
    ],
)
def test_what_is_wrong_with_sessions_is_said(declared: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        declared().resolve("Visits.visits", SOURCE)
    assert sentence in str(refused.value)
