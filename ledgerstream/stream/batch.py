"""A batch: the decoded events of one partition as columns, in offset order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Topic

RESERVED = frozenset({"offset", "timestamp", "rows", "source", "take", "time", "first", "next"})
"""Names that an event's fields must not have."""


class Batch:
    """Events of one partition: `batch.amount` is a contiguous numpy column of shape [n].

    source:     the topic that they came from.
    rows:       the structured array, dtype `source.event.dtype()`.
    offset:     int64[n], ascending, with holes where the log has them.
    timestamp:  int64[n], the records' timestamps in ms (event time is a column).
    """

    def __init__(
        self,
        source: Topic,
        rows: np.ndarray,
        offset: np.ndarray,
        timestamp: np.ndarray | None = None,
    ) -> None:
        assert len(rows) == len(offset)
        self.source = source
        self.rows = rows
        self.offset = offset
        self.timestamp = np.zeros(len(rows), np.int64) if timestamp is None else timestamp

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> np.ndarray:
        # Only called for what is not there yet. A column is copied out of the rows once, so that
        # every kernel sees one signature: contiguous, aligned, writable.
        if name.startswith("__") or name not in (columns := self.source.event.columns()):
            known = "" if name.startswith("__") else f"; it has {', '.join(columns)}"
            raise AttributeError(f"this batch has no column {name!r}{known}")
        column = np.array(self.rows[name], order="C", copy=True)
        self.__dict__[name] = column
        return column

    def __getitem__(self, name: str) -> np.ndarray:
        column: np.ndarray = getattr(self, name)
        return column

    def take(self, index: Any) -> Batch:
        """The events at `index` (a slice, a mask or positions, ascending) as a batch."""
        return Batch(self.source, self.rows[index], self.offset[index], self.timestamp[index])
