"""Bytes of Postgres' binary COPY to columns, by one kernel: the way back from `pgcopy`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sqlalchemy import Boolean, Double
from sqlalchemy.types import Float

from ledgerstream.errors import LedgerStreamError
from ledgerstream.stream.kernels import I64, U8, kernel
from ledgerstream.stream.pgcopy import HEADER, widths
from ledgerstream.stream.tables import Table

Columns = Mapping[str, np.ndarray]
"""One table's rows: int64, float64, bool, or text as an object array of bytes; [n] each."""


def decode(table: type[Table], data: bytes) -> tuple[dict[str, np.ndarray], int]:
    """The whole rows in COPY bytes (without COPY's header), and how many bytes they take.

    Raises LedgerStreamError for bytes that are not rows of this table.
    """
    layout = np.array(widths(table), np.int64)
    row_bytes_min = 2 + 4 * len(layout) + int(layout.sum())
    words = np.empty((len(layout), len(data) // row_bytes_min), np.int64)
    sizes = np.empty_like(words)
    count, used = _decode_rows(np.frombuffer(data, np.uint8), layout, words, sizes)
    if count < 0:
        raise LedgerStreamError(
            f"Rows of table {table.relation().name!r} do not have its columns, or hold a NULL.",
            "Undo what was changed in the table by hand.",
        )
    columns: dict[str, np.ndarray] = {}
    for at, (column, width) in enumerate(zip(table.relation().columns, layout, strict=True)):
        word = words[at, :count]
        if width == 0:
            texts = np.empty(count, object)
            for row, (start, size) in enumerate(zip(word, sizes[at, :count], strict=True)):
                texts[row] = data[start : start + size]
            columns[column.name] = texts
        elif isinstance(column.type, (Double, Float)):
            columns[column.name] = word.copy().view(np.float64)
        elif isinstance(column.type, Boolean):
            columns[column.name] = word != 0
        else:
            columns[column.name] = word.copy()
    return columns, used


def joined(table: type[Table], parts: Sequence[Columns]) -> dict[str, np.ndarray]:
    """The rows of all parts in the order of their events, by offset, then n; of a table with a
    key, the newest of each."""
    names = [column.name for column in table.relation().columns]
    if not parts:
        return decode(table, b"")[0]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
    order = np.lexsort((columns["ls_n"], columns["ls_offset"]))
    if keys := table.key_columns():
        import pandas as pd

        frame = pd.DataFrame({key: columns[key][order] for key in keys})
        order = order[~frame.duplicated(keep="last").to_numpy()]
    return {name: column[order] for name, column in columns.items()}


class RowStream:
    """Rows that come in pieces, cut anywhere, as COPY sends them."""

    def __init__(self, table: type[Table]) -> None:
        self._table = table
        self._left = b""
        self._begun = False

    def feed(self, data: bytes) -> dict[str, np.ndarray]:
        """The rows that are whole now."""
        self._left += data
        if not self._begun:
            if len(self._left) < len(HEADER):
                return decode(self._table, b"")[0]
            self._left = self._left[len(HEADER) :]
            self._begun = True
        columns, used = decode(self._table, self._left)
        self._left = self._left[used:]
        return columns


@kernel
def _decode_rows(data: U8, widths: I64, words: I64, sizes: I64) -> tuple[int, int]:
    """Rows into words [fields, rows]: numbers as they are, text as where it begins, with its size.

    Returns how many are whole and where they end; (-1, at) for a row that is not as declared.
    """
    end = len(data)
    at = 0
    count = 0
    while at + 2 <= end:
        fields = (data[at] << 8) | data[at + 1]
        if fields == 0xFFFF:  # COPY's trailer
            break
        if fields != len(widths):
            return -1, at
        place = at + 2
        whole = True
        for field in range(fields):
            if place + 4 > end:
                whole = False
                break
            size = (
                (np.int64(data[place]) << 24)
                | (np.int64(data[place + 1]) << 16)
                | (np.int64(data[place + 2]) << 8)
                | np.int64(data[place + 3])
            )
            place += 4
            width = widths[field]
            if size == 0xFFFFFFFF or (width != 0 and size != width):
                return -1, at
            if place + size > end:
                whole = False
                break
            if width == 0:
                words[field, count] = place
                sizes[field, count] = size
            else:
                value = np.int64(data[place])
                if width > 1 and value >= 128:
                    value -= 256  # the sign
                for i in range(1, width):
                    value = (value << 8) | np.int64(data[place + i])
                words[field, count] = value
            place += size  # type: ignore[assignment]
        if not whole:
            break
        count += 1
        at = place
    return count, at
