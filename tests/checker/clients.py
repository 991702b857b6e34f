"""Two clients behind one face: confluent-kafka, whose transactions are V1, and our own, V2.

What they do and see is recorded here, at the call. An error that spoils a transaction is `Spoilt`:
it can be aborted. Any other leaves a client that cannot go on.
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
            "bootstrap.servers": address, "socket.timeout.ms": REQUEST_MS,
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
    """Reads by assignment. `v2`: as far as the broker has it."""

    def __init__(self, address: str, txn_id: str, rec: Recorder) -> None:
        self._rec, self._address, self._txn_id = rec, address, txn_id
        self._limits = replace(
            LIMITS, request_ms_max=REQUEST_MS, connect_ms_max=DELIVERY_MS, reader_wait_ms=50,
            delivery_ms_max=DELIVERY_MS, retry_ms_max=200, linger_ms=0,
        )  # fmt: skip
        self._producer: TransactionalProducer
        self._reader: Reader | None = None
        self._assigned: dict[Partition, int] = {}
        self._ready: dict[Partition, list[tuple[int, str]]] = {}
        self._sent: list[Any] = []

    async def open(self) -> None:
        self._client = await Client.connect(self._address, limits=self._limits)
        self._producer = await self._client.transactional(self._txn_id, timeout_ms=TRANSACTION_MS)

    async def assign(self, positions: Mapping[Partition, int]) -> None:
        self._rec.assign(positions)
        await self._read_from(positions)

    async def _read_from(self, positions: Mapping[Partition, int]) -> None:
        if self._reader is not None:
            await self._reader.close()
        self._assigned, self._ready = dict(positions), {}
        ((topic, _), *_) = map(split, positions)
        starts = {split(partition)[1]: offset for partition, offset in positions.items()}
        self._reader = self._client.reader(topic, starts)

    async def go_back(self, group: str) -> None:
        at = time.monotonic_ns()
        told = await self._client.committed(group, map(split, self._assigned))
        positions = {p: told.get(split(p), 0) for p in self._assigned}
        self._rec.assign(positions, group, at)
        await self._read_from(positions)

    async def poll(self, records_max: int, wait_s: float) -> Found:
        if not any(self._ready.values()):
            await self._fetch(wait_s)
        found: dict[Partition, list[tuple[int, str]]] = {}
        for partition, waiting in self._ready.items():
            if taken := waiting[:records_max]:
                found[partition] = taken
                del waiting[: len(taken)]
                records_max -= len(taken)
        self._rec.poll(found)
        return found

    async def _fetch(self, wait_s: float) -> None:
        assert self._reader is not None
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
        self._rec.commit_offsets(group, offsets)
        try:
            await self._producer.send_offsets({split(p): o for p, o in offsets.items()}, group)
        except TransactionError as error:
            raise Spoilt(str(error)) from error

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
        await self._client.close(flush=False)
        await self._settle()
