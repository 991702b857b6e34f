"""Transfers between accounts: each is carried out once, whole, and their sum stays. Pure.

An order is `name:source:target:amount`; each of its two sides is `name:order:account:moved`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from tests.checker.checker import Anomaly
from tests.checker.history import Found, Partition

Side = tuple[str, int]  # account, what it gets


def balances(found: Found) -> dict[str, int]:
    sums: dict[str, int] = defaultdict(int)
    for records in found.values():
        for _, value in records:
            _, _, account, moved = value.split(":")
            sums[account] += int(moved)
    return sums


def transfers(orders: Found, accounts: Found, done: Mapping[Partition, int]) -> Iterator[Anomaly]:
    """`done`: the offsets of orders up to which they were carried out, as the group has it."""
    sides: dict[str, list[Side]] = defaultdict(list)
    for records in accounts.values():
        for _, value in records:
            _, order, account, moved = value.split(":")
            sides[order].append((account, int(moved)))
    for partition, records in orders.items():
        for offset, value in records:
            name, source, target, amount = value.split(":")
            whole = sorted([(source, -int(amount)), (target, int(amount))])
            carried_out = sorted(sides.pop(name, []))
            due = whole if offset < done.get(partition, 0) else []
            if carried_out != due:
                yield Anomaly("transfer", partition, f"{value} at {offset}: {carried_out}")
    for order, found in sides.items():
        yield Anomaly("transfer", order, f"{found} without an order")
