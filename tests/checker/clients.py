"""Two clients behind one face: confluent-kafka, whose transactions are V1, and our own, V2.

Each reads what is assigned by hand or, as a member of a group, what its group assigns. What they do
and see is recorded here, at the call. An error that spoils a transaction is `Spoilt`: it can be
aborted. Any other leaves a client that cannot go on.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import confluent_kafka as ck

from ledgerstream.client import Client, Reader, TransactionalProducer, TransactionError
from ledgerstream.client.membership import Group, Listener, NotAssigned, Places
from ledgerstream.client.transaction import Phase
from ledgerstream.limits import LIMITS
from ledgerstream.wire import batches
from tests.checker.history import Found, Outcome, Partition, Recorder

REQUEST_MS, DELIVERY_MS, TRANSACTION_MS, CALL_S = 800, 5_000, 6_000, 4.0
SESSION_MS, HEARTBEAT_MS = 6_000, 300


class Spoilt(Exception):
    """The transaction can only be aborted."""


def split(partition: Partition) -> tuple[str, int]:
    topic, _, index = partition.rpartition("-")
    return topic, int(index)


class Face(Protocol):
    """Of a transactional producer and a consumer."""

    async def open(self) -> None: ...
    async def assign(self, positions: Mapping[Partition, int]) -> None: ...
    async def go_back(self, group: str) -> None:
        """Read again from what the group has committed."""

    async def poll(self, records_max: int, wait_s: float) -> Found: ...
    async def begin(self) -> None: ...
    async def send(self, partition: Partition, value: str) -> None: ...
    async def send_offsets(self, group: str, offsets: Mapping[Partition, int]) -> None: ...
    async def end(self, *, committed: bool) -> Outcome: ...
    async def close(self) -> None: ...


class Confluent:
    """librdkafka. With `topic` and `group` its consumer is a member, and else it is assigned."""

    def __init__(self, address: str, txn_id: str, rec: Recorder, subscribe: tuple[str, str] | None):
        self._rec, self._subscribe = rec, subscribe
        common = {
            "bootstrap.servers": address, "socket.timeout.ms": REQUEST_MS, "client.id": txn_id,
            "reconnect.backoff.ms": 20, "reconnect.backoff.max.ms": 200, "log_level": 0,
        }  # fmt: skip
        self._producer = ck.Producer({
            **common, "transactional.id": txn_id, "linger.ms": 0, "retry.backoff.ms": 20,
            "transaction.timeout.ms": TRANSACTION_MS, "message.timeout.ms": DELIVERY_MS,
        })  # fmt: skip
        self._consumer = ck.Consumer({
            **common, "group.id": subscribe[1] if subscribe else "nobody",
            "enable.auto.commit": False, "isolation.level": "read_committed",
            "session.timeout.ms": SESSION_MS, "heartbeat.interval.ms": HEARTBEAT_MS,
            "fetch.wait.max.ms": 50, "fetch.error.backoff.ms": 20,
        })  # fmt: skip

    async def open(self) -> None:
        self._patiently(lambda: self._producer.init_transactions(CALL_S))
        if self._subscribe is not None:
            topic, group = self._subscribe
            self._consumer.subscribe(
                [topic], on_assign=lambda _, places: self._go_to(group, places)
            )

    def _patiently(self, act: Any) -> Any:
        """What may be asked again is; `Spoilt` where the transaction can be aborted."""
        deadline = time.monotonic() + CALL_S
        while True:
            try:
                return act()
            except ck.KafkaException as error:
                why = error.args[0]
                if why.txn_requires_abort():
                    raise Spoilt(str(why)) from error
                passing = why.retriable() or why.code() in (
                    ck.KafkaError._TIMED_OUT, ck.KafkaError._TRANSPORT, ck.KafkaError._WAIT_COORD,
                    ck.KafkaError.UNSTABLE_OFFSET_COMMIT,
                )  # fmt: skip
                if why.fatal() or not passing or time.monotonic() > deadline:
                    raise

    async def assign(self, positions: Mapping[Partition, int]) -> None:
        self._rec.assign(positions)
        self._consumer.assign([ck.TopicPartition(*split(p), o) for p, o in positions.items()])

    async def go_back(self, group: str) -> None:
        self._go_to(group, self._consumer.assignment())

    def _go_to(self, group: str, places: list[ck.TopicPartition]) -> None:
        at = time.monotonic_ns()
        if places:
            asked = [ck.TopicPartition(each.topic, each.partition) for each in places]
            places = self._patiently(lambda: self._consumer.committed(asked, REQUEST_MS / 1000))
        for each in places:
            each.offset = max(each.offset, 0)
        self._rec.assign({f"{p.topic}-{p.partition}": p.offset for p in places}, group, at)
        self._consumer.assign(places)

    async def poll(self, records_max: int, wait_s: float) -> Found:
        found: dict[Partition, list[tuple[int, str]]] = defaultdict(list)
        for message in self._consumer.consume(records_max, wait_s):
            if message.error() is None:
                where = f"{message.topic()}-{message.partition()}"
                found[where].append((message.offset(), message.value().decode()))
        self._rec.poll(found)
        return found

    async def begin(self) -> None:
        self._producer.begin_transaction()

    async def send(self, partition: Partition, value: str) -> None:
        self._rec.send(partition, value)
        topic, index = split(partition)
        try:
            self._producer.produce(topic, value.encode(), partition=index, on_delivery=self._told)
        except ck.KafkaException as error:
            raise Spoilt(str(error)) from error
        self._producer.poll(0)

    def _told(self, error: ck.KafkaError | None, message: ck.Message) -> None:
        if error is None:
            self._rec.acknowledged(message.value().decode(), message.offset())

    async def send_offsets(self, group: str, offsets: Mapping[Partition, int]) -> None:
        member = self._consumer.consumer_group_metadata()
        self._rec.commit_offsets(group, offsets)
        places = [ck.TopicPartition(*split(p), offset) for p, offset in offsets.items()]
        self._patiently(lambda: self._producer.send_offsets_to_transaction(places, member, CALL_S))

    async def end(self, *, committed: bool) -> Outcome:
        if committed:
            self._patiently(lambda: self._producer.flush(CALL_S))
            self._rec.ask(committed=True)
            self._patiently(lambda: self._producer.commit_transaction(CALL_S))
            return Outcome.OK
        self._rec.ask(committed=False)
        self._patiently(lambda: self._producer.abort_transaction(CALL_S))
        return Outcome.FAIL

    async def close(self) -> None:
        self._consumer.close()


class Ours:
    """Reads by assignment."""

    def __init__(self, address: str, txn_id: str, rec: Recorder) -> None:
        self._rec, self._address, self._txn_id = rec, address, txn_id
        self._limits = replace(
            LIMITS, request_ms_max=REQUEST_MS, connect_ms_max=DELIVERY_MS, reader_wait_ms=50,
            delivery_ms_max=DELIVERY_MS, retry_ms_max=200, linger_ms=0,
        )  # fmt: skip
        self._client: Client | None = None
        self._producer: TransactionalProducer
        self._reader: Reader | None = None
        self._nexts: dict[Partition, int] = {}  # what is to be handed out next
        self._ready: dict[Partition, list[tuple[int, str]]] = {}
        self._sent: list[Any] = []

    async def open(self) -> None:
        self._client = await Client.connect(
            self._address, client_id=self._txn_id, limits=self._limits
        )
        self._producer = await self._client.transactional(self._txn_id, timeout_ms=TRANSACTION_MS)

    async def assign(self, positions: Mapping[Partition, int]) -> None:
        await self._stop_reading()
        self._read_from(positions)

    async def _stop_reading(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.close()

    def _read_from(self, positions: Mapping[Partition, int]) -> None:
        self._rec.assign(positions)
        self._nexts, self._ready = dict(positions), {}
        if positions:
            assert self._client is not None
            ((topic, _), *_) = map(split, positions)
            starts = {split(partition)[1]: offset for partition, offset in positions.items()}
            self._reader = self._client.reader(topic, starts)

    async def go_back(self, group: str) -> None:
        raise NotImplementedError(f"{group}: only a member has committed anything.")

    async def poll(self, records_max: int, wait_s: float) -> Found:
        if not any(self._ready.values()):
            await self._fetch(wait_s)
        found: dict[Partition, list[tuple[int, str]]] = {}
        for partition, waiting in self._ready.items():
            if taken := waiting[:records_max]:
                found[partition] = taken
                del waiting[: len(taken)]
                records_max -= len(taken)
                self._nexts[partition] = taken[-1][0] + 1
        self._rec.poll(found)
        return found

    async def _fetch(self, wait_s: float) -> None:
        if self._reader is None:
            await asyncio.sleep(wait_s)
            return
        chunk = await self._reader.next(int(wait_s * 1000))
        if chunk is not None:
            where = f"{self._reader.topic}-{chunk.partition}"
            self._ready.setdefault(where, []).extend(
                (record.offset, (record.value or b"").decode())
                for at, header in batches.headers(chunk.data) if not header.control
                for record in batches.records(chunk.data, at) if record.offset >= chunk.start
            )  # fmt: skip

    async def begin(self) -> None:
        await self._producer.begin()

    async def send(self, partition: Partition, value: str) -> None:
        self._rec.send(partition, value)
        topic, index = split(partition)

        async def send() -> None:
            offset = await self._producer.send(topic, value.encode(), partition=index)
            self._rec.acknowledged(value, offset)

        self._sent.append(asyncio.create_task(send()))
        await asyncio.sleep(0)

    async def send_offsets(self, group: str, offsets: Mapping[Partition, int]) -> None:
        raise NotImplementedError(f"{group}: only a member has read anything for it.")

    async def end(self, *, committed: bool) -> Outcome:
        state = self._producer.transaction_state
        if committed:
            await self._settle()
            if state.phase is Phase.DOOMED:
                raise Spoilt(str(state.error))
            state.check("commit", Phase.OPEN)
            self._rec.ask(committed=True)
            try:
                await self._producer.commit()
            except TransactionError as error:
                raise Spoilt(str(error)) from error
        else:
            self._rec.ask(committed=False)
            await self._producer.abort()
            await self._settle()
        return Outcome.OK if committed else Outcome.FAIL

    async def _settle(self) -> None:
        await asyncio.gather(*self._sent, return_exceptions=True)
        self._sent.clear()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close(flush=False)
        await self._settle()


class Subscribed(Ours, Listener):
    """A member of a group; its offsets are part of its transactions, in its member's name.

    Partitions are let go of between transactions: what a transaction has read is its own until it
    has ended. If they are lost meanwhile, it can only be aborted.
    """

    def __init__(
        self, address: str, txn_id: str, rec: Recorder, subscribe: tuple[str, str]
    ) -> None:
        super().__init__(address, txn_id, rec)
        self._topic, self._group_id = subscribe
        self._group: Group | None = None
        self._news: list[tuple[dict[Partition, int], int]] = []  # assigned, and when it was asked
        self._open = self._lost = False  # a transaction; what it may have read

    async def open(self) -> None:
        await super().open()
        assert self._client is not None
        self._group = self._client.group(
            self._group_id, [self._topic], listener=self, session_ms=SESSION_MS
        )
        await self._group.start()

    @property
    def group(self) -> Group:
        assert self._group is not None
        return self._group

    async def assigned(self, places: Places) -> None:
        at = time.monotonic_ns()
        told = await self.group.committed(places)
        self._news.append(({f"{t}-{i}": told.get((t, i), 0) for t, i in places}, at))

    async def revoked(self, places: Places) -> None:
        while self._open and not self.group.is_lost:
            await self.group.bell.wait()
        self._drop(places)

    async def lost(self, places: Places) -> None:
        self._drop(places)

    def _drop(self, places: Places) -> None:
        self._lost = self._open
        for gone in (f"{topic}-{index}" for topic, index in places):
            self._nexts.pop(gone, None)
            self._ready.pop(gone, None)
            for positions, _ in self._news:
                positions.pop(gone, None)
        if self._reader is not None:
            for _, index in places:
                self._reader.drop(index)

    async def go_back(self, group: str) -> None:
        self._end()
        at, mine = time.monotonic_ns(), list(self._nexts)
        told = await self.group.committed(map(split, mine))
        self._news.insert(0, ({p: told.get(split(p), 0) for p in mine if p in self._nexts}, at))

    async def poll(self, records_max: int, wait_s: float) -> Found:
        self.group.check()
        if self._news:
            await self._stop_reading()
            for positions, at in self._news:
                self._rec.assign(positions, self._group_id, at)
                self._nexts |= positions
            self._news.clear()
            self._read_from(self._nexts)
        return await super().poll(records_max, wait_s)

    async def begin(self) -> None:
        self._lost, self._open = False, True
        await super().begin()

    async def send_offsets(self, group: str, offsets: Mapping[Partition, int]) -> None:
        if self._lost or self.group.is_lost:
            raise Spoilt("What it has read may be another's.")
        self._rec.commit_offsets(group, offsets)
        try:
            who = self.group.metadata
            await self._producer.send_offsets({split(p): o for p, o in offsets.items()}, who)
        except (NotAssigned, TransactionError) as error:
            raise Spoilt(str(error)) from error

    async def end(self, *, committed: bool) -> Outcome:
        outcome = await super().end(committed=committed)
        if outcome is Outcome.OK:
            self._end()
        return outcome

    def _end(self) -> None:
        self._open = False
        self.group.bell.ring()

    async def close(self) -> None:
        try:
            if self._group is not None:
                self._end()
                await self._group.close()
        finally:
            await super().close()
