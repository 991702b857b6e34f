"""Fraud against the handbook: the features of every payment, the models' table, the score card."""

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.tree import DecisionTreeClassifier

import ledgerstream
from ledgerstream.client.tabular import read
from processors.fraud import Fraud, FraudAlert, ScoredPayment
from processors.payments import Payment, Simulation
from processors.refit import fit, scored, training_week
from risk.features import Features
from risk.score import ALERT_SCORE, BASE_POINTS, POINTS
from tests.processors.handbook import (
    DATA,
    card_precision,
    features_by_pandas,
    split_weeks,
    table_row,
)

needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not here")


@pytest.fixture(scope="module")
def real() -> NDArray:
    """The handbook's payments, all 1,466,282."""
    return np.concatenate([rows for rows, _ in read(DATA, Payment)])


@pytest.fixture(scope="module")
def real_scored(real: NDArray) -> dict[str, NDArray]:
    return scored(real)


@pytest.fixture(scope="module")
def generated() -> NDArray:
    simulation = Simulation(customers=200, terminals=300, days=75, reach=15.0)
    return np.concatenate(list(simulation.payments()))


def assert_features_are_those_of_pandas(rows: NDArray, columns: dict[str, NDArray]) -> None:
    expected = features_by_pandas(pd.DataFrame(rows))
    for name in Features._fields:
        streamed = columns[name] / 100 if name == "amount" else columns[name]
        if streamed.dtype.kind == "f":
            np.testing.assert_allclose(streamed, expected[name], rtol=1e-14, err_msg=name)
        else:
            np.testing.assert_array_equal(streamed, expected[name], err_msg=name)


def random_cuts(count: int, cuts: int, seed: int) -> list[int]:
    return np.random.Generator(np.random.PCG64(seed)).integers(1, count, cuts).tolist()


def test_features_of_generated_payments_are_those_of_pandas(generated: NDArray) -> None:
    assert_features_are_those_of_pandas(generated, scored(generated))


@pytest.mark.parametrize("seed", range(3))
def test_batch_splits_change_no_bit(generated: NDArray, seed: int) -> None:
    whole = scored(generated)
    split = scored(generated, random_cuts(len(generated), 3_000, seed))
    assert {n: c.tobytes() for n, c in split.items()} == {n: c.tobytes() for n, c in whole.items()}


def test_alerts_are_the_payments_with_a_high_score(generated: NDArray) -> None:
    alerts = scored(generated)["score"] >= ALERT_SCORE
    assert generated["is_fraud"][alerts].mean() > 0.6 > 0.3 > generated["is_fraud"].mean()


def test_what_is_stored_needs_one_partition() -> None:
    Fraud.check_partitions(1)
    with pytest.raises(Exception, match="one terminal would be split"):
        Fraud.check_partitions(2)
    assert set(FraudAlert.result_columns()) < set(Payment.columns()) | {"score", "reasons"}


@pytest.mark.slow
def test_the_table_in_postgres_holds_what_process_gave(generated: NDArray) -> None:
    with ledgerstream.local() as here:
        here.write(Fraud.source, generated)
        progress = here.run(Fraud)
        table = here.table(ScoredPayment)
        alerts = here.table(FraudAlert)
    assert progress.rows == {"scored_payment": len(table), "fraud_alert": len(alerts)}
    for name, column in scored(generated).items():
        stored = table[name].to_numpy("datetime64[ns]" if name == "at" else column.dtype)
        assert stored.tobytes() == column.tobytes(), name
    assert alerts["payment_id"].tolist() == (
        table["payment_id"][table["score"] >= ALERT_SCORE].tolist()
    )


@needs_data
@pytest.mark.slow
def test_features_of_all_real_payments_are_those_of_pandas(
    real: NDArray, real_scored: dict[str, NDArray]
) -> None:
    assert len(real) == 1_466_282
    assert_features_are_those_of_pandas(real, real_scored)


@needs_data
@pytest.mark.slow
def test_batch_splits_change_no_bit_of_real_payments(
    real: NDArray, real_scored: dict[str, NDArray]
) -> None:
    split = scored(real, random_cuts(len(real), 300, seed=1))
    for name, column in real_scored.items():
        assert split[name].tobytes() == column.tobytes(), name


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "published"),
    [
        (LogisticRegression(random_state=0), (0.871, 0.606, 0.291)),
        (DecisionTreeClassifier(max_depth=2, random_state=0), (0.763, 0.496, 0.241)),
        (RandomForestClassifier(random_state=0), (0.867, 0.658, 0.287)),
    ],
    ids=["logistic regression", "decision tree", "random forest"],
)
def test_models_on_streamed_features_reproduce_the_published_table(
    real: NDArray,
    real_scored: dict[str, NDArray],
    model: BaseEstimator,
    published: tuple[float, float, float],
) -> None:
    matrix = Features(**{name: real_scored[name] for name in Features._fields}).matrix()
    assert table_row(model, pd.DataFrame(real), matrix) == pytest.approx(published, abs=0.01)


@needs_data
@pytest.mark.slow
def test_the_published_points_are_those_that_refit_finds(
    real: NDArray, real_scored: dict[str, NDArray]
) -> None:
    week = training_week(real)
    points = fit(real_scored["reasons"][week], real["is_fraud"][week])
    assert points == pytest.approx([BASE_POINTS, *POINTS.values()], abs=5e-4)


@needs_data
@pytest.mark.slow
def test_the_score_card_is_as_good_as_its_docstring_says(
    real: NDArray, real_scored: dict[str, NDArray]
) -> None:
    _, test, day = split_weeks(pd.DataFrame(real))
    fraud, score = real["is_fraud"], real_scored["score"]
    assert roc_auc_score(fraud[test], score[test]) == pytest.approx(0.872, abs=1e-3)
    assert average_precision_score(fraud[test], score[test]) == pytest.approx(0.627, abs=1e-3)
    reviewed = {"day": day, "customer": real["customer"], "fraud": fraud, "predicted": score}
    assert card_precision(pd.DataFrame(reviewed).iloc[test], 100) == pytest.approx(0.286, abs=1e-3)
    alerts = score >= ALERT_SCORE
    assert fraud[alerts].mean() == pytest.approx(0.74, abs=0.01)
    assert fraud[alerts].sum() / fraud.sum() == pytest.approx(0.69, abs=0.01)
