"""Card payments: the event, and a seeded generator of them.

The generator follows the *Reproducible Machine Learning for Credit Card Fraud Detection* handbook
(chapter 3, "Transaction data simulator"). Customers and terminals stand on a square of 100 by 100;
a customer pays at terminals at most 5 away. Each has a mean amount of 5 to 100 (standard deviation
half of it) and 0 to 4 payments a day, around noon. Fraud comes in three scenarios, a later one
overriding an earlier:

1. every payment over 220;
2. each day two terminals are compromised, and every payment there is fraud for 28 days;
3. each day three customers' cards leak; for 14 days a third of their payments is multiplied by
   five, and fraud.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ledgerstream.events import Event, Int8, Timestamp, parse_timestamp
from ledgerstream.money import EUR, eur

SECOND_NS = 1_000_000_000
DAY_S = 86_400


class Payment(Event):
    """A card payment. `is_fraud` is the label, which features may use seven days later only."""

    payment_id: int = Field(validation_alias="tx_id")
    at: Timestamp = Field(validation_alias="event_time")
    customer: int = Field(validation_alias="customer_id")
    terminal: int = Field(validation_alias="terminal_id")
    amount: EUR
    is_fraud: bool
    scenario: Int8 = Field(default=0, validation_alias="fraud_scenario")


@dataclass(frozen=True, slots=True)
class Simulation:
    """What is simulated. The defaults are the handbook's, for half a year."""

    customers: int = 5_000
    terminals: int = 10_000
    days: int = 183
    start: str = "2018-04-01T00:00:00Z"
    seed: int = 7

    side: float = 100.0
    reach: float = 5.0
    large_amount: int = eur("220.00")
    terminals_compromised_daily: int = 2
    terminal_compromised_days: int = 28
    cards_leaked_daily: int = 3
    card_leaked_days: int = 14

    def payments(self) -> Iterator[NDArray]:
        """The payments a day, as rows of `Payment.dtype()`: in time order, ids counting from 0.

        The same simulation gives the same bytes. A rate is the reader's affair.
        """
        world = _World(self, np.random.Generator(np.random.PCG64(self.seed)))
        first_id = 0
        for day in range(self.days):
            rows = world.day(day, first_id)
            first_id += len(rows)
            yield rows


class _World:
    """The customers, the terminals each can reach, and who is compromised until when."""

    def __init__(self, simulation: Simulation, rng: np.random.Generator) -> None:
        self.simulation, self.rng = simulation, rng
        self.start_ns = parse_timestamp(simulation.start)
        n = simulation.customers
        homes = rng.uniform(0, simulation.side, (n, 2))
        self.mean_amount = rng.uniform(5, 100, n)
        self.payments_daily = rng.uniform(0, 4, n)
        shops = rng.uniform(0, simulation.side, (simulation.terminals, 2))
        self.reachable, self.first, self.count = _within(homes, shops, simulation.reach)
        self.payments_daily[self.count == 0] = 0  # nowhere to pay
        self.terminal_bad_until = np.zeros(simulation.terminals, np.int64)
        self.card_bad_until = np.zeros(n, np.int64)

    def day(self, day: int, first_id: int) -> NDArray:
        rng = self.rng
        rows = self._genuine(day)
        rows["payment_id"] = np.arange(first_id, first_id + len(rows))
        self._compromise(day)

        large = rows["amount"] > self.simulation.large_amount
        terminal_bad = self.terminal_bad_until[rows["terminal"]] > day
        card_bad = self.card_bad_until[rows["customer"]] > day
        card_bad &= rng.random(len(rows)) < 1 / 3
        rows["amount"][card_bad] *= 5
        rows["scenario"] = np.select([card_bad, terminal_bad, large], [3, 2, 1])
        rows["is_fraud"] = rows["scenario"] > 0
        return rows

    def _genuine(self, day: int) -> NDArray:
        from_home = np.repeat(
            np.arange(self.simulation.customers), self.rng.poisson(self.payments_daily)
        )
        second = self.rng.normal(DAY_S / 2, 20_000, len(from_home)).astype(np.int64)
        within = (second > 0) & (second < DAY_S)
        order = np.argsort(second[within], kind="stable")
        customer, second = from_home[within][order], second[within][order]

        rows = np.zeros(len(customer), _PAYMENT)
        rows["at"] = self.start_ns + (day * DAY_S + second) * SECOND_NS
        rows["customer"] = customer
        rows["amount"] = self._amounts(self.mean_amount[customer])
        pick = (self.rng.random(len(rows)) * self.count[customer]).astype(np.int64)
        rows["terminal"] = self.reachable[self.first[customer] + pick]
        return rows

    def _amounts(self, mean: NDArray) -> NDArray:
        """Cents, at least one; normal, and what falls below zero uniform up to twice the mean."""
        euros = self.rng.normal(mean, mean / 2)
        below = euros < 0
        euros[below] = self.rng.uniform(0, 2 * mean[below])
        return np.maximum(np.rint(euros * 100), 1).astype(np.int64)

    def _compromise(self, day: int) -> None:
        s = self.simulation
        for until, daily, days in (
            (self.terminal_bad_until, s.terminals_compromised_daily, s.terminal_compromised_days),
            (self.card_bad_until, s.cards_leaked_daily, s.card_leaked_days),
        ):
            chosen = self.rng.choice(len(until), min(daily, len(until)), replace=False)
            until[chosen] = day + days


_PAYMENT = Payment.dtype()


def _within(homes: NDArray, shops: NDArray, reach: float) -> tuple[NDArray, NDArray, NDArray]:
    """The shops within reach of each home, one home after the other, with first and count."""
    near = [np.flatnonzero(((shops - home) ** 2).sum(axis=1) <= reach**2) for home in homes]
    count = np.array([len(shops_near) for shops_near in near])
    return np.concatenate(near), np.cumsum(count) - count, count
