"""ListOffsets and OffsetForLeaderEpoch: where the log begins, ends, and was at a time."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import structlog
from kio.schema.errors import ErrorCode

from ledgerstream.broker.fetch import READ_COMMITTED, leader_epoch_error
from ledgerstream.broker.replica import Replica
from ledgerstream.broker.server import Exchange
from ledgerstream.errors import CorruptError, DecodeError

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

log = structlog.get_logger("broker")

LATEST, EARLIEST, MAX_TIMESTAMP, EARLIEST_LOCAL, LATEST_TIERED, EARLIEST_PENDING = range(-1, -7, -1)
# the first version in which each special timestamp may be asked
_SINCE = {MAX_TIMESTAMP: 7, EARLIEST_LOCAL: 8, LATEST_TIERED: 9, EARLIEST_PENDING: 11}


async def list_offsets(node: Node, exchange: Exchange) -> None:
    request = exchange.message
    committed = getattr(request, "isolation_level", 0) == READ_COMMITTED
    times = Counter(
        (topic.name, part.partition_index) for topic in request.topics for part in topic.partitions
    )
    topics = []
    for topic in request.topics:
        parts = []
        for part in topic.partitions:
            if times[topic.name, part.partition_index] > 1:
                fields = _error(ErrorCode.invalid_request)
            else:
                fields = await _one(node, topic.name, part, committed, exchange.header.version)
            parts.append({"partition_index": part.partition_index, **fields})
        topics.append({"name": topic.name, "partitions": parts})
    exchange.answer(throttle_time=0, topics=topics)


async def _one(node: Node, name: str, part: Any, committed: bool, version: int) -> dict[str, Any]:
    replica = node.replicas.named(name, part.partition_index)
    if replica is None:
        return _error(ErrorCode.unknown_topic_or_partition)
    partition, asked = replica.partition, part.timestamp
    asked_epoch = getattr(part, "current_leader_epoch", -1)
    if error := leader_epoch_error(asked_epoch, partition.leader_epoch):
        return _error(error)
    if partition.failure is not None:
        return _error(ErrorCode.kafka_storage_error)
    if asked < 0 and (asked < EARLIEST_PENDING or version < _SINCE.get(asked, 0)):
        return _error(ErrorCode.unsupported_version)
    end = partition.last_stable_offset if committed else partition.high_watermark
    match asked:
        case -1:
            return _found(replica, end, -1)
        case -2 | -4:
            return _found(replica, partition.log_start_offset, -1)
        case -5 | -6:  # nothing is tiered here
            return _found(None, -1, -1)
    try:
        found = await node.loop.run_in_executor(
            node.readers,
            *(
                (partition.latest_by_timestamp, end)
                if asked == MAX_TIMESTAMP
                else (partition.offset_for_time, asked, end)
            ),
        )
    except (CorruptError, DecodeError, OSError) as error:
        if partition.deleted:
            return _error(ErrorCode.unknown_topic_or_partition)
        log.error("partition cannot be read", partition=str(partition.key), why=str(error))
        node.read_failures[str(partition.key)] = str(error)
        return _error(ErrorCode.kafka_storage_error)
    return _found(None, -1, -1) if found is None else _found(replica, *found)


def _found(replica: Replica | None, offset: int, timestamp: int) -> dict[str, Any]:
    epoch = -1 if replica is None else replica.partition.leader_epoch
    return {
        "error_code": ErrorCode.none,
        "offset": offset,
        "timestamp": timestamp,
        "leader_epoch": epoch,
    }


def _error(code: ErrorCode) -> dict[str, Any]:
    return {"error_code": code, "offset": -1, "timestamp": -1, "leader_epoch": -1}


def for_leader_epoch(node: Node, exchange: Exchange) -> None:
    topics = []
    for topic in exchange.message.topics:
        parts = []
        for part in topic.partitions:
            replica = node.replicas.named(topic.topic, part.partition)
            error: ErrorCode | None
            epoch, end = -1, -1
            if replica is None:
                error = ErrorCode.unknown_topic_or_partition
            else:
                partition = replica.partition
                error = leader_epoch_error(part.current_leader_epoch, partition.leader_epoch)
                if error is None:
                    epoch, end = partition.epoch_end(part.leader_epoch)
            parts.append({
                "error_code": error or ErrorCode.none,
                "partition": part.partition,
                "leader_epoch": epoch,
                "end_offset": end,
            })  # fmt: skip
        topics.append({"topic": topic.topic, "partitions": parts})
    exchange.answer(throttle_time=0, topics=topics)
