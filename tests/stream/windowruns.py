"""Windows driven over events cut at will, with rollbacks and restores, and what they showed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from ledgerstream import State, Topic
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.state import Spec
from ledgerstream.stream.windowstate import Changes


class Seen:
    """What one run showed, by state.

    finals:  (event, key, start, width, version, columns…), in order.
    rows:    (key, start, width, version) → (columns…, final): the newest row of each version.
    """

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self.finals: dict[str, list[Any]] = {name: [] for name in specs}
        self.rows: dict[str, dict[Any, Any]] = {name: {} for name in specs}
        self.dropped: dict[str, list[int]] = {}
        self.kept: dict[str, int] = {}
        self.digest = b""

    def take(self, name: str, changes: Changes, first: int) -> None:
        assert (np.diff(changes.event) >= 0).all()
        names = [each for each in changes.columns if each != changes.by]
        listed = zip(
            (changes.event + first).tolist(), changes.key.tolist(), changes.start.tolist(),
            changes.width.tolist(), changes.version.tolist(),
            *(changes.columns[each].tolist() for each in names), strict=True,
        )  # fmt: skip
        flags = zip(changes.final.tolist(), changes.new.tolist(), strict=True)
        for row, (final, fresh) in zip(listed, flags, strict=True):
            before = self.rows[name].get(row[1:5])
            assert before is None or not before[-1], row  # a final version stays
            assert fresh == (before is None), row
            self.rows[name][row[1:5]] = (*row[5:], final)
            if final:
                self.finals[name].append(row)
        self.dropped[name] = changes.dropped.tolist()

    def open_now(self, name: str) -> dict[Any, Any]:
        return {row: found[:-1] for row, found in self.rows[name].items() if not found[-1]}


def apply(
    state: State, specs: Mapping[str, Spec], source: Topic, rows: np.ndarray, first: int
) -> dict[str, Changes]:
    batch = Batch(source, rows, np.arange(first, first + len(rows)))
    return {name: getattr(state, name).add(batch) for name in specs}


def run(
    specs: Mapping[str, Spec],
    source: Topic,
    rows: np.ndarray,
    cuts: list[int],
    chaos: Iterator[int] | None = None,
) -> Seen:
    """Chaos 1 and 2 undo batches, 2 and 3 restore, 4 leaves frames open."""
    state, seen = State(specs), Seen(specs)
    for first, stop in pairwise(sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})):
        act = next(chaos) if chaos is not None else 0
        if act in (1, 2):
            before = state.digest()
            for turn in range(act):
                wrong = rows[::-1].copy()
                wrong["at"] += 40 * turn  # time goes on, and windows with it
                state.begin(len(wrong))
                apply(state, specs, source, wrong, first)
                state.seal()
            for _ in range(act):
                state.rollback()
            assert state.digest() == before
        if act in (2, 3):
            frozen, before = state.freeze(), state.digest()
            state.begin(len(rows))
            apply(state, specs, source, rows[::-1].copy(), first)  # the stream goes on meanwhile
            state = State(specs)
            state.load(frozen())
            assert state.digest() == before
        state.begin(stop - first)
        for name, changes in apply(state, specs, source, rows[first:stop], first).items():
            seen.take(name, changes, first)
        state.seal()
        while act != 4 and state.frames:
            state.forget()
    seen.digest = state.digest()
    seen.kept = {name: len(getattr(state, name)) for name in specs}
    return seen


def assert_same(one: Seen, other: Seen) -> None:
    """Every bit, NaN equal to itself; finals in order too."""
    assert repr(one.finals) == repr(other.finals)
    for name, rows in one.rows.items():
        mine, yours = (
            {row: found for row, found in each.items() if found[-1]}
            for each in (rows, other.rows[name])
        )
        assert repr(sorted(mine.items())) == repr(sorted(yours.items()))
        assert repr(sorted(one.open_now(name).items())) == repr(
            sorted(other.open_now(name).items())
        )
    assert (one.dropped, one.kept) == (other.dropped, other.kept)
    assert one.digest == other.digest
