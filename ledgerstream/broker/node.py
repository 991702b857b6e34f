"""One broker: the store, the catalogue over its own log, the replicas, and the server on top."""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import structlog
from kio.schema.errors import ErrorCode

from ledgerstream import catalog as cat
from ledgerstream import topicconfig
from ledgerstream.broker.dispatch import Dispatch
from ledgerstream.broker.grouphost import Groups
from ledgerstream.broker.host import Host, replay_log
from ledgerstream.broker.markers import Markers
from ledgerstream.broker.producerids import ProducerIds
from ledgerstream.broker.replica import Replicas
from ledgerstream.broker.server import Server
from ledgerstream.broker.sessions import Sessions
from ledgerstream.broker.settings import Settings
from ledgerstream.broker.shards import Shards
from ledgerstream.broker.transactions import Transactions
from ledgerstream.catalog import Answer, Catalog, CatalogRecord
from ledgerstream.errors import CorruptError, StorageError
from ledgerstream.limits import LIMITS, Limits
from ledgerstream.log import LogConfig, Partition, PartitionKey, Store

if TYPE_CHECKING:
    from ledgerstream.broker.fetch import Fetch
    from ledgerstream.broker.produce import Production

log = structlog.get_logger("broker")

CATALOG_KEY = PartitionKey("__cluster_metadata", uuid.UUID(int=1), 0)


def wall_ms() -> int:
    """The broker's clock: ms since 1970 UTC."""
    return time.time_ns() // 1_000_000


class Node:
    """Everything of one broker, on one loop."""

    def __init__(
        self,
        settings: Settings,
        limits: Limits = LIMITS,
        now_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self.settings, self.limits, self.now_ms = settings, limits, now_ms
        self.loop = asyncio.get_running_loop()
        self.catalog = Catalog()
        self.settled = Catalog()  # as far as the catalogue's log is durable
        self.replicas = Replicas()
        self.sessions = Sessions(limits.fetch_sessions_max)
        self.dispatch = Dispatch(self)
        self.server = Server(self.dispatch, limits)
        self.readers = ThreadPoolExecutor(limits.cold_read_threads, thread_name_prefix="read")
        self.waiting_produce: list[Production] = []
        self.parked: set[Fetch] = set()
        self.read_failures: dict[str, str] = {}  # partition → why it could not be read
        self.stopping = False
        self.fatal: asyncio.Future[str] = self.loop.create_future()
        self.store: Store
        self.catalog_host: Host[CatalogRecord]
        self.producer_ids: ProducerIds
        self.markers = Markers(self)
        self.transactions = Transactions(self, self.markers)
        self.groups = Groups(self)
        self.coordinators: dict[str, Shards[Any, Any]] = {  # by internal topic
            each.topic: each for each in (self.transactions.shards, self.groups.shards)
        }
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._creating: dict[str, asyncio.Task[Answer]] = {}
        self._expiry: asyncio.TimerHandle | None = None

    # -- life

    async def start(self) -> None:
        """Open the directory, replay the catalogue, then listen: never before it is caught up."""
        limits = self.limits
        self.store = await self.loop.run_in_executor(
            self.readers,
            lambda: Store.open(
                self.settings.data_dir, limits, sync=self.settings.durability == "sync"
            ),
        )
        self.store.start(
            self.loop.call_soon_threadsafe, self.replicas.on_round, self._on_store_fatal,
            self.loop.call_soon,
        )  # fmt: skip
        try:
            replica = self.replicas.add(await self._replay_catalog())
        except BaseException:
            await self._close_store()
            raise
        self.catalog_host = Host(
            self.catalog, self.settled, replica, cat.encode, self.now_ms, self._follow_catalog
        )
        if not self.catalog.cluster_id:
            await self.catalog_host.perform(self.catalog.decide_form(uuid.uuid4()))
        self.producer_ids = ProducerIds(self.catalog, self.catalog_host, limits)
        self._open_partitions()
        self.port = await self.server.listen(self.settings.host, self.settings.port)
        self._expire()

    async def _replay_catalog(self) -> Partition:
        """The catalogue's log, replayed; partitions that it has deleted are gone."""
        found = self.store.get(CATALOG_KEY)
        deleted = set()
        if found is not None:
            values = await self.loop.run_in_executor(self.readers, lambda: list(replay_log(found)))
            for value in values:
                record = cat.decode(value)
                self.catalog.replay(record)
                if isinstance(record, cat.TopicDeleted):
                    deleted.add(record.topic_id)
        self.settled.become(self.catalog)
        if found is None or found.failure is None:
            self._delete_unknown(deleted)
        return found or self.store.create(CATALOG_KEY, LogConfig(), self.now_ms())

    def _delete_unknown(self, deleted: set[uuid.UUID]) -> None:
        """Partitions whose deletion, or whose creation, a crash cut short.

        Records that the catalogue never heard of mean that it is not the one of this directory.
        """
        strangers = []
        for partition in self.store.partitions():
            key = partition.key
            topic = self.catalog.by_id.get(key.topic_id)
            if key == CATALOG_KEY or (topic is not None and key.index < topic.partitions):
                continue
            if key.topic_id in deleted or (partition.next_offset == 0 and not partition.failure):
                self.store.delete(key)
            else:
                strangers.append(str(key))
        if strangers:
            some = ", ".join(strangers[:3]) + (", …" if len(strangers) > 3 else "")
            raise CorruptError(
                f"The topic catalogue ({CATALOG_KEY}) does not know {some}, which hold records.",
                f"Restore {CATALOG_KEY} from a copy, or move those directories elsewhere.",
            )

    def _open_partitions(self) -> None:
        for topic in self.catalog.topics.values():
            for index in range(topic.partitions):
                self._open(topic, index)

    def _open(self, topic: cat.Topic, index: int) -> Partition:
        key = PartitionKey(topic.name, topic.topic_id, index)
        config = log_config(topic.config)
        partition = self.store.get(key)
        if partition is None:
            partition = self.store.create(key, config, self.now_ms())
        assert partition is not None
        partition.config = config
        replica = self.replicas.add(partition)
        if topic.name in self.coordinators:
            self.coordinators[topic.name].follow(topic, replica)
        return partition

    def _follow_catalog(self, records: Sequence[CatalogRecord]) -> None:
        """Make the partitions what the catalogue says for good."""
        for record in records:
            match record:
                case cat.TopicCreated() | cat.PartitionsAdded():
                    topic = self.settled.by_id[record.topic_id]
                    for index in range(topic.partitions):
                        if self.replicas.of(topic.topic_id, index) is None:
                            self._open(topic, index)
                case cat.ConfigChanged():
                    topic = self.settled.by_id[record.topic_id]
                    for index in range(topic.partitions):
                        replica = self.replicas.of(topic.topic_id, index)
                        assert replica is not None
                        replica.partition.config = log_config(topic.config)
                case cat.TopicDeleted():
                    self._delete(record.topic_id)

    def _delete(self, topic_id: uuid.UUID) -> None:
        name, partitions = "", 0
        for replica in tuple(self.replicas):
            key = replica.partition.key
            if key.topic_id == topic_id:
                name, partitions = key.topic, partitions + 1
                self.replicas.remove(key.topic, topic_id, key.index)
                self.store.delete(key)
        self.groups.forget_topic(name, partitions)

    def _on_store_fatal(self, why: str) -> None:
        if not self.fatal.done():
            self.fatal.set_result(why)

    async def stop(self) -> None:
        """Finish what was accepted, then close the log cleanly."""
        self.stopping = True
        if self._expiry is not None:
            self._expiry.cancel()
        for fetch in tuple(self.parked):
            self.dispatch.go_on(fetch.exchange, fetch.finish_now)
        self.groups.stop()
        await self.server.stop()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close_store()
        self.readers.shutdown(wait=True)

    # -- what conversations ask for

    @property
    def cluster_id(self) -> str:
        return self.catalog.cluster_id

    @property
    def advertised(self) -> tuple[str, int]:
        host = self.settings.advertised_host or self.settings.host
        return host, self.settings.advertised_port or self.port

    def spawn(self, work: Any) -> None:
        """Run a coroutine of a conversation; it ends with the node."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("what a conversation began has failed", exc_info=error)

    async def create_topic(
        self,
        name: str,
        partitions: int,
        replication: int = -1,
        config: Mapping[str, str] | None = None,
        *,
        validate_only: bool = False,
        internal: bool = False,
    ) -> Answer:
        """`internal`: one of the broker's own topics."""
        decision = self.catalog.decide_create(
            name,
            uuid.uuid4(),
            partitions,
            replication,
            config,
            default_partitions=self.settings.default_partitions,
            internal=internal,
        )
        if validate_only:
            return decision.reply
        if decision.reply.error is ErrorCode.topic_already_exists:
            # it may have been created a moment ago: nobody is told of it before it is durable
            await self.perform(decision)
        return await self.perform(decision)

    async def perform(self, decision: cat.Decided) -> Answer:
        """A decision of the catalogue, performed; KAFKA_STORAGE_ERROR where its log failed."""
        try:
            return await self.catalog_host.perform(decision)
        except StorageError as error:
            return Answer(ErrorCode.kafka_storage_error, str(error))

    async def _close_store(self) -> None:
        self.store.hand_over()
        await self.loop.run_in_executor(self.readers, self.store.close)

    def _expire(self) -> None:
        """The clock ticks: answer produce requests that wait too long, forget idle producers."""
        # first of all: what fails below fails this tick, and stops no clock
        self._expiry = self.loop.call_later(self.limits.tick_ms / 1000, self._expire)
        now = self.loop.time()
        for production in self.waiting_produce:
            if production.undurable and production.deadline <= now:
                production.expire()
        self.waiting_produce = [p for p in self.waiting_produce if p.undurable]
        now_ms, at_ms = self.now_ms(), round(now * 1000)
        self.store.tick(now_ms, at_ms)
        self.transactions.tick(now_ms, at_ms)
        self.groups.tick(now_ms, at_ms)


_CONVERTERS: dict[str, Callable[[str], Any]] = {"int": int, "long": int, "double": float}


def log_config(config: Mapping[str, str]) -> LogConfig:
    """The log's view of a topic's settings."""
    values = {}
    for entry in fields(LogConfig):
        name = entry.name.replace("_", ".")
        setting = topicconfig.SETTINGS.get(name)
        if setting is not None:
            convert = _CONVERTERS.get(setting.type, str)
            values[entry.name] = convert(config.get(name, setting.default))
    found = LogConfig(**values)
    if found.compacts:  # or what is written to a quiet topic would never be compacted
        found = replace(found, segment_ms=min(found.segment_ms, found.max_compaction_lag_ms))
    return found


async def serve(
    settings: Settings,
    *,
    ready: Callable[[Node], Mapping[str, Any]] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a broker until SIGTERM, SIGINT or `stop`; a clean stop finishes what was accepted.

    ready: called when clients may come; what it gives is said in the log beside the address.
    """
    node = Node(settings)
    stopping = stop or asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        node.loop.add_signal_handler(signum, stopping.set)
    await node.start()
    more = ready(node) if ready is not None else {}
    log.info(
        "broker ready",
        address="{}:{}".format(*node.advertised),
        data=str(settings.data_dir),
        topics=len(node.catalog.topics),
        durability=settings.durability,
        **more,
    )
    waiting = node.loop.create_task(stopping.wait())
    both: set[asyncio.Future[Any]] = {waiting, node.fatal}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if node.fatal.done():
        log.critical(
            "the log cannot be trusted any more; the broker stops", why=node.fatal.result()
        )
        raise SystemExit(1)
    await node.stop()
    log.info("broker stopped")
