"""The fifteen features of the *Reproducible Machine Learning for Credit Card Fraud Detection*
handbook (Le Borgne, Siblini, Lebichot, Bontempi; chapter 3, "Baseline feature transformation").

    amount                            of this payment
    weekend, night                    Saturday or Sunday; hour 0 to 6 (both UTC)
    customer_count_, customer_mean_   of the customer's payments in (t - w, t], this one included
    terminal_count_, terminal_fraud_  payments at the terminal in (t - 7d - w, t - 7d], and the
                                      share of fraud among them, 0 where there were none

for w of 1, 7 and 30 days. Labels of fraud are known seven days late: hence the delay.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from risk.kernels import kernel

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

WINDOWS = ("1d", "7d", "30d")
LABEL_DELAY = "7d"

DAY_NS = 86_400_000_000_000
NIGHT_NS = 7 * 3_600_000_000_000  # night is the hours 0 to 6
MINOR_UNITS = 100  # cents a euro


class Features(NamedTuple):
    """Fifteen columns of shape (n,), one row a payment. Money in cents, means in euros."""

    amount: Ints
    weekend: Mask
    night: Mask
    customer_count_1d: Ints
    customer_mean_1d: Floats
    customer_count_7d: Ints
    customer_mean_7d: Floats
    customer_count_30d: Ints
    customer_mean_30d: Floats
    terminal_count_1d: Ints
    terminal_fraud_1d: Floats
    terminal_count_7d: Ints
    terminal_fraud_7d: Floats
    terminal_count_30d: Ints
    terminal_fraud_30d: Floats

    def matrix(self) -> Floats:
        """Shape (n, 15) for a model, the amount in euros."""
        columns = [self.amount / MINOR_UNITS, *self[1:]]
        return np.column_stack([np.asarray(column, np.float64) for column in columns])


def assemble(
    amount: Ints,
    at: Ints,
    customer_count: Ints,
    customer_sum: Ints,
    terminal_count: Ints,
    terminal_frauds: Ints,
) -> Features:
    """The features from totals of shape (n, 3), a column a window of `WINDOWS`."""
    count_1d, count_7d, count_30d = columns = _columns(customer_count)
    mean_1d, mean_7d, mean_30d = map(mean, _columns(customer_sum), columns)
    known_1d, known_7d, known_30d = columns = _columns(terminal_count)
    fraud_1d, fraud_7d, fraud_30d = map(share, _columns(terminal_frauds), columns)
    return Features(
        amount=amount,
        weekend=is_weekend(at),
        night=is_night(at),
        customer_count_1d=count_1d,
        customer_mean_1d=mean_1d,
        customer_count_7d=count_7d,
        customer_mean_7d=mean_7d,
        customer_count_30d=count_30d,
        customer_mean_30d=mean_30d,
        terminal_count_1d=known_1d,
        terminal_fraud_1d=fraud_1d,
        terminal_count_7d=known_7d,
        terminal_fraud_7d=fraud_7d,
        terminal_count_30d=known_30d,
        terminal_fraud_30d=fraud_30d,
    )


def _columns(totals: Ints) -> Ints:
    return np.ascontiguousarray(totals.T)


@kernel
def is_weekend(at: Ints) -> Mask:
    """Saturday or Sunday in UTC. 1970-01-01 was a Thursday."""
    weekend = np.empty(len(at), np.bool_)
    for i in range(len(at)):
        weekend[i] = (at[i] // DAY_NS + 3) % 7 >= 5
    return weekend


@kernel
def is_night(at: Ints) -> Mask:
    """Hour 0 to 6 in UTC."""
    night = np.empty(len(at), np.bool_)
    for i in range(len(at)):
        night[i] = at[i] % DAY_NS < NIGHT_NS
    return night


@kernel
def mean(total: Ints, count: Ints) -> Floats:
    """Euros from a total in cents and a count of one or more, rounded once."""
    out = np.empty(len(total), np.float64)
    for i in range(len(total)):
        out[i] = total[i] / (count[i] * MINOR_UNITS)
    return out


@kernel
def share(part: Ints, count: Ints) -> Floats:
    """part / count, and 0 where there is nothing to share."""
    out = np.zeros(len(part), np.float64)
    for i in range(len(part)):
        if count[i] > 0:
            out[i] = part[i] / count[i]
    return out
