"""The client: one set of connections, and everything that is done over them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

import structlog
from kio.schema.errors import ErrorCode

from ledgerstream.client.access import Access
from ledgerstream.client.cluster import TRANSPORT_ERRORS, Cluster, words
from ledgerstream.client.connection import Connection, only
from ledgerstream.client.errors import check, kafka_error
from ledgerstream.client.groupoffsets import GroupOffsets, TopicPartition
from ledgerstream.client.groupreader import GroupReader
from ledgerstream.client.membership import Group, Listener
from ledgerstream.client.offsets import EARLIEST, LATEST, list_offsets
from ledgerstream.client.operator import Transactions
from ledgerstream.client.producer import Producer
from ledgerstream.client.reader import Reader
from ledgerstream.client.rows import as_rows
from ledgerstream.client.security import Security
from ledgerstream.client.transactional import TransactionalProducer
from ledgerstream.errors import (
    ConfigError,
    DeliveryTimeout,
    KafkaError,
    LedgerStreamError,
    SecurityError,
)
from ledgerstream.limits import LIMITS, Limits
from ledgerstream.wire.versions import Api

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from ledgerstream.events import Event
    from ledgerstream.wire.columns import Decoded, Encoding, KeyForm

log = structlog.get_logger("client")
READ_ROWS_EXPECTED_MAX = 10_000_000  # offsets may have holes: more room is made when it is needed


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """A topic as it is now. `topic_id` is None on brokers before Kafka 3.1."""

    name: str
    topic_id: UUID | None
    partitions: int


class Client:
    """`async with await Client.connect("127.0.0.1:9092") as client: …`"""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._writer: Producer | None = None
        self._producers: list[Producer] = []
        self._readers: list[Reader] = []
        self._groups: list[Group | GroupReader] = []

    @classmethod
    async def connect(
        cls,
        servers: str,
        *,
        security: Security | None = None,
        client_id: str = "ledgerstream",
        limits: Limits = LIMITS,
    ) -> Client:
        """Connect to any of `host:port[,host:port…]` (`kafka://` in front is allowed).

        security: TLS and SASL; plain text without.

        Raises LedgerStreamError if none answers within the connect time limit, ConfigError for
        files that are none, and SecurityError, at once, where one does not let us in.
        """
        security = security or Security()
        access = Access(security, limits)  # small files, once; under gevent no thread would end
        if security.tells_secrets:
            log.warning(
                "secrets go over the wire in plain text",
                servers=servers,
                mechanism=security.sasl_mechanism,
                remedy="security_protocol SASL_SSL, or SCRAM",
            )
        cluster = Cluster(servers, client_id, limits, access)
        try:
            await cluster.retrying(
                f"the brokers at {servers}", cluster.look, limit_ms=limits.connect_ms_max
            )
        except (ConfigError, SecurityError):
            await cluster.close()
            raise
        except LedgerStreamError as error:
            await cluster.close()
            raise LedgerStreamError(
                f"No broker answers at {servers}.",
                f"Is it running? `ledgerstream broker` starts one. ({error})",
            ) from error
        return cls(cluster)

    async def close(self, *, flush: bool = True) -> None:
        """Leave every group, flush and close every producer, end every reader, close the
        connections.

        Without `flush`, what is not acknowledged fails at once: it may or may not be in the log.
        """
        try:
            await asyncio.gather(*(group.close() for group in self._groups))
            await asyncio.gather(*(producer.close(flush=flush) for producer in self._producers))
        finally:
            for reader in self._readers:
                await reader.close()
            await self.cluster.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close(flush=error is None)

    # -- topics

    async def topic(self, name: str) -> TopicInfo:
        """Raises KafkaError UNKNOWN_TOPIC_OR_PARTITION if there is none."""
        known = await self.cluster.topic(name, fresh=True)
        return TopicInfo(known.name, known.topic_id, known.partitions)

    async def topics(self) -> list[TopicInfo]:
        """All topics, by name."""
        found = await self.cluster.all_topics()
        return sorted(
            (TopicInfo(t.name, t.topic_id, t.partitions) for t in found), key=lambda t: t.name
        )

    async def create_topic(
        self,
        name: str,
        partitions: int = 1,
        replication: int = -1,
        config: Mapping[str, str] | None = None,
    ) -> TopicInfo:
        """Create a topic; it can be used when this returns.

        Raises KafkaError TOPIC_ALREADY_EXISTS, INVALID_CONFIG, … as the broker refuses it.
        """
        entry = {
            "name": name,
            "num_partitions": partitions,
            "replication_factor": replication,
            "assignments": [],
            "configs": [{"name": k, "value": v} for k, v in (config or {}).items()],
        }
        fields = {
            "topics": [entry], "timeout": self.cluster.limits.request_ms_max,
            "validate_only": False,
        }  # fmt: skip
        result = await self._admin(Api.CREATE_TOPICS, fields, lambda reply: reply.topics)
        check(result.error_code, f"Topic {name!r}", getattr(result, "error_message", None))

        await self._wait_topic(name, lambda info: info is not None)
        return await self.topic(name)

    async def delete_topic(self, name: str) -> None:
        """Delete the topic and its data. Raises KafkaError if there is none."""
        fields = {
            "topics": [{"name": name, "topic_id": None}],
            "topic_names": [name],
            "timeout": self.cluster.limits.request_ms_max,
        }
        result = await self._admin(Api.DELETE_TOPICS, fields, lambda reply: reply.responses)
        self.cluster.topics.pop(name, None)
        check(result.error_code, f"Topic {name!r}", getattr(result, "error_message", None))
        await self._wait_topic(name, lambda info: info is None)

    async def add_partitions(self, name: str, total: int) -> None:
        """Grow a topic to `total` partitions. Keys move: do not do this to keyed state."""
        fields = {
            "topics": [{"name": name, "count": total, "assignments": None}],
            "timeout": self.cluster.limits.request_ms_max,
            "validate_only": False,
        }
        result = await self._admin(Api.CREATE_PARTITIONS, fields, lambda reply: reply.results)
        check(result.error_code, f"Topic {name!r}", result.error_message)
        await self._wait_topic(name, lambda info: info is not None and info.partitions >= total)

    async def topic_config(self, name: str) -> dict[str, str | None]:
        """Every setting of a topic as it is in force."""
        fields = {
            "resources": [{"resource_type": 2, "resource_name": name, "configuration_keys": None}],
            "include_synonyms": False,
            "include_documentation": False,
        }
        result = await self._admin(Api.DESCRIBE_CONFIGS, fields, lambda reply: reply.results)
        check(result.error_code, f"Topic {name!r}", result.error_message)
        return {entry.name: entry.value for entry in result.configs}

    async def alter_topic(self, name: str, changes: Mapping[str, str | None]) -> None:
        """Set settings of a topic; None sets one back to its default."""
        fields = {
            "resources": [{
                "resource_type": 2,
                "resource_name": name,
                "configs": [
                    {"name": setting, "config_operation": 1 if value is None else 0, "value": value}
                    for setting, value in changes.items()
                ],
            }],
            "validate_only": False,
        }  # fmt: skip
        result = await self._admin(
            Api.INCREMENTAL_ALTER_CONFIGS, fields, lambda reply: reply.responses
        )
        check(result.error_code, f"Topic {name!r}", result.error_message)

    async def _admin(
        self, api: Api, fields: dict[str, Any], results: Callable[[Any], Sequence[Any]]
    ) -> Any:
        """An administrative request for one thing, once, at the controller; its one result.

        Raises DeliveryTimeout if it was sent and not answered: it may or may not have been done.
        """
        cluster = self.cluster

        async def reach() -> Connection:
            try:
                return await cluster.connection(cluster.controller)
            except TRANSPORT_ERRORS:
                await cluster.look()  # it may be another by now
                raise

        connection = await cluster.retrying("the controller", reach)
        try:
            return await connection.call(
                api, fields, take=lambda reply: only(results(reply), "One result")
            )
        except TRANSPORT_ERRORS as error:
            raise DeliveryTimeout(
                f"{api.name} was not answered: {words(error)} It may or may not have been done."
            ) from error

    async def _wait_topic(self, name: str, shows: Callable[[TopicInfo | None], bool]) -> None:
        """Wait until the brokers' metadata shows what was done."""

        async def look() -> None:
            info: TopicInfo | None = None
            try:
                info = await self.topic(name)
            except KafkaError as error:
                if error.code != ErrorCode.unknown_topic_or_partition.value:
                    raise
            if not shows(info):
                raise kafka_error(ErrorCode.leader_not_available, f"Topic {name!r}")

        await self.cluster.retrying(f"topic {name!r}", look)

    # -- offsets

    async def list_offsets(
        self, topic: str, times: Mapping[int, int], *, committed: bool = True
    ) -> dict[int, int]:
        """Offset of each partition at EARLIEST, LATEST, or the first record at or after a time.

        Times in ms. A time after the last record gives the end.
        """
        return await list_offsets(self.cluster, topic, times, committed=committed)

    async def committed(
        self, group: str, places: Iterable[TopicPartition], *, limit_ms: int | None = None
    ) -> dict[TopicPartition, int]:
        """The next offset that a group will read, by topic and partition, where there is one.

        What an open transaction is about to change is waited for: DeliveryTimeout after `limit_ms`.
        """
        return await GroupOffsets(self.cluster, group).committed(places, limit_ms=limit_ms)

    async def commit(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        """Set the offsets of a group that has no members. Raises KafkaError where it has."""
        await GroupOffsets(self.cluster, group).commit(offsets)

    # -- groups

    def group(
        self,
        name: str,
        topics: Iterable[str] | re.Pattern[str],
        *,
        listener: Listener,
        instance_id: str | None = None,
        session_ms: int | None = None,
        rebalance_ms: int | None = None,
    ) -> Group:
        """Membership of a group (KIP-848 where the cluster has it, else the classic protocol):
        which partitions are ours is told to the listener; reading them is its own affair.

        topics:        their names, or a compiled pattern that names have to match as a whole.
        instance_id:   a static member: what it had is kept for it until its session has passed.
        session_ms:    without an answer for so long it takes its partitions for lost; a classic
                       group goes on without it then (a next-generation one by its own setting).
        rebalance_ms:  so long the group waits for `revoked` to return.
        """
        group = Group(
            self.cluster, name, topics, listener,
            instance_id=instance_id, session_ms=session_ms, rebalance_ms=rebalance_ms,
        )  # fmt: skip
        self._groups = [known for known in self._groups if not known.closed]
        self._groups.append(group)
        return group

    def consume(
        self,
        group: str,
        topics: Iterable[str] | re.Pattern[str],
        *,
        start: int = EARLIEST,
        committed: bool = True,
        commit_revoked: bool = True,
        instance_id: str | None = None,
        session_ms: int | None = None,
        rebalance_ms: int | None = None,
    ) -> GroupReader:
        """Read what the group assigns: `async with client.consume("g", ["topic"]) as reader`.

        start:           EARLIEST or LATEST, for partitions of which nothing is committed.
        commit_revoked:  what is done with is committed before partitions go to another member; else
                         only by `commit`. The rest is as in `group`.
        """
        reader = GroupReader(
            self.cluster, group, topics, start=start, committed=committed,
            commit_revoked=commit_revoked, instance_id=instance_id, session_ms=session_ms,
            rebalance_ms=rebalance_ms,
        )  # fmt: skip
        self._groups = [known for known in self._groups if not known.closed]
        self._groups.append(reader)
        return reader

    # -- reading

    def reader(
        self,
        topic: str,
        starts: Mapping[int, int],
        *,
        committed: bool = True,
        topic_id: UUID | None = None,
    ) -> Reader:
        """Read these partitions from these offsets on.

        topic_id: the topic that the offsets are of. Another one that has taken its name since is
        not read (INCONSISTENT_TOPIC_ID); without it, it is the one that is there now.
        """
        reader = Reader(self.cluster, topic, starts, committed=committed, topic_id=topic_id)
        self._readers = [known for known in self._readers if not known.closed]
        self._readers.append(reader)
        return reader

    async def read(
        self,
        topic: str,
        event: type[Event],
        *,
        key: str | None = None,
        encoding: Encoding = "fixed",
        key_form: KeyForm | None = None,
        starts: Mapping[int, int] | None = None,
        stops: Mapping[int, int] | None = None,
        committed: bool = True,
    ) -> dict[int, Decoded]:
        """Partition → its events in `[start, stop)` as columns; from the log's start to its end
        as they are now, where nothing is given. A stop beyond that end is that end."""
        from ledgerstream.wire.columns import Filling, RowCodec

        codec = RowCodec(event, key, encoding, key_form)
        known = await self.cluster.topic(topic)
        everything = dict.fromkeys(known.leaders, EARLIEST)
        first = dict(starts) if starts is not None else await self.list_offsets(topic, everything)
        ends = await self.list_offsets(topic, dict.fromkeys(first, LATEST), committed=committed)
        stops = {p: min(end, (stops or ends).get(p, end)) for p, end in ends.items()}
        rooms = {p: min(max(stops[p] - first[p], 0), READ_ROWS_EXPECTED_MAX) for p in first}
        parts = {partition: Filling(codec.dtype, rooms[partition]) for partition in first}
        left = {p for p in first if first[p] < stops[p]}
        wanted = {p: first[p] for p in left}
        async with self.reader(topic, wanted, committed=committed) as reader:
            while left:
                chunk = await reader.next()
                if chunk is None or chunk.partition not in left:
                    continue
                stop = stops[chunk.partition]
                # in a thread: meanwhile the loop takes in what the next fetch brings
                await asyncio.to_thread(
                    codec.decode_into, parts[chunk.partition], chunk.data, chunk.start, stop
                )
                if chunk.next_offset >= stop:
                    left.discard(chunk.partition)
                    reader.drop(chunk.partition)
        return {p: filling.decoded(max(first[p], stops[p])) for p, filling in parts.items()}

    async def stream(
        self,
        topic: str,
        event: type[Event],
        starts: Mapping[int, int],
        *,
        key: str | None = None,
        encoding: Encoding = "fixed",
        key_form: KeyForm | None = None,
        stops: Mapping[int, int] | None = None,
        committed: bool = True,
    ) -> AsyncIterator[tuple[int, Decoded]]:
        """(partition, the next of its events as columns), fetch by fetch.

        Without `stops` it never ends: it waits for more at the end of the log.
        """
        from ledgerstream.wire.columns import RowCodec

        codec = RowCodec(event, key, encoding, key_form)
        left = {p: o for p, o in starts.items() if stops is None or o < stops.get(p, o + 1)}
        async with self.reader(topic, left, committed=committed) as reader:
            while reader.positions:
                chunk = await reader.next()
                if chunk is None:
                    continue
                stop = None if stops is None else stops.get(chunk.partition)
                if stop is not None and chunk.next_offset >= stop:
                    reader.drop(chunk.partition)
                yield (
                    chunk.partition,
                    await asyncio.to_thread(codec.decode, chunk.data, chunk.start, stop),
                )

    # -- writing

    async def producer(self, compression: str = "none") -> Producer:
        """An idempotent producer of one's own."""
        producer = Producer(self.cluster, compression)
        self._keep(producer)
        return producer

    async def transactional(
        self,
        txn_id: str,
        *,
        timeout_ms: int = LIMITS.transaction_timeout_ms,
        two_phase: bool = False,
        keep_prepared: bool = False,
        compression: str = "none",
    ) -> TransactionalProducer:
        """A producer whose transactions go by an id that it alone has: whoever had it is fenced.

        timeout_ms:     a transaction that is open for longer is aborted by the broker.
        two_phase:      it never is; `prepare` and `complete` are there (KIP-939).
        keep_prepared:  what a producer before left prepared is not aborted but `found`.
        """
        if not txn_id:
            raise ConfigError("A transactional id is not empty.")
        producer = await TransactionalProducer.take_over(
            self.cluster, txn_id, timeout_ms=timeout_ms, two_phase=two_phase,
            keep_prepared=keep_prepared, compression=compression,
        )  # fmt: skip
        self._keep(producer)
        return producer

    @property
    def transactions(self) -> Transactions:
        """Transactions of all ids, as an operator sees and ends them."""
        return Transactions(self.cluster)

    async def write(
        self,
        topic: str,
        rows: np.ndarray | pd.DataFrame,
        *,
        event: type[Event],
        key: str | None = None,
        encoding: Encoding = "fixed",
        key_form: KeyForm | None = None,
    ) -> int:
        """Append rows of an event type; how many, once all are durable.

        A structured array has the type's dtype; a data frame has its columns by name. Rows go to
        the partition of their key, in order.
        """
        from ledgerstream.wire.columns import RowCodec

        codec = RowCodec(event, key, encoding, key_form)
        array = as_rows(rows, event)
        if self._writer is None:
            self._writer = await self.producer()
        return await self._writer.write(topic, array, codec)

    def _keep(self, producer: Producer) -> None:
        """Until it is closed, or the client is."""
        self._producers = [known for known in self._producers if not known.closed]
        self._producers.append(producer)
