"""Our broker with a bug: `python -m tests.checker.planted NAME …`, the rest as for the broker.

Each function patches one thing and says what goes wrong by it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from ledgerstream.broker import run
from ledgerstream.broker.markers import Markers, Placed
from ledgerstream.broker.replica import Replica
from ledgerstream.broker.shards import Shard
from ledgerstream.groups import consumer
from ledgerstream.groups.offsets import Offsets
from ledgerstream.log.partition import Partition
from ledgerstream.log.producers import NEW, Producers
from ledgerstream.log.writer import Writer
from ledgerstream.txn import Coordinator, TxnState
from ledgerstream.txn.coordinator import V1


def marker_missing() -> None:
    """One partition is left out when markers are written, and its transactions stay open."""
    place = Markers.place

    def some(self: Any, topic: str, index: int, marker: Any, *, strict: bool) -> Any:
        if topic == "queue" and index == 1:
            replica = self._node.replicas.named(topic, index)
            return Placed(replica, replica.partition.high_watermark)
        return place(self, topic, index, marker, strict=strict)

    Markers.place = some  # type: ignore[method-assign]


def unstable_reads() -> None:
    """Readers of what is committed see what is open."""
    Partition.last_stable_offset = property(lambda self: self.high_watermark)  # type: ignore


def no_deduplication() -> None:
    """A batch that is sent again is appended again."""

    def check(self: Any, header: Any, guard: Any = None) -> Any:
        return (self._unguarded(header, guard) if header.transactional else None) or NEW

    Producers.check = check  # type: ignore[method-assign]


def early_acknowledgement() -> None:
    """What is acknowledged is on its way to the disk."""
    perform, when_durable = Writer._perform, Replica.when_durable

    def later(self: Any, *given: Any) -> None:
        time.sleep(0.1)
        perform(self, *given)

    def told(self: Any, offset: int, waiter: Any) -> None:
        if self.partition.key.topic in ("queue", "orders"):
            waiter(True)
        else:
            when_durable(self, offset, waiter)

    Writer._perform = later  # type: ignore[method-assign]
    Replica.when_durable = told  # type: ignore[method-assign]


def old_epoch_ends() -> None:
    """EndTxn ends whatever is open, whichever epoch it is of (KAFKA-17754)."""
    decide = Coordinator.decide_end

    def end(self: Any, txn_id: str, producer_id: int, epoch: int, *given: Any, **more: Any) -> Any:
        txn = self.txns.get(txn_id)
        if txn is not None and txn.state is TxnState.ONGOING:
            producer_id, epoch = txn.client
        return decide(self, txn_id, producer_id, epoch, *given, **more)

    Coordinator.decide_end = end  # type: ignore[method-assign]


def aborted_offsets_kept() -> None:
    """A group's offsets are committed, however their transaction ends."""
    end = Offsets.end
    Offsets.end = lambda self, producer_id, *, committed: end(  # type: ignore[method-assign]
        self, producer_id, committed=True
    )


def offsets_outside() -> None:
    """A group's offsets are committed where they come, not in their transaction."""
    perform = Shard.perform

    def outside(self: Any, decision: Any, writing: Any = None) -> Any:
        return perform(self, decision)

    Shard.perform = outside  # type: ignore[method-assign]


def given_before_released() -> None:
    """A member is given partitions that another one has not let go of (KIP-848)."""
    reconcile = consumer.reconcile

    def early(current: Any, epoch: int, target: Any, subscribed: Any, _: Any, owned: Any) -> Any:
        return reconcile(current, epoch, target, subscribed, lambda *_: None, owned)

    consumer.reconcile = early


def timeout_without_fence() -> None:
    """A transaction that times out is aborted in its producer's own epoch: what that one still
    writes begins another, and is committed as if it were whole. It needs a clock that jumps."""
    decide = Coordinator.decide_timeout

    def abort(self: Any, txn_id: str, now_ms: int, new_id: int | None = None) -> Any:
        decided = decide(self, txn_id, now_ms, new_id)
        if not decided.records:
            return decided
        txn = self.txns[txn_id]
        return self._prepare(txn, TxnState.PREPARE_ABORT, V1, now_ms, new_id)

    Coordinator.decide_timeout = abort  # type: ignore[method-assign]


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    run.main()
