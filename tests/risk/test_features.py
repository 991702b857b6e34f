"""The calendar features against pandas, and the ratios against exact fractions."""

from fractions import Fraction

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from risk.features import Features, assemble, is_night, is_weekend, mean, share

YEAR_1900, YEAR_2200 = -2_208_988_800 * 10**9, 7_258_118_400 * 10**9


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.integers(YEAR_1900, YEAR_2200), min_size=1))
def test_weekend_and_night_are_those_of_pandas(times: list[int]) -> None:
    at = np.array(times, np.int64)
    index = pd.DatetimeIndex(at.view("M8[ns]"), tz="UTC")
    assert is_weekend(at).tolist() == (index.day_of_week >= 5).tolist()
    assert is_night(at).tolist() == (index.hour <= 6).tolist()


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.tuples(st.integers(0, 2**50), st.integers(1, 10**6)), min_size=1))
def test_a_mean_is_the_float_nearest_to_the_true_one(pairs: list[tuple[int, int]]) -> None:
    total, count = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    assert mean(total, count).tolist() == [float(Fraction(t, c * 100)) for t, c in pairs]


def test_a_share_of_nothing_is_zero() -> None:
    part, count = np.array([0, 0, 1, 3]), np.array([0, 4, 3, 3])
    assert share(part, count).tolist() == [0.0, 0.0, 1 / 3, 1.0]


def test_the_fifteen_features_keep_their_order() -> None:
    features = assemble(
        amount=np.array([12_345]),
        at=np.array([0]),
        customer_count=np.array([[1, 2, 3]]),
        customer_sum=np.array([[100, 400, 900]]),
        terminal_count=np.array([[4, 5, 8]]),
        terminal_frauds=np.array([[1, 0, 1]]),
    )
    assert len(Features._fields) == 15
    assert features.matrix().tolist() == [
        [123.45, 0, 1, 1, 1.0, 2, 2.0, 3, 3.0, 4, 0.25, 5, 0.0, 8, 0.125]
    ]
