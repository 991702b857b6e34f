"""Coordinators over an internal topic: a pure machine for each of its partitions.

A transactional id or a group belongs to the partition that its name hashes to, and the machine of
that partition decides for it. Decisions are records in Kafka's own formats; they are appended,
replayed at once, and the reply is released when they are durable. If an append fails or the
partition stops, the machine is thrown away and built again from the log; whoever asks meanwhile
hears COORDINATOR_LOAD_IN_PROGRESS or NOT_COORDINATOR. The coordinator epoch is the leader epoch of
the partition.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import structlog
from kio.schema.errors import ErrorCode

from ledgerstream.broker.host import durable_batches
from ledgerstream.broker.replica import Replica
from ledgerstream.catalog import Topic
from ledgerstream.errors import CorruptError, DecodeError, StorageError
from ledgerstream.log import Appended, Guard, Partition, Refused
from ledgerstream.machine import Decision
from ledgerstream.wire import batches
from ledgerstream.wire.markers import Marker, coordinator_partition, read_marker

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

log = structlog.get_logger("broker")

R = TypeVar("R")
Read = TypeVar("Read", contravariant=True)
M = TypeVar("M", bound="ShardMachine[Any]")
Reply = TypeVar("Reply")


class Origin(NamedTuple):
    """Where a record stands in its partition, and of which transaction it is part, if of any."""

    offset: int
    timestamp: int  # ms
    producer_id: int = -1  # of a transactional batch: what it says holds once its marker commits
    producer_epoch: int = -1


class ShardMachine(Protocol[Read]):
    """A pure machine over one partition. Both methods are called live and after a restart alike."""

    def replay(self, record: Read, origin: Origin) -> None:
        """The only method, with `end`, that changes what the log remembers."""

    def end(self, marker: Marker, offset: int) -> None:
        """A transaction's marker stands in this partition at `offset`."""


class Codec(Protocol[R]):
    """A machine's records in Kafka's own formats. Pure."""

    def encode(self, record: R) -> tuple[bytes, bytes | None]:
        """Key and value; a value of None removes the key."""

    def decode(self, key: bytes, value: bytes | None) -> R | None:
        """None: of a version that is not known here, skipped. Raises DecodeError for damage."""


class Unavailable(StorageError):
    """Nothing was decided: the log did not take it, or stopped before it was durable.

    `code` is what the client hears: NOT_COORDINATOR, or why a transactional batch was refused.
    """

    def __init__(self, code: ErrorCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Writing(NamedTuple):
    """The transactional producer in whose name a coordinator writes (offsets in a transaction)."""

    producer_id: int
    producer_epoch: int
    guard: Guard | None = None  # from `begin_verification`, where it has written nothing here yet


class Shard(Generic[M, R]):
    """One partition of an internal topic and, while this node leads it, its machine."""

    def __init__(
        self,
        node: Node,
        replica: Replica,
        make: Callable[[], M],
        codec: Codec[R],
        loaded: Callable[[Shard[M, R]], None],
        lost: Callable[[Shard[M, R], M], None],
    ) -> None:
        self.replica = replica
        self.error = ErrorCode.coordinator_load_in_progress  # what to answer while `ready` is false
        self.load_ms = 0.0  # of the last load
        self._node, self._make, self._codec = node, make, codec
        self._loaded, self._lost = loaded, lost
        self._machine: M | None = None
        self._settled = asyncio.Event()  # loaded, or found that it cannot be
        self._loading = False
        replica.watcher = self._look
        self._load()

    @property
    def index(self) -> int:
        return self.replica.partition.key.index

    @property
    def coordinator_epoch(self) -> int:
        return self.replica.partition.leader_epoch

    @property
    def ready(self) -> bool:
        return self._machine is not None

    @property
    def machine(self) -> M:
        """Only while `ready`; never keep it over an await."""
        assert self._machine is not None
        return self._machine

    async def wait_ready(self) -> bool:
        """Whether the machine is there, after a wait of at most `coordinator_load_wait_ms`."""
        if self._machine is None and self.error is ErrorCode.coordinator_load_in_progress:
            try:
                async with asyncio.timeout(self._node.limits.coordinator_load_wait_ms / 1000):
                    await self._settled.wait()
            except TimeoutError:
                return False
        return self._machine is not None

    def begin_verification(self, producer_id: int, producer_epoch: int) -> Guard | None:
        """Before a transactional producer writes here: see `Partition.begin_verification`."""
        producers = self.replica.partition.producers
        if producers.in_transaction(producer_id, producer_epoch):
            return None
        return producers.begin(producer_id, producer_epoch, -1)

    # decisions

    def act(self, decision: Decision[R, Any], writing: Writing | None = None) -> int:
        """Append and replay; the offset up to which the reply's durability is to be awaited.

        Unavailable if the log does not take it. No await may stand between the machine's decision
        and this.
        """
        machine, partition = self.machine, self.replica.partition
        if not decision.records:
            return partition.next_offset
        now_ms = self._node.now_ms()
        items = [batches.NewRecord(*self._codec.encode(r), now_ms) for r in decision.records]
        if writing is None:
            batch = batches.encode_batch(items)
        else:
            batch = batches.encode_batch(
                items,
                producer_id=writing.producer_id,
                producer_epoch=writing.producer_epoch,
                attributes=batches.TRANSACTIONAL,
            )
        guard = None if writing is None else writing.guard
        header = batches.parse_header(batch)
        offset = self._placed(partition.append_own(batch, header, now_ms, guard))
        identity = (-1, -1) if writing is None else writing[:2]
        for at, record in enumerate(decision.records):
            machine.replay(record, Origin(offset + at, now_ms, *identity))
        return partition.next_offset

    def act_end(self, marker: Marker, *, strict: bool = False) -> int:
        """A transaction's marker into this partition, as `act`. Unavailable as there."""
        partition = self.replica.partition
        offset = self._placed(partition.append_marker(marker, self._node.now_ms(), strict=strict))
        self.machine.end(marker, offset)
        return partition.next_offset

    async def perform(self, decision: Decision[R, Reply], writing: Writing | None = None) -> Reply:
        """The decision's reply, once all that it rests on is durable; Unavailable if it failed."""
        await self.wait_durable(self.act(decision, writing))
        return decision.reply

    async def wait_durable(self, offset: int) -> None:
        """Raises Unavailable if the partition failed first."""
        try:
            await self.replica.wait_durable(offset)
        except StorageError as error:
            raise Unavailable(ErrorCode.not_coordinator, str(error)) from error

    def _placed(self, appended: Appended | Refused) -> int:
        """The base offset, if the log took it."""
        if isinstance(appended, Appended):
            return appended.base_offset
        code = appended.code
        if code is ErrorCode.kafka_storage_error:
            self._throw_away()
            code = ErrorCode.not_coordinator
        key = self.replica.partition.key
        raise Unavailable(code, f"{key} takes no records: {appended.message}")

    # loading

    def _look(self) -> None:
        """A round is done: has the partition stopped, or can it be led again?"""
        if self.replica.partition.failure is not None:
            self._throw_away()
        elif self._machine is None:
            self._load()

    def begin_again(self) -> None:
        """The machine is wrong: what the log says takes its place, once all of it is durable."""
        self._throw_away()
        self._load()

    def _throw_away(self) -> None:
        """What was decided and is not durable has never been; what is, the log says again."""
        machine, self._machine = self._machine, None
        self.error = ErrorCode.not_coordinator
        self._settled.set()
        if machine is not None:
            self._lost(self, machine)

    def _load(self) -> None:
        partition = self.replica.partition
        if self._loading:
            return
        if partition.failure is not None:
            self._throw_away()
            return
        self.error = ErrorCode.coordinator_load_in_progress
        self._settled.clear()
        if partition.high_watermark < partition.next_offset:
            return  # a round is under way, and `_look` comes after it
        if partition.next_offset == partition.log_start_offset:
            self._adopt(self._make())
            return
        self._loading = True
        self._node.spawn(self._load_in_thread())

    async def _load_in_thread(self) -> None:
        node, partition = self._node, self.replica.partition
        began = node.loop.time()
        machine, why = self._make(), ""
        try:
            await node.loop.run_in_executor(
                node.readers, replay_shard, partition, machine, self._codec
            )
        except (CorruptError, DecodeError, OSError) as error:  # never half a machine
            why = str(error)
        except Exception as error:  # or clients would wait for it for ever
            log.exception("coordinator failed", partition=str(partition.key))
            why = repr(error)
        finally:
            self._loading = False
        self.load_ms = (node.loop.time() - began) * 1000
        if why:
            log.error("coordinator cannot load", partition=str(partition.key), why=why)
            node.read_failures[str(partition.key)] = why
            self._throw_away()
        elif partition.failure is not None:
            self._throw_away()
        else:  # nothing was appended meanwhile: only a machine that is there appends
            self._adopt(machine)

    def _adopt(self, machine: M) -> None:
        self._machine = machine
        self.error = ErrorCode.none
        self._settled.set()
        self._loaded(self)


class Shards(Generic[M, R]):
    """An internal topic and the coordinators over it; the topic is created when first needed."""

    def __init__(
        self,
        node: Node,
        topic: str,
        make: Callable[[], M],
        codec: Codec[R],
        loaded: Callable[[Shard[M, R]], None] = lambda _: None,
        lost: Callable[[Shard[M, R], M], None] = lambda _, __: None,
    ) -> None:
        """`loaded` is called with each machine that is there; `lost` with one that was thrown away,
        whose soft state is to be seen to."""
        self.topic = topic
        self._node, self._make, self._codec = node, make, codec
        self._loaded, self._lost = loaded, lost
        self._shards: dict[int, Shard[M, R]] = {}
        self._partitions = 0
        self._creating: asyncio.Task[None] | None = None

    def __iter__(self) -> Iterator[Shard[M, R]]:
        return iter(self._shards.values())

    def follow(self, topic: Topic, replica: Replica) -> None:
        """The node has opened a partition of the topic."""
        self._partitions = topic.partitions
        index = replica.partition.key.index
        self._shards[index] = Shard(
            self._node, replica, self._make, self._codec, self._loaded, self._lost
        )

    def of(self, index: int) -> Shard[M, R] | None:
        return self._shards.get(index)

    def partition_of(self, key: str) -> int:
        """Where a transactional id or a group lives."""
        partitions = self._partitions or self._node.limits.coordinator_partitions
        return coordinator_partition(key, partitions)

    async def find(self, key: str, *, create: bool = True) -> Shard[M, R] | ErrorCode:
        """The shard that decides for `key`, ready; or what to answer instead."""
        if create and not self._partitions:
            await self.create()
        shard = self._shards.get(self.partition_of(key))
        if shard is None:
            return ErrorCode.coordinator_not_available
        return shard if shard.ready or await shard.wait_ready() else shard.error

    async def create(self) -> None:
        """Have the topic, if the catalogue can be written."""
        if self._partitions:
            return
        if self._creating is None:
            self._creating = asyncio.ensure_future(self._create())
        await asyncio.shield(self._creating)

    async def _create(self) -> None:
        node = self._node
        try:
            await node.create_topic(
                self.topic,
                node.limits.coordinator_partitions,
                config={
                    "cleanup.policy": "compact",
                    "segment.bytes": str(node.limits.coordinator_segment_bytes),
                },
                internal=True,
            )
        finally:
            self._creating = None


def replay_shard(partition: Partition, machine: ShardMachine[R], codec: Codec[R]) -> None:
    """Everything in the log, into a fresh machine. Blocks. Raises CorruptError, DecodeError."""
    for data, at, header in durable_batches(partition):
        if header.control:
            marker = read_marker(data, at)
            if marker is not None:
                machine.end(marker, header.base_offset)
            continue
        identity: Sequence[int] = (-1, -1)
        if header.transactional:
            identity = (header.producer_id, header.producer_epoch)
        for found in batches.records(data, at):
            record = None if found.key is None else codec.decode(found.key, found.value)
            if record is not None:
                machine.replay(record, Origin(found.offset, found.timestamp, *identity))
