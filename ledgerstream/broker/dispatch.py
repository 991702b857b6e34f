"""A frame to its conversation: header, version check, message, handler.

A handler is called with the node and an exchange, and answers it now or later. What is not spoken
here, or is malformed, closes its connection with one logged line. This is the supervisor in which
`except Exception` stands: a handler that fails costs its connection, not the broker.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog

from ledgerstream.broker import (
    admin,
    apiversions,
    configs,
    consumergroups,
    coordinators,
    fetch,
    groupadmin,
    groupoffsets,
    groups,
    markers,
    metadata,
    offsets,
    produce,
    txns,
)
from ledgerstream.broker.server import Connection, Exchange
from ledgerstream.errors import ProtocolError
from ledgerstream.wire import messages
from ledgerstream.wire.hot import read_produce
from ledgerstream.wire.versions import BROKER_VERSIONS, PRODUCE_VERSION_MIN, Api

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

log = structlog.get_logger("broker")

Handler = Callable[["Node", Exchange], Awaitable[None] | None]

HANDLERS: dict[Api, Handler] = {
    Api.PRODUCE: produce.handle,
    Api.FETCH: fetch.handle,
    Api.LIST_OFFSETS: offsets.list_offsets,
    Api.METADATA: metadata.handle,
    Api.OFFSET_COMMIT: groupoffsets.commit,
    Api.OFFSET_FETCH: groupoffsets.fetch,
    Api.FIND_COORDINATOR: coordinators.find,
    Api.JOIN_GROUP: groups.join,
    Api.HEARTBEAT: groups.heartbeat,
    Api.LEAVE_GROUP: groups.leave,
    Api.SYNC_GROUP: groups.sync,
    Api.DESCRIBE_GROUPS: groupadmin.describe,
    Api.LIST_GROUPS: groupadmin.list_all,
    Api.API_VERSIONS: apiversions.handle,
    Api.CREATE_TOPICS: admin.create_topics,
    Api.DELETE_TOPICS: admin.delete_topics,
    Api.DELETE_RECORDS: admin.delete_records,
    Api.INIT_PRODUCER_ID: txns.init_producer_id,
    Api.OFFSET_FOR_LEADER_EPOCH: offsets.for_leader_epoch,
    Api.ADD_PARTITIONS_TO_TXN: txns.add_partitions,
    Api.ADD_OFFSETS_TO_TXN: txns.add_offsets,
    Api.END_TXN: txns.end,
    Api.WRITE_TXN_MARKERS: markers.write,
    Api.TXN_OFFSET_COMMIT: groupoffsets.commit_in_transaction,
    Api.DESCRIBE_CONFIGS: configs.describe,
    Api.DESCRIBE_LOG_DIRS: admin.describe_log_dirs,
    Api.CREATE_PARTITIONS: admin.create_partitions,
    Api.DELETE_GROUPS: groupadmin.delete,
    Api.INCREMENTAL_ALTER_CONFIGS: configs.alter,
    Api.OFFSET_DELETE: groupoffsets.delete,
    Api.DESCRIBE_CLUSTER: metadata.describe_cluster,
    Api.DESCRIBE_PRODUCERS: markers.describe_producers,
    Api.DESCRIBE_TRANSACTIONS: txns.describe,
    Api.LIST_TRANSACTIONS: txns.list_all,
    Api.CONSUMER_GROUP_HEARTBEAT: consumergroups.heartbeat,
    Api.CONSUMER_GROUP_DESCRIBE: consumergroups.describe,
}
assert HANDLERS.keys() == BROKER_VERSIONS.keys()

_API_OF = {int(api): api for api in Api}


class Dispatch:
    """Finds the conversation of each request."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.requests = dict.fromkeys(HANDLERS, 0)

    def receive(self, connection: Connection, frame: memoryview) -> None:
        """Raises ProtocolError for what closes the connection."""
        key, version, correlation_id = messages.peek_api(frame)
        api = _API_OF.get(key)
        if api is None:
            raise ProtocolError(f"API {key} is not spoken here.")
        low, high = BROKER_VERSIONS[api]
        if not low <= version <= high:
            if api is Api.API_VERSIONS:
                apiversions.answer_unsupported(connection, correlation_id, len(frame))
                return
            raise ProtocolError(f"{api.name} version {version} is not spoken here ({low}–{high}).")
        if api is Api.PRODUCE and version < PRODUCE_VERSION_MIN:
            raise ProtocolError(f"PRODUCE version {version} has no record batches of format 2.")
        flexible = messages.request_type(key, version).__flexible__
        header = messages.read_request_header(frame, flexible)
        if api is Api.PRODUCE:
            message = read_produce(frame, header.body_at, version)
        else:
            message = messages.read_request(header, frame)
        exchange = Exchange(connection, header, message, len(frame))
        connection.push(exchange)
        self.requests[api] += 1
        self._handle(api, exchange)

    def _handle(self, api: Api, exchange: Exchange) -> None:
        try:
            waiting = HANDLERS[api](self.node, exchange)
        except ProtocolError:
            raise
        except Exception:  # noqa: BLE001 - the supervisor: one connection pays, the others go on
            self._failed(exchange)
            return
        if waiting is not None:
            self.node.spawn(self.finish(exchange, waiting))

    async def finish(self, exchange: Exchange, waiting: Awaitable[None]) -> None:
        """The rest of a request that is answered later."""
        try:
            await waiting
        except ProtocolError as error:
            exchange.connection.close(str(error))
        except Exception:  # noqa: BLE001 - the supervisor, for what was answered later
            self._failed(exchange)

    def go_on(self, exchange: Exchange, act: Callable[[], None]) -> None:
        """A step of a request that was put off: to its turn, to a round, to a time."""
        try:
            act()
        except Exception:  # noqa: BLE001 - the supervisor, for what was put off
            self._failed(exchange)

    @staticmethod
    def _failed(exchange: Exchange) -> None:
        name = _API_OF[exchange.header.api_key].name
        log.exception("request failed", api=name, peer=exchange.connection.peer)
        exchange.connection.close(f"{name} failed inside the broker; see the line above")
