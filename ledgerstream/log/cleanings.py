"""Which partition is compacted next: the loop's side of the cleaner.

The filthiest goes first, one at a time. Nothing is compacted beyond the last stable offset, nor
what a recovery would still look at, nor the segment that is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

import structlog

from ledgerstream.limits import Limits
from ledgerstream.log.cleanable import Cleanable, cleanable
from ledgerstream.log.cleaner import Cleaner, Damaged, Exchange, Job
from ledgerstream.log.compaction import Rules
from ledgerstream.log.disk import Disk
from ledgerstream.log.partition import Partition
from ledgerstream.log.segment import Segment
from ledgerstream.log.swap import Cleaned

log = structlog.get_logger("log")


class Host(Protocol):
    """What is asked of the store."""

    limits: Limits
    disk: Disk

    def post(self, act: Callable[[], None]) -> None: ...
    def recoverable_below(self, partition: Partition) -> int: ...
    def exchange(self, exchange: Exchange, told: Callable[[bool], None]) -> None: ...
    def leave(self, segments: list[Segment]) -> None: ...


class Cleanings:
    """Everything but what `cleaner` runs is the loop's."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.cleaner = Cleaner(host.disk, host.limits, self._exchange, self._done)
        # until a restart, or until what is damaged has left the log
        self.uncleanable: dict[Partition, Damaged] = {}
        self.dirtiest = 0.0  # ratio, at the last look
        self._busy: Partition | None = None
        self._check_at_ms = 0
        self._now_ms = 0

    def tick(self, partitions: Iterable[Partition], now_ms: int, at_ms: int) -> None:
        self._now_ms = now_ms
        if self._busy is None and at_ms >= self._check_at_ms:
            self._check_at_ms = at_ms + self._host.limits.cleaner_check_ms
            self.uncleanable = {
                partition: damaged
                for partition, damaged in self.uncleanable.items()
                if not partition.deleted and partition.segments[0].base_offset <= damaged.segment
            }
            self._begin(partitions)

    def state_of(self, partition: Partition) -> Cleanable:
        """What there is to do for it."""
        bound = min(partition.last_stable_offset, self._host.recoverable_below(partition))
        return cleanable(
            partition.segments,
            partition.config,
            clean_below=partition.cleaned.clean_below,
            bound=bound,
            now_ms=self._now_ms,
        )

    def _begin(self, partitions: Iterable[Partition]) -> None:
        found = [
            (state.ratio, partition, state)
            for partition in partitions
            if partition.config.compacts
            and partition.failure is None
            and partition not in self.uncleanable
            for state in (self.state_of(partition),)
        ]
        self.dirtiest = max((ratio for ratio, _, _ in found), default=0.0)
        due = [each for each in found if each[2].due]
        if due:
            _, partition, state = max(due, key=lambda each: each[0])
            self._busy = partition
            self.cleaner.queue.put(self._job(partition, state))

    def _job(self, partition: Partition, state: Cleanable) -> Job:
        rules = Rules(
            self._now_ms, partition.config.delete_retention_ms, partition.producers.last_offsets()
        )
        return Job(
            partition,
            partition.segments,
            partition.segments[: state.segments],
            state.start,
            state.end,
            partition.config,
            rules,
            partition.cleaned,
        )

    # called by the cleaner's thread; each goes on on the loop

    def _exchange(self, exchange: Exchange) -> None:
        self._host.post(partial(self._on_loop_exchange, exchange))

    def _done(self, job: Job, cleaned: Cleaned | None, damaged: Damaged | None) -> None:
        self._host.post(partial(self._on_loop_done, job.partition, cleaned, damaged))

    # on the loop

    def _on_loop_exchange(self, exchange: Exchange) -> None:
        partition, old = exchange.job.partition, exchange.old
        if partition.failure is not None or not partition.holds(old):
            self.cleaner.answers.put(False)
            return
        partition.exchanging = True
        self._host.exchange(exchange, partial(self._on_loop_exchanged, exchange))

    def _on_loop_exchanged(self, exchange: Exchange, done: bool) -> None:
        partition = exchange.job.partition
        partition.exchanging = False
        if done and not partition.deleted and partition.holds(exchange.old):
            partition.exchange(exchange.old, exchange.new)
            self._host.leave(exchange.old)
        self.cleaner.answers.put(done)

    def _on_loop_done(
        self, partition: Partition, cleaned: Cleaned | None, damaged: Damaged | None
    ) -> None:
        self._busy = None
        if cleaned is not None:
            partition.cleaned = cleaned
            self._check_at_ms = 0  # perhaps there is another one
        if damaged is not None and not partition.deleted:
            self.uncleanable[partition] = damaged
            self._check_at_ms = 0  # the others
            log.error(
                "partition is not compacted any more and grows; restore the file from a copy and "
                f"restart, or delete the records below offset {damaged.end:,}",
                partition=str(partition.key),
                why=damaged.why,
            )
