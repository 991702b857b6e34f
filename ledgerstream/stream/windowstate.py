"""Event-time windows as they are kept: rows of one partition, and what a batch did to them.

The declarations, and what watermark and lateness mean, are in `windows`; what happens event by
event is in `windowkernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ledgerstream.limits import LIMITS
from ledgerstream.stream import windowkernels as kernels
from ledgerstream.stream.arenakernels import OK, OVERFLOW
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.keyed import KeyRows
from ledgerstream.stream.reports import Reports
from ledgerstream.stream.state import BadEvents, Dump, Key
from ledgerstream.stream.valuekernels import CROWDED
from ledgerstream.stream.windowcolumns import Layout, WindowColumn
from ledgerstream.stream.windowplan import AGGREGATES, CORRECTIONS
from ledgerstream.stream.windowvalues import WindowValues

if TYPE_CHECKING:
    from ledgerstream.stream.sessionstate import SessionSpec


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
        kept = [column.stored() for column in self.columns]
        return [
            "windows", *self.key.stored, self.time, list(self.over_ns), list(self.every_ns),
            self.delay_ns, self.late_ns, kept,
            *([] if self.reports is None else [self.reports.stored()]),
        ]  # fmt: skip


@dataclass(frozen=True)
class Changes:
    """What a batch did to windows: rows [n] in the order of the events that caused them.

    Each final version that the batch caused; and, of windows that it touched and that are open at
    its end, how they stand: the version that they will be, not final (1, but for sessions that a
    late event has opened again).

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

    def with_column(self, name: str, values: np.ndarray) -> Changes:
        """The same with one column more, the first after the key."""
        rest = {each: column for each, column in self.columns.items() if each != self.by}
        return replace(self, columns={self.by: self.key, name: values, **rest})

    def __getattr__(self, name: str) -> np.ndarray:
        columns = self.__dict__.get("columns", {})
        if name not in columns:
            raise AttributeError(f"these windows have no column {name!r}; {', '.join(columns)}")
        column: np.ndarray = columns[name]
        return column


class KeptWindows:
    """Rows of windows of one partition, and its clock. Frames as in `KeyRows`.

    key · start · number of the width, then what `windowplan` says, the columns, and links.
    """

    def __init__(
        self,
        name: str,
        spec: WindowSpec | SessionSpec,
        widths: Sequence[int],
        links: int,
        counters: int = 0,
    ) -> None:
        self._spec = spec
        self._key_words = max(spec.key.words, 1)
        self._at = 1 + self._key_words + 2  # the first word after key, start and width
        self._layout = Layout(spec.columns)
        content = self._at + AGGREGATES + self._layout.words
        self._rows = KeyRows(name, content + links, content, 1, self._key_words + 2)
        # One row: 0 · whether there was an event · the greatest time · dropped, a width · counters.
        clock_words = 3 + len(widths) + counters
        self._clock = KeyRows(f"{name} clock", clock_words, clock_words)
        self._over = np.array(widths, np.int64)
        self._parts = {"rows": self._rows, "clock": self._clock}
        self._calls = 0  # of `add`

    def __len__(self) -> int:
        """Windows that are kept."""
        return self._rows.live

    @property
    def watermark(self) -> int | None:
        """The greatest event time less `delay`, ns; None before the first event."""
        clock = self._clock.dump()
        return int(clock[0, 2]) - self._spec.delay_ns if len(clock) and clock[0, 1] else None

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
        columns |= self._layout.read(rows, at)
        return Changes(
            event,
            rows[:, at - 2].copy(),
            self._over[rows[:, at - 1]],
            (rows[:, at + CORRECTIONS] + 1).astype(np.int32),
            final,
            new,
            dropped,
            self._spec.by,
            columns,
        )

    def _ends(self, rows: np.ndarray) -> np.ndarray:
        """int64[n]: when windows are final, by the watermark."""
        ends: np.ndarray = rows[:, self._at - 2] + self._over[rows[:, self._at - 1]]
        return ends

    def columns(self) -> dict[str, np.ndarray]:
        """The content for people: a row a window that is kept. Copies."""
        rows = self._rows.dump()
        clock = self._clock.dump()
        greatest = int(clock[0, 2]) if len(clock) else 0
        final = self._ends(rows) <= greatest - self._spec.delay_ns
        zeros = np.zeros(len(rows), np.int64)
        found = self._changes(rows, zeros, final, zeros > 0, clock[:, 3:].ravel())
        own = {"start": found.start, "width": found.width, "version": found.version}
        return {self._spec.by: found.key, **own, "final": final, **found.columns}

    def digests(self) -> list[np.ndarray]:
        return [part.digest for part in self._parts.values()]

    def seal(self) -> None:
        for part in self._parts.values():
            part.seal()

    def forget(self) -> None:
        for part in self._parts.values():
            part.forget()

    def rollback(self) -> None:
        for part in self._parts.values():
            part.rollback()
        self._relink()

    def dump(self) -> Dump:
        return {name: part.dump() for name, part in self._parts.items()}

    def freeze(self) -> Callable[[], Dump]:
        parts = {name: part.freeze() for name, part in self._parts.items()}
        return lambda: {name: part() for name, part in parts.items()}

    def load(self, dump: Dump) -> None:
        for name, part in self._parts.items():
            part.load(dump[name])
        self._relink()

    def _relink(self) -> None:
        """Make anew what is not stored."""
        raise NotImplementedError


class WindowState(KeptWindows):
    """Tumbling or hopping windows of one partition."""

    LINKS = kernels.LINKS
    COUNTERS = 0  # words of the clock besides

    def __init__(self, name: str, spec: WindowSpec) -> None:
        super().__init__(name, spec, spec.over_ns, self.LINKS, self.COUNTERS)
        self._spec: WindowSpec = spec
        self._every = np.array(spec.every_ns, np.int64)
        self._each = int((-(-self._over // self._every)).sum())  # windows of an event
        lives = (self._over + spec.delay_ns + spec.late_ns) // self._every + 2
        self._slots = np.array([1 << int(life - 1).bit_length() for life in lives], np.int64)
        self._ring_at = np.cumsum(self._slots) - self._slots
        self._rings = np.zeros(int(self._slots.sum()), np.int64)
        self._values = WindowValues(name, self._layout, self._key_words + 2)
        if len(self._layout.sets):
            self._parts["values"] = self._values.table

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
        values = self._layout.values(batch)
        member = self._values.resolve(events, windows[:pairs], values)
        most = self._rows.live + pairs
        out = np.empty((most + pairs, self._rows.content), np.int64)
        out_event, expired = np.empty(most + pairs, np.int64), np.empty(most, np.int64)
        out_new = np.empty(most + pairs, np.bool_)
        self._calls += 1
        finals, made, gone, greatest, status, at = kernels.accumulate(
            times, events, row, self._rows.rows, self._at, seen, greatest, spec.delay_ns,
            spec.late_ns, self._over, self._every, self._rings, self._ring_at, self._slots,
            self._layout.plan, values, self._layout.sets, self._values.table.rows, member,
            self._values.value_at, out, out_event, out_new, expired, self._calls,
        )  # fmt: skip
        if status != OK:
            raise BadEvents([int(batch.offset[at])], refusal(status))
        clock[1], clock[2] = 1, greatest
        gone_rows = expired[:gone].copy()
        self._values.remove_of(gone_rows, self._rows.rows, self._at, self._link)
        self._rows.remove(gone_rows)
        order = self._ordered(out[:finals], out_event[:finals], made)
        order = order[np.argsort(out_event[order], kind="stable")]
        final, new = order < finals, out_new[order]
        return self._changes(out[order], out_event[order], final, new, clock[3:].copy())

    def begin(self, events: int) -> None:
        pairs = max(events, 1) * self._each
        self._rows.begin(-(-pairs // LIMITS.state_keys_per_event_max))
        self._clock.begin(1)
        if len(self._layout.sets):
            self._values.begin(pairs)

    def load(self, dump: Dump) -> None:
        super().load(dump)
        if len(self._layout.sets):
            self._values.relink(self._rows, self._link)

    @property
    def _link(self) -> int:
        """The word of a row from which its values are chained."""
        return self._rows.content + kernels.VALUES

    def _relink(self) -> None:
        live = self._rows.live_rows()
        kernels.relink(
            self._rows.rows, live, self._rows.content, self._at, self._every, self._rings,
            self._ring_at, self._slots,
        )  # fmt: skip


def refusal(status: int) -> str:
    """Why an event was refused."""
    if status == CROWDED:
        return "its window has as many different values as it may have."
    assert status == OVERFLOW
    return "a sum of its window no longer fits."
