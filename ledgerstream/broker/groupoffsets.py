"""OffsetCommit, TxnOffsetCommit, OffsetFetch, OffsetDelete: how far groups have come."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from kio.schema.errors import ErrorCode

from ledgerstream.broker.grouphost import TOPIC, GroupShard, as_group_error
from ledgerstream.broker.server import Exchange
from ledgerstream.broker.shards import Unavailable, Writing
from ledgerstream.groups import Committing, Found, Wish
from ledgerstream.groups.records import fits
from ledgerstream.log import Guard
from ledgerstream.machine import Decision
from ledgerstream.wire.messages import ms

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

IDS_SINCE = 10  # of OffsetCommit and OffsetFetch: topics by id
SEVERAL_SINCE = 8  # of OffsetFetch: a list of groups
ERROR_SINCE = 2  # of OffsetFetch: an error for the group as a whole
IMPLICIT_SINCE = 5  # of TxnOffsetCommit: the group's partition is added to the transaction
ABORTABLE_SINCE = 4  # the first that knows TRANSACTION_ABORTABLE (KIP-890)
LOADING_SINCE = 2  # the first that can hear COORDINATOR_LOAD_IN_PROGRESS (KAFKA-7296)
_ASK_AGAIN = frozenset({
    ErrorCode.concurrent_transactions, ErrorCode.coordinator_load_in_progress,
    ErrorCode.coordinator_not_available, ErrorCode.not_coordinator,
})  # fmt: skip


class Asked(NamedTuple):
    """A topic of a request: its name, if it is known here, and the partitions that it has."""

    topic: Any
    name: str | None
    error: ErrorCode  # for partitions that are not there
    partitions: int


def _known(node: Node, topics: Iterable[Any], by_id: bool) -> list[Asked]:
    found = []
    for topic in topics:
        wanted: UUID | None = topic.topic_id if by_id else None
        if by_id:
            here = node.catalog.by_id.get(wanted) if wanted is not None else None
        else:
            here = node.catalog.topics.get(topic.name)
        unknown = ErrorCode.unknown_topic_or_partition
        if here is None:
            missing = ErrorCode.unknown_topic_id if by_id else unknown
            found.append(Asked(topic, None, missing, 0))
        else:
            found.append(Asked(topic, here.name, unknown, here.partitions))
    return found


# -- commit


class Commit:
    """The offsets of a request, those that are judged by the group, and the reply."""

    def __init__(self, node: Node, exchange: Exchange, by_id: bool) -> None:
        self.exchange, self.by_id = exchange, by_id
        self.group: str = exchange.message.group_id
        self.asked = _known(node, exchange.message.topics, by_id)
        self.wishes: list[Wish] = []
        self.errors: list[list[ErrorCode]] = []  # by topic and partition
        for topic, name, error, partitions in self.asked:
            errors = []
            for part in topic.partitions:
                well = name is not None and 0 <= part.partition_index < partitions
                errors.append(ErrorCode.none if well else error)
                if well and name is not None:
                    self.wishes.append(_wish(name, part, topic.topic_id if by_id else None))
            self.errors.append(errors)

    def answer(self, found: tuple[ErrorCode, ...] | ErrorCode) -> None:
        """`found`: an error for each wish, or one for all."""
        if isinstance(found, ErrorCode):
            found = (found,) * len(self.wishes)
        judged = iter(found)
        topics = []
        for (topic, *_), errors in zip(self.asked, self.errors, strict=True):
            parts = [
                (part.partition_index, next(judged) if error is ErrorCode.none else error)
                for part, error in zip(topic.partitions, errors, strict=True)
            ]
            name = {"topic_id": topic.topic_id} if self.by_id else {"name": topic.name}
            listed = [{"partition_index": index, "error_code": code} for index, code in parts]
            topics.append({**name, "partitions": _missing_first(listed, errors)})
        self.exchange.answer(throttle_time=0, topics=topics)


def _missing_first(listed: list[Any], errors: list[ErrorCode]) -> list[Any]:
    """In Kafka's order: what is not there, then what the group has judged."""
    order = sorted(range(len(listed)), key=lambda at: errors[at] is ErrorCode.none)
    return [listed[at] for at in order]


def _wish(topic: str, part: Any, topic_id: UUID | None) -> Wish:
    return Wish(
        topic, part.partition_index, part.committed_offset,
        getattr(part, "committed_leader_epoch", -1), part.committed_metadata, topic_id,
    )  # fmt: skip


def commit(node: Node, exchange: Exchange) -> Awaitable[None] | None:
    request, version = exchange.message, exchange.header.version
    wanted = Commit(node, exchange, version >= IDS_SINCE)
    if not wanted.wishes:
        wanted.answer(())
        return None
    if not fits(request.group_id):
        wanted.answer(ErrorCode.invalid_group_id)
        return None
    who = Committing(
        request.member_id, getattr(request, "group_instance_id", None),
        request.generation_id_or_member_epoch,
    )  # fmt: skip
    retention = getattr(request, "retention_time", None)
    retention_ms = -1 if retention is None else ms(retention)

    def act(shard: GroupShard) -> None:
        decision = shard.machine.decide_commit(
            request.group_id, who, wanted.wishes, node.groups.at_ms, node.now_ms(),
            version=version, retention_ms=retention_ms,
        )  # fmt: skip

        def done(error: ErrorCode) -> None:
            wanted.answer(decision.reply if error is ErrorCode.none else error)

        node.groups.perform(shard, decision, done)

    return node.groups.with_shard(request.group_id, act, wanted.answer, create=True)


async def commit_in_transaction(node: Node, exchange: Exchange) -> None:
    """Offsets that are staged until the transaction's marker (KIP-98, 447, 890)."""
    request, version = exchange.message, exchange.header.version
    wanted = Commit(node, exchange, False)
    if not request.group_id or not fits(request.group_id):
        wanted.answer(ErrorCode.invalid_group_id)
        return
    if not wanted.wishes:
        wanted.answer(())
        return
    async with node.transactions.turn(request.transactional_id):
        found = await _stage(node, request, version, wanted.wishes)
    if found is ErrorCode.coordinator_load_in_progress and version < LOADING_SINCE:
        found = ErrorCode.coordinator_not_available
    wanted.answer(found)


async def _stage(
    node: Node, request: Any, version: int, wishes: list[Wish]
) -> tuple[ErrorCode, ...] | ErrorCode:
    shard = await node.groups.shards.find(request.group_id)
    if isinstance(shard, ErrorCode):
        return shard
    guard: Guard | None = None
    producer_id, producer_epoch = request.producer_id, request.producer_epoch
    implicit = version >= IMPLICIT_SINCE

    def asking() -> None:
        nonlocal guard
        if shard.ready:
            guard = shard.begin_verification(producer_id, producer_epoch)
            if guard is not None:
                guard.new_epoch = implicit

    asking()
    if guard is not None:
        where = (TOPIC, shard.index)
        answers = await node.transactions.admit(
            request.transactional_id, producer_id, producer_epoch, [where], implicit=implicit,
            asking=asking,
        )  # fmt: skip
        error = _admitted(answers[where], version)
        if error is not ErrorCode.none:
            return error
        if not shard.ready:
            return shard.error
    who = Committing(
        getattr(request, "member_id", ""), getattr(request, "group_instance_id", None),
        getattr(request, "generation_id", -1),
    )  # fmt: skip
    decision = shard.machine.decide_commit(
        request.group_id, who, wishes, node.groups.at_ms, node.now_ms(), in_transaction=True
    )
    try:
        return await shard.perform(decision, Writing(producer_id, producer_epoch, guard))
    except Unavailable as failed:
        return _refused(failed.code, version)


def _admitted(error: ErrorCode, version: int) -> ErrorCode:
    """The transaction's coordinator, in words on which a client of this version acts rightly."""
    if error is ErrorCode.producer_fenced:
        return ErrorCode.invalid_producer_epoch
    if error is ErrorCode.concurrent_transactions and version >= IMPLICIT_SINCE:
        return error
    if error in _ASK_AGAIN:
        return ErrorCode.coordinator_load_in_progress
    return _refused(error, version)


def _refused(error: ErrorCode, version: int) -> ErrorCode:
    if error is ErrorCode.transaction_abortable and version < ABORTABLE_SINCE:
        return ErrorCode.invalid_txn_state
    return as_group_error(error)


# -- fetch


async def fetch(node: Node, exchange: Exchange) -> None:
    request, version = exchange.message, exchange.header.version
    stable = getattr(request, "require_stable", False)
    if version >= SEVERAL_SINCE:
        by_id = version >= IDS_SINCE
        each = {(group.group_id, group.topics): group for group in request.groups}
        groups = [await _fetch(node, group, stable, by_id) for group in each.values()]
        exchange.answer(throttle_time=0, groups=groups)
        return
    found = await _fetch(node, request, stable, False)
    if version < ERROR_SINCE and found["error_code"] is not ErrorCode.none:
        missing = Found("", 0, error=found["error_code"])
        found["topics"] = [
            _listed({"name": topic.name}, [missing._replace(partition=index)])
            for topic in request.topics
            for index in topic.partition_indexes
        ]
    exchange.answer(throttle_time=0, topics=found["topics"], error_code=found["error_code"])


async def _fetch(node: Node, wanted: Any, stable: bool, by_id: bool) -> dict[str, Any]:
    """One group's answer, once what it shows is durable."""
    group: dict[str, Any] = {"group_id": wanted.group_id, "topics": []}
    shard = await node.groups.shards.find(wanted.group_id)
    if isinstance(shard, ErrorCode):
        return {**group, "error_code": shard}
    asked = None if wanted.topics is None else _known(node, _merged(wanted.topics, by_id), by_id)
    places = None
    if asked is not None:
        places = [
            (name, index)
            for topic, name, _, _ in ((a.topic, _name(a, by_id), a.error, 0) for a in asked)
            if name is not None
            for index in topic.partition_indexes
        ]
    found = shard.machine.fetch(
        wanted.group_id, places, stable=stable, member_id=getattr(wanted, "member_id", None),
        member_epoch=getattr(wanted, "member_epoch", -1),
    )  # fmt: skip
    try:
        found = await shard.perform(Decision((), found))
    except Unavailable as failed:
        return {**group, "error_code": failed.code}
    if isinstance(found, ErrorCode):
        return {**group, "error_code": found}
    topics = _all_topics(node, found, by_id) if asked is None else _topics(asked, found, by_id)
    return {**group, "error_code": ErrorCode.none, "topics": topics}


class Indexes(NamedTuple):
    """Partitions of a topic of an OffsetFetch, each once."""

    name: str | None
    topic_id: UUID | None
    partition_indexes: list[int]


def _merged(topics: Iterable[Any], by_id: bool) -> list[Indexes]:
    found: dict[tuple[str | None, UUID | None], dict[int, None]] = {}
    for topic in topics:
        key = (None, topic.topic_id) if by_id else (topic.name, None)
        found.setdefault(key, {}).update(dict.fromkeys(topic.partition_indexes))
    return [Indexes(*key, list(indexes)) for key, indexes in found.items()]


def _name(asked: Asked, by_id: bool) -> str | None:
    """By name also of a topic that is not there: it has no offsets, which is no error."""
    return asked.name if by_id else asked.topic.name


def _topics(asked: list[Asked], found: list[Found], by_id: bool) -> list[dict[str, Any]]:
    each, topics = iter(found), []
    for one in asked:
        topic = one.topic
        if _name(one, by_id) is None:
            parts = [Found("", index, error=one.error) for index in topic.partition_indexes]
        else:
            parts = [next(each) for _ in topic.partition_indexes]
        topics.append(
            _listed({"topic_id": topic.topic_id} if by_id else {"name": topic.name}, parts)
        )
    return topics


def _all_topics(node: Node, found: list[Found], by_id: bool) -> list[dict[str, Any]]:
    topics: dict[str, list[Found]] = {}
    for one in found:
        topics.setdefault(one.topic, []).append(one)
    if not by_id:
        return [_listed({"name": name}, parts) for name, parts in topics.items()]
    known = node.catalog.topics
    return [
        _listed({"topic_id": known[name].topic_id}, parts)
        for name, parts in topics.items()
        if name in known
    ]


def _listed(name: dict[str, Any], parts: list[Found]) -> dict[str, Any]:
    return {
        **name,
        "partitions": [
            {
                "partition_index": part.partition,
                "committed_offset": part.offset,
                "committed_leader_epoch": part.leader_epoch,
                "metadata": part.metadata,
                "error_code": part.error,
            }
            for part in parts
        ],
    }


# -- delete


def delete(node: Node, exchange: Exchange) -> Awaitable[None] | None:
    request = exchange.message
    asked = _known(node, request.topics, False)
    places = [
        (name, part.partition_index)
        for topic, name, _, partitions in asked
        for part in topic.partitions
        if name is not None and 0 <= part.partition_index < partitions
    ]

    def refuse(error: ErrorCode) -> None:
        exchange.answer(throttle_time=0, error_code=error, topics=[])

    if not request.group_id:
        refuse(ErrorCode.invalid_group_id)
        return None

    def act(shard: GroupShard) -> None:
        decision = shard.machine.decide_forget_offsets(request.group_id, places)
        reply = decision.reply

        def done(error: ErrorCode) -> None:
            if error is not ErrorCode.none or isinstance(reply, ErrorCode):
                refuse(reply if isinstance(reply, ErrorCode) else error)
                return
            errors = dict(zip(places, reply, strict=True))
            topics = [_deleted(topic, errors) for topic, *_ in asked]
            exchange.answer(throttle_time=0, error_code=ErrorCode.none, topics=topics)

        node.groups.perform(shard, decision, done)

    return node.groups.with_shard(request.group_id, act, refuse)


def _deleted(topic: Any, errors: dict[tuple[str, int], ErrorCode]) -> dict[str, Any]:
    missing = ErrorCode.unknown_topic_or_partition
    found = [
        (part.partition_index, errors.get((topic.name, part.partition_index), missing))
        for part in topic.partitions
    ]
    listed = [{"partition_index": index, "error_code": code} for index, code in found]
    there = [ErrorCode.none if code is not missing else code for _, code in found]
    return {"name": topic.name, "partitions": _missing_first(listed, there)}
