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
from ledgerstream.groups.offsets import Offsets
from ledgerstream.log.partition import Partition
from ledgerstream.log.producers import NEW, Producers
from ledgerstream.log.writer import Writer
from ledgerstream.txn import Coordinator, TxnState


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


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    run.main()
