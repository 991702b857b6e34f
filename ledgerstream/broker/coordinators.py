"""FindCoordinator: which broker decides for a transactional id or a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kio.schema.errors import ErrorCode

from ledgerstream.broker.server import Exchange

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

GROUP, TRANSACTION, SHARE = range(3)
TOPICS = {GROUP: "__consumer_offsets", TRANSACTION: "__transaction_state"}
BATCHED = 4  # the first version that asks for several keys


async def find(node: Node, exchange: Exchange) -> None:
    request, version = exchange.message, exchange.header.version
    kind = getattr(request, "key_type", GROUP)
    keys = request.coordinator_keys if version >= BATCHED else (request.key,)
    found = [{"key": key, **await _find(node, kind, key)} for key in dict.fromkeys(keys)]
    if version >= BATCHED:
        exchange.answer(throttle_time=0, coordinators=found)
    else:
        exchange.answer(throttle_time=0, **found[0])


async def _find(node: Node, kind: int, key: str) -> dict[str, Any]:
    if kind not in TOPICS:  # share groups are not served here
        return _refused(ErrorCode.invalid_request, f"Unknown coordinator type {kind}.")
    shards = node.coordinators[TOPICS[kind]]
    await shards.create()
    if shards.of(shards.partition_of(key)) is None:
        return _refused(ErrorCode.coordinator_not_available, "Its topic cannot be created now.")
    host, port = node.advertised
    return {
        "error_code": ErrorCode.none,
        "error_message": None,
        "node_id": node.settings.node_id,
        "host": host,
        "port": port,
    }


def _refused(error: ErrorCode, message: str) -> dict[str, Any]:
    return {
        "error_code": error, "error_message": message, "node_id": -1, "host": "", "port": -1,
    }  # fmt: skip
