"""A scored payment in plain words.

Payment 1,204 of 441.20 EUR: 98.2 % likely fraud, because it is over 220 EUR; and it is 5.1
times the customer's 30-day mean of 86.51 EUR.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from risk.features import LABEL_DELAY, MINOR_UNITS
from risk.rules import LARGE_AMOUNT, Reason

SURE = 0.999  # nothing is said to be surer
TERMINAL_WINDOWS = {
    Reason.TERMINAL_BAD_DAY: ("1d", "a day"),
    Reason.TERMINAL_SOME_FRAUD: ("7d", "a week"),
    Reason.TERMINAL_BAD_WEEK: ("7d", "a week"),
    Reason.TERMINAL_TURNED_BAD: ("30d", "30 days"),
    Reason.TERMINAL_LONG_BAD: ("30d", "30 days"),
}


def explain(payment: Mapping[str, Any]) -> str:
    """The sentence for one scored payment: the features by name, payment_id, score and reasons."""
    amount = _euros(payment["amount"] / MINOR_UNITS)
    likely = f"{min(payment['score'], SURE) * 100:.3g} % likely fraud"
    head = f"Payment {payment['payment_id']:,} of {amount}: {likely}"
    reasons = Reason(int(payment["reasons"]))
    phrases = [phrase(reason, payment) for reason in reasons if reason not in TERMINAL_WINDOWS]
    windows = [TERMINAL_WINDOWS[reason] for reason in reasons if reason in TERMINAL_WINDOWS]
    if windows:
        phrases.append(_terminal(payment, windows))
    if not phrases:
        return f"{head}, no rule speaks against it."
    if len(phrases) > 1:
        phrases[-1] = f"and {phrases[-1]}"
    return f"{head}, because {'; '.join(phrases)}."


def phrase(reason: Reason, payment: Mapping[str, Any]) -> str:
    """What one reason about amount or customer says of this payment."""
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
        case _:
            raise AssertionError(reason)


def _terminal(payment: Mapping[str, Any], windows: list[tuple[str, str]]) -> str:
    shares = []
    for window, words in windows:
        count = payment[f"terminal_count_{window}"]
        frauds = round(count * payment[f"terminal_fraud_{window}"])
        shares.append(f"{frauds:,} of {count:,} payments in {words}")
    late = LABEL_DELAY.removesuffix("d")
    return f"fraud at the terminal was {', '.join(shares)} (as known {late} days later)"


def _euros(amount: float) -> str:
    return f"{amount:,.2f} EUR"
