"""What a row of the table is, and how it is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

PAIRS = 5


@dataclass
class Row:
    """One figure. `bar` and `aim` are about `ratio`, ours ÷ peer, or where no peer is named about
    ours alone."""

    id: str
    what: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str
    better: Literal["higher", "lower"]
    bar: float | None = None
    aim: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.peer else None

    @property
    def reached(self) -> bool | None:
        """Whether the bar is reached, where there is one."""
        value = self.ratio if self.peer_name else self.ours
        if self.bar is None or value is None:
            return None
        return value >= self.bar if self.better == "higher" else value <= self.bar

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "reached": self.reached}


Measure = Callable[[], Iterator[Row]]
ROWS: dict[str, Measure] = {}


def row(row_id: str) -> Callable[[Measure], Measure]:
    def register(measure: Measure) -> Measure:
        ROWS[row_id] = measure
        return measure

    return register


def in_turn(
    ours: Callable[[], float], peer: Callable[[], float] | None, pairs: int = PAIRS
) -> tuple[float, float | None]:
    """The medians of several pairs, measured in turn, after one of each that does not count."""
    found: list[list[float]] = [[], []]
    sides = [ours] if peer is None else [ours, peer]
    for side in sides:
        side()
    for pair in range(pairs):
        for side in sides if pair % 2 == 0 else reversed(sides):
            found[side is peer].append(side())
    return statistics.median(found[0]), statistics.median(found[1]) if peer else None
