"""Result tables: SQLAlchemy models, and `Rows` of them as columns.

    class Alert(Table):
        payment_id: Mapped[int]
        spent: Mapped[EUR]

    Alert.rows(batch, where=spent > limit, spent=spent)

In Postgres: int and money are bigint (money in minor units), Timestamp is bigint nanoseconds UTC
(timestamptz would lose the last three digits), float is double precision, enums are their integer,
Int16 and Int32 smallint and integer, text is text. Nothing is nullable.

Each row says where it came from: `ls_topic_id` (in `ls_topics`), `ls_partition`, `ls_offset`, and
`ls_n`, the n-th row of that event in this table. They identify the row for the mapper without being
a constraint in the database, which would cost about a third of COPY's speed: the fence of the
step makes them unique.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_type_hints

import numpy as np
from sqlalchemy import BigInteger, Boolean, Double, Integer, SmallInteger, Text
from sqlalchemy import Table as Relation
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column

from ledgerstream import events
from ledgerstream.errors import ConfigError
from ledgerstream.events import Timestamp
from ledgerstream.stream.batch import Batch

ORIGIN = ("ls_offset", "ls_topic_id", "ls_partition", "ls_n")


@dataclass(frozen=True)
class Rows:
    """Rows for one table: `columns` are arrays [n]; `event` int64[n] is each row's event, as an
    index into the batch, ascending."""

    table: type[Table]
    columns: Mapping[str, np.ndarray]
    event: np.ndarray

    def __len__(self) -> int:
        return len(self.event)


class Table(DeclarativeBase):
    """Base of result tables. The table is named like the class, in lower case with underscores,
    unless `__tablename__` says otherwise, and is created if it is not there."""

    type_annotation_map = {
        int: BigInteger,
        float: Double,
        bool: Boolean,
        str: Text,
        events.Int8: SmallInteger,
        events.Int16: SmallInteger,
        events.Int32: Integer,
    }

    # Widest first, so that Postgres pads nothing.
    ls_offset: Mapped[int] = mapped_column(BigInteger, sort_order=1_000)
    ls_topic_id: Mapped[int] = mapped_column(Integer, sort_order=1_001)
    ls_partition: Mapped[int] = mapped_column(Integer, sort_order=1_002)
    ls_n: Mapped[int] = mapped_column(SmallInteger, sort_order=1_003)

    @declared_attr.directive
    def __tablename__(cls) -> str:
        name = cls.__name__
        parts = [("_" + c.lower()) if c.isupper() else c for c in name]
        return "".join(parts).lstrip("_")

    @declared_attr.directive
    def __mapper_args__(cls) -> dict[str, Any]:
        return {"primary_key": list(ORIGIN)}

    @classmethod
    def relation(cls) -> Relation:
        """The table as SQLAlchemy's core sees it."""
        return cast(Relation, cls.__table__)

    @classmethod
    def result_columns(cls) -> tuple[str, ...]:
        """The columns that a processor fills, in order."""
        return tuple(c.name for c in cls.relation().columns if c.name not in ORIGIN)

    @classmethod
    def rows(
        cls,
        batch: Batch,
        *,
        where: np.ndarray | None = None,
        of: np.ndarray | None = None,
        **columns: Any,
    ) -> Rows:
        """Rows of this table for events of a batch.

        where:    bool[n], the events that get a row; without it, each event does.
        of:       instead, the event of each row as ascending indices (an event may repeat).
        columns:  values for columns: an array [n] over the batch (or over `of`, if given), or a
                  scalar. Columns that are not given are taken from the batch by their name.

        Raises ConfigError where a column is neither given nor in the batch, or has another length.
        """
        n = len(batch)
        if of is not None:
            event = np.ascontiguousarray(of, np.int64)
            if where is not None:
                raise ConfigError(f"{cls.__name__}.rows: give where or of, not both.")
            if len(event) and (event[0] < 0 or event[-1] >= n or (np.diff(event) < 0).any()):
                raise ConfigError(f"{cls.__name__}.rows: `of` must ascend within the batch.")
        elif where is not None:
            mask = np.asarray(where)
            if mask.shape != (n,) or mask.dtype != np.bool_:
                raise ConfigError(
                    f"{cls.__name__}.rows: where has shape {mask.shape} of {mask.dtype}; "
                    f"it must be bool[{n}], one for each event."
                )
            event = np.flatnonzero(mask)
        else:
            event = np.arange(n)
        names = cls.result_columns()
        unknown = columns.keys() - set(names)
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no column {sorted(unknown)[0]!r}.",
                f"It has {', '.join(names)}.",
            )
        picked = {}
        every = where is None and of is None
        for name in names:
            if name in columns:
                value = np.asarray(columns[name])
                if value.ndim == 0:
                    picked[name] = np.full(len(event), value[()])
                    continue
                expected = len(event) if of is not None else n
                if value.shape != (expected,):
                    raise ConfigError(
                        f"{cls.__name__}.rows: {name} has shape {value.shape}, not ({expected},)."
                    )
                picked[name] = value if every or of is not None else value[event]
            elif name in batch.source.event.columns():
                picked[name] = batch[name] if every else batch[name][event]
            else:
                raise ConfigError(
                    f"{cls.__name__}.rows: {name} is neither given nor a field of "
                    f"{batch.source.event.__name__}.",
                    f"Give it: {cls.__name__}.rows(batch, {name}=…).",
                )
        return Rows(cls, picked, event)


def timestamps(table: type[Table]) -> list[str]:
    """The columns that were annotated as Timestamp."""
    hints = get_type_hints(table, include_extras=True)
    return [name for name in table.result_columns() if hints.get(name) == Mapped[Timestamp]]


def ordinals(parts: list[Rows]) -> list[np.ndarray]:
    """`ls_n` of each part of one table: how many rows its event had in it before. int64[n] each."""
    several = len(parts) > 1
    base: dict[int, int] | None = {} if several else None
    result = []
    for rows in parts:
        event = rows.event
        starts = np.searchsorted(event, event, side="left")
        n = np.arange(len(event)) - starts
        if base is not None:
            n = n + np.array([base.get(int(e), 0) for e in event], np.int64)
            for e, count in zip(*np.unique(event, return_counts=True), strict=True):
                base[int(e)] = base.get(int(e), 0) + int(count)
        result.append(n)
    return result
