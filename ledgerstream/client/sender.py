"""What sends a producer's batches: requests, leaders, the producer id, time.

The loop itself never waits for the network: what takes time is a task of its own, so that time
limits hold whatever hangs.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from crc32c import crc32c
from kio.schema.errors import ErrorCode

from ledgerstream.client.cluster import TRANSPORT_ERRORS, Cluster, words
from ledgerstream.client.connection import Connection
from ledgerstream.client.errors import RETRIABLE, kafka_error
from ledgerstream.client.lane import Lane, Pending
from ledgerstream.errors import DeliveryTimeout, LedgerStreamError, SecurityError
from ledgerstream.limits import Limits
from ledgerstream.wire import batches, hot
from ledgerstream.wire.batches import HEADER, HEADER_BYTES, Buffer
from ledgerstream.wire.versions import Api

Answers = dict[tuple[str, int], tuple[ErrorCode, int, str | None]]
Taken = list[tuple[Lane, Pending, Sequence[Buffer]]]


class Sender:
    """Sends what waits in its lanes until `close`.

    on_end:   told the error that all that still waits fails with, when it is over.
    failure:  the error that none foresaw, and that ended it.
    """

    txn_id: str | None = None  # of a transactional one: see `client/transactional.py`
    produce_version_max = hot.PRODUCE_VERSION_MAX
    attributes = 0  # of each batch

    def __init__(self, cluster: Cluster, on_end: Callable[[LedgerStreamError], None]) -> None:
        self.cluster = cluster
        self.limits: Limits = cluster.limits
        self.lanes: dict[tuple[str, int], Lane] = {}
        self.failure: BaseException | None = None
        self._on_end = on_end
        self._identity: tuple[int, int] | None = None  # what a lane without one takes
        self._requests: set[asyncio.Task[None]] = set()
        self._in_flight: dict[int, int] = {}  # broker → requests under way
        self._chores: dict[str, asyncio.Task[None]] = {}
        self._work = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._running = asyncio.ensure_future(self._run())

    @property
    def ended(self) -> bool:
        return self._running.done()

    def lane(self, topic: str, partition: int) -> Lane:
        """Where batches of a partition wait; `wake` when one more does."""
        lane = self.lanes.get((topic, partition))
        if lane is None:
            lane = self.lanes[topic, partition] = self._make_lane(topic, partition)
        return lane

    def _make_lane(self, topic: str, partition: int) -> Lane:
        return Lane(topic, partition)

    def wake(self) -> None:
        """There is something to send."""
        self._work.set()

    async def close(self) -> None:
        """End at once; what waits fails."""
        self._running.cancel()
        tasks = [*self._requests, *self._chores.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(self._running, *tasks, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                self._step()
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                self.failure = error
            raise
        finally:
            self._end()

    def _step(self) -> None:
        """Give up what is too old, send what can be sent, start what is missing for the rest."""
        now = asyncio.get_running_loop().time()
        wake_at = math.inf
        by_broker: dict[int, list[Lane]] = {}
        busy = [lane for lane in self.lanes.values() if lane.waiting]
        for lane in sorted(busy, key=lambda lane: lane.waiting[0].deadline):
            lane.expire(now, self.limits.delivery_ms_max)
            if not lane.waiting:
                continue
            wake_at = min(wake_at, lane.waiting[0].deadline)
            if not self._may_send(lane):
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
            taken.append((lane, pending, _seal(lane, pending, self.attributes)))
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
        shut_out: SecurityError | None = None
        try:
            async with asyncio.timeout_at(deadline):
                opened = await self.cluster.connection(broker)
            known = {lane.topic: self.cluster.topics.get(lane.topic) for lane, _, _ in taken}
            ids = {name: topic.topic_id for name, topic in known.items() if topic is not None}
            if len(ids) == len(known):
                connection = opened
                answers = await self._exchange(connection, taken, ids, deadline)
            else:
                trouble = "one of its topics was deleted here meanwhile"
        except (LedgerStreamError, *TRANSPORT_ERRORS) as error:
            trouble = words(error)
            shut_out = error if isinstance(error, SecurityError) else None
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
        if shut_out is not None:
            self._no_way([lane for lane, _, _ in taken], shut_out)

    async def _exchange(
        self, connection: Connection, taken: Taken, ids: Mapping[str, UUID | None], deadline: float
    ) -> Answers:
        version = min(connection.version(Api.PRODUCE), self.produce_version_max)
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
            self.txn_id,
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
            self.failure = self.failure or error
            self._running.cancel()

    def _may_send(self, lane: Lane) -> bool:
        """Whether it has an identity; if not, one is on its way."""
        if lane.identity is not None:
            return True
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
                    "enable2_pc": False,
                    "keep_prepared_txn": False,
                },
            )
            if reply.error_code is not ErrorCode.none:
                raise kafka_error(reply.error_code, "A producer id")
            return reply.producer_id, reply.producer_epoch

        try:
            self._identity = await self.cluster.retrying("a producer id", ask)
        except (LedgerStreamError, *TRANSPORT_ERRORS) as error:
            nameless = [lane for lane in self.lanes.values() if lane.identity is None]
            self._no_way(nameless, error)

    async def _look_up(self, topic: str) -> None:
        """Ask who leads a topic's partitions."""
        try:
            known = await self.cluster.topic(topic)
        except (LedgerStreamError, *TRANSPORT_ERRORS) as error:
            self._no_way([lane for lane in self.lanes.values() if lane.topic == topic], error)
            return
        now = asyncio.get_running_loop().time()
        for lane in self.lanes.values():
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
        error = LedgerStreamError(f"The producer ended: {self.failure or 'it was closed'}.")
        self._on_end(error)
        for lane in self.lanes.values():
            lane.fail_all(error)


def _seal(lane: Lane, pending: Pending, attributes: int) -> tuple[bytes, Buffer]:
    """The batch's header for its lane's identity and its sequence, and the body as it is."""
    assert lane.identity is not None
    head = bytearray(HEADER_BYTES)
    HEADER.pack_into(
        head, 0, 0, len(pending.body) + HEADER_BYTES - batches.LOG_OVERHEAD_BYTES, -1, 2, 0,
        pending.codec | attributes, pending.count - 1, pending.base_timestamp,
        pending.max_timestamp, *lane.identity, pending.sequence, pending.count,
    )  # fmt: skip
    crc = crc32c(pending.body, crc32c(memoryview(head)[batches.CRC_FROM :]))
    head[17:21] = crc.to_bytes(4, "big")
    return bytes(head), pending.body
