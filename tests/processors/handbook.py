"""The handbook in pandas and scikit-learn: the oracle of the features, and its table of models.

Written from the book's chapters 3 ("Baseline feature transformation", "Baseline fraud detection
system") and 4 ("Precision top-k metrics"), not from the code under test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

DATA = Path(__file__).parents[3] / "shared" / "data" / "payments.csv.gz"

TRAINED_FROM = pd.Timestamp("2018-07-25", tz="UTC")
TRAINING_DAYS, DELAY_DAYS, TEST_DAYS = 7, 7, 7


def features_by_pandas(payments: pd.DataFrame) -> pd.DataFrame:
    """The fifteen features of payments in time order; columns named as in `risk.features`.

    `payments` has the columns of `Payment`: `at` int64 ns, `amount` int64 cents.
    """
    frame = pd.DataFrame(
        {
            "at": pd.to_datetime(payments["at"], unit="ns", utc=True),
            "customer": payments["customer"],
            "terminal": payments["terminal"],
            "amount": payments["amount"],
            "fraud": payments["is_fraud"].astype(np.int64),
        }
    ).reset_index(drop=True)
    features = pd.DataFrame({"amount": frame["amount"] / 100})
    features["weekend"] = frame["at"].dt.day_of_week.isin([5, 6])
    features["night"] = frame["at"].dt.hour <= 6
    for days in (1, 7, 30):
        count, total = _rolling(frame, "customer", "amount", days)
        features[f"customer_count_{days}d"] = count
        features[f"customer_mean_{days}d"] = total / 100 / count
    delay_count, delay_fraud = _rolling(frame, "terminal", "fraud", DELAY_DAYS)
    for days in (1, 7, 30):
        count, fraud = _rolling(frame, "terminal", "fraud", DELAY_DAYS + days)
        count, fraud = count - delay_count, fraud - delay_fraud
        features[f"terminal_count_{days}d"] = count
        features[f"terminal_fraud_{days}d"] = (fraud / count).fillna(0.0)
    return features


def _rolling(frame: pd.DataFrame, key: str, value: str, days: int) -> tuple[pd.Series, pd.Series]:
    """Count and sum of `value` a key over (t - days, t]. All are whole: rounding undoes drift."""
    by_key = frame.sort_values(key, kind="stable")
    window = by_key.groupby(key, sort=True).rolling(f"{days}D", on="at")[value]
    count = pd.Series(window.count().to_numpy(), by_key.index).sort_index()
    total = pd.Series(window.sum().to_numpy(), by_key.index).sort_index()
    return count.round(), total.round()


def split_weeks(payments: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of training and of test, and the day of each payment counted from training.

    A card is out of a test day if its fraud lies in the training week, or is known by then: labels
    come seven days late.
    """
    at = pd.to_datetime(payments["at"], unit="ns", utc=True)
    day = (at.dt.floor("D") - TRAINED_FROM).dt.days.to_numpy()
    customer, fraud = payments["customer"].to_numpy(), payments["is_fraud"].to_numpy(bool)
    training = (day >= 0) & (day < TRAINING_DAYS)
    known = set(customer[training & fraud])
    test = np.zeros(len(day), bool)
    for test_day in range(TRAINING_DAYS + DELAY_DAYS, TRAINING_DAYS + DELAY_DAYS + TEST_DAYS):
        known |= set(customer[(day == test_day - DELAY_DAYS - 1) & fraud])
        test |= (day == test_day) & ~np.isin(customer, list(known))
    return np.flatnonzero(training), np.flatnonzero(test), day


def table_row(
    model: BaseEstimator, payments: pd.DataFrame, matrix: np.ndarray
) -> tuple[float, float, float]:
    """AUC ROC, average precision and card precision at 100 of one model on these features."""
    training, test, day = split_weeks(payments)
    fraud = payments["is_fraud"].to_numpy(bool)
    pipeline = make_pipeline(StandardScaler(), model).fit(matrix[training], fraud[training])
    predicted = pipeline.predict_proba(matrix[test])[:, 1]
    reviewed = pd.DataFrame(
        {
            "day": day[test],
            "customer": payments["customer"].to_numpy()[test],
            "fraud": fraud[test],
            "predicted": predicted,
        }
    )
    return (
        float(roc_auc_score(fraud[test], predicted)),
        float(average_precision_score(fraud[test], predicted)),
        card_precision(reviewed, 100),
    )


def card_precision(reviewed: pd.DataFrame, top: int) -> float:
    """Share of the `top` riskiest cards of each day that are compromised, mean over the days.

    A card found on an earlier day is not reviewed again.
    """
    found: set[int] = set()
    precisions = []
    for _, payments in reviewed.groupby("day"):
        cards = payments[~payments["customer"].isin(found)].groupby("customer").max()
        riskiest = cards.sort_values("predicted", ascending=False).head(top)
        hits = riskiest.index[riskiest["fraud"]]
        found |= set(hits)
        precisions.append(len(hits) / top)
    return float(np.mean(precisions))
