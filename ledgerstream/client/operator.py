"""Transactions as an operator sees them, over all brokers: list, describe, abort, find what hangs.

KIP-664, and `abort` by the id itself, which also ends what was prepared and forgotten (KIP-939).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kio.schema.errors import ErrorCode

from ledgerstream.client.cluster import Cluster
from ledgerstream.client.connection import only
from ledgerstream.client.coordinator import Coordinator, Kind
from ledgerstream.client.errors import check
from ledgerstream.errors import KafkaError
from ledgerstream.wire import messages
from ledgerstream.wire.described import Described, read_described
from ledgerstream.wire.versions import Api

FENCED_TIMEOUT_MS = 60_000  # of the id that `abort` leaves behind; its next producer says its own


class Listed(NamedTuple):
    """A transactional id in a list."""

    txn_id: str
    state: str
    producer_id: int


class Hanging(NamedTuple):
    """A transaction that is open in a partition and in no coordinator's list of open ones."""

    topic: str
    partition: int
    producer_id: int
    producer_epoch: int
    coordinator_epoch: int
    first_offset: int
    last_ms: int  # the time of its last batch


class Transactions:
    """Asks each broker for what it knows."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def all(
        self,
        *,
        states: tuple[str, ...] = (),
        producer_ids: tuple[int, ...] = (),
        open_ms: int = -1,
    ) -> list[Listed]:
        """All transactional ids, filtered by state, producer id, and how long they are open."""
        await self._cluster.look()
        found = []
        for broker in self._cluster.brokers:
            reply = await self._cluster.call(
                Api.LIST_TRANSACTIONS,
                {
                    "state_filters": list(states),
                    "producer_id_filters": list(producer_ids),
                    "duration_filter": open_ms,
                },
                broker=broker,
            )
            check(reply.error_code, "The list of transactions")
            found += [
                Listed(each.transactional_id, each.transaction_state, each.producer_id)
                for each in reply.transaction_states
            ]
        return sorted(found)

    async def describe(self, txn_id: str) -> Described:
        """Raises KafkaError for an id that is not known."""
        connection = await self._cluster.connection(await self._coordinator(txn_id))
        correlation_id = connection.take_id()
        fields = {"transactional_ids": [txn_id]}
        frame = messages.write_request(
            Api.DESCRIBE_TRANSACTIONS, connection.version(Api.DESCRIBE_TRANSACTIONS),
            correlation_id, connection.client_id, fields,
        )  # fmt: skip
        described = read_described(await connection.exchange(correlation_id, [frame]))
        found = only(described, "A transactional id")
        check(ErrorCode[found.error], f"Transactional id {txn_id!r}")
        return found

    async def abort(self, txn_id: str) -> bool:
        """Abort what is open under the id, prepared or not, and fence its producer.

        Whether there was something open. KafkaError for an id that is not known.
        """
        before = await self.describe(txn_id)
        broker = await self._coordinator(txn_id)

        async def fence() -> None:
            reply = await self._cluster.call(
                Api.INIT_PRODUCER_ID,
                {
                    "transactional_id": txn_id,
                    "transaction_timeout": FENCED_TIMEOUT_MS,
                    "producer_id": -1,
                    "producer_epoch": -1,
                    "enable2_pc": False,
                    "keep_prepared_txn": False,
                },
                broker=broker,
            )
            check(reply.error_code, f"Transactional id {txn_id!r}")

        await self._cluster.retrying(f"the end of {txn_id!r}", fence)
        return before.state == "Ongoing"

    async def commit(self, txn_id: str, producer_id: int, producer_epoch: int) -> bool:
        """EndTxn(commit) of a transaction that its identity names (Transactions V2: each has an
        epoch of its own). Whether the coordinator took it; if not, it has ended one way or the
        other, and which is not said."""
        coordinator = Coordinator(self._cluster, Kind.TRANSACTION, txn_id)

        async def ask() -> None:
            await coordinator.ask(
                Api.END_TXN,
                {
                    "transactional_id": txn_id,
                    "producer_id": producer_id,
                    "producer_epoch": producer_epoch,
                    "committed": True,
                },
                lambda reply: reply.error_code,
            )

        try:
            await self._cluster.retrying(f"the end of {txn_id!r}", ask)
        except KafkaError:
            return False
        return True

    async def abort_hanging(self, hanging: Hanging) -> None:
        """Write the abort marker that no coordinator will write."""
        broker = await self._cluster.leader(hanging.topic, hanging.partition)
        part = await self._cluster.call(
            Api.WRITE_TXN_MARKERS,
            {
                "markers": [
                    {
                        "producer_id": hanging.producer_id,
                        "producer_epoch": hanging.producer_epoch,
                        "transaction_result": False,
                        "topics": [
                            {"name": hanging.topic, "partition_indexes": [hanging.partition]}
                        ],
                        "coordinator_epoch": max(hanging.coordinator_epoch, 0),
                    }
                ]
            },
            broker=broker,
            take=lambda reply: _one_partition(only(reply.markers, "A marker").topics),
        )
        check(part.error_code, f"{hanging.topic}-{hanging.partition}")

    async def find_hanging(self, now_ms: int, older_ms: int) -> list[Hanging]:
        """Transactions without a batch for `older_ms` whose coordinator does not have them open."""
        found = []
        for topic in await self._cluster.all_topics():
            for partition, broker in topic.leaders.items():
                if broker >= 0:
                    found += [
                        each
                        for each in await self._open(topic.name, partition, broker)
                        if now_ms - each.last_ms > older_ms
                    ]
        if not found:
            return []
        suspects = tuple({each.producer_id for each in found})
        known: dict[int, set[tuple[str, int]]] = {}
        for listed in await self.all(producer_ids=suspects):
            if listed.state in ("Ongoing", "PrepareCommit", "PrepareAbort"):
                described = await self._described(listed.txn_id)
                known.setdefault(listed.producer_id, set()).update(described)
        return [
            each
            for each in found
            if (each.topic, each.partition) not in known.get(each.producer_id, ())
        ]

    async def _described(self, txn_id: str) -> tuple[tuple[str, int], ...]:
        try:
            return (await self.describe(txn_id)).partitions
        except KafkaError:
            return ()  # it has expired since

    async def _open(self, topic: str, partition: int, broker: int) -> list[Hanging]:
        part = await self._cluster.call(
            Api.DESCRIBE_PRODUCERS,
            {"topics": [{"name": topic, "partition_indexes": [partition]}]},
            broker=broker,
            take=lambda reply: _one_partition(reply.topics),
        )
        return [
            Hanging(
                topic, partition, each.producer_id, each.producer_epoch, each.coordinator_epoch,
                each.current_txn_start_offset, each.last_timestamp,
            )
            for each in part.active_producers
            if each.current_txn_start_offset >= 0
        ]  # fmt: skip

    async def _coordinator(self, txn_id: str) -> int:
        """The broker that decides for the id."""
        coordinator = Coordinator(self._cluster, Kind.TRANSACTION, txn_id)
        return await self._cluster.retrying(f"the coordinator of {txn_id!r}", coordinator.broker)


def _one_partition(topics: Sequence[Any]) -> Any:
    return only(only(topics, "A topic").partitions, "A partition")
