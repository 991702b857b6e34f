"""Kernels over the values of windows, `windowvalues`: sets, totals by value, and the greatest.

A column of totals keeps its greatest in the window's row, from the plan's place on:

    how many values · (value · total) of each place

in the order that is shown: by total, the greatest first, those of one total by value. Only where
the total of a shown value falls below the last shown are all values of the window looked at.
"""

from __future__ import annotations

import numpy as np

from ledgerstream.stream.arenakernels import OK, OVERFLOW, overflows
from ledgerstream.stream.kernels import I64, kernel
from ledgerstream.stream.windowplan import (
    DISTINCT,
    LIMIT,
    OP,
    PLACE,
    SIZE,
    TEXT,
    TOP_SUM,
    WEIGHT,
    WORDS,
)

CROWDED = 4  # a status besides those of the arena: too many different values

_BYTE = 8
_LOW = np.uint64(0xFF)


@kernel
def take_value(
    rows: I64,
    row: int,
    at: int,
    link: int,
    plan: I64,
    column: int,
    values: I64,
    event: int,
    members: I64,
    member: int,
    value_at: int,
) -> int:
    """Take an event's value into a column of its window: OK, OVERFLOW or CROWDED.

    member: the value's row in `members`, which may be new. value_at: where a value lies in it.
    """
    place = at + plan[column, PLACE]
    total_at = members.shape[1] - 2
    fresh = members[member, total_at + 1] == 0
    if fresh:
        if rows[row, place] >= plan[column, LIMIT]:
            return CROWDED
        rows[row, place] += 1
        members[member, total_at + 1] = rows[row, link] if rows[row, link] != 0 else -1
        rows[row, link] = member + 1
    amount = values[plan[column, WEIGHT], event] if plan[column, OP] == TOP_SUM else 1
    before = members[member, total_at]
    total = before + amount
    if overflows(before, amount, total):
        return OVERFLOW
    members[member, total_at] = total
    if plan[column, OP] != DISTINCT:
        rank(rows, row, place, link, plan, column, members, member, value_at, fresh, total < before)
    return OK


@kernel
def rank(
    rows: I64,
    row: int,
    place: int,
    link: int,
    plan: I64,
    column: int,
    members: I64,
    member: int,
    value_at: int,
    fresh: bool,
    less: bool,
) -> None:
    """A value's total has changed, or it is the first time: put the greatest in order."""
    words, text, size = plan[column, WORDS], plan[column, TEXT] == 1, plan[column, SIZE]
    step = words + 1
    first = place + 1
    total_at = members.shape[1] - 2
    known = rows[row, place] - (1 if fresh else 0)
    shown = min(size, known)
    n = 0
    while n < shown and not _same(rows, row, first + n * step, members, member, value_at, words):
        n += 1
    if n == shown:  # not among the shown
        if shown == size:
            n -= 1
            if not _before(
                members, member, value_at, members[member, total_at],
                rows, row, first + n * step, rows[row, first + n * step + words], words, text,
            ):  # fmt: skip
                return
        else:
            shown += 1
        _put(rows, row, first + n * step, members, member, value_at, words)
    rows[row, first + n * step + words] = members[member, total_at]
    while n > 0 and _out_of_order(rows, row, first + (n - 1) * step, words, text):
        _swap(rows, row, first + (n - 1) * step, step)
        n -= 1
    while n + 1 < shown and _out_of_order(rows, row, first + n * step, words, text):
        _swap(rows, row, first + n * step, step)
        n += 1
    if less and n == size - 1 and known > size:
        _find_last(
            rows, row, first, link, column, size, members, value_at, words, text
        )  # fmt: skip


@kernel
def _find_last(
    rows: I64,
    row: int,
    first: int,
    link: int,
    column: int,
    size: int,
    members: I64,
    value_at: int,
    words: int,
    text: bool,
) -> None:
    """The last place is for the greatest of the values that the places before it do not hold."""
    step = words + 1
    total_at = members.shape[1] - 2
    last, above = first + (size - 1) * step, first + (size - 2) * step
    m = rows[row, link] - 1
    while m >= 0:
        total = members[m, total_at]
        if (
            members[m, value_at - 1] == column
            and (size == 1 or _before(
                rows, row, above, rows[row, above + words], members, m, value_at, total, words, text
            ))
            and _before(
                members, m, value_at, total, rows, row, last, rows[row, last + words], words, text
            )
        ):  # fmt: skip
            _put(rows, row, last, members, m, value_at, words)
            rows[row, last + words] = total
        m = members[m, total_at + 1] - 1


@kernel
def _same(a: I64, i: int, at: int, b: I64, j: int, bt: int, words: int) -> bool:
    for c in range(words):
        if a[i, at + c] != b[j, bt + c]:
            return False
    return True


@kernel
def _before(
    a: I64, i: int, at: int, total: int, b: I64, j: int, bt: int, other: int, words: int, text: bool
) -> bool:
    """Whether the value at a[i, at] goes before that at b[j, bt]: the greater total, then the
    lesser value; text byte by byte."""
    if total != other:
        return total > other
    if not text:
        return a[i, at] < b[j, bt]  # type: ignore[no-any-return]
    for c in range(words):
        one, two = np.uint64(a[i, at + c]), np.uint64(b[j, bt + c])
        for _ in range(_BYTE):
            if one & _LOW != two & _LOW:
                return bool(one & _LOW < two & _LOW)
            one >>= np.uint64(_BYTE)
            two >>= np.uint64(_BYTE)
    return False


@kernel
def _out_of_order(rows: I64, row: int, at: int, words: int, text: bool) -> bool:
    """Whether what stands behind the place at `at` should go before it."""
    after = at + words + 1
    return _before(
        rows, row, after, rows[row, after + words], rows, row, at, rows[row, at + words], words,
        text,
    )  # fmt: skip


@kernel
def _put(
    rows: I64, row: int, at: int, members: I64, member: int, value_at: int, words: int
) -> None:
    for c in range(words):
        rows[row, at + c] = members[member, value_at + c]


@kernel
def _swap(rows: I64, row: int, at: int, step: int) -> None:
    for c in range(at, at + step):
        rows[row, c], rows[row, c + step] = rows[row, c + step], rows[row, c]


@kernel
def listed(windows: I64, rows: I64, link: int, members: I64, content: int, which: I64) -> None:
    """which[values]: the rows of all values of these windows."""
    n = 0
    for i in range(len(windows)):
        m = rows[windows[i], link] - 1
        while m >= 0:
            which[n] = m
            n += 1
            m = members[m, content] - 1


@kernel
def hang(which: I64, row: I64, rows: I64, link: int, members: I64, content: int) -> None:
    """Chain the values `which`, each to its window."""
    for i in range(len(which)):
        members[which[i], content] = rows[row[i], link] if rows[row[i], link] != 0 else -1
        rows[row[i], link] = which[i] + 1
