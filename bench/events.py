"""A row of 48 bytes, for the columnar figures."""

from __future__ import annotations

from ledgerstream import Event, Timestamp


class Trade(Event):
    trade_id: int
    at: Timestamp
    instrument: int
    price: int
    quantity: int
    venue: int = 0
