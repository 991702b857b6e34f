"""The transactional producer: what it sends is there whole, with offsets, or not at all.

`transaction.py` says what may be done next; here it is done. Under Transactions V2 (KIP-890) a
partition joins a transaction by its first batch and each transaction has an epoch of its own; with
a cluster that has no more, it is V1: partitions are added first, and after anything uncertain a new
epoch is taken (see there).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from kio.schema.errors import ErrorCode

from ledgerstream.client.cluster import TRANSPORT_ERRORS, Cluster
from ledgerstream.client.coordinator import Coordinator, Kind
from ledgerstream.client.groupoffsets import (
    GroupMetadata,
    TopicPartition,
    answers_to,
    offset_topics,
    worst_of_offsets,
)
from ledgerstream.client.lane import Lane
from ledgerstream.client.producer import Producer, whole
from ledgerstream.client.sender import Sender
from ledgerstream.client.transaction import (
    Fenced,
    Identity,
    Phase,
    Transaction,
    TransactionError,
)
from ledgerstream.errors import (
    ConfigError,
    DeliveryTimeout,
    KafkaError,
    LedgerStreamError,
    SecurityError,
)
from ledgerstream.wire import batches
from ledgerstream.wire.versions import Api

FEATURE, V2_LEVEL = "transaction.version", 2
V2_NEEDS = {Api.PRODUCE: 12, Api.END_TXN: 5, Api.TXN_OFFSET_COMMIT: 5}
# the highest versions whose requests do not add partitions by themselves
PRODUCE_V1, END_V1, OFFSETS_V1 = 11, 4, 4
TWO_PHASE_SINCE = 6  # of InitProducerId (KIP-939)
NOT_ALLOWED = ErrorCode.transactional_id_authorization_failed


class TxnSender(Sender):
    """Sends only within a transaction, in its name."""

    attributes = batches.TRANSACTIONAL

    def __init__(self, producer: TransactionalProducer) -> None:
        super().__init__(producer.cluster, producer._end)
        self.txn = producer.transaction_state
        self.txn_id = self.txn.txn_id
        self._producer = producer
        if not self.txn.v2:
            self.produce_version_max = PRODUCE_V1

    def _make_lane(self, topic: str, partition: int) -> Lane:
        return Lane(topic, partition, transactional=True)

    def begin(self, identity: Identity) -> None:
        """Sequences go on where they were, or from 0 under a new epoch."""
        for lane in self.lanes.values():
            lane.begin(identity)

    def give_up(self, error: Exception) -> None:
        """Nothing that still waits is sent."""
        for lane in self.lanes.values():
            lane.fail_waiting(error)

    def _may_send(self, lane: Lane) -> bool:
        if self.txn.phase is not Phase.OPEN:
            error = self.txn.error or LedgerStreamError("There is no transaction.")
            lane.fail_waiting(error)
            return False
        if lane.identity is None:
            assert self.txn.identity is not None
            lane.identity = self.txn.identity
        if self.txn.v2 or lane.joined:
            return True
        self._begin("+", self._join)
        return False

    async def _join(self) -> None:
        """V1: the partitions that are about to be written to become part of the transaction."""
        lanes = [lane for lane in self.lanes.values() if lane.waiting and not lane.joined]
        try:
            await self._producer._add_partitions([(ln.topic, ln.partition) for ln in lanes])
        except (LedgerStreamError, *TRANSPORT_ERRORS) as error:
            self._producer._failed(error, doubtful=True)
            for lane in lanes:
                lane.fail_waiting(error)
            return
        for lane in lanes:
            lane.joined = True


class TransactionalProducer(Producer):
    """Use `await client.transactional("my-id")`; one transaction at a time, one caller at a time.

    `async with producer.transaction(): …` commits at its end, and aborts if it raises.
    """

    def __init__(
        self, cluster: Cluster, transaction: Transaction, timeout_ms: int, compression: str
    ) -> None:
        self.transaction_state = transaction
        self._timeout_ms = timeout_ms
        self._coordinator = Coordinator(cluster, Kind.TRANSACTION, transaction.txn_id)
        self._groups: dict[str, Coordinator] = {}
        super().__init__(cluster, compression)

    @classmethod
    async def take_over(
        cls,
        cluster: Cluster,
        txn_id: str,
        *,
        timeout_ms: int,
        two_phase: bool = False,
        keep_prepared: bool = False,
        compression: str = "none",
    ) -> TransactionalProducer:
        """Whoever had the id before is fenced, and what it left open aborted, or kept (KIP-939)."""
        connection = await cluster.connection(-1)
        v2 = connection.features.get(FEATURE, 0) >= V2_LEVEL and all(
            connection.versions.get(api, -1) >= version for api, version in V2_NEEDS.items()
        )
        if two_phase and connection.versions.get(Api.INIT_PRODUCER_ID, 0) < TWO_PHASE_SINCE:
            raise ConfigError(
                "The brokers do not know transactions in two phases (KIP-939).",
                "LedgerStream's own do: `ledgerstream broker`, with two_phase_commit on.",
            )
        state = Transaction(txn_id, v2=v2, two_phase=two_phase)
        producer = cls(cluster, state, timeout_ms, compression)
        try:
            await producer._take_identity(keep_prepared=keep_prepared)
        except BaseException:
            await producer.close(flush=False)
            raise
        return producer

    def _make_sender(self) -> TxnSender:
        return TxnSender(self)

    @property
    def found(self) -> Identity | None:
        """The prepared transaction that was taken over, until it is completed."""
        return self.transaction_state.found

    # -- transactions

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[TransactionalProducer]:
        """Commits what is sent in its block, or aborts it if the block raises.

        TransactionError: it failed and is aborted; the block may be run again. Fenced: another
        producer has the id. DeliveryTimeout: it is not known whether it was committed.
        """
        await self.begin()
        try:
            yield self
        except BaseException:
            if self.transaction_state.phase not in (Phase.OVER, Phase.READY, Phase.NEW):
                await self.abort()
            raise
        if self.transaction_state.phase is Phase.DOOMED:
            error = self.transaction_state.error
            await self.abort()
            raise TransactionError(
                f"The transaction of {self.txn_id!r} was aborted: {error}", "It may be tried again."
            ) from error
        await self.commit()

    @property
    def txn_id(self) -> str:
        return self.transaction_state.txn_id

    async def begin(self) -> None:
        if self.transaction_state.phase is Phase.NEW:
            await self._take_identity()
        self.transaction_state.begin()
        self._stint += 1
        assert self.transaction_state.identity is not None
        sender = self._sender
        assert isinstance(sender, TxnSender)
        sender.begin(self.transaction_state.identity)

    async def commit(self) -> None:
        """Everything sent is flushed first, and the transaction is decided when this returns.

        Raises TransactionError if something of it failed: then it can only be aborted. If this is
        cancelled, call it again: the same question is asked until it is answered.
        """
        await self.flush()
        await self._end_transaction(committed=True)

    async def abort(self) -> None:
        """What still waits is not sent."""
        error = TransactionError(f"The transaction of {self.txn_id!r} was aborted.")
        for place in list(self._gathering):
            self._close_batch(place)
        sender = self._sender
        assert isinstance(sender, TxnSender)
        sender.give_up(error)
        await self._settle()
        await self._end_transaction(committed=False)

    async def prepare(self) -> Identity:
        """Flush; nothing can be sent from now on. Store what this returns with what is committed
        elsewhere: `complete` with it, by this producer or a later one (KIP-939)."""
        self.transaction_state.check("prepare", Phase.OPEN)
        await self.flush()
        return self.transaction_state.prepare()

    async def complete(self, stored: Sequence[int] | None) -> bool:
        """Commit the transaction that was found prepared if it is the one that was `stored`, and
        abort it otherwise. Whether it was committed; False too where none was found.

        stored: what `prepare` returned: two integers, however they were kept; None if nothing was.
        """
        kept = None if stored is None else _kept(stored)
        found = self.found
        if found is None:
            return False
        await self._end_transaction(committed=found == kept)
        return found == kept

    async def send_offsets(
        self, offsets: Mapping[TopicPartition, int], group: GroupMetadata | str
    ) -> None:
        """The next offsets to be read, by topic and partition; part of the transaction.

        A TransactionError where the group no longer has the member: its work is another's now.
        """
        self.transaction_state.check("send offsets", Phase.OPEN)
        if not offsets:
            return
        member = GroupMetadata(group) if isinstance(group, str) else group
        what = f"offsets of {member.group!r}"
        try:
            if not self.transaction_state.v2:
                await self._retrying(what, lambda: self._add_offsets(member.group))
            await self._retrying(what, lambda: self._commit_offsets(offsets, member))
        except (LedgerStreamError, *TRANSPORT_ERRORS) as error:
            self._failed(error, doubtful=not isinstance(error, KafkaError))
            self.transaction_state.check("send offsets", Phase.OPEN)
        except (
            asyncio.CancelledError
        ):  # they may arrive all the same: no commit may take them along
            self._failed(LedgerStreamError(f"Sending {what} was cancelled."), doubtful=True)
            raise
        self.transaction_state.touch()

    async def close(self, *, flush: bool = True) -> None:
        """End. A transaction that is open is aborted, a prepared one stays for its successor.

        Without `flush` an open one stays too, until a successor or its time limit aborts it.
        """
        try:
            under_way = self.transaction_state.phase in (Phase.OPEN, Phase.DOOMED)
            if flush and under_way and not self._closing:
                await self.abort()
        except Fenced:
            pass  # whoever has taken over has aborted it
        finally:
            await super().close(flush=flush)

    # -- requests

    async def _take_identity(self, *, keep_prepared: bool = False) -> None:
        state = self.transaction_state
        expected = state.expected or (-1, -1)

        async def ask() -> Any:
            return await self._coordinator.ask(
                Api.INIT_PRODUCER_ID,
                {
                    "transactional_id": state.txn_id,
                    "transaction_timeout": self._timeout_ms,
                    "producer_id": expected[0],
                    "producer_epoch": expected[1],
                    "enable2_pc": state.two_phase,
                    "keep_prepared_txn": keep_prepared,
                },
                _error_code,
            )

        try:
            reply = await self.cluster.retrying(f"a producer id for {state.txn_id!r}", ask)
        except KafkaError as error:
            if state.two_phase and error.code == NOT_ALLOWED.value:
                error.remedy = "Transactions in two phases are off there: --two-phase-commit."
            state.end_all(ErrorCode(error.code), error)
            assert state.error is not None
            raise state.error from error
        ongoing = Identity(
            getattr(reply, "ongoing_txn_producer_id", -1),
            getattr(reply, "ongoing_txn_producer_epoch", -1),
        )
        state.told_identity(Identity(reply.producer_id, reply.producer_epoch), ongoing)

    async def _add_partitions(self, wanted: Sequence[TopicPartition]) -> None:
        """V1. Raises KafkaError for the first partition that cannot be added."""
        topics: dict[str, list[int]] = {}
        for topic, partition in wanted:
            topics.setdefault(topic, []).append(partition)

        async def ask() -> None:
            await self._coordinator.ask(
                Api.ADD_PARTITIONS_TO_TXN,
                {
                    "v3_and_below_transactional_id": self.txn_id,
                    **self._as_fields("v3_and_below_"),
                    "v3_and_below_topics": [
                        {"name": name, "partitions": partitions}
                        for name, partitions in topics.items()
                    ],
                },
                _worst_of_partitions,
            )

        await self._retrying(f"partitions of {self.txn_id!r}", ask)
        self.transaction_state.touch()

    async def _add_offsets(self, group: str) -> None:
        fields = {"transactional_id": self.txn_id, "group_id": group, **self._as_fields()}
        await self._coordinator.ask(Api.ADD_OFFSETS_TO_TXN, fields, _error_code)
        self.transaction_state.touch()

    async def _commit_offsets(
        self, offsets: Mapping[TopicPartition, int], member: GroupMetadata
    ) -> None:
        group = self._groups.get(member.group)
        if group is None:
            group = self._groups[member.group] = Coordinator(self.cluster, Kind.GROUP, member.group)
        await group.ask(
            Api.TXN_OFFSET_COMMIT,
            {
                "transactional_id": self.txn_id,
                "group_id": member.group,
                **self._as_fields(),
                "generation_id": member.generation,
                "member_id": member.member_id,
                "group_instance_id": member.instance_id,
                "topics": offset_topics(offsets),
            },
            worst_of_offsets,
            version_max=None if self.transaction_state.v2 else OFFSETS_V1,
            take=answers_to(offsets),
        )

    async def _retrying(self, what: str, ask: Callable[[], Awaitable[None]]) -> None:
        """As `cluster.retrying`; what was not answered may still arrive, behind its repeat."""

        async def once() -> None:
            try:
                await ask()
            except TRANSPORT_ERRORS:
                self.transaction_state.doubt()
                raise

        await self.cluster.retrying(what, once)

    def _as_fields(self, prefix: str = "") -> dict[str, int]:
        identity = self.transaction_state.identity
        assert identity is not None
        producer_id, producer_epoch = identity
        return {f"{prefix}producer_id": producer_id, f"{prefix}producer_epoch": producer_epoch}

    async def _end_transaction(self, *, committed: bool) -> None:
        """Asked until it is answered: the same request, which a coordinator knows again."""
        state = self.transaction_state
        wish = state.ask_end(committed=committed)
        if wish is None:
            return
        tries = 0

        async def ask() -> Any:
            nonlocal tries
            tries += 1
            return await self._coordinator.ask(
                Api.END_TXN,
                {
                    "transactional_id": state.txn_id,
                    "producer_id": wish.identity.producer_id,
                    "producer_epoch": wish.identity.producer_epoch,
                    "committed": wish.committed,
                },
                _error_code,
                version_max=None if state.v2 else END_V1,
            )

        verb = "commit" if committed else "abort"
        try:
            reply = await self.cluster.retrying(f"the {verb} of {state.txn_id!r}", ask)
        except (DeliveryTimeout, SecurityError, *TRANSPORT_ERRORS) as error:
            unknown = DeliveryTimeout(
                f"The {verb} of {state.txn_id!r} was not answered; it is not known how the "
                f"transaction ends. {error}"
            )
            state.told_not_ended(None, unknown)
            raise unknown from error
        except KafkaError as error:
            state.told_not_ended(ErrorCode(error.code), error)
            assert state.error is not None
            raise state.error from error
        identity = Identity(getattr(reply, "producer_id", -1), getattr(reply, "producer_epoch", -1))
        state.told_end(identity, repeated=tries > 1)

    # -- the producer's hooks

    def _check_open(self) -> None:
        super()._check_open()
        self.transaction_state.check("send", Phase.OPEN)

    def _delivered(self) -> None:
        self.transaction_state.touch()

    def _failed(self, error: Exception, *, doubtful: bool) -> None:
        code = ErrorCode(error.code) if isinstance(error, KafkaError) else None
        self.transaction_state.fail(error, code, doubtful=doubtful)


def _kept(stored: Sequence[int]) -> Identity:
    """An identity that was kept elsewhere. Raises ConfigError: abort is for what is another one."""
    try:
        producer_id, producer_epoch = stored
    except (TypeError, ValueError):
        raise ConfigError(
            f"{stored!r} is no identity of a prepared transaction.",
            "Give the two integers that prepare() returned, or None if they were not kept.",
        ) from None
    what = "A part of a prepared transaction's identity"
    return Identity(whole(what, producer_id), whole(what, producer_epoch))


def _error_code(reply: Any) -> ErrorCode:
    code: ErrorCode = reply.error_code
    return code


def _worst_of_partitions(reply: Any) -> ErrorCode:
    """The error that says why; the others were not attempted for it."""
    codes: list[ErrorCode] = [
        part.partition_error_code
        for topic in reply.results_by_topic_v3_and_below
        for part in topic.results_by_partition
    ]
    wrong = [code for code in codes if code is not ErrorCode.none]
    reasons = [code for code in wrong if code is not ErrorCode.operation_not_attempted]
    return (reasons or wrong or [ErrorCode.none])[0]
