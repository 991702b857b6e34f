"""`on_event`: a processor that sees one event at a time, as plain Python values.

    def on_event(self, event, state):
        account = state.accounts[event.account]       # found, or new and zero
        account.balance += event.amount
        if state.spent.add(event) > eur("10000.00"):
            return Alert.row(spent=account.balance)   # the other columns are the event's

It is the same step: rows, digests and dead letters are those of `process` over columns. One core
takes about 220,000 events/s through it, from the log to a row each in Postgres with a keyed row and
a window an event (`python -m bench on_event`); `process` with kernels is several times quicker.

State rows are read for a whole batch before and written back behind it. Sliding totals are made for
all events of a batch at once, on the guess that `on_event` adds each event, once; where it does
not, what was done is undone and each event is added when it is asked for, which takes about 20 µs
an event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ledgerstream.errors import ConfigError, LedgerStreamError
from ledgerstream.events import INT64_MAX, INT64_MIN, Column, Event
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.state import ArenaSpec, BadEvents, KeyedSpec, State
from ledgerstream.stream.tables import Row, Rows, Table

if TYPE_CHECKING:
    from ledgerstream.stream.outputs import Events
    from ledgerstream.stream.processor import Processor, Topic


class EventFault(Exception):
    """`on_event` raised an error, `__cause__`, at the event of this offset."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


class Totals(msgspec.Struct, frozen=True):
    """What one event sees in several windows, in the declared order."""

    sum: tuple[int, ...] | None
    count: tuple[int, ...] | None


class _NotEachOnce(BaseException):
    """`on_event` does not add each event to a window once: nobody should catch this but us."""


class _Unfit(Exception):
    """A value does not fit its column of state."""


def check(where: str, states: Mapping[str, object]) -> None:
    """Raises ConfigError for state that one event at a time cannot use."""
    for name, spec in states.items():
        if not isinstance(spec, (KeyedSpec, ArenaSpec)):
            raise ConfigError(
                f"{where}.{name}: on_event works with Keyed and Sliding state.",
                "Use process(self, batch, state) for windows: they are one call a batch.",
            )


def run(processor: Processor, batch: Batch, state: State) -> list[Rows | Events]:
    """`process` by way of `on_event`.

    Raises BadEvents for an event whose values do not fit a column, EventFault where `on_event`
    raises.
    """
    if not processor.adds_apart:
        try:
            return _run(processor, batch, state, ahead=True)
        except _NotEachOnce:
            processor.adds_apart = True
        except (BadEvents, _Unfit):  # of an event that may not be added, or of which one: see below
            pass
        _begin_again(batch, state)
    try:
        return _run(processor, batch, state, ahead=False)
    except _Unfit:
        _begin_again(batch, state)
    for at in range(len(batch)):
        try:
            _run(processor, batch.take(slice(at, at + 1)), state, ahead=False)
        except _Unfit as error:
            raise BadEvents([int(batch.offset[at])], str(error)) from error
    raise AssertionError("on_event is not a function of event and state")


def _begin_again(batch: Batch, state: State) -> None:
    state.rollback()
    state.begin(len(batch))


def _run(processor: Processor, batch: Batch, state: State, *, ahead: bool) -> list[Rows | Events]:
    view = _View(processor, batch, state, ahead)
    on_event = processor.on_event
    found: dict[type[Table] | Topic, tuple[list[int], list[Mapping[str, Any]]]] = {}
    at = 0
    try:
        for at, event in enumerate(light(batch)):
            view.at, view.event = at, event
            result = on_event(event, view)
            if result is None:
                continue
            for row in (result,) if type(result) is Row else _several(processor, result):
                which, rows = found.setdefault(row.table, ([], []))
                which.append(at)
                rows.append(row.values)
    except LedgerStreamError:
        raise
    except Exception as error:
        raise EventFault(int(batch.offset[at])) from error
    view.settle(len(batch))
    return [
        _rows(of, batch, which, rows) if isinstance(of, type) else _events(of, batch, which, rows)
        for of, (which, rows) in found.items()
    ]


def _several(processor: Processor, result: object) -> Sequence[Row]:
    if isinstance(result, (list, tuple)) and all(type(each) is Row for each in result):
        return result
    raise ConfigError(
        f"{processor.name}.on_event returned {type(result).__name__}.",
        "Return a row (as Alert.row(…) makes it), an event (as a topic's one(…) does), a list of "
        "them, or None.",
    )


# -- events


def light(batch: Batch) -> Iterator[Any]:
    """Each event as an object whose attributes are Python values, with its `offset`.

    Money and times are int, text is str, enums are their members. Raises BadEvents for text that is
    not UTF-8.
    """
    columns = [
        _loaded(column, batch[name], batch) for name, column in batch.source.event.columns().items()
    ]
    return map(_light(batch.source.event), *columns, batch.offset.tolist())


@cache
def _light(event: type[Event]) -> Any:
    return msgspec.defstruct(event.__name__, [*event.columns(), "offset"], frozen=True, gc=False)


def _loaded(column: Column, values: np.ndarray, batch: Batch | None = None) -> list[Any]:
    """A column as `Column.load` gives it, value by value."""
    plain: list[Any] = values.tolist()
    if column.kind == "enum":
        members = {column.store(choice): choice for choice in column.choices}
        return [members.get(each, each) for each in plain]
    if column.kind != "text":
        return plain
    at = 0
    try:
        for at, each in enumerate(plain):
            plain[at] = each.decode()
    except UnicodeDecodeError as error:
        assert batch is not None  # what stands in state was decoded before
        sentence = f"{column.name!r} is not text: {error.reason}."
        raise BadEvents([int(batch.offset[at])], sentence) from error
    return plain


# -- state


class _View:
    """State as `on_event` sees it: each declared name is an attribute."""

    def __init__(self, processor: Processor, batch: Batch, state: State, ahead: bool) -> None:
        self.at = 0  # the event at hand
        self.event: Any = None
        self._settle: list[Callable[[int], None]] = []
        for name, spec in processor.states.items():
            part = getattr(state, name)
            if isinstance(spec, KeyedSpec):
                key = batch.source.event.columns()[spec.by]
                keyed = _Keyed(f"{processor.name}.{name}", spec, part, key, batch)
                self.__dict__[name] = keyed
                self._settle.append(keyed.settle)
            elif isinstance(spec, ArenaSpec) and ahead:
                added = _Ahead(self, spec, part.add(batch))
                self.__dict__[name] = added
                self._settle.append(added.settle)
            elif isinstance(spec, ArenaSpec):
                self.__dict__[name] = _Apart(self, spec, batch, part)
            else:
                raise ConfigError(
                    f"{processor.name}.{name}: on_event sees one event at a time, and what becomes "
                    "of windows is for a batch to say.",
                    "Define process(self, batch, state) instead.",
                )

    def settle(self, events: int) -> None:
        """Each event was seen: write back what became of state."""
        for settle in self._settle:
            settle(events)


class _Keyed(dict[Any, Any]):
    """A `Keyed` table: `table[key]` is its row, whose columns are attributes to read and write.

    What is asked for is kept here and written back by `settle`; as with `at`, a key that is asked
    for has a row from then on.
    """

    def __init__(self, where: str, spec: KeyedSpec, part: Any, key: Column, batch: Batch) -> None:
        super().__init__()
        self._where = where
        self._columns = dict(spec.columns)
        self._part = part
        self._key = key
        self._row: Any = _row_type(tuple(self._columns))
        self._zero = tuple(_python(np.zeros(1, dtype))[0] for dtype in self._columns.values())
        self._known = self._look_up(np.unique(batch[spec.by]))

    def __missing__(self, key: Any) -> Any:
        values = self._known.get(key)
        if values is None:  # no event of this batch has that key
            values = self._look_up(self._keys([key])).get(key, self._zero)
        row = self[key] = self._row(values)
        return row

    def _look_up(self, keys: np.ndarray) -> dict[Any, tuple[Any, ...]]:
        held = self._part.find(keys)
        there = held.row >= 0
        known = dict.fromkeys(_loaded(self._key, keys[~there]), self._zero)
        values = [_python(getattr(held, name)[held.row[there]]) for name in self._columns]
        return known | dict(
            zip(_loaded(self._key, keys[there]), zip(*values, strict=True), strict=True)
        )

    def settle(self, events: int) -> None:
        if not self:
            return
        columns = {
            name: self._column(name, dtype, [getattr(row, name) for row in self.values()])
            for name, dtype in self._columns.items()
        }
        held = self._part.at(self._keys(list(self)))
        for name, values in columns.items():
            getattr(held, name)[held.row] = values

    def _keys(self, keys: list[Any]) -> np.ndarray:
        stored = [self._key.store(key) for key in keys]
        return np.array(stored, None if self._key.kind == "text" else np.int64)

    def _column(self, name: str, dtype: np.dtype, values: list[Any]) -> np.ndarray:
        """Values as the column keeps them. Raises _Unfit, ConfigError for another type."""
        where = f"{self._where}.{name}"
        if dtype.kind == "S":
            texts = [value.encode() for value in values]
            for text in texts:
                if len(text) > dtype.itemsize or b"\0" in text:
                    raise _Unfit(f"{text!r} does not fit {where} ({dtype.itemsize} bytes).")
            return np.array(texts, dtype)
        array = np.array(values)
        if dtype.kind == "i":
            limits = np.iinfo(dtype)
            for value in values if _may_exceed(array, dtype) else ():
                if isinstance(value, int) and not limits.min <= value <= limits.max:
                    raise _Unfit(f"{value} does not fit {where} ({dtype.itemsize} bytes).")
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise ConfigError(
                f"{where} is {dtype.name}, but was given {array.dtype.name}.",
                "Round or compare in the processor, where the rule can be read.",
            )
        return array.astype(dtype)


class _Ahead:
    """A `Sliding` whose totals were made for the whole batch: right if each event is added."""

    def __init__(self, view: _View, spec: ArenaSpec, totals: Any) -> None:
        self._view = view
        self._totals = _totals(spec, totals)
        self._next = 0

    def add(self, event: Any) -> Any:
        at = self._next
        if at != self._view.at or event is not self._view.event:
            raise _NotEachOnce
        self._next = at + 1
        return self._totals[at]

    def settle(self, events: int) -> None:
        if self._next != events:
            raise _NotEachOnce


class _Apart:
    """A `Sliding` to which each event is added when it is asked for."""

    def __init__(self, view: _View, spec: ArenaSpec, batch: Batch, part: Any) -> None:
        self._view = view
        self._spec = spec
        self._batch = batch
        self._part = part

    def add(self, event: Any) -> Any:
        at = self._view.at
        if event is not self._view.event:
            raise ConfigError("add() takes the event that on_event was called with, no other.")
        return _totals(self._spec, self._part.add(self._batch.take(slice(at, at + 1))))[0]


def _totals(spec: ArenaSpec, found: Any) -> list[Any]:
    """Of each event: an int, or `Totals` where there are several."""
    if isinstance(found, np.ndarray):
        totals: list[int] = found.tolist()
        return totals
    none = [None] * len(found.sum if spec.sums else found.count)
    sums = map(tuple, found.sum.tolist()) if spec.sums else none
    counts = map(tuple, found.count.tolist()) if spec.counts else none
    return list(map(Totals, sums, counts))


@cache
def _row_type(names: tuple[str, ...]) -> type:
    def fill(self: Any, values: tuple[Any, ...]) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value)

    return type("StateRow", (), {"__slots__": names, "__init__": fill})


def _python(values: np.ndarray) -> list[Any]:
    plain: list[Any] = values.tolist()
    return [each.decode() for each in plain] if values.dtype.kind == "S" else plain


def _may_exceed(array: np.ndarray, dtype: np.dtype) -> bool:
    """Whether integers among the values may be out of the range of `dtype`."""
    return array.dtype.kind in "Ouf" or array.dtype.itemsize > dtype.itemsize


# -- results


def _rows(
    table: type[Table], batch: Batch, which: list[int], rows: list[Mapping[str, Any]]
) -> Rows:
    of = np.array(which, np.int64)
    columns = {
        name: _result_column(f"{table.__name__}.{name}", values, batch.offset[of])
        for name, values in _given(f"{table.__name__}.row", batch, which, rows).items()
    }
    make = table.upsert if table.key_columns() else table.rows
    return make(batch, of=of, **columns)


def _events(topic: Topic, batch: Batch, which: list[int], rows: list[Mapping[str, Any]]) -> Events:
    of = np.array(which, np.int64)
    kinds = topic.event.columns()
    columns = {}
    for name, values in _given(f"{topic.name}.one", batch, which, rows).items():
        if name in kinds and kinds[name].kind in ("enum", "text"):
            values = [kinds[name].store(value) for value in values]
        columns[name] = _result_column(f"{topic.name}.{name}", values, batch.offset[of])
    return topic.emit(batch, of=of, **columns)


def _given(
    call: str, batch: Batch, which: list[int], rows: list[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """By column, a value for each row: where only some were given one, the event's of that name."""
    given = rows[0].keys()
    if any(row.keys() != given for row in rows):
        given = dict.fromkeys(name for row in rows for name in row).keys()
        for name in given & set(batch.source.event.columns()):
            own = batch[name]
            rows = [row if name in row else {**row, name: own[at].item()}
                    for row, at in zip(rows, which, strict=True)]  # fmt: skip
    columns = {}
    for name in given:
        try:
            columns[name] = [row[name] for row in rows]
        except KeyError:
            raise ConfigError(
                f"{call}: {name} is given in some rows and not in others, and is no field of "
                f"{batch.source.event.__name__}.",
                f"Give it in each: {call}({name}=…).",
            ) from None
    return columns


def _result_column(where: str, values: list[Any], offset: np.ndarray) -> np.ndarray:
    if isinstance(values[0], str):
        return np.array(values, object)
    array = np.array(values)
    if array.dtype.kind in "Ouf":
        for at, value in enumerate(values):
            if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
                raise BadEvents([int(offset[at])], f"{value} does not fit {where} (8 bytes).")
    return array
