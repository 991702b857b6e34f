"""The loops of the arena; `arena` says what lies where.

A key depends on its own events alone, so a batch is taken key by key: each row is read and written
once, and its entries lie side by side.
"""

from __future__ import annotations

from ledgerstream.stream.digest import digest_entry
from ledgerstream.stream.kernels import AHEAD, I64, U64, kernel, prefetch

TIME_LIMIT = 2**62  # times and windows beyond it could wrap around
BLOCK_MIN = 4  # entries of a key's first block: a cache line

OK, OVERFLOW, FAR_TIME, FULL = range(4)
START, HEAD, END, LIMIT, QUEUE = range(5)  # words of a row from `links` on
TIME, VALUE = range(2)  # words of an entry
NEWEST, SUMS = 1, 2  # words of a row


@kernel
def overflows(a: int, b: int, total: int) -> bool:
    return ((a ^ total) & (b ^ total)) < 0


@kernel
def block_size(live: int) -> int:
    """Entries of a new block: as many again as it begins with, so copying is O(1) an event."""
    return 2 * live + BLOCK_MIN


@kernel
def queue(row: I64, rows: I64, links: int, follower: I64) -> None:
    """Chain each key's events: the row holds its first, plus 1, each its follower; 0 ends."""
    for i in range(len(row) - 1, -1, -1):
        if i >= AHEAD:
            prefetch(rows, row[i - AHEAD], links + QUEUE)
        follower[i] = rows[row[i], links + QUEUE]
        rows[row[i], links + QUEUE] = i + 1


@kernel
def slide(
    row: I64,
    follower: I64,
    begin: int,
    times: I64,
    values: I64,
    rows: I64,
    links: int,
    entries: I64,
    free: int,
    live: int,
    windows: I64,
    delay: int,
    keep: int,
    seed: U64,
    acc: U64,
    inserted: I64,
    sums: I64,
    counts: I64,
) -> tuple[int, int, int, int, int, int]:
    """Apply queued events from the key of event `begin` on, until all are done, one is at fault,
    or there is no room for a block: then call again with a larger array.

    Returns where to begin again, the event at fault, free, live, the number of `inserted` (the
    place of each late event and the end it moved, which undo must know), and a status.
    """
    width = len(windows)
    inserts = 0
    for at in range(begin, len(row)):
        if at + 2 * AHEAD < len(row):  # the row, then what it points to
            prefetch(rows, row[at + 2 * AHEAD], 0)
            prefetch(rows, row[at + 2 * AHEAD], links)
        if at + AHEAD < len(row):
            soon = row[at + AHEAD]
            prefetch(entries, rows[soon, links + START], TIME)
            prefetch(entries, rows[soon, links + END], TIME)
            for w in range(width):
                tail = rows[soon, links + HEAD] - rows[soon, SUMS + width + w]
                prefetch(entries, tail, TIME)
        r = row[at]
        i = rows[r, links + QUEUE] - 1
        if i < 0:
            continue  # done with an earlier event of its key
        newest = rows[r, NEWEST]
        start, head = rows[r, links + START], rows[r, links + HEAD]
        end, limit = rows[r, links + END], rows[r, links + LIMIT]
        live -= end - start
        status = OK
        while i >= 0:
            time, value = times[i], values[i]
            if not -TIME_LIMIT < time < TIME_LIMIT:
                status = FAR_TIME
                break
            if end == limit:
                size = block_size(end - start)
                if free + size > len(entries):
                    status = FULL
                    break
                for n in range(end - start):
                    entries[free + n, TIME] = entries[start + n, TIME]
                    entries[free + n, VALUE] = entries[start + n, VALUE]
                head += free - start
                end += free - start
                start, limit = free, free + size
                free += size
            if start < end and time < newest:
                if time > newest - keep:
                    inserted[inserts, 0] = _insert(entries, start, end, time, value)
                    inserted[inserts, 1] = end
                    inserts += 1
                    end += 1
                    digest_entry(acc, seed, rows[r, 0], time, value, True)
                    if time <= newest - delay:
                        head += 1
                        if not _count_in(rows, r, newest - delay, windows, time, value):
                            status = OVERFLOW
                            break
                    own = 0
                else:  # later than what is kept: it counts for itself alone
                    own = 1 if delay == 0 else 0
                for w in range(width):
                    sums[i, w] = own * value
                    counts[i, w] = own
                if not _walk(entries, start, end, time - delay, windows, sums, counts, i):
                    status = OVERFLOW
                    break
                i = follower[i] - 1
                continue

            entries[end, TIME] = time
            entries[end, VALUE] = value
            end += 1
            newest = time
            digest_entry(acc, seed, rows[r, 0], time, value, True)
            fits = True
            while head < end and entries[head, TIME] <= time - delay:
                come = entries[head, VALUE]
                for w in range(width):
                    total = rows[r, SUMS + w] + come
                    fits &= not overflows(rows[r, SUMS + w], come, total)
                    rows[r, SUMS + w] = total
                    rows[r, SUMS + width + w] += 1
                head += 1
            if not fits:
                status = OVERFLOW
                break
            for w in range(width):
                total, count = rows[r, SUMS + w], rows[r, SUMS + width + w]
                edge = time - delay - windows[w]
                while count > 0 and entries[head - count, TIME] <= edge:
                    total -= entries[head - count, VALUE]
                    count -= 1
                rows[r, SUMS + w], rows[r, SUMS + width + w] = total, count
                sums[i, w], counts[i, w] = total, count
            while entries[start, TIME] <= time - keep:
                gone, value = entries[start, TIME], entries[start, VALUE]
                digest_entry(acc, seed, rows[r, 0], gone, value, False)
                start += 1
            i = follower[i] - 1
        live += end - start
        rows[r, NEWEST] = newest
        rows[r, links + START], rows[r, links + HEAD] = start, head
        rows[r, links + END], rows[r, links + LIMIT] = end, limit
        rows[r, links + QUEUE] = i + 1
        if status != OK:
            return at, i, free, live, inserts, status
    return len(row), len(row), free, live, inserts, OK


@kernel
def _insert(entries: I64, start: int, end: int, time: int, value: int) -> int:
    """Put a late event behind those of its time; its place."""
    place = end
    while place > start and entries[place - 1, TIME] > time:
        entries[place, TIME] = entries[place - 1, TIME]
        entries[place, VALUE] = entries[place - 1, VALUE]
        place -= 1
    entries[place, TIME] = time
    entries[place, VALUE] = value
    return place


@kernel
def take_out(entries: I64, inserted: I64) -> None:
    """Undo: close the gaps that late events made, newest first."""
    for n in range(len(inserted) - 1, -1, -1):
        for place in range(inserted[n, 0], inserted[n, 1]):
            entries[place, TIME] = entries[place + 1, TIME]
            entries[place, VALUE] = entries[place + 1, VALUE]


@kernel
def _count_in(rows: I64, r: int, upto: int, windows: I64, time: int, value: int) -> bool:
    """Add a late event to the windows (upto − window, upto] that hold it; False on overflow."""
    for w in range(len(windows)):
        if time > upto - windows[w]:
            total = rows[r, SUMS + w] + value
            if overflows(rows[r, SUMS + w], value, total):
                return False
            rows[r, SUMS + w] = total
            rows[r, SUMS + len(windows) + w] += 1
    return True


@kernel
def _walk(
    entries: I64, start: int, end: int, upto: int, windows: I64, sums: I64, counts: I64, i: int
) -> bool:
    """Add up what is kept in (upto − window, upto]; False on overflow."""
    at = start
    while at < end and entries[at, TIME] <= upto:
        for w in range(len(windows)):
            if entries[at, TIME] > upto - windows[w]:
                total = sums[i, w] + entries[at, VALUE]
                if overflows(sums[i, w], entries[at, VALUE], total):
                    return False
                sums[i, w] = total
                counts[i, w] += 1
        at += 1
    return True


@kernel
def compact(rows: I64, count: int, links: int, old: I64, new: I64) -> int:
    """Copy live entries key by key and point the rows at them; where free room begins."""
    free = 0
    for r in range(count):
        start, end = rows[r, links + START], rows[r, links + END]
        if start == end:
            continue
        for n in range(end - start):
            new[free + n, TIME] = old[start + n, TIME]
            new[free + n, VALUE] = old[start + n, VALUE]
        rows[r, links + START] = free
        rows[r, links + HEAD] += free - start
        rows[r, links + END] = free + end - start
        free += roomy(end - start)
        rows[r, links + LIMIT] = free
    return free


@kernel
def roomy(live: int) -> int:
    """Entries of a block after compaction, when most keys have the live entries they will have."""
    return live + live // 2 + BLOCK_MIN


@kernel
def gather(rows: I64, links: int, entries: I64, pairs: I64) -> None:
    """All live entries, row by row and oldest first."""
    n = 0
    for r in range(len(rows)):
        for at in range(rows[r, links + START], rows[r, links + END]):
            pairs[n, TIME] = entries[at, TIME]
            pairs[n, VALUE] = entries[at, VALUE]
            n += 1


@kernel
def scatter(
    rows: I64, links: int, lives: I64, pairs: I64, entries: I64, delay: int, seed: U64, acc: U64
) -> int:
    """The inverse of `gather`: lay out blocks, with digest and links; where free room begins."""
    free = 0
    n = 0
    for r in range(len(lives)):
        start = head = free
        for at in range(start, start + lives[r]):
            entries[at, TIME] = pairs[n, TIME]
            entries[at, VALUE] = pairs[n, VALUE]
            digest_entry(acc, seed, rows[r, 0], pairs[n, TIME], pairs[n, VALUE], True)
            if pairs[n, TIME] <= rows[r, NEWEST] - delay:
                head = at + 1
            n += 1
        free += roomy(lives[r])
        rows[r, links + START] = start
        rows[r, links + HEAD] = head
        rows[r, links + END] = start + lives[r]
        rows[r, links + LIMIT] = free
    return free
