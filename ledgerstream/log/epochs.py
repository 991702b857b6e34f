"""Leader epochs and the offsets at which they began (KIP-101). Pure.

Kept in Kafka's `leader-epoch-checkpoint`: version, count, then a line for each epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

EPOCHS_NAME = "leader-epoch-checkpoint"
UNKNOWN = (-1, -1)


class EpochStart(NamedTuple):
    epoch: int
    start_offset: int


class Epochs:
    __slots__ = ("_starts",)

    def __init__(self, starts: Iterable[EpochStart] = ()) -> None:
        self._starts = list(starts)

    @property
    def latest(self) -> int:
        return self._starts[-1].epoch if self._starts else -1

    def starts(self) -> list[EpochStart]:
        return list(self._starts)

    def begin(self, epoch: int, start_offset: int) -> bool:
        """`epoch` begins here; False if it had begun already."""
        if epoch <= self.latest:
            return False
        while self._starts and self._starts[-1].start_offset >= start_offset:
            self._starts.pop()  # an epoch in which nothing was written
        self._starts.append(EpochStart(epoch, start_offset))
        return True

    def trim(self, log_start_offset: int) -> bool:
        """The log begins here now: who asks for an epoch that is gone hears of the start, as in
        Apache Kafka. False if nothing changes."""
        at = bisect_right(self._starts, log_start_offset, key=lambda start: start.start_offset)
        if at == 0 or (at == 1 and self._starts[0].start_offset == log_start_offset):
            return False
        self._starts[:at] = [EpochStart(self._starts[at - 1].epoch, log_start_offset)]
        return True

    def end_of(self, epoch: int, end_offset: int) -> tuple[int, int]:
        """(the largest epoch ≤ `epoch`, where it ends), as OffsetForLeaderEpoch answers."""
        if not self._starts or epoch > self.latest or epoch < 0:
            return UNKNOWN
        if epoch == self.latest:
            return epoch, end_offset
        at = bisect_right(self._starts, epoch, key=lambda start: start.epoch)
        found = self._starts[at - 1].epoch if at else epoch
        return found, self._starts[at].start_offset

    def encode(self) -> bytes:
        lines = ["0", str(len(self._starts)), *(f"{e} {start}" for e, start in self._starts)]
        return ("\n".join(lines) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes, end_offset: int) -> Epochs:
        """What of the file lies at or below `end_offset`. ValueError where it is malformed."""
        version, count, *lines, end = data.decode().split("\n")
        starts = [_start(line) for line in lines]
        if version != "0" or int(count) != len(starts) or end:
            raise ValueError("not a leader epoch checkpoint")
        return cls(start for start in starts if start.start_offset <= end_offset)


def _start(line: str) -> EpochStart:
    epoch, start_offset = map(int, line.split())
    return EpochStart(epoch, start_offset)
