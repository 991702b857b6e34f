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
    FAR_ABOVE_USUAL = 2
    SPENDING_MORE = 4
    BURST = 8
    LARGE_AT_NIGHT = 16
    TERMINAL_BAD_DAY = 32
    TERMINAL_BAD_WEEK = 64
    TERMINAL_BAD_MONTH = 128


def large_amount(f: Features) -> Mask:
    """The amount is over 220 euros."""
    return f.amount > LARGE_AMOUNT


def far_above_usual(f: Features) -> Mask:
    """The amount is over three times the customer's mean of 30 days, of five payments or more."""
    return (f.customer_count_30d >= 5) & (f.amount > 3 * MINOR_UNITS * f.customer_mean_30d)


def spending_more(f: Features) -> Mask:
    """The customer's mean of 7 days, of five payments or more, is over 1.5 times that of 30."""
    return (f.customer_count_7d >= 5) & (f.customer_mean_7d > 1.5 * f.customer_mean_30d)


def burst(f: Features) -> Mask:
    """Eight payments or more within a day, and over 2.5 times the customer's usual number."""
    return (f.customer_count_1d >= 8) & (f.customer_count_1d * 30 > 2.5 * f.customer_count_30d)


def large_at_night(f: Features) -> Mask:
    """At night, over twice the customer's mean of 30 days."""
    return f.night & (f.amount > 2 * MINOR_UNITS * f.customer_mean_30d)


def terminal_bad_day(f: Features) -> Mask:
    """Half or more of the terminal's payments were fraud on the last day that is known."""
    return f.terminal_fraud_1d >= 0.5


def terminal_bad_week(f: Features) -> Mask:
    """Half or more of the terminal's payments were fraud in the last week that is known."""
    return f.terminal_fraud_7d >= 0.5


def terminal_bad_month(f: Features) -> Mask:
    """A tenth or more of the terminal's payments were fraud in the last 30 days that are known."""
    return f.terminal_fraud_30d >= 0.1


RULES: Mapping[Reason, Rule] = MappingProxyType(
    {
        Reason.LARGE_AMOUNT: large_amount,
        Reason.FAR_ABOVE_USUAL: far_above_usual,
        Reason.SPENDING_MORE: spending_more,
        Reason.BURST: burst,
        Reason.LARGE_AT_NIGHT: large_at_night,
        Reason.TERMINAL_BAD_DAY: terminal_bad_day,
        Reason.TERMINAL_BAD_WEEK: terminal_bad_week,
        Reason.TERMINAL_BAD_MONTH: terminal_bad_month,
    }
)


def reasons(features: Features) -> Ints:
    """The bits of all rules that hold, as int64 of shape (n,)."""
    bits = np.zeros(len(features.amount), np.int64)
    for reason, rule in RULES.items():
        bits |= rule(features) * np.int64(reason)
    return bits
