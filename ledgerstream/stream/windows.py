"""Event-time windows by key: tumbling and hopping, final by watermark, corrected when late.

    class Bar(WindowTable):
        symbol: Mapped[str] = mapped_column(primary_key=True)
        open: Mapped[int]
        volume: Mapped[int]

    class Bars(Processor):
        source = Topic("trades", Trade, key="symbol")
        bars = Tumbling(
            by="symbol", over=("1s", "1min"), delay="2s", open=First("price"), volume=Sum("size")
        )

        def process(self, trades, state):
            return Bar.versions(state.bars.add(trades))

Windows of a width w begin at multiples of it (hopping ones at multiples of `every`), counted from
1970 UTC, and hold the events of one key with a time in [start, start + w). The watermark of a
partition is the greatest event time that it has seen, less `delay`. A window is open until the
watermark reaches its end; at that event its result is version 1, and final. A late event, one for a
window that is final, makes another version at once, as long as the watermark is less than `late`
past the end; after that, or with on_late="drop", it is counted as dropped. What an event does
depends on the events before it alone, never on batches.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from sqlalchemy.orm import Mapped, mapped_column

from ledgerstream.errors import ConfigError
from ledgerstream.events import Int32, Timestamp
from ledgerstream.limits import LIMITS
from ledgerstream.stream import windowkernels as kernels
from ledgerstream.stream.arenakernels import OVERFLOW, TIME_LIMIT
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.durations import duration_ns
from ledgerstream.stream.keyed import KeyRows
from ledgerstream.stream.reports import Reports
from ledgerstream.stream.state import BadEvents, Declaration, Dump, Key
from ledgerstream.stream.tables import Rows, Table

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Topic

Duration = str | dt.timedelta
_OWN = ("event", "start", "width", "version", "final", "new", "dropped", "key", "columns",
        "unmatched")  # fmt: skip


@dataclass(frozen=True)
class Aggregate:
    """What a window keeps of its events; made by `First`, `Sum` and so on."""

    op: int
    column: str | None = None
    weight: str | None = None


def First(column: str) -> Aggregate:
    """The value of the window's first event by event time, of those the first by offset."""
    return Aggregate(kernels.FIRST, column)


def Last(column: str) -> Aggregate:
    """The value of the window's last event by event time, of those the last by offset."""
    return Aggregate(kernels.LAST, column)


def Min(column: str) -> Aggregate:
    """The least value."""
    return Aggregate(kernels.MIN, column)


def Max(column: str) -> Aggregate:
    """The greatest value."""
    return Aggregate(kernels.MAX, column)


def Sum(column: str) -> Aggregate:
    """The exact sum, in int64; an event that would overflow it is refused."""
    return Aggregate(kernels.SUM, column)


def Count() -> Aggregate:
    """How many events."""
    return Aggregate(kernels.COUNT)


def Mean(column: str, *, weight: str | None = None) -> Aggregate:
    """Σ value · weight ÷ Σ weight, or the plain mean: a float64, rounded once, of exact sums (128
    bits over 64). NaN where the weights add up to nothing."""
    return Aggregate(kernels.MEAN if weight is None else kernels.WEIGHTED, column, weight)


class Hopping(Declaration):
    """Windows of `over` that begin `every` so often, so that an event is in several.

    by:       the key column, an integer or text.
    over:     one length, or several.
    delay:    how far the watermark stays behind the greatest event time.
    late:     how long after a window's end a late event still corrects it.
    on_late:  "correct": a new version of the result; "drop": counted, and left out.
    reports:  the events are reports, which later ones correct and cancel: `Reports`. Such a report
              changes each window that it concerns as a late event does: one that is open in place,
              one that is final by another version, as long as that window is kept; where it is
              gone, that counts as dropped. A window that has lost all of its events stays, with
              zeros (a mean is NaN). Events are kept until their last window goes.
    The rest are columns: names with what they keep, as in `high=Max("price")`.
    """

    def __init__(
        self,
        *,
        by: str,
        over: Duration | Sequence[Duration],
        every: Duration | None,
        delay: Duration = "0s",
        late: Duration = "1min",
        on_late: Literal["correct", "drop"] = "correct",
        reports: Reports | None = None,
        **columns: Aggregate,
    ) -> None:
        self.by = by
        self.over = (over,) if isinstance(over, (str, dt.timedelta)) else tuple(over)
        self.every = every
        self.delay = delay
        self.late = late
        self.on_late = on_late
        self.reports = reports
        self.columns = columns

    def resolve(self, where: str, source: Topic) -> WindowSpec:
        """The checked declaration as the runtime wants it."""
        time = source.window_time(where)
        if not self.over:
            raise ConfigError(f"{where}: give at least one window, as in over='1min'.")
        over = tuple(duration_ns(each) for each in self.over)
        every = over if self.every is None else (duration_ns(self.every),) * len(over)
        if min(*over, *every) == 0:
            raise ConfigError(f"{where}: a window of no length sees nothing.")
        if len(set(over)) < len(over):
            raise ConfigError(f"{where}: over={self.over!r} names a length twice.")
        if any(step > width for step, width in zip(every, over, strict=True)):
            raise ConfigError(
                f"{where}: every={self.every!r} is longer than a window: events between two "
                "windows would be in none.",
                "Give every at most the shortest of over.",
            )
        if self.on_late not in ("correct", "drop"):
            raise ConfigError(f"{where}: on_late is 'correct' or 'drop', not {self.on_late!r}.")
        delay = duration_ns(self.delay)
        late = duration_ns(self.late) if self.on_late == "correct" else 0
        lives = [width + delay + late for width in over]
        slots = max(life // step for life, step in zip(lives, every, strict=True))
        if max(lives) >= TIME_LIMIT or slots > LIMITS.window_slots_max:
            raise ConfigError(
                f"{where}: {slots:,} windows of a key would be live at once; at most "
                f"{LIMITS.window_slots_max:,} are.",
                "Make delay or late shorter, or the windows longer.",
            )
        columns = tuple(
            self._column(f"{where}.{name}", name, kept, source)
            for name, kept in self.columns.items()
        )
        if not columns:
            raise ConfigError(f"{where}: say what to keep, as in count=Count().")
        if self.reports is not None:
            self.reports.check(where, source)
        key = source.kept_by(where, self.by)
        return WindowSpec(key, time, over, every, delay, late, columns, self.reports)

    def _column(self, where: str, name: str, kept: Any, source: Topic) -> WindowColumn:
        if name in _OWN or name == self.by or name.startswith("_"):
            raise ConfigError(f"{where}: a column of windows cannot be named {name!r}.")
        if not isinstance(kept, Aggregate):
            raise ConfigError(f"{where} is {kept!r}.", 'Give an aggregate, as in Max("price").')
        for column in (kept.column, kept.weight):
            if column is None:
                continue
            found = source.column(column, name)
            if found.kind not in ("int", "money", "bool", "enum", "timestamp"):
                raise ConfigError(
                    f"{where}: {column!r} is {found.kind}; windows are exact, so they are over "
                    "integers, money or times.",
                    "Declare the field as an integer of its smallest unit, such as a price in "
                    "ticks.",
                )
        keeps = kept.op in (kernels.FIRST, kernels.LAST, kernels.MIN, kernels.MAX)
        dtype = source.event.columns()[kept.column].dtype if keeps and kept.column else None
        return WindowColumn(name, kept, dtype)


class Tumbling(Hopping):
    """Windows that follow one another: each event is in one of each length. See `Hopping`."""

    def __init__(
        self,
        *,
        by: str,
        over: Duration | Sequence[Duration],
        delay: Duration = "0s",
        late: Duration = "1min",
        on_late: Literal["correct", "drop"] = "correct",
        reports: Reports | None = None,
        **columns: Aggregate,
    ) -> None:
        super().__init__(
            by=by, over=over, every=None, delay=delay, late=late, on_late=on_late,
            reports=reports, **columns,
        )  # fmt: skip


@dataclass(frozen=True)
class WindowColumn:
    """A declared column; `dtype` of the values that it picks, None for sums, counts and means."""

    name: str
    kept: Aggregate
    dtype: np.dtype | None

    @property
    def words(self) -> int:
        """Of a row that it takes: a mean's sum has two, the weights a third."""
        return {kernels.COUNT: 0, kernels.MEAN: 2, kernels.WEIGHTED: 3}.get(self.kept.op, 1)


@dataclass(frozen=True)
class WindowSpec:
    """A checked `Tumbling` or `Hopping`: columns by name, lengths in ns."""

    key: Key
    time: str
    over_ns: tuple[int, ...]
    every_ns: tuple[int, ...]
    delay_ns: int
    late_ns: int
    columns: tuple[WindowColumn, ...]
    reports: Reports | None = None

    @property
    def by(self) -> str:
        return self.key.name

    def open(self, name: str) -> WindowState:
        if self.reports is None:
            return WindowState(name, self)
        from ledgerstream.stream.reported import ReportedWindows

        return ReportedWindows(name, self, self.reports)

    def stored(self) -> list[object]:
        """The declaration as far as stored bytes depend on it."""
        kept = [[c.name, c.kept.op, c.kept.column, c.kept.weight] for c in self.columns]
        return [
            "windows", *self.key.stored, self.time, list(self.over_ns), list(self.every_ns),
            self.delay_ns, self.late_ns, kept,
            *([] if self.reports is None else [self.reports.stored()]),
        ]  # fmt: skip


@dataclass(frozen=True)
class Changes:
    """What a batch did to windows: rows [n] in the order of the events that caused them.

    Each final version that the batch caused; then, of windows that it touched and that are open at
    its end, how they stand: version 1, not final.

    event:    int64[n], the index of the event in the batch.
    key:      int64[n] or bytes[n]; also under the name of the key's column.
    start:    int64[n], ns since 1970 UTC; `width`: int64[n], ns.
    version:  int32[n], 1 and up. `final`: bool[n].
    new:      bool[n], whether no batch before has shown that version of the window.
    dropped:  int64[lengths of `over`], how often an event came too late for a window of that
              length, since the beginning.
    unmatched: how often a report was left out that names nothing, since the beginning.
    The aggregates are attributes too, under their names.
    """

    event: np.ndarray
    start: np.ndarray
    width: np.ndarray
    version: np.ndarray
    final: np.ndarray
    new: np.ndarray
    dropped: np.ndarray
    by: str
    columns: Mapping[str, np.ndarray]
    unmatched: int = 0

    def __len__(self) -> int:
        return len(self.event)

    @property
    def key(self) -> np.ndarray:
        return self.columns[self.by]

    def __getattr__(self, name: str) -> np.ndarray:
        columns = self.__dict__.get("columns", {})
        if name not in columns:
            raise AttributeError(f"these windows have no column {name!r}; {', '.join(columns)}")
        column: np.ndarray = columns[name]
        return column


class WindowTable(Table):
    """Base of tables of windows: a row a version of each window, by start, width, version and key.

    The key's column is declared with `mapped_column(primary_key=True)`, the others as they are
    called in the declaration of the windows. While a window is open its row, version 1 and not
    final, is replaced in place. The primary key begins with the time, so that rows go to its end,
    which makes Postgres twice as quick at them; to ask by key, declare an Index besides.
    """

    __abstract__ = True

    start: Mapped[Timestamp] = mapped_column(primary_key=True, sort_order=-4)
    width: Mapped[int] = mapped_column(primary_key=True, sort_order=-3)  # ns
    version: Mapped[Int32] = mapped_column(primary_key=True, sort_order=-2)
    final: Mapped[bool] = mapped_column(sort_order=-1)

    @classmethod
    def versions(cls, changes: Changes, **columns: Any) -> Rows:
        """The rows of `changes`; `columns` are arrays [len(changes)] or scalars besides.

        Raises ConfigError where a column of the table is in neither, or has another length.
        """
        if changes.by not in cls.key_columns():
            raise ConfigError(
                f"{cls.__name__} does not have {changes.by!r} in its key, and windows are kept by "
                "it.",
                f"Declare {changes.by}: Mapped[…] = mapped_column(primary_key=True).",
            )
        own = {
            "start": changes.start, "width": changes.width, "version": changes.version,
            "final": changes.final,
        }  # fmt: skip
        given = {**changes.columns, **own, **columns}
        wanted = {name: value for name, value in given.items() if name in cls.result_columns()}
        rows = cls._of_events("versions", changes.event, {**wanted, **columns})
        return replace(rows, new=changes.new)


class WindowState:
    """Windows of one partition. Frames as in `KeyRows`."""

    LINKS = kernels.LINKS
    COUNTERS = 0  # words of the clock besides

    def __init__(self, name: str, spec: WindowSpec) -> None:
        self._spec = spec
        key_words = max(spec.key.words, 1)
        self._at = 1 + key_words + 2  # the first word after key, start and width
        places, words = [], kernels.AGGREGATES
        for column in spec.columns:
            places.append(words)
            words += column.words
        content = self._at + words
        self._rows = KeyRows(name, content + self.LINKS, content, 1, key_words + 2)
        # One row: 0 · whether there was an event · the greatest time · dropped, a width.
        clock_words = 3 + len(spec.over_ns) + self.COUNTERS
        self._clock = KeyRows(f"{name} clock", clock_words, clock_words)
        self._over = np.array(spec.over_ns, np.int64)
        self._every = np.array(spec.every_ns, np.int64)
        self._each = int((-(-self._over // self._every)).sum())  # windows of an event
        lives = (self._over + spec.delay_ns + spec.late_ns) // self._every + 2
        self._slots = np.array([1 << int(life - 1).bit_length() for life in lives], np.int64)
        self._ring_at = np.cumsum(self._slots) - self._slots
        self._rings = np.zeros(int(self._slots.sum()), np.int64)
        used = [c for column in spec.columns for c in (column.kept.column, column.kept.weight)]
        self._used = sorted({name for name in used if name is not None})
        index = {name: at for at, name in enumerate(self._used)} | {None: 0}
        self._ops = np.array([column.kept.op for column in spec.columns], np.int64)
        self._columns = np.array([index[c.kept.column] for c in spec.columns], np.int64)
        self._weights = np.array([index[c.kept.weight] for c in spec.columns], np.int64)
        self._places = np.array(places, np.int64)
        self._calls = 0  # of `add`

    def __len__(self) -> int:
        """Windows that are kept."""
        return self._rows.live

    @property
    def watermark(self) -> int | None:
        """The greatest event time less `delay`, ns; None before the first event."""
        clock = self._clock.dump()
        return int(clock[0, 2]) - self._spec.delay_ns if len(clock) and clock[0, 1] else None

    def add(self, batch: Batch) -> Changes:
        """Apply the events of a batch in order; what became of the windows.

        Raises BadEvents for the event whose sum does not fit its words or whose time is beyond the
        year 2116.
        """
        spec = self._spec
        n = len(batch)
        times = batch[spec.time].astype(np.int64, copy=False)
        keys = spec.key.of(batch[spec.by]).reshape(n, -1)
        clock = self._clock.rows[self._clock.resolve(np.zeros(1, np.int64))[0]]
        seen, greatest = bool(clock[1]), int(clock[2])
        events = np.empty(n * self._each, np.int64)
        windows = np.empty((n * self._each, keys.shape[1] + 2), np.int64)
        pairs, status, at = kernels.assign(
            times, keys, seen, greatest, spec.delay_ns, spec.late_ns, self._over, self._every,
            events, windows, clock[3:],
        )  # fmt: skip
        if status:
            raise BadEvents([int(batch.offset[at])], f"{spec.time!r} is out of range for a window.")
        events = events[:pairs]
        row = self._rows.resolve(windows[:pairs])
        values = np.empty((max(len(self._used), 1), n), np.int64)
        for into, name in zip(values, self._used, strict=False):
            into[:] = batch[name]
        most = self._rows.live + pairs
        out = np.empty((most + pairs, self._rows.content), np.int64)
        out_event, expired = np.empty(most + pairs, np.int64), np.empty(most, np.int64)
        out_new = np.empty(most + pairs, np.bool_)
        self._calls += 1
        finals, made, gone, greatest, status, at = kernels.accumulate(
            times, events, row, self._rows.rows, self._at, seen, greatest, spec.delay_ns,
            spec.late_ns, self._over, self._every, self._rings, self._ring_at, self._slots,
            self._ops, values, self._columns, self._weights, self._places, out, out_event, out_new,
            expired, self._calls,
        )  # fmt: skip
        if status == OVERFLOW:
            raise BadEvents([int(batch.offset[at])], "a sum of its window no longer fits.")
        clock[1], clock[2] = 1, greatest
        self._rows.remove(expired[:gone].copy())
        order = self._ordered(out[:finals], out_event[:finals], made)
        order = order[np.argsort(out_event[order], kind="stable")]
        final, new = order < finals, out_new[order]
        return self._changes(out[order], out_event[order], final, new, clock[3:].copy())

    def _ordered(self, finals: np.ndarray, event: np.ndarray, made: int) -> np.ndarray:
        """Final rows by event, width, end and key; then those that are open."""
        keys = [finals[:, word] for word in range(self._at - 3, 0, -1)]
        start, width = finals[:, self._at - 2], finals[:, self._at - 1]
        return np.concatenate(
            [np.lexsort((*keys, start, width, event)), np.arange(len(event), made)]
        )

    def _changes(
        self,
        rows: np.ndarray,
        event: np.ndarray,
        final: np.ndarray,
        new: np.ndarray,
        dropped: np.ndarray,
    ) -> Changes:
        at = self._at
        columns = {self._spec.by: self._spec.key.read(rows[:, 1:], 0).astype(self._spec.key.dtype)}
        for column, place in zip(self._spec.columns, self._places, strict=True):
            columns[column.name] = self._read(rows, column, at + int(place))
        return Changes(
            event,
            rows[:, at - 2].copy(),
            self._over[rows[:, at - 1]],
            (rows[:, at + kernels.CORRECTIONS] + 1).astype(np.int32),
            final,
            new,
            dropped,
            self._spec.by,
            columns,
        )

    def _read(self, rows: np.ndarray, column: WindowColumn, place: int) -> np.ndarray:
        if column.kept.op == kernels.COUNT:
            return rows[:, self._at + kernels.EVENTS].copy()
        if column.words == 1:
            return rows[:, place].astype(column.dtype or np.int64)
        weight = place + 2 if column.words == 3 else self._at + kernels.EVENTS
        low, high, by = (rows[:, word].copy() for word in (place, place + 1, weight))
        result = np.empty(len(rows), np.float64)
        kernels.means(low, high, by, result)
        return result

    def columns(self) -> dict[str, np.ndarray]:
        """The content for people: a row a window that is kept. Copies."""
        rows = self._rows.dump()
        clock = self._clock.dump()
        greatest = int(clock[0, 2]) if len(clock) else 0
        final = rows[:, self._at - 2] + self._over[rows[:, self._at - 1]]
        final = final <= greatest - self._spec.delay_ns
        zeros = np.zeros(len(rows), np.int64)
        found = self._changes(rows, zeros, final, zeros > 0, clock[:, 3:].ravel())
        own = {"start": found.start, "width": found.width, "version": found.version}
        return {self._spec.by: found.key, **own, "final": final, **found.columns}

    def digests(self) -> list[np.ndarray]:
        return [self._rows.digest, self._clock.digest]

    def begin(self, events: int) -> None:
        room = LIMITS.state_keys_per_event_max
        self._rows.begin(-(-max(events, 1) * self._each // room))
        self._clock.begin(1)

    def seal(self) -> None:
        self._rows.seal()
        self._clock.seal()

    def forget(self) -> None:
        self._rows.forget()
        self._clock.forget()

    def rollback(self) -> None:
        self._rows.rollback()
        self._clock.rollback()
        self._relink()

    def dump(self) -> Dump:
        return {"rows": self._rows.dump(), "clock": self._clock.dump()}

    def freeze(self) -> Callable[[], Dump]:
        rows, clock = self._rows.freeze(), self._clock.dump()
        return lambda: {"rows": rows(), "clock": clock}

    def load(self, dump: Dump) -> None:
        self._rows.load(dump["rows"])
        self._clock.load(dump["clock"])
        self._relink()

    def _relink(self) -> None:
        live = self._rows.live_rows()
        kernels.relink(
            self._rows.rows, live, self._rows.content, self._at, self._every, self._rings,
            self._ring_at, self._slots,
        )  # fmt: skip
