"""Fraud: each card payment gets fifteen features, reasons and a score; the suspicious, an alert.

The features are the handbook's (`risk/features.py`), the reasons those of `risk/rules.py`. Rows are
explained in a sentence by `risk.explain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Mapped

from ledgerstream.events import Timestamp
from ledgerstream.money import EUR
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.processor import Processor, Sliding, State, Topic
from ledgerstream.stream.tables import Rows, Table
from processors.payments import Payment
from risk.explain import explain
from risk.features import LABEL_DELAY, WINDOWS, assemble
from risk.rules import reasons
from risk.score import ALERT_SCORE, score


class ScoredPayment(Table):
    """One row a payment: what was known when it came."""

    payment_id: Mapped[int]
    at: Mapped[Timestamp]
    customer: Mapped[int]
    terminal: Mapped[int]
    amount: Mapped[EUR]
    customer_count_1d: Mapped[int]
    customer_mean_1d: Mapped[float]
    customer_count_7d: Mapped[int]
    customer_mean_7d: Mapped[float]
    customer_count_30d: Mapped[int]
    customer_mean_30d: Mapped[float]
    terminal_count_1d: Mapped[int]
    terminal_fraud_1d: Mapped[float]
    terminal_count_7d: Mapped[int]
    terminal_fraud_7d: Mapped[float]
    terminal_count_30d: Mapped[int]
    terminal_fraud_30d: Mapped[float]
    score: Mapped[float]
    reasons: Mapped[int]  # bits of risk.rules.Reason
    weekend: Mapped[bool]
    night: Mapped[bool]


class FraudAlert(Table):
    """A payment whose score is at least `risk.score.ALERT_SCORE`."""

    payment_id: Mapped[int]
    at: Mapped[Timestamp]
    customer: Mapped[int]
    terminal: Mapped[int]
    amount: Mapped[EUR]
    score: Mapped[float]
    reasons: Mapped[int]


class Fraud(Processor):
    """Scores card payments as they come; labels of fraud are known seven days late."""

    source = Topic("payments", Payment, key="customer")
    results = (ScoredPayment, FraudAlert)

    customers = Sliding(by="customer", over=WINDOWS, sum="amount", count=True)
    terminals = Sliding(by="terminal", over=WINDOWS, delay=LABEL_DELAY, sum="is_fraud", count=True)

    @classmethod
    def explain(cls, row: Mapping[str, Any]) -> list[str]:
        """Why a payment has its score, in a sentence."""
        return [explain(row)]

    def process(self, payments: Batch, state: State) -> list[Rows]:
        spent = state.customers.add(payments)
        known = state.terminals.add(payments)
        features = assemble(
            payments.amount, payments.at, spent.count, spent.sum, known.count, known.sum
        )
        why = reasons(features)
        risk = score(why)
        return [
            ScoredPayment.rows(payments, **features._asdict(), score=risk, reasons=why),
            FraudAlert.rows(payments, where=risk >= ALERT_SCORE, score=risk, reasons=why),
        ]
