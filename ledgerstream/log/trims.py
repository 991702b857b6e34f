"""Where logs begin: raised by retention and by whoever deletes records, and the files that go.

A new start is in the checkpoint file before anybody is told and before a file loses its name.
Files that a reader has open stay readable for `file_delete_delay_ms`; then their space is free.
Producers are not forgotten with their records (KAFKA-7190): a snapshot of them stands at or above
the first segment that is left, and a segment goes only when the checkpoint file reaches past it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

from ledgerstream.limits import Limits
from ledgerstream.log.partition import Partition
from ledgerstream.log.retention import below, start_of
from ledgerstream.log.segment import Segment

Told = Callable[[bool], None]  # whether it is durable


class Host(Protocol):
    """What is asked of the store."""

    limits: Limits

    def write_checkpoint(self, written: Callable[[bool], None]) -> None: ...
    def drop(self, partition: Partition, segments: list[Segment]) -> None: ...
    def let_go(self, segments: list[Segment]) -> None: ...


class Rise(NamedTuple):
    partition: Partition
    offset: int
    told: Told


class Trims:
    """The loop's; its state is soft: what was not told after a crash has never been."""

    def __init__(self, host: Host) -> None:
        self.segments = 0  # that went, for metrics
        self.bytes = 0
        self._host = host
        self._waiting: list[Rise] = []
        self._writing: list[Rise] = []
        self._wanted: dict[Partition, int] = {}
        self._leaving: deque[tuple[int, list[Segment]]] = deque()
        self._at_ms = 0
        self._check_at_ms = 0

    def start_wanted(self, partition: Partition) -> int:
        """What the next checkpoint says of it."""
        return self._wanted.get(partition, partition.log_start_offset)

    def raise_to(self, partition: Partition, offset: int, told: Told) -> None:
        """Everything below `offset`, which the high watermark has reached, is to go. `told(True)`
        on the loop once that is durable; `told(False)` if it could not be made so."""
        assert offset <= partition.high_watermark
        if partition.failure is not None:
            told(False)
            return
        if offset > self.start_wanted(partition):
            self._wanted[partition] = offset
        self._waiting.append(Rise(partition, offset, told))
        if not self._writing:
            self._write()

    def tick(self, partitions: Iterable[Partition], now_ms: int, at_ms: int) -> None:
        """Retention, now and then; the end of files that went a while ago."""
        self._at_ms = at_ms
        while self._leaving and self._leaving[0][0] <= at_ms:
            self._host.let_go(self._leaving.popleft()[1])
        if at_ms >= self._check_at_ms:
            self._check_at_ms = at_ms + self._host.limits.retention_check_ms
            for partition in partitions:
                if partition.failure is None:
                    self._check(partition, now_ms)

    def _check(self, partition: Partition, now_ms: int) -> None:
        start, roll = start_of(
            partition.segments,
            partition.config,
            log_start_offset=partition.log_start_offset,
            next_offset=partition.next_offset,
            high_watermark=partition.high_watermark,
            now_ms=now_ms,
        )
        if roll:
            partition.begin_segment(now_ms)
        droppable = below(partition.segments, min(start, partition.recovery_point))
        droppable = 0 if partition.exchanging else droppable
        if start > self.start_wanted(partition) or droppable:
            self.raise_to(partition, start, _nobody)

    def _write(self) -> None:
        self._writing, self._waiting = self._waiting, []
        settled = {rise.partition: rise.partition.recovery_point for rise in self._writing}
        self._host.write_checkpoint(partial(self._written, settled))

    def _written(self, settled: dict[Partition, int], durable: bool) -> None:
        rises, self._writing = self._writing, []
        for partition, offset, told in rises:
            if partition.deleted:
                told(False)
            elif durable:
                gone = partition.raise_log_start(offset, settled[partition])
                if gone:
                    self._go(partition, gone)
                told(True)
            else:
                told(False)
        for partition in settled:
            later = [rise.offset for rise in self._waiting if rise.partition is partition]
            self._wanted.pop(partition, None)
            if later and max(later) > partition.log_start_offset:
                self._wanted[partition] = max(later)
        if self._waiting:
            self._write()

    def _go(self, partition: Partition, gone: list[Segment]) -> None:
        self.segments += len(gone)
        self.bytes += sum(segment.size for segment in gone)
        self._host.drop(partition, gone)
        self.leave(gone)

    def leave(self, segments: list[Segment]) -> None:
        """They are no part of a log any more."""
        self._leaving.append((self._at_ms + self._host.limits.file_delete_delay_ms, segments))


def _nobody(_: bool) -> None:
    """Nobody has asked."""
