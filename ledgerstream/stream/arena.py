"""The event arena: every event of the last `over + delay + late`, linked by key in time order.

What a sliding window sees is a run of its key's list, `[tail, head)`, and moves only forward, so
each entry is added to a window once and taken out of it once: O(1) an event however long the
window. Per key (a row of `KeyRows`, W windows):

    key · newest time · sum[W] · count[W] · text key  |  oldest · newest · head · live · tail[W]

With T the key's newest time, tail[w] is the first entry with time > T − delay − over[w], and head
the first with time > T − delay (none without a delay). An entry is next · time · value, and lies
at `sequence − base`; sequence numbers start at 1, are never used again, and 0 is no entry.

A late event (older than T) is put in its place in the list and answered by an exact walk over it.
Entries expire as their key's own events are applied, so what is kept depends on the order of
events alone, never on batches. When the array is full, live entries are copied, key by key, into
a new one with new numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np

from ledgerstream.stream.digest import digest_entry, seed_of, zero
from ledgerstream.stream.kernels import AHEAD, I64, U64, kernel, prefetch
from ledgerstream.stream.keyed import KeyRows

_ENTRIES_MIN = 4_096
TIME_LIMIT = 2**62  # times and windows beyond it could wrap around

OK, OVERFLOW, FAR_TIME = 0, 1, 2
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
        width = len(windows)
        key_at = 2 + 2 * width
        self.links = key_at + key_words  # the first word of a row that is a link
        self.keys = KeyRows(name, self.links + 4 + width, self.links, key_at, key_words)
        self.entry_seed = seed_of(f"{name} entries")
        self.entry_digest = zero()
        self.entries = np.zeros((_ENTRIES_MIN, 3), np.int64)
        self.base = 1
        self.next = 1
        self.live = 0
        self._digests: deque[np.ndarray] = deque()

    @property
    def digests(self) -> list[np.ndarray]:
        return [self.keys.digest, self.entry_digest]

    def begin(self, events: int) -> None:
        frame = self.keys.begin(events)
        entry_digest, next_, live = self.entry_digest.copy(), self.next, self.live

        def restore() -> None:
            self.entry_digest, self.next, self.live = entry_digest, next_, live

        frame.undo.append(restore)

    def add(
        self, keys: np.ndarray, times: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Apply events in order.

        Returns sums int64[n, W], counts int64[n, W], and (OK, n); or OVERFLOW or FAR_TIME and the
        event at fault, after which the frame must be rolled back.
        """
        n = len(keys)
        self._reserve(n)
        row = self.keys.resolve(keys)
        frame = self.keys.frames[-1]
        first = self.next
        sums = np.empty((n, len(self.windows)), np.int64)
        counts = np.empty((n, len(self.windows)), np.int64)
        relinked = np.empty((n, 2), np.int64)
        # What a rollback must also mend: an old entry's link, if a late event went in behind it,
        # and the link of the entry that was each key's newest.
        self.next, self.live, relinks, status, at = _slide(
            row, times, values, self.keys.rows, self.links, self.entries, self.base, first,
            self.live, self.windows, self.delay, self.keep, self.entry_seed, self.entry_digest,
            relinked, sums, counts,
        )  # fmt: skip
        entries, base, mended = self.entries, self.base, relinked[:relinks].copy()

        def restore() -> None:
            for sequence, link in mended[::-1]:
                entries[sequence - base, 0] = link
            for touched in frame.touched:
                _cut(self.keys.rows, touched, self.links, entries, base, first)

        # The rows go back first, then their lists are cut: undo runs backwards.
        frame.undo.insert(len(frame.undo) - 1, restore)
        return sums, counts, status, at

    def seal(self) -> None:
        self.keys.seal()

    def forget(self) -> None:
        self.keys.forget()

    def rollback(self) -> None:
        self.keys.rollback()

    def _reserve(self, more: int) -> None:
        if self.next - self.base + more <= len(self.entries):
            return
        keys, count = self.keys, self.keys.count
        before = self.entries, self.base, keys.rows[:count, self.links :].copy()

        def restore() -> None:
            self.entries, self.base = before[0], before[1]
            keys.rows[:count, self.links :] = before[2]

        keys.frames[-1].undo.append(restore)
        entries = np.zeros((max(4 * self.live + 2 * more, _ENTRIES_MIN), 3), np.int64)
        self.base = self.next
        self.next = _compact(keys.rows, count, self.links, before[0], before[1], entries, self.base)
        self.entries = entries

    def dump(self) -> Dumped:
        """The content: rows [keys, links], each row's live entries int64[keys], and their
        (time, value) pairs [live, 2], row by row and oldest first. Copies."""
        return self._dumped(self.keys.rows[: self.keys.count], self.entries, self.base, self.live)

    def freeze(self) -> Callable[[], Dumped]:
        """What makes the `dump` of this moment, later and in any thread; now it only copies."""
        rows = self.keys.rows[: self.keys.count].copy()
        entries = self.entries[: self.next - self.base].copy()
        return partial(self._dumped, rows, entries, self.base, self.live)

    def _dumped(self, rows: np.ndarray, entries: np.ndarray, base: int, live: int) -> Dumped:
        pairs = np.empty((live, 2), np.int64)
        _dump(rows, self.links, entries, base, pairs)
        return rows[:, : self.links].copy(), rows[:, self.links + LIVE].copy(), pairs

    def load(self, rows: np.ndarray, lives: np.ndarray, pairs: np.ndarray) -> None:
        """Take over what `dump` gave; the arena must be new."""
        self.keys.load(rows)
        self.live = len(pairs)
        self.entries = np.zeros((max(2 * self.live, _ENTRIES_MIN), 3), np.int64)
        self.next = _load(
            self.keys.rows, self.links, lives, pairs, self.entries, self.base, self.windows,
            self.delay, self.entry_seed, self.entry_digest,
        )  # fmt: skip


OLDEST, NEWEST, HEAD, LIVE, TAILS = range(5)  # words of a row from `links` on
NEXT, TIME, VALUE = range(3)  # words of an entry


@kernel
def overflows(a: int, b: int, total: int) -> bool:
    return ((a ^ total) & (b ^ total)) < 0


@kernel
def _slide(
    row: I64,
    times: I64,
    values: I64,
    rows: I64,
    links: int,
    entries: I64,
    base: int,
    sequence: int,
    live: int,
    windows: I64,
    delay: int,
    keep: int,
    seed: U64,
    acc: U64,
    relinked: I64,
    sums: I64,
    counts: I64,
) -> tuple[int, int, int, int, int]:
    width = len(windows)
    first = sequence
    relinks = 0
    for i in range(len(row)):
        if i + 2 * AHEAD < len(row):  # the row, then what its links point to, then what follows
            prefetch(rows, row[i + 2 * AHEAD], 0)
            prefetch(rows, row[i + 2 * AHEAD], links)
        if i + AHEAD < len(row):
            soon = rows[row[i + AHEAD]]
            for p in range(links, len(soon)):
                prefetch(entries, soon[p] - base, 0)
        if i + AHEAD // 2 < len(row):
            soon = rows[row[i + AHEAD // 2]]
            for p in range(links + TAILS, len(soon)):
                if soon[p] != 0:
                    prefetch(entries, entries[soon[p] - base, NEXT] - base, 0)
        state = rows[row[i]]
        time = times[i]
        value = values[i]
        if not -TIME_LIMIT < time < TIME_LIMIT:
            return sequence, live, relinks, FAR_TIME, i
        newest_time = state[1]
        if state[links + LIVE] > 0 and time < newest_time:
            if time > newest_time - keep:
                entry = entries[sequence - base]
                entry[TIME] = time
                entry[VALUE] = value
                before, after = _place(state, links, entries, base, time)
                if before == 0:
                    state[links + OLDEST] = sequence
                else:
                    if before < first:
                        relinked[relinks, 0] = before
                        relinked[relinks, 1] = after
                        relinks += 1
                    entries[before - base, NEXT] = sequence
                entry[NEXT] = after
                if delay > 0 and after == state[links + HEAD] and time > newest_time - delay:
                    state[links + HEAD] = sequence
                for w in range(width):
                    if time > newest_time - delay - windows[w]:
                        if after == state[links + TAILS + w]:
                            state[links + TAILS + w] = sequence
                        if time <= newest_time - delay:
                            total = state[2 + w] + value
                            if overflows(state[2 + w], value, total):
                                return sequence, live, relinks, OVERFLOW, i
                            state[2 + w] = total
                            state[2 + width + w] += 1
                digest_entry(acc, seed, state[0], time, value, True)
                state[links + LIVE] += 1
                live += 1
                sequence += 1
                own = 0
            else:  # later than what is kept: it counts for itself alone
                own = 1 if delay == 0 else 0
            for w in range(width):
                sums[i, w] = own * value
                counts[i, w] = own
            if not _walk(state, links, entries, base, time - delay, windows, sums[i], counts[i]):
                return sequence, live, relinks, OVERFLOW, i
            continue

        entry = entries[sequence - base]
        entry[NEXT] = 0
        entry[TIME] = time
        entry[VALUE] = value
        if state[links + LIVE] == 0:
            state[links + OLDEST] = sequence
        else:
            entries[state[links + NEWEST] - base, NEXT] = sequence
        state[links + NEWEST] = sequence
        state[links + LIVE] += 1
        state[1] = time
        live += 1
        digest_entry(acc, seed, state[0], time, value, True)
        for w in range(width):
            if state[links + TAILS + w] == 0:
                state[links + TAILS + w] = sequence
        if delay == 0:
            for w in range(width):
                total = state[2 + w] + value
                if overflows(state[2 + w], value, total):
                    return sequence, live, relinks, OVERFLOW, i
                state[2 + w] = total
                state[2 + width + w] += 1
        else:
            head = state[links + HEAD]
            if head == 0:
                head = sequence
            while head != 0 and entries[head - base, TIME] <= time - delay:
                for w in range(width):
                    total = state[2 + w] + entries[head - base, VALUE]
                    if overflows(state[2 + w], entries[head - base, VALUE], total):
                        return sequence, live, relinks, OVERFLOW, i
                    state[2 + w] = total
                    state[2 + width + w] += 1
                head = entries[head - base, NEXT]
            state[links + HEAD] = head
        for w in range(width):
            tail = state[links + TAILS + w]
            edge = time - delay - windows[w]
            while tail != 0 and entries[tail - base, TIME] <= edge:
                state[2 + w] -= entries[tail - base, VALUE]
                state[2 + width + w] -= 1
                tail = entries[tail - base, NEXT]
            state[links + TAILS + w] = tail
            sums[i, w] = state[2 + w]
            counts[i, w] = state[2 + width + w]
        oldest = state[links + OLDEST]
        while entries[oldest - base, TIME] <= time - keep:
            digest_entry(
                acc, seed, state[0], entries[oldest - base, TIME], entries[oldest - base, VALUE],
                False,
            )  # fmt: skip
            oldest = entries[oldest - base, NEXT]
            state[links + LIVE] -= 1
            live -= 1
        state[links + OLDEST] = oldest
        sequence += 1
    return sequence, live, relinks, OK, len(row)


@kernel
def _place(state: I64, links: int, entries: I64, base: int, time: int) -> tuple[int, int]:
    """The entries before and after which an event of this time belongs; 0 is none."""
    before = 0
    after = state[links + OLDEST]
    while after != 0 and entries[after - base, TIME] <= time:
        before = after
        after = entries[after - base, NEXT]
    return before, after


@kernel
def _walk(
    state: I64,
    links: int,
    entries: I64,
    base: int,
    upto: int,
    windows: I64,
    sums: I64,
    counts: I64,
) -> bool:
    """Add up what is kept in (upto − window, upto]; False if a sum overflows."""
    at = state[links + OLDEST]
    while at != 0 and entries[at - base, TIME] <= upto:
        for w in range(len(windows)):
            if entries[at - base, TIME] > upto - windows[w]:
                total = sums[w] + entries[at - base, VALUE]
                if overflows(sums[w], entries[at - base, VALUE], total):
                    return False
                sums[w] = total
                counts[w] += 1
        at = entries[at - base, NEXT]
    return True


@kernel
def _cut(rows: I64, which: I64, links: int, entries: I64, base: int, first: int) -> None:
    """End the lists of these rows at their newest entry, where it is older than `first`."""
    for i in range(len(which)):
        newest = rows[which[i], links + NEWEST]
        if base <= newest < first:
            entries[newest - base, NEXT] = 0


@kernel
def _compact(
    rows: I64, count: int, links: int, old: I64, old_base: int, new: I64, base: int
) -> int:
    """Copy live entries, key by key, and point the rows at them; the next sequence number."""
    sequence = base
    pointers = rows.shape[1]
    for r in range(count):
        at = rows[r, links + OLDEST]
        if at == 0:
            continue
        moved = rows[r].copy()
        moved[links + OLDEST] = sequence
        while at != 0:
            for p in range(links + NEWEST, pointers):
                if p != links + LIVE and rows[r, p] == at:
                    moved[p] = sequence
            new[sequence - base, NEXT] = sequence + 1
            new[sequence - base, TIME] = old[at - old_base, TIME]
            new[sequence - base, VALUE] = old[at - old_base, VALUE]
            sequence += 1
            at = old[at - old_base, NEXT]
        new[sequence - 1 - base, NEXT] = 0
        rows[r] = moved
    return sequence


@kernel
def _dump(rows: I64, links: int, entries: I64, base: int, pairs: I64) -> None:
    n = 0
    for r in range(len(rows)):
        at = rows[r, links + OLDEST]
        while at != 0:
            pairs[n, 0] = entries[at - base, TIME]
            pairs[n, 1] = entries[at - base, VALUE]
            n += 1
            at = entries[at - base, NEXT]


@kernel
def _load(
    rows: I64,
    links: int,
    lives: I64,
    pairs: I64,
    entries: I64,
    base: int,
    windows: I64,
    delay: int,
    seed: U64,
    acc: U64,
) -> int:
    """Lay out a dump's entries and find each row's links again; the next sequence number."""
    sequence = base
    for r in range(len(lives)):
        state = rows[r]
        state[links + LIVE] = lives[r]
        if lives[r] == 0:
            continue
        state[links + OLDEST] = sequence
        for _ in range(lives[r]):
            time = pairs[sequence - base, 0]
            entry = entries[sequence - base]
            entry[NEXT] = sequence + 1
            entry[TIME] = time
            entry[VALUE] = pairs[sequence - base, 1]
            digest_entry(acc, seed, state[0], time, entry[VALUE], True)
            if delay > 0 and state[links + HEAD] == 0 and time > state[1] - delay:
                state[links + HEAD] = sequence
            for w in range(len(windows)):
                if state[links + TAILS + w] == 0 and time > state[1] - delay - windows[w]:
                    state[links + TAILS + w] = sequence
            sequence += 1
        entries[sequence - 1 - base, NEXT] = 0
        state[links + NEWEST] = sequence - 1
    return sequence
