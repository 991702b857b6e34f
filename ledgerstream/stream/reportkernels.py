"""Kernels of windows whose events may be corrected and cancelled: `windowkernels`, and besides a
row for each event that is kept,

    hash · key · id | time · sequence · values | live · hangs · (window · before · after)…

with three links (a row + 1 each) for each window that an event is in. A window's events hang on a
list in the order of their sequence (the offset of the report that was new), whose ends are two more
links of the window's row. What a report takes out of a window is subtracted; where it was the
first, the last, the least or the greatest, the window is made anew from its list.
"""

from __future__ import annotations

import numpy as np

from ledgerstream.stream.arenakernels import FAR_TIME, OK, OVERFLOW, TIME_LIMIT, overflows
from ledgerstream.stream.kernels import BOOLS, I64, kernel
from ledgerstream.stream.windowkernels import LINKS, add, advance, multiply, next_moves
from ledgerstream.stream.windowplan import (
    COLUMN,
    CORRECTIONS,
    EVENTS,
    FIRST_TIME,
    LAST_TIME,
    MAX,
    MEAN,
    MIN,
    OP,
    PLACE,
    SUM,
    WEIGHT,
    WEIGHTED,
)

NEW, CORRECT, CANCEL = range(3)
TIME, SEQUENCE, VALUES = range(3)  # words of a kept event after its id
LIVE, HANGS, HOOKS = range(3)  # its links: whether it counts, in how many windows, then the hooks
WINDOW, BEFORE, AFTER = range(3)  # of a hook
HEAD, TAIL = LINKS, LINKS + 1  # links of a window: its list
REPORT_LINKS = LINKS + 2

_DONE, _REBUILD, _OVERFLOW = range(3)


@kernel
def assign(
    times: I64,
    kinds: I64,
    keys: I64,
    seen: bool,
    watermark: int,
    late: int,
    over: I64,
    every: I64,
    bases: I64,
    events: I64,
    windows: I64,
    hooks: I64,
) -> tuple[int, int, int]:
    """The (event, window) pairs that may come to be: of what is not cancelled, without the windows
    that were gone before. hooks[m]: which of the event's hooks is for that window.

    Returns m, and (OK, n), or FAR_TIME and the event at fault.
    """
    pairs = 0
    words = keys.shape[1]
    for i in range(len(times)):
        time = times[i]
        if not -TIME_LIMIT < time < TIME_LIMIT:
            return pairs, FAR_TIME, i
        if kinds[i] == CANCEL:
            continue
        for w in range(len(over)):
            start = (time // every[w]) * every[w]
            hook = bases[w]
            while start > time - over[w]:
                if not seen or start + over[w] + late > watermark:
                    events[pairs] = i
                    for c in range(words):
                        windows[pairs, c] = keys[i, c]
                    windows[pairs, words] = start
                    windows[pairs, words + 1] = w
                    hooks[pairs] = hook
                    pairs += 1
                hook += 1
                start -= every[w]
    return pairs, OK, len(times)


@kernel
def apply(
    times: I64,
    kinds: I64,
    sequences: I64,
    given: I64,
    kept: I64,
    events: I64,
    row: I64,
    hooks: I64,
    rows: I64,
    content: int,
    at: int,
    trades: I64,
    trade_at: int,
    links: int,
    seen: bool,
    greatest: int,
    delay: int,
    late: int,
    over: I64,
    every: I64,
    bases: I64,
    rings: I64,
    ring_at: I64,
    slots: I64,
    plan: I64,
    out: I64,
    out_event: I64,
    out_new: BOOLS,
    expired: I64,
    over_trades: I64,
    unmatched: I64,
    log_row: I64,
    log_event: I64,
    dropped: I64,
    call: int,
) -> tuple[int, int, int, int, int, bool, int, int, int]:
    """Apply reports in order. given[n, values]; kept[n]: the row in `trades` of what each is about.

    As `windowkernels.accumulate`; besides, rows of `trades` that may be over are listed in
    over_trades, and reports that name nothing in `unmatched`, which are left out. Returns finals,
    rows, how many expired, over and unmatched, whether there was an event, the greatest time, and
    (OK, n) or OVERFLOW and the event at fault.
    """
    widths = len(over)
    each = (trades.shape[1] - links - HOOKS) // 3
    values = trades[:, trade_at + VALUES : links].T
    close_at, expire_at = np.empty(widths, np.int64), np.empty(widths, np.int64)
    next_move = 0
    if seen:
        next_move = next_moves(greatest - delay, late, over, every, close_at, expire_at)
    hit, rebuild = np.empty(2 * each, np.int64), np.empty(2 * each, np.bool_)
    was = np.empty(3 * each, np.int64)
    finals = gone = ended = refused = logged = pair = 0
    for i in range(len(times)):
        time, kind, t = times[i], kinds[i], kept[i]
        known = trades[t, links + LIVE] == 1
        if known == (kind == NEW) or not NEW <= kind <= CANCEL:
            unmatched[refused] = i
            refused += 1
            over_trades[ended] = t
            ended += 1
            while pair < len(events) and events[pair] == i:
                pair += 1
            continue
        if not seen:
            seen = True
            greatest = time
            next_move = next_moves(greatest - delay, late, over, every, close_at, expire_at)
        elif time > greatest:
            watermark = time - delay
            if watermark >= next_move:
                before = gone
                finals, gone = advance(
                    watermark, greatest, i, rows, content, late, over, every, rings, ring_at,
                    slots, close_at, expire_at, out, out_event, out_new, finals, expired, gone,
                    call,
                )  # fmt: skip
                for e in range(before, gone):
                    ended = _let_go(
                        expired[e], rows, content, at, trades, trade_at, links, every, bases,
                        over_trades, ended,
                    )  # fmt: skip
                next_move = next_moves(watermark, late, over, every, close_at, expire_at)
            greatest = time
        watermark = greatest - delay
        hits = 0
        old = trades[t, trade_at + TIME]
        if kind != NEW:
            hits = _take_out(
                t, time, kind == CANCEL, rows, content, at, trades, trade_at, links, over, every,
                bases, plan, values, was, hit, rebuild,
            )  # fmt: skip
            if hits < 0:
                return finals, finals, gone, ended, refused, seen, greatest, OVERFLOW, i
        for w in range(widths):
            if kind != NEW:
                _count_gone(old, time, False, w, watermark - late, over, every, dropped)
            if kind != CANCEL:
                _count_gone(time, old, kind == CORRECT, w, watermark - late, over, every, dropped)
        if kind == NEW:
            trades[t, trade_at + SEQUENCE] = sequences[i]
        if kind != CANCEL:
            trades[t, trade_at + TIME] = time
            for v in range(given.shape[1]):
                trades[t, trade_at + VALUES + v] = given[i, v]
        while pair < len(events) and events[pair] == i:
            r, hook = row[pair], hooks[pair]
            pair += 1
            w = rows[r, at - 1]
            if rows[r, at - 2] + over[w] + late <= watermark:
                continue
            if rows[r, content + 2] == 0:
                slot = ring_at[w] + ((rows[r, at - 2] // every[w]) & (slots[w] - 1))
                rows[r, content] = rings[slot]
                rings[slot] = r + 1
                rows[r, content + 2] = call
                rows[r, at + CORRECTIONS] = -1 if rows[r, at - 2] + over[w] <= watermark else 0
            h = _hit(hit, rebuild, hits, r)
            hits = max(hits, h + 1)
            if trades[t, links + HOOKS + 3 * hook + WINDOW] == 0:
                _hang(t, hook, r, rows, content, at, trades, trade_at, links, every, bases)
            if rebuild[h]:
                continue
            if (
                kind != NEW
                and rows[r, at + EVENTS] > 0
                and (time == rows[r, at + FIRST_TIME] or time == rows[r, at + LAST_TIME])
            ):  # its place among those of that time is not the last
                rebuild[h] = True
            elif not add(rows, r, at, time, t, plan, values):
                return finals, finals, gone, ended, refused, seen, greatest, OVERFLOW, i
        trades[t, links + LIVE] = kind != CANCEL and trades[t, links + HANGS] > 0
        if trades[t, links + LIVE] == 0:
            over_trades[ended] = t
            ended += 1
        for h in range(hits):
            r = hit[h]
            if rebuild[h] and not _rebuild(
                r, rows, content, at, trades, trade_at, links, every, bases, plan, values,
            ):  # fmt: skip
                return finals, finals, gone, ended, refused, seen, greatest, OVERFLOW, i
            log_row[logged], log_event[logged] = r, i
            rows[r, content + 1] = logged
            logged += 1
            if rows[r, at - 2] + over[rows[r, at - 1]] <= watermark:
                rows[r, at + CORRECTIONS] += 1
                out[finals, :content] = rows[r, :content]
                out_event[finals] = i
                out_new[finals] = True
                finals += 1
    made = finals
    watermark = greatest - delay
    for n in range(logged):
        r = log_row[n]
        if rows[r, content + 1] == n and rows[r, at - 2] + over[rows[r, at - 1]] > watermark:
            out[made, :content] = rows[r, :content]
            out_event[made] = log_event[n]
            out_new[made] = rows[r, content + 2] == call
            made += 1
    return finals, made, gone, ended, refused, seen, greatest, OK, len(times)


@kernel
def _count_gone(
    time: int, other: int, besides: bool, w: int, gone_at: int, over: I64, every: I64, dropped: I64
) -> None:
    """Count the windows of `time` that are gone; with `besides`, those that `other` is not in."""
    start = (time // every[w]) * every[w]
    while start > time - over[w]:
        if start + over[w] <= gone_at and not (besides and start <= other < start + over[w]):
            dropped[w] += 1
        start -= every[w]


@kernel
def _hit(hit: I64, rebuild: BOOLS, hits: int, r: int) -> int:
    """The place of a window among those that this report changes."""
    for h in range(hits):
        if hit[h] == r:
            return h
    hit[hits], rebuild[hits] = r, False
    return hits


@kernel
def _hook(time: int, r: int, rows: I64, at: int, every: I64, bases: I64) -> int:
    """Which hook an event of that time has for window r."""
    w = rows[r, at - 1]
    hook: int = bases[w] + time // every[w] - rows[r, at - 2] // every[w]
    return hook


@kernel
def _let_go(
    r: int,
    rows: I64,
    content: int,
    at: int,
    trades: I64,
    trade_at: int,
    links: int,
    every: I64,
    bases: I64,
    over_trades: I64,
    ended: int,
) -> int:
    """A window is gone: take its events off their hooks; what hangs nowhere now is over."""
    t = rows[r, content + HEAD] - 1
    while t >= 0:
        hook = _hook(trades[t, trade_at + TIME], r, rows, at, every, bases)
        place = links + HOOKS + 3 * hook
        after = trades[t, place + AFTER] - 1
        trades[t, place] = trades[t, place + BEFORE] = trades[t, place + AFTER] = 0
        trades[t, links + HANGS] -= 1
        if trades[t, links + HANGS] == 0:
            trades[t, links + LIVE] = 0
            over_trades[ended] = t
            ended += 1
        t = after
    rows[r, content + HEAD] = rows[r, content + TAIL] = 0
    return ended


@kernel
def _take_out(
    t: int,
    time: int,
    cancel: bool,
    rows: I64,
    content: int,
    at: int,
    trades: I64,
    trade_at: int,
    links: int,
    over: I64,
    every: I64,
    bases: I64,
    plan: I64,
    values: I64,
    was: I64,
    hit: I64,
    rebuild: BOOLS,
) -> int:
    """Take an event out of the windows that it is in; of those that `time` is in too it keeps the
    hook. Returns how many windows it was in, or −1 for a sum that overflows."""
    hooks = len(was) // 3
    first = links + HOOKS
    was[:] = trades[t, first:]
    trades[t, first:] = 0
    hits = 0
    old = trades[t, trade_at + TIME]
    for hook in range(hooks):
        r = was[3 * hook + WINDOW] - 1
        if r < 0:
            continue
        how = _take(rows, r, at, old, t, plan, values)
        if how == _OVERFLOW:
            return -1
        hit[hits], rebuild[hits] = r, how == _REBUILD
        hits += 1
        before, after = was[3 * hook + BEFORE], was[3 * hook + AFTER]
        start = rows[r, at - 2]
        if not cancel and start <= time < start + over[rows[r, at - 1]]:
            place = first + 3 * _hook(time, r, rows, at, every, bases)
            trades[t, place + WINDOW] = r + 1
            trades[t, place + BEFORE] = before
            trades[t, place + AFTER] = after
            continue
        trades[t, links + HANGS] -= 1
        if before:
            n = _hook(trades[before - 1, trade_at + TIME], r, rows, at, every, bases)
            trades[before - 1, first + 3 * n + AFTER] = after
        else:
            rows[r, content + HEAD] = after
        if after:
            n = _hook(trades[after - 1, trade_at + TIME], r, rows, at, every, bases)
            trades[after - 1, first + 3 * n + BEFORE] = before
        else:
            rows[r, content + TAIL] = before
    return hits


@kernel
def _hang(
    t: int,
    hook: int,
    r: int,
    rows: I64,
    content: int,
    at: int,
    trades: I64,
    trade_at: int,
    links: int,
    every: I64,
    bases: I64,
) -> None:
    """Put an event into a window's list, behind all of a lower sequence."""
    first = links + HOOKS
    sequence = trades[t, trade_at + SEQUENCE]
    before, after = rows[r, content + TAIL], 0
    while before and trades[before - 1, trade_at + SEQUENCE] > sequence:
        after = before
        n = _hook(trades[before - 1, trade_at + TIME], r, rows, at, every, bases)
        before = trades[before - 1, first + 3 * n + BEFORE]
    trades[t, first + 3 * hook + WINDOW] = r + 1
    trades[t, first + 3 * hook + BEFORE] = before
    trades[t, first + 3 * hook + AFTER] = after
    trades[t, links + HANGS] += 1
    if before:
        n = _hook(trades[before - 1, trade_at + TIME], r, rows, at, every, bases)
        trades[before - 1, first + 3 * n + AFTER] = t + 1
    else:
        rows[r, content + HEAD] = t + 1
    if after:
        n = _hook(trades[after - 1, trade_at + TIME], r, rows, at, every, bases)
        trades[after - 1, first + 3 * n + BEFORE] = t + 1
    else:
        rows[r, content + TAIL] = t + 1


@kernel
def _rebuild(
    r: int,
    rows: I64,
    content: int,
    at: int,
    trades: I64,
    trade_at: int,
    links: int,
    every: I64,
    bases: I64,
    plan: I64,
    values: I64,
) -> bool:
    """A window's aggregates from its events; False if one overflows."""
    rows[r, at + EVENTS : content] = 0
    t = rows[r, content + HEAD] - 1
    while t >= 0:
        time = trades[t, trade_at + TIME]
        if not add(rows, r, at, time, t, plan, values):
            return False
        hook = _hook(time, r, rows, at, every, bases)
        t = trades[t, links + HOOKS + 3 * hook + AFTER] - 1
    return True


@kernel
def _take(
    rows: I64,
    r: int,
    at: int,
    time: int,
    event: int,
    plan: I64,
    values: I64,
) -> int:
    """Subtract an event from a window, unless what is left must be looked for."""
    if time == rows[r, at + FIRST_TIME] or time == rows[r, at + LAST_TIME]:
        return _REBUILD
    for a in range(len(plan)):
        extreme = plan[a, OP] in (MIN, MAX)
        if extreme and values[plan[a, COLUMN], event] == rows[r, at + plan[a, PLACE]]:
            return _REBUILD
    rows[r, at + EVENTS] -= 1
    for a in range(len(plan)):
        op, place = plan[a, OP], at + plan[a, PLACE]
        if op == SUM:
            value = values[plan[a, COLUMN], event]
            total = rows[r, place] - value
            if overflows(total, value, rows[r, place]):
                return _OVERFLOW
            rows[r, place] = total
        elif op in (MEAN, WEIGHTED):
            weight = 1
            if op == WEIGHTED:
                weight = values[plan[a, WEIGHT], event]
                total = rows[r, place + 2] - weight
                if overflows(total, weight, rows[r, place + 2]):
                    return _OVERFLOW
                rows[r, place + 2] = total
            high, low = multiply(values[plan[a, COLUMN], event], weight)
            low_sum = np.uint64(rows[r, place])
            borrow = 1 if low_sum < low else 0
            high_sum = rows[r, place + 1] - high - borrow
            if overflows(high_sum, high, rows[r, place + 1]):
                return _OVERFLOW
            rows[r, place] = np.int64(low_sum - low)
            rows[r, place + 1] = high_sum
    return _DONE


@kernel
def rehang(
    which: I64,
    window: I64,
    rows: I64,
    content: int,
    at: int,
    trades: I64,
    trade_at: int,
    links: int,
    every: I64,
    bases: I64,
) -> None:
    """Hang events anew, `which` in the order of their sequence, on the windows window[n, hooks], −1
    for one that is gone."""
    for n in range(len(which)):
        t = which[n]
        trades[t, links:] = 0
        trades[t, links + LIVE] = 1
        for hook in range(window.shape[1]):
            if window[n, hook] >= 0:
                _hang(
                    t, hook, window[n, hook], rows, content, at, trades, trade_at, links, every,
                    bases,
                )  # fmt: skip
