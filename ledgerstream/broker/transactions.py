"""The transaction coordinators of this node, and what follows their decisions.

A decision to end a transaction, once durable, sends markers to its partitions; when all of those
are durable the transaction is complete. Whoever comes meanwhile is held for up to
`transaction_hold_ms` and then decided as if it had come later: clients that hear
CONCURRENT_TRANSACTIONS sleep for far longer than the markers take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import structlog
from kio.schema.errors import ErrorCode

from ledgerstream.broker.markers import Markers
from ledgerstream.broker.shards import Shard, Shards, Unavailable
from ledgerstream.errors import StorageError
from ledgerstream.log import PartitionKey
from ledgerstream.machine import Decision
from ledgerstream.txn import Coordinator, Txn, TxnCodec, TxnRecord, TxnState
from ledgerstream.txn.coordinator import V1, V2
from ledgerstream.txn.records import TopicPartition
from ledgerstream.wire.markers import Marker

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

log = structlog.get_logger("broker")

TOPIC = "__transaction_state"
TXN_ID_BYTES_MAX = 2**15 - 1  # of the record format
Ask = Callable[[Coordinator, int | None], Decision[TxnRecord, Any]]
TxnShard = Shard[Coordinator, TxnRecord]


def _nothing() -> None:
    """There are no guards to begin."""


class Transactions:
    """`decide` performs what a coordinator decides; `admit` is asked before data is written."""

    def __init__(self, node: Node, markers: Markers) -> None:
        self.shards: Shards[Coordinator, TxnRecord] = Shards(
            node, TOPIC, Coordinator, TxnCodec(), self._loaded
        )
        self._node = node
        self._markers = markers
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # in use
        self._waiting: dict[str, asyncio.Future[None]] = {}  # for the end of an id's transaction
        self._timeouts_at_ms = self._expiry_at_ms = 0
        self.late: dict[PartitionKey, int] = {}  # transactions that hang, by partition

    async def decide(self, txn_id: str, ask: Ask) -> Any:
        """The reply of the decision, durable; or the ErrorCode that stands in its way."""
        if len(txn_id.encode()) > TXN_ID_BYTES_MAX:
            return ErrorCode.invalid_request
        deadline = self._node.loop.time() + self._node.limits.transaction_hold_ms / 1000
        new_id = None
        while True:
            shard = await self.shards.find(txn_id)
            if isinstance(shard, ErrorCode):
                return shard
            decision = ask(shard.machine, new_id)
            reply = decision.reply
            if getattr(reply, "needs_id", False):
                try:
                    new_id = await self._node.producer_ids.take()
                except StorageError:  # never a used one: the client asks again
                    return ErrorCode.coordinator_load_in_progress
                continue
            concurrent = getattr(reply, "error", reply) is ErrorCode.concurrent_transactions
            if concurrent and not decision.records and await self._wait_end(txn_id, deadline):
                continue
            try:
                await shard.perform(decision)
            except Unavailable as error:
                return error.code
            if decision.records and self._finish_if_ending(shard, txn_id) and concurrent:
                continue  # a transaction was in the way; its end is awaited above
            return reply

    def turn(self, txn_id: str) -> asyncio.Lock:
        """For what is asked before data is written: one after the other, in the order in which it
        came, since each may be a batch that follows another. Taken with no await in between."""
        lock = self._turns.get(txn_id)
        if lock is None:
            lock = self._turns[txn_id] = asyncio.Lock()
        return lock

    def is_admitting(self, txn_id: str) -> bool:
        """Whether something has taken its turn and is not done."""
        return txn_id in self._turns

    async def admit(
        self,
        txn_id: str,
        producer_id: int,
        producer_epoch: int,
        partitions: Collection[TopicPartition],
        *,
        implicit: bool,
        asking: Callable[[], None] = _nothing,
    ) -> dict[TopicPartition, ErrorCode]:
        """Whether the transaction knows of the partitions that are about to be written to.

        `implicit`: they are added to it (Transactions V2). Otherwise the client must have done so
        (KIP-890); a code other than NONE says why not. `asking` is called just before each look at
        the coordinator's state: guards begin then, since a hold lasts until markers are written.
        """

        def add(machine: Coordinator, _: int | None) -> Decision[TxnRecord, Any]:
            asking()
            return machine.decide_add(
                txn_id, producer_id, producer_epoch, partitions, self._node.now_ms(), V2
            )

        def verify(machine: Coordinator, _: int | None) -> Decision[TxnRecord, Any]:
            asking()
            return Decision((), machine.verify(txn_id, producer_id, producer_epoch, partitions))

        found = await self.decide(txn_id, add if implicit else verify)
        return dict.fromkeys(partitions, found) if isinstance(found, ErrorCode) else found

    # -- the end of a transaction

    def _loaded(self, shard: TxnShard) -> None:
        """After a restart, or a failed append: what was decided is carried out."""
        for txn in list(shard.machine.ending()):
            self._finish(shard, txn)

    def _finish_if_ending(self, shard: TxnShard, txn_id: str) -> bool:
        txn = shard.machine.txns.get(txn_id) if shard.ready else None
        if txn is None or not txn.state.ending:
            return False
        self._finish(shard, txn)
        return True

    def _finish(self, shard: TxnShard, txn: Txn) -> None:
        self._node.spawn(self._end(shard, txn))

    async def _end(self, shard: TxnShard, txn: Txn) -> None:
        """Markers, and when all of them are durable the transaction is complete."""
        if txn.partitions:
            marker = Marker(
                txn.producer_id,
                txn.producer_epoch,
                shard.coordinator_epoch,
                txn.state is TxnState.PREPARE_COMMIT,
            )
            if not await self._markers.write(marker, txn.partitions, strict=txn.version == V2):
                return  # another coordinator has taken over
        if not shard.ready:
            return  # its next machine begins again
        done = shard.machine.decide_complete(
            txn.txn_id, txn.producer_id, txn.producer_epoch, self._node.now_ms()
        )
        try:
            shard.act(done)
        except Unavailable as error:
            log.warning("transaction not completed yet", id=txn.txn_id, why=str(error))
            return
        waiting = self._waiting.pop(txn.txn_id, None)
        if waiting is not None:
            waiting.set_result(None)

    async def _wait_end(self, txn_id: str, deadline: float) -> bool:
        """Whether the transaction that ends was complete before the deadline."""
        waiting = self._waiting.get(txn_id)
        if waiting is None:
            waiting = self._waiting[txn_id] = self._node.loop.create_future()
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(waiting)
        except TimeoutError:
            return False
        return True

    # -- the clock

    def tick(self, now_ms: int, at_ms: int) -> None:
        """Abort what is open too long; forget ids that were not used for long.

        By the wall's clock, as their records have it; looked for by one that never jumps.
        """
        limits = self._node.limits
        if at_ms >= self._timeouts_at_ms:
            self._timeouts_at_ms = at_ms + limits.transaction_timeout_check_ms
            for shard in self.shards:
                if shard.ready:
                    for txn_id in shard.machine.overdue(now_ms):
                        self._node.spawn(self._time_out(txn_id))
            self._look_for_late(now_ms)
        if at_ms >= self._expiry_at_ms:
            self._expiry_at_ms = at_ms + limits.transactional_id_expiry_check_ms
            for shard in self.shards:
                if shard.ready:
                    self._expire(shard, now_ms)

    def _look_for_late(self, now_ms: int) -> None:
        """Open for longer than any timeout: prepared and forgotten, or of nobody (KIP-664)."""
        limits = self._node.limits
        after_ms = limits.transaction_timeout_ms_max + limits.transaction_late_ms
        found = {}
        for replica in self._node.replicas:
            partition = replica.partition
            if len(partition.producers.open):
                count = sum(1 for _ in partition.producers.late(now_ms, after_ms))
                if count:
                    found[partition.key] = count
        for key in found.keys() - self.late.keys():
            log.warning("transaction hangs", partition=str(key), transactions=found[key])
        self.late = found

    async def _time_out(self, txn_id: str) -> None:
        log.info("transaction timed out", id=txn_id)
        await self.decide(
            txn_id,
            lambda machine, new_id: machine.decide_timeout(txn_id, self._node.now_ms(), new_id),
        )

    def _expire(self, shard: TxnShard, now_ms: int) -> None:
        decision = shard.machine.decide_expire(now_ms, self._node.limits.transactional_id_expiry_ms)
        try:
            shard.act(decision)
        except Unavailable as error:
            log.warning("transactional ids not expired", why=str(error))


__all__ = ["TOPIC", "V1", "V2", "Transactions"]
