"""The idempotent producer: each batch is in the log once, in order, however often it was sent.

Rows are encoded by kernels into batches a partition; single records are gathered for a few
milliseconds. `lane.py` holds a partition's batches in order and decides what is sent again;
`sender.py` sends them.
"""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ledgerstream.client.cluster import Cluster, KnownTopic
from ledgerstream.client.lane import Lane, Pending
from ledgerstream.client.sender import Sender
from ledgerstream.errors import ConfigError, LedgerStreamError
from ledgerstream.limits import Limits
from ledgerstream.wire import batches
from ledgerstream.wire.batches import HEADER_BYTES, Buffer, NewRecord

if TYPE_CHECKING:
    import numpy as np

    from ledgerstream.wire.columns import RowCodec, RowHeader

RECORD_OVERHEAD_BYTES = 70  # a header's and a record's lengths and deltas, at their longest


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
        self._gathering: dict[tuple[str, int], Gathering] = {}
        self._unsettled: set[asyncio.Future[int]] = set()
        self._coming: set[asyncio.Future[None]] = set()  # sends that wait for a topic, or for room
        self._buffered = 0
        self._room = asyncio.Event()
        self._queues: dict[str, asyncio.Lock] = {}  # topic → who waits is not overtaken
        self._refused: dict[str, tuple[float, LedgerStreamError]] = {}  # topic → when, and why
        self._turn: dict[str, int] = {}  # topic → the partition of its last keyless record
        self._closing = False
        self._stint = 0  # how many transactions have begun: what is sent belongs to one of them
        self._sender = self._make_sender()

    def _make_sender(self) -> Sender:
        return Sender(self.cluster, self._end)

    @property
    def closed(self) -> bool:
        """Whether `close` has nothing left to do."""
        return self._closing and self._sender.ended

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

        Sends to a partition stand there in the order in which they were begun, awaited or not.
        The offset is -1 where the broker knows only that it has the record. Raises KafkaError where
        the broker refused it for good, and DeliveryTimeout where time was up: it says whether the
        record may be in the log.
        """
        record = _record(key, value, timestamp, headers)
        if partition is not None:
            partition = whole("A partition", partition)
        self._check_open()
        stint, began = self._stint, asyncio.get_running_loop().time()
        size = (
            len(record.key or b"")
            + len(record.value or b"")
            + sum(len(name) + len(content or b"") + 10 for name, content in record.headers)
            + RECORD_OVERHEAD_BYTES
        )
        if size > self.limits.frame_bytes_max // 2:
            raise ConfigError(f"A record of {size:,} bytes is too large to be sent.")
        with self._coming_in(stint):
            async with self._queues.setdefault(topic, asyncio.Lock()):
                known = await self._topic(topic, began)
                if partition is None:
                    partition = self._choose(known, record.key)
                elif not 0 <= partition < known.partitions:
                    raise ConfigError(
                        f"Topic {topic!r} has {known.partitions} partitions; there is no "
                        f"{partition}."
                    )
                await self._wait_room(stint)
                done = self._gather((topic, partition), record, size)
        return await done

    async def write(
        self,
        topic: str,
        rows: np.ndarray,
        codec: RowCodec,
        *,
        stamps: np.ndarray | None = None,
        header: RowHeader | None = None,
    ) -> int:
        """All rows, in order within each partition; returns how many, once all are durable.

        stamps:  int64[n] ms; without it the rows' event time, or the time as it is now.
        header:  a record header for each row.

        Rows go to the partition that murmur2 of their key names, as Java's do; without a key, to
        all partitions in turn, a batch each. If it fails or is cancelled, some rows may be in the
        log; those of each partition that are there are there once and in order.
        """
        from ledgerstream.wire.columns import partition_order

        self._check_open()
        stint = self._stint
        dones: list[asyncio.Future[int]] = []
        with self._coming_in(stint):
            known = await self.cluster.topic(topic, create=True)
            order: list[tuple[int | None, np.ndarray | None]] = [(None, None)]
            if codec.key is not None:
                order = [
                    (partition, None if len(places) == len(rows) else places)
                    for partition, places in partition_order(codec.hashes(rows), known.partitions)
                ]
            bytes_max = self.limits.producer_batch_bytes - HEADER_BYTES
            row_bytes = codec.dtype.itemsize + 64
            for partition, places in order:
                mine = rows if places is None else rows[places]
                own_stamps = stamps if places is None or stamps is None else stamps[places]
                own_header = header if places is None or header is None else header[places]
                at = 0
                while at < len(mine):
                    await self._wait_room(stint)
                    now_ms = time.time_ns() // 1_000_000
                    some = slice(at, at + max(1, bytes_max // row_bytes))
                    part = mine[some]
                    times = (
                        codec.timestamps(part, now_ms) if own_stamps is None else own_stamps[some]
                    )
                    body = codec.encode(
                        part, now_ms, times, None if own_header is None else own_header[some]
                    )
                    if len(body) > bytes_max and len(part) > 1:
                        row_bytes = len(body) // len(part) * 9 // 8 + 1  # fewer rows to a batch
                        continue
                    at += len(part)
                    chosen = self._choose(known, None) if partition is None else partition
                    lane = self._sender.lane(topic, chosen)
                    span = int(times[0]), int(times.max())
                    dones.append(self._enqueue(lane, body.data, len(part), *span))
                    await asyncio.sleep(0)  # the sender sends while the next batch is encoded
        if dones:
            await asyncio.wait(dones)  # which leaves them alone if this is cancelled
        for done in dones:
            done.result()
        return len(rows)

    async def flush(self) -> None:
        """Return when everything sent so far is durable or has failed, awaited or not."""
        if self._coming:
            await asyncio.wait(set(self._coming))
        await self._settle()

    async def _settle(self) -> None:
        """Return when all that is in batches is durable or has failed."""
        for place in list(self._gathering):
            self._close_batch(place)
        if self._unsettled:
            await asyncio.wait(set(self._unsettled))

    async def close(self, *, flush: bool = True) -> None:
        """Flush (or fail what is not acknowledged), then end. Nothing can be sent from now on."""
        if flush and self._coming and not self._sender.ended:
            await asyncio.wait(set(self._coming))
        self._closing = True
        self._room.set()
        try:
            if flush and not self._sender.ended:
                await self.flush()
        finally:
            await self._sender.close()

    # -- batches

    @contextmanager
    def _coming_in(self, stint: int) -> Iterator[None]:
        """While records are on their way into batches. If they do not get there, their transaction
        is not what its caller takes it for, who may not have waited for them."""
        coming = asyncio.get_running_loop().create_future()
        self._coming.add(coming)
        try:
            yield
        except (LedgerStreamError, OSError, TimeoutError) as error:
            if stint == self._stint:
                self._failed(error, doubtful=False)
            raise
        finally:
            self._coming.discard(coming)
            coming.set_result(None)

    def _gather(self, place: tuple[str, int], record: NewRecord, size: int) -> asyncio.Future[int]:
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
        return done

    def _check_open(self) -> None:
        if self._sender.failure is not None:
            raise LedgerStreamError(f"The producer has failed: {self._sender.failure!r}")
        if self._closing:
            raise LedgerStreamError("The producer is closed.")

    async def _wait_room(self, stint: int) -> None:
        """Back-pressure: not more than `producer_buffer_bytes` on the way. It is open afterwards,
        and the transaction is still the one that it was.

        There is room again when a batch is settled, which its time limit sees to.
        """
        self._check_open()
        while self._buffered >= self.limits.producer_buffer_bytes:
            self._room.clear()
            await self._room.wait()
            self._check_open()
        if stint != self._stint:
            raise LedgerStreamError(
                "The transaction in which this was sent has ended without it.",
                "Await each send before the end of its transaction.",
            )

    async def _topic(self, name: str, began: float) -> KnownTopic:
        """Whoever waited while one before it learnt that there is no such topic hears the same."""
        at, error = self._refused.get(name, (0.0, None))
        if error is not None and began <= at:
            raise error
        try:
            return await self.cluster.topic(name, create=True)
        except LedgerStreamError as failed:
            self._refused[name] = asyncio.get_running_loop().time(), failed
            raise

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
            self._sender.lane(*place),
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
                self._failed(outcome, doubtful=pending.doubtful)
                done.set_exception(outcome)
                done.exception()  # a caller that was cancelled never asks
            else:
                self._delivered()
                done.set_result(outcome)

        deadline = loop.time() + self.limits.delivery_ms_max / 1000
        span = base_timestamp, max_timestamp
        pending = Pending(body, count, *span, self.codec, deadline, settle)
        lane.waiting.append(pending)
        self._buffered += size
        self._unsettled.add(done)
        self._sender.wake()
        return done

    def _delivered(self) -> None:
        """A batch is in the log."""

    def _failed(self, error: Exception, *, doubtful: bool) -> None:
        """A batch was not delivered. `doubtful`: it may be in the log, or still on its way."""

    def _end(self, error: LedgerStreamError) -> None:
        """The sender is over: what was gathered for it fails, and nobody waits for room."""
        for gathering in self._gathering.values():
            assert gathering.linger is not None
            gathering.linger.cancel()
            for _, done in gathering.records:
                if not done.done():
                    done.set_exception(error)
        self._gathering = {}
        self._room.set()


def _record(
    key: bytes | None,
    value: bytes | None,
    timestamp: int | None,
    headers: Sequence[tuple[str, bytes | None]],
) -> NewRecord:
    """A record that can be encoded whatever happens later. Raises ConfigError."""
    if timestamp is None:
        timestamp = time.time_ns() // 1_000_000
    timestamp = whole("A record's timestamp", timestamp)
    if not 0 <= timestamp < 2**63:
        raise ConfigError(f"A record's timestamp is ms since 1970, not {timestamp}.")
    named = []
    for name, content in headers:
        if not isinstance(name, str):
            raise ConfigError(f"A record header's name is text, not {type(name).__name__}.")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"A record header's name {name!r} is no UTF-8: {error}.") from error
        named.append((name, _content(f"header {name!r}", content)))
    return NewRecord(_content("key", key), _content("value", value), timestamp, tuple(named))


def _content(what: str, given: Buffer | None) -> bytes | None:
    """A part of a record as bytes: those of a view, whatever it is a view of."""
    if given is None or isinstance(given, bytes):
        return given
    if isinstance(given, (bytearray, memoryview)):
        return bytes(given)
    raise ConfigError(f"A record's {what} is bytes or None, not {type(given).__name__}.")


def whole(what: str, given: object) -> int:
    """An integer of any type as Python's. Raises ConfigError."""
    try:
        return operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{what} is an integer, not {given!r}.") from None


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
