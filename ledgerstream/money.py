"""Money: an integer number of minor units and its currency. Never a float.

    amount: EUR                    # in an event or a table: int64 minor units (cents)
    eur("10000.00") == 1_000_000   # from digits, exactly
    format_minor(1_000_000, "EUR") == "10,000.00 EUR"

Minor digits are ISO 4217's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Annotated

from pydantic import BeforeValidator

from ledgerstream.errors import DecodeError

MINOR_DIGITS = {
    "AUD": 2, "BHD": 3, "BRL": 2, "CAD": 2, "CHF": 2, "CNY": 2, "CZK": 2, "DKK": 2, "EUR": 2,
    "GBP": 2, "HKD": 2, "HUF": 2, "INR": 2, "JPY": 0, "KRW": 0, "KWD": 3, "MXN": 2, "NOK": 2,
    "NZD": 2, "PLN": 2, "SEK": 2, "SGD": 2, "THB": 2, "TRY": 2, "USD": 2, "ZAR": 2,
}  # fmt: skip

INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Money:
    """The mark of a money column: `Annotated[int, Money("EUR")]`."""

    currency: str

    def __post_init__(self) -> None:
        if self.currency not in MINOR_DIGITS:
            raise ValueError(
                f"{self.currency!r} is not a currency known here; "
                f"known are {', '.join(sorted(MINOR_DIGITS))}."
            )

    @property
    def minor_digits(self) -> int:
        return MINOR_DIGITS[self.currency]


@dataclass(frozen=True, slots=True)
class Scaled:
    """The mark of a number that counts 10⁻ⁿ of something without a currency of its own, as a price
    in `Annotated[int, Scaled(9)]`. The commands show it with its decimals; all else is as for int.
    """

    digits: int


def format_scaled(value: int | float, digits: int) -> str:
    """`format_scaled(4799250, 3) == "4,799.25"`: an int to its last digit, no zeros at the end."""
    exact = Decimal(value).scaleb(-digits, Context(prec=60))
    text = f"{exact if isinstance(value, int) else round(exact, digits):,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def parse_minor(text: str | int | Decimal, currency: str) -> int:
    """Minor units from major units written as digits: `parse_minor("12.34", "EUR") == 1234`.

    Raises DecodeError for what is not a number, has more decimals than the currency, is a float
    (whose digits are already lost), or does not fit 64 bits.
    """
    if isinstance(text, (float, bool)):
        raise DecodeError(f"Money as {type(text).__name__} is refused: give its digits as text.")
    try:
        value = Decimal(text)
        if not value.is_finite():
            raise ArithmeticError
    except (ArithmeticError, ValueError, TypeError) as error:
        raise DecodeError(f"{text!r} is not an amount of {currency}.") from error
    digits = MINOR_DIGITS[currency]
    if value.adjusted() > 18:
        raise DecodeError(f"{text} {currency} does not fit 64 bits of minor units.")
    minor = value.scaleb(digits)
    if minor != int(minor):
        raise DecodeError(f"{text} {currency} has more than {digits} decimals.")
    if abs(int(minor)) > INT64_MAX:
        raise DecodeError(f"{text} {currency} does not fit 64 bits of minor units.")
    return int(minor)


def format_minor(minor: int, currency: str) -> str:
    """`format_minor(123456, "EUR") == "1,234.56 EUR"`."""
    digits = MINOR_DIGITS[currency]
    whole, rest = divmod(abs(int(minor)), 10**digits)
    sign = "-" if minor < 0 else ""
    fraction = f".{rest:0{digits}}" if digits else ""
    return f"{sign}{whole:,}{fraction} {currency}"


def _validator(currency: str) -> Callable[[object], int]:
    def to_minor(value: object) -> int:
        """An int is minor units already (from Python); text and Decimal are major units."""
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, (str, Decimal)):
            return parse_minor(value, currency)
        raise ValueError(
            f"an amount of {currency} is an int of minor units or its digits as text, "
            f"not {type(value).__name__}"
        )

    return to_minor


def _maker(currency: str) -> Callable[[str | int | Decimal], int]:
    def make(text: str | int | Decimal) -> int:
        return parse_minor(text, currency)

    make.__doc__ = f"Minor units of {currency} from major units written as digits."
    return make


EUR = Annotated[int, Money("EUR"), BeforeValidator(_validator("EUR"))]
USD = Annotated[int, Money("USD"), BeforeValidator(_validator("USD"))]
GBP = Annotated[int, Money("GBP"), BeforeValidator(_validator("GBP"))]
CHF = Annotated[int, Money("CHF"), BeforeValidator(_validator("CHF"))]
JPY = Annotated[int, Money("JPY"), BeforeValidator(_validator("JPY"))]

eur, usd, gbp, chf, jpy = (_maker(code) for code in ("EUR", "USD", "GBP", "CHF", "JPY"))
