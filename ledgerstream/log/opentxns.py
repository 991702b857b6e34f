"""Transactions of one partition that hold back readers of committed data. Pure.

Open ones, and ended ones whose marker is not below the high watermark yet: to a reader they are
undecided. The first offset of any of them is the last stable offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Ended(NamedTuple):
    """A transaction that its marker ended; `stable_offset` is what readers may see beyond it."""

    producer_id: int
    first_offset: int
    last_offset: int  # the marker's
    stable_offset: int  # the first offset of another that is open, or the one after the marker
    committed: bool


class OpenTransactions:
    """`first_undecided` is kept up to date, because every fetch asks for it."""

    __slots__ = ("_ended", "_open", "first_undecided")

    def __init__(self, opened: Iterable[tuple[int, int]] = ()) -> None:
        """`opened`: (producer id, first offset), by first offset."""
        self._open = dict(opened)  # in the order of their first offsets, which only grow
        self._ended: list[tuple[int, int]] = []  # (first offset, marker's offset), by the latter
        self.first_undecided: int | None = None
        self._look()

    def __contains__(self, producer_id: int) -> bool:
        return producer_id in self._open

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(producer id, first offset) of each open one, by first offset."""
        return iter(list(self._open.items()))

    def __len__(self) -> int:
        return len(self._open)

    def first_of(self, producer_id: int) -> int:
        """-1 if the producer has none open."""
        return self._open.get(producer_id, -1)

    def begin(self, producer_id: int, first_offset: int) -> None:
        self._open[producer_id] = first_offset
        if self.first_undecided is None:
            self.first_undecided = first_offset

    def end(self, producer_id: int, offset: int, *, committed: bool) -> Ended | None:
        """A marker at `offset`; None if the producer has nothing open here."""
        first = self._open.pop(producer_id, None)
        if first is None:
            return None
        self._ended.append((first, offset))
        stable = next(iter(self._open.values()), offset + 1)
        return Ended(producer_id, first, offset, stable, committed)

    def settle(self, high_watermark: int) -> None:
        """What is below the high watermark is decided."""
        ended = self._ended
        if ended and ended[0][1] < high_watermark:
            self._ended = [each for each in ended if each[1] >= high_watermark]
            self._look()

    def _look(self) -> None:
        firsts = [first for first, _ in self._ended]
        firsts += list(self._open.values())[:1]
        self.first_undecided = min(firsts, default=None)
