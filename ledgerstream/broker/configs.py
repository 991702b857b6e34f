"""DescribeConfigs and IncrementalAlterConfigs: settings of topics and of groups, and the broker's
to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kio.schema.errors import ErrorCode

from ledgerstream import groupconfig
from ledgerstream.broker.server import Exchange
from ledgerstream.broker.settings import Settings
from ledgerstream.topicconfig import SETTINGS, TYPE_NUMBERS, Setting

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

TOPIC, BROKER, GROUP = 2, 4, 32
# ConfigSource
TOPIC_CONFIG, STATIC_BROKER_CONFIG, DEFAULT_CONFIG, GROUP_CONFIG = 1, 4, 5, 8


def topic_entries(
    config: Mapping[str, str], only: set[str] | None = None, *, explained: bool = False
) -> list[dict[str, Any]]:
    """Every setting of a topic with where its value comes from."""
    return _entries(SETTINGS, config, TOPIC_CONFIG, only, explained)


def _entries(
    settings: Mapping[str, Setting],
    config: Mapping[str, str],
    source: int,
    only: set[str] | None,
    explained: bool,
) -> list[dict[str, Any]]:
    return [
        _entry(
            name,
            config.get(name, setting.default),
            source if name in config else DEFAULT_CONFIG,
            TYPE_NUMBERS[setting.type],
            setting.text if explained else None,
        )
        for name, setting in settings.items()
        if only is None or name in only
    ]


def _entry(
    name: str, value: str, source: int, kind: int, text: str | None, *, read_only: bool = False
) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "read_only": read_only,
        "config_source": source,
        "is_sensitive": False,
        "synonyms": [],
        "config_type": kind,
        "documentation": text,
    }


def describe(node: Node, exchange: Exchange) -> None:
    request = exchange.message
    explained = getattr(request, "include_documentation", False)
    results = []
    for resource in dict.fromkeys(request.resources):
        keys = resource.configuration_keys
        only = None if keys is None else set(keys)
        entries: list[dict[str, Any]] = []
        error, message = ErrorCode.none, None
        if resource.resource_type == TOPIC:
            topic = node.catalog.topics.get(resource.resource_name)
            if topic is None:
                error = ErrorCode.unknown_topic_or_partition
                message = "This server does not host this topic-partition."
            else:
                entries = topic_entries(topic.config, only, explained=explained)
        elif resource.resource_type == GROUP:
            if resource.resource_name:
                config = node.catalog.group_configs.get(resource.resource_name, {})
                entries = _entries(groupconfig.SETTINGS, config, GROUP_CONFIG, only, explained)
            else:
                error, message = ErrorCode.invalid_request, "Group name must not be empty"
        elif resource.resource_type == BROKER:
            if resource.resource_name not in ("", str(node.settings.node_id)):
                error = ErrorCode.invalid_request
                message = f"Unexpected broker id, expected {node.settings.node_id} or empty string"
            elif resource.resource_name:
                entries = _broker_entries(node.settings, only, explained)
        else:
            error = ErrorCode.invalid_request
            message = f"Unsupported resource type: {resource.resource_type}"
        results.append({
            "error_code": error,
            "error_message": message,
            "resource_type": resource.resource_type,
            "resource_name": resource.resource_name,
            "configs": entries,
        })  # fmt: skip
    exchange.answer(throttle_time=0, results=results)


def _broker_entries(
    settings: Settings, only: set[str] | None, explained: bool
) -> list[dict[str, Any]]:
    """The broker's settings under Kafka's names where tools look for them, then our own."""
    kafka = {
        "broker.id": settings.node_id,
        "node.id": settings.node_id,
        "auto.create.topics.enable": str(settings.auto_create_topics).lower(),
        "num.partitions": settings.default_partitions,
        "default.replication.factor": 1,
        "min.insync.replicas": 1,
        "log.dirs": settings.data_dir.absolute(),
        "listeners": f"PLAINTEXT://{settings.host}:{settings.port}",
    }
    entries = [
        _entry(name, str(value), STATIC_BROKER_CONFIG, TYPE_NUMBERS["string"], None, read_only=True)
        for name, value in kafka.items()
    ]
    for name, field in Settings.model_fields.items():
        entries.append(
            _entry(
                f"ledgerstream.{name.replace('_', '.')}",
                str(getattr(settings, name)),
                STATIC_BROKER_CONFIG,
                TYPE_NUMBERS["string"],
                field.description if explained else None,
                read_only=True,
            )
        )
    return [entry for entry in entries if only is None or entry["name"] in only]


async def alter(node: Node, exchange: Exchange) -> None:
    request = exchange.message
    results = []
    for resource in request.resources:
        error, message = ErrorCode.none, None
        if resource.resource_type not in (TOPIC, GROUP):
            error = ErrorCode.invalid_request
            message = "Only settings of topics and groups can be changed while the broker runs."
        else:
            changes = [(c.name, c.config_operation, c.value) for c in resource.configs]
            catalog, is_group = node.catalog, resource.resource_type == GROUP
            decide = catalog.decide_alter_group_config if is_group else catalog.decide_alter_config
            decision = decide(resource.resource_name, changes)
            answer = decision.reply
            if not request.validate_only:
                answer = await node.perform(decision)
            error, message = answer.error, answer.message
        results.append({
            "error_code": error,
            "error_message": message,
            "resource_type": resource.resource_type,
            "resource_name": resource.resource_name,
        })  # fmt: skip
    exchange.answer(throttle_time=0, responses=results)
