"""Ten thousand transactional ids and a thousand groups, and a look whether they are all there."""

from __future__ import annotations

import asyncio
from typing import Any

from kio.schema.errors import ErrorCode

from ledgerstream.client.connection import Connection
from ledgerstream.limits import LIMITS
from ledgerstream.wire import messages
from ledgerstream.wire.versions import Api

IDS, GROUPS = 10_000, 1_000
UNDER_WAY = 20
AGAIN = frozenset({
    ErrorCode.coordinator_load_in_progress, ErrorCode.coordinator_not_available,
    ErrorCode.not_coordinator,
})  # fmt: skip
AGAIN_SECONDS = 0.005


async def fill(address: str, topic: str) -> None:
    """Each id is taken once, each group has one offset."""
    connection = await _open(address)
    for kind, key in ((1, "id-0"), (0, "group-0")):
        while True:
            reply = await _ask(connection, Api.FIND_COORDINATOR, 4, key_type=kind,
                               coordinator_keys=[key])  # fmt: skip
            if reply.coordinators[0].error_code is ErrorCode.none:
                break
            await asyncio.sleep(AGAIN_SECONDS)
    ids, groups = iter(range(IDS)), iter(range(GROUPS))

    async def take() -> None:
        own = await _open(address)
        for number in ids:
            await _until_taken(own, Api.INIT_PRODUCER_ID, 4, transactional_id=f"id-{number}",
                               transaction_timeout=60_000, producer_id=-1,
                               producer_epoch=-1)  # fmt: skip
        for number in groups:
            await _until_taken(own, Api.OFFSET_COMMIT, 8, group_id=f"group-{number}",
                generation_id_or_member_epoch=-1, member_id="", group_instance_id=None,
                topics=[{"name": topic, "partitions": [
                    {"partition_index": 0, "committed_offset": 0, "committed_leader_epoch": -1,
                     "committed_metadata": ""},
                ]}])  # fmt: skip
        own.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(UNDER_WAY):
            tasks.create_task(take())
    connection.close()
    await wait_listed(address)


async def wait_listed(address: str) -> None:
    """Until every coordinator has loaded and tells of all of them."""
    connection = await _open(address)
    while True:
        ids = await _ask(connection, Api.LIST_TRANSACTIONS, 0, state_filters=[],
                         producer_id_filters=[])  # fmt: skip
        groups = await _ask(connection, Api.LIST_GROUPS, 4, states_filter=[])
        if not ids.error_code and not groups.error_code:
            break
        await asyncio.sleep(AGAIN_SECONDS)
    assert (len(ids.transaction_states), len(groups.groups)) == (IDS, GROUPS)
    connection.close()


async def _until_taken(connection: Connection, api: Api, version: int, **fields: Any) -> None:
    while True:
        reply = await _ask(connection, api, version, **fields)
        error = reply.error_code if api is Api.INIT_PRODUCER_ID else (
            reply.topics[0].partitions[0].error_code
        )  # fmt: skip
        if error is ErrorCode.none:
            return
        assert error in AGAIN, error
        await asyncio.sleep(AGAIN_SECONDS)


async def _open(address: str) -> Connection:
    host, port = address.split(":")
    return await Connection.open(host, int(port), "bench", LIMITS)


async def _ask(connection: Connection, api: Api, version: int, **fields: Any) -> Any:
    correlation_id = connection.take_id()
    frame = messages.write_request(api, version, correlation_id, "bench", fields)
    reply = await connection.exchange(correlation_id, [frame])
    return messages.read_response(api, version, reply)
