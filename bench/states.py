"""A processor with one row of state a key, for the figures of the runtime."""

from __future__ import annotations

import numpy as np
from sqlalchemy.orm import Mapped

from ledgerstream import Event, Keyed, Processor, Rows, State, Table, Timestamp, Topic, kernel
from ledgerstream.money import EUR
from ledgerstream.stream.batch import Batch


class Posting(Event):
    account: int
    at: Timestamp
    amount: EUR


class RunningBalance(Table):
    """One row a posting."""

    account: Mapped[int]
    balance: Mapped[EUR]


@kernel
def running(row, amount, balance, postings):  # type: ignore[no-untyped-def]
    after = np.empty_like(amount)
    for i in range(len(row)):
        balance[row[i]] += amount[i]
        postings[row[i]] += 1
        after[i] = balance[row[i]]
    return after


class Balances(Processor):
    """The balance of each account, and how many postings it had."""

    source = Topic("postings", Posting, key="account")
    results = (RunningBalance,)
    accounts = Keyed(by="account", balance=EUR, postings=int)

    def process(self, postings: Batch, state: State) -> Rows:
        held = state.accounts.at(postings.account)
        after = running(held.row, postings.amount, held.balance, held.postings)
        return RunningBalance.rows(postings, balance=after)


def postings(count: int, accounts: int, seed: int = 1, every: bool = False) -> np.ndarray:
    """Postings to accounts drawn evenly, or with `every` first one to each account in turn."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, Posting.dtype())
    rows["account"] = np.arange(count) % accounts if every else rng.integers(0, accounts, count)
    rows["at"] = 1_700_000_000_000_000_000 + np.arange(count) * 1_000
    rows["amount"] = rng.integers(-10_000, 10_000, count)
    return rows
