"""Kernels of sessions: one row a session (`KeyRows`), as windows have it, and

    hash · key · start · 0 | corrections · events · first · last · aggregates | links

A session is final at the event where the watermark reaches its last time + gap. It is kept for
`gap` + `late` longer, so that every event that is not dropped finds the sessions that it is less
than `gap` away from. A key's sessions hang on a list from the key's row, the newest first; they are
at least `gap` apart, so an event joins two at the most. A heap knows when each is due to be looked
at; a session that was extended meanwhile goes back into it.
"""

from __future__ import annotations

import math

import numpy as np

from ledgerstream.stream.arenakernels import FAR_TIME, OK, OVERFLOW, TIME_LIMIT, overflows
from ledgerstream.stream.decay import decay
from ledgerstream.stream.kernels import BOOLS, I64, bits_of, float_of, kernel
from ledgerstream.stream.sketch import merge_sketch
from ledgerstream.stream.windowkernels import add
from ledgerstream.stream.windowplan import (
    CORRECTIONS,
    EVENTS,
    EWM,
    FIRST,
    LAST,
    LAST_TIME,
    MAX,
    MIN,
    OP,
    PLACE,
    SIZE,
    SKETCH,
    SUM,
    WEIGHTED,
)

# Links of a session: the next on its key's list (row + 1), the last log entry that names it, the
# call in which its pending version began, its key's row, how it stands, and when it is due.
NEXT, LOGGED, CALL, KEY, STANDS, DUE, LINKS = range(7)
UNMADE, OPEN, FINAL, GONE = range(4)
# Links of a key: its newest session (row + 1), the newest time of events that are surely in one,
# and the call that the latter is of.
HEAD, REACH, REACH_CALL, KEY_LINKS = range(4)


@kernel
def assign(
    times: I64,
    key: I64,
    keys: I64,
    rows: I64,
    at: int,
    seen: bool,
    greatest: int,
    gap: int,
    delay: int,
    late: int,
    drop: bool,
    in_time: BOOLS,
    begins: I64,
    touched: I64,
    dropped: I64,
    call: int,
) -> tuple[int, int, int, int]:
    """Which events are in time; those that may begin a session, in `begins`; and the rows of all
    sessions that may change, some more than once, in `touched`. Counts what is too late.

    key[n]: the row of each event's key. Returns both counts, and (OK, n), or FAR_TIME and the event
    at fault.
    """
    content = rows.shape[1] - LINKS
    links = keys.shape[1] - KEY_LINKS
    some = hits = 0
    for i in range(len(times)):
        time, k = times[i], key[i]
        if not -TIME_LIMIT < time < TIME_LIMIT:
            return some, hits, FAR_TIME, i
        if not seen or time > greatest:
            greatest = time
            seen = True
        in_time[i] = time + gap + late > greatest - delay
        if not in_time[i]:
            dropped[0] += 1
            continue
        s = keys[k, links + HEAD]
        known = keys[k, links + REACH_CALL] == call
        if not known and s:
            known = True
            keys[k, links + REACH] = rows[s - 1, at + LAST_TIME]
            keys[k, links + REACH_CALL] = call
        reach = keys[k, links + REACH]
        if not (known and reach <= time < reach + gap):
            begins[some] = i
            some += 1
        # With `drop`, an event may still be found to be too late for a session that is final.
        if (not drop or time >= greatest - delay) and (not known or time > reach):
            keys[k, links + REACH] = time
            keys[k, links + REACH_CALL] = call
        while s and rows[s - 1, at + LAST_TIME] + gap > time:
            if rows[s - 1, at - 2] - gap < time:
                touched[hits] = s - 1
                hits += 1
            s = rows[s - 1, content + NEXT]
    return some, hits, OK, len(times)


@kernel
def apply(
    times: I64,
    in_time: BOOLS,
    key: I64,
    made: I64,
    keys: I64,
    rows: I64,
    at: int,
    heap: I64,
    size: int,
    seen: bool,
    greatest: int,
    gap: int,
    delay: int,
    late: int,
    drop: bool,
    plan: I64,
    values: I64,
    out: I64,
    out_event: I64,
    out_new: BOOLS,
    gone: I64,
    log_row: I64,
    log_event: I64,
    dropped: I64,
    call: int,
) -> tuple[int, int, int, int, int, int, int]:
    """Apply events in order; made[n]: the row of the session that an event may begin, or −1.

    Final versions are copied to out[:finals] with their event, and what is open at the end and was
    touched follows. A session that another one takes in has a last version without events. Returns
    finals, rows, how many are in `gone`, the heap's size, the greatest time, and (OK, n) or
    OVERFLOW and the event at fault.
    """
    content = rows.shape[1] - LINKS
    links = keys.shape[1] - KEY_LINKS
    finals = over = logged = 0
    for i in range(len(times)):
        time = times[i]
        if not seen or time > greatest:
            seen = True
            greatest = time
            if size and heap[0, 0] <= greatest - delay:
                finals, over, size = _advance(
                    greatest - delay, i, keys, links, rows, content, at, heap, size, gap, late,
                    out, out_event, out_new, finals, gone, over, call,
                )  # fmt: skip
        if not in_time[i]:
            continue
        watermark = greatest - delay
        k = key[i]
        newer, s = 0, keys[k, links + HEAD]
        while s and rows[s - 1, at - 2] - time >= gap:
            newer, s = s, rows[s - 1, content + NEXT]
        right = 0
        if s and rows[s - 1, at - 2] > time:
            right, s = s, rows[s - 1, content + NEXT]
        left = s if s and time - rows[s - 1, at + LAST_TIME] < gap else 0
        if drop and (
            (left and rows[left - 1, content + STANDS] == FINAL)
            or (right and rows[right - 1, content + STANDS] == FINAL)
        ):
            dropped[0] += 1
            continue
        was_final = False
        if left:
            r = left - 1
            was_final = rows[r, content + STANDS] == FINAL
            if was_final:
                rows[r, at + CORRECTIONS] += 1
        else:
            r = made[i]
            rows[r, content + KEY] = k
            _insert(r, right if right else newer, keys, k, links, rows, content)
        if not add(rows, r, at, time, i, plan, values):
            return finals, finals, over, size, greatest, OVERFLOW, i
        if right:
            x = right - 1
            if not merge(rows, r, x, at, plan):
                return finals, finals, over, size, greatest, OVERFLOW, i
            _unlink(x, newer, keys, k, links, rows, content)
            if rows[x, content + STANDS] == FINAL:
                rows[x, at + CORRECTIONS] += 1
            rows[x, at + EVENTS : content] = 0
            out[finals, :content] = rows[x, :content]
            out_event[finals] = i
            out_new[finals] = rows[x, content + STANDS] == FINAL or rows[x, content + CALL] == call
            finals += 1
            rows[x, content + STANDS] = GONE
            gone[over] = x
            over += 1
        end = rows[r, at + LAST_TIME] + gap
        if end <= watermark:
            out[finals, :content] = rows[r, :content]
            out_event[finals] = i
            out_new[finals] = True
            finals += 1
            if not left:
                size = _push(heap, size, end + gap + late, r, rows, content)
            rows[r, content + STANDS] = FINAL
            continue
        if not left or was_final:
            rows[r, content + CALL] = call
            size = _push(heap, size, end, r, rows, content)
        rows[r, content + STANDS] = OPEN
        log_row[logged], log_event[logged] = r, i
        rows[r, content + LOGGED] = logged
        logged += 1
    made_rows = finals
    for n in range(logged):
        r = log_row[n]
        if rows[r, content + LOGGED] == n and rows[r, content + STANDS] == OPEN:
            out[made_rows, :content] = rows[r, :content]
            out_event[made_rows] = log_event[n]
            out_new[made_rows] = rows[r, content + CALL] == call
            made_rows += 1
    return finals, made_rows, over, size, greatest, OK, len(times)


@kernel
def _advance(
    watermark: int,
    event: int,
    keys: I64,
    links: int,
    rows: I64,
    content: int,
    at: int,
    heap: I64,
    size: int,
    gap: int,
    late: int,
    out: I64,
    out_event: I64,
    out_new: BOOLS,
    finals: int,
    gone: I64,
    over: int,
    call: int,
) -> tuple[int, int, int]:
    """The watermark moves, at an event: sessions become final, and those that nothing can reach any
    more go. Returns finals, how many are gone, and the heap's size."""
    while size and heap[0, 0] <= watermark:
        due, r = heap[0, 0], heap[0, 1]
        size = _pop(heap, size)
        stands = rows[r, content + STANDS]
        if stands not in (OPEN, FINAL) or rows[r, content + DUE] != due:
            continue  # of a session that is gone, or was opened again
        end = rows[r, at + LAST_TIME] + gap
        if stands == OPEN and end <= watermark:
            out[finals, :content] = rows[r, :content]
            out_event[finals] = event
            out_new[finals] = rows[r, content + CALL] == call
            finals += 1
            rows[r, content + STANDS] = FINAL
        if end > watermark:
            size = _push(heap, size, end, r, rows, content)
        elif end + gap + late > watermark:
            size = _push(heap, size, end + gap + late, r, rows, content)
        else:
            k = rows[r, content + KEY]
            newer, s = 0, keys[k, links + HEAD]
            while s != r + 1:
                newer, s = s, rows[s - 1, content + NEXT]
            _unlink(r, newer, keys, k, links, rows, content)
            rows[r, content + STANDS] = GONE
            gone[over] = r
            over += 1
    return finals, over, size


@kernel
def merge(rows: I64, r: int, x: int, at: int, plan: I64) -> bool:
    """Take the aggregates of x, all of whose events are later, into r; False if one overflows."""
    age = rows[x, at + LAST_TIME] - rows[r, at + LAST_TIME]
    rows[r, at + LAST_TIME] = rows[x, at + LAST_TIME]
    rows[r, at + EVENTS] += rows[x, at + EVENTS]
    for a in range(len(plan)):
        op = plan[a, OP]
        place = at + plan[a, PLACE]
        if op == FIRST:
            continue
        if op == LAST:
            rows[r, place] = rows[x, place]
        elif op == MIN:
            rows[r, place] = min(rows[r, place], rows[x, place])
        elif op == MAX:
            rows[r, place] = max(rows[r, place], rows[x, place])
        elif op == SUM:
            if not _sum(rows, r, x, place):
                return False
        elif op == EWM:
            left = decay(age, plan[a, SIZE])
            for word in (place, place + 1):
                total = float_of(rows[r, word]) * left + float_of(rows[x, word])
                rows[r, word] = bits_of(total)
                if not math.isfinite(total):
                    return False
        elif op == SKETCH:
            merge_sketch(rows, r, x, place)
        else:
            if op == WEIGHTED and not _sum(rows, r, x, place + 2):
                return False
            low = np.uint64(rows[r, place]) + np.uint64(rows[x, place])
            carry = 1 if low < np.uint64(rows[x, place]) else 0
            high = rows[r, place + 1] + rows[x, place + 1] + carry
            if overflows(rows[r, place + 1], rows[x, place + 1], high):
                return False
            rows[r, place], rows[r, place + 1] = np.int64(low), high
    return True


@kernel
def _sum(rows: I64, r: int, x: int, word: int) -> bool:
    total = rows[r, word] + rows[x, word]
    if overflows(rows[r, word], rows[x, word], total):
        return False
    rows[r, word] = total
    return True


@kernel
def _insert(r: int, newer: int, keys: I64, k: int, links: int, rows: I64, content: int) -> None:
    """Put a session on its key's list, behind `newer` (row + 1; 0: at the head)."""
    if newer:
        rows[r, content + NEXT] = rows[newer - 1, content + NEXT]
        rows[newer - 1, content + NEXT] = r + 1
    else:
        rows[r, content + NEXT] = keys[k, links + HEAD]
        keys[k, links + HEAD] = r + 1


@kernel
def _unlink(r: int, newer: int, keys: I64, k: int, links: int, rows: I64, content: int) -> None:
    """Take a session off its key's list, where `newer` is before it."""
    if newer:
        rows[newer - 1, content + NEXT] = rows[r, content + NEXT]
    else:
        keys[k, links + HEAD] = rows[r, content + NEXT]


@kernel
def _push(heap: I64, size: int, due: int, r: int, rows: I64, content: int) -> int:
    """Row r is to be looked at when the watermark reaches `due`, and no longer when it was."""
    rows[r, content + DUE] = due
    at = size
    while at:
        parent = (at - 1) // 2
        if heap[parent, 0] <= due:
            break
        heap[at, 0], heap[at, 1] = heap[parent, 0], heap[parent, 1]
        at = parent
    heap[at, 0], heap[at, 1] = due, r
    return size + 1


@kernel
def _pop(heap: I64, size: int) -> int:
    """Take out the first."""
    size -= 1
    due, r = heap[size, 0], heap[size, 1]
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and heap[child + 1, 0] < heap[child, 0]:
            child += 1
        if due <= heap[child, 0]:
            break
        heap[at, 0], heap[at, 1] = heap[child, 0], heap[child, 1]
        at = child
    heap[at, 0], heap[at, 1] = due, r
    return size


@kernel
def relink(
    which: I64,
    key: I64,
    keys: I64,
    rows: I64,
    at: int,
    heap: I64,
    watermark: int,
    gap: int,
    late: int,
) -> int:
    """Hang sessions, in the order of their starts, on the lists of their keys, which are empty, and
    into the heap, which is too; its size."""
    content = rows.shape[1] - LINKS
    links = keys.shape[1] - KEY_LINKS
    size = 0
    for i in range(len(which)):
        r, k = which[i], key[i]
        rows[r, content + KEY] = k
        _insert(r, 0, keys, k, links, rows, content)
        end = rows[r, at + LAST_TIME] + gap
        final = end <= watermark
        rows[r, content + STANDS] = FINAL if final else OPEN
        size = _push(heap, size, end + gap + late if final else end, r, rows, content)
    return size
