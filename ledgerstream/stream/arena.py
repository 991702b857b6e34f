"""The event arena: every event of the last `over + delay + late`, key by key in time order.

What a sliding window sees is a run of its key's entries, `[tail, head)`, and moves only forward, so
each entry is added to a window once and taken out of it once: O(1) an event however long the
window. Per key (a row of `KeyRows`, W windows):

    key · newest time · sum[W] · count[W] · text key  |  start · head · end · limit · queue

With T the key's newest time, head is the first entry with time > T − delay (the end without a
delay), and head − count[w] the first with time > T − delay − over[w]. An entry is time · value.
A key's entries are `entries[start:end]`, in a block of its own that reaches to `limit`. `queue`
chains the key's events of a batch while they are applied.

A late event (older than T) is put in its place among the entries and answered by an exact walk over
them. Entries expire as their key's own events are applied, so what is kept depends on the order of
events alone, never on batches.

Room is only ever taken: what has expired, and the block that a key has outgrown, stay as they were,
so that undo has to bring back the row alone. When the array is full, live entries are copied into a
new one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from ledgerstream.stream.arenakernels import (
    END,
    FULL,
    START,
    compact,
    gather,
    queue,
    scatter,
    slide,
    take_out,
)
from ledgerstream.stream.digest import seed_of, zero
from ledgerstream.stream.keyed import KeyRows

_ENTRIES_MIN = 4_096
_LINKS = 5

Dumped = tuple[np.ndarray, np.ndarray, np.ndarray]


class Arena:
    """Sliding sums and counts by key. Frames as in `KeyRows`.

    windows: int64[W] lengths; delay and late in ns; key_words as in `KeyRows`.
    """

    def __init__(
        self, name: str, windows: np.ndarray, delay: int, late: int, key_words: int = 0
    ) -> None:
        self.windows = windows
        self.delay = delay
        self.keep = int(windows.max()) + delay + late
        key_at = 2 + 2 * len(windows)
        self.links = key_at + key_words  # the first word of a row that is a link
        self.keys = KeyRows(name, self.links + _LINKS, self.links, key_at, key_words)
        self.entry_seed = seed_of(f"{name} entries")
        self.entry_digest = zero()
        self.entries = np.zeros((_ENTRIES_MIN, 2), np.int64)
        self.free = 0  # from here on nobody has a block
        self.live = 0

    @property
    def digests(self) -> list[np.ndarray]:
        return [self.keys.digest, self.entry_digest]

    def begin(self, events: int) -> None:
        frame = self.keys.begin(events)
        entry_digest, free, live = self.entry_digest.copy(), self.free, self.live

        def restore() -> None:
            self.entry_digest, self.free, self.live = entry_digest, free, live

        frame.undo.append(restore)

    def add(
        self, keys: np.ndarray, times: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Apply events in order.

        Returns sums int64[n, W], counts int64[n, W], and (OK, n); or OVERFLOW or FAR_TIME and an
        event at fault, the first of its key, after which the frame must be rolled back.
        """
        n = len(keys)
        row = self.keys.resolve(keys)
        undo = self.keys.frames[-1].undo
        sums = np.empty((n, len(self.windows)), np.int64)
        counts = np.empty((n, len(self.windows)), np.int64)
        follower = np.empty(n, np.int64)
        inserted = np.empty((n, 2), np.int64)
        queue(row, self.keys.rows, self.links, follower)
        begin = 0
        while True:
            begin, at, self.free, self.live, inserts, status = slide(
                row, follower, begin, times, values, self.keys.rows, self.links, self.entries,
                self.free, self.live, self.windows, self.delay, self.keep, self.entry_seed,
                self.entry_digest, inserted, sums, counts,
            )  # fmt: skip
            if inserts:
                undo.append(partial(take_out, self.entries, inserted[:inserts].copy()))
            if status != FULL:
                return sums, counts, status, at
            self._make_room()

    def seal(self) -> None:
        self.keys.seal()

    def forget(self) -> None:
        self.keys.forget()

    def rollback(self) -> None:
        self.keys.rollback()

    def _make_room(self) -> None:
        keys, count, before = self.keys, self.keys.count, self.entries
        links = keys.rows[:count, self.links :].copy()

        def restore() -> None:
            self.entries = before
            keys.rows[:count, self.links :] = links

        keys.frames[-1].undo.append(restore)
        self.entries = self._empty()
        self.free = compact(keys.rows, count, self.links, before, self.entries)

    def _empty(self) -> np.ndarray:
        """An array for twice what `compact` lays out, or more: any key's next block fits."""
        size = 4 * self.live + 8 * self.keys.count + _ENTRIES_MIN
        return np.empty((size, 2), np.int64)

    def dump(self) -> Dumped:
        """The content: rows [keys, links], each row's live entries int64[keys], and their
        (time, value) pairs [live, 2], row by row and oldest first. Copies."""
        rows = self.keys.rows[: self.keys.count]
        pairs = np.empty((self.live, 2), np.int64)
        gather(rows, self.links, self.entries, pairs)
        lives = rows[:, self.links + END] - rows[:, self.links + START]
        return rows[:, : self.links].copy(), lives, pairs

    def freeze(self) -> Callable[[], Dumped]:
        """The `dump` of this moment, for any thread: blocks are copied as fast as all would be."""
        dumped = self.dump()
        return lambda: dumped

    def load(self, rows: np.ndarray, lives: np.ndarray, pairs: np.ndarray) -> None:
        """Take over what `dump` gave; the arena must be new."""
        self.keys.load(rows)
        self.live = len(pairs)
        self.entries = self._empty()
        self.free = scatter(
            self.keys.rows, self.links, lives, pairs, self.entries, self.delay, self.entry_seed,
            self.entry_digest,
        )  # fmt: skip
