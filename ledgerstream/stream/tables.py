"""Result tables: SQLAlchemy models, and `Rows` of them as columns.

    class Alert(Table):
        payment_id: Mapped[int]
        spent: Mapped[EUR]

    Alert.rows(batch, where=spent > limit, spent=spent)

In Postgres: int and money are bigint (money in minor units), Timestamp is bigint nanoseconds UTC
(timestamptz would lose the last three digits), float is double precision, enums are their integer,
Int16 and Int32 smallint and integer, text is text. Nothing is nullable.

A table with `mapped_column(primary_key=True)` holds the newest row of each key:

    class Balance(Table):
        account: Mapped[int] = mapped_column(primary_key=True)
        balance: Mapped[EUR]

    Balance.upsert(account=batch.account, balance=after)   # the last of a key wins

Each row says where it came from: `ls_topic_id` (in `ls_topics`), `ls_partition`, `ls_offset`, and
`ls_n`, the n-th row of that event in this table. Where there is no key they identify the row for
the mapper without being a constraint in the database, which would cost about a third of COPY's
speed: the fence of the step makes them unique.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_type_hints

import numpy as np
from sqlalchemy import BigInteger, Boolean, Double, Integer, SmallInteger, Text
from sqlalchemy import Table as Relation
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column
from sqlalchemy.types import Float

from ledgerstream import events
from ledgerstream.errors import ConfigError
from ledgerstream.events import Timestamp
from ledgerstream.stream.batch import Batch

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Topic

ORIGIN = ("ls_offset", "ls_topic_id", "ls_partition", "ls_n")


@dataclass(frozen=True)
class Rows:
    """Rows for one table: `columns` are arrays [n]; `event` int64[n] is each row's event, as an
    index into the batch, ascending.

    every:  made without the batch, one row for each of its events.
    new:    bool[n], rows of a table with a key whose key no step before has written, as far as the
            processor knows; they take a shorter way into the table.
    """

    table: type[Table]
    columns: Mapping[str, np.ndarray]
    event: np.ndarray
    every: bool = False
    new: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.event)


class Row(NamedTuple):
    """One row, or one event for a topic, for `on_event` to return: the values that were given."""

    table: type[Table] | Topic
    values: Mapping[str, Any]


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
        return {} if cls.key_columns() else {"primary_key": list(ORIGIN)}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("__abstract__"):
            return
        for column in cls.relation().primary_key.columns:
            column.autoincrement = False  # keys come from events, never from a sequence
            if isinstance(column.type, Float):
                raise ConfigError(
                    f"{cls.__name__}.{column.name}: a key cannot be a float.",
                    "Use the integer that it was made from.",
                )

    @classmethod
    def relation(cls) -> Relation:
        """The table as SQLAlchemy's core sees it."""
        return cast(Relation, cls.__table__)

    @classmethod
    def result_columns(cls) -> tuple[str, ...]:
        """The columns that a processor fills, in order."""
        return tuple(c.name for c in cls.relation().columns if c.name not in ORIGIN)

    @classmethod
    def key_columns(cls) -> tuple[str, ...]:
        """The columns of which each combination has one row; none where every row is kept."""
        return tuple(column.name for column in cls.relation().primary_key.columns)

    @classmethod
    def row(cls, **values: Any) -> Row:
        """A row of this table for one event, in `on_event`: `Alert.row(spent=spent)`.

        Columns that are not given are taken from the event by their name. Money and times are int.
        """
        return Row(cls, values)

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

        Raises ConfigError where a column is neither given nor in the batch, or has another length,
        and for a table with a key.
        """
        if cls.key_columns():
            raise ConfigError(
                f"{cls.__name__} has a key ({', '.join(cls.key_columns())}): it holds the newest "
                "row of each.",
                f"Return {cls.__name__}.upsert(…), or take primary_key=True away to keep all rows.",
            )
        return cls._of_batch("rows", batch, where, of, columns)

    @classmethod
    def upsert(
        cls,
        batch: Batch | None = None,
        /,
        *,
        where: np.ndarray | None = None,
        of: np.ndarray | None = None,
        **columns: Any,
    ) -> Rows:
        """Rows that take the place of those with the same key; the last one of a key wins.

        With a batch as `rows`. Without one, columns are arrays [n], one value an event of the
        batch that `process` was given, or scalars, and each must be given.

        A constraint of your own on such a table sees only the rows that are written: of several
        with one key in a step, the last. Raises ConfigError as `rows` does, and for a table
        without a key.
        """
        if not cls.key_columns():
            raise ConfigError(
                f"{cls.__name__} has no key: all of its rows are kept.",
                f"Return {cls.__name__}.rows(…), or declare the key with "
                "mapped_column(primary_key=True).",
            )
        if batch is not None:
            return cls._of_batch("upsert", batch, where, of, columns)
        if where is not None or of is not None:
            raise ConfigError(f"{cls.__name__}.upsert: where and of need the batch in front.")
        cls._check_names(columns)
        lengths = {len(value) for value in map(np.asarray, columns.values()) if value.ndim == 1}
        if len(lengths) != 1:
            raise ConfigError(
                f"{cls.__name__}.upsert: the columns have {sorted(lengths) or 'no'} lengths.",
                "Give arrays with one value an event, or put the batch in front.",
            )
        return replace(cls._of_events("upsert", np.arange(lengths.pop()), columns), every=True)

    @classmethod
    def _of_events(cls, call: str, event: np.ndarray, columns: Mapping[str, Any]) -> Rows:
        """Rows whose columns are all given, of these events."""
        cls._check_names(columns)
        return Rows(cls, cls._filled(call, None, event, columns), event)

    @classmethod
    def _of_batch(
        cls,
        call: str,
        batch: Batch,
        where: np.ndarray | None,
        of: np.ndarray | None,
        columns: Mapping[str, Any],
    ) -> Rows:
        cls._check_names(columns)
        event = which_events(f"{cls.__name__}.{call}", len(batch), where, of)
        return Rows(cls, cls._filled(call, batch, event, columns, where, of), event)

    @classmethod
    def _filled(
        cls,
        call: str,
        batch: Batch | None,
        event: np.ndarray,
        columns: Mapping[str, Any],
        where: np.ndarray | None = None,
        of: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Every column as an array [len(event)]."""
        filled = {}
        expected = len(event) if where is None else len(where)
        for name in cls.result_columns():
            if name in columns:
                value = np.asarray(columns[name])
                if value.ndim == 0:
                    filled[name] = np.full(len(event), value[()])
                    continue
                if value.shape != (expected,):
                    raise ConfigError(
                        f"{cls.__name__}.{call}: {name} has shape {value.shape}, not ({expected},)."
                    )
                filled[name] = value if where is None else value[event]
            elif batch is not None and name in batch.source.event.columns():
                filled[name] = batch[name] if where is None and of is None else batch[name][event]
            elif batch is not None:
                raise ConfigError(
                    f"{cls.__name__}.{call}: {name} is neither given nor a field of "
                    f"{batch.source.event.__name__}.",
                    f"Give it: {cls.__name__}.{call}(batch, {name}=…).",
                )
            else:
                raise ConfigError(
                    f"{cls.__name__}.{call}: {name} is not given.",
                    f"Give it: {cls.__name__}.{call}(…, {name}=…).",
                )
        return filled

    @classmethod
    def _check_names(cls, columns: Mapping[str, Any]) -> None:
        unknown = columns.keys() - set(cls.result_columns())
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no column {sorted(unknown)[0]!r}.",
                f"It has {', '.join(cls.result_columns())}.",
            )


def timestamps(table: type[Table]) -> list[str]:
    """The columns that were annotated as Timestamp."""
    hints = get_type_hints(table, include_extras=True)
    return [name for name in table.result_columns() if hints.get(name) == Mapped[Timestamp]]


def which_events(
    call: str, count: int, where: np.ndarray | None, of: np.ndarray | None
) -> np.ndarray:
    """int64, ascending: the events of a batch of `count` that `where` or `of` chooses; all without
    either. Raises ConfigError, which names the `call`."""
    if of is not None:
        event = np.ascontiguousarray(of, np.int64)
        if where is not None:
            raise ConfigError(f"{call}: give where or of, not both.")
        if len(event) and (event[0] < 0 or event[-1] >= count or (np.diff(event) < 0).any()):
            raise ConfigError(f"{call}: `of` must ascend within the batch.")
        return event
    if where is None:
        return np.arange(count)
    mask = np.asarray(where)
    if mask.shape != (count,) or mask.dtype != np.bool_:
        raise ConfigError(
            f"{call}: where has shape {mask.shape} of {mask.dtype}; it must be bool[{count}], one "
            "for each event."
        )
    return np.flatnonzero(mask)


def ordinals(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`ls_n` of each part of one table, given the events of its rows: how many rows its event had
    in it before. int64[n] each."""
    several = len(parts) > 1
    base: dict[int, int] | None = {} if several else None
    result = []
    for event in parts:
        starts = np.searchsorted(event, event, side="left")
        n = np.arange(len(event)) - starts
        if base is not None:
            n = n + np.array([base.get(int(e), 0) for e in event], np.int64)
            for e, count in zip(*np.unique(event, return_counts=True), strict=True):
                base[int(e)] = base.get(int(e), 0) + int(count)
        result.append(n)
    return result
