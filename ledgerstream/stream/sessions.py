"""Event-time sessions by key: runs of events with pauses between them.

    class Visit(WindowTable):
        customer: Mapped[int] = mapped_column(primary_key=True)
        end: Mapped[Timestamp]
        payments: Mapped[int]
        spent: Mapped[EUR]

    class Visits(Processor):
        source = Topic("payments", Payment, key="customer")
        visits = Session(by="customer", gap="30m", payments=Count(), spent=Sum("amount"))

        def process(self, payments, state):
            return Visit.versions(state.visits.add(payments))

A session is a maximal run of events of one key in which neighbours, by time, are less than `gap`
apart. It goes by its `start`, the time of its first event, has `gap` as its width, and ends at the
time of its last event + gap, which is the column `end`.

Watermark, versions and corrections are as in `windows`. A session is open until the watermark
reaches its end; at that event its result is final, as version 1. An event is late, and dropped, if
the watermark is `late` or more past the end that a session of it alone would have; every other
event is in the session that it belongs to. So sessions, as they stand in the end, are those of the
events that were not dropped, in whatever order they came:

- one that extends a session that is final makes another version of it, at once; or, if the session
  is open again now, when the watermark has passed its new end.
- one before the start of a session, by less than `gap`, is the start of another one that takes it
  in; one between two sessions joins them into the earlier. What was taken in gets one more version,
  final, without events: zeros, NaN for a mean, an `end` that is its start. So the sessions are, of
  each key and start, the newest version, where it has events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ledgerstream.errors import ConfigError
from ledgerstream.limits import LIMITS
from ledgerstream.stream.arenakernels import TIME_LIMIT
from ledgerstream.stream.durations import duration_ns
from ledgerstream.stream.sessionstate import SessionSpec
from ledgerstream.stream.state import Declaration
from ledgerstream.stream.windowcolumns import Aggregate
from ledgerstream.stream.windows import Duration, checked_columns

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Topic


class Session(Declaration):
    """Runs of events of a key, neighbours less than `gap` apart. See the module's text.

    by:       the key column, an integer or text.
    gap:      the pause that ends a session.
    delay:    how far the watermark stays behind the greatest event time.
    late:     how far the watermark may be past an event's time + gap.
    on_late:  "correct": a new version of the result; "drop": an event that comes when the watermark
              has passed its time + gap, or that would change a session that is final, is counted,
              and left out.
    The rest are columns, as in `Hopping`; not those that keep values one by one (an exact Distinct,
    TopK), which sessions that join could not unite.
    """

    def __init__(
        self,
        *,
        by: str,
        gap: Duration,
        delay: Duration = "0s",
        late: Duration = "1min",
        on_late: Literal["correct", "drop"] = "correct",
        **columns: Aggregate,
    ) -> None:
        self.by = by
        self.gap = gap
        self.delay = delay
        self.late = late
        self.on_late = on_late
        self.columns = columns

    def resolve(self, where: str, source: Topic) -> SessionSpec:
        """The checked declaration as the runtime wants it."""
        time = source.window_time(where)
        gap, delay = duration_ns(self.gap), duration_ns(self.delay)
        if gap == 0:
            raise ConfigError(f"{where}: with a gap of nothing each event is alone.")
        if self.on_late not in ("correct", "drop"):
            raise ConfigError(f"{where}: on_late is 'correct' or 'drop', not {self.on_late!r}.")
        late = duration_ns(self.late) if self.on_late == "correct" else 0
        kept = 2 * gap + delay + late
        if kept >= TIME_LIMIT or kept // gap > LIMITS.window_slots_max:
            raise ConfigError(
                f"{where}: {kept // gap:,} sessions of a key could be live at once; at most "
                f"{LIMITS.window_slots_max:,} are.",
                "Make delay or late shorter, or the gap longer.",
            )
        columns = checked_columns(where, self.by, self.columns, source)
        for column in columns:
            if column.keeps_values:
                raise ConfigError(
                    f"{where}.{column.name}: an exact Distinct or a TopK keeps values one by one, "
                    "and sessions that join could not unite them.",
                    'Use Distinct("…", approximate=True), or Tumbling windows.',
                )
            if "end" in column.names:
                raise ConfigError(f"{where}: a column of sessions cannot be named 'end'.")
        key = source.kept_by(where, self.by)
        drop = self.on_late == "drop"
        return SessionSpec(key, time, gap, delay, late, drop, columns)
