"""ListGroups, DescribeGroups, DeleteGroups: what operators see of groups, and their end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kio.schema.errors import ErrorCode

from ledgerstream.broker.grouphost import as_group_error
from ledgerstream.broker.server import Exchange
from ledgerstream.broker.shards import Unavailable
from ledgerstream.groups import ClassicGroup, Phase
from ledgerstream.machine import Decision

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

# bit set of AclOperation, as Kafka answers where nothing is forbidden
GROUP_OPERATIONS = sum(1 << bit for bit in (3, 6, 8, 10, 11))
NOT_ASKED = -(2**31)
NOT_FOUND_SINCE = 6  # of DescribeGroups: a group that is not there is an error (KIP-1043)


async def list_all(node: Node, exchange: Exchange) -> None:
    request = exchange.message
    states = {state.lower() for state in getattr(request, "states_filter", ())}
    kinds = {kind.lower() for kind in getattr(request, "types_filter", ())}
    listed = []
    for shard in node.groups.shards:
        if not shard.ready and not await shard.wait_ready():
            error = ErrorCode.coordinator_load_in_progress
            exchange.answer(throttle_time=0, error_code=error, groups=[])
            return
        for group in shard.machine.groups.values():
            state = group.state
            if (states and state.lower() not in states) or (kinds and group.kind not in kinds):
                continue
            listed.append({
                "group_id": group.name,
                "protocol_type": group.protocol_type or "",
                "group_state": state,
                "group_type": group.kind,
            })  # fmt: skip
    exchange.answer(throttle_time=0, error_code=ErrorCode.none, groups=listed)


async def describe(node: Node, exchange: Exchange) -> None:
    request, version = exchange.message, exchange.header.version
    asked = getattr(request, "include_authorized_operations", False)
    found = [await _describe(node, name, version) for name in dict.fromkeys(request.groups)]
    for group in found:
        well = group["error_code"] is ErrorCode.none
        group["authorized_operations"] = GROUP_OPERATIONS if asked and well else NOT_ASKED
    exchange.answer(throttle_time=0, groups=found)


async def _describe(node: Node, name: str, version: int) -> dict[str, Any]:
    shard = await node.groups.shards.find(name, create=False)
    if isinstance(shard, ErrorCode):
        return {**_absent(name), "group_state": "", "error_code": shard}
    group = shard.machine.groups.get(name)
    found = _described(group) if isinstance(group, ClassicGroup) else _absent(name)
    if not isinstance(group, ClassicGroup) and version >= NOT_FOUND_SINCE:
        kind = "not found" if group is None else "not a classic group"
        found["error_code"] = ErrorCode.group_id_not_found
        found["error_message"] = f"Group {name} is {kind}."
    try:
        return await shard.perform(Decision((), found))
    except Unavailable as failed:
        return {**_absent(name), "group_state": "", "error_code": failed.code}


def _absent(name: str) -> dict[str, Any]:
    return {
        "error_code": ErrorCode.none, "error_message": None, "group_id": name,
        "group_state": str(Phase.DEAD), "protocol_type": "", "protocol_data": "", "members": [],
    }  # fmt: skip


def _described(group: ClassicGroup) -> dict[str, Any]:
    stable = group.phase is Phase.STABLE
    protocol = (group.protocol or "") if stable else ""
    return {
        **_absent(group.name),
        "group_state": group.state,
        "protocol_type": group.protocol_type or "",
        "protocol_data": protocol,
        "members": [
            {
                "member_id": member.member_id,
                "group_instance_id": member.instance_id,
                "client_id": member.client_id,
                "client_host": member.client_host,
                "member_metadata": member.metadata(protocol) if stable else b"",
                "member_assignment": member.assignment,
            }
            for member in group.members.values()
        ],
    }


async def delete(node: Node, exchange: Exchange) -> None:
    names = dict.fromkeys(exchange.message.groups_names)
    results = [{"group_id": name, "error_code": await _delete(node, name)} for name in names]
    exchange.answer(throttle_time=0, results=results)


async def _delete(node: Node, name: str) -> ErrorCode:
    shard = await node.groups.shards.find(name, create=False)
    if isinstance(shard, ErrorCode):
        return shard
    try:
        return await shard.perform(shard.machine.decide_delete(name))
    except Unavailable as failed:
        return as_group_error(failed.code)
