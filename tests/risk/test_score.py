"""The score card, and the sentence that explains it."""

import math

import numpy as np
import pytest

from risk.explain import explain
from risk.rules import RULES, Reason
from risk.score import ALERT_SCORE, BASE_POINTS, POINTS, score
from tests.risk.test_rules import PLAIN

EVERY = np.arange(1 << len(Reason))


def test_every_reason_has_points() -> None:
    assert POINTS.keys() == RULES.keys()


def test_the_score_is_the_logistic_of_the_points() -> None:
    for bits, probability in zip(EVERY, score(EVERY), strict=True):
        points = BASE_POINTS + sum(POINTS[reason] for reason in Reason(int(bits)))
        assert probability == pytest.approx(1 / (1 + math.exp(-points)), abs=5e-5)


def test_no_reason_is_no_alert_and_a_large_amount_is_one() -> None:
    assert score(np.array([0]))[0] < ALERT_SCORE < score(np.array([Reason.LARGE_AMOUNT]))[0]


def test_an_alert_is_explained_in_a_sentence() -> None:
    payment = PLAIN | {
        "payment_id": 1_204,
        "amount": 44_120,
        "score": 0.9998,
        "reasons": int(
            Reason.LARGE_AMOUNT
            | Reason.FAR_ABOVE_USUAL
            | Reason.TERMINAL_BAD_WEEK
            | Reason.TERMINAL_LONG_BAD
        ),
        "terminal_fraud_7d": 0.6,
        "terminal_fraud_30d": 0.375,
    }
    assert explain(payment) == (
        "Payment 1,204 of 441.20 EUR: 99.9 % likely fraud, because it is over 220 EUR; it is 8.8 "
        "times the customer's 30-day mean of 50.00 EUR; and fraud at the terminal was 6 of 10 "
        "payments in a week, 15 of 40 payments in 30 days (as known 7 days later)."
    )


def test_a_payment_without_reasons_says_so() -> None:
    payment = PLAIN | {"payment_id": 7, "score": 0.0025, "reasons": 0}
    assert explain(payment) == (
        "Payment 7 of 50.00 EUR: 0.25 % likely fraud, no rule speaks against it."
    )


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_words(reason: Reason) -> None:
    payment = PLAIN | {"payment_id": 7, "score": 0.5, "reasons": int(reason)}
    assert "because" in explain(payment)
