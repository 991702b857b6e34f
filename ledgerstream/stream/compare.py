"""The first difference between the rows that should be and those that are. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ledgerstream.stream.pgread import Columns
from ledgerstream.stream.tables import ORIGIN, Table
from ledgerstream.stream.windows import WindowTable


@dataclass(frozen=True)
class Difference:
    """One row that is not as it should be.

    column:    the first that differs; None where the row is missing or should not be there.
    expected:  its value, or None where there should be no such row; `found` likewise.
    """

    table: str
    partition: int
    offset: int
    n: int
    column: str | None
    expected: Any
    found: Any

    def sentence(self, wanted: str = "recomputed", there: str = "in Postgres") -> str:
        row = f"{self.table}: row {self.n} of offset {self.offset:,} in partition {self.partition}"
        if self.column is not None:
            return (
                f"{row}: {self.column} is {self.found!r} {there}, and {self.expected!r} {wanted}."
            )
        if self.found is None:
            return f"{row} is missing {there}: {self.expected!r} was {wanted}."
        return f"{row} should not be {there}: {self.found!r}; none was {wanted}."


def stands(table: type[Table]) -> bool:
    """Whether rows of this table, once they count, are never replaced."""
    return not table.key_columns() or issubclass(table, WindowTable)


def settled(table: type[Table], columns: Columns) -> Columns:
    """The rows that count: of a table of windows those that are final, because what an open one
    shows depends on where batches end."""
    if not issubclass(table, WindowTable):
        return columns
    return {name: column[columns["final"]] for name, column in columns.items()}


def first_difference(table: type[Table], expected: Columns, found: Columns) -> Difference | None:
    """Of rows in the order of (offset, n); bits count, so NaN equals itself."""
    both = min(len(expected["ls_offset"]), len(found["ls_offset"]))
    at, column = both, None
    places = np.zeros(both, bool)
    for name in ("ls_offset", "ls_n"):
        places |= expected[name][:both] != found[name][:both]
    if places.any():
        at = int(np.argmax(places))
    for name in table.result_columns():
        differs = _bits(expected[name][:at]) != _bits(found[name][:at])
        if differs.any():
            at, column = int(np.argmax(differs)), name
    if column is not None:
        return _difference(table, expected, at, column, expected[column][at], found[column][at])
    rows = [_row_at(table, columns, at) for columns in (expected, found)]
    if rows == [None, None]:
        return None
    if rows[1] is None or (rows[0] is not None and rows[0][0] < rows[1][0]):
        return _difference(table, expected, at, None, rows[0][1] if rows[0] else None, None)
    return _difference(table, found, at, None, None, rows[1][1])


def _row_at(table: type[Table], columns: Columns, at: int) -> tuple[Any, dict[str, Any]] | None:
    if at >= len(columns["ls_offset"]):
        return None
    row = {name: plain(columns[name][at]) for name in table.result_columns()}
    return (columns["ls_offset"][at], columns["ls_n"][at]), row


def _difference(
    table: type[Table], columns: Columns, at: int, column: str | None, expected: Any, found: Any
) -> Difference:
    where = {name: int(columns[name][at]) for name in ORIGIN}
    return Difference(
        table.relation().name, where["ls_partition"], where["ls_offset"], where["ls_n"], column,
        plain(expected), plain(found),
    )  # fmt: skip


def _bits(column: np.ndarray) -> np.ndarray:
    return column.view(np.int64) if column.dtype == np.float64 else column


def plain(value: Any) -> Any:
    """A column's value as Python has it."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value
