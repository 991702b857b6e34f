"""Results and state as data frames: typed for people, as `ls.table` shows them.

Money stays integer minor units; Timestamps become datetime64[ns, UTC]; text is str.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ledgerstream.events import Event
from ledgerstream.stream.state import State
from ledgerstream.stream.tables import ORIGIN, Table, timestamps


def table_frame(
    table: type[Table],
    columns: Mapping[str, np.ndarray] | Sequence[Sequence[Any]],
    *,
    origin: bool = False,
) -> pd.DataFrame:
    """Rows of a table from columns, or from rows of values in the order of the frame's columns."""
    names = [*table.result_columns(), *(ORIGIN if origin else ())]
    if isinstance(columns, Mapping):
        frame = pd.DataFrame({name: _shown(columns[name]) for name in names}, columns=names)
    else:
        frame = pd.DataFrame([tuple(row) for row in columns], columns=names)
    for name in timestamps(table):
        frame[name] = pd.to_datetime(frame[name], unit="ns", utc=True)
    return frame


def event_frame(event: type[Event], rows: np.ndarray) -> pd.DataFrame:
    """Rows of an event type, a column a field."""
    columns = {}
    for column in event.columns().values():
        values: Any = rows[column.name]
        if column.kind == "timestamp":
            values = pd.to_datetime(values.astype(np.int64), unit="ns", utc=True)
        elif column.kind == "text":
            values = np.char.decode(values, "utf-8")
        columns[column.name] = values
    return pd.DataFrame(columns)


def state_frames(state: State) -> dict[str, pd.DataFrame]:
    """Each declared state's content, a row a key, in the order of keys."""
    frames = {}
    for name, columns in state.columns().items():
        frame = pd.DataFrame({column: _shown(values) for column, values in columns.items()})
        key = frame.columns[0]
        frames[name] = frame.sort_values(key, ignore_index=True)
    return frames


def _shown(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8").astype(object)
    if values.dtype.kind == "O":
        return np.array([each.decode() for each in values], object)
    return values
