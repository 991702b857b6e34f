"""Metadata and DescribeCluster: who is there, and which topics with which leaders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from kio.schema.errors import ErrorCode

from ledgerstream.broker.server import Exchange
from ledgerstream.catalog import RESERVED_TOPICS, Topic, why_bad_name

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

# bit sets of AclOperation, as Kafka answers where nothing is forbidden
TOPIC_OPERATIONS = sum(1 << bit for bit in (3, 4, 5, 6, 7, 8, 10, 11))
CLUSTER_OPERATIONS = sum(1 << bit for bit in (5, 7, 8, 9, 10, 11, 12))
NOT_ASKED = -(2**31)


async def handle(node: Node, exchange: Exchange) -> None:
    request, version = exchange.message, exchange.header.version
    wanted = request.topics
    create = version < 4 or request.allow_auto_topic_creation
    with_operations = getattr(request, "include_topic_authorized_operations", False)
    if wanted is None or (version == 0 and not wanted):
        topics = [_topic(node, topic) for topic in node.catalog.topics.values()]
    else:
        each = {topic.name or getattr(topic, "topic_id", None): topic for topic in wanted}
        topics = [await _named(node, topic, create, version) for topic in each.values()]
    for topic in topics:
        topic["topic_authorized_operations"] = (
            TOPIC_OPERATIONS
            if with_operations and topic["error_code"] is not ErrorCode.unknown_topic_id
            else NOT_ASKED
        )
    asked = getattr(request, "include_cluster_authorized_operations", False)
    exchange.answer(
        throttle_time=0,
        error_code=ErrorCode.none,
        brokers=[_broker(node)],
        cluster_id=node.cluster_id,
        controller_id=node.settings.node_id,
        topics=topics,
        cluster_authorized_operations=CLUSTER_OPERATIONS if asked else NOT_ASKED,
    )


def _broker(node: Node) -> dict[str, Any]:
    host, port = node.advertised
    return {
        "node_id": node.settings.node_id,
        "broker_id": node.settings.node_id,
        "host": host,
        "port": port,
        "rack": None,
        "is_fenced": False,
    }


async def _named(node: Node, wanted: Any, create: bool, version: int) -> dict[str, Any]:
    topic_id: UUID | None = getattr(wanted, "topic_id", None)
    if version >= 10 and wanted.name is None:
        topic = node.catalog.by_id.get(topic_id) if topic_id is not None else None
        if topic is None:
            return _absent(None, topic_id, ErrorCode.unknown_topic_id)
        return _topic(node, topic)
    topic = node.catalog.topics.get(wanted.name)
    if topic is not None:
        return _topic(node, topic)
    if why_bad_name(wanted.name):
        return _absent(wanted.name, None, ErrorCode.invalid_topic_exception)
    if create and node.settings.auto_create_topics:
        answer = await node.create_topic(wanted.name, -1)
        topic = node.catalog.topics.get(wanted.name)
        if topic is not None:
            return _topic(node, topic)
        return _absent(wanted.name, None, answer.error)
    return _absent(wanted.name, None, ErrorCode.unknown_topic_or_partition)


def _absent(name: str | None, topic_id: UUID | None, error: ErrorCode) -> dict[str, Any]:
    return {
        "error_code": error,
        "name": name,
        "topic_id": topic_id,
        "is_internal": False,
        "partitions": [],
    }


def _topic(node: Node, topic: Topic) -> dict[str, Any]:
    me = node.settings.node_id
    parts = []
    for index in range(topic.partitions):
        replica = node.replicas.of(topic.topic_id, index)
        well = replica is not None and replica.partition.failure is None
        parts.append({
            "error_code": ErrorCode.none if well else ErrorCode.leader_not_available,
            "partition_index": index,
            "leader_id": me if well else -1,
            "leader_epoch": replica.partition.leader_epoch if replica is not None else -1,
            "replica_nodes": [me],
            "isr_nodes": [me] if well else [],
            "offline_replicas": [] if well else [me],
        })  # fmt: skip
    return {
        "error_code": ErrorCode.none,
        "name": topic.name,
        "topic_id": topic.topic_id,
        "is_internal": topic.name in RESERVED_TOPICS,
        "partitions": parts,
    }


def describe_cluster(node: Node, exchange: Exchange) -> None:
    request = exchange.message
    endpoint = getattr(request, "endpoint_type", 1)
    error = ErrorCode.none
    message = None
    if endpoint != 1:
        error = ErrorCode.mismatched_endpoint_type
        if endpoint != 2:
            error = ErrorCode.unsupported_endpoint_type
        message = f"Unsupported endpoint type {endpoint}"
    well = error is ErrorCode.none
    exchange.answer(
        throttle_time=0,
        error_code=error,
        error_message=message,
        endpoint_type=1,
        cluster_id=node.cluster_id if well else "",
        controller_id=node.settings.node_id if well else -1,
        brokers=[_broker(node)] if well else [],
        cluster_authorized_operations=(
            CLUSTER_OPERATIONS
            if well and request.include_cluster_authorized_operations
            else NOT_ASKED
        ),
    )
