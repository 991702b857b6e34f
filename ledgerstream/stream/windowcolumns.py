"""The columns of windows: what each keeps of the events, and how it lies in a window's row.

A column takes words of the row (`windowplan.AGGREGATES` and on); one that must know its values
has a row for each of them besides (`windowvalues`). Kernels read a *plan*, a row of numbers a
column; events come to them as `values`, int64[words, n].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ledgerstream.stream import windowplan as plan
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.keyed import text_words
from ledgerstream.stream.sketch import SKETCH_WORDS, estimates
from ledgerstream.stream.state import BadEvents
from ledgerstream.stream.windowkernels import means


@dataclass(frozen=True)
class Aggregate:
    """What a window keeps of its events; made by `First`, `Sum` and so on.

    weight: a mean's weights, or what adds up to the totals of `TopK`.
    size:   the half-life in ns, or how many values `TopK` shows.
    limit:  of different values in a window, where each of them is kept.
    """

    op: int
    column: str | None = None
    weight: str | None = None
    size: int = 0
    limit: int = 0


@dataclass(frozen=True)
class WindowColumn:
    """A declared column; `dtype` of the event's column, None for sums, counts and means."""

    name: str
    kept: Aggregate
    dtype: np.dtype | None

    @property
    def value_words(self) -> int:
        """Of a value: more than one for longer text."""
        return -(-self.dtype.itemsize // 8) if self.dtype is not None and self.is_text else 1

    @property
    def is_text(self) -> bool:
        return self.dtype is not None and self.dtype.kind == "S"

    @property
    def words(self) -> int:
        """Of a row that it takes: a mean's sum has two, the weights a third; an exponentially
        weighted mean is a sum and the weights' sum."""
        match self.kept.op:
            case plan.COUNT:
                return 0
            case plan.MEAN | plan.EWM:
                return 2
            case plan.WEIGHTED:
                return 3
            case plan.SKETCH:
                return SKETCH_WORDS
            case plan.TOP_COUNT | plan.TOP_SUM:
                return 1 + self.kept.size * (self.value_words + 1)
        return 1

    @property
    def keeps_values(self) -> bool:
        return self.kept.op >= plan.KEEPS_VALUES

    @property
    def is_mean(self) -> bool:
        return self.kept.op in (plan.MEAN, plan.WEIGHTED, plan.EWM)

    @property
    def units(self) -> Mapping[str, str]:
        """The result columns whose values are those of an event's column, or sums of it."""
        kept = self.kept
        if kept.op in (plan.TOP_COUNT, plan.TOP_SUM):
            pairs = [(each, kept.column) for each in top_names(self.name, kept.size)]
            totals = [(f"{each}_total", kept.weight) for each, _ in pairs]
            return {name: column for name, column in [*pairs, *totals] if column is not None}
        if kept.column is None or kept.op in (plan.DISTINCT, plan.SKETCH):
            return {}
        return {self.name: kept.column}

    @property
    def names(self) -> list[str]:
        """Of the result columns."""
        if self.kept.op not in (plan.TOP_COUNT, plan.TOP_SUM):
            return [self.name]
        values = top_names(self.name, self.kept.size)
        return [*values, *(f"{each}_total" for each in values)]

    def stored(self) -> list[object]:
        """The declaration as far as stored bytes depend on it."""
        kept = self.kept
        common: list[object] = [self.name, kept.op, kept.column, kept.weight]
        if kept.op < plan.EWM:
            return common
        text = [self.dtype.str] if self.dtype is not None and self.is_text else []
        return [*common, kept.size, kept.limit, *text]


def top_names(name: str, size: int) -> list[str]:
    return [f"{name}_{place}" for place in range(1, size + 1)]


class Layout:
    """Where declared columns lie, and what kernels are told of them.

    plan:   int64[columns, PLAN_WORDS], of those that each event is added to.
    sets:   the same, of those whose values are kept.
    words:  of a row, from `AGGREGATES` on, that the columns take.
    """

    def __init__(self, columns: tuple[WindowColumn, ...]) -> None:
        self.columns = columns
        self._sources: dict[tuple[str, bool], int] = {}  # event column, as a float → first word
        self.given_words = 0  # of `values`
        for (name, as_float), words in sorted(_sources(columns)):  # `reported` stores them so
            if (name, as_float) not in self._sources:
                self._sources[name, as_float] = self.given_words
                self.given_words += words
        self.words = 0
        rows = []
        for column in columns:
            kept = column.kept
            value, weight = (kept.column or "", kept.op == plan.EWM), (kept.weight or "", False)
            rows.append([
                kept.op, self._sources.get(value, 0), self._sources.get(weight, 0),
                plan.AGGREGATES + self.words, column.value_words, column.is_text, kept.size,
                kept.limit,
            ])  # fmt: skip
            self.words += column.words
        every = np.array(rows, np.int64).reshape(-1, plan.PLAN_WORDS)
        ops = every[:, plan.OP]
        self.plan = every[(ops != plan.COUNT) & (ops < plan.KEEPS_VALUES)]
        self.sets = every[ops >= plan.KEEPS_VALUES]
        self._places = every[:, plan.PLACE]

    def values(self, batch: Batch) -> np.ndarray:
        """int64[words, n]: what the columns need of the events. Raises BadEvents for a number that
        is not finite."""
        n = len(batch)
        values = np.empty((max(self.given_words, 1), n), np.int64)
        for (name, as_float), at in self._sources.items():
            column = batch[name]
            if as_float:
                if column.dtype.kind == "f" and not (finite := np.isfinite(column)).all():
                    raise BadEvents(
                        batch.offset[~finite].tolist(), f"{name!r} is not a finite number."
                    )
                values[at] = column.astype(np.float64).view(np.int64)
            elif column.dtype.kind == "S":
                words = text_words(column, column.dtype.itemsize)
                values[at : at + words.shape[1]] = words.T
            else:
                values[at] = column
        return values

    def read(self, rows: np.ndarray, at: int) -> dict[str, np.ndarray]:
        """Result columns of windows' rows; `at`: the first word after the key."""
        found: dict[str, np.ndarray] = {}
        for column, place in zip(self.columns, self._places, strict=True):
            found |= _read(rows, column, at, at + int(place))
        return found


def _sources(columns: tuple[WindowColumn, ...]) -> Iterator[tuple[tuple[str, bool], int]]:
    """The event columns that kernels are given: name, whether as a float, and words."""
    for column in columns:
        if column.kept.column is not None:
            yield (column.kept.column, column.kept.op == plan.EWM), column.value_words
        if column.kept.weight is not None:
            yield (column.kept.weight, False), 1


def _read(rows: np.ndarray, column: WindowColumn, at: int, place: int) -> dict[str, np.ndarray]:
    match column.kept.op:
        case plan.COUNT:
            return {column.name: rows[:, at + plan.EVENTS].copy()}
        case plan.DISTINCT:
            return {column.name: rows[:, place].copy()}
        case plan.EWM:
            sums = np.ascontiguousarray(rows[:, place : place + 2]).view(np.float64)
            mean = np.full(len(rows), np.nan)  # of no events; 0 ÷ 0 has other bits elsewhere
            np.divide(sums[:, 0], sums[:, 1], out=mean, where=sums[:, 1] != 0)
            return {column.name: mean}
        case plan.SKETCH:
            result = np.empty(len(rows), np.int64)
            registers = np.ascontiguousarray(rows[:, place : place + column.words])
            estimates(registers, result)
            return {column.name: result}
        case plan.TOP_COUNT | plan.TOP_SUM:
            return _read_top(rows, column, place + 1)
        case plan.MEAN | plan.WEIGHTED:
            weight = place + 2 if column.words == 3 else at + plan.EVENTS
            low, high, by = (rows[:, word].copy() for word in (place, place + 1, weight))
            mean = np.empty(len(rows))
            means(low, high, by, mean)
            return {column.name: mean}
    return {column.name: rows[:, place].astype(column.dtype or np.int64)}


def _read_top(rows: np.ndarray, column: WindowColumn, place: int) -> dict[str, np.ndarray]:
    words, dtype = column.value_words, column.dtype
    assert dtype is not None
    values, totals = {}, {}
    for name in top_names(column.name, column.kept.size):
        given = np.ascontiguousarray(rows[:, place : place + words])
        if dtype.kind == "S":
            values[name] = given.view(f"S{8 * words}")[:, 0].astype(dtype)
        else:
            values[name] = given[:, 0].astype(dtype)
        totals[f"{name}_total"] = rows[:, place + words].copy()
        place += words + 1
    return values | totals
