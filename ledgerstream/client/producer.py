"""The idempotent producer: each batch is in the log once, in order, however often it was sent.

Rows are encoded by kernels into batches a partition; single records are gathered for a few
milliseconds. A lane a partition holds them in order: a batch gets its sequence number when it is
first sent and keeps it in every retry, and after a failure everything in flight comes home before
the first of it is sent again (KIP-98). What was sent and is given up may or may not be in the log;
then the producer takes a new identity before it goes on, so that no gap can follow.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from crc32c import crc32c
from kio.schema.errors import ErrorCode

from ledgerstream.client.cluster import TRANSPORT_ERRORS, Cluster, KnownTopic
from ledgerstream.client.errors import RETRIABLE, kafka_error
from ledgerstream.errors import ConfigError, DeliveryTimeout, KafkaError, LedgerStreamError
from ledgerstream.limits import Limits
from ledgerstream.wire import batches, hot, messages
from ledgerstream.wire.batches import HEADER, HEADER_BYTES, Buffer, NewRecord
from ledgerstream.wire.versions import Api

if TYPE_CHECKING:
    import numpy as np

    from ledgerstream.wire.columns import RowCodec

log = structlog.get_logger("client")

SEQUENCES = 2**31
# the broker has seen another history of this producer than we have: a new identity is due
_LOST_ORDER = frozenset({
    ErrorCode.out_of_order_sequence_number, ErrorCode.invalid_producer_epoch,
    ErrorCode.unknown_producer_id, ErrorCode.producer_fenced,
})  # fmt: skip


@dataclass(slots=True)
class Pending:
    """One batch on its way: its body, encoded and compressed. The header is made when sent."""

    body: Buffer
    count: int
    base_timestamp: int
    max_timestamp: int
    codec: int
    deadline: float
    done: asyncio.Future[int]  # the base offset
    sequence: int = -1
    sent: bool = False

    @property
    def size(self) -> int:
        return len(self.body) + HEADER_BYTES


@dataclass(slots=True)
class Lane:
    """One partition's batches, in order: those in flight first, then those that wait."""

    topic: str
    partition: int
    waiting: deque[Pending] = field(default_factory=deque)
    in_flight: list[Pending] = field(default_factory=list)
    returned: list[Pending] = field(default_factory=list)  # failed, to be sent again in order
    next_sequence: int = 0
    pause_until: float = 0.0
    pause_ms: float = 0.0
    records: list[tuple[NewRecord, asyncio.Future[int]]] = field(default_factory=list)
    records_bytes: int = 0
    linger: asyncio.TimerHandle | None = None

    def ready(self, now: float, in_flight_max: int) -> bool:
        """Whether a batch may be sent now. While some come home after a failure, none may."""
        return (
            bool(self.waiting)
            and len(self.in_flight) < in_flight_max
            and not self.returned
            and now >= self.pause_until
        )


class Producer:
    """Use `await client.producer()`. Every future resolves within the delivery time limit."""

    def __init__(self, cluster: Cluster, compression: str = "none") -> None:
        if compression not in batches.CODECS:
            raise ConfigError(
                f"Compression {compression!r} is not known.", f"Use {', '.join(batches.CODECS)}."
            )
        self.cluster = cluster
        self.limits: Limits = cluster.limits
        self.codec = batches.CODECS.index(compression)
        self.producer_id, self.producer_epoch = -1, -1
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._buffered = 0
        self._requests: set[asyncio.Task[None]] = set()
        self._in_flight: dict[int, int] = {}  # broker → requests under way
        self._sticky: dict[str, int] = {}
        self._lost_at = ""  # the partition whose order is lost, while it is
        self._closing = False
        self._sender = asyncio.ensure_future(self._run())
        self._failure: BaseException | None = None

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

        Raises KafkaError where the broker refused it for good, and DeliveryTimeout where it may or
        may not be in the log.
        """
        self._check_open()
        known = await self.cluster.topic(topic, create=True)
        if partition is None:
            partition = self._choose(known, key)
        elif not 0 <= partition < known.partitions:
            raise ConfigError(
                f"Topic {topic!r} has {known.partitions} partitions, not {partition}."
            )
        size = (
            len(key or b"")
            + len(value or b"")
            + sum(len(name) + len(content or b"") for name, content in headers)
            + 70
        )
        if size > self.limits.frame_bytes_max // 2:
            raise ConfigError(f"A record of {size:,} bytes is too large to be sent.")
        await self._wait_room()
        record = NewRecord(
            key, value, time.time_ns() // 1_000_000 if timestamp is None else timestamp, headers
        )
        lane = self._lane(topic, partition)
        if lane.records and lane.records_bytes + size > self.limits.producer_batch_bytes:
            self._close_batch(lane)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        lane.records.append((record, done))
        lane.records_bytes += size
        if lane.linger is None:
            lane.linger = asyncio.get_running_loop().call_later(
                self.limits.linger_ms / 1000, self._close_batch, lane
            )
        return await done

    async def write(self, topic: str, rows: np.ndarray, codec: RowCodec) -> int:
        """All rows, in order within each partition; returns how many, once all are durable.

        Rows go to the partition that murmur2 of their key names, as Java's do; without a key, to
        all partitions in turn, a batch each.
        """
        from ledgerstream.wire.columns import partition_order

        self._check_open()
        known = await self.cluster.topic(topic, create=True)
        if codec.key is None:
            order: list[tuple[int, np.ndarray | None]] = [(self._choose(known, None), None)]
        else:
            order = [
                (partition, None if len(places) == len(rows) else places)
                for partition, places in partition_order(codec.hashes(rows), known.partitions)
            ]
        dones: list[asyncio.Future[int]] = []
        step = max(1, self.limits.producer_batch_bytes // (codec.dtype.itemsize + 64))
        for partition, places in order:
            mine = rows if places is None else rows[places]
            for at in range(0, len(mine), step):
                await self._wait_room()
                now_ms = time.time_ns() // 1_000_000
                part = mine[at : at + step]
                body = codec.encode(part, now_ms)
                stamps = codec.timestamps(part, now_ms)
                dones.append(
                    self._enqueue(
                        self._lane(topic, partition),                         body.data, len(part),
                        int(stamps[0]), int(stamps.max()),
                    )
                )  # fmt: skip
                await asyncio.sleep(0)  # the sender sends while the next batch is encoded
        await _all(dones)
        return len(rows)

    async def flush(self) -> None:
        """Return when everything sent so far is durable or has failed."""
        for lane in self._lanes.values():
            self._close_batch(lane)
        await asyncio.gather(
            *(p.done for lane in self._lanes.values()
              for p in (*lane.in_flight, *lane.returned, *lane.waiting)),
            return_exceptions=True,
        )  # fmt: skip

    async def close(self) -> None:
        """Flush, then end. Nothing can be sent afterwards."""
        if not self._closing:
            await self.flush()
        self._closing = True
        self._sender.cancel()
        await asyncio.gather(self._sender, *self._requests, return_exceptions=True)

    # -- batches

    def _check_open(self) -> None:
        if self._failure is not None:
            raise LedgerStreamError(f"The producer has failed: {self._failure}")
        if self._closing:
            raise LedgerStreamError("The producer is closed.")

    async def _wait_room(self) -> None:
        """Back-pressure: not more than `producer_buffer_bytes` on the way."""
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
        self._sticky[topic.name] = (self._sticky.get(topic.name, -1) + 1) % topic.partitions
        return self._sticky[topic.name]

    def _close_batch(self, lane: Lane) -> None:
        """The records gathered for a lane become a batch."""
        if lane.linger is not None:
            lane.linger.cancel()
            lane.linger = None
        if not lane.records:
            return
        gathered, lane.records, lane.records_bytes = lane.records, [], 0
        records = [record for record, _ in gathered]
        done = self._enqueue(
            lane,
            batches.encode_records(records),
            len(records),
            records[0].timestamp,
            max(record.timestamp for record in records),
        )
        done.add_done_callback(lambda _: _tell_each(done, [future for _, future in gathered]))

    def _enqueue(
        self, lane: Lane, body: Buffer, count: int, base_timestamp: int, max_timestamp: int
    ) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        if self.codec:
            body = batches.compress(self.codec, bytes(body))
        pending = Pending(
            body, count, base_timestamp, max_timestamp, self.codec,
            loop.time() + self.limits.delivery_ms_max / 1000, loop.create_future(),
        )  # fmt: skip
        lane.waiting.append(pending)
        self._buffered += pending.size
        self._work.set()
        return pending.done

    # -- sending

    async def _run(self) -> None:
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                if self._lost_at and not any(lane.in_flight for lane in self._lanes.values()):
                    self._leave_identity()
                if self.producer_id < 0:
                    await self._take_identity()
                self._expire()
                if self.producer_id >= 0 and not self._lost_at:
                    await self._send_ready()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._fail_all()

    async def _take_identity(self) -> None:
        async def ask() -> None:
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
            self.producer_id, self.producer_epoch = reply.producer_id, reply.producer_epoch

        try:
            await self.cluster.retrying("a producer id", ask)
        except DeliveryTimeout as error:
            for lane in self._lanes.values():
                self._fail_waiting(lane, error)

    async def _send_ready(self) -> None:
        """One request a broker, with the next batch of each lane that may send."""
        now = asyncio.get_running_loop().time()
        by_broker: dict[int, list[Lane]] = {}
        soonest: float | None = None
        for lane in self._lanes.values():
            if lane.waiting and now < lane.pause_until:
                soonest = min(soonest or lane.pause_until, lane.pause_until)
            if not lane.ready(now, self.limits.producer_inflight_max):
                continue
            try:
                broker = await self.cluster.leader(lane.topic, lane.partition)
            except (KafkaError, DeliveryTimeout, *TRANSPORT_ERRORS) as error:
                if isinstance(error, KafkaError) and not error.retriable:
                    self._fail_waiting(lane, error)
                else:
                    self._pause(lane)
                continue
            if self._in_flight.get(broker, 0) < self.limits.producer_inflight_max:
                by_broker.setdefault(broker, []).append(lane)
        if soonest is not None:
            asyncio.get_running_loop().call_at(soonest, self._work.set)
        for broker, lanes in by_broker.items():
            taken: list[tuple[Lane, Pending]] = []
            size = 0
            for lane in lanes:
                if taken and size + lane.waiting[0].size > self.limits.frame_bytes_max // 2:
                    self._work.set()
                    break
                pending = lane.waiting.popleft()
                if pending.sequence < 0:
                    pending.sequence = lane.next_sequence
                    lane.next_sequence = (lane.next_sequence + pending.count) % SEQUENCES
                pending.sent = True
                lane.in_flight.append(pending)
                taken.append((lane, pending))
                size += pending.size
            self._in_flight[broker] = self._in_flight.get(broker, 0) + 1
            task = asyncio.ensure_future(self._request(broker, taken))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)
            self._work.set()  # there may be more than one batch a lane

    async def _request(self, broker: int, taken: list[tuple[Lane, Pending]]) -> None:
        try:
            answers = await self._exchange(broker, taken)
        except (DeliveryTimeout, LedgerStreamError, *TRANSPORT_ERRORS) as error:
            for lane, pending in taken:
                self.cluster.forget(lane.topic)
                self._come_home(lane, pending, None, str(error))
        else:
            for lane, pending in taken:
                code, offset, message = answers.get(
                    (lane.topic, lane.partition), (ErrorCode.unknown_server_error, -1, None)
                )
                if code in (ErrorCode.none, ErrorCode.duplicate_sequence_number):
                    self._deliver(lane, pending, offset)
                else:
                    if code in RETRIABLE:
                        self.cluster.forget(lane.topic)
                    self._come_home(lane, pending, code, message)
        finally:
            self._in_flight[broker] -= 1
            self._work.set()

    async def _exchange(
        self, broker: int, taken: list[tuple[Lane, Pending]]
    ) -> dict[tuple[str, int], tuple[ErrorCode, int, str | None]]:
        connection = await self.cluster.connection(broker)
        version = connection.version(Api.PRODUCE)
        ids = {lane.topic: self.cluster.topics[lane.topic].topic_id for lane, _ in taken}
        if version >= hot.PRODUCE_TOPIC_IDS and any(i is None for i in ids.values()):
            version = hot.PRODUCE_TOPIC_IDS - 1
        topics: dict[str, list[tuple[int, Sequence[Buffer]]]] = {}
        for lane, pending in taken:
            topics.setdefault(lane.topic, []).append((lane.partition, self._seal(pending)))
        frame = hot.produce_request(
            version,
            connection.take_id(),
            self.cluster.client_id,
            -1,
            self.limits.request_ms_max,
            [(name, ids[name], parts) for name, parts in topics.items()],
        )
        raw = await connection.exchange(connection._next_id, frame)
        reply = messages.read_response(Api.PRODUCE, version, raw)
        names = {topic_id: name for name, topic_id in ids.items()}
        return {
            (getattr(topic, "name", None) or names[topic.topic_id], part.index): (
                part.error_code, part.base_offset, getattr(part, "error_message", None),
            )
            for topic in reply.responses
            for part in topic.partition_responses
        }  # fmt: skip

    def _seal(self, pending: Pending) -> tuple[bytes, Buffer]:
        """The batch's header for this identity and its sequence, and the body as it is."""
        head = bytearray(HEADER_BYTES)
        HEADER.pack_into(
            head, 0, 0, len(pending.body) + HEADER_BYTES - batches.LOG_OVERHEAD_BYTES, -1, 2, 0,
            pending.codec, pending.count - 1, pending.base_timestamp, pending.max_timestamp,
            self.producer_id, self.producer_epoch, pending.sequence, pending.count,
        )  # fmt: skip
        crc = crc32c(pending.body, crc32c(memoryview(head)[batches.CRC_FROM :]))
        head[17:21] = crc.to_bytes(4, "big")
        return bytes(head), pending.body

    # -- outcomes

    def _deliver(self, lane: Lane, pending: Pending, offset: int) -> None:
        lane.in_flight.remove(pending)
        lane.pause_ms = 0
        self._finish(pending, offset)
        self._resend_if_home(lane)

    def _come_home(
        self, lane: Lane, pending: Pending, code: ErrorCode | None, message: str | None
    ) -> None:
        """A batch failed: it is sent again once all that was in flight with it has come home."""
        lane.in_flight.remove(pending)
        retriable = code is None or code in RETRIABLE
        if code in _LOST_ORDER:
            # behind a batch that failed and will be sent again this is expected; else order is lost
            retriable = bool(lane.returned) or any(
                before.sequence < pending.sequence for before in lane.in_flight
            )
        if retriable:
            lane.returned.append(pending)
        else:
            assert code is not None
            what = f"{pending.count:,} records to {lane.topic}-{lane.partition}"
            self._finish(pending, kafka_error(code, what, message))
            self._lose_identity(lane)
        self._resend_if_home(lane)

    def _resend_if_home(self, lane: Lane) -> None:
        if lane.returned and not lane.in_flight:
            lane.returned.sort(key=lambda pending: (pending.deadline, pending.sequence))
            lane.waiting.extendleft(reversed(lane.returned))
            lane.returned = []
            self._pause(lane)

    def _lose_identity(self, lane: Lane) -> None:
        """A sequence number was used up in vain: nothing is sent until there is a new identity."""
        self._lost_at = self._lost_at or f"{lane.topic}-{lane.partition}"

    def _leave_identity(self) -> None:
        """All is home: what was sent cannot be sent again under another identity."""
        for lane in self._lanes.values():
            lane.next_sequence = 0
            for pending in (*lane.returned, *lane.waiting):
                if pending.sent:
                    self._finish(
                        pending,
                        DeliveryTimeout(
                            f"{pending.count:,} records to {lane.topic}-{lane.partition} were "
                            f"given up: a batch before them in {self._lost_at} failed for good. "
                            "They may or may not be in the log."
                        ),
                    )
            lane.returned = []
            lane.waiting = deque(p for p in lane.waiting if not p.done.done())
        self.producer_id, self._lost_at = -1, ""

    def _pause(self, lane: Lane) -> None:
        limits = self.limits
        lane.pause_ms = min(max(lane.pause_ms * 2, limits.retry_first_ms), limits.retry_ms_max)
        loop = asyncio.get_running_loop()
        lane.pause_until = loop.time() + lane.pause_ms / 1000
        loop.call_at(lane.pause_until, self._work.set)

    def _expire(self) -> None:
        """Give up what has waited past its delivery time."""
        now = asyncio.get_running_loop().time()
        for lane in self._lanes.values():
            while lane.waiting and lane.waiting[0].deadline <= now:
                pending = lane.waiting.popleft()
                fate = "may or may not be" if pending.sent else "are not"
                self._finish(
                    pending,
                    DeliveryTimeout(
                        f"{pending.count:,} records to {lane.topic}-{lane.partition} were not "
                        f"acknowledged within {self.limits.delivery_ms_max / 1000:.0f} s; they "
                        f"{fate} in the log."
                    ),
                )
                if pending.sent:
                    self._lose_identity(lane)

    def _fail_waiting(self, lane: Lane, error: Exception) -> None:
        while lane.waiting:
            self._finish(lane.waiting.popleft(), error)

    def _fail_all(self) -> None:
        error = LedgerStreamError(f"The producer ended: {self._failure or 'it was closed'}.")
        for lane in self._lanes.values():
            for pending in (*lane.in_flight, *lane.returned, *lane.waiting):
                self._finish(pending, error)
            for _, future in lane.records:
                if not future.done():
                    future.set_exception(error)
        self._room.set()

    def _finish(self, pending: Pending, outcome: int | Exception) -> None:
        if pending.done.done():
            return
        self._buffered -= pending.size
        self._room.set()
        if isinstance(outcome, Exception):
            pending.done.set_exception(outcome)
            pending.done.exception()  # a caller that was cancelled never asks
        else:
            pending.done.set_result(outcome)


def _tell_each(done: asyncio.Future[int], futures: list[asyncio.Future[int]]) -> None:
    """A batch's outcome to each of its records."""
    error = done.exception()
    for place, future in enumerate(futures):
        if future.done():
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(done.result() + place)


async def _all(dones: list[asyncio.Future[int]]) -> None:
    """Wait for all, then raise the first error there was."""
    outcomes: list[Any] = await asyncio.gather(*dones, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
