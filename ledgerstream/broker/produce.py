"""Produce: batches in, offsets out, once they are durable.

Each batch is checked by header, size, CRC and count, given its place, and queued for the next
round; the reply leaves when the last of them is durable. acks=1 waits like acks=all; acks=0 has no
reply.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    guards = _begin_verification(checked) if request.transactional_id is not None else {}
    if guards:
        checked = [(_owned(part), replica, found) for part, replica, found in checked]
        waiting = _append_verified(node, production, checked, guards)
        node.spawn(node.dispatch.finish(exchange, waiting))
    else:
        _append_all(node, production, checked, guards)


def _append_all(
    node: Node, production: Production, checked: list[Checked], guards: dict[int, Guard]
) -> None:
    """Place every batch, and reply once all of them are durable."""
    exchange, now_ms = production.exchange, node.now_ms()
    waits: list[tuple[Replica, int, int]] = []
    for place, (part, replica, found) in enumerate(checked):
        if isinstance(found, Refused):
            production.results.append(_refused(part, found, replica))
            continue
        assert replica is not None
        guard = guards.get(place)
        production.results.append(_append(replica, part, found, now_ms, place, waits, guard))
    if exchange.message.acks == 0:
        failed = any(result.error for result in production.results)
        exchange.send(())
        if failed:
            exchange.connection.close("a record was refused that asked for no acknowledgement")
        return
    production.undurable.update(place for _, _, place in waits)
    for replica, offset, place in waits:
        replica.when_durable(offset, partial(production.durable, place, replica.partition))
    if not waits:
        production.reply_if_done()
    elif production.undurable:
        node.waiting_produce.append(production)


def _begin_verification(checked: list[Checked]) -> dict[int, Guard]:
    """By place: the batches with which a transaction begins to write to a partition."""
    guards = {}
    for place, (_, replica, found) in enumerate(checked):
        if isinstance(found, Header) and found.transactional:
            assert replica is not None
            guard = replica.partition.begin_verification(found)
            if guard is not None:
                guards[place] = guard
    return guards


def _owned(part: ProducePart) -> ProducePart:
    """Its bytes copied: what came in is overwritten by the next frame while this one waits."""
    return part if part.records is None else part._replace(records=bytes(part.records))


async def _append_verified(
    node: Node, production: Production, checked: list[Checked], guards: dict[int, Guard]
) -> None:
    """Ask the coordinator whether the transaction knows of these partitions (KIP-890), which it
    does from the asking on where each transaction has an epoch of its own."""
    request, version = production.exchange.message, production.exchange.header.version
    implicit = version >= IMPLICIT_SINCE
    where: dict[int, tuple[str, int]] = {}
    firsts: list[tuple[int, Partition, Header]] = []
    for place in guards:
        _, replica, header = checked[place]
        assert replica is not None and isinstance(header, Header)
        where[place] = (replica.partition.key.topic, replica.partition.key.index)
        firsts.append((place, replica.partition, header))
    guarded: dict[int, Guard] = {}

    def asking() -> None:
        for place, partition, header in firsts:
            guard = partition.begin_verification(header)
            if guard is not None:
                guarded[place] = guard
                guard.new_epoch = implicit

    errors = await node.transactions.admit(
        request.transactional_id, firsts[0][2].producer_id, firsts[0][2].producer_epoch,
        list(where.values()), implicit=implicit, asking=asking,
    )  # fmt: skip
    for place in guards:
        code = _admitted(errors[where[place]], version)
        if code is not ErrorCode.none:
            part, replica, _ = checked[place]
            checked[place] = part, replica, Refused(code, "")
    _append_all(node, production, checked, guarded)


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
