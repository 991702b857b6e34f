"""Money is minor units, from digits, exactly."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledgerstream.errors import DecodeError
from ledgerstream.money import (
    MINOR_DIGITS,
    Money,
    eur,
    format_minor,
    format_scaled,
    jpy,
    parse_minor,
)  # fmt: skip


def test_from_digits() -> None:
    assert eur("10000.00") == 1_000_000
    assert eur("0.1") == 10
    assert eur("-0.01") == -1
    assert eur(Decimal("1E+2")) == 10_000
    assert jpy("500") == 500
    assert parse_minor("1.234", "KWD") == 1234


@pytest.mark.parametrize(
    "bad", ["", "ten", "1.234", "NaN", "Infinity", "1e30", "92233720368547758.08"]
)
def test_what_is_no_amount_is_refused(bad: str) -> None:
    with pytest.raises(DecodeError):
        eur(bad)


@pytest.mark.parametrize("bad", [1.5, True])
def test_a_float_is_refused(bad: object) -> None:
    with pytest.raises(DecodeError, match="give its digits"):
        eur(bad)  # type: ignore[arg-type]


def test_an_unknown_currency_is_refused() -> None:
    with pytest.raises(ValueError, match="not a currency known here"):
        Money("XXQ")


@given(st.integers(-(2**63) + 1, 2**63 - 1), st.sampled_from(sorted(MINOR_DIGITS)))
def test_formatting_and_parsing_are_inverse(minor: int, currency: str) -> None:
    text = format_minor(minor, currency)
    digits, code = text.replace(",", "").split()
    assert code == currency
    assert parse_minor(digits, currency) == minor


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (4_799_250, 3, "4,799.25"), (4_799_000, 3, "4,799"), (-1, 9, "-0.000000001"), (0, 9, "0"),
        (2**63 - 1, 8, "92,233,720,368.54775807"), (120, 0, "120"), (1_234_500_000.5, 9, "1.2345"),
    ],
)  # fmt: skip
def test_scaled_numbers_are_shown_with_their_decimals(value: float, digits: int, text: str) -> None:
    assert format_scaled(value, digits) == text
