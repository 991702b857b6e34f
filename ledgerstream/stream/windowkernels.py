"""Kernels of event-time windows: which windows an event belongs to, what it adds, what becomes
final. One row a window (`KeyRows`), over the words

    hash · key · start · width | corrections · events · first time · last time · aggregates | links

Everything is decided event by event by the watermark (greatest time so far − delay): a window is
final at the event where the watermark reaches its end, and goes where it reaches end + late.
Windows of one start and width hang on one list, found by `start ÷ every` in a ring that is as long
as windows can live; so what an event closes is found without a search.
"""

from __future__ import annotations

import math

import numpy as np

from ledgerstream.stream.arenakernels import FAR_TIME, OK, OVERFLOW, TIME_LIMIT, overflows
from ledgerstream.stream.decay import decay
from ledgerstream.stream.kernels import BOOLS, I64, bits_of, float_of, kernel
from ledgerstream.stream.sketch import sketch_value
from ledgerstream.stream.valuekernels import take_value
from ledgerstream.stream.windowplan import (
    COLUMN,
    CORRECTIONS,
    EVENTS,
    EWM,
    FIRST,
    FIRST_TIME,
    LAST,
    LAST_TIME,
    MAX,
    MIN,
    OP,
    PLACE,
    SIZE,
    SKETCH,
    SUM,
    WEIGHT,
    WEIGHTED,
    WORDS,
)

LINKS = 4  # words after a row's content: the next on its list (row + 1), the last pair that used
#            it, the call that made it, and the first of its values (`windowvalues`)
VALUES = 3

_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_TOP = np.uint64(2**63)
_SMALL = 2**31
_MANTISSA_BITS = 55  # of a quotient, or more: 53, one to round by, one for all that is below
_EXACT = 2**53


@kernel
def assign(
    times: I64,
    keys: I64,
    seen: bool,
    greatest: int,
    delay: int,
    late: int,
    over: I64,
    every: I64,
    events: I64,
    windows: I64,
    dropped: I64,
) -> tuple[int, int, int]:
    """The (event, window) pairs, in order: events[m], and windows[m, key · start · width].

    Adds what comes too late for a window to dropped[width]. Returns m, and (OK, n), or FAR_TIME
    and the event at fault.
    """
    pairs = 0
    words = keys.shape[1]
    for i in range(len(times)):
        time = times[i]
        if not -TIME_LIMIT < time < TIME_LIMIT:
            return pairs, FAR_TIME, i
        if not seen or time > greatest:
            greatest = time
            seen = True
        watermark = greatest - delay
        for w in range(len(over)):
            start = (time // every[w]) * every[w]
            while start > time - over[w]:
                if start + over[w] + late > watermark:
                    events[pairs] = i
                    for c in range(words):
                        windows[pairs, c] = keys[i, c]
                    windows[pairs, words] = start
                    windows[pairs, words + 1] = w
                    pairs += 1
                else:
                    dropped[w] += 1
                start -= every[w]
    return pairs, OK, len(times)


@kernel
def accumulate(
    times: I64,
    events: I64,
    row: I64,
    rows: I64,
    at: int,
    seen: bool,
    greatest: int,
    delay: int,
    late: int,
    over: I64,
    every: I64,
    rings: I64,
    ring_at: I64,
    slots: I64,
    plan: I64,
    values: I64,
    sets: I64,
    members: I64,
    member: I64,
    value_at: int,
    out: I64,
    out_event: I64,
    out_new: BOOLS,
    expired: I64,
    call: int,
) -> tuple[int, int, int, int, int, int]:
    """Apply events in order to the rows that `assign` found; `at`: the first word after the key.

    sets: the plan of the columns that keep values; member[pairs · sets]: the row of each value in
    `members`.

    Rows that become final, and each late one's new version, are copied to out[:finals] with their
    event; windows that are open at the end and were touched follow in out[finals:rows]. out_new:
    whether no earlier call has copied that version; `call` is this one's number, never used before.
    Rows whose time is over are listed in `expired`. Returns finals, rows, how many expired, the
    greatest time, and (OK, n), or OVERFLOW or CROWDED and the event at fault.
    """
    widths = len(over)
    close_at = np.empty(widths, np.int64)
    expire_at = np.empty(widths, np.int64)
    next_move = 0
    if seen:
        next_move = next_moves(greatest - delay, late, over, every, close_at, expire_at)
    content = rows.shape[1] - LINKS
    finals = gone = pair = 0
    for i in range(len(times)):
        time = times[i]
        if not seen:
            seen = True
            greatest = time
            next_move = next_moves(greatest - delay, late, over, every, close_at, expire_at)
        elif time > greatest:
            watermark = time - delay
            if watermark >= next_move:
                finals, gone = advance(
                    watermark, greatest, i, rows, content, late, over, every, rings, ring_at,
                    slots, close_at, expire_at, out, out_event, out_new, finals, expired, gone,
                    call,
                )  # fmt: skip
                next_move = next_moves(watermark, late, over, every, close_at, expire_at)
            greatest = time
        watermark = greatest - delay
        while pair < len(events) and events[pair] == i:
            r = row[pair]
            w = rows[r, at - 1]
            if rows[r, at + EVENTS] == 0:
                slot = ring_at[w] + ((rows[r, at - 2] // every[w]) & (slots[w] - 1))
                rows[r, content] = rings[slot]
                rings[slot] = r + 1
                rows[r, content + 2] = call
            final = rows[r, at - 2] + over[w] <= watermark
            if final and rows[r, at + EVENTS] > 0:
                rows[r, at + CORRECTIONS] += 1
            if not add(rows, r, at, time, i, plan, values):
                return finals, finals, gone, greatest, OVERFLOW, i
            for s in range(len(sets)):
                status = take_value(
                    rows, r, at, content + VALUES, sets, s, values, i, members,
                    member[pair * len(sets) + s], value_at,
                )  # fmt: skip
                if status != OK:
                    return finals, finals, gone, greatest, status, i
            rows[r, content + 1] = pair
            if final:
                out[finals, :content] = rows[r, :content]
                out_event[finals] = i
                out_new[finals] = True
                finals += 1
            pair += 1
    made = finals
    watermark = greatest - delay
    for p in range(len(events)):
        r = row[p]
        if rows[r, content + 1] == p and rows[r, at - 2] + over[rows[r, at - 1]] > watermark:
            out[made, :content] = rows[r, :content]
            out_event[made] = events[p]
            out_new[made] = rows[r, content + 2] == call
            made += 1
    return finals, made, gone, greatest, OK, len(times)


@kernel
def advance(
    watermark: int,
    greatest: int,
    event: int,
    rows: I64,
    content: int,
    late: int,
    over: I64,
    every: I64,
    rings: I64,
    ring_at: I64,
    slots: I64,
    close_at: I64,
    expire_at: I64,
    out: I64,
    out_event: I64,
    out_new: BOOLS,
    finals: int,
    expired: I64,
    gone: int,
    call: int,
) -> tuple[int, int]:
    """The watermark moves, at an event: windows that it closes are copied to `out` from `finals`
    on, and those whose time is over are listed in `expired` from `gone` on; both counts then.

    greatest: the greatest time before this event's.
    """
    for w in range(len(over)):
        newest = greatest // every[w]
        if watermark >= close_at[w]:
            upto = min((watermark - over[w]) // every[w], newest)
            for q in range((close_at[w] - over[w]) // every[w], upto + 1):
                r = rings[ring_at[w] + (q & (slots[w] - 1))] - 1
                while r >= 0:
                    out[finals, :content] = rows[r, :content]
                    out_event[finals] = event
                    out_new[finals] = rows[r, content + 2] == call
                    finals += 1
                    r = rows[r, content] - 1
        if watermark >= expire_at[w]:
            upto = min((watermark - over[w] - late) // every[w], newest)
            for q in range((expire_at[w] - over[w] - late) // every[w], upto + 1):
                slot = ring_at[w] + (q & (slots[w] - 1))
                r = rings[slot] - 1
                while r >= 0:
                    expired[gone] = r
                    gone += 1
                    r = rows[r, content] - 1
                rings[slot] = 0
    return finals, gone


@kernel
def next_moves(
    watermark: int, late: int, over: I64, every: I64, close_at: I64, expire_at: I64
) -> int:
    """The watermarks at which the next window of each width closes, and the next expires; the first
    of them all."""
    first = np.iinfo(np.int64).max
    for w in range(len(over)):
        close_at[w] = ((watermark - over[w]) // every[w] + 1) * every[w] + over[w]
        end = over[w] + late
        expire_at[w] = ((watermark - end) // every[w] + 1) * every[w] + end
        first = min(first, close_at[w], expire_at[w])
    return first


@kernel
def add(
    rows: I64,
    r: int,
    at: int,
    time: int,
    event: int,
    plan: I64,
    values: I64,
) -> bool:
    """Take an event into a window's aggregates; False if one overflows."""
    fresh = rows[r, at + EVENTS] == 0
    newest = rows[r, at + LAST_TIME]
    first = fresh or time < rows[r, at + FIRST_TIME]
    last = fresh or time >= rows[r, at + LAST_TIME]
    rows[r, at + EVENTS] += 1
    if first:
        rows[r, at + FIRST_TIME] = time
    if last:
        rows[r, at + LAST_TIME] = time
    for a in range(len(plan)):
        op = plan[a, OP]
        place = at + plan[a, PLACE]
        value = values[plan[a, COLUMN], event]
        if op == FIRST:
            if first:
                rows[r, place] = value
        elif op == LAST:
            if last:
                rows[r, place] = value
        elif op == MIN:
            if fresh or value < rows[r, place]:
                rows[r, place] = value
        elif op == MAX:
            if fresh or value > rows[r, place]:
                rows[r, place] = value
        elif op == SUM:
            total = rows[r, place] + value
            if overflows(rows[r, place], value, total):
                return False
            rows[r, place] = total
        elif op == EWM:
            if not add_decayed(rows, r, place, float_of(value), time, newest, plan[a, SIZE], fresh):
                return False
        elif op == SKETCH:
            sketch_value(rows, r, place, values, plan[a, COLUMN], plan[a, WORDS], event)
        else:
            weight = 1
            if op == WEIGHTED:
                weight = values[plan[a, WEIGHT], event]
                total = rows[r, place + 2] + weight
                if overflows(rows[r, place + 2], weight, total):
                    return False
                rows[r, place + 2] = total
            high, low = multiply(value, weight)
            low_sum = np.uint64(rows[r, place]) + low
            carry = 1 if low_sum < low else 0
            high_sum = rows[r, place + 1] + high + carry
            if overflows(rows[r, place + 1], high, high_sum):
                return False
            rows[r, place] = np.int64(low_sum)
            rows[r, place + 1] = high_sum
    return True


@kernel
def add_decayed(
    rows: I64, r: int, place: int, value: float, time: int, newest: int, halflife: int, fresh: bool
) -> bool:
    """Σ value · weight and Σ weight, where the weight of an event halves with each half-life that
    it is older than the newest; False where the sum is no number any more."""
    if fresh:
        total, weights = value, 1.0
    else:
        total, weights = float_of(rows[r, place]), float_of(rows[r, place + 1])
        if time >= newest:
            left = decay(time - newest, halflife)
            total, weights = total * left + value, weights * left + 1.0
        else:
            weight = decay(newest - time, halflife)
            total, weights = total + value * weight, weights + weight
    rows[r, place], rows[r, place + 1] = bits_of(total), bits_of(weights)
    return math.isfinite(total)


@kernel
def relink(
    rows: I64,
    which: I64,
    content: int,
    at: int,
    every: I64,
    rings: I64,
    ring_at: I64,
    slots: I64,
) -> None:
    """Hang the rows `which` on their lists anew."""
    rings[:] = 0
    for i in range(len(which)):
        r = which[i]
        w = rows[r, at - 1]
        slot = ring_at[w] + ((rows[r, at - 2] // every[w]) & (slots[w] - 1))
        rows[r, content] = rings[slot]
        rings[slot] = r + 1


@kernel
def multiply(a: int, b: int) -> tuple[int, np.uint64]:
    """The 128 bits of a product: the high word, signed, and the low one."""
    if -_SMALL <= a < _SMALL and -_SMALL <= b < _SMALL:
        product = a * b
        return product >> 63, np.uint64(product)
    x = np.uint64(-a) if a < 0 else np.uint64(a)
    y = np.uint64(-b) if b < 0 else np.uint64(b)
    x0 = x & _LOW
    x1 = x >> _HALF
    y0 = y & _LOW
    y1 = y >> _HALF
    p00 = x0 * y0
    p01 = x0 * y1
    p10 = x1 * y0
    middle = (p00 >> _HALF) + (p01 & _LOW) + (p10 & _LOW)
    low = (p00 & _LOW) | (middle << _HALF)
    high = x1 * y1 + (p01 >> _HALF) + (p10 >> _HALF) + (middle >> _HALF)
    if (a < 0) != (b < 0):
        low = ~low + _ONE
        high = ~high + (_ONE if low == _ZERO else _ZERO)
    return np.int64(high), low  # type: ignore[return-value]


@kernel
def means(low: I64, high: I64, weight: I64, out: np.ndarray) -> None:
    """out[n]: 128-bit sums over 64-bit weights, each rounded once; NaN where the weight is zero."""
    for i in range(len(out)):
        out[i] = quotient(np.uint64(low[i]), high[i], weight[i])


@kernel
def quotient(low: np.uint64, high: int, weight: int) -> float:
    """(high · 2⁶⁴ + low) ÷ weight to the nearest float64, ties to even."""
    if weight == 0:
        return math.nan
    if high == 0 and low == _ZERO:
        return 0.0
    negative = (high < 0) != (weight < 0)
    top = np.uint64(high)
    if high < 0:
        low = ~low + _ONE
        top = ~top + (_ONE if low == _ZERO else _ZERO)
    divisor = np.uint64(-weight) if weight < 0 else np.uint64(weight)
    if top == _ZERO and low < np.uint64(_EXACT) and divisor < np.uint64(_EXACT):
        exact = float(low) / float(divisor)
        return -exact if negative else exact
    # The dividend is shifted so that the quotient has bits enough. Then long division, by as many
    # bits at a time as the rest leaves room for.
    width = bit_length(low) if top == _ZERO else 64 + bit_length(top)
    room = bit_length(divisor)
    shift = _MANTISSA_BITS + room - width
    left = width + shift  # bits of the shifted dividend that are still to be taken
    rest = mantissa = _ZERO
    taken = min(left, 63)
    while left > 0:
        left -= taken
        rest = rest << np.uint64(taken) | bits_at(top, low, left - shift, taken)
        digit = rest // divisor
        rest -= digit * divisor
        mantissa = mantissa << np.uint64(taken) | digit
        taken = min(left, max(64 - room, 1))
    lost = max(-shift, 0)  # bits that were shifted out
    rest |= bits_at(top, low, 0, min(lost, 63)) | bits_at(top, low, 63, max(lost - 63, 0))
    if rest != _ZERO:
        mantissa |= _ONE
    value = math.ldexp(float(mantissa), -shift)
    return -value if negative else value


@kernel
def bit_length(word: np.uint64) -> int:
    """How many bits a word has up to its first one bit."""
    length = 0
    for step in (32, 16, 8, 4, 2, 1):
        if word >> np.uint64(step) != _ZERO:
            word >>= np.uint64(step)
            length += step
    return length + (1 if word != _ZERO else 0)


@kernel
def bits_at(top: np.uint64, low: np.uint64, place: int, count: int) -> np.uint64:
    """`count` bits, at most 63, of (top · 2⁶⁴ + low) from `place` on; below 0 there are zeros."""
    found = _ZERO
    if place <= -64:
        return found
    if place < 0:
        found = low << np.uint64(-place)
    elif place < 64:
        found = low >> np.uint64(place)
        if place > 0:
            found |= top << np.uint64(64 - place)
    elif place < 128:
        found = top >> np.uint64(place - 64)
    return found & ((_ONE << np.uint64(count)) - _ONE)
