"""Keys that expire: decided by events, so no split, rollback or restore changes a bit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Mapped

from ledgerstream.errors import ConfigError
from ledgerstream.events import Event, Text, Timestamp
from ledgerstream.stream import keyed
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.machine import Input, Machine
from ledgerstream.stream.processor import Keyed, Processor, Sliding, State, Topic
from ledgerstream.stream.tables import Rows, Table

EXPIRE, QUANTUM = 160, 10


class Visit(Event):
    at: Timestamp
    who: int
    name: Text[9]  # type: ignore[valid-type]


class Seen(Table):
    number: Mapped[int]
    by_name: Mapped[int]


class Visits(Processor):
    source = Topic("visits", Visit, key="who")
    seen = Keyed(by="who", expire=f"{EXPIRE}ns", visits=int)
    names = Keyed(by="name", expire=f"{EXPIRE}ns", visits=int)
    ever = Keyed(by="who", visits=int)
    hour = Sliding(by="who", over="50ns")

    def process(self, batch: Batch, state: State) -> Rows:
        state.hour.add(batch)
        state.ever.at(batch.who)
        counts = []
        for held in (state.seen.at(batch.who), state.names.at(batch["name"])):
            count = np.empty(len(batch), np.int64)
            for i, row in enumerate(held.row):
                held.visits[row] += 1
                count[i] = held.visits[row]
            counts.append(count)
        return Seen.rows(batch, number=counts[0], by_name=counts[1])


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "_INDEX_SLOTS_MIN", 2)


@st.composite
def visits(draw: st.DrawFn) -> np.ndarray:
    rows = np.zeros(draw(st.integers(1, 50)), Visit.dtype())
    now = draw(st.sampled_from([-300, 0, 1_000]))
    for n in range(len(rows)):
        now += draw(st.sampled_from([0, 1, 9, 10, 30, 100, 160, 171, 400]))
        who = draw(st.integers(0, 4))
        rows[n] = now - draw(st.sampled_from([0, 0, 5, 200])), who, b"visitor %d" % who
    return rows


def expected(rows: np.ndarray) -> tuple[list[int], set[int]]:
    """How often each visitor was seen, and who is remembered in the end: the definition."""
    known: dict[int, tuple[int, int]] = {}  # who: visits, the quantum of the last
    numbers, top = [], None
    for at, who, _ in rows.tolist():
        top = at if top is None else max(top, at)
        now = top // QUANTUM
        known = {w: each for w, each in known.items() if now - each[1] <= EXPIRE // QUANTUM}
        known[who] = (known.get(who, (0, 0))[0] + 1, now)
        numbers.append(known[who][0])
    return numbers, set(known)


def run(
    rows: np.ndarray, cuts: list[int], chaos: Iterator[int] | None = None
) -> tuple[bytes, Machine]:
    """The COPY bytes of all rows; chaos 1 undoes a batch first, 2 restores from a dump."""
    machine, copied = Machine(Visits(), 0, 1), b""
    for start, stop in pairwise(sorted({0, len(rows), *cuts})):
        act = next(chaos) if chaos is not None else 0
        given = Input(
            0, start, stop, Batch(Visits.source, rows[start:stop], np.arange(start, stop))
        )
        if act == 1:
            before = machine.state.digest()
            late = rows[::-1].copy()
            late["at"] += 500
            machine.step(
                Input(0, start, start + len(rows), Batch(Visits.source, late, np.arange(len(late))))
            )
            machine.rollback()
            assert machine.state.digest() == before
        if act == 2:
            dump, before = machine.state.dump(), machine.state.digest()
            machine = Machine(Visits(), 0, 1)
            machine.state.load(dump)
            assert machine.state.digest() == before
        piece = machine.step(given)
        copied += b"".join(piece.copies[Seen][0])
        machine.forget()
    return copied, machine


def numbers(copied: bytes, field: int) -> list[int]:
    """One eight-byte field of each row of `Seen`, whose rows have one size."""
    size = 2 + 4 * 6 + 8 * 3 + 4 * 2 + 2
    at = 2 + 12 * field + 4
    words = np.frombuffer(copied, np.uint8).reshape(-1, size)[:, at : at + 8]
    found: list[int] = np.ascontiguousarray(words).view(">i8")[:, 0].tolist()
    return found


thorough = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@thorough
@given(
    visits(), st.lists(st.integers(0, 50), max_size=10), st.lists(st.integers(0, 2), min_size=12)
)
def test_keys_live_for_their_time_whatever_the_splits(
    rows: np.ndarray, cuts: list[int], chaos: list[int]
) -> None:
    wanted, remembered = expected(rows)
    whole, machine = run(rows, [])
    assert numbers(whole, 0) == numbers(whole, 1) == wanted
    assert set(machine.state.seen.columns()["who"].tolist()) == remembered
    cut, other = run(rows, [each for each in cuts if each < len(rows)], iter(chaos))
    assert cut == whole
    assert other.state.digest() == machine.state.digest()


def test_rows_of_keys_that_expired_are_used_again() -> None:
    rows = np.zeros(1_000, Visit.dtype())
    rows["at"], rows["who"] = np.arange(len(rows)) * 10, np.arange(len(rows))
    _, machine = run(rows, list(range(0, len(rows), 10)))
    assert len(machine.state.seen) == 17
    assert len(machine.state.ever) == len(rows)
    assert machine.state.seen._rows.count <= 60


def test_a_time_beyond_reason_is_a_dead_letter() -> None:
    rows = np.zeros(3, Visit.dtype())
    rows["at"] = [0, 2**62, 5]
    piece = Machine(Visits(), 0, 1).step(Input(0, 0, 3, Batch(Visits.source, rows, np.arange(3))))
    assert [letter.offset for letter in piece.dead] == [1]
    assert numbers(b"".join(piece.copies[Seen][0]), 0) == [1, 2]


def test_what_is_wrong_with_an_expiry_is_said() -> None:
    class Timeless(Event):
        who: int

    with pytest.raises(ConfigError, match="at once is never kept"):
        Keyed(by="who", expire="0s", n=int).resolve("Visits.seen", Visits.source)
    with pytest.raises(ConfigError, match="as expiry does, and Timeless has no Timestamp"):
        Keyed(by="who", expire="1d", n=int).resolve(
            "Visits.seen", Topic("timeless", Timeless, key="who")
        )
