"""ConsumerGroupHeartbeat and ConsumerGroupDescribe: next-generation groups (KIP-848).

How often members are to be heard from is told with each answer. Kafka asks for a heartbeat every
five seconds, and a change needs several to go through a group; here a small group is asked more
often, and a member that is on its way to another assignment soon again, as long as all members
together do not become many a second. A group for which it is set (`groupconfig`) is asked as set.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from kio.schema.errors import ErrorCode

from ledgerstream.broker.groupadmin import GROUP_OPERATIONS, NOT_ASKED
from ledgerstream.broker.grouphost import GroupShard, as_group_error
from ledgerstream.broker.groups import short_name
from ledgerstream.broker.patterns import matching
from ledgerstream.broker.server import Exchange
from ledgerstream.broker.shards import Unavailable
from ledgerstream.groups import AWAY_EPOCH, Assignment, Beat, Beaten, ConsumerGroup
from ledgerstream.groups.assignors import ASSIGNORS
from ledgerstream.groups.records import fits
from ledgerstream.limits import Limits
from ledgerstream.machine import Decision
from ledgerstream.wire.messages import ms

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

OWN_ID_SINCE = 1  # the first version whose members name themselves (KIP-1082)
CALM_MS_EACH, HURRY_MS_EACH = 5, 1  # of a member: 200 and 1,000 heartbeats a second a group


async def heartbeat(node: Node, exchange: Exchange) -> None:
    request, name = exchange.message, exchange.message.group_id
    refused = _why_not(request, exchange.header.version)
    if refused is not None:
        _answer(exchange, refused, 0)
        return
    beat = _read(node, exchange)
    create = beat.epoch == 0
    regex, matched = None, None
    while True:
        shard = await node.groups.shards.find(name, create=create)
        if isinstance(shard, ErrorCode):
            _answer(exchange, Beaten(shard), 0)
            return
        wanted = shard.machine.unmatched(name, beat)
        version = node.catalog.version
        if wanted is None or (wanted, version) == regex:
            break
        try:
            matched = await _match(node, wanted)
        except ValueError as error:
            code = ErrorCode.invalid_regular_expression
            _answer(exchange, Beaten(code, f"{wanted!r} is no regular expression: {error}"), 0)
            return
        regex = (wanted, version)
    _beat(node, exchange, shard, beat, matched if wanted is not None else None)


async def _match(node: Node, regex: str) -> frozenset[str]:
    names = list(node.catalog.topics)
    found = await node.loop.run_in_executor(node.readers, partial(matching, regex, names))
    return frozenset(name for name, well in zip(names, found, strict=True) if well)


def _beat(
    node: Node,
    exchange: Exchange,
    shard: GroupShard,
    beat: Beat,
    matched: frozenset[str] | None,
) -> None:
    """No await from here on: what is decided rests on the state as it is now."""
    groups, name = node.groups, exchange.message.group_id
    upgrade = shard.machine.decide_upgrade(name, beat, groups.at_ms, node.now_ms())
    if upgrade.records:
        groups.perform(shard, upgrade, _nothing, upgrade.reply)
        if not shard.ready:
            _answer(exchange, Beaten(ErrorCode.not_coordinator), 0)
            return
    decision = shard.machine.decide_beat(name, beat, node.now_ms(), matched)
    reply = decision.reply

    def done(error: ErrorCode) -> None:  # at once, where there was nothing to write
        if error is not ErrorCode.none:
            _answer(exchange, Beaten(error), 0)
            return
        group = shard.machine.modern(name) if shard.ready else None
        members = 0 if group is None else len(group.members)
        set_ms = node.catalog.heartbeat_ms(name)
        _answer(exchange, reply, _interval_ms(node.limits, members, reply, set_ms))

    groups.perform(shard, decision, done)
    if reply.error is ErrorCode.none and shard.ready:
        shard.machine.beaten(name, beat.member_id, groups.at_ms)
        groups.schedule(shard)


def _interval_ms(limits: Limits, members: int, reply: Beaten, set_ms: int | None) -> int:
    if reply.epoch < 0:
        return 0  # it has left
    if set_ms is not None:
        return set_ms  # an operator knows better
    if reply.hurry:
        return max(limits.consumer_hurry_ms, members * HURRY_MS_EACH)
    calm_ms = max(limits.consumer_heartbeat_ms_min, members * CALM_MS_EACH)
    return min(limits.consumer_heartbeat_ms, calm_ms)


def _why_not(request: Any, version: int) -> Beaten | None:
    """What is asked makes no sense, whatever the state of the group."""
    epoch, names = request.member_epoch, request.subscribed_topic_names
    regex = getattr(request, "subscribed_topic_regex", None)
    texts = [request.group_id, request.member_id, request.instance_id or "", regex or ""]
    message = None
    if not request.group_id.strip():
        message = "A group has a name."
    elif not all(map(fits, texts)):
        message = "A name of more than 32,767 bytes cannot be kept."
    elif not request.member_id.strip() and (version >= OWN_ID_SINCE or epoch != 0):
        message = "A member has an id."
    elif request.instance_id is not None and not request.instance_id.strip():
        message = "An instance id is not empty."
    elif request.rack_id is not None and not request.rack_id.strip():
        message = "A rack id is not empty."
    elif epoch < AWAY_EPOCH:
        message = f"A member's epoch is not {epoch}."
    elif epoch == AWAY_EPOCH and request.instance_id is None:
        message = "Only a member with an instance id leaves for a while."
    elif epoch == 0 and ms(request.rebalance_timeout) == -1:
        message = "Who joins says how long it takes to give partitions up."
    elif epoch == 0 and (request.topic_partitions is None or len(request.topic_partitions)):
        message = "Who joins has no partitions."
    elif epoch == 0 and names is None and regex is None:
        message = "Who joins subscribes to topics, by name or by a regular expression."
    elif request.server_assignor is not None and request.server_assignor not in ASSIGNORS:
        known = ", ".join(ASSIGNORS)
        return Beaten(
            ErrorCode.unsupported_assignor,
            f"There is no assignor {request.server_assignor!r} here, but: {known}.",
        )
    return None if message is None else Beaten(ErrorCode.invalid_request, message)


def _read(node: Node, exchange: Exchange) -> Beat:
    request = exchange.message
    names, owned = request.subscribed_topic_names, request.topic_partitions
    return Beat(
        request.member_id or str(uuid4()),
        request.member_epoch,
        instance_id=request.instance_id,
        rack_id=request.rack_id,
        rebalance_timeout_ms=ms(request.rebalance_timeout),
        topics=None if names is None else frozenset(names),
        regex=getattr(request, "subscribed_topic_regex", None),
        assignor=request.server_assignor,
        owned=None if owned is None else _owned(owned),
        client_id=short_name(node, exchange),
        client_host="/" + exchange.connection.peer.rpartition(":")[0],
    )


def _owned(entries: Any) -> Assignment:
    found: dict[Any, frozenset[int]] = {}
    for each in entries:
        if each.partitions:
            found[each.topic_id] = found.get(each.topic_id, frozenset()) | set(each.partitions)
    return found


def _answer(exchange: Exchange, reply: Beaten, interval_ms: int) -> None:
    well = reply.error is ErrorCode.none
    assignment = reply.assignment
    exchange.answer(
        throttle_time=0,
        error_code=as_group_error(reply.error),
        error_message=reply.message,
        member_id=reply.member_id if well else None,
        member_epoch=reply.epoch if well else 0,
        heartbeat_interval=interval_ms if well else 0,
        assignment=None if assignment is None else {"topic_partitions": _by_topic(assignment)},
    )


def _by_topic(assignment: Assignment) -> list[dict[str, Any]]:
    return [
        {"topic_id": topic, "partitions": sorted(assignment[topic])}
        for topic in sorted(assignment, key=lambda topic: topic.bytes)
    ]


def _nothing(_: ErrorCode) -> None:
    """Nobody waits for this."""


# describe


async def describe(node: Node, exchange: Exchange) -> None:
    request = exchange.message
    found = [await _describe(node, name) for name in dict.fromkeys(request.group_ids)]
    for group in found:
        well = group["error_code"] is ErrorCode.none
        asked = well and request.include_authorized_operations
        group["authorized_operations"] = GROUP_OPERATIONS if asked else NOT_ASKED
    exchange.answer(throttle_time=0, groups=found)


async def _describe(node: Node, name: str) -> dict[str, Any]:
    shard = await node.groups.shards.find(name, create=False)
    if isinstance(shard, ErrorCode):
        return _absent(name, shard, None)
    group = shard.machine.modern(name)
    if group is None:
        kind = "not found" if name not in shard.machine.groups else "not a consumer group"
        found = _absent(name, ErrorCode.group_id_not_found, f"Group {name} is {kind}.")
    else:
        found = _described(node, group)
    try:
        return await shard.perform(Decision((), found))
    except Unavailable as failed:
        return _absent(name, failed.code, None)


def _absent(name: str, error: ErrorCode, message: str | None) -> dict[str, Any]:
    return {
        "error_code": error, "error_message": message, "group_id": name, "group_state": "",
        "group_epoch": 0, "assignment_epoch": 0, "assignor_name": "", "members": [],
    }  # fmt: skip


def _described(node: Node, group: ConsumerGroup) -> dict[str, Any]:
    return {
        **_absent(group.name, ErrorCode.none, None),
        "group_state": group.state,
        "group_epoch": group.epoch,
        "assignment_epoch": group.target_epoch,
        "assignor_name": group.assignor,
        "members": [_member(node, group, member_id) for member_id in group.members],
    }


def _member(node: Node, group: ConsumerGroup, member_id: str) -> dict[str, Any]:
    member, current = group.members[member_id], group.current[member_id]
    return {
        "member_id": member_id,
        "instance_id": member.instance_id,
        "rack_id": member.rack_id,
        "member_epoch": current.epoch,
        "client_id": member.client_id,
        "client_host": member.client_host,
        "subscribed_topic_names": sorted(member.topics),
        "subscribed_topic_regex": member.regex,
        "assignment": {"topic_partitions": _named(node, current.held)},
        "target_assignment": {"topic_partitions": _named(node, group.targets.get(member_id, {}))},
        "member_type": int(member.classic is None),
    }


def _named(node: Node, assignment: Assignment) -> list[dict[str, Any]]:
    known = node.catalog.by_id
    return [
        {**each, "topic_name": known[each["topic_id"]].name}
        for each in _by_topic(assignment)
        if each["topic_id"] in known
    ]
