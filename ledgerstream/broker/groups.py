"""JoinGroup, SyncGroup, Heartbeat, LeaveGroup: the members of classic groups."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from kio.schema.errors import ErrorCode

from ledgerstream.broker.grouphost import Answer, GroupShard, Parked
from ledgerstream.broker.server import Exchange
from ledgerstream.groups import Join, Joined, Sync, Synced
from ledgerstream.groups.records import TEXT_BYTES_MAX, fits
from ledgerstream.wire.messages import ms

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

KNOWN_ID_SINCE = 4  # of JoinGroup: a member asks again with the id that it is told (KIP-394)
SKIP_SINCE = 9  # the first whose leader can be told that it need not assign (KIP-814)
NULL_PROTOCOL_SINCE = 7  # the first whose reply may have no protocol
NAMED_PROTOCOL_SINCE = 5  # of SyncGroup: protocol type and name must be there
SEVERAL_SINCE = 3  # of LeaveGroup: a list of members
ID_BYTES = 40  # what is added to a client's name to make it a member's
_LONGEST = TEXT_BYTES_MAX - ID_BYTES


# join


def join(node: Node, exchange: Exchange) -> Awaitable[None] | None:
    request, version = exchange.message, exchange.header.version
    error = _why_not_join(node, request)
    if error is not ErrorCode.none:
        _joined(exchange, Joined(error, request.member_id))
        return None
    session_ms = ms(request.session_timeout)
    instance_id = getattr(request, "group_instance_id", None)
    client_id = short_name(node, exchange)
    asked = Join(
        request.member_id,
        f"{client_id if instance_id is None else instance_id}-{uuid4()}",
        instance_id,
        client_id,
        "/" + exchange.connection.peer.rpartition(":")[0],
        session_ms,
        ms(request.rebalance_timeout) if version >= 1 else session_ms,
        request.protocol_type,
        tuple((each.name, each.metadata) for each in request.protocols),
        version >= KNOWN_ID_SINCE,
        version >= SKIP_SINCE,
    )
    ticket = Parked(node, exchange, _joined)

    def act(shard: GroupShard) -> None:
        decision = shard.machine.decide_join(
            request.group_id, asked, ticket, node.groups.at_ms, node.now_ms()
        )
        node.groups.perform(shard, decision, _nothing, decision.reply)
        well = any(told is ticket and not reply.error for told, reply in decision.reply)
        if well and shard.ready:
            name, member_id = request.group_id, asked.member_id or asked.new_id
            shard.machine.joined(name, member_id, asked, node.groups.at_ms)

    return node.groups.with_shard(request.group_id, act, ticket.tell, create=True)


def _why_not_join(node: Node, request: Any) -> ErrorCode:
    limits = node.limits
    if not request.group_id or not fits(request.group_id):
        return ErrorCode.invalid_group_id
    session_ms = ms(request.session_timeout)
    if not limits.group_session_ms_min <= session_ms <= limits.group_session_ms_max:
        return ErrorCode.invalid_session_timeout
    instance_id = getattr(request, "group_instance_id", None)
    texts = [request.protocol_type, *(each.name for each in request.protocols)]
    size = sum(len(each.metadata) for each in request.protocols)
    if (
        not all(map(fits, texts))
        or len((instance_id or "").encode()) > _LONGEST
        or size > limits.group_metadata_bytes_max
    ):
        return ErrorCode.invalid_request
    return ErrorCode.none


def short_name(node: Node, exchange: Exchange) -> str:
    """As much of a client's name as is kept of each member."""
    name = (exchange.header.client_id or "").encode()
    return name[: node.limits.group_client_id_bytes_max].decode(errors="ignore")


def _joined(exchange: Exchange, reply: Answer) -> None:
    if isinstance(reply, ErrorCode):
        reply = Joined(reply)
    assert isinstance(reply, Joined)
    version = exchange.header.version
    exchange.answer(
        throttle_time=0,
        error_code=reply.error,
        generation_id=reply.generation,
        protocol_type=reply.protocol_type,
        protocol_name=reply.protocol
        if reply.protocol is not None or version >= NULL_PROTOCOL_SINCE
        else "",
        leader=reply.leader,
        skip_assignment=reply.skip_assignment,
        member_id=reply.member_id,
        members=[
            {"member_id": member_id, "group_instance_id": instance_id, "metadata": metadata}
            for member_id, instance_id, metadata in reply.members
        ],
    )


# sync


def sync(node: Node, exchange: Exchange) -> Awaitable[None] | None:
    request, version = exchange.message, exchange.header.version
    protocol = getattr(request, "protocol_type", None), getattr(request, "protocol_name", None)
    error = ErrorCode.none
    if version >= NAMED_PROTOCOL_SINCE and None in protocol:
        error = ErrorCode.inconsistent_group_protocol
    elif not request.group_id:
        error = ErrorCode.invalid_group_id
    if error is not ErrorCode.none:
        _synced(exchange, error)
        return None
    asked = Sync(
        request.member_id,
        request.generation_id,
        getattr(request, "group_instance_id", None),
        *protocol,
        tuple((each.member_id, each.assignment) for each in request.assignments),
    )
    ticket = Parked(node, exchange, _synced)

    def act(shard: GroupShard) -> None:
        decision = shard.machine.decide_sync(
            request.group_id, asked, ticket, node.groups.at_ms, node.now_ms()
        )
        node.groups.perform(shard, decision, _nothing, decision.reply)

    return node.groups.with_shard(request.group_id, act, ticket.tell)


def _synced(exchange: Exchange, reply: Answer) -> None:
    if isinstance(reply, ErrorCode):
        reply = Synced(reply)
    assert isinstance(reply, Synced)
    exchange.answer(
        throttle_time=0,
        error_code=reply.error,
        protocol_type=reply.protocol_type,
        protocol_name=reply.protocol,
        assignment=reply.assignment,
    )


# heartbeat


def heartbeat(node: Node, exchange: Exchange) -> Awaitable[None] | None:
    """It writes nothing, and waits for no disk."""
    request = exchange.message
    if not request.group_id:
        _beaten(exchange, ErrorCode.invalid_group_id)
        return None

    def act(shard: GroupShard) -> None:
        error = shard.machine.heartbeat(
            request.group_id, request.member_id, getattr(request, "group_instance_id", None),
            request.generation_id, node.groups.at_ms,
        )  # fmt: skip
        _beaten(exchange, error)

    def refuse(error: ErrorCode) -> None:
        loading = error is ErrorCode.coordinator_load_in_progress
        _beaten(exchange, ErrorCode.none if loading else error)  # its session begins with the load

    return node.groups.with_shard(request.group_id, act, refuse)


def _beaten(exchange: Exchange, error: ErrorCode) -> None:
    exchange.answer(throttle_time=0, error_code=error)


# leave


def leave(node: Node, exchange: Exchange) -> Awaitable[None] | None:
    request, version = exchange.message, exchange.header.version
    if version >= SEVERAL_SINCE:
        leaving = [(each.member_id, each.group_instance_id) for each in request.members]
    else:
        leaving = [(request.member_id, None)]

    def answer(error: ErrorCode, errors: tuple[ErrorCode, ...] = ()) -> None:
        if version < SEVERAL_SINCE and error is ErrorCode.none:
            (error,) = errors
        exchange.answer(
            throttle_time=0,
            error_code=error,
            members=[
                {"member_id": member_id, "group_instance_id": instance_id, "error_code": code}
                for (member_id, instance_id), code in zip(leaving, errors, strict=False)
            ],
        )

    if not request.group_id:
        answer(ErrorCode.invalid_group_id)
        return None

    def act(shard: GroupShard) -> None:
        decision = shard.machine.decide_leave(
            request.group_id, leaving, node.groups.at_ms, node.now_ms()
        )
        errors, told = decision.reply

        def done(error: ErrorCode) -> None:
            answer(error, errors if error is ErrorCode.none else ())

        node.groups.perform(shard, decision, done, told)

    return node.groups.with_shard(request.group_id, act, answer)


def _nothing(_: ErrorCode) -> None:
    """All answers are by ticket."""
