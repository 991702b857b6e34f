"""A scored payment in plain words.

Payment 1,204 of 441.20 EUR: 98 % likely fraud, because it is over 220 EUR; and it is 5.1 times
the customer's 30-day mean of 86.51 EUR.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from risk.features import LABEL_DELAY, MINOR_UNITS
from risk.rules import LARGE_AMOUNT, Reason


def explain(payment: Mapping[str, Any]) -> str:
    """The sentence for one scored payment: the features by name, payment_id, score and reasons."""
    amount = _euros(payment["amount"] / MINOR_UNITS)
    head = (
        f"Payment {payment['payment_id']:,} of {amount}: {_percent(payment['score'])} likely fraud"
    )
    phrases = [phrase(reason, payment) for reason in Reason(int(payment["reasons"]))]
    if not phrases:
        return f"{head}, no rule speaks against it."
    if len(phrases) > 1:
        phrases[-1] = f"and {phrases[-1]}"
    return f"{head}, because {'; '.join(phrases)}."


def phrase(reason: Reason, payment: Mapping[str, Any]) -> str:
    """What one reason says about this payment."""
    usual = payment["customer_mean_30d"]
    match reason:
        case Reason.LARGE_AMOUNT:
            return f"it is over {LARGE_AMOUNT // MINOR_UNITS} EUR"
        case Reason.ABOVE_USUAL | Reason.FAR_ABOVE_USUAL:
            times = payment["amount"] / MINOR_UNITS / usual
            return f"it is {times:.1f} times the customer's 30-day mean of {_euros(usual)}"
        case Reason.SPENDING_MORE_TODAY:
            mean = _euros(payment["customer_mean_1d"])
            return f"within a day the customer's mean rose to {mean}"
        case Reason.SPENDING_MORE_THIS_WEEK:
            mean = _euros(payment["customer_mean_7d"])
            return f"within a week the customer's mean rose to {mean}"
        case Reason.BURST:
            return (
                f"it is the customer's payment number {payment['customer_count_1d']:,} in a day, "
                f"and number {payment['customer_count_30d']:,} in 30 days"
            )
        case Reason.TERMINAL_BAD_DAY:
            return _terminal(payment, "1d", "one day")
        case Reason.TERMINAL_SOME_FRAUD | Reason.TERMINAL_BAD_WEEK:
            return _terminal(payment, "7d", "one week")
        case Reason.TERMINAL_TURNED_BAD | Reason.TERMINAL_LONG_BAD:
            return _terminal(payment, "30d", "30 days")
        case _:
            raise AssertionError(reason)


def _terminal(payment: Mapping[str, Any], window: str, words: str) -> str:
    share, count = payment[f"terminal_fraud_{window}"], payment[f"terminal_count_{window}"]
    late = LABEL_DELAY.removesuffix("d")
    return (
        f"{_percent(share)} of the terminal's {count:,} payments of {words} were fraud "
        f"(labels come {late} days late)"
    )


def _euros(amount: float) -> str:
    return f"{amount:,.2f} EUR"


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"
