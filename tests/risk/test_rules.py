"""Each rule where it begins to hold and one step before."""

import numpy as np
import pytest

from risk.features import Features
from risk.rules import RULES, Reason, reasons

PLAIN = {
    "amount": 5_000,
    "weekend": False,
    "night": False,
    "customer_count_1d": 2,
    "customer_mean_1d": 50.0,
    "customer_count_7d": 14,
    "customer_mean_7d": 50.0,
    "customer_count_30d": 60,
    "customer_mean_30d": 50.0,
    "terminal_count_1d": 2,
    "terminal_fraud_1d": 0.0,
    "terminal_count_7d": 10,
    "terminal_fraud_7d": 0.0,
    "terminal_count_30d": 40,
    "terminal_fraud_30d": 0.0,
}


def payment(**changed: float) -> Features:
    assert changed.keys() <= PLAIN.keys()
    return Features(**{name: np.array([value]) for name, value in (PLAIN | changed).items()})


EDGES = [
    (Reason.LARGE_AMOUNT, {"amount": 22_001}, {"amount": 22_000}),
    (Reason.ABOVE_USUAL, {"amount": 10_001}, {"amount": 10_000}),
    (Reason.ABOVE_USUAL, {"amount": 15_000}, {"amount": 15_001}),
    (Reason.FAR_ABOVE_USUAL, {"amount": 15_001}, {"amount": 15_000}),
    (
        Reason.FAR_ABOVE_USUAL,
        {"amount": 15_001, "customer_count_30d": 5},
        {"amount": 15_001, "customer_count_30d": 4},
    ),
    (Reason.SPENDING_MORE_TODAY, {"customer_mean_1d": 100.01}, {"customer_mean_1d": 100.0}),
    (
        Reason.SPENDING_MORE_TODAY,
        {"customer_mean_1d": 100.01, "customer_count_1d": 2},
        {"customer_mean_1d": 100.01, "customer_count_1d": 1},
    ),
    (Reason.SPENDING_MORE_THIS_WEEK, {"customer_mean_7d": 75.01}, {"customer_mean_7d": 75.0}),
    (
        Reason.SPENDING_MORE_THIS_WEEK,
        {"customer_mean_7d": 75.01, "customer_count_7d": 5},
        {"customer_mean_7d": 75.01, "customer_count_7d": 4},
    ),
    (Reason.BURST, {"customer_count_1d": 8}, {"customer_count_1d": 7}),
    (
        Reason.BURST,
        {"customer_count_1d": 8, "customer_count_30d": 95},
        {"customer_count_1d": 8, "customer_count_30d": 96},
    ),
    (Reason.TERMINAL_SOME_FRAUD, {"terminal_fraud_7d": 0.01}, {"terminal_fraud_7d": 0.0}),
    (Reason.TERMINAL_SOME_FRAUD, {"terminal_fraud_7d": 0.49}, {"terminal_fraud_7d": 0.5}),
    (Reason.TERMINAL_BAD_DAY, {"terminal_fraud_1d": 0.5}, {"terminal_fraud_1d": 0.49}),
    (Reason.TERMINAL_BAD_WEEK, {"terminal_fraud_7d": 0.5}, {"terminal_fraud_7d": 0.49}),
    (Reason.TERMINAL_TURNED_BAD, {"terminal_fraud_30d": 0.1}, {"terminal_fraud_30d": 0.09}),
    (Reason.TERMINAL_TURNED_BAD, {"terminal_fraud_30d": 0.29}, {"terminal_fraud_30d": 0.3}),
    (Reason.TERMINAL_LONG_BAD, {"terminal_fraud_30d": 0.3}, {"terminal_fraud_30d": 0.29}),
]


@pytest.mark.parametrize(("reason", "holds", "fails"), EDGES)
def test_a_rule_holds_from_its_edge_on(reason: Reason, holds: dict, fails: dict) -> None:
    assert RULES[reason](payment(**holds)).tolist() == [True]
    assert RULES[reason](payment(**fails)).tolist() == [False]


def test_a_plain_payment_gives_no_reason() -> None:
    assert reasons(payment()).tolist() == [0]


def test_a_customer_who_never_spent_anything_is_no_division_by_zero() -> None:
    free = payment(amount=0, customer_mean_1d=0.0, customer_mean_7d=0.0, customer_mean_30d=0.0)
    assert reasons(free).tolist() == [0]


def test_reasons_are_the_bits_of_all_rules_that_hold() -> None:
    suspicious = payment(amount=50_000, terminal_fraud_1d=1.0)
    assert Reason(int(reasons(suspicious)[0])) == (
        Reason.LARGE_AMOUNT | Reason.FAR_ABOVE_USUAL | Reason.TERMINAL_BAD_DAY
    )


def test_every_bit_has_its_rule_and_every_rule_says_what_it_is() -> None:
    assert list(RULES) == list(Reason)
    for reason, rule in RULES.items():
        assert reason.name is not None and reason.name.lower() == rule.__name__
        assert rule.__doc__ is not None and rule.__doc__.endswith(".")
