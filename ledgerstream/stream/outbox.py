"""The log's side of a step that emits: one worker slot, its transactional producer, the witness.

What is to be done is said by `witness`; here it is done. A worker that emits holds a slot of
`ls_slots`, whose transactional id nobody else uses while its connection to Postgres lives; should
two ever have one, the log fences the older.

On a log that offers it, transactions are prepared in two phases (KIP-939) and never time out;
elsewhere they do, and the recovery sends again what was lost. Both need Transactions V2.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import structlog
from kio.schema.errors import ErrorCode

from ledgerstream.client.transaction import Fenced, Phase, TransactionError
from ledgerstream.client.transactional import TransactionalProducer
from ledgerstream.errors import ConfigError, DeliveryTimeout, KafkaError, LedgerStreamError
from ledgerstream.limits import LIMITS
from ledgerstream.stream.faults import Reload
from ledgerstream.stream.outputs import Sends
from ledgerstream.stream.slots import take_slot
from ledgerstream.stream.witness import Offsets, TxnIdentity
from ledgerstream.wire.columns import RowCodec

if TYPE_CHECKING:
    from ledgerstream.client import Client
    from ledgerstream.stream.processor import Processor, Topic
    from ledgerstream.stream.sink import Sink

log = structlog.get_logger()
NOT_ALLOWED = ErrorCode.transactional_id_authorization_failed.value


def group_of(processor: str) -> str:
    """The group, without members, whose offsets are the witness."""
    return f"ls.{processor}.witness"


def id_of(processor: str, slot: int) -> str:
    return f"ls.{processor}.{slot}"


class Outbox:
    """Of one worker over one topic. Use `await Outbox.open(…)`.

    witness:  by partition, up to where outputs are in the log, as far as it is known here.
    """

    def __init__(self, client: Client, processor: type[Processor], topic: str, slot: int) -> None:
        self.slot = slot
        self.witness: dict[int, int] = {}
        self.carry_all = False  # the next step takes the witness along, whether it emits or not
        self._client = client
        self._name = processor.name
        self._topic = topic
        self._txn_id = id_of(processor.name, slot)
        self._codecs = {
            each: RowCodec(each.event, key=each.key, encoding=each.encoding)
            for each in processor.outputs
        }
        self._producer: TransactionalProducer | None = None
        self._carried_at = time.monotonic()

    @classmethod
    async def open(
        cls, client: Client, processor: type[Processor], topic: str, sink: Sink
    ) -> Outbox:
        """Take a slot on the sink's connection. Raises ConfigError for an output topic that is not
        there."""
        for output in processor.outputs:
            try:
                await client.topic(output.name)
            except KafkaError as error:
                if error.code != ErrorCode.unknown_topic_or_partition.value:
                    raise
                raise ConfigError(
                    f"{processor.name} emits to topic {output.name!r}, which is not there.",
                    f"Make it: ledgerstream topic create {output.name} --partitions …",
                ) from error
        slot = await take_slot(sink.connection, processor.name, sink.owner)
        return cls(client, processor, topic, slot)

    # -- recovery

    async def end_stored(self, identity: TxnIdentity) -> None:
        """EndTxn(commit) of what a row names. Any answer will do."""
        ended = await self._client.transactions.commit(*identity)
        log.info("stored transaction ended", id=identity.transactional_id, taken=ended)

    async def read_witness(self, partitions: Iterable[int]) -> dict[int, int] | None:
        """None where an open transaction is in the way for longer than `witness_wait_ms`."""
        places = [(self._topic, number) for number in partitions]
        try:
            found = await self._client.committed(
                group_of(self._name), places, limit_ms=LIMITS.witness_wait_ms
            )
        except DeliveryTimeout as error:
            log.warning("witness not stable", processor=self._name, why=str(error))
            return None
        return {number: offset for (_, number), offset in found.items()}

    async def fence(self, slots: Iterable[int]) -> None:
        """Abort what these slots have open. A living worker among them is only fenced: its next
        step is made whole by the recovery that follows."""
        operator = self._client.transactions
        for slot in slots:
            txn_id = id_of(self._name, slot)
            try:
                if (await operator.describe(txn_id)).state == "Ongoing":
                    log.warning("transaction in the way aborted", id=txn_id)
                    await operator.abort(txn_id)
            except KafkaError as error:
                log.info("no transaction to abort", id=txn_id, why=str(error))

    async def take_identity(self) -> None:
        """Whoever had our id is fenced, what he left open aborted. Raises ConfigError for a log
        without Transactions V2."""
        client = self._client
        try:
            self._producer = await client.transactional(self._txn_id, two_phase=True)
        except ConfigError:
            self._producer = await client.transactional(self._txn_id)
        except LedgerStreamError as error:
            cause = error.__cause__
            if not isinstance(cause, KafkaError) or cause.code != NOT_ALLOWED:
                raise
            self._producer = await client.transactional(self._txn_id)
        if not self._producer.transaction_state.v2:
            await self._producer.close(flush=False)
            self._producer = None
            raise ConfigError(
                f"{self._name} writes to topics and Postgres in one step, and this log has no "
                "Transactions V2 (KIP-890): a late end of one transaction could end another.",
                "Use Apache Kafka 4.0 or later with transaction.version 2, or LedgerStream's log.",
            )

    # -- steps

    async def send(self, sends: Mapping[Topic, Sends], witness: Offsets) -> TxnIdentity:
        """All of it in a new transaction, flushed. Raises KafkaError where the log refuses it for
        good, Reload where it may go better the next time."""
        producer = self._producer
        assert producer is not None
        try:
            await producer.begin()
            for topic, some in sends.items():
                await producer.write(
                    topic.name, some.rows, self._codecs[topic], stamps=some.stamps,
                    header=some.header,
                )  # fmt: skip
            offsets = {(self._topic, number): offset for number, offset in witness.items()}
            await producer.send_offsets(offsets, group_of(self._name))
            await producer.flush()
            producer.transaction_state.check("flush", Phase.OPEN)
        except (KafkaError, DeliveryTimeout, TransactionError, Fenced) as error:
            fenced = producer.transaction_state.phase is Phase.OVER
            if isinstance(error, KafkaError) and not error.retriable and not fenced:
                await self.abort()
                raise
            raise Reload(f"outputs were not sent: {error}") from error
        identity = producer.transaction_state.identity
        assert identity is not None
        return TxnIdentity(self._txn_id, *identity)

    async def commit(self, witness: Offsets) -> None:
        """The transaction under way is committed, and the witness stands there. Raises Reload."""
        assert self._producer is not None
        try:
            await self._producer.commit()
        except (KafkaError, DeliveryTimeout, TransactionError, Fenced) as error:
            raise Reload(f"the transaction of a committed step was not ended: {error}") from error
        self.witness.update(witness)
        self.carry_all = False
        self._carried_at = time.monotonic()

    async def abort(self) -> None:
        """The transaction under way is not to be. Raises Reload."""
        assert self._producer is not None
        try:
            await self._producer.abort()
        except (KafkaError, DeliveryTimeout, TransactionError, Fenced) as error:
            raise Reload(f"a transaction was not aborted: {error}") from error

    @property
    def carry_s(self) -> float:
        """Seconds until the witness is to be written anew though nothing is emitted."""
        if not self.witness:
            return LIMITS.witness_age_ms_max / 1_000
        return self._carried_at + LIMITS.witness_age_ms_max / 1_000 - time.monotonic()

    def put_off(self) -> None:
        """It was asked for, and is due again after its whole time."""
        self._carried_at = time.monotonic()

    async def close(self) -> None:
        """What is open is left: a successor, or its time limit, sees to it."""
        if self._producer is not None:
            await self._producer.close(flush=False)
            self._producer = None
