"""The rules: one pure function each over the features' columns; its docstring is the rule.

A rule answers with a mask of shape (n,). Adding one is a function, a bit of `Reason` and a line of
`RULES`; then `python -m processors.refit` gives the weights for `score.py`. Bits are stored with
every scored payment, so a bit is never given to another rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntFlag
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from risk.features import MINOR_UNITS, Features, Ints, Mask

Rule: TypeAlias = Callable[[Features], Mask]

LARGE_AMOUNT = 220 * MINOR_UNITS


class Reason(IntFlag):
    """Why a payment is suspicious: one bit a rule."""

    LARGE_AMOUNT = 1
    ABOVE_USUAL = 2
    FAR_ABOVE_USUAL = 4
    SPENDING_MORE_TODAY = 8
    SPENDING_MORE_THIS_WEEK = 16
    BURST = 32
    TERMINAL_SOME_FRAUD = 64
    TERMINAL_BAD_DAY = 128
    TERMINAL_BAD_WEEK = 256
    TERMINAL_TURNED_BAD = 512
    TERMINAL_LONG_BAD = 1024


def large_amount(f: Features) -> Mask:
    """The amount is over 220 euros."""
    return f.amount > LARGE_AMOUNT


def above_usual(f: Features) -> Mask:
    """The amount is over two and up to three times the customer's mean of 30 days."""
    return _has_usual(f) & _over_usual(f, 2) & ~_over_usual(f, 3)


def far_above_usual(f: Features) -> Mask:
    """The amount is over three times the customer's mean of 30 days."""
    return _has_usual(f) & _over_usual(f, 3)


def spending_more_today(f: Features) -> Mask:
    """The customer's mean of a day, of two payments or more, is over twice that of 30 days."""
    return (f.customer_count_1d >= 2) & (f.customer_mean_1d > 2 * f.customer_mean_30d)


def spending_more_this_week(f: Features) -> Mask:
    """The customer's mean of 7 days, of five payments or more, is over 1.5 times that of 30."""
    return (f.customer_count_7d >= 5) & (f.customer_mean_7d > 1.5 * f.customer_mean_30d)


def burst(f: Features) -> Mask:
    """Eight payments or more within a day, and over 2.5 times the customer's usual number."""
    return (f.customer_count_1d >= 8) & (f.customer_count_1d * 30 > 2.5 * f.customer_count_30d)


def terminal_some_fraud(f: Features) -> Mask:
    """Some, but less than half, of the terminal's payments of the last known week were fraud."""
    return (f.terminal_fraud_7d > 0) & (f.terminal_fraud_7d < 0.5)


def terminal_bad_day(f: Features) -> Mask:
    """Half or more of the terminal's payments of the last known day were fraud."""
    return f.terminal_fraud_1d >= 0.5


def terminal_bad_week(f: Features) -> Mask:
    """Half or more of the terminal's payments of the last known week were fraud."""
    return f.terminal_fraud_7d >= 0.5


def terminal_turned_bad(f: Features) -> Mask:
    """10 to 30 % of the terminal's payments of the last known 30 days were fraud: a new thing."""
    return (f.terminal_fraud_30d >= 0.1) & (f.terminal_fraud_30d < 0.3)


def terminal_long_bad(f: Features) -> Mask:
    """30 % or more of the terminal's payments of the last known 30 days were fraud: it may end."""
    return f.terminal_fraud_30d >= 0.3


def _has_usual(f: Features) -> Mask:
    """Five payments are enough to say what is usual."""
    return f.customer_count_30d >= 5


def _over_usual(f: Features, times: int) -> Mask:
    return f.amount > times * MINOR_UNITS * f.customer_mean_30d


RULES: Mapping[Reason, Rule] = MappingProxyType(
    {
        Reason.LARGE_AMOUNT: large_amount,
        Reason.ABOVE_USUAL: above_usual,
        Reason.FAR_ABOVE_USUAL: far_above_usual,
        Reason.SPENDING_MORE_TODAY: spending_more_today,
        Reason.SPENDING_MORE_THIS_WEEK: spending_more_this_week,
        Reason.BURST: burst,
        Reason.TERMINAL_SOME_FRAUD: terminal_some_fraud,
        Reason.TERMINAL_BAD_DAY: terminal_bad_day,
        Reason.TERMINAL_BAD_WEEK: terminal_bad_week,
        Reason.TERMINAL_TURNED_BAD: terminal_turned_bad,
        Reason.TERMINAL_LONG_BAD: terminal_long_bad,
    }
)


def reasons(features: Features) -> Ints:
    """The bits of all rules that hold, as int64 of shape (n,)."""
    bits = np.zeros(len(features.amount), np.int64)
    for reason, rule in RULES.items():
        bits |= rule(features) * np.int64(reason)
    return bits
