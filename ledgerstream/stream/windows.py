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

Windows that follow the events of a key instead of the clock are in `sessions`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy.orm import Mapped, mapped_column

from ledgerstream.errors import ConfigError
from ledgerstream.events import Int32, Timestamp
from ledgerstream.limits import LIMITS
from ledgerstream.stream import windowplan as plan
from ledgerstream.stream.arenakernels import TIME_LIMIT
from ledgerstream.stream.durations import duration_ns
from ledgerstream.stream.reports import Reports
from ledgerstream.stream.state import Declaration
from ledgerstream.stream.tables import Rows, Table
from ledgerstream.stream.windowcolumns import Aggregate, WindowColumn
from ledgerstream.stream.windowstate import Changes, WindowSpec

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Topic

Duration = str | dt.timedelta
_OWN = ("event", "start", "width", "version", "final", "new", "dropped", "key", "columns",
        "unmatched")  # fmt: skip


def First(column: str) -> Aggregate:
    """The value of the window's first event by event time, of those the first by offset."""
    return Aggregate(plan.FIRST, column)


def Last(column: str) -> Aggregate:
    """The value of the window's last event by event time, of those the last by offset."""
    return Aggregate(plan.LAST, column)


def Min(column: str) -> Aggregate:
    """The least value."""
    return Aggregate(plan.MIN, column)


def Max(column: str) -> Aggregate:
    """The greatest value."""
    return Aggregate(plan.MAX, column)


def Sum(column: str) -> Aggregate:
    """The exact sum, in int64; an event that would overflow it is refused."""
    return Aggregate(plan.SUM, column)


def Count() -> Aggregate:
    """How many events."""
    return Aggregate(plan.COUNT)


def Mean(column: str, *, weight: str | None = None) -> Aggregate:
    """Σ value · weight ÷ Σ weight, or the plain mean: a float64, rounded once, of exact sums (128
    bits over 64). NaN where the weights add up to nothing."""
    return Aggregate(plan.MEAN if weight is None else plan.WEIGHTED, column, weight)


def Ewm(column: str, *, halflife: Duration) -> Aggregate:
    """The exponentially weighted mean: an event weighs half as much for each `halflife` that it is
    older, by event time, than the newest of the window. A float64, of integers, money or floats.

    One event after the other in the order of offsets, by +, × and ÷ alone, so the bits are the same
    under every split and on every machine. A late event gets the weight of its age, so the mean is
    that of pandas' `ewm(halflife=…, times=…)` over the events in the order of time, up to rounding.
    An event whose number is not finite is refused.
    """
    return Aggregate(plan.EWM, column, size=duration_ns(halflife))


def Distinct(column: str, *, approximate: bool = False, limit: int | None = None) -> Aggregate:
    """How many different values, of an integer, money, time, enum or text column: an int.

    Exact: each value of a window is kept, in some 80 bytes, until the window goes. An event that
    would bring a window more than `limit` of them (LIMITS.window_values) is refused, and becomes a
    dead letter. approximate: by HyperLogLog instead, 2 KiB a window whatever comes; the standard
    error is 2.3 % of the number of values, and few values are counted nearly exactly.
    """
    if approximate:
        return Aggregate(plan.SKETCH, column, limit=0 if limit is None else -1)
    return Aggregate(plan.DISTINCT, column, limit=LIMITS.window_values if limit is None else limit)


def TopK(column: str, *, k: int, by: Aggregate, limit: int | None = None) -> Aggregate:
    """The k values with the greatest totals, `by` Count() or Sum("amount"), exactly; those of one
    total by value, the lesser first (text by its bytes).

    `top=TopK("terminal", k=2, by=Count())` gives the columns top_1, top_2, the values, and
    top_1_total, top_2_total. Where a window has fewer values, the places behind them are zero
    (empty text) with a total of zero. Values are kept, and limited, as those of `Distinct` are.
    """
    ops = {plan.COUNT: plan.TOP_COUNT, plan.SUM: plan.TOP_SUM}
    op = ops.get(by.op, -1) if isinstance(by, Aggregate) else -1
    weight = by.column if isinstance(by, Aggregate) else None
    return Aggregate(op, column, weight, k, LIMITS.window_values if limit is None else limit)


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
        columns = checked_columns(where, self.by, self.columns, source)
        if self.reports is not None:
            self.reports.check(where, source)
            for column in columns:
                if column.kept.op >= plan.EWM:
                    raise ConfigError(
                        f"{where}.{column.name}: Ewm, Distinct and TopK cannot take an event back, "
                        "as reports would have it.",
                        "Declare such a column in windows of their own, without reports=….",
                    )
        key = source.kept_by(where, self.by)
        return WindowSpec(key, time, over, every, delay, late, columns, self.reports)


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


def checked_columns(
    where: str, by: str, kept: Mapping[str, Any], source: Topic
) -> tuple[WindowColumn, ...]:
    """Declared columns of windows. Raises ConfigError, which names `where`."""
    columns = tuple(
        _column(f"{where}.{name}", by, name, each, source) for name, each in kept.items()
    )
    if not columns:
        raise ConfigError(f"{where}: say what to keep, as in count=Count().")
    names = [name for column in columns for name in column.names]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where}: two columns are called {name!r}.")
    return columns


def _column(where: str, by: str, name: str, kept: Any, source: Topic) -> WindowColumn:
    if name in _OWN or name == by or name.startswith("_"):
        raise ConfigError(f"{where}: a column of windows cannot be named {name!r}.")
    if not isinstance(kept, Aggregate):
        raise ConfigError(f"{where} is {kept!r}.", 'Give an aggregate, as in Max("price").')
    if kept.op < 0:
        raise ConfigError(f'{where}: TopK goes by Count() or by a sum, as in by=Sum("amount").')
    values = kept.op in (plan.SKETCH, plan.DISTINCT, plan.TOP_COUNT, plan.TOP_SUM)
    for role, column in (("column", kept.column), ("weight", kept.weight)):
        if column is None:
            continue
        found = source.column(column, name)
        allowed = {"int", "money", "bool", "enum", "timestamp"}
        if role == "column" and values:
            allowed.add("text")
        elif kept.op == plan.EWM:
            allowed.add("float")
        if found.kind not in allowed:
            raise ConfigError(
                f"{where}: {column!r} is {found.kind}; windows are exact, so they are over "
                "integers, money or times.",
                "Declare the field as an integer of its smallest unit, such as a price in ticks.",
            )
    _check_numbers(where, kept)
    keeps = values or kept.op in (plan.FIRST, plan.LAST, plan.MIN, plan.MAX)
    dtype = source.event.columns()[kept.column].dtype if keeps and kept.column else None
    return WindowColumn(name, kept, dtype)


def _check_numbers(where: str, kept: Aggregate) -> None:
    if kept.op == plan.EWM and kept.size == 0:
        raise ConfigError(f"{where}: a half-life of nothing leaves no weights.")
    if kept.op == plan.SKETCH and kept.limit:
        raise ConfigError(f"{where}: what is approximate has no limit.")
    if kept.op >= plan.KEEPS_VALUES and not 1 <= kept.limit <= LIMITS.window_values_max:
        raise ConfigError(
            f"{where}: limit={kept.limit!r} is not between 1 and {LIMITS.window_values_max:,}."
        )
    top = kept.op in (plan.TOP_COUNT, plan.TOP_SUM)
    if top and not 1 <= kept.size <= LIMITS.window_top_max:
        raise ConfigError(f"{where}: k={kept.size!r} is not between 1 and {LIMITS.window_top_max}.")


class WindowTable(Table):
    """Base of tables of windows: a row a version of each window, by start, width, version and key.

    The key's column is declared with `mapped_column(primary_key=True)`, the others as they are
    called in the declaration of the windows. While a window is open its row, which is not final,
    is replaced in place. The primary key begins with the time, so that rows go to its end,
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
