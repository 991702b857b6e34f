"""Reading by assignment: batches from offsets on, fetched ahead while the last are worked on.

A chunk is whole batches of one partition as they stand in the log; `wire/columns.py` makes columns
of it without an object a record. Under read_committed, batches of aborted transactions are cut
out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from uuid import UUID

from kio.schema.errors import ErrorCode

from ledgerstream.client.cluster import TRANSPORT_ERRORS, Cluster, words
from ledgerstream.client.connection import Connection
from ledgerstream.client.errors import check, kafka_error
from ledgerstream.errors import DeliveryTimeout, KafkaError, LedgerStreamError
from ledgerstream.wire import batches
from ledgerstream.wire.hot import FETCH_TOPIC_IDS
from ledgerstream.wire.versions import Api

NOBODY = -1  # in a broker's place: whoever leads is not known
# what a reader settles by itself, by asking for the leader again
_MOVED = frozenset({
    ErrorCode.not_leader_or_follower, ErrorCode.leader_not_available,
    ErrorCode.unknown_topic_or_partition, ErrorCode.unknown_topic_id,
    ErrorCode.fenced_leader_epoch, ErrorCode.unknown_leader_epoch,
    ErrorCode.replica_not_available, ErrorCode.kafka_storage_error,
    ErrorCode.offset_not_available, ErrorCode.inconsistent_topic_id,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole batches of one partition, as they stand in the log.

    `headers(data)` of `ledgerstream.wire.batches` names each and where it is, `records(data, at)`
    has its records, those before `start` too; a `control` batch has markers instead.

    `data` may begin before `start` (the offset that was asked for) and ends before `next_offset`.
    `end_offset` is where a reader of this isolation level could read to when it was fetched.
    """

    partition: int
    start: int
    data: bytes
    next_offset: int
    end_offset: int
    log_start: int


class Reader:
    """Reads partitions of one topic from given offsets on. Use `client.reader(...)`."""

    def __init__(
        self,
        cluster: Cluster,
        topic: str,
        starts: Mapping[int, int],
        *,
        committed: bool = True,
        topic_id: UUID | None = None,
    ) -> None:
        self.cluster, self.topic, self.committed = cluster, topic, committed
        self.topic_id = topic_id  # offsets mean nothing in another topic of the same name
        self.positions: dict[int, int] = dict(starts)  # where fetching goes on
        self.end_offsets: dict[int, int] = {}  # as last told
        # of one fetch, and no further one is begun while so much is read ahead
        self.fetch_bytes = cluster.limits.reader_fetch_bytes
        self._ready: deque[Chunk] = deque()
        self._buffered = 0
        self._fetching: dict[int, asyncio.Task[None]] = {}  # broker → its fetch
        # a fetch waits at the broker: what else is asked must not wait behind it
        self._connections: dict[int, Connection] = {}
        self._arrived = asyncio.Event()
        self._failure: tuple[int | None, Exception] | None = None  # and whose it is, if one's
        self._failing_since: dict[int, float] = {}  # partition → since when nothing works
        self._turn: dict[int, int] = {}  # partition → when it last gave data, for fairness
        self._turns = 0
        self.closed = False

    async def next(self, wait_ms: int | None = None) -> Chunk | None:
        """The next chunk of any partition; None if there was nothing new for `wait_ms`.

        Raises KafkaError for what the broker refuses for good (OFFSET_OUT_OF_RANGE: the log no
        longer has the offset), DeliveryTimeout if a partition could not be read for the delivery
        time limit. Cancelling it loses nothing. One caller at a time.
        """
        limits = self.cluster.limits
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (limits.reader_wait_ms if wait_ms is None else wait_ms) / 1000
        while True:
            if self.closed:
                raise LedgerStreamError("The reader is closed.")
            if self._fetch_ahead() and self._ready:
                await asyncio.sleep(0)  # the request is on its way before the caller works on
            if self._ready:
                chunk = self._ready.popleft()
                self._buffered -= len(chunk.data)
                return chunk
            if self._failure is not None:
                (_, failure), self._failure = self._failure, None
                raise failure
            left = deadline - loop.time()
            if left <= 0:
                return None
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                pass  # what came at the same moment is taken all the same

    def seek(self, partition: int, offset: int) -> None:
        """Go on at another offset; what was fetched ahead of the partition is dropped."""
        self.positions[partition] = offset
        kept = [chunk for chunk in self._ready if chunk.partition != partition]
        self._ready = deque(kept)
        self._buffered = sum(len(chunk.data) for chunk in kept)
        self._failing_since.pop(partition, None)
        if self._failure is not None and self._failure[0] == partition:
            self._failure = None

    def drop(self, partition: int) -> None:
        """Read this partition no more."""
        self.seek(partition, 0)
        del self.positions[partition]

    async def close(self) -> None:
        """End the fetches. `next`, where it waits, raises."""
        self.closed = True
        self._arrived.set()
        tasks = list(self._fetching.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in self._connections.values():
            connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # -- fetching

    def _fetch_ahead(self) -> bool:
        """Keep one fetch a broker under way while there is room for what it brings.

        Whether any was begun. What is handed out next takes no room.
        """
        ahead = self._buffered - (len(self._ready[0].data) if self._ready else 0)
        if ahead >= self.fetch_bytes or self._failure is not None:
            return False
        by_broker: dict[int, list[int]] = {}
        for partition in sorted(self.positions, key=lambda p: self._turn.get(p, 0)):
            broker = self.cluster.known_leader(self.topic, partition)
            by_broker.setdefault(NOBODY if broker is None else broker, []).append(partition)
        begun = False
        for broker, partitions in by_broker.items():
            if broker not in self._fetching:
                asked = {partition: self.positions[partition] for partition in partitions}
                task = asyncio.ensure_future(self._fetch(broker, asked))
                self._fetching[broker] = task
                task.add_done_callback(lambda task, broker=broker: self._fetched(broker, task))  # type: ignore[misc]
                begun = True
        return begun

    def _fetched(self, broker: int, task: asyncio.Task[None]) -> None:
        del self._fetching[broker]
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._failure = None, error
        self._arrived.set()

    async def _fetch(self, broker: int, asked: Mapping[int, int]) -> None:
        try:
            if broker == NOBODY:
                for partition in asked:
                    await self.cluster.leader(self.topic, partition)
                return
            reply = await self._ask(broker, asked)
            check(getattr(reply, "error_code", ErrorCode.none), f"Fetch of {self.topic}")
        except (LedgerStreamError, *TRANSPORT_ERRORS) as error:
            self.cluster.forget(self.topic)
            if _passing(error):
                await self._wait_again(list(asked), error)
            else:
                self._failure = None, error
            return
        troubles = {
            part.partition_index: trouble
            for topic in reply.responses
            for part in topic.partitions
            if (trouble := self._take(part, asked)) is not None
        }
        told = {part.partition_index for topic in reply.responses for part in topic.partitions}
        for partition in asked.keys() - told:
            place = f"{self.topic}-{partition}"
            troubles[partition] = kafka_error(
                ErrorCode.network_exception, place, "the broker left it out of its answer"
            )
        for partition in asked:
            if partition not in troubles:
                self._failing_since.pop(partition, None)
        for partition, trouble in troubles.items():
            if not trouble.retriable:
                self._failure = partition, trouble
                return
        if troubles:
            await self._wait_again(list(troubles), next(iter(troubles.values())))

    async def _ask(self, broker: int, asked: Mapping[int, int]) -> Any:
        limits, cluster = self.cluster.limits, self.cluster
        connection = self._connections.get(broker)
        if connection is None or not connection.is_open:
            connection = self._connections[broker] = await cluster.dedicated(broker)
        known = await cluster.topic(self.topic)
        self.topic_id = self.topic_id or known.topic_id
        if known.topic_id not in (None, self.topic_id):
            raise recreated(self.topic)
        fields: dict[str, Any] = {
            "replica_id": -1,
            "max_wait": limits.reader_wait_ms,
            "min_bytes": 1,
            "max_bytes": self.fetch_bytes,
            "isolation_level": 1 if self.committed else 0,
            "session_id": 0,
            "session_epoch": -1,
            "forgotten_topics_data": [],
            "rack_id": "",
            "topics": [{
                "topic": self.topic,
                "topic_id": known.topic_id,
                "partitions": [{
                    "partition": partition,
                    "current_leader_epoch": known.epochs.get(partition, -1),
                    "fetch_offset": offset,
                    "last_fetched_epoch": -1,
                    "log_start_offset": -1,
                    "partition_max_bytes": min(limits.reader_partition_bytes, self.fetch_bytes),
                } for partition, offset in asked.items()],
            }],
        }  # fmt: skip
        version = connection.version(Api.FETCH)
        if version >= FETCH_TOPIC_IDS and known.topic_id is None:
            connection.versions[Api.FETCH] = FETCH_TOPIC_IDS - 1
        timeout_ms = limits.request_ms_max + limits.reader_wait_ms
        return await connection.call(Api.FETCH, fields, timeout_ms)

    def _take(self, part: Any, asked: Mapping[int, int]) -> KafkaError | None:
        partition = part.partition_index
        start = asked.get(partition)
        if start is None or self.positions.get(partition) != start:
            return None  # sought elsewhere meanwhile
        if part.error_code is not ErrorCode.none:
            error = kafka_error(part.error_code, f"{self.topic}-{partition} at {start:,}")
            if part.error_code in _MOVED:
                self.cluster.forget(self.topic)
                error.retriable = True
            return error
        end = part.last_stable_offset if self.committed else part.high_watermark
        if end < 0:
            end = part.high_watermark
        self.end_offsets[partition] = end
        data = part.records or b""
        if not data:
            return None
        if not all(batches.crc_matches(data, at, h) for at, h in batches.headers(data)):
            return kafka_error(ErrorCode.corrupt_message, f"{self.topic}-{partition} at {start:,}")
        data, next_offset = _committed(data, part.aborted_transactions or (), start)
        if next_offset == start:  # the first batch is sent whole, however large it is (KIP-74)
            place = f"{self.topic}-{partition} at {start:,}"
            return kafka_error(
                ErrorCode.corrupt_message, place, "what was sent has no whole batch from there on"
            )
        self.positions[partition] = next_offset
        self._turns += 1
        self._turn[partition] = self._turns
        self._ready.append(
            Chunk(partition, start, data, next_offset, end, getattr(part, "log_start_offset", 0))
        )
        self._buffered += len(data)
        return None

    async def _wait_again(self, partitions: Sequence[int], error: Exception) -> None:
        """Something that may pass: wait a little, and give up when it has lasted too long."""
        limits, now = self.cluster.limits, asyncio.get_running_loop().time()
        for partition in partitions:
            self._failing_since.setdefault(partition, now)
        lasted_ms = (now - min(self._failing_since[partition] for partition in partitions)) * 1000
        pause_ms = min(max(lasted_ms, limits.retry_first_ms), limits.retry_ms_max)
        if lasted_ms + pause_ms > limits.delivery_ms_max:
            for partition in partitions:
                del self._failing_since[partition]
            what = f"{self.topic} could not be read for {lasted_ms / 1000:g} s: {words(error)}"
            self._failure = None, DeliveryTimeout(what)
            return
        await asyncio.sleep(pause_ms / 1000)


def recreated(topic: str) -> KafkaError:
    """The refusal to read on in a topic that only has the name of the one that was read."""
    error = kafka_error(
        ErrorCode.inconsistent_topic_id, topic, "the topic was deleted and created again"
    )
    error.retriable = False
    return error


def _passing(error: Exception) -> bool:
    """Whether it is worth asking again after an error."""
    if isinstance(error, KafkaError):
        return error.retriable
    return isinstance(error, TRANSPORT_ERRORS)


def _committed(data: bytes, aborted: Sequence[Any], start: int) -> tuple[bytes, int]:
    """The batches without those of aborted transactions, and the offset after the last of them."""
    next_offset = start
    if not aborted:
        for _, header in batches.headers(data):
            next_offset = max(next_offset, header.next_offset)
        return data, next_offset
    opens = deque(sorted((entry.first_offset, entry.producer_id) for entry in aborted))
    aborting: set[int] = set()
    whole = memoryview(data)
    kept: list[memoryview] = []  # runs of batches: each is copied once, whatever its length
    run_at = end = 0
    for at, header in batches.headers(data):
        while opens and opens[0][0] < header.next_offset:
            aborting.add(opens.popleft()[1])
        next_offset = max(next_offset, header.next_offset)
        end = at + header.size
        if header.control:
            aborting.discard(header.producer_id)
        elif header.transactional and header.producer_id in aborting:
            kept.append(whole[run_at:at])
            run_at = end
    kept.append(whole[run_at:end])
    return b"".join(kept), next_offset
