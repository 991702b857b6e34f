"""The requests of transactional producers, and of those who look after them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from kio.schema.errors import ErrorCode

from ledgerstream.broker.patterns import matching
from ledgerstream.broker.server import Exchange
from ledgerstream.broker.transactions import V1, V2
from ledgerstream.errors import StorageError
from ledgerstream.txn import Ended, Initialized, Txn, TxnState
from ledgerstream.wire.messages import ms

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

# the first versions whose clients know PRODUCER_FENCED; older ones hear INVALID_PRODUCER_EPOCH
INIT_FENCED_SINCE, FENCED_SINCE = 4, 2
END_V2_SINCE = 5
BROKERS_SINCE = 4  # of AddPartitionsToTxn: several transactions, and verification
LABELS = {state.label for state in TxnState}


async def init_producer_id(node: Node, exchange: Exchange) -> None:
    """A producer id (KIP-98), or what a transactional id goes on with (KIP-360, 939)."""
    request = exchange.message
    reply = _why_not_init(node, request)
    if reply is None and request.transactional_id is None:
        reply = await _fresh(node)
    elif reply is None:
        reply = await _init(node, request)
    error = _known(reply.error, exchange, INIT_FENCED_SINCE)
    well = error is ErrorCode.none
    exchange.answer(
        throttle_time=0,
        error_code=error,
        producer_id=reply.producer_id if well else -1,
        producer_epoch=reply.producer_epoch if well else -1,
        ongoing_txn_producer_id=reply.ongoing_id if well else -1,
        ongoing_txn_producer_epoch=reply.ongoing_epoch if well else -1,
    )


def _why_not_init(node: Node, request: Any) -> Initialized | None:
    two_phase = getattr(request, "enable2_pc", False)
    keep = getattr(request, "keep_prepared_txn", False)
    given = getattr(request, "producer_id", -1), getattr(request, "producer_epoch", -1)
    if (given[0] == -1) != (given[1] == -1) or request.transactional_id == "":
        return Initialized(ErrorCode.invalid_request)
    if request.transactional_id is None:
        return Initialized(ErrorCode.invalid_request) if two_phase or keep else None
    if two_phase and not node.settings.two_phase_commit:
        return Initialized(ErrorCode.transactional_id_authorization_failed)
    if keep and not two_phase:
        return Initialized(ErrorCode.invalid_request)
    timeout_ms = ms(request.transaction_timeout)
    if not two_phase and not 0 < timeout_ms <= node.limits.transaction_timeout_ms_max:
        return Initialized(ErrorCode.invalid_transaction_timeout)
    return None


async def _fresh(node: Node) -> Initialized:
    try:
        return Initialized(ErrorCode.none, await node.producer_ids.take(), 0)
    except StorageError:  # the one error after which every client asks again
        return Initialized(ErrorCode.coordinator_load_in_progress)


async def _init(node: Node, request: Any) -> Initialized:
    txn_id, timeout_ms = request.transactional_id, ms(request.transaction_timeout)
    given = getattr(request, "producer_id", -1), getattr(request, "producer_epoch", -1)
    two_phase = getattr(request, "enable2_pc", False)
    keep = getattr(request, "keep_prepared_txn", False)
    reply = await node.transactions.decide(
        txn_id,
        lambda machine, new_id: machine.decide_init(
            txn_id, timeout_ms, node.now_ms(), expected=None if given == (-1, -1) else given,
            two_phase=two_phase, keep_prepared=keep, new_id=new_id,
        ),
    )  # fmt: skip
    return Initialized(reply) if isinstance(reply, ErrorCode) else reply


async def add_partitions(node: Node, exchange: Exchange) -> None:
    """A client's own transaction; from version 4 on brokers ask, for several, and to verify."""
    request, version = exchange.message, exchange.header.version
    if version < BROKERS_SINCE:
        topics = request.v3_and_below_topics
        errors = await _add(
            node, exchange, request.v3_and_below_transactional_id,
            request.v3_and_below_producer_id, request.v3_and_below_producer_epoch, topics,
        )  # fmt: skip
        exchange.answer(throttle_time=0, results_by_topic_v3_and_below=_by_topic(topics, errors))
        return
    results = []
    for entry in request.transactions:
        if entry.verify_only:
            errors = await node.transactions.admit(
                entry.transactional_id, entry.producer_id, entry.producer_epoch,
                [(topic.name, index) for topic in entry.topics for index in topic.partitions],
                implicit=False,
            )  # fmt: skip
        else:
            errors = await _add(
                node, exchange, entry.transactional_id, entry.producer_id, entry.producer_epoch,
                entry.topics,
            )  # fmt: skip
        results.append({
            "transactional_id": entry.transactional_id,
            "topic_results": _by_topic(entry.topics, errors),
        })  # fmt: skip
    exchange.answer(throttle_time=0, error_code=ErrorCode.none, results_by_transaction=results)


async def _add(
    node: Node, exchange: Exchange, txn_id: str, producer_id: int, producer_epoch: int, topics: Any
) -> dict[tuple[str, int], ErrorCode]:
    """All or nothing: one partition that is not here, and none is added."""
    wanted = [(topic.name, index) for topic in topics for index in topic.partitions]
    if not txn_id:
        return dict.fromkeys(wanted, ErrorCode.invalid_request)
    unknown = {each for each in wanted if node.replicas.named(*each) is None}
    if unknown:
        missing, rest = ErrorCode.unknown_topic_or_partition, ErrorCode.operation_not_attempted
        return {each: missing if each in unknown else rest for each in wanted}
    version = exchange.header.version
    error = await node.transactions.decide(
        txn_id,
        lambda machine, _: machine.decide_add(
            txn_id, producer_id, producer_epoch, wanted, node.now_ms(),
            V1 if version < BROKERS_SINCE else V2,
        ),
    )  # fmt: skip
    return dict.fromkeys(wanted, _known(error, exchange, FENCED_SINCE))


def _by_topic(topics: Any, errors: dict[tuple[str, int], ErrorCode]) -> list[dict[str, Any]]:
    return [
        {
            "name": topic.name,
            "results_by_partition": [
                {"partition_index": index, "partition_error_code": errors[topic.name, index]}
                for index in topic.partitions
            ],
        }
        for topic in topics
    ]


async def add_offsets(node: Node, exchange: Exchange) -> None:
    """The transaction is about to commit offsets of a group: its partition is added."""
    request = exchange.message
    groups = node.groups.shards
    txn_id = request.transactional_id
    if not txn_id:
        error = ErrorCode.invalid_request
    else:
        await groups.create()
        where = (groups.topic, groups.partition_of(request.group_id))
        error = await node.transactions.decide(
            txn_id,
            lambda machine, _: machine.decide_add(
                txn_id, request.producer_id, request.producer_epoch, [where], node.now_ms(), V1
            ),
        )
    exchange.answer(throttle_time=0, error_code=_known(error, exchange, FENCED_SINCE))


async def end(node: Node, exchange: Exchange) -> None:
    """Commit or abort. The answer comes when the decision is durable; markers follow."""
    request, version = exchange.message, exchange.header.version
    txn_id = request.transactional_id
    reply: Any = ErrorCode.invalid_request
    if txn_id:
        reply = await node.transactions.decide(
            txn_id,
            lambda machine, new_id: machine.decide_end(
                txn_id, request.producer_id, request.producer_epoch, node.now_ms(),
                committed=request.committed, version=V2 if version >= END_V2_SINCE else V1,
                new_id=new_id,
            ),
        )  # fmt: skip
    if isinstance(reply, ErrorCode):
        reply = Ended(reply)
    well = reply.error is ErrorCode.none
    exchange.answer(
        throttle_time=0,
        error_code=_known(reply.error, exchange, FENCED_SINCE),
        producer_id=reply.producer_id if well else -1,
        producer_epoch=reply.producer_epoch if well else -1,
    )


async def describe(node: Node, exchange: Exchange) -> None:
    wanted = dict.fromkeys(exchange.message.transactional_ids)
    found = [await _describe(node, txn_id) for txn_id in wanted]
    exchange.answer(throttle_time=0, transaction_states=found)


async def _describe(node: Node, txn_id: str) -> dict[str, Any]:
    txn: Txn | None = None
    error = ErrorCode.invalid_request
    if txn_id:
        shard = await node.transactions.shards.find(txn_id, create=False)
        if isinstance(shard, ErrorCode):
            error = shard
        else:
            txn = shard.machine.txns.get(txn_id)
            error = ErrorCode.transactional_id_not_found if txn is None else ErrorCode.none
    topics: dict[str, list[int]] = {}
    for topic, index in sorted(txn.partitions) if txn is not None else ():
        topics.setdefault(topic, []).append(index)
    return {
        "error_code": error,
        "transactional_id": txn_id,
        "transaction_state": txn.state.label if txn is not None else "",
        "transaction_timeout": txn.timeout_ms if txn is not None else 0,
        "transaction_start_time": txn.started_ms if txn is not None else 0,
        "producer_id": txn.producer_id if txn is not None else 0,
        "producer_epoch": txn.producer_epoch if txn is not None else 0,
        "topics": [{"topic": topic, "partitions": parts} for topic, parts in topics.items()],
    }


async def list_all(node: Node, exchange: Exchange) -> None:
    request = exchange.message
    states = list(request.state_filters)
    answer: dict[str, Any] = {
        "throttle_time": 0,
        "error_code": ErrorCode.none,
        "unknown_state_filters": [state for state in states if state not in LABELS],
        "transaction_states": [],
    }
    machines = []
    for shard in node.transactions.shards:
        if not shard.ready and not await shard.wait_ready():
            exchange.answer(**{**answer, "error_code": ErrorCode.coordinator_load_in_progress})
            return
        machines.append(shard.machine)
    found = [
        txn
        for machine in machines
        for txn in machine.list(
            node.now_ms(),
            states=states,
            producer_ids=request.producer_id_filters,
            open_ms=getattr(request, "duration_filter", -1),
        )
    ]
    pattern = getattr(request, "transactional_id_pattern", None)
    if pattern:
        try:
            matches = await node.loop.run_in_executor(
                node.readers, partial(matching, pattern, [txn.txn_id for txn in found])
            )
        except ValueError:
            code = ErrorCode.invalid_regular_expression
            exchange.answer(**{**answer, "error_code": code})
            return
        found = [txn for txn, well in zip(found, matches, strict=True) if well]
    answer["transaction_states"] = [
        {
            "transactional_id": txn.txn_id,
            "producer_id": txn.producer_id,
            "transaction_state": txn.state.label,
        }
        for txn in found
    ]
    exchange.answer(**answer)


def _known(error: ErrorCode, exchange: Exchange, since: int) -> ErrorCode:
    """Fenced producers hear it in a word that their version knows (KIP-588)."""
    if error is ErrorCode.producer_fenced and exchange.header.version < since:
        return ErrorCode.invalid_producer_epoch
    return error
