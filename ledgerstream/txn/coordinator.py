"""Decisions about transactional ids: init, add partitions, verify, end, complete, expire. Pure.

`decide_…` looks at the newest state, durable or not, and answers with records and a reply; the host
appends, replays and tells when it is durable. While a transaction ends (PREPARE_…), whoever asks
hears CONCURRENT_TRANSACTIONS; the host lets it wait for the end first. A decision that takes a
producer id, because epochs are used up, is asked again with one (`NEEDS_ID`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from kio.schema.errors import ErrorCode

from ledgerstream.machine import Decision
from ledgerstream.txn.moves import (
    AT_REST,
    COMPLETE_ABORT,
    COMPLETE_COMMIT,
    EMPTY,
    MOVES,
    ONGOING,
    PREPARE_ABORT,
    PREPARE_COMMIT,
)
from ledgerstream.txn.records import (
    EPOCH_LAST,
    NO_EPOCH,
    NO_ID,
    NO_TIME,
    NO_TIMEOUT,
    Forgotten,
    TopicPartition,
    Txn,
    TxnRecord,
)

V1, V2 = 0, 2  # as `Txn.version` has them: does each transaction have an epoch of its own?


class Initialized(NamedTuple):
    """The reply to InitProducerId. `ongoing_…`: the transaction that was found and kept."""

    error: ErrorCode
    producer_id: int = NO_ID
    producer_epoch: int = NO_EPOCH
    ongoing_id: int = NO_ID
    ongoing_epoch: int = NO_EPOCH
    needs_id: bool = False  # ask again with a producer id


class Ended(NamedTuple):
    """The reply to EndTxn; `ending` if markers are to be written once it is durable."""

    error: ErrorCode
    producer_id: int = NO_ID
    producer_epoch: int = NO_EPOCH
    needs_id: bool = False
    ending: bool = False


Decided = Decision[TxnRecord, Any]


class Coordinator:
    """All transactional ids of one partition of `__transaction_state`."""

    def __init__(self) -> None:
        self.txns: dict[str, Txn] = {}
        self._ongoing: set[str] = set()  # of those: few are open at a time

    # -- the only mutation

    def replay(self, record: TxnRecord, origin: object = None) -> None:
        """Live and after a restart alike; a compacted log may have left out what lies between."""
        if isinstance(record, Forgotten):
            self.txns.pop(record.txn_id, None)
            self._ongoing.discard(record.txn_id)
            return
        self.txns[record.txn_id] = record
        if record.state is ONGOING:
            self._ongoing.add(record.txn_id)
        else:
            self._ongoing.discard(record.txn_id)

    def end(self, marker: object, offset: int) -> None:
        """There are no transactions inside this log."""

    # -- InitProducerId

    def decide_init(
        self,
        txn_id: str,
        timeout_ms: int,
        now_ms: int,
        *,
        expected: tuple[int, int] | None = None,
        two_phase: bool = False,
        keep_prepared: bool = False,
        new_id: int | None = None,
    ) -> Decision[TxnRecord, Initialized]:
        """A producer begins, or begins again.

        `expected`: the id and epoch that it believes to have (KIP-360). `two_phase`: its
        transactions have no timeout; `keep_prepared`: one that it finds open is kept and named, and
        the identity that it gets is the one that may end it (KIP-939).
        """
        txn = self.txns.get(txn_id)
        timeout_ms = NO_TIMEOUT if two_phase else timeout_ms
        if txn is None:
            if new_id is None:
                return _needs_id(Initialized)
            return _init(None, Txn(txn_id, new_id, 0, EMPTY, timeout_ms, updated_ms=now_ms))
        if expected is not None and not _is_known(txn, expected):
            return _refuse(Initialized, ErrorCode.producer_fenced)
        if txn.state.ending:
            return _refuse(Initialized, ErrorCode.concurrent_transactions)
        if txn.state is ONGOING:
            if keep_prepared:
                return self._keep_prepared(txn, timeout_ms, now_ms, new_id)
            ended = self._prepare(txn, PREPARE_ABORT, V2, now_ms, new_id)
            if ended.reply.needs_id:
                return _needs_id(Initialized)
            return Decision(ended.records, Initialized(ErrorCode.concurrent_transactions))
        fresh = txn._replace(
            state=EMPTY, timeout_ms=timeout_ms, partitions=frozenset(), started_ms=NO_TIME,
            updated_ms=now_ms,
        )  # fmt: skip
        epoch = txn.producer_epoch
        if expected is not None and expected[1] != epoch:
            if expected[1] != txn.last_epoch:
                return _refuse(Initialized, ErrorCode.producer_fenced)
            return _init(txn, fresh)  # a repeat: its answer was lost
        last_epoch = NO_EPOCH if expected is None else epoch
        if epoch < EPOCH_LAST:
            return _init(txn, fresh._replace(producer_epoch=epoch + 1, last_epoch=last_epoch))
        if new_id is None:
            return _needs_id(Initialized)
        return _init(
            txn,
            fresh._replace(
                producer_id=new_id, producer_epoch=0, last_epoch=last_epoch,
                previous_id=txn.producer_id,
            ),
        )  # fmt: skip

    def _keep_prepared(
        self, txn: Txn, timeout_ms: int, now_ms: int, new_id: int | None
    ) -> Decision[TxnRecord, Initialized]:
        """An identity above every earlier one; the transaction itself stays as it is."""
        client_id, client_epoch = txn.client
        next_id, next_epoch = txn.next_id, client_epoch + 1
        if client_epoch >= EPOCH_LAST:
            if new_id is None:
                return _needs_id(Initialized)
            client_id = next_id = new_id
            next_epoch = 0
        kept = txn._replace(
            next_id=next_id, next_epoch=next_epoch, timeout_ms=timeout_ms, updated_ms=now_ms
        )
        reply = Initialized(
            ErrorCode.none, client_id, next_epoch, txn.producer_id, txn.producer_epoch
        )
        return _decide(txn, kept, reply)

    # -- partitions

    def decide_add(
        self,
        txn_id: str,
        producer_id: int,
        producer_epoch: int,
        partitions: Collection[TopicPartition],
        now_ms: int,
        version: int = V1,
    ) -> Decision[TxnRecord, ErrorCode]:
        """The transaction is about to write to these partitions; the first begins it."""
        txn = self.txns.get(txn_id)
        if txn is None or producer_id not in (txn.producer_id, txn.client[0]):
            return Decision((), ErrorCode.invalid_producer_id_mapping)
        if (producer_id, producer_epoch) != txn.client:
            return Decision((), ErrorCode.producer_fenced)
        if txn.state.ending:
            return Decision((), ErrorCode.concurrent_transactions)
        if txn.state is not ONGOING:
            begun = txn._replace(
                state=ONGOING, partitions=frozenset(partitions), started_ms=now_ms,
                updated_ms=now_ms, version=version,
            )  # fmt: skip
            return _decide(txn, begun, ErrorCode.none)
        if txn.next_epoch != NO_EPOCH:  # it came to complete what it found, and has not yet
            return Decision((), ErrorCode.invalid_txn_state)
        if txn.partitions.issuperset(partitions):
            return Decision((), ErrorCode.none)
        more = txn._replace(
            partitions=txn.partitions.union(partitions), updated_ms=now_ms, version=version
        )
        return _decide(txn, more, ErrorCode.none)

    def verify(
        self,
        txn_id: str,
        producer_id: int,
        producer_epoch: int,
        partitions: Iterable[TopicPartition],
    ) -> dict[TopicPartition, ErrorCode]:
        """Whether the transaction that is open has each of these partitions (KIP-890)."""
        txn = self.txns.get(txn_id)
        if txn is None or txn.producer_id != producer_id:
            return dict.fromkeys(partitions, ErrorCode.invalid_producer_id_mapping)
        if txn.producer_epoch != producer_epoch:
            return dict.fromkeys(partitions, ErrorCode.producer_fenced)
        if txn.state.ending:
            return dict.fromkeys(partitions, ErrorCode.concurrent_transactions)
        missing = ErrorCode.transaction_abortable
        return {p: ErrorCode.none if p in txn.partitions else missing for p in partitions}

    # -- the end

    def decide_end(
        self,
        txn_id: str,
        producer_id: int,
        producer_epoch: int,
        now_ms: int,
        *,
        committed: bool,
        version: int = V1,
        new_id: int | None = None,
    ) -> Decision[TxnRecord, Ended]:
        """Commit or abort: decided for good once this is durable; markers follow.

        Under V2 the answer carries the identity of the next transaction, and a request that is
        repeated is known by the epoch before it.
        """
        txn = self.txns.get(txn_id)
        if txn is None:
            return _refuse(Ended, ErrorCode.invalid_producer_id_mapping)
        retry = version == V2 and _is_retry(txn, producer_id, producer_epoch)
        client_id, client_epoch = txn.client
        if producer_id != client_id and not retry:
            fenced = producer_id == txn.producer_id  # before somebody found it prepared
            unknown = ErrorCode.invalid_producer_id_mapping
            return _refuse(Ended, ErrorCode.producer_fenced if fenced else unknown)
        if not retry and producer_epoch != client_epoch:
            return _refuse(Ended, ErrorCode.producer_fenced)
        if txn.state is ONGOING:
            after = PREPARE_COMMIT if committed else PREPARE_ABORT
            return self._prepare(txn, after, version, now_ms, new_id)
        if txn.state.ending:
            # of V2 without retry: it is about the next transaction, which cannot have begun yet
            same = (txn.state is PREPARE_COMMIT) is committed or (version == V2 and not retry)
            wait, wrong = ErrorCode.concurrent_transactions, ErrorCode.invalid_txn_state
            return _refuse(Ended, wait if same else wrong)
        if txn.state is EMPTY or (version == V2 and not retry):
            if version == V2 and not committed:  # nothing was written: still a new epoch
                return self._prepare(txn, PREPARE_ABORT, V2, now_ms, new_id)
            return _refuse(Ended, ErrorCode.invalid_txn_state)
        if (txn.state is COMPLETE_COMMIT) is committed:  # a repeat: its answer was lost
            return Decision((), Ended(ErrorCode.none, txn.producer_id, txn.producer_epoch))
        return _refuse(Ended, ErrorCode.invalid_txn_state)

    def decide_timeout(
        self, txn_id: str, now_ms: int, new_id: int | None = None
    ) -> Decision[TxnRecord, Ended]:
        """Abort a transaction that is open too long, and fence its producer."""
        txn = self.txns.get(txn_id)
        if txn is None or not _is_overdue(txn, now_ms):
            return _refuse(Ended, ErrorCode.invalid_txn_state)
        return self._prepare(txn, PREPARE_ABORT, V2, now_ms, new_id)

    def _prepare(
        self, txn: Txn, after: Any, version: int, now_ms: int, new_id: int | None
    ) -> Decision[TxnRecord, Ended]:
        """The decision. V2: markers and the next transaction have an epoch of their own."""
        if txn.next_epoch != NO_EPOCH:  # the markers need an epoch above the one that was found
            version = V2
        prepared = txn._replace(state=after, updated_ms=now_ms, version=version)
        if txn.state is not ONGOING:
            prepared = prepared._replace(started_ms=now_ms, partitions=frozenset())
        if version != V2:
            reply = Ended(ErrorCode.none, txn.producer_id, txn.producer_epoch, ending=True)
            return _decide(txn, prepared, reply)
        client_id, client_epoch = txn.client
        if client_epoch >= EPOCH_LAST and new_id is None:
            return _needs_id(Ended)
        if client_epoch >= EPOCH_LAST:  # the last epoch is the markers' own
            assert new_id is not None
            next_id, next_epoch, reply_epoch = new_id, 0, 0
        elif client_id != txn.producer_id:  # found prepared at the end of its id's epochs
            next_id, next_epoch, reply_epoch = client_id, client_epoch + 1, client_epoch + 1
        else:
            next_id, next_epoch, reply_epoch = NO_ID, NO_EPOCH, client_epoch + 1
        same_id = client_id == txn.producer_id
        prepared = prepared._replace(
            producer_epoch=(client_epoch if same_id else txn.producer_epoch) + 1,
            last_epoch=client_epoch,
            previous_id=client_id if next_id != NO_ID else txn.previous_id,
            next_id=next_id,
            next_epoch=next_epoch,
        )
        answer = Ended(
            ErrorCode.none,
            txn.producer_id if next_id == NO_ID else next_id,
            reply_epoch,
            ending=True,
        )
        return _decide(txn, prepared, answer)

    def decide_complete(
        self, txn_id: str, producer_id: int, producer_epoch: int, now_ms: int
    ) -> Decision[TxnRecord, bool]:
        """All markers of the decision of this id and epoch are durable; whether that was news."""
        txn = self.txns.get(txn_id)
        if (
            txn is None
            or not txn.state.ending
            or (txn.producer_id, txn.producer_epoch) != (producer_id, producer_epoch)
        ):
            return Decision((), False)
        after = COMPLETE_COMMIT if txn.state is PREPARE_COMMIT else COMPLETE_ABORT
        done = txn._replace(state=after, partitions=frozenset(), updated_ms=now_ms)
        if txn.next_id != NO_ID:
            done = done._replace(
                producer_id=txn.next_id, producer_epoch=txn.next_epoch, next_id=NO_ID,
                next_epoch=NO_EPOCH,
            )  # fmt: skip
        return _decide(txn, done, True)

    # -- time

    def overdue(self, now_ms: int) -> list[str]:
        """Ids whose transaction is open for longer than its timeout, since its first partition."""
        return [txn_id for txn_id in self._ongoing if _is_overdue(self.txns[txn_id], now_ms)]

    def decide_expire(self, now_ms: int, after_ms: int) -> Decision[TxnRecord, None]:
        """Forget ids that are at rest and were not used for `after_ms`."""
        gone = [
            Forgotten(txn.txn_id)
            for txn in self.txns.values()
            if txn.state in AT_REST and now_ms - txn.updated_ms >= after_ms
        ]
        assert all((self.txns[each.txn_id].state, None) in MOVES for each in gone)
        return Decision(tuple(gone), None)

    # -- questions

    def ending(self) -> Iterator[Txn]:
        """Those whose markers have to be written, after a restart again."""
        return (txn for txn in self.txns.values() if txn.state.ending)

    def list(
        self,
        now_ms: int,
        *,
        states: Collection[str] = (),
        producer_ids: Collection[int] = (),
        open_ms: int = -1,
        matches: Callable[[str], object] | None = None,
    ) -> Iterator[Txn]:
        """Filtered as ListTransactions has it; `open_ms`: longer than this since they began."""
        for txn in self.txns.values():
            if (
                (not states or txn.state.label in states)
                and (not producer_ids or txn.producer_id in producer_ids)
                and (open_ms < 0 or now_ms - txn.started_ms > open_ms)
                and (matches is None or matches(txn.txn_id))
            ):
                yield txn


def _is_known(txn: Txn, expected: tuple[int, int]) -> bool:
    """Whether a producer that believes to be this may be the one that is there (KIP-360)."""
    producer_id, producer_epoch = expected
    if producer_id == txn.client[0]:
        # a late duplicate of an earlier request must not abort what was begun since
        return txn.state is not ONGOING or producer_epoch == txn.client[1]
    return producer_id == txn.previous_id and producer_epoch >= EPOCH_LAST


def _is_retry(txn: Txn, producer_id: int, producer_epoch: int) -> bool:
    """Whether an EndTxn of V2 repeats the one that brought the id to where it is."""
    if txn.state not in (PREPARE_COMMIT, PREPARE_ABORT, COMPLETE_COMMIT, COMPLETE_ABORT):
        return False
    if producer_epoch != txn.last_epoch or txn.last_epoch == NO_EPOCH:
        return False
    return producer_id == txn.producer_id or producer_id == txn.previous_id


def _is_overdue(txn: Txn, now_ms: int) -> bool:
    return txn.state is ONGOING and not txn.two_phase and txn.started_ms + txn.timeout_ms < now_ms


def _decide(before: Txn | None, after: Txn, reply: Any) -> Decided:
    assert (before.state if before else None, after.state) in MOVES, (before, after)
    return Decision((after,), reply)


def _init(before: Txn | None, after: Txn) -> Decision[TxnRecord, Initialized]:
    reply = Initialized(ErrorCode.none, after.producer_id, after.producer_epoch)
    return _decide(before, after, reply)


def _refuse(reply: Any, error: ErrorCode) -> Decided:
    return Decision((), reply(error))


def _needs_id(reply: Any) -> Decided:
    return Decision((), reply(ErrorCode.coordinator_load_in_progress, needs_id=True))
