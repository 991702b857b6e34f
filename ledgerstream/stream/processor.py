"""What a user writes: a source topic, state declared as columns, and `process`.

    class LargeSpenders(Processor):
        source = Topic("payments", Payment, key="customer")
        spent = Sliding(by="customer", over="24h", sum="amount")

        def process(self, payments, state):
            spent = state.spent.add(payments)
            return Alert.rows(payments, where=spent > eur("10000.00"), spent=spent)

A declaration is checked when the class is made: a column that the event does not have, a window
without length or a type without a column is a ConfigError, before anything runs.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ledgerstream.errors import ConfigError, EventTypeError
from ledgerstream.events import Column, Event
from ledgerstream.stream import single
from ledgerstream.stream.batch import RESERVED, Batch
from ledgerstream.stream.durations import duration_ns
from ledgerstream.stream.outputs import Events, emitted
from ledgerstream.stream.state import ArenaSpec, Declaration, Key, KeyedSpec, Spec, State
from ledgerstream.stream.tables import Row, Rows, Table

if TYPE_CHECKING:
    import pandas as pd

    from ledgerstream.stream.trial import Tables

__all__ = ["Keyed", "Processor", "Sliding", "State", "Topic"]

Duration = str | dt.timedelta


@dataclass(frozen=True)
class Topic:
    """A source topic: its event type, the column that is its key, and its form on the wire.

    `time`: the event-time column; without it, the event's only Timestamp.
    """

    name: str
    event: type[Event]
    key: str
    encoding: Literal["fixed", "json"] = "fixed"
    time: str | None = None

    declared: ClassVar[dict[str, Topic]] = {}  # the newest declaration of each name

    def __post_init__(self) -> None:
        if not (isinstance(self.event, type) and issubclass(self.event, Event)):
            raise ConfigError(f"Topic({self.name!r}): {self.event!r} is not an event type.")
        columns = self.event.columns()
        self.column(self.key, "key")
        if self.encoding not in ("fixed", "json"):
            raise ConfigError(f"Topic({self.name!r}): encoding is 'fixed' or 'json'.")
        taken = sorted(RESERVED & columns.keys())
        if taken:
            raise ConfigError(
                f"{self.event.__name__}.{taken[0]}: a batch uses that name itself.",
                f"Rename the field; batches use {', '.join(sorted(RESERVED))}.",
            )
        if self.time is not None and self.column(self.time, "time").kind != "timestamp":
            raise ConfigError(f"Topic({self.name!r}): {self.time!r} is not a Timestamp.")
        Topic.declared[self.name] = self

    @property
    def time_column(self) -> str | None:
        """The event-time column, or None where the event has no one Timestamp."""
        return self.time or self.event.time_column()

    def emit(
        self,
        batch: Batch,
        *,
        where: np.ndarray | None = None,
        of: np.ndarray | None = None,
        **columns: Any,
    ) -> Events:
        """Events for this topic, one of the processor's `outputs`: `flagged.emit(batch, …)`.

        `where`, `of` and `columns` are as in `Table.rows`; optional fields that are neither given
        nor in the batch have their defaults. Raises ConfigError as there; events whose values do
        not fit become dead letters.
        """
        return emitted(self, batch, where, of, columns)

    def one(self, **values: Any) -> Row:
        """An event for this topic, in `on_event`: `flagged.one(score=3)`. As `Table.row`."""
        return Row(self, values)

    def column(self, name: str, role: str) -> Column:
        """The event's column of that name; ConfigError names what there is instead."""
        columns = self.event.columns()
        if name not in columns:
            raise ConfigError(
                f"Topic({self.name!r}): {role}={name!r} is not a column of {self.event.__name__}.",
                f"It has {', '.join(columns)}.",
            )
        return columns[name]

    def kept_by(self, where: str, by: str) -> Key:
        """The key that state may be kept by. Raises ConfigError, which names `where`."""
        columns = self.event.columns()
        if by not in columns:
            raise ConfigError(
                f"{where}: by={by!r} is not a column of {self.event.__name__}.",
                f"It has {', '.join(columns)}.",
            )
        dtype = columns[by].dtype
        if not np.issubdtype(dtype, np.integer) and dtype.kind != "S":
            raise ConfigError(
                f"{where}: by={by!r} is {columns[by].kind}; state is kept by integer or text "
                "columns.",
                "Give the event an integer for it, such as an IntEnum, or a Text[n].",
            )
        return Key(by, dtype)

    def window_time(self, where: str) -> str:
        """The event-time column. Raises ConfigError, which names `where`, if there is none."""
        if self.time_column is None:
            raise ConfigError(
                f"{where}: windows need an event time, as expiry does, and {self.event.__name__} "
                "has no Timestamp, or more than one.",
                "Declare one, or name it with Topic(…, time=…).",
            )
        return self.time_column


class Keyed(Declaration):
    """A table of state with one row a key: `Keyed(by="account", balance=EUR, n=int)`.

    Columns are declared as an event's are, and start as zero (empty text). In `process`,
    `state.<name>.at(keys)` finds or adds the rows.

    expire: forget keys that were not asked for over so much event time, measured by the greatest
            of the partition's events. A key lives for that time, and at most a sixteenth longer.
            Where time enters another sixteenth, `process` is called anew, so it should be long
            beside what a batch covers.

    The declaration may change while the processor is stopped, after `--finish` or another clean
    stop, and what is stored is migrated at the next start: a column may be added at any place (it
    is zero in the rows that are there), columns may change places, an integer may become wider
    (Int32 → int), a text longer, and an `Enum` may get members at its end. Any other
    change, such as a column that is gone or another key, stops the partitions with a sentence.
    """

    def __init__(self, *, by: str, expire: Duration | None = None, **columns: Any) -> None:
        self.by = by
        self.expire = expire
        self.columns = columns

    def resolve(self, where: str, source: Topic) -> KeyedSpec:
        """The checked declaration as the runtime wants it."""
        key = source.kept_by(where, self.by)
        if not self.columns:
            raise ConfigError(f"{where}: Keyed without a column keeps nothing.")
        for name in self.columns:
            if name in ("row", "key") or name.startswith("_"):
                raise ConfigError(f"{where}: a state column cannot be named {name!r}.")
        body = {"__annotations__": dict(self.columns), "__module__": __name__}
        try:
            event: type[Event] = type("Columns", (Event,), body)
        except EventTypeError as error:
            sentence = str(error.args[0]).replace("Columns.", f"{where}: ")
            raise ConfigError(sentence, error.remedy) from error
        dtypes = tuple((c.name, c.dtype) for c in event.columns().values())
        kinds = tuple(c.meaning for c in event.columns().values())
        if self.expire is None:
            return KeyedSpec(key, dtypes, kinds=kinds)
        expire_ns = duration_ns(self.expire)
        if expire_ns == 0:
            raise ConfigError(f"{where}: a key that expires at once is never kept.")
        return KeyedSpec(key, dtypes, expire_ns, source.window_time(where), kinds)


class Sliding(Declaration):
    """Exact sliding windows by key, over the events themselves.

    Event n sees the events m ≤ n of its key (by offset) whose time is in (tₙ − over, tₙ], or with
    a delay d in (tₙ − d − over, tₙ − d].

    by:     the key column.
    over:   one length, or several.
    sum:    the column to add up: integers, money or booleans, exactly, in int64.
    count:  count the events too (the default where there is nothing to sum).
    delay:  leave out the newest `delay` of time.
    late:   how far behind its key's newest event an event may be and still be answered exactly.
            One that is later still counts for those after it, and its own answer covers what is
            kept.
    """

    def __init__(
        self,
        *,
        by: str,
        over: Duration | Sequence[Duration],
        sum: str | None = None,
        count: bool | None = None,
        delay: Duration | None = None,
        late: Duration = "1h",
    ) -> None:
        self.by = by
        self.over = (over,) if isinstance(over, (str, dt.timedelta)) else tuple(over)
        self.sum = sum
        self.count = sum is None if count is None else count
        self.delay = delay
        self.late = late
        self.single = isinstance(over, (str, dt.timedelta))

    def resolve(self, where: str, source: Topic) -> ArenaSpec:
        """The checked declaration as the runtime wants it."""
        key = source.kept_by(where, self.by)
        time = source.window_time(where)
        if not self.over:
            raise ConfigError(f"{where}: give at least one window, as in over='24h'.")
        windows = tuple(duration_ns(each) for each in self.over)
        if min(windows) == 0:
            raise ConfigError(f"{where}: a window of no length sees nothing.")
        if self.sum is None and not self.count:
            raise ConfigError(f"{where}: neither a sum nor a count is asked for.")
        if self.sum is not None:
            column = source.column(self.sum, "sum")
            if column.kind not in ("int", "money", "bool"):
                raise ConfigError(
                    f"{where}: sum={self.sum!r} is {column.kind}; sums are exact, so they are "
                    "over integers, money or booleans.",
                    "Declare the field as money, or as an integer of its smallest unit.",
                )
        return ArenaSpec(
            key=key,
            time=time,
            value=self.sum,
            windows_ns=windows,
            delay_ns=duration_ns(self.delay) if self.delay is not None else 0,
            late_ns=duration_ns(self.late),
            sums=self.sum is not None,
            counts=self.count,
            single=self.single,
        )


class Processor:
    """Base of processors. Subclasses set `source`, declare state, and define `process`, or for
    one event at a time `on_event`.

    source:   the topic.
    sources:  instead of it: several, of one event type and key, each with progress and state of
              its own, as if there were a processor for each.
    name:     what its progress, results and snapshots are stored under (the class's name).
    version:  of its rules, recorded with every step.
    outputs:  topics that `process` emits events to, in one atomic step with its rows.
    results:  the result tables, so that they exist before the first row (optional: a table is
              created when it is first met).

    One instance serves all partitions of a worker; what depends on events belongs in `state`.
    `process` must be a function of state and events in offset order: no clock, no chance.
    """

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    source: ClassVar[Topic]  # of several the first
    sources: ClassVar[Sequence[Topic]]
    outputs: ClassVar[Sequence[Topic]] = ()
    results: ClassVar[Sequence[type[Table]]] = ()

    states: ClassVar[Mapping[str, Spec]] = {}
    adds_apart: bool = False  # on_event does not add each event to its windows, as we have seen

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__
        if "source" in cls.__dict__:
            if not isinstance(cls.source, Topic):
                raise ConfigError(
                    f"{cls.__name__}.source must be a Topic.", "Several go into `sources`."
                )
            cls.sources = (cls.source,)
        elif "sources" in cls.__dict__:
            cls.sources = _sources(cls.__name__, cls.sources)
            cls.source = cls.sources[0]
        if not hasattr(cls, "source"):  # a base of one's own
            return
        cls.outputs = _outputs(cls)
        cls._choose_style()
        declared = {
            name: value
            for base in reversed(cls.__mro__)
            for name, value in vars(base).items()
            if isinstance(value, Declaration)
        }
        cls.states = {
            name: value.resolve(f"{cls.__name__}.{name}", cls.source)
            for name, value in declared.items()
        }
        if cls.process is Processor.process:
            single.check(cls.__name__, cls.states)

    @classmethod
    def _choose_style(cls) -> None:
        """`process` or `on_event`: the one that stands nearest in the line of classes."""
        for base in cls.__mro__[: cls.__mro__.index(Processor)]:
            styles = {"process", "on_event"} & vars(base).keys()
            if vars(base).get("process") is Processor.process:
                styles.discard("process")  # given to it below: it sees one event at a time
            if len(styles) == 2:
                raise ConfigError(f"{base.__name__} has process and on_event: choose one.")
            if styles == {"on_event"}:
                cls.process = Processor.process  # type: ignore[method-assign]
            if styles:
                return
        raise ConfigError(
            f"{cls.__name__} has a source but no process(self, batch, state).",
            "Define it, or on_event(self, event, state) to see one event at a time.",
        )

    def process(
        self, batch: Batch, state: State, /
    ) -> Rows | Events | list[Rows] | list[Events] | list[Rows | Events] | None:
        """Results of a batch: events of one partition in offset order."""
        return single.run(self, batch, state)

    def on_event(self, event: Any, state: Any, /) -> Row | list[Row] | None:
        """Instead of `process`: called with one event at a time, as plain Python values.

        `event.amount` is an int, text is str, enums are members; `event.offset` is its place.
        `state.accounts[event.account].balance += event.amount` for a Keyed table, and
        `state.spent.add(event)` for a Sliding one: an int, or several as `Totals`. Return
        `Alert.row(…)`, a list of rows, or None.

        Rows, digests and dead letters are those of `process`; one core takes about 220,000
        events/s through it into Postgres (`python -m bench on_event`), several times fewer than
        `process` with kernels.
        """
        raise NotImplementedError

    @classmethod
    def on(cls, frame: pd.DataFrame | np.ndarray, *, splits: Iterable[int] = ()) -> Tables:
        """Try it on a data frame: `LargeSpenders.on(frame)[Alert]` is a data frame of results.

        No broker, no database, one partition; row i is the event at offset i. `splits`: rows that
        begin a new batch, which must not matter. `ledgerstream.testing.drive` shows more.
        """
        from ledgerstream.stream.trial import drive

        return drive(cls, frame, splits=splits).tables

    @classmethod
    def over(cls, topic: Topic) -> type[Processor]:
        """The processor as it runs over one of its topics."""
        if tuple(cls.sources) == (topic,):
            return cls
        body = {
            "source": topic, "name": cls.name, "version": cls.version, "__doc__": cls.__doc__,
            "__module__": cls.__module__, "__qualname__": cls.__qualname__,
        }  # fmt: skip
        return type(cls.__name__, (cls,), body)

    @classmethod
    def check_partitions(cls, partitions: int) -> None:
        """Refuse state that more than one partition would split. Raises ConfigError."""
        if partitions == 1:
            return
        for name, spec in cls.states.items():
            if spec.by != cls.source.key:
                raise ConfigError(
                    f"{cls.__name__}.{name} is kept by {spec.by!r}, but topic "
                    f"{cls.source.name!r} has {partitions} partitions and is keyed by "
                    f"{cls.source.key!r}: one {spec.by} would be split over partitions.",
                    f"Use a topic with one partition, or one keyed by {spec.by!r}.",
                )


def _sources(name: str, given: object) -> tuple[Topic, ...]:
    """The topics that `sources` names. Raises ConfigError."""
    listed = given if isinstance(given, (list, tuple)) else ()
    topics = [topic for topic in listed if isinstance(topic, Topic)]
    if not topics or len(topics) < len(listed):
        raise ConfigError(f"{name}.sources must be a list of topics.")
    forms = {(topic.event, topic.key, topic.time_column) for topic in topics}
    if len(forms) > 1:
        raise ConfigError(
            f"{name}.sources names topics of different event types, keys or times.",
            "Topics of one processor are alike; declare a processor for each that is not.",
        )
    if len({topic.name for topic in topics}) < len(topics):
        raise ConfigError(f"{name}.sources names a topic twice.")
    return tuple(topics)


def _outputs(processor: type[Processor]) -> tuple[Topic, ...]:
    """The topics that `outputs` names. Raises ConfigError."""
    given = processor.outputs
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, Topic) for each in given):
        raise ConfigError(f"{processor.__name__}.outputs must be a list of topics.")
    names = [topic.name for topic in given]
    if len(set(names)) < len(names):
        raise ConfigError(f"{processor.__name__}.outputs names a topic twice.")
    internal = [name for name in names if name.startswith("__")]
    if internal:
        raise ConfigError(
            f"{processor.__name__} emits to {internal[0]!r}, a topic of the broker's own."
        )
    own = {topic.name for topic in processor.sources} & set(names)
    if own:
        raise ConfigError(
            f"{processor.__name__} emits to {min(own)!r}, which it reads: it would never end."
        )
    return tuple(given)


def check_processor(given: object, where: str) -> None:
    """Refuse, with ConfigError, what is no processor class that was declared whole."""
    if isinstance(given, type) and issubclass(given, Processor):
        return
    if isinstance(given, Processor):
        name = type(given).__name__
        raise ConfigError(f"{where} takes the class {name}, not one made of it.", f"Give {name}.")
    raise ConfigError(
        f"{where} takes a processor, a class such as LargeSpenders, not {given!r}.",
        "Import the class and give it as it is, without quotes.",
    )
