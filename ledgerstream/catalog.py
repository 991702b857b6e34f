"""The catalogue: topics, their partitions and settings, those of groups, and the producer ids
handed out.

A pure machine over its own log. `decide_…` answers with records and a reply; `replay` performs
them. Chance (topic ids) comes in as arguments. Records are written as JSON, one a log record,
tagged by kind, so that the catalogue's log can be read with any consumer.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from uuid import UUID

import msgspec
from kio.schema.errors import ErrorCode

from ledgerstream import groupconfig, topicconfig
from ledgerstream.limits import LIMITS
from ledgerstream.machine import Decision

NAME_MAX = 249
# written by the broker alone; clients may read them
RESERVED_TOPICS = frozenset({"__cluster_metadata", "__consumer_offsets", "__transaction_state"})
_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")


class ClusterFormed(msgspec.Struct, tag="cluster-formed", frozen=True):
    cluster_id: str


class TopicCreated(msgspec.Struct, tag="topic-created", frozen=True):
    name: str
    topic_id: UUID
    partitions: int
    config: dict[str, str]


class TopicDeleted(msgspec.Struct, tag="topic-deleted", frozen=True):
    topic_id: UUID


class PartitionsAdded(msgspec.Struct, tag="partitions-added", frozen=True):
    topic_id: UUID
    partitions: int  # how many there are now


class ConfigChanged(msgspec.Struct, tag="config-changed", frozen=True):
    topic_id: UUID
    config: dict[str, str]  # all overrides there are now


class GroupConfigChanged(msgspec.Struct, tag="group-config-changed", frozen=True):
    group: str
    config: dict[str, str]  # all overrides there are now


class ProducerIdsGiven(msgspec.Struct, tag="producer-ids-given", frozen=True):
    next_id: int  # no id below it is ever given again


CatalogRecord = (
    ClusterFormed
    | TopicCreated
    | TopicDeleted
    | PartitionsAdded
    | ConfigChanged
    | GroupConfigChanged
    | ProducerIdsGiven
)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[CatalogRecord] = msgspec.json.Decoder(CatalogRecord)


def encode(record: CatalogRecord) -> bytes:
    return _encoder.encode(record)


def decode(value: bytes) -> CatalogRecord:
    """Raises msgspec.DecodeError for what is no record of the catalogue."""
    return _decoder.decode(value)


@dataclass(slots=True)
class Topic:
    """A topic as it is now. `config` holds the overrides alone."""

    name: str
    topic_id: UUID
    partitions: int
    config: dict[str, str] = field(default_factory=dict)


class Answer(NamedTuple):
    """What a decision tells its caller; `topic` where there is one."""

    error: ErrorCode
    message: str | None = None
    topic: Topic | None = None


Decided = Decision[CatalogRecord, Answer]


def refuse(error: ErrorCode, message: str) -> Decided:
    return Decision((), Answer(error, message))


class Catalog:
    """All topics, by name and by id, and the overrides of groups."""

    def __init__(self) -> None:
        self.topics: dict[str, Topic] = {}
        self.by_id: dict[UUID, Topic] = {}
        self.group_configs: dict[str, dict[str, str]] = {}
        self.cluster_id = ""
        self.next_producer_id = 0
        self.version = 0  # counts replayed records: a cheap "has anything changed?"

    def decide_form(self, chance: UUID) -> Decision[CatalogRecord, str]:
        """A new cluster's id, once and for all."""
        assert not self.cluster_id
        cluster_id = urlsafe_b64encode(chance.bytes).decode().rstrip("=")
        return Decision((ClusterFormed(cluster_id),), cluster_id)

    def decide_create(
        self,
        name: str,
        topic_id: UUID,
        partitions: int,
        replication: int = -1,
        config: Mapping[str, str] | None = None,
        *,
        default_partitions: int = 1,
        internal: bool = False,
    ) -> Decided:
        """`internal`: the broker itself creates one of its own topics."""
        if bad := why_bad_name(name):
            return refuse(ErrorCode.invalid_topic_exception, bad)
        if name in RESERVED_TOPICS and not internal:
            return refuse(
                ErrorCode.invalid_request, f"Creation of internal topic {name} is prohibited."
            )
        if name in self.topics:
            return refuse(ErrorCode.topic_already_exists, f"Topic '{name}' already exists.")
        clash = _clashing(name, self.topics)
        if clash:
            return refuse(
                ErrorCode.invalid_topic_exception,
                f"Topic '{name}' collides with existing topic: {clash}",
            )
        partitions = default_partitions if partitions == -1 else partitions
        if partitions < 1:
            return refuse(
                ErrorCode.invalid_partitions, "Number of partitions must be larger than 0."
            )
        if partitions > LIMITS.topic_partitions_max:
            return refuse(
                ErrorCode.invalid_partitions,
                f"A topic has at most {LIMITS.topic_partitions_max:,} partitions here.",
            )
        if replication not in (-1, 1):
            return refuse(
                ErrorCode.invalid_replication_factor,
                f"Unable to replicate the partition {replication} time(s): there is one broker.",
            )
        given = dict(config or {})
        if bad := topicconfig.why_bad(given):
            return refuse(ErrorCode.invalid_config, bad)
        record = TopicCreated(name, topic_id, partitions, given)
        return Decision((record,), Answer(ErrorCode.none, None, _topic(record)))

    def decide_delete(self, topic: Topic | None) -> Decided:
        if topic is None:
            return refuse(
                ErrorCode.unknown_topic_or_partition,
                "This server does not host this topic-partition.",
            )
        if topic.name in RESERVED_TOPICS:
            return refuse(ErrorCode.invalid_request, f"Topic {topic.name} is the broker's own.")
        return Decision((TopicDeleted(topic.topic_id),), Answer(ErrorCode.none, None, topic))

    def decide_add_partitions(self, name: str, partitions: int) -> Decided:
        topic = self.topics.get(name)
        if topic is None:
            return refuse(
                ErrorCode.unknown_topic_or_partition, f"The topic '{name}' does not exist."
            )
        if name in RESERVED_TOPICS:  # keys would move to other partitions
            return refuse(ErrorCode.invalid_request, f"Topic {name} is the broker's own.")
        if partitions <= topic.partitions:
            return refuse(
                ErrorCode.invalid_partitions,
                f"The topic {name} currently has {topic.partitions} partition(s); "
                f"{partitions} would not be an increase.",
            )
        if partitions > LIMITS.topic_partitions_max:
            return refuse(
                ErrorCode.invalid_partitions,
                f"A topic has at most {LIMITS.topic_partitions_max:,} partitions here.",
            )
        record = PartitionsAdded(topic.topic_id, partitions)
        return Decision((record,), Answer(ErrorCode.none, None, topic))

    def decide_alter_config(self, name: str, changes: list[tuple[str, int, str | None]]) -> Decided:
        """`changes`: (setting, operation, value), the operations of `topicconfig.change`."""
        topic = self.topics.get(name)
        if topic is None:
            return refuse(
                ErrorCode.unknown_topic_or_partition, f"The topic '{name}' does not exist."
            )
        names = [setting for setting, _, _ in changes]
        if len(set(names)) != len(names):
            return refuse(ErrorCode.invalid_request, "Error due to duplicate config keys")
        config = dict(topic.config)
        for setting, operation, value in changes:
            if bad := topicconfig.change(config, setting, operation, value):
                return refuse(ErrorCode.invalid_config, bad)
        if bad := topicconfig.why_bad(config):
            return refuse(ErrorCode.invalid_config, bad)
        record = ConfigChanged(topic.topic_id, config)
        return Decision((record,), Answer(ErrorCode.none, None, topic))

    def decide_alter_group_config(
        self, group: str, changes: list[tuple[str, int, str | None]]
    ) -> Decided:
        """As `decide_alter_config`; a group may be set before it is there."""
        if not group:
            return refuse(ErrorCode.invalid_request, "Default group resources are not allowed.")
        names = [setting for setting, _, _ in changes]
        if len(set(names)) != len(names):
            return refuse(ErrorCode.invalid_request, "Error due to duplicate config keys")
        before = self.group_configs.get(group, {})
        config = dict(before)
        for setting, operation, value in changes:
            if operation != 1 and value is None:
                return refuse(
                    ErrorCode.invalid_request, f"Null value not supported for : {setting}"
                )
            if bad := groupconfig.change(config, setting, operation, value or ""):
                return refuse(ErrorCode.invalid_config, bad)
        if bad := groupconfig.why_bad(config):
            return refuse(ErrorCode.invalid_config, bad)
        records = () if config == before else (GroupConfigChanged(group, config),)
        return Decision(records, Answer(ErrorCode.none))

    def decide_give_producer_ids(self, count: int) -> Decision[CatalogRecord, range]:
        """A block of ids that were never given and never will be again."""
        first = self.next_producer_id
        return Decision((ProducerIdsGiven(first + count),), range(first, first + count))

    def replay(self, record: CatalogRecord) -> None:
        """The only method that changes state, live and after a restart alike."""
        self.version += 1
        match record:
            case ClusterFormed():
                assert not self.cluster_id, record
                self.cluster_id = record.cluster_id
            case TopicCreated():
                assert record.name not in self.topics, record
                topic = _topic(record)
                self.topics[topic.name] = self.by_id[topic.topic_id] = topic
            case TopicDeleted():
                del self.topics[self.by_id.pop(record.topic_id).name]
            case PartitionsAdded():
                assert record.partitions > self.by_id[record.topic_id].partitions, record
                self.by_id[record.topic_id].partitions = record.partitions
            case ConfigChanged():
                self.by_id[record.topic_id].config = dict(record.config)
            case GroupConfigChanged():
                self.group_configs.pop(record.group, None)
                if record.config:
                    self.group_configs[record.group] = dict(record.config)
            case ProducerIdsGiven():
                assert record.next_id > self.next_producer_id, record
                self.next_producer_id = record.next_id

    def session_ms(self, group: str) -> int | None:
        """What its members were set to, if they were."""
        return self._group_number(group, groupconfig.SESSION)

    def heartbeat_ms(self, group: str) -> int | None:
        return self._group_number(group, groupconfig.HEARTBEAT)

    def _group_number(self, group: str, name: str) -> int | None:
        value = self.group_configs.get(group, {}).get(name)
        return None if value is None else int(value)

    def become(self, other: Catalog) -> None:
        """Go back to a state that has fewer records behind it."""
        self.version += 1
        self.cluster_id, self.next_producer_id = other.cluster_id, other.next_producer_id
        self.group_configs = {name: dict(found) for name, found in other.group_configs.items()}
        copies = [replace(topic, config=dict(topic.config)) for topic in other.topics.values()]
        self.topics = {topic.name: topic for topic in copies}
        self.by_id = {topic.topic_id: topic for topic in copies}


def _topic(record: TopicCreated) -> Topic:
    return Topic(record.name, record.topic_id, record.partitions, dict(record.config))


def why_bad_name(name: str) -> str | None:
    """Why a topic cannot have this name, in Kafka's words, or None."""
    if not name:
        return "Topic name is invalid: the empty string is not allowed"
    if name in (".", ".."):
        return f"Topic name is invalid: '{name}' is not allowed"
    if len(name) > NAME_MAX:
        return (
            f"Topic name is invalid: the length of '{name}' is longer than the max allowed length "
            f"{NAME_MAX}"
        )
    if not _NAME.fullmatch(name):
        return (
            f"Topic name is invalid: '{name}' contains one or more characters other than ASCII "
            "alphanumerics, '.', '_' and '-'"
        )
    return None


def _clashing(name: str, topics: Mapping[str, Topic]) -> str | None:
    """Names that differ in '.' and '_' alone would clash in metric names, as Kafka has it."""
    if "." not in name and "_" not in name:
        return None
    plain = name.replace(".", "_")
    return next((other for other in topics if other.replace(".", "_") == plain), None)
