"""Sessions as they are kept: rows of one partition. Declared by `sessions`, moved by
`sessionkernels`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ledgerstream.limits import LIMITS
from ledgerstream.stream import sessionkernels as kernels
from ledgerstream.stream.arenakernels import FAR_TIME, OK
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.keyed import KeyRows, tags_of
from ledgerstream.stream.state import BadEvents, Dump, Key
from ledgerstream.stream.windowcolumns import WindowColumn
from ledgerstream.stream.windowplan import EVENTS, LAST_TIME
from ledgerstream.stream.windowstate import Changes, KeptWindows, refusal

_HEAP_MIN = 1_024


@dataclass(frozen=True)
class SessionSpec:
    """A checked `Session`: columns by name, lengths in ns. drop: final ones are not corrected."""

    key: Key
    time: str
    gap_ns: int
    delay_ns: int
    late_ns: int
    drop: bool
    columns: tuple[WindowColumn, ...]

    @property
    def by(self) -> str:
        return self.key.name

    def open(self, name: str) -> SessionState:
        return SessionState(name, self)

    def stored(self) -> list[object]:
        """The declaration as far as stored bytes depend on it."""
        return [
            "sessions", *self.key.stored, [self.gap_ns], self.time, self.delay_ns, self.late_ns,
            "drop" if self.drop else "correct", [column.stored() for column in self.columns],
        ]  # fmt: skip


class SessionState(KeptWindows):
    """Sessions of one partition."""

    def __init__(self, name: str, spec: SessionSpec) -> None:
        super().__init__(name, spec, [spec.gap_ns], kernels.LINKS)
        self._spec: SessionSpec = spec
        words = 1 + spec.key.words
        # A row a key that has sessions, with nothing in it but links: it is not stored.
        self._keys = KeyRows(f"{name} keys", words + kernels.KEY_LINKS, words, 1, spec.key.words)
        self._heap = np.empty((_HEAP_MIN, 2), np.int64)  # due · row
        self._due = 0  # entries of it

    def add(self, batch: Batch) -> Changes:
        """Apply the events of a batch in order; what became of the sessions.

        Raises BadEvents for the event whose sum does not fit its words or whose time is beyond the
        year 2116.
        """
        spec, at, n = self._spec, self._at, len(batch)
        times = batch[spec.time].astype(np.int64, copy=False)
        keys = spec.key.of(batch[spec.by])
        values = self._layout.values(batch)
        key = self._keys.resolve(keys)
        clock = self._clock.rows[self._clock.resolve(np.zeros(1, np.int64))[0]]
        seen, greatest = bool(clock[1]), int(clock[2])
        self._calls += 1
        in_time, begins = np.empty(n, np.bool_), np.empty(n, np.int64)
        touched = np.empty(2 * n, np.int64)  # sessions: an event touches two at the most
        some, hits, status, event = kernels.assign(
            times, key, self._keys.rows, self._rows.rows, at, seen, greatest, spec.gap_ns,
            spec.delay_ns, spec.late_ns, spec.drop, in_time, begins, touched, clock[3:],
            self._calls,
        )  # fmt: skip
        if status == FAR_TIME:
            raise BadEvents([int(batch.offset[event])], f"{spec.time!r} is out of range.")
        made = self._resolve(keys.reshape(n, -1), times, begins[:some], np.unique(touched[:hits]))
        room = self._rows.live + 4 * n
        out = np.empty((room, self._rows.content), np.int64)
        out_event, out_new = np.empty(room, np.int64), np.empty(room, np.bool_)
        gone, log = np.empty(self._rows.live, np.int64), np.empty((2, n), np.int64)
        self._reserve(self._due + n)
        finals, rows, over, self._due, greatest, status, event = kernels.apply(
            times, in_time, key, made, self._keys.rows, self._rows.rows, at, self._heap, self._due,
            seen, greatest, spec.gap_ns, spec.delay_ns, spec.late_ns, spec.drop, self._layout.plan,
            values, out, out_event, out_new, gone, log[0], log[1], clock[3:], self._calls,
        )  # fmt: skip
        if status != OK:
            raise BadEvents([int(batch.offset[event])], refusal(status))
        clock[1], clock[2] = 1, greatest
        self._clear(gone[:over], made[made >= 0], key)
        order = self._ordered(out[:finals], out_event[:finals], rows)
        order = order[np.argsort(out_event[order], kind="stable")]
        return self._changes(
            out[order], out_event[order], order < finals, out_new[order], clock[3:].copy()
        )

    def _resolve(
        self, keys: np.ndarray, times: np.ndarray, begins: np.ndarray, touched: np.ndarray
    ) -> np.ndarray:
        """int64[n]: the row of the session that each event may begin, or −1; undo is taken, also of
        the sessions that may change."""
        self._rows.resolve(self._rows.rows[touched, 1 : self._at].copy())
        made = np.full(len(times), -1)
        wanted = np.column_stack([keys[begins], times[begins], np.zeros(len(begins), np.int64)])
        made[begins] = self._rows.resolve(np.ascontiguousarray(wanted))
        return made

    def _clear(self, gone: np.ndarray, made: np.ndarray, key: np.ndarray) -> None:
        """Give up the rows of sessions that are gone or did not begin, and keys without any."""
        rows, content = self._rows.rows, self._rows.content
        keys = np.unique(np.concatenate([key, rows[gone, content + kernels.KEY]]))
        made = np.unique(made)
        unmade = made[rows[made, content + kernels.STANDS] == kernels.UNMADE]
        self._rows.remove(np.concatenate([gone, unmade]))
        head = self._keys.rows[keys, self._keys.content + kernels.HEAD]
        self._keys.remove(keys[head == 0])

    def _reserve(self, entries: int) -> None:
        if entries > len(self._heap):
            grown = np.empty((2 * entries, 2), np.int64)
            grown[: self._due] = self._heap[: self._due]
            self._heap = grown

    def _changes(self, rows: np.ndarray, *rest: np.ndarray) -> Changes:
        changes = super()._changes(rows, *rest)
        there = rows[:, self._at + EVENTS] > 0
        end = np.where(there, self._ends(rows), rows[:, self._at - 2])
        return changes.with_column("end", end)

    def _ends(self, rows: np.ndarray) -> np.ndarray:
        ends: np.ndarray = rows[:, self._at + LAST_TIME] + self._spec.gap_ns
        return ends

    def begin(self, events: int) -> None:
        self._clock.begin(1)
        for table in (self._rows, self._keys):
            table.begin(-(-max(events, 1) // LIMITS.state_keys_per_event_max))

    def seal(self) -> None:
        super().seal()
        self._keys.seal()

    def forget(self) -> None:
        super().forget()
        self._keys.forget()

    def rollback(self) -> None:
        self._keys.rollback()
        super().rollback()

    def load(self, dump: Dump) -> None:
        keys = np.unique(dump["rows"][:, 1 : 1 + self._key_words], axis=0)
        if self._spec.key.words:
            keys = np.column_stack([tags_of(keys), keys])
        self._keys.load(keys)
        super().load(dump)

    def _relink(self) -> None:
        rows, keys = self._rows.rows, self._keys
        which = self._rows.live_rows()
        which = which[np.argsort(rows[which, self._at - 2], kind="stable")]
        names = np.ascontiguousarray(rows[which, 1 : 1 + self._key_words])
        key = keys.find(names if self._spec.key.words else names[:, 0].copy())
        keys.rows[keys.live_rows(), keys.content :] = 0
        self._due = 0
        self._reserve(len(which))
        watermark = self.watermark
        self._due = kernels.relink(
            which, key, keys.rows, rows, self._at, self._heap,
            0 if watermark is None else watermark, self._spec.gap_ns, self._spec.late_ns,
        )  # fmt: skip
