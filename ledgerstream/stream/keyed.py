"""Rows of state, one a key, behind a hash index; with an undo log and a digest.

Rows are 64-bit words in one array `rows[capacity, words]`. Word 0 is the key, if that is an
integer; longer keys lie at `key_at`, and word 0 is a hash of them. The first `content` words are
what the digest covers, the rest are links. A row keeps its number until it is removed, also while
the table grows; numbers of removed rows are used again. Work is done in *frames*, one a call of
`process`:

    begin(events) → resolve(keys), remove(rows) … → seal()     then forget() once committed, or
                                                               rollback()

Frames are undone newest first; several may be open while earlier ones commit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from ledgerstream.errors import LedgerStreamError
from ledgerstream.limits import LIMITS
from ledgerstream.stream.digest import digest_rows, mix, seed_of, zero
from ledgerstream.stream.kernels import AHEAD, BOOLS, I64, kernel, prefetch

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_INDEX_SLOTS_MIN = 1_024


class Frame:
    """What undoes one call of `process`, newest act last.

    touched:  the rows that it may have changed, each once.
    moved:    whether rows were added or removed.
    """

    __slots__ = ("count", "digest", "moved", "number", "touched", "undo")

    def __init__(self, number: int, count: int, digest: np.ndarray) -> None:
        self.number = number
        self.count = count
        self.digest = digest
        self.moved = False
        self.touched: list[np.ndarray] = []
        self.undo: list[Callable[[], None]] = []


class KeyRows:
    """The table. `rows` may be replaced by a larger copy in `begin`, never between it and `seal`.

    key_at, key_words:  where a key of several words lies in a row; 0 words: word 0 is the key.
    count:              row numbers given out; those of removed rows among them are free.
    live:               rows in use.
    digest:             uint64[2] over the live rows as of the last `seal`.
    """

    def __init__(
        self, name: str, words: int, content: int, key_at: int = 0, key_words: int = 0
    ) -> None:
        assert 1 <= content <= words
        assert key_words == 0 or 1 <= key_at <= content - key_words
        self.name = name
        self.words = words
        self.content = content
        self.key_at = key_at
        self.key_words = key_words
        self.seed = seed_of(name)
        self.count = 0
        self.digest = zero()
        self.rows = np.zeros((_INDEX_SLOTS_MIN, words), np.int64)
        self.frames: deque[Frame] = deque()
        self._index = np.zeros((_INDEX_SLOTS_MIN, 2), np.int64)  # word 0, row + 1; 0 is free
        self._live = np.zeros(_INDEX_SLOTS_MIN, np.bool_)
        self._mark = np.zeros(_INDEX_SLOTS_MIN, np.int64)  # the last frame that took undo of a row
        self._free = np.empty(0, np.int64)  # numbers of removed rows
        self._frames_begun = 0

    @property
    def live(self) -> int:
        return self.count - len(self._free)

    def begin(self, events: int) -> Frame:
        """Open a frame with room for `LIMITS.state_keys_per_event_max` new keys an event."""
        self._reserve(self.count + LIMITS.state_keys_per_event_max * max(events, 1))
        self._frames_begun += 1
        frame = Frame(self._frames_begun, self.count, self.digest.copy())
        self.frames.append(frame)
        return frame

    def resolve(self, keys: np.ndarray) -> np.ndarray:
        """int64[n]: the row of each key, added where it was not there; undo is taken.

        keys: int64[n], or int64[n, key_words].
        """
        frame = self.frames[-1]
        tags = keys if self.key_words == 0 else tags_of(keys)
        parts = _NO_PARTS if self.key_words == 0 else keys
        out = np.empty(len(keys), np.int64)
        touched = np.empty(
            len(keys), np.int64
        )  # rows that were there from the left, new from right
        done = old = new = 0
        while True:
            done, self.count, free, old, new = _resolve(
                tags, parts, self.key_at, done, self.rows, self.count, self._free,
                len(self._free), self._index, self._live, self._mark, frame.number,
                out, touched, old, new,
            )  # fmt: skip
            self._free = self._free[:free]
            if done == len(keys):
                break
            if self.count == len(self.rows):
                raise LedgerStreamError(
                    f"state {self.name!r} met more than {LIMITS.state_keys_per_event_max} new "
                    "keys an event in one batch.",
                    "Look up fewer keys for each event.",
                )
            self._index = _indexed(self.rows, self._live, self.count, 2 * len(self._index))
        self._take_undo(frame, touched[:old].copy(), touched[len(keys) - new :].copy())
        return out

    def find(self, keys: np.ndarray) -> np.ndarray:
        """int64[n]: the row of each key, -1 where there is none. Changes nothing."""
        tags = keys if self.key_words == 0 else tags_of(keys)
        parts = _NO_PARTS if self.key_words == 0 else keys
        out = np.empty(len(keys), np.int64)
        _find(tags, parts, self.key_at, self.rows, self._index, out)
        return out

    def remove(self, which: np.ndarray) -> None:
        """Give up live rows, int64[n], each once; their numbers may be given out again."""
        if len(which) == 0:
            return
        frame = self.frames[-1]
        frame.moved = True
        untouched = which[self._mark[which] != frame.number]
        self._mark[untouched] = frame.number
        self._take_undo(frame, untouched, _NO_ROWS)
        _unindex(self._index, self.rows, which)
        self.rows[which] = 0
        self._live[which] = False
        self._free = np.concatenate([self._free, which])

    def seal(self) -> None:
        """Close the newest frame: the digest takes in what its rows have become."""
        frame = self.frames[-1]
        for which in frame.touched:
            now = which[self._live[which]] if frame.moved else which
            digest_rows(self.digest, self.seed, self.rows, now, self.content, True)

    def forget(self) -> None:
        """The oldest frame is committed: drop its undo."""
        self.frames.popleft()

    def rollback(self) -> None:
        """Undo the newest frame, to the bit."""
        frame = self.frames.pop()
        for act in reversed(frame.undo):
            act()
        self.digest = frame.digest
        if frame.moved:
            self._mark[frame.count : self.count] = 0
            self.count = frame.count
            self._free = np.flatnonzero(~self._live[: self.count])
            self._index = _indexed(self.rows, self._live, self.count, len(self._index))

    def live_rows(self) -> np.ndarray:
        """int64[live]: the numbers of the live rows, ascending."""
        return np.flatnonzero(self._live[: self.count])

    def dump(self) -> np.ndarray:
        """int64[live, content]: a copy of what `load` takes."""
        return self.rows[self.live_rows(), : self.content]

    def freeze(self) -> Callable[[], np.ndarray]:
        """What makes the `dump` of this moment, later and in any thread; now it only copies."""
        rows, live = self.rows[: self.count].copy(), self._live[: self.count].copy()
        return lambda: rows[live, : self.content]

    def load(self, rows: np.ndarray) -> None:
        """Take over rows [n, content] of a snapshot; the table must be empty and without frames."""
        assert self.count == 0 and not self.frames
        self._reserve(len(rows))
        self.rows[: len(rows), : self.content] = rows
        self._live[: len(rows)] = True
        self.count = len(rows)
        slots = len(self._index)
        while slots < 2 * self.count:
            slots *= 2
        self._index = _indexed(self.rows, self._live, self.count, slots)
        every = np.arange(self.count)
        digest_rows(self.digest, self.seed, self.rows, every, self.content, True)

    def _take_undo(self, frame: Frame, old: np.ndarray, new: np.ndarray) -> None:
        """One act that brings back rows that were there and empties those that were not."""
        saved = _taken(self.rows, old)
        digest_rows(self.digest, self.seed, saved, np.arange(len(old)), self.content, False)
        frame.touched += [old, new]
        frame.moved |= len(new) > 0

        def restore() -> None:
            self.rows[old], self.rows[new] = saved, 0
            self._live[old], self._live[new] = True, False

        frame.undo.append(restore)

    def _reserve(self, rows: int) -> None:
        if rows <= len(self.rows):
            return
        capacity = 2 * rows  # zeroed memory costs nothing until it is touched
        self.rows = _grown(self.rows, capacity, self.count)
        self._live = _grown(self._live, capacity, self.count)
        self._mark = _grown(self._mark, capacity, self.count)


def text_words(texts: np.ndarray, size: int) -> np.ndarray:
    """int64[n, ⌈size ÷ 8⌉]: texts, bytes[n] of at most `size`, as words of a key."""
    words = -(-size // 8)
    return texts.astype(f"S{8 * words}").view(np.int64).reshape(len(texts), words)


_NO_PARTS = np.empty((0, 0), np.int64)
_NO_ROWS = np.empty(0, np.int64)


def _grown(array: np.ndarray, capacity: int, count: int) -> np.ndarray:
    grown = np.zeros((capacity, *array.shape[1:]), array.dtype)
    grown[:count] = array[:count]
    return grown


def _indexed(rows: np.ndarray, live: np.ndarray, count: int, slots: int) -> np.ndarray:
    index = np.zeros((slots, 2), np.int64)
    _fill_index(index, rows, live, count)
    return index


@kernel
def slot_of(tag: int, mask: int) -> int:
    h = np.uint64(tag) * _MULTIPLIER
    return np.int64(h >> np.uint64(32)) & mask  # type: ignore[return-value]


@kernel
def tags_of(keys: I64) -> I64:
    """A hash of each key of several words."""
    tags = np.empty(len(keys), np.int64)
    for i in range(len(keys)):
        h = _MULTIPLIER
        for c in range(keys.shape[1]):
            h = mix(h, np.uint64(keys[i, c]), _MULTIPLIER)
        tags[i] = np.int64(h)
    return tags


@kernel
def _fill_index(index: I64, rows: I64, live: BOOLS, count: int) -> None:
    mask = len(index) - 1
    for r in range(count):
        if not live[r]:
            continue
        slot = slot_of(rows[r, 0], mask)
        while index[slot, 1] != 0:
            slot = (slot + 1) & mask
        index[slot, 0] = rows[r, 0]
        index[slot, 1] = r + 1


@kernel
def _unindex(index: I64, rows: I64, which: I64) -> None:
    """Take rows out of the index; what lies behind each moves up, so no probe ends too early."""
    mask = len(index) - 1
    for i in range(len(which)):
        gap = slot_of(rows[which[i], 0], mask)
        while index[gap, 1] != which[i] + 1:
            gap = (gap + 1) & mask
        at = (gap + 1) & mask
        while index[at, 1] != 0:
            home = slot_of(index[at, 0], mask)
            if (at - home) & mask >= (at - gap) & mask:
                index[gap, 0] = index[at, 0]
                index[gap, 1] = index[at, 1]
                gap = at
            at = (at + 1) & mask
        index[gap, 1] = 0


@kernel
def same_words(rows: I64, row: int, key_at: int, parts: I64, part: int) -> bool:
    """Whether row `row` has the key `part`."""
    for c in range(parts.shape[1]):
        if rows[row, key_at + c] != parts[part, c]:
            return False
    return True


@kernel
def _find(tags: I64, parts: I64, key_at: int, rows: I64, index: I64, out: I64) -> None:
    slots = len(index) - 1
    words = parts.shape[1]
    for i in range(len(tags)):
        slot = slot_of(tags[i], slots)
        while index[slot, 1] != 0 and (
            index[slot, 0] != tags[i]
            or (words > 0 and not same_words(rows, index[slot, 1] - 1, key_at, parts, i))
        ):
            slot = (slot + 1) & slots
        out[i] = index[slot, 1] - 1


@kernel
def _taken(rows: I64, which: I64) -> I64:
    """`rows[which]`, faster where the rows are far apart."""
    out = np.empty((len(which), rows.shape[1]), np.int64)
    for i in range(len(which)):
        if i + AHEAD < len(which):
            prefetch(rows, which[i + AHEAD], 0)
        for c in range(rows.shape[1]):
            out[i, c] = rows[which[i], c]
    return out


@kernel
def _resolve(
    tags: I64,
    parts: I64,
    key_at: int,
    start: int,
    rows: I64,
    count: int,
    free: I64,
    free_count: int,
    index: I64,
    live: BOOLS,
    mark: I64,
    frame: int,
    out: I64,
    touched: I64,
    old: int,
    new: int,
) -> tuple[int, int, int, int, int]:
    """Rows of the keys from `start` on; stops before a new key if index or rows are full."""
    slots = len(index) - 1
    words = parts.shape[1]
    for i in range(start, len(tags)):
        if i + 2 * AHEAD < len(tags):
            prefetch(index, slot_of(tags[i + 2 * AHEAD], slots), 0)
        if i + AHEAD < len(tags):
            soon = index[slot_of(tags[i + AHEAD], slots), 1] - 1
            prefetch(rows, soon, 0)
            prefetch(mark, soon, 0)
        tag = tags[i]
        slot = slot_of(tag, slots)
        while index[slot, 1] != 0 and (
            index[slot, 0] != tag
            or (words > 0 and not same_words(rows, index[slot, 1] - 1, key_at, parts, i))
        ):
            slot = (slot + 1) & slots
        row = index[slot, 1] - 1
        if row >= 0:
            if mark[row] != frame:
                mark[row] = frame
                touched[old] = row
                old += 1
            out[i] = row
            continue
        if 2 * (count - free_count + 1) > len(index):
            return i, count, free_count, old, new
        if free_count > 0:
            free_count -= 1
            row = free[free_count]
        elif count < len(rows):
            row = count
            count += 1
        else:
            return i, count, free_count, old, new
        rows[row, 0] = tag
        for c in range(words):
            rows[row, key_at + c] = parts[i, c]
        index[slot, 0] = tag
        index[slot, 1] = row + 1
        live[row] = True
        if mark[row] != frame:
            mark[row] = frame
            new += 1
            touched[len(touched) - new] = row
        out[i] = row
    return len(tags), count, free_count, old, new
