"""Transaction markers into partitions: the coordinator's, and an operator's (KIP-664).

All partitions are on this node today; `Markers.write` is the seam over which they will be sent to
others. It gives up only where another coordinator has taken over, and otherwise tries for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from kio.schema.errors import ErrorCode

from ledgerstream.broker.replica import Replica
from ledgerstream.broker.server import Exchange
from ledgerstream.broker.shards import Unavailable
from ledgerstream.errors import StorageError
from ledgerstream.log import Refused
from ledgerstream.wire.markers import Marker

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

log = structlog.get_logger("broker")


class Placed(NamedTuple):
    """A marker in its place, durable once the high watermark reaches `offset`."""

    replica: Replica
    offset: int


class Markers:
    """Writes the end of a transaction to all that it touched."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def write(
        self, marker: Marker, partitions: Iterable[tuple[str, int]], *, strict: bool
    ) -> bool:
        """Whether every partition has it, durable; False if its coordinator has been overtaken.

        A partition that is no more needs none: its topic was deleted, or made anew with fewer. One
        at a higher epoch has seen the end of this transaction by another way.
        """
        todo = list(partitions)
        while True:
            placed, again = [], []
            for topic, index in todo:
                outcome = self.place(topic, index, marker, strict=strict)
                if isinstance(outcome, Placed):
                    placed.append(((topic, index), outcome))
                elif outcome is ErrorCode.transaction_coordinator_fenced:
                    log.warning("coordinator overtaken", marker=str(marker), topic=topic)
                    return False
                elif outcome is ErrorCode.invalid_producer_epoch:
                    log.warning("transaction ended otherwise", marker=str(marker), topic=topic)
                elif self._exists(topic, index):
                    again.append((topic, index))
            for where, (replica, offset) in placed:
                try:
                    await replica.wait_durable(offset)
                except StorageError:
                    again.append(where)
            if not again:
                return True
            todo = again
            await asyncio.sleep(self._node.limits.marker_retry_ms / 1000)

    def _exists(self, topic: str, index: int) -> bool:
        found = self._node.catalog.topics.get(topic)
        return found is not None and index < found.partitions

    def place(self, topic: str, index: int, marker: Marker, *, strict: bool) -> Placed | ErrorCode:
        """Append it to a partition of this node. In a coordinator's own partition its machine
        sees it in the same breath: offsets of the transaction are there when this is durable."""
        if marker.producer_id < 0 or marker.producer_epoch < 0:
            return ErrorCode.invalid_producer_id_mapping
        replica = self._node.replicas.named(topic, index)
        if replica is None:
            return ErrorCode.unknown_topic_or_partition
        shards = self._node.coordinators.get(topic)
        if shards is not None:
            shard = shards.of(index)
            if shard is None or not shard.ready:
                return ErrorCode.not_leader_or_follower
            try:
                return Placed(replica, shard.act_end(marker, strict=strict))
            except Unavailable as error:
                storage = error.code is ErrorCode.not_coordinator
                return ErrorCode.not_leader_or_follower if storage else error.code
        verdict = replica.partition.append_marker(marker, self._node.now_ms(), strict=strict)
        if isinstance(verdict, Refused):
            return verdict.code
        return Placed(replica, verdict.last_offset + 1)


async def write(node: Node, exchange: Exchange) -> None:
    """WriteTxnMarkers: each marker to each of its partitions, answered when all are durable."""
    results: list[dict[str, Any]] = []
    for entry in exchange.message.markers:
        marker = Marker(
            entry.producer_id, entry.producer_epoch, entry.coordinator_epoch,
            entry.transaction_result,
        )  # fmt: skip
        strict = getattr(entry, "transaction_version", 0) >= 2
        topics = []
        for topic in entry.topics:
            placed = [
                (index, node.markers.place(topic.name, index, marker, strict=strict))
                for index in topic.partition_indexes
            ]
            parts = [
                {"partition_index": index, "error_code": await _durable(outcome)}
                for index, outcome in placed
            ]
            topics.append({"name": topic.name, "partitions": parts})
        results.append({"producer_id": entry.producer_id, "topics": topics})
    exchange.answer(markers=results)


async def _durable(outcome: Placed | ErrorCode) -> ErrorCode:
    if isinstance(outcome, ErrorCode):
        return outcome
    try:
        await outcome.replica.wait_durable(outcome.offset)
    except StorageError:
        return ErrorCode.kafka_storage_error
    return ErrorCode.none


def describe_producers(node: Node, exchange: Exchange) -> None:
    """Who has written to a partition of late, and which transactions are open there."""
    wanted: dict[str, dict[int, None]] = {}
    for topic in exchange.message.topics:
        wanted.setdefault(topic.name, {}).update(dict.fromkeys(topic.partition_indexes))
    topics = []
    for name, indexes in wanted.items():
        parts = []
        for index in indexes:
            replica = node.replicas.named(name, index)
            found = [] if replica is None else list(replica.partition.producers.describe())
            unknown = ErrorCode.unknown_topic_or_partition
            parts.append({
                "partition_index": index,
                "error_code": unknown if replica is None else ErrorCode.none,
                "error_message": None,
                "active_producers": [
                    {
                        "producer_id": each.producer_id,
                        "producer_epoch": each.producer_epoch,
                        "last_sequence": each.last_sequence,
                        "last_timestamp": each.last_timestamp,
                        "coordinator_epoch": each.coordinator_epoch,
                        "current_txn_start_offset": each.txn_first_offset,
                    }
                    for each in found
                ],
            })  # fmt: skip
        topics.append({"name": name, "partitions": parts})
    exchange.answer(throttle_time=0, topics=topics)
