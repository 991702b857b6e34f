"""The idempotent producer: each batch is in the log once, in order, however often it was sent.

Rows are encoded by kernels into batches a partition; single records are gathered for a few
milliseconds. `lane.py` holds a partition's batches in order and decides what is sent again; here
is what surrounds it: requests, leaders, the producer id, time. The sender itself never waits for
the network: what takes time is a task of its own, so that time limits hold whatever hangs.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crc32c import crc32c
from kio.schema.errors import ErrorCode

from ledgerstream.client.cluster import TRANSPORT_ERRORS, Cluster, KnownTopic, words
from ledgerstream.client.connection import Connection
from ledgerstream.client.errors import RETRIABLE, kafka_error
from ledgerstream.client.lane import Lane, Pending
from ledgerstream.errors import ConfigError, DeliveryTimeout, LedgerStreamError
from ledgerstream.limits import Limits
from ledgerstream.wire import batches, hot
from ledgerstream.wire.batches import HEADER, HEADER_BYTES, Buffer, NewRecord
from ledgerstream.wire.versions import Api

if TYPE_CHECKING:
    import numpy as np

    from ledgerstream.wire.columns import RowCodec

RECORD_OVERHEAD_BYTES = 70  # a header's and a record's lengths and deltas, at their longest
Answers = dict[tuple[str, int], tuple[ErrorCode, int, str | None]]
Taken = list[tuple[Lane, Pending, Sequence[Buffer]]]


@dataclass(slots=True, eq=False)
class Gathering:
    """Single records of one partition that wait a few milliseconds to become a batch."""

    records: list[tuple[NewRecord, asyncio.Future[int]]] = field(default_factory=list)
    size: int = 0
    linger: asyncio.TimerHandle | None = None


class Producer:
    """Use `await client.producer()`. Every call ends within the delivery time limit."""

    def __init__(self, cluster: Cluster, compression: str = "none") -> None:
        if compression not in batches.CODECS:
            raise ConfigError(
                f"Compression {compression!r} is not known.", f"Use {', '.join(batches.CODECS)}."
            )
        self.cluster = cluster
        self.limits: Limits = cluster.limits
        self.codec = batches.CODECS.index(compression)
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._gathering: dict[tuple[str, int], Gathering] = {}
        self._identity: tuple[int, int] | None = None  # what a lane without one takes
        self._unsettled: set[asyncio.Future[int]] = set()
        self._buffered = 0
        self._room = asyncio.Event()
        self._turn: dict[str, int] = {}  # topic → the partition of its last keyless record
        self._requests: set[asyncio.Task[None]] = set()
        self._in_flight: dict[int, int] = {}  # broker → requests under way
        self._chores: dict[str, asyncio.Task[None]] = {}
        self._work = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._failure: BaseException | None = None
        self._sender = asyncio.ensure_future(self._run())

    # -- what callers do

    async def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        timestamp: int | None = None,
        headers: Sequence[tuple[str, bytes | None]] = (),
    ) -> int:
        """One record; its offset, once it is durable. `timestamp` in ms.

        The offset is -1 where the broker knows only that it has the record. Raises KafkaError where
        the broker refused it for good, and DeliveryTimeout where time was up: it says whether the
        record may be in the log.
        """
        record = _record(key, value, timestamp, headers)
        self._check_open()
        known = await self.cluster.topic(topic, create=True)
        if partition is None:
            partition = self._choose(known, record.key)
        elif not 0 <= partition < known.partitions:
            raise ConfigError(
                f"Topic {topic!r} has {known.partitions} partitions; there is no {partition}."
            )
        size = (
            len(record.key or b"")
            + len(record.value or b"")
            + sum(len(name) + len(content or b"") + 10 for name, content in record.headers)
            + RECORD_OVERHEAD_BYTES
        )
        if size > self.limits.frame_bytes_max // 2:
            raise ConfigError(f"A record of {size:,} bytes is too large to be sent.")
        await self._wait_room()
        place = topic, partition
        gathering = self._gathering.setdefault(place, Gathering())
        if gathering.records and gathering.size + size > self.limits.producer_batch_bytes:
            self._close_batch(place)
            gathering = self._gathering.setdefault(place, Gathering())
        loop = asyncio.get_running_loop()
        done: asyncio.Future[int] = loop.create_future()
        gathering.records.append((record, done))
        gathering.size += size
        if gathering.linger is None:
            linger = self.limits.linger_ms / 1000
            gathering.linger = loop.call_later(linger, self._close_batch, place)
        return await done

    async def write(self, topic: str, rows: np.ndarray, codec: RowCodec) -> int:
        """All rows, in order within each partition; returns how many, once all are durable.

        Rows go to the partition that murmur2 of their key names, as Java's do; without a key, to
        all partitions in turn, a batch each. If it fails or is cancelled, some rows may be in the
        log; those of each partition that are there are there once and in order.
        """
        from ledgerstream.wire.columns import partition_order

        self._check_open()
        known = await self.cluster.topic(topic, create=True)
        order: list[tuple[int | None, np.ndarray | None]] = [(None, None)]
        if codec.key is not None:
            order = [
                (partition, None if len(places) == len(rows) else places)
                for partition, places in partition_order(codec.hashes(rows), known.partitions)
            ]
        dones: list[asyncio.Future[int]] = []
        bytes_max = self.limits.producer_batch_bytes - HEADER_BYTES
        row_bytes = codec.dtype.itemsize + 64
        for partition, places in order:
            mine = rows if places is None else rows[places]
            at = 0
            while at < len(mine):
                await self._wait_room()
                now_ms = time.time_ns() // 1_000_000
                part = mine[at : at + max(1, bytes_max // row_bytes)]
                body = codec.encode(part, now_ms)
                if len(body) > bytes_max and len(part) > 1:
                    row_bytes = len(body) // len(part) * 9 // 8 + 1  # fewer rows to a batch
                    continue
                at += len(part)
                stamps = codec.timestamps(part, now_ms)
                chosen = self._choose(known, None) if partition is None else partition
                lane = self._lane(topic, chosen)
                span = int(stamps[0]), int(stamps.max())
                dones.append(self._enqueue(lane, body.data, len(part), *span))
                await asyncio.sleep(0)  # the sender sends while the next batch is encoded
        if dones:
            await asyncio.wait(dones)  # which leaves them alone if this is cancelled
        for done in dones:
            done.result()
        return len(rows)

    async def flush(self) -> None:
        """Return when everything sent so far is durable or has failed."""
        for place in list(self._gathering):
            self._close_batch(place)
        if self._unsettled:
            await asyncio.wait(set(self._unsettled))

    async def close(self, *, flush: bool = True) -> None:
        """Flush (or fail what is not acknowledged), then end. Nothing can be sent from now on."""
        self._closing = True
        self._room.set()
        try:
            if flush and not self._sender.done():
                await self.flush()
        finally:
            self._sender.cancel()
            tasks = [*self._requests, *self._chores.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(self._sender, *tasks, return_exceptions=True)

    # -- batches

    def _check_open(self) -> None:
        if self._failure is not None:
            raise LedgerStreamError(f"The producer has failed: {self._failure!r}")
        if self._closing:
            raise LedgerStreamError("The producer is closed.")

    async def _wait_room(self) -> None:
        """Back-pressure: not more than `producer_buffer_bytes` on the way. It is open afterwards.

        There is room again when a batch is settled, which its time limit sees to.
        """
        self._check_open()
        while self._buffered >= self.limits.producer_buffer_bytes:
            self._room.clear()
            await self._room.wait()
            self._check_open()

    def _lane(self, topic: str, partition: int) -> Lane:
        lane = self._lanes.get((topic, partition))
        if lane is None:
            lane = self._lanes[topic, partition] = Lane(topic, partition)
        return lane

    def _choose(self, topic: KnownTopic, key: bytes | None) -> int:
        """Java's partitioner: murmur2 of the key; without one, in turn."""
        if key is not None:
            from ledgerstream.wire.columns import murmur2

            return murmur2(key) % topic.partitions
        self._turn[topic.name] = (self._turn.get(topic.name, -1) + 1) % topic.partitions
        return self._turn[topic.name]

    def _close_batch(self, place: tuple[str, int]) -> None:
        """The records gathered for a partition become a batch."""
        gathering = self._gathering.pop(place)
        if gathering.linger is not None:
            gathering.linger.cancel()
        records = [record for record, _ in gathering.records]
        done = self._enqueue(
            self._lane(*place),
            batches.encode_records(records),
            len(records),
            records[0].timestamp,
            max(record.timestamp for record in records),
        )
        done.add_done_callback(lambda _: _tell_each(done, [f for _, f in gathering.records]))

    def _enqueue(
        self, lane: Lane, body: Buffer, count: int, base_timestamp: int, max_timestamp: int
    ) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        if self.codec:
            body = batches.compress(self.codec, bytes(body))
        done: asyncio.Future[int] = loop.create_future()
        size = len(body) + HEADER_BYTES

        def settle(outcome: int | Exception) -> None:
            self._buffered -= size
            self._room.set()
            self._unsettled.discard(done)
            if isinstance(outcome, Exception):
                done.set_exception(outcome)
                done.exception()  # a caller that was cancelled never asks
            else:
                done.set_result(outcome)

        deadline = loop.time() + self.limits.delivery_ms_max / 1000
        lane.waiting.append(
            Pending(body, count, base_timestamp, max_timestamp, self.codec, deadline, settle)
        )
        self._buffered += size
        self._unsettled.add(done)
        self._work.set()
        return done

    # -- sending

    async def _run(self) -> None:
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                self._step()
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                self._failure = error
            raise
        finally:
            self._end()

    def _step(self) -> None:
        """Give up what is too old, send what can be sent, start what is missing for the rest."""
        now = asyncio.get_running_loop().time()
        wake_at = math.inf
        by_broker: dict[int, list[Lane]] = {}
        busy = [lane for lane in self._lanes.values() if lane.waiting]
        for lane in sorted(busy, key=lambda lane: lane.waiting[0].deadline):
            lane.expire(now, self.limits.delivery_ms_max)
            if not lane.waiting:
                continue
            wake_at = min(wake_at, lane.waiting[0].deadline)
            if lane.identity is None and not self._give_identity(lane):
                continue
            if not lane.ready(now, self.limits.producer_inflight_max):
                if lane.pause_until > now:
                    wake_at = min(wake_at, lane.pause_until)
                continue
            broker = self.cluster.known_leader(lane.topic, lane.partition)
            if broker is None:
                self._begin(lane.topic, lambda topic=lane.topic: self._look_up(topic))  # type: ignore[misc]
            elif self._in_flight.get(broker, 0) < self.limits.producer_inflight_max:
                by_broker.setdefault(broker, []).append(lane)
        for broker, lanes in by_broker.items():
            self._send_next(broker, lanes)
        self._wake_at(wake_at)

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if when < math.inf:
            self._timer = asyncio.get_running_loop().call_at(when, self._work.set)

    def _send_next(self, broker: int, lanes: Sequence[Lane]) -> None:
        """One request with the next batch of each lane."""
        taken: Taken = []
        size = 0
        for lane in lanes:
            if taken and size + lane.waiting[0].size > self.limits.frame_bytes_max // 2:
                break
            pending = lane.take()
            taken.append((lane, pending, _seal(lane, pending)))
            size += pending.size
        self._in_flight[broker] = self._in_flight.get(broker, 0) + 1
        task = asyncio.ensure_future(self._request(broker, taken))
        self._requests.add(task)
        task.add_done_callback(self._ended)
        task.add_done_callback(self._requests.discard)
        self._work.set()  # there may be more than one batch a lane

    async def _request(self, broker: int, taken: Taken) -> None:
        deadline = min(pending.deadline for _, pending, _ in taken)
        connection: Connection | None = None
        answers: Answers = {}
        trouble = "the broker left it out of its answer"
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self.cluster.connection(broker)
            answers = await self._exchange(connection, taken, deadline)
        except (LedgerStreamError, *TRANSPORT_ERRORS) as error:
            trouble = words(error)
        finally:
            self._in_flight[broker] -= 1
            self._work.set()
        for lane, pending, _ in taken:
            code, offset, message = answers.get((lane.topic, lane.partition), (None, -1, None))
            if code in (ErrorCode.none, ErrorCode.duplicate_sequence_number):
                lane.delivered(pending, offset)
                continue
            if code is None or code in RETRIABLE:
                self.cluster.forget(lane.topic)
            if connection is None:
                lane.unsent(pending, trouble)
            elif code is None:
                lane.unanswered(pending, trouble)
            else:
                what = f"{pending.count:,} records to {lane.topic}-{lane.partition}"
                lane.refused(pending, code, kafka_error(code, what, message))
            now = asyncio.get_running_loop().time()
            lane.pause(now, self.limits.retry_first_ms, self.limits.retry_ms_max)

    async def _exchange(self, connection: Connection, taken: Taken, deadline: float) -> Answers:
        version = connection.version(Api.PRODUCE)
        ids = {lane.topic: self.cluster.topics[lane.topic].topic_id for lane, _, _ in taken}
        if version >= hot.PRODUCE_TOPIC_IDS and any(i is None for i in ids.values()):
            version = hot.PRODUCE_TOPIC_IDS - 1
        topics: dict[str, list[tuple[int, Sequence[Buffer]]]] = {}
        for lane, _, batch in taken:
            topics.setdefault(lane.topic, []).append((lane.partition, batch))
        correlation_id = connection.take_id()
        frame = hot.produce_request(
            version,
            correlation_id,
            self.cluster.client_id,
            -1,
            self.limits.request_ms_max,
            [(name, ids[name], parts) for name, parts in topics.items()],
        )
        left_ms = math.ceil((deadline - asyncio.get_running_loop().time()) * 1000)
        timeout_ms = max(1, min(left_ms, self.limits.request_ms_max))
        raw = await connection.exchange(correlation_id, frame, timeout_ms)
        reply = connection.read(Api.PRODUCE, version, raw)
        names = {topic_id: name for name, topic_id in ids.items()}
        return {
            (getattr(topic, "name", None) or names.get(topic.topic_id, ""), part.index): (
                part.error_code, part.base_offset, getattr(part, "error_message", None),
            )
            for topic in reply.responses
            for part in topic.partition_responses
        }  # fmt: skip

    # -- what takes time

    def _begin(self, name: str, chore: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start a chore, unless it is under way."""
        if name not in self._chores:
            task = self._chores[name] = asyncio.ensure_future(chore())
            task.add_done_callback(lambda _: self._chores.pop(name))
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task is over: there is work. An error that none foresaw ends the producer."""
        self._work.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
            self._sender.cancel()

    def _give_identity(self, lane: Lane) -> bool:
        if self._identity is None or self._identity[0] == lane.spent_id:
            self._begin("", self._take_identity)
            return False
        lane.identity = self._identity
        return True

    async def _take_identity(self) -> None:
        async def ask() -> tuple[int, int]:
            reply = await self.cluster.call(
                Api.INIT_PRODUCER_ID,
                {
                    "transactional_id": None,
                    "transaction_timeout": self.limits.delivery_ms_max,
                    "producer_id": -1,
                    "producer_epoch": -1,
                },
            )
            if reply.error_code is not ErrorCode.none:
                raise kafka_error(reply.error_code, "A producer id")
            return reply.producer_id, reply.producer_epoch

        try:
            self._identity = await self.cluster.retrying("a producer id", ask)
        except (LedgerStreamError, *TRANSPORT_ERRORS) as error:
            nameless = [lane for lane in self._lanes.values() if lane.identity is None]
            self._no_way(nameless, error)

    async def _look_up(self, topic: str) -> None:
        """Ask who leads a topic's partitions."""
        try:
            known = await self.cluster.topic(topic)
        except (LedgerStreamError, *TRANSPORT_ERRORS) as error:
            self._no_way([lane for lane in self._lanes.values() if lane.topic == topic], error)
            return
        now = asyncio.get_running_loop().time()
        for lane in self._lanes.values():
            if lane.topic != topic or not lane.waiting:
                continue
            if lane.partition not in known.leaders:
                what = f"{topic}-{lane.partition}"
                lane.fail_waiting(kafka_error(ErrorCode.unknown_topic_or_partition, what))
            elif self.cluster.known_leader(topic, lane.partition) is None:
                self.cluster.forget(topic)
                lane.trouble = "the partition has no leader"
                lane.pause(now, self.limits.retry_first_ms, self.limits.retry_ms_max)

    def _no_way(self, lanes: Iterable[Lane], error: Exception) -> None:
        """What the lanes need is not to be had. If only time was up, their own limits decide."""
        for lane in lanes:
            if isinstance(error, DeliveryTimeout):
                lane.trouble = str(error)
            else:
                lane.fail_waiting(error)

    def _end(self) -> None:
        self._wake_at(math.inf)
        error = LedgerStreamError(f"The producer ended: {self._failure or 'it was closed'}.")
        for gathering in self._gathering.values():
            assert gathering.linger is not None
            gathering.linger.cancel()
            for _, done in gathering.records:
                if not done.done():
                    done.set_exception(error)
        self._gathering = {}
        for lane in self._lanes.values():
            lane.fail_all(error)
        self._room.set()


def _record(
    key: bytes | None,
    value: bytes | None,
    timestamp: int | None,
    headers: Sequence[tuple[str, bytes | None]],
) -> NewRecord:
    """A record that can be encoded whatever happens later. Raises ConfigError."""
    for what, part in (("key", key), ("value", value), *headers):
        if not isinstance(what, str):
            raise ConfigError(f"A record header's name is text, not {type(what).__name__}.")
        if part is not None and not isinstance(part, (bytes, bytearray, memoryview)):
            raise ConfigError(f"A record's {what} is bytes or None, not {type(part).__name__}.")
    if timestamp is None:
        timestamp = time.time_ns() // 1_000_000
    elif not 0 <= timestamp < 2**63:
        raise ConfigError(f"A record's timestamp is ms since 1970, not {timestamp}.")
    return NewRecord(key, value, timestamp, tuple(headers))


def _seal(lane: Lane, pending: Pending) -> tuple[bytes, Buffer]:
    """The batch's header for its lane's identity and its sequence, and the body as it is."""
    assert lane.identity is not None
    head = bytearray(HEADER_BYTES)
    HEADER.pack_into(
        head, 0, 0, len(pending.body) + HEADER_BYTES - batches.LOG_OVERHEAD_BYTES, -1, 2, 0,
        pending.codec, pending.count - 1, pending.base_timestamp, pending.max_timestamp,
        *lane.identity, pending.sequence, pending.count,
    )  # fmt: skip
    crc = crc32c(pending.body, crc32c(memoryview(head)[batches.CRC_FROM :]))
    head[17:21] = crc.to_bytes(4, "big")
    return bytes(head), pending.body


def _tell_each(done: asyncio.Future[int], futures: list[asyncio.Future[int]]) -> None:
    """A batch's outcome to each of its records."""
    error = done.exception()
    for place, future in enumerate(futures):
        if future.done():
            continue
        if error is not None:
            future.set_exception(error)
        else:
            base = done.result()
            future.set_result(base + place if base >= 0 else -1)
