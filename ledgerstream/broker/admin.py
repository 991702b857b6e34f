"""CreateTopics, DeleteTopics, DeleteRecords, CreatePartitions, DescribeLogDirs."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

from kio.schema.errors import ErrorCode

from ledgerstream.broker.configs import topic_entries
from ledgerstream.broker.server import Exchange
from ledgerstream.catalog import Answer

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

NO_OFFSET = -1
TO_HIGH_WATERMARK = -1  # in DeleteRecords: all that is durable


async def create_topics(node: Node, exchange: Exchange) -> None:
    request = exchange.message
    names = Counter(topic.name for topic in request.topics)
    results, done = [], set()
    for topic in request.topics:
        if topic.name in done:
            continue
        done.add(topic.name)
        if names[topic.name] > 1:
            answer = Answer(ErrorCode.invalid_request, "Duplicate topic name.")
        else:
            answer = await _create(node, topic, request.validate_only)
        results.append(_created(node, topic.name, answer, request.validate_only))
    exchange.answer(throttle_time=0, topics=results)


async def _create(node: Node, topic: Any, validate_only: bool) -> Answer:
    partitions, replication = topic.num_partitions, topic.replication_factor
    if topic.assignments:
        if partitions != -1 or replication != -1:
            return Answer(
                ErrorCode.invalid_request,
                "A manual partition assignment was specified, but numPartitions or "
                "replicationFactor was not set to -1.",
            )
        indexes = sorted(part.partition_index for part in topic.assignments)
        me = (node.settings.node_id,)
        if indexes != list(range(len(indexes))) or any(
            tuple(part.broker_ids) != me for part in topic.assignments
        ):
            return Answer(
                ErrorCode.invalid_replica_assignment,
                f"Partitions are 0, 1, … and each on broker {node.settings.node_id} alone.",
            )
        partitions, replication = len(indexes), 1
    config = {entry.name: entry.value for entry in topic.configs}
    return await node.create_topic(
        topic.name, partitions, replication, config, validate_only=validate_only
    )


def _created(node: Node, name: str, answer: Answer, validate_only: bool) -> dict[str, Any]:
    topic = answer.topic
    if topic is None:
        return {
            "name": name,
            "topic_id": None,
            "error_code": answer.error,
            "error_message": answer.message,
            "num_partitions": -1,
            "replication_factor": -1,
            "configs": [],
        }
    return {
        "name": name,
        "topic_id": None if validate_only else topic.topic_id,
        "error_code": ErrorCode.none,
        "error_message": None,
        "num_partitions": topic.partitions,
        "replication_factor": 1,
        "configs": topic_entries(topic.config),
    }


async def delete_topics(node: Node, exchange: Exchange) -> None:
    request, version = exchange.message, exchange.header.version
    results = []
    if version >= 6:
        wanted = [(topic.name, topic.topic_id) for topic in request.topics]
    else:
        wanted = [(name, None) for name in request.topic_names]
    times = Counter(wanted)
    for name, topic_id in times:
        catalog = node.catalog
        topic = catalog.topics.get(name) if name is not None else catalog.by_id.get(topic_id)
        if times[name, topic_id] > 1:
            answer = Answer(ErrorCode.invalid_request, "Duplicate topic in the request.")
        elif name is not None and topic_id is not None:
            answer = Answer(ErrorCode.invalid_request, "Give a topic's name or its id, not both.")
        elif topic is None and name is None:
            answer = Answer(ErrorCode.unknown_topic_id, "This server does not host this topic ID.")
        else:
            answer = await node.perform(catalog.decide_delete(topic))
        results.append({
            "name": topic.name if topic is not None else name,
            "topic_id": topic.topic_id if topic is not None else topic_id,
            "error_code": answer.error,
            "error_message": answer.message,
        })  # fmt: skip
    exchange.answer(throttle_time=0, responses=results)


async def delete_records(node: Node, exchange: Exchange) -> None:
    """Each log's new start is durable before the answer; the records' files go behind it."""
    wanted = {
        (topic.name, part.partition_index): part.offset
        for topic in exchange.message.topics
        for part in topic.partitions
    }
    answers = await asyncio.gather(
        *(_delete_before(node, name, index, offset) for (name, index), offset in wanted.items())
    )
    topics: dict[str, list[dict[str, Any]]] = {}
    for (name, index), (low_watermark, error) in zip(wanted, answers, strict=True):
        topics.setdefault(name, []).append(
            {"partition_index": index, "low_watermark": low_watermark, "error_code": error}
        )
    exchange.answer(
        throttle_time=0,
        topics=[{"name": name, "partitions": parts} for name, parts in topics.items()],
    )


async def _delete_before(node: Node, name: str, index: int, offset: int) -> tuple[int, ErrorCode]:
    """(where the log begins, error)"""
    replica = node.replicas.named(name, index)
    if replica is None or name not in node.catalog.topics:  # the catalogue itself is no topic
        return NO_OFFSET, ErrorCode.unknown_topic_or_partition
    partition = replica.partition
    if name in node.coordinators:
        return NO_OFFSET, ErrorCode.invalid_topic_exception
    if not partition.config.deletes:
        return NO_OFFSET, ErrorCode.policy_violation
    if offset == TO_HIGH_WATERMARK:
        offset = partition.high_watermark
    if not 0 <= offset <= partition.high_watermark:
        return NO_OFFSET, ErrorCode.offset_out_of_range
    done = node.loop.create_future()

    def tell(durable: bool) -> None:
        if not done.done():
            done.set_result(durable)

    node.store.trims.raise_to(partition, offset, tell)
    if not await done:
        return NO_OFFSET, ErrorCode.kafka_storage_error
    return partition.log_start_offset, ErrorCode.none


async def create_partitions(node: Node, exchange: Exchange) -> None:
    request = exchange.message
    times = Counter(topic.name for topic in request.topics)
    results = []
    for topic in {topic.name: topic for topic in request.topics}.values():
        if times[topic.name] > 1:
            answer = Answer(ErrorCode.invalid_request, "Duplicate topic name.")
        else:
            answer = await _add(node, topic, request.validate_only)
        results.append({
            "name": topic.name,
            "error_code": answer.error,
            "error_message": answer.message,
        })  # fmt: skip
    exchange.answer(throttle_time=0, results=results)


async def _add(node: Node, topic: Any, validate_only: bool) -> Answer:
    decision = node.catalog.decide_add_partitions(topic.name, topic.count)
    found = node.catalog.topics.get(topic.name)
    if decision.reply.error is ErrorCode.none and found is not None and topic.assignments:
        me = (node.settings.node_id,)
        wrong = any(tuple(part.broker_ids) != me for part in topic.assignments)
        if wrong or len(topic.assignments) != topic.count - found.partitions:
            return Answer(
                ErrorCode.invalid_replica_assignment,
                f"Each new partition is on broker {node.settings.node_id} alone.",
            )
    if validate_only:
        return decision.reply
    return await node.perform(decision)


async def describe_log_dirs(node: Node, exchange: Exchange) -> None:
    wanted = exchange.message.topics
    asked = None if wanted is None else {
        (topic.topic, index) for topic in wanted for index in topic.partitions
    }  # fmt: skip
    topics: dict[str, list[dict[str, Any]]] = {}
    for replica in node.replicas:
        key = replica.partition.key
        if asked is None or (key.topic, key.index) in asked:
            topics.setdefault(key.topic, []).append({
                "partition_index": key.index,
                "partition_size": replica.partition.size_bytes,
                "offset_lag": 0,
                "is_future_key": False,
            })  # fmt: skip
    usage = await node.loop.run_in_executor(node.readers, shutil.disk_usage, node.settings.data_dir)
    exchange.answer(
        throttle_time=0,
        error_code=ErrorCode.none,
        results=[{
            "error_code": ErrorCode.none,
            "log_dir": str(node.settings.data_dir.absolute()),
            "topics": [{"name": n, "partitions": parts} for n, parts in topics.items()],
            "total_bytes": usage.total,
            "usable_bytes": usage.free,
            "is_cordoned": False,
        }],
    )  # fmt: skip
