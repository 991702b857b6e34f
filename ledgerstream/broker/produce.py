"""Produce: batches in, offsets out, once they are durable.

Each batch is checked by header, size, CRC and count, given its place, and queued for the next
round; the reply leaves when the last of them is durable. acks=1 waits like acks=all; acks=0 has no
reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

from kio.schema.errors import ErrorCode

from ledgerstream.broker.replica import Replica
from ledgerstream.broker.server import Exchange
from ledgerstream.catalog import RESERVED_TOPICS
from ledgerstream.errors import DecodeError
from ledgerstream.log import (
    Appended,
    Guard,
    Partition,
    Refused,
    check_client_batch,
    check_request,
)
from ledgerstream.wire import batches
from ledgerstream.wire.batches import Buffer, Header
from ledgerstream.wire.hot import (
    PRODUCE_TOPIC_IDS,
    Produced,
    ProducedTopic,
    ProducePart,
    ProduceTopic,
    produce_reply,
)

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

ABORTABLE_SINCE = 11  # the first version that knows TRANSACTION_ABORTABLE (KIP-890)
IMPLICIT_SINCE = 12  # and the first whose transactions take partitions in as they are written to
_ASK_AGAIN = frozenset({
    ErrorCode.concurrent_transactions, ErrorCode.coordinator_load_in_progress,
    ErrorCode.coordinator_not_available, ErrorCode.not_coordinator,
})  # fmt: skip
STORAGE_ERROR = int(ErrorCode.kafka_storage_error.value)
TIMED_OUT = int(ErrorCode.request_timed_out.value)


_NOTHING = Produced(-1, 0, -1, -1, -1)  # where a result is still to come
Checked = tuple[ProducePart, Replica | None, Header | Refused]


class Production:
    """A Produce request under way: the results so far, and how many partitions are not durable."""

    __slots__ = ("deadline", "exchange", "results", "topics", "undurable")

    def __init__(self, exchange: Exchange, deadline: float) -> None:
        self.exchange = exchange
        self.deadline = deadline
        self.topics: list[tuple[str, UUID | None, int]] = []  # name, id, partitions
        self.results: list[Produced] = []
        self.undurable: set[int] = set()  # places in `results`

    def durable(self, place: int, partition: Partition, well: bool) -> None:
        """The batch at this place is on disk, or its partition failed."""
        if place not in self.undurable:
            return  # timed out before
        self.undurable.discard(place)
        if not well:
            self.fail(place, STORAGE_ERROR, partition.failure)
        if not self.undurable:
            self.reply_if_done()

    def fail(self, place: int, error: int, message: str | None) -> None:
        self.results[place] = Produced(self.results[place].partition, error, -1, -1, -1, message)

    def expire(self) -> None:
        """It takes too long: what is not durable may or may not come to be."""
        for place in tuple(self.undurable):
            self.fail(place, TIMED_OUT, None)
        self.undurable.clear()
        self.reply_if_done()

    def reply_if_done(self) -> None:
        if self.undurable:
            return
        header = self.exchange.header
        topics, place = [], 0
        for name, topic_id, count in self.topics:
            topics.append(ProducedTopic(name, topic_id, self.results[place : place + count]))
            place += count
        self.exchange.send((produce_reply(header.version, header.correlation_id, topics),))


def handle(node: Node, exchange: Exchange) -> None:
    request, version = exchange.message, exchange.header.version
    if request.acks not in (-1, 0, 1):
        _refuse_all(exchange, ErrorCode.invalid_required_acks)
        return
    now_ms = node.now_ms()
    production = Production(exchange, node.loop.time() + request.timeout_ms / 1000)
    checked = [each for topic in request.topics for each in _check(node, topic, version, now_ms)]
    headers = [found for _, _, found in checked if isinstance(found, Header)]
    if refusal := check_request(headers, request.transactional_id):
        _refuse_all(exchange, refusal.code)
        return
    for topic in request.topics:
        production.topics.append((topic.name, topic.topic_id, len(topic.partitions)))
    production.results = [_NOTHING] * len(checked)
    asks: set[int] = set()
    if request.transactional_id is not None:
        asks = _begin_verification(
            checked, node.transactions.is_admitting(request.transactional_id)
        )
    if not asks:
        if not _append_all(node, production, enumerate(checked), {}):
            _reply(production)
        elif production.undurable:
            node.waiting_produce.append(production)
        return
    production.undurable.update(asks)
    # those that need not ask are placed now: what comes after must not overtake them
    now = [(place, each) for place, each in enumerate(checked) if place not in asks]
    _append_all(node, production, now, {})
    if request.acks != 0:
        node.waiting_produce.append(production)
    later: dict[int, Checked] = {}
    for place in sorted(asks):
        part, replica, found = checked[place]
        later[place] = _owned(part), replica, found
        production.results[place] = _NOTHING._replace(partition=part.partition)
    turn = node.transactions.turn(request.transactional_id)
    node.spawn(node.dispatch.finish(exchange, _append_verified(node, production, later, turn)))


def _append_all(
    node: Node,
    production: Production,
    checked: Iterable[tuple[int, Checked]],
    guards: dict[int, Guard],
) -> bool:
    """Place these batches; whether any of them has to be awaited, and will see to the reply."""
    now_ms = node.now_ms()
    waits: list[tuple[Replica, int, int]] = []
    for place, (part, replica, found) in checked:
        if isinstance(found, Refused):
            production.results[place] = _refused(part, found, replica)
            continue
        assert replica is not None
        production.results[place] = _append(
            replica, part, found, now_ms, place, waits, guards.get(place)
        )
    if production.exchange.message.acks == 0:
        return False
    production.undurable.update(place for _, _, place in waits)
    for replica, offset, place in waits:
        replica.when_durable(offset, partial(production.durable, place, replica.partition))
    return bool(waits)


def _reply(production: Production) -> None:
    """Nothing is awaited any more."""
    exchange = production.exchange
    if exchange.message.acks != 0:
        production.reply_if_done()
        return
    exchange.send(())
    if any(result.error for result in production.results):
        exchange.connection.close("a record was refused that asked for no acknowledgement")


def _begin_verification(checked: list[Checked], behind_others: bool) -> set[int]:
    """The places of the batches with which a transaction begins to write to a partition; of all
    its batches, where earlier ones have asked and have no answer yet."""
    asks = set()
    for place, (_, replica, found) in enumerate(checked):
        if isinstance(found, Header) and found.transactional:
            assert replica is not None
            if replica.partition.begin_verification(found) is not None or behind_others:
                asks.add(place)
    return asks


def _owned(part: ProducePart) -> ProducePart:
    """Its bytes copied: what came in is overwritten by the next frame while this one waits."""
    return part if part.records is None else part._replace(records=bytes(part.records))


async def _append_verified(
    node: Node, production: Production, checked: dict[int, Checked], turn: asyncio.Lock
) -> None:
    """Ask the coordinator whether the transaction knows of these partitions (KIP-890), which it
    does from the asking on where each transaction has an epoch of its own."""
    request, version = production.exchange.message, production.exchange.header.version
    implicit = version >= IMPLICIT_SINCE
    firsts: dict[int, tuple[Partition, Header]] = {}
    for place, (_, replica, header) in checked.items():
        assert replica is not None and isinstance(header, Header)
        firsts[place] = replica.partition, header
    guards: dict[int, Guard] = {}

    def asking() -> None:
        for place, (partition, header) in firsts.items():
            guard = partition.begin_verification(header)
            if guard is not None:
                guards[place] = guard
                guard.new_epoch = implicit

    def done(errors: dict[tuple[str, int], ErrorCode]) -> None:
        if request.acks != 0 and production.undurable.isdisjoint(checked):
            return  # the time was up: it has been answered, and the client will send it again
        for place, (partition, _) in firsts.items():
            code = _admitted(errors[partition.key.topic, partition.key.index], version)
            if code is not ErrorCode.none:
                part, replica, _ = checked[place]
                checked[place] = part, replica, Refused(code, "")
        production.undurable.difference_update(checked)
        waits = _append_all(node, production, checked.items(), guards)
        if not waits and not production.undurable:
            _reply(production)

    ((_, first), *_) = firsts.values()
    async with turn:
        done(
            await node.transactions.admit(
                request.transactional_id, first.producer_id, first.producer_epoch,
                [(p.key.topic, p.key.index) for p, _ in firsts.values()],
                implicit=implicit, asking=asking,
            )
        )  # fmt: skip


def _admitted(error: ErrorCode, version: int) -> ErrorCode:
    """The coordinator's answer in words that a producer of this version acts on rightly."""
    if error is ErrorCode.producer_fenced:
        return ErrorCode.invalid_producer_epoch  # the client aborts, and may go on (KIP-588)
    if error is ErrorCode.concurrent_transactions and version >= IMPLICIT_SINCE:
        return error
    if error in _ASK_AGAIN:
        return ErrorCode.not_enough_replicas  # any version tries again after this
    if error is ErrorCode.transaction_abortable and version < ABORTABLE_SINCE:
        return ErrorCode.invalid_txn_state
    return error


def _check(node: Node, topic: ProduceTopic, version: int, now_ms: int) -> Iterator[Checked]:
    """Each part with its partition and the header of its one batch, or why not."""
    unknown = Refused(ErrorCode.unknown_topic_or_partition, "")
    if version < PRODUCE_TOPIC_IDS:
        replicas = node.replicas.topic(topic.name)
    else:
        replicas = node.replicas.topic_of(topic.topic_id) if topic.topic_id else {}
        if topic.topic_id not in node.catalog.by_id:
            unknown = Refused(ErrorCode.unknown_topic_id, "")
    for part in topic.partitions:
        replica = replicas.get(part.partition)
        found = unknown if replica is None else _check_part(replica, part, version, now_ms)
        yield part, replica, found


def _check_part(replica: Replica, part: ProducePart, version: int, now_ms: int) -> Header | Refused:
    partition = replica.partition
    if partition.key.topic in RESERVED_TOPICS:
        return Refused(ErrorCode.invalid_topic_exception, "The broker's own topic.")
    data = part.records or b""
    found = check_client_batch(data, partition.config, now_ms=now_ms, version=version)
    if isinstance(found, Header) and "compact" in partition.config.cleanup_policy:
        return _check_keys(data) or found
    return found


def _check_keys(data: Buffer) -> Refused | None:
    """A compacted topic needs a key on each record: the one place where records are walked."""
    try:
        if all(record.key is not None for record in batches.records(data)):
            return None
    except DecodeError as error:
        return Refused(ErrorCode.corrupt_message, str(error))
    return Refused(ErrorCode.invalid_record, "Compacted topic cannot accept message without key.")


def _append(
    replica: Replica,
    part: ProducePart,
    header: Header,
    now_ms: int,
    place: int,
    waits: list[tuple[Replica, int, int]],
    guard: Guard | None,
) -> Produced:
    partition = replica.partition
    assert part.records is not None
    verdict = partition.append(part.records, header, now_ms, guard)
    if isinstance(verdict, Refused):
        return _refused(part, verdict, replica)
    waits.append((replica, verdict.last_offset + 1, place))
    append_time = -1
    if isinstance(verdict, Appended):
        append_time = verdict.log_append_time
    elif partition.config.log_append_time:
        append_time = verdict.timestamp
    return Produced(part.partition, 0, verdict.base_offset, append_time, partition.log_start_offset)


# refusals that Kafka answers without the log's start
_WITHOUT_LOG_START = frozenset({
    ErrorCode.unknown_topic_or_partition, ErrorCode.unknown_topic_id, ErrorCode.corrupt_message,
    ErrorCode.message_too_large, ErrorCode.record_list_too_large, ErrorCode.kafka_storage_error,
    ErrorCode.unsupported_compression_type, ErrorCode.invalid_topic_exception,
})  # fmt: skip


def _is_one_batch(data: Buffer | None) -> bool:
    return (
        data is not None
        and len(data) >= batches.HEADER_BYTES
        and batches.parse_header(data).size == len(data)
    )


def _refused(part: ProducePart, refusal: Refused, replica: Replica | None) -> Produced:
    index, log_start = part.partition, -1
    if replica is not None and refusal.code not in _WITHOUT_LOG_START:
        log_start = replica.partition.log_start_offset if _is_one_batch(part.records) else -1
    return Produced(index, int(refusal.code.value), -1, -1, log_start, refusal.message or None)


def _refuse_all(exchange: Exchange, code: ErrorCode) -> None:
    """The request as a whole is wrong: every partition gets the same error."""
    request, header = exchange.message, exchange.header
    if request.acks == 0:
        exchange.send(())
        exchange.connection.close(
            f"a produce request without acknowledgement is wrong: {code.name}"
        )
        return
    topics = [
        ProducedTopic(
            topic.name,
            topic.topic_id,
            [Produced(part.partition, int(code.value), -1, -1, -1) for part in topic.partitions],
        )
        for topic in request.topics
    ]
    exchange.send((produce_reply(header.version, header.correlation_id, topics),))
