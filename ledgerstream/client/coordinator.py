"""The broker that decides for a group or a transactional id: found, asked, and looked for again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, TypeVar

from kio.schema.errors import ErrorCode

from ledgerstream.client.cluster import TRANSPORT_ERRORS, Cluster
from ledgerstream.client.connection import Connection, only
from ledgerstream.client.errors import kafka_error
from ledgerstream.wire.versions import Api

T = TypeVar("T")
# it was there, and is somewhere else now
_MOVED = frozenset({
    ErrorCode.not_coordinator, ErrorCode.coordinator_not_available, ErrorCode.network_exception,
})  # fmt: skip


class Kind(IntEnum):
    """As FindCoordinator has them."""

    GROUP = 0
    TRANSACTION = 1


class Coordinator:
    """Of one name. `ask` is to be given to `cluster.retrying`, or called once."""

    def __init__(self, cluster: Cluster, kind: Kind, name: str) -> None:
        self.cluster, self.kind, self.name = cluster, kind, name
        self._broker: int | None = None

    async def broker(self) -> int:
        """Its id, among `cluster.brokers`. Raises a retriable KafkaError while there is none."""
        if self._broker is None:
            found = await self.cluster.call(
                Api.FIND_COORDINATOR,
                {"key_type": self.kind, "coordinator_keys": [self.name]},
                take=lambda reply: only(reply.coordinators, "A coordinator"),
            )
            if found.error_code is not ErrorCode.none:
                raise kafka_error(found.error_code, f"The coordinator of {self.name!r}")
            if found.node_id not in self.cluster.brokers:
                await self.cluster.look()
            self._broker = found.node_id
        return self._broker

    async def connection(self) -> Connection:
        """To the broker that it was last."""
        try:
            return await self.cluster.connection(await self.broker())
        except TRANSPORT_ERRORS:
            self._broker = None
            raise

    async def ask(
        self,
        api: Api,
        fields: Mapping[str, Any],
        error_of: Callable[[Any], ErrorCode],
        *,
        version_max: int | None = None,
        timeout_ms: int | None = None,
        take: Callable[[Any], Any] | None = None,
    ) -> Any:
        """The reply (what `take` gives of it), if `error_of` says none of that; else its
        KafkaError, and another look where to ask.

        Raises ConnectionError, TimeoutError and ProtocolError as `Connection.call` does.
        """
        connection = await self.connection()
        try:
            reply = await connection.call(
                api, fields, timeout_ms, version_max=version_max, take=take
            )
        except TRANSPORT_ERRORS:
            self._broker = None
            raise
        code = error_of(reply)
        if code in _MOVED:
            self._broker = None
        if code is not ErrorCode.none:
            what = f"{api.name.replace('_', ' ').title()} of {self.name!r}"
            raise kafka_error(code, what, getattr(reply, "error_message", None))
        return reply
