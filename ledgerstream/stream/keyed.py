"""Rows of state, one a key, behind a hash index; with an undo log and a digest.

Rows are 64-bit words in one array `rows[capacity, words]`: word 0 is the key, the first `content`
words are what the digest covers, the rest are links. A row number is never given up, so it stays
valid while the table grows. Work is done in *frames*, one a call of `process`:

    begin(events) → resolve(keys) … → seal()        then forget() once committed, or rollback()

Frames are undone newest first; several may be open while earlier ones commit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from ledgerstream.errors import LedgerStreamError
from ledgerstream.limits import LIMITS
from ledgerstream.stream.digest import digest_rows, seed_of, zero
from ledgerstream.stream.kernels import I64, kernel

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_INDEX_SLOTS_MIN = 1_024


class Frame:
    """What undoes one call of `process`, newest act last."""

    __slots__ = ("count", "digest", "number", "touched", "undo")

    def __init__(self, number: int, count: int, digest: np.ndarray) -> None:
        self.number = number
        self.count = count
        self.digest = digest
        self.touched: list[np.ndarray] = []
        self.undo: list[Callable[[], None]] = []


class KeyRows:
    """The table. `rows` may be replaced by a larger copy in `begin`, never between it and `seal`.

    count:    rows in use.
    digest:   uint64[2] over the rows as of the last `seal`.
    """

    def __init__(self, name: str, words: int, content: int) -> None:
        assert 1 <= content <= words
        self.name = name
        self.words = words
        self.content = content
        self.seed = seed_of(name)
        self.count = 0
        self.digest = zero()
        self.rows = np.zeros((_INDEX_SLOTS_MIN, words), np.int64)
        self.frames: deque[Frame] = deque()
        self._index = np.zeros((_INDEX_SLOTS_MIN, 2), np.int64)  # key, row + 1; 0 is free
        self._mark = np.zeros(_INDEX_SLOTS_MIN, np.int64)  # the last frame that took undo of a row
        self._frames_begun = 0

    def begin(self, events: int) -> Frame:
        """Open a frame with room for `LIMITS.state_keys_per_event_max` new keys an event."""
        self._reserve(self.count + LIMITS.state_keys_per_event_max * max(events, 1))
        self._frames_begun += 1
        frame = Frame(self._frames_begun, self.count, self.digest.copy())
        self.frames.append(frame)
        return frame

    def resolve(self, keys: np.ndarray) -> np.ndarray:
        """int64[n]: the row of each key, added where it was not there; undo is taken."""
        frame = self.frames[-1]
        out = np.empty(len(keys), np.int64)
        touched = np.empty(len(keys), np.int64)
        done = taken = 0
        while True:
            done, self.count, taken = _resolve(
                keys, done, self.rows, self.count, self._index, self._mark, frame.number,
                out, touched, taken,
            )  # fmt: skip
            if done == len(keys):
                break
            if self.count == len(self.rows):
                raise LedgerStreamError(
                    f"state {self.name!r} met more than {LIMITS.state_keys_per_event_max} new "
                    "keys an event in one batch.",
                    "Look up fewer keys for each event.",
                )
            self._index = _indexed(self.rows, self.count, 2 * len(self._index))
        self._take_undo(frame, touched[:taken].copy())
        return out

    def seal(self) -> None:
        """Close the newest frame: the digest takes in what its rows have become."""
        for which in self.frames[-1].touched:
            digest_rows(self.digest, self.seed, self.rows, which, self.content, True)

    def forget(self) -> None:
        """The oldest frame is committed: drop its undo."""
        self.frames.popleft()

    def rollback(self) -> None:
        """Undo the newest frame, to the bit."""
        frame = self.frames.pop()
        for act in reversed(frame.undo):
            act()
        added = self.count > frame.count
        self.rows[frame.count : self.count] = 0
        self._mark[frame.count : self.count] = 0
        self.count = frame.count
        self.digest = frame.digest
        if added:
            self._index = _indexed(self.rows, self.count, len(self._index))

    def load(self, rows: np.ndarray) -> None:
        """Take over rows [n, content] of a snapshot; the table must be empty and without frames."""
        assert self.count == 0 and not self.frames
        self._reserve(len(rows))
        self.rows[: len(rows), : self.content] = rows
        self.count = len(rows)
        slots = len(self._index)
        while slots < 2 * self.count:
            slots *= 2
        self._index = _indexed(self.rows, self.count, slots)
        every = np.arange(self.count)
        digest_rows(self.digest, self.seed, self.rows, every, self.content, True)

    def _take_undo(self, frame: Frame, touched: np.ndarray) -> None:
        old = touched[touched < frame.count]
        saved = self.rows[old]
        digest_rows(self.digest, self.seed, self.rows, old, self.content, False)
        frame.touched.append(touched)

        def restore() -> None:
            self.rows[old] = saved

        frame.undo.append(restore)

    def _reserve(self, rows: int) -> None:
        if rows <= len(self.rows):
            return
        capacity = 2 * rows  # zeroed memory costs nothing until it is touched
        grown, mark = np.zeros((capacity, self.words), np.int64), np.zeros(capacity, np.int64)
        grown[: self.count] = self.rows[: self.count]
        mark[: self.count] = self._mark[: self.count]
        self.rows, self._mark = grown, mark


def _indexed(rows: np.ndarray, count: int, slots: int) -> np.ndarray:
    index = np.zeros((slots, 2), np.int64)
    _fill_index(index, rows, count)
    return index


@kernel
def _slot(key: int, mask: int) -> int:
    h = np.uint64(key) * _MULTIPLIER
    return np.int64(h >> np.uint64(32)) & mask  # type: ignore[return-value]


@kernel
def _fill_index(index: I64, rows: I64, count: int) -> None:
    mask = len(index) - 1
    for r in range(count):
        slot = _slot(rows[r, 0], mask)
        while index[slot, 1] != 0:
            slot = (slot + 1) & mask
        index[slot, 0] = rows[r, 0]
        index[slot, 1] = r + 1


@kernel
def _resolve(
    keys: I64,
    start: int,
    rows: I64,
    count: int,
    index: I64,
    mark: I64,
    frame: int,
    out: I64,
    touched: I64,
    taken: int,
) -> tuple[int, int, int]:
    """Rows of keys[start:]; stops before a new key if index or rows are full."""
    slots = len(index) - 1
    for i in range(start, len(keys)):
        key = keys[i]
        slot = _slot(key, slots)
        while index[slot, 1] != 0 and index[slot, 0] != key:
            slot = (slot + 1) & slots
        row = index[slot, 1] - 1
        if row < 0:
            if count == len(rows) or 2 * (count + 1) > len(index):
                return i, count, taken
            row = count
            rows[row, 0] = key
            index[slot, 0] = key
            index[slot, 1] = row + 1
            count += 1
        out[i] = row
        if mark[row] != frame:
            mark[row] = frame
            touched[taken] = row
            taken += 1
    return len(keys), count, taken
