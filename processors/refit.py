"""Fit the score card's points again: `python -m processors.refit payments.csv.gz`.

The payments go through `Fraud` itself, so the reasons are those that the stream would give. The fit
is a ridge logistic regression (penalty 1, intercept free) by Newton's method on the distinct
combinations of reasons, which are a few dozen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ledgerstream.client.tabular import read
from ledgerstream.events import parse_timestamp
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.state import State
from processors.fraud import Fraud, ScoredPayment
from processors.payments import Payment
from risk.rules import Reason

TRAINING_WEEK = (parse_timestamp("2018-07-25T00:00:00Z"), parse_timestamp("2018-08-01T00:00:00Z"))
PENALTY = 1.0
BATCH_ROWS = 100_000


def scored(rows: NDArray, cuts: Iterable[int] = ()) -> dict[str, NDArray]:
    """The columns of `ScoredPayment` for payments in log order, in batches that end at `cuts`."""
    state, fraud, offset = State(Fraud.states), Fraud(), np.arange(len(rows))
    parts = []
    for first, end in _ranges(len(rows), cuts):
        batch = Batch(Fraud.source, rows[first:end], offset[first:end])
        state.begin(len(batch))
        parts.append(fraud.process(batch, state)[0].columns)
        state.seal()
        state.forget()
    names = ScoredPayment.result_columns()
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def fit(reasons: NDArray, fraud: NDArray) -> NDArray:
    """Base points, then one for each `Reason`, from the training payments' bits and labels."""
    pattern, place = np.unique(reasons, return_inverse=True)
    payments = np.bincount(place)
    frauds = np.bincount(place, weights=fraud)
    bits = (pattern[:, None] >> np.arange(len(Reason))) & 1
    design = np.column_stack([np.ones(len(pattern)), bits])
    penalty = np.diag([0.0, *[PENALTY] * len(Reason)])
    points = np.zeros(design.shape[1])
    step = np.ones_like(points)
    while np.abs(step).max() > 1e-9:
        probability = 1 / (1 + np.exp(-design @ points))
        slope = design.T @ (frauds - payments * probability) - penalty @ points
        curve = (design.T * (payments * probability * (1 - probability))) @ design + penalty
        step = np.linalg.solve(curve, slope)
        points += step
    return points


def training_week(rows: NDArray) -> NDArray:
    return (rows["at"] >= TRAINING_WEEK[0]) & (rows["at"] < TRAINING_WEEK[1])


def main(path: Path) -> None:
    rows = np.concatenate([rows for rows, _ in read(path, Payment)])
    week = training_week(rows)
    points = fit(scored(rows)["reasons"][week], rows["is_fraud"][week])
    print(f"BASE_POINTS = {points[0]:.3f}")
    for reason, weight in zip(Reason, points[1:], strict=True):
        print(f"Reason.{reason.name}: {weight:.3f},")


def _ranges(count: int, cuts: Iterable[int]) -> Iterator[tuple[int, int]]:
    inner = sorted({*cuts, *range(BATCH_ROWS, count, BATCH_ROWS)} - {0, count})
    yield from zip([0, *inner], [*inner, count], strict=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
