"""The event types that the client's tests write."""

from __future__ import annotations

import enum

import numpy as np

from ledgerstream.events import Event, Text, Timestamp
from ledgerstream.money import EUR


class Channel(enum.StrEnum):
    WEB = "web"
    SHOP = "shop"


class Trade(Event):
    number: int
    at: Timestamp
    account: int
    amount: EUR
    channel: Channel = Channel.WEB
    note: Text[16] = ""


def trades(count: int, *, accounts: int = 97, first: int = 0) -> np.ndarray:
    """`count` trades whose numbers count up."""
    rows = np.zeros(count, Trade.dtype())
    rows["number"] = np.arange(first, first + count)
    rows["at"] = 1_700_000_000_000_000_000 + rows["number"] * 1_000_000
    rows["account"] = rows["number"] * 7919 % accounts
    rows["amount"] = rows["number"] * 3 - 50
    rows["note"] = b"n"
    return rows
