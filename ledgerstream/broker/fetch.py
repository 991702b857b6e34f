"""Fetch: bytes out, as they stand in the log, up to what is durable and decided.

A fetch is begun when it is its turn on its connection. If there is not enough yet, it parks at its
partitions and is woken by the round that moves their high watermark, not by polling. Data that is
neither in memory nor in the page cache is read by a thread: the loop never waits for a disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import structlog
from kio.schema.errors import ErrorCode

from ledgerstream.broker.replica import Replica
from ledgerstream.broker.server import Exchange
from ledgerstream.broker.sessions import Begun, Followed, Place
from ledgerstream.errors import CorruptError
from ledgerstream.log import Partition, Read
from ledgerstream.wire import messages
from ledgerstream.wire.hot import FETCH_TOPIC_IDS, Fetched, FetchedTopic, fetch_reply

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

log = structlog.get_logger("broker")

READ_COMMITTED = 1
NONE = 0
NO_OFFSET = -1


def handle(node: Node, exchange: Exchange) -> None:
    fetch = Fetch(node, exchange)
    exchange.begin = fetch.begin
    exchange.connection.flush()


class Fetch:
    """A Fetch request under way."""

    __slots__ = (
        "begun", "bytes_max", "committed", "deadline", "done", "exchange", "node", "parked_at",
        "request", "timer", "version", "woken",
    )  # fmt: skip

    def __init__(self, node: Node, exchange: Exchange) -> None:
        self.node, self.exchange = node, exchange
        self.request = exchange.message
        self.version = exchange.header.version
        self.committed = self.request.isolation_level == READ_COMMITTED
        self.bytes_max = 0
        self.deadline = 0.0
        self.parked_at: list[Replica] = []
        self.timer: asyncio.TimerHandle | None = None
        self.woken = self.done = False
        self.begun: Begun | None = None

    def begin(self) -> None:
        """It is this request's turn."""
        node, request = self.node, self.request
        wait_ms = min(max(messages.ms(request.max_wait), 0), node.limits.fetch_wait_ms_max)
        self.deadline = node.loop.time() + wait_ms / 1000
        by_id = self.version >= FETCH_TOPIC_IDS
        self.begun = node.sessions.begin(
            getattr(request, "session_id", 0),
            getattr(request, "session_epoch", -1),
            [_followed(node, topic, part, by_id) for topic in request.topics
             for part in topic.partitions],
            _forgotten(request, by_id),
            by_id,
        )  # fmt: skip
        if self.begun.error is not ErrorCode.none:
            self._send([], int(self.begun.error.value))
            return
        self.attempt()

    def attempt(self) -> None:
        """Read what there is; reply if it is enough or the time is up, else wait for more."""
        self.woken = False
        if self.done or self.exchange.connection.closing:
            self._leave()
            return
        self.bytes_max = self._budget()
        results: list[Fetched] = []
        cold, total = [], 0
        assert self.begun is not None
        for one in self.begun.followed:
            fetched, is_cold = self._read(one, self.bytes_max - total, total == 0)
            if is_cold:
                cold.append(len(results))
            total += fetched.size
            results.append(fetched)
        if cold:
            self._leave()
            self.done = True
            self.node.spawn(
                self.node.dispatch.finish(self.exchange, self._finish_cold(results, cold))
            )
            return
        self._reply_or_park(results, total)

    def finish_now(self) -> None:
        """The time is up, or the broker stops: answer with what there is.

        The clock is not asked again: a timer may run a rounding error before its time.
        """
        self.deadline = 0.0
        self.attempt()

    def _reply_or_park(self, results: list[Fetched], total: int) -> None:
        refused = any(result.error for result in results)
        late = self.node.loop.time() >= self.deadline or self.node.stopping
        if total >= self.request.min_bytes or refused or late or not results:
            self._leave()
            self.done = True
            self._send(results)
        elif self.timer is None:
            self._park()

    def _park(self) -> None:
        assert self.begun is not None
        for one in self.begun.followed:
            replica = _replica(self.node, one)
            if replica is not None:
                replica.parked.add(self._wake)
                self.parked_at.append(replica)
        self.timer = self.node.loop.call_at(
            self.deadline, self.node.dispatch.go_on, self.exchange, self.finish_now
        )
        self.node.parked.add(self)

    def _wake(self) -> None:
        """A round moved a partition: look again, once however many it moved."""
        if not self.woken:
            self.woken = True
            self.node.loop.call_soon(self.node.dispatch.go_on, self.exchange, self.attempt)

    def _leave(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.node.parked.discard(self)
        for replica in self.parked_at:
            replica.parked.discard(self._wake)
        self.parked_at = []

    def _budget(self) -> int:
        """How much this reply may carry, so that all replies together stay bounded."""
        limits, server = self.node.limits, self.node.server
        asked = min(getattr(self.request, "max_bytes", 2**31 - 1), limits.fetch_bytes_max)
        left = (limits.replies_bytes_max - server.unsent_bytes) // 2
        return max(min(asked, left), min(asked, limits.fetch_bytes_low), 1)

    def _read(self, one: Followed, bytes_left: int, first: bool) -> tuple[Fetched, bool]:
        """What the partition has, and whether it must be read by a thread."""
        replica = _replica(self.node, one)
        if replica is None:
            unknown = _refused(one, _unknown(self.node, one))
            return unknown._replace(aborted=()), False
        partition = replica.partition
        if error := leader_epoch_error(one.leader_epoch, partition.leader_epoch):
            return _refused(one, error), False
        if partition.failure is not None:
            return _refused(one, ErrorCode.kafka_storage_error), False
        if one.last_epoch >= 0:
            epoch, end = partition.epoch_end(one.last_epoch)
            if epoch < one.last_epoch or end < one.offset:
                return self._fetched(one, replica, [])._replace(diverging=(epoch, end)), False
        if not partition.log_start_offset <= one.offset <= partition.next_offset:
            return _refused(one, ErrorCode.offset_out_of_range), False
        end = partition.last_stable_offset if self.committed else partition.high_watermark
        if one.offset >= end or bytes_left <= 0 or (one.bytes_max <= 0 and not first):
            return self._fetched(one, replica, []), False
        read = partition.read(one.offset, self._part_bytes(one, bytes_left), end)
        aborted = None
        if read is not None:
            aborted = partition.aborted(one.offset, read.bound) if self.committed else ()
        if read is None or aborted is None:
            return self._fetched(one, replica, []), True
        return self._fetched(one, replica, read.data, aborted), False

    @staticmethod
    def _part_bytes(one: Followed, bytes_left: int) -> int:
        return max(min(one.bytes_max, bytes_left), 1)

    def _fetched(
        self,
        one: Followed,
        replica: Replica,
        data: Sequence[Any],
        aborted: Sequence[tuple[int, int]] = (),
    ) -> Fetched:
        partition = replica.partition
        return Fetched(
            one.index,
            NONE,
            partition.high_watermark,
            partition.last_stable_offset,
            partition.log_start_offset,
            aborted if self.committed else None,
            data,
        )

    async def _finish_cold(self, results: list[Fetched], cold: list[int]) -> None:
        assert self.begun is not None
        left = self.bytes_max - sum(result.size for result in results)
        for place in cold:
            one = self.begun.followed[place]
            replica = _replica(self.node, one)
            if left <= 0 or replica is None:
                continue
            partition = replica.partition
            end = partition.last_stable_offset if self.committed else partition.high_watermark
            try:
                read, aborted = await self.node.loop.run_in_executor(
                    self.node.readers, _read_cold, partition, one.offset,
                    self._part_bytes(one, left), end, self.committed,
                )  # fmt: skip
            except (CorruptError, OSError) as error:
                if partition.deleted:
                    results[place] = _refused(one, _unknown(self.node, one))
                    continue
                log.error("partition cannot be read", partition=str(partition.key), why=str(error))
                self.node.read_failures[str(partition.key)] = str(error)
                results[place] = _refused(one, ErrorCode.kafka_storage_error)
                continue
            results[place] = self._fetched(one, replica, read.data, aborted)
            left -= read.size
        self._send(results)

    def _send(self, results: list[Fetched], error: int = NONE) -> None:
        assert self.begun is not None
        session = self.begun.session
        topics: dict[Place, tuple[Followed, list[Fetched]]] = {}
        moved = []
        for one, result in zip(self.begun.followed, results, strict=not error):
            told = (result.high_watermark, result.last_stable, result.log_start)
            news = result.records or result.error or result.diverging or told != one.told
            if self.begun.incremental and not news:
                continue
            one.told = None if result.error else told
            if result.records:
                moved.append(one.place)
            topics.setdefault((one.topic_id or one.name, 0), (one, []))[1].append(result)
        if session is not None:
            for place in moved:  # others go first next time
                if place in session.followed:
                    session.followed.move_to_end(place)
        header = self.exchange.header
        self.exchange.send(
            fetch_reply(
                header.version,
                header.correlation_id,
                [FetchedTopic(one.name, one.topic_id, parts) for one, parts in topics.values()],
                error=error,
                session_id=session.session_id if session is not None else 0,
            )
        )


def _read_cold(
    partition: Partition, offset: int, bytes_max: int, end: int, committed: bool
) -> tuple[Read, Sequence[tuple[int, int]]]:
    """Blocks. Raises CorruptError, OSError."""
    while True:
        segments = partition.segments
        read = partition.read_cold(offset, bytes_max, end)
        aborted = partition.aborted_cold(offset, read.bound) if committed else ()
        if partition.segments is segments:  # data and index are of one compaction
            return read, aborted


def leader_epoch_error(asked: int, ours: int) -> ErrorCode | None:
    """KIP-320: the reader knows an older leader epoch than ours, or a newer one."""
    if asked < 0 or asked == ours:
        return None
    return ErrorCode.fenced_leader_epoch if asked < ours else ErrorCode.unknown_leader_epoch


def _followed(node: Node, topic: Any, part: Any, by_id: bool) -> Followed:
    topic_id = topic.topic_id if by_id else None
    name = "" if by_id else topic.topic
    return Followed(
        name,
        topic_id,
        part.partition,
        part.fetch_offset,
        part.partition_max_bytes,
        getattr(part, "current_leader_epoch", -1),
        getattr(part, "last_fetched_epoch", -1),
    )


def _forgotten(request: Any, by_id: bool) -> list[Place]:
    return [
        (topic.topic_id if by_id else topic.topic, index)
        for topic in getattr(request, "forgotten_topics_data", ())
        for index in topic.partitions
    ]


def _replica(node: Node, one: Followed) -> Replica | None:
    if one.topic_id is not None:
        return node.replicas.of(one.topic_id, one.index)
    return node.replicas.named(one.name, one.index)


def _unknown(node: Node, one: Followed) -> ErrorCode:
    if one.topic_id is not None and one.topic_id not in node.catalog.by_id:
        return ErrorCode.unknown_topic_id
    return ErrorCode.unknown_topic_or_partition


def _refused(one: Followed, error: ErrorCode) -> Fetched:
    return Fetched(one.index, int(error.value), NO_OFFSET, NO_OFFSET, NO_OFFSET, None, ())
