"""Windows over reports: the events are kept one by one, so that later reports can change them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ledgerstream.stream import reportkernels as kernels
from ledgerstream.stream.arenakernels import OVERFLOW
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.keyed import KeyRows
from ledgerstream.stream.reports import ReportKind, Reports
from ledgerstream.stream.state import BadEvents
from ledgerstream.stream.windowstate import Changes, WindowSpec, WindowState


class ReportedWindows(WindowState):
    """`WindowState` with a row for each event that is in a window; see `reportkernels`."""

    LINKS = kernels.REPORT_LINKS
    COUNTERS = 1  # reports that named nothing

    def __init__(self, name: str, spec: WindowSpec, reports: Reports) -> None:
        super().__init__(name, spec)
        self._reports = reports
        hooks = -(-self._over // self._every)
        self._bases = np.cumsum(hooks) - hooks
        key_words = max(spec.key.words, 1) + 1
        self._trade_at = 1 + key_words
        content = self._trade_at + kernels.VALUES + self._layout.given_words
        words = content + kernels.HOOKS + 3 * self._each
        self._trades = KeyRows(f"{name} reports", words, content, 1, key_words)
        self._parts["reports"] = self._trades

    def add(self, batch: Batch) -> Changes:
        """Apply the reports of a batch in order; what became of the windows.

        Raises BadEvents as `WindowState.add` does, and with unknown="dead" for reports that name
        nothing that is kept.
        """
        spec, reports, n = self._spec, self._reports, len(batch)
        times = batch[spec.time].astype(np.int64, copy=False)
        kinds = batch[reports.kind].astype(np.int64)
        keys = spec.key.of(batch[spec.by]).reshape(n, -1)
        clock = self._clock.rows[self._clock.resolve(np.zeros(1, np.int64))[0]]
        seen, greatest = bool(clock[1]), int(clock[2])
        events, hooks = np.empty(n * self._each, np.int64), np.empty(n * self._each, np.int64)
        windows = np.empty((n * self._each, keys.shape[1] + 2), np.int64)
        pairs, status, at = kernels.assign(
            times, kinds, keys, seen, greatest - spec.delay_ns, spec.late_ns, self._over,
            self._every, self._bases, events, windows, hooks,
        )  # fmt: skip
        if status:
            raise BadEvents([int(batch.offset[at])], f"{spec.time!r} is out of range for a window.")
        kept = self._kept(batch, keys, kinds)
        row = self._rows.resolve(windows[:pairs])
        given = np.ascontiguousarray(self._layout.values(batch)[: self._layout.given_words].T)
        amended = int((kinds != ReportKind.NEW).sum()) * self._each
        most = self._rows.live + pairs
        room = 2 * most + pairs + amended
        out = np.empty((room, self._rows.content), np.int64)
        out_event, out_new = np.empty(room, np.int64), np.empty(room, np.bool_)
        expired, ended = np.empty(most, np.int64), np.empty(self._trades.live + 3 * n, np.int64)
        unmatched = np.empty(n, np.int64)
        log = np.empty((2, pairs + amended), np.int64)
        self._calls += 1
        finals, made, gone, over, refused, seen, greatest, status, at = kernels.apply(
            times, kinds, batch.offset, given, kept, events[:pairs], row, hooks, self._rows.rows,
            self._rows.content, self._at, self._trades.rows, self._trade_at, self._trades.content,
            seen, greatest, spec.delay_ns, spec.late_ns, self._over, self._every, self._bases,
            self._rings, self._ring_at, self._slots, self._layout.plan, out, out_event, out_new,
            expired, ended, unmatched, log[0], log[1], clock[3:-1], self._calls,
        )  # fmt: skip
        if status == OVERFLOW:
            raise BadEvents([int(batch.offset[at])], "a sum of its window no longer fits.")
        if refused and reports.unknown == "dead":
            raise BadEvents(
                batch.offset[unmatched[:refused]].tolist(),
                f"no {reports.id} that it corrects or cancels is kept, or a new one is there "
                "already.",
            )
        clock[1], clock[2], clock[-1] = seen, greatest, clock[-1] + refused
        unmade = np.unique(row[self._rows.rows[row, self._rows.content + 2] == 0])
        self._rows.remove(np.concatenate([expired[:gone], unmade]))
        ended = np.unique(ended[:over])
        self._trades.remove(
            ended[self._trades.rows[ended, self._trades.content + kernels.LIVE] == 0]
        )
        order = self._ordered(out[:finals], out_event[:finals], made)
        order = order[np.argsort(out_event[order], kind="stable")]
        found = self._changes(
            out[order], out_event[order], order < finals, out_new[order], clock[3:-1].copy()
        )
        return replace(found, unmatched=int(clock[-1]))

    def _kept(self, batch: Batch, keys: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        """The row of what each report is about, fresh where nothing is kept; undo is taken, also
        of the windows that it is in."""
        new = kinds == ReportKind.NEW
        names = np.where(new, batch[self._reports.id], batch[self._reports.of])
        kept = self._trades.resolve(np.column_stack([keys, names.astype(np.int64)]))
        old = self._trades.rows[kept[~new], self._trades.content + kernels.HOOKS :: 3].ravel()
        old = np.unique(old[old > 0]) - 1
        self._rows.resolve(self._rows.rows[old, 1 : self._at].copy())
        return kept

    def begin(self, events: int) -> None:
        super().begin(events)
        self._trades.begin(events)

    def _relink(self) -> None:
        """Links are not stored, and a rollback brings back old ones: all are made anew."""
        super()._relink()
        content, rows = self._rows.content, self._rows.rows
        live = self._rows.live_rows()
        rows[live, content + 2] = np.where(
            rows[live, content + 2] == 0, -1, rows[live, content + 2]
        )
        rows[live, content + kernels.HEAD] = rows[live, content + kernels.TAIL] = 0
        trades, at = self._trades.rows, self._trade_at
        which = self._trades.live_rows()
        which = which[np.argsort(trades[which, at + kernels.SEQUENCE])]
        window = np.empty((len(which), self._each), np.int64)
        key = np.empty((len(which), self._at - 1), np.int64)
        key[:, :-2] = trades[which, 1 : at - 1]
        time, hook = trades[which, at + kernels.TIME], 0
        for width, (over, every) in enumerate(zip(self._over, self._every, strict=True)):
            for back in range(-(-over // every)):
                key[:, -2], key[:, -1] = time // every * every - back * every, width
                inside = key[:, -2] > time - over
                window[:, hook] = np.where(inside, self._rows.find(key), -1)
                hook += 1
        kernels.rehang(
            which, window, rows, content, self._at, trades, at, self._trades.content, self._every,
            self._bases,
        )  # fmt: skip
