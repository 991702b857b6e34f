"""What the client knows of the cluster: brokers, topics, leaders; and how it asks again.

Metadata is fetched when it is missing, stale or proved wrong, by one request however many wait for
it. `retrying` asks until it works, the error is final, or the time limit is over.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

from kio.schema.errors import ErrorCode

from ledgerstream.client.access import OPEN, Access
from ledgerstream.client.connection import Connection, only
from ledgerstream.client.errors import kafka_error
from ledgerstream.errors import ConfigError, DeliveryTimeout, KafkaError, ProtocolError
from ledgerstream.limits import LIMITS, Limits
from ledgerstream.wire.versions import Api

K = TypeVar("K")
T = TypeVar("T")
TRANSPORT_ERRORS = (OSError, TimeoutError, ProtocolError)


@dataclass(slots=True)
class KnownTopic:
    """A topic as the last metadata had it."""

    name: str
    topic_id: UUID | None
    leaders: dict[int, int] = field(default_factory=dict)  # partition → broker, -1 for none
    epochs: dict[int, int] = field(default_factory=dict)  # partition → leader epoch

    @property
    def partitions(self) -> int:
        return len(self.leaders)


def parse_addresses(servers: str) -> list[tuple[str, int]]:
    """`host:port[,host:port…]`, with `kafka://` in front or not. Raises ConfigError."""
    found = []
    for part in servers.removeprefix("kafka://").split(","):
        host, _, port = part.strip().rpartition(":")
        if not host or not (port.isdecimal() and port.isascii() and 0 < int(port) < 2**16):
            raise ConfigError(f"{part!r} is not a broker's address.", "Give host:port.")
        found.append((host.strip("[]"), int(port)))
    return found


class Cluster:
    """Connections by broker, and metadata that is as fresh as it needs to be."""

    def __init__(
        self, servers: str, client_id: str, limits: Limits = LIMITS, access: Access = OPEN
    ) -> None:
        self.bootstrap = parse_addresses(servers)
        self.client_id = client_id
        self.limits = limits
        self.access = access
        self.brokers: dict[int, tuple[str, int]] = {}
        self.controller = -1
        self.topics: dict[str, KnownTopic] = {}
        self._read_at: dict[str, float] = {}
        self._missing_since: dict[str, float] = {}  # topics that brokers do not know
        self._connections: dict[int, Connection] = {}
        self._opening: dict[int, asyncio.Task[Connection]] = {}
        self._refresh: dict[tuple[str, bool], asyncio.Task[KnownTopic]] = {}
        self._random = random.Random()
        self._closed = False

    async def close(self) -> None:
        self._closed = True
        tasks = [*self._opening.values(), *self._refresh.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in self._connections.values():
            connection.close()

    # -- connections

    async def connection(self, broker: int) -> Connection:
        """An open connection to a broker by id; -1 is any broker that answers."""
        known = self._connections.get(broker)
        if known is not None and known.is_open:
            return known
        task = self._opening.get(broker)
        if task is None:
            task = asyncio.ensure_future(self._open(broker))
            self._opening[broker] = task
            task.add_done_callback(lambda task: _done_with(task, self._opening, broker))
        return await _shared(task)

    async def dedicated(self, broker: int) -> Connection:
        """A connection of the caller's own, for replies that are waited for; its to close."""
        if self._closed or broker not in self.brokers:
            raise ConnectionError(f"Broker {broker} is not known, or the client is closed.")
        host, port = self.brokers[broker]
        return await Connection.open(host, port, self.client_id, self.limits, self.access)

    async def _open(self, broker: int) -> Connection:
        if self._closed:
            raise ConnectionError("The client is closed.")
        if broker != -1:
            if broker not in self.brokers:
                raise ConnectionError(f"Broker {broker} is not known.")
            addresses = [self.brokers[broker]]
        else:
            for connection in self._connections.values():
                if connection.is_open:
                    return connection
            addresses = [*self.brokers.values(), *self.bootstrap]
        failure: Exception = ConnectionError("No broker's address is known.")
        for host, port in dict.fromkeys(addresses):
            try:
                opened = await Connection.open(host, port, self.client_id, self.limits, self.access)
            except TRANSPORT_ERRORS as error:
                failure = ConnectionError(f"No broker answers at {host}:{port} ({words(error)}).")
                continue
            self._connections[broker] = opened
            return opened
        raise failure

    async def call(
        self,
        api: Api,
        fields: dict[str, Any],
        *,
        broker: int = -1,
        timeout_ms: int | None = None,
        take: Callable[[Any], Any] | None = None,
    ) -> Any:
        """One request, once."""
        return await (await self.connection(broker)).call(api, fields, timeout_ms, take=take)

    # -- metadata

    async def topic(self, name: str, *, create: bool = False, fresh: bool = False) -> KnownTopic:
        """A topic's partitions and leaders. Raises KafkaError if there is no such topic.

        `create` lets the broker create it if it does so by itself; `fresh` asks in any case.
        """
        known = self._fresh(name)
        if known is not None and not fresh:
            return known
        key = (name, create)
        task = self._refresh.get(key)
        if task is None:
            task = asyncio.ensure_future(
                self.retrying(f"topic {name!r}", lambda: self._read_topic(name, create))
            )
            self._refresh[key] = task
            task.add_done_callback(lambda task: _done_with(task, self._refresh, key))
        return await _shared(task)

    def known_leader(self, topic: str, partition: int) -> int | None:
        """The leader as far as it is known; None where `topic` has to be asked first."""
        known = self._fresh(topic)
        broker = -1 if known is None else known.leaders.get(partition, -1)
        return broker if broker in self.brokers else None

    def _fresh(self, name: str) -> KnownTopic | None:
        """What is known of a topic, unless it is old or has proved wrong."""
        age = asyncio.get_running_loop().time() - self._read_at.get(name, -math.inf)
        return self.topics.get(name) if age * 1000 < self.limits.metadata_age_ms_max else None

    def forget(self, name: str) -> None:
        """What is known of a topic has proved wrong."""
        self._read_at.pop(name, None)

    async def _read_topic(self, name: str, create: bool) -> KnownTopic:
        topic = await self._metadata(
            [{"name": name, "topic_id": None}], create, lambda reply: only(reply.topics, "A topic")
        )
        if topic.error_code is not ErrorCode.none:
            error = kafka_error(topic.error_code, f"Topic {name!r}")
            if topic.error_code is ErrorCode.unknown_topic_or_partition:
                error.retriable = create and not self._is_missing_for_good(name)
            raise error
        self._missing_since.pop(name, None)
        known = KnownTopic(name, getattr(topic, "topic_id", None))
        for part in sorted(topic.partitions, key=lambda part: int(part.partition_index)):
            known.leaders[part.partition_index] = part.leader_id
            known.epochs[part.partition_index] = getattr(part, "leader_epoch", -1)
        self.topics[name] = known
        self._read_at[name] = asyncio.get_running_loop().time()
        return known

    def _is_missing_for_good(self, name: str) -> bool:
        """A broker that creates topics when they are asked for would have done so by now."""
        now = asyncio.get_running_loop().time()
        missing_s = now - self._missing_since.setdefault(name, now)
        if missing_s * 1000 < self.limits.topic_created_ms_max:
            return False
        del self._missing_since[name]
        return True

    async def look(self) -> None:
        """Learn who the brokers are, by one request to any of them."""
        await self._metadata([], False, lambda _: None)

    async def all_topics(self) -> list[KnownTopic]:
        """Every topic that the cluster tells of."""
        topics = await self.retrying(
            "the list of topics", lambda: self._metadata(None, False, lambda reply: reply.topics)
        )
        return [
            KnownTopic(
                topic.name,
                getattr(topic, "topic_id", None),
                {part.partition_index: part.leader_id for part in topic.partitions},
            )
            for topic in topics
            if topic.error_code is ErrorCode.none
        ]

    async def _metadata(
        self, topics: list[dict[str, Any]] | None, create: bool, take: Callable[[Any], T]
    ) -> T:
        """What `take` gives of the reply. Who the brokers are is learnt by the way."""

        def learn(reply: Any) -> T:
            taken = take(reply)
            self.brokers = {broker.node_id: (broker.host, broker.port) for broker in reply.brokers}
            self.controller = reply.controller_id
            return taken

        found: T = await self.call(
            Api.METADATA,
            {
                "topics": topics,
                "allow_auto_topic_creation": create,
                "include_cluster_authorized_operations": False,
                "include_topic_authorized_operations": False,
            },
            take=learn,
        )
        return found

    async def leader(self, topic: str, partition: int) -> int:
        """The broker that leads a partition. Raises a retriable KafkaError if none does."""
        known = await self.topic(topic)
        broker = known.leaders.get(partition)
        if broker is None:
            raise KafkaError(
                3, "UNKNOWN_TOPIC_OR_PARTITION",
                f"Topic {topic!r} has {known.partitions} partitions; there is no {partition}.",
                retriable=False,
            )  # fmt: skip
        if broker < 0 or broker not in self.brokers:
            self.forget(topic)
            raise kafka_error(ErrorCode.leader_not_available, f"{topic}-{partition}")
        return broker

    # -- again

    async def retrying(
        self,
        what: str,
        attempt: Callable[[], Awaitable[T]],
        *,
        limit_ms: int | None = None,
        refresh: str | None = None,
    ) -> T:
        """Ask until it works; the last error where it is final, DeliveryTimeout when time is up.

        `refresh` names the topic whose metadata is asked anew after a failure.
        """
        limit_ms = limit_ms or self.limits.delivery_ms_max
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_ms / 1000
        pause_ms = float(self.limits.retry_first_ms)
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    return await attempt()
            except KafkaError as error:
                if not error.retriable:
                    raise
                last: Exception = error
            except TRANSPORT_ERRORS as error:
                if self._closed:
                    raise
                last = error
            if refresh is not None:
                self.forget(refresh)
            pause = pause_ms * self._random.uniform(0.8, 1.2) / 1000
            if loop.time() + pause > deadline:
                raise DeliveryTimeout(
                    f"{what}: no success within {limit_ms / 1000:g} s; last: {words(last)}"
                ) from last
            await asyncio.sleep(pause)
            pause_ms = min(pause_ms * 2, self.limits.retry_ms_max)


def _done_with(task: asyncio.Task[T], tasks: dict[K, asyncio.Task[T]], key: K) -> None:
    """It is over. That it failed is no news where nobody waits any more."""
    del tasks[key]
    if not task.cancelled():
        task.exception()


async def _shared(task: asyncio.Task[T]) -> T:
    """The result of a task that others wait for as well: cancelling the caller leaves it alone."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        waiter = asyncio.current_task()
        if task.cancelled() and waiter is not None and not waiter.cancelling():
            raise ConnectionError("The client is closed.") from None
        raise


def words(error: BaseException) -> str:
    """What an error says; its name, where it says nothing."""
    return str(error) or type(error).__name__
