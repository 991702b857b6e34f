"""One partition's batches on their way to it: sequences, retries, order (KIP-98, KIP-360). Pure.

A batch gets its sequence number when it is first sent and keeps it in every retry. After a failure
all that is under way comes home before the first of it is sent again. A sequence number that is
used up in vain (a batch refused for good, or given up) would leave a gap that the broker refuses:
then the lane goes on under the next epoch of its producer id, from sequence 0. Batches of which it
is certain that they are not in the log move to the new epoch; of others it cannot be known, and
they are given up rather than doubled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kio.schema.errors import ErrorCode

from ledgerstream.client.errors import RETRIABLE
from ledgerstream.errors import DeliveryTimeout
from ledgerstream.wire.batches import HEADER_BYTES, Buffer

SEQUENCES = 2**31
EPOCH_MAX = 2**15 - 1

# the broker has seen another history of this producer than we have
_LOST_ORDER = frozenset({
    ErrorCode.out_of_order_sequence_number, ErrorCode.invalid_producer_epoch,
    ErrorCode.unknown_producer_id, ErrorCode.producer_fenced,
})  # fmt: skip
# decided before anything is appended; after any other error the batch may be in the log
_NOT_APPENDED = _LOST_ORDER | frozenset({
    ErrorCode.corrupt_message, ErrorCode.message_too_large, ErrorCode.record_list_too_large,
    ErrorCode.invalid_record, ErrorCode.invalid_timestamp, ErrorCode.invalid_topic_exception,
    ErrorCode.unsupported_for_message_format, ErrorCode.unsupported_compression_type,
    ErrorCode.topic_authorization_failed, ErrorCode.cluster_authorization_failed,
    ErrorCode.not_enough_replicas, ErrorCode.leader_not_available, ErrorCode.policy_violation,
    ErrorCode.concurrent_transactions, ErrorCode.transaction_abortable,
    ErrorCode.invalid_txn_state, ErrorCode.transactional_id_authorization_failed,
})  # fmt: skip


@dataclass(slots=True, eq=False)
class Pending:
    """One batch: its body, encoded and compressed. The header is made when it is sent."""

    body: Buffer
    count: int
    base_timestamp: int
    max_timestamp: int
    codec: int
    deadline: float
    settle: Callable[[int | Exception], None]  # base offset or error, once
    sequence: int = -1
    home: bool = False  # sent, failed, and to be sent again with the others
    doubtful: bool = False  # a try of it ended unknown: it may be in the log

    @property
    def size(self) -> int:
        return len(self.body) + HEADER_BYTES


@dataclass(slots=True, eq=False)
class Lane:
    """One partition's batches, in order: those sent first, then those that wait."""

    topic: str
    partition: int
    waiting: deque[Pending] = field(default_factory=deque)
    sent: list[Pending] = field(default_factory=list)
    identity: tuple[int, int] | None = None  # producer id and epoch
    spent_id: int = -1  # the producer id that this lane can use no more
    next_sequence: int = 0
    acknowledged: bool = False  # the broker has a batch of this identity
    lost: bool = False  # a sequence was used up in vain: a new identity is due
    transactional: bool = False  # a new identity comes with the next transaction, by `begin`
    joined: bool = False  # its partition was added to the transaction (V1)
    pause_until: float = 0.0
    pause_ms: float = 0.0
    trouble: str = ""  # what went wrong last

    def ready(self, now: float, in_flight_max: int) -> bool:
        """Whether a batch may be sent now.

        Until the broker has a first batch of this identity it would take any sequence: a second
        one that overtook it would shut it out. So there is only one until then.
        """
        return (
            bool(self.waiting)
            and self.identity is not None
            and not self.lost
            and now >= self.pause_until
            and len(self.sent) < (in_flight_max if self.acknowledged else 1)
            and not any(pending.home for pending in self.sent)
        )

    def take(self) -> Pending:
        """The next batch, which is sent now."""
        pending = self.waiting.popleft()
        if pending.sequence < 0:
            pending.sequence = self.next_sequence
            self.next_sequence = (self.next_sequence + pending.count) % SEQUENCES
        self.sent.append(pending)
        return pending

    def begin(self, identity: tuple[int, int]) -> None:
        """The next transaction. Nothing is under way, and nothing waits."""
        assert not self.sent and not self.waiting
        if identity != self.identity:
            self.identity = identity
            self.next_sequence, self.acknowledged = 0, False
        self.lost = self.joined = False
        self.pause_until = self.pause_ms = 0.0
        self.trouble = ""

    def pause(self, now: float, first_ms: float, ms_max: float) -> None:
        """Send nothing for a while, and longer each time until something is delivered."""
        self.pause_ms = min(max(self.pause_ms * 2, first_ms), ms_max)
        self.pause_until = now + self.pause_ms / 1000

    # -- what becomes of a batch that was taken

    def delivered(self, pending: Pending, offset: int) -> None:
        self.sent.remove(pending)
        self.acknowledged = True
        self.pause_ms = 0
        self.trouble = ""
        pending.settle(offset)
        self._gather()

    def unsent(self, pending: Pending, why: str) -> None:
        """It did not leave this process."""
        self.trouble = why
        pending.home = True
        self._gather()

    def unanswered(self, pending: Pending, why: str) -> None:
        """It was sent, and what became of it is not known."""
        pending.doubtful = True
        self.unsent(pending, why)

    def refused(self, pending: Pending, code: ErrorCode, error: Exception) -> None:
        """The broker answered with an error."""
        if code not in _NOT_APPENDED:
            pending.doubtful = True
        if code in _LOST_ORDER:
            # behind a batch that failed this is expected; of the first one it is the truth
            again = self.lost or self.sent[0] is not pending
        else:
            again = code in RETRIABLE
        self.trouble = str(error)
        if again:
            pending.home = True
        else:
            self.sent.remove(pending)
            pending.settle(error)
            self.lost = True
            if code in _LOST_ORDER and code is not ErrorCode.out_of_order_sequence_number:
                self._leave_id()
        self._gather()

    # -- giving up

    def expire(self, now: float, limit_ms: int) -> None:
        """Give up what waits past its delivery time."""
        while self.waiting and self.waiting[0].deadline <= now:
            pending = self.waiting.popleft()
            fate = "may or may not be" if pending.doubtful else "are not"
            last = f" The last trouble: {self.trouble}" if self.trouble else ""
            self._give_up(pending, DeliveryTimeout(
                f"{pending.count:,} records to {self.topic}-{self.partition} were not "
                f"acknowledged within {limit_ms / 1000:g} s; they {fate} in the log.{last}"
            ))  # fmt: skip
        self._gather()

    def fail_waiting(self, error: Exception) -> None:
        """All that waits cannot be delivered."""
        while self.waiting:
            self._give_up(self.waiting.popleft(), error)
        self._gather()

    def fail_all(self, error: Exception) -> None:
        """The end: nothing is delivered any more."""
        batches, self.sent, self.waiting = [*self.sent, *self.waiting], [], deque()
        for pending in batches:
            pending.settle(error)

    def _give_up(self, pending: Pending, error: Exception) -> None:
        self.lost = self.lost or pending.sequence >= 0
        pending.settle(error)

    def _gather(self) -> None:
        """Once nothing is under way: what failed waits again, in front and in order."""
        if not all(pending.home for pending in self.sent):
            return
        for pending in reversed(self.sent):
            pending.home = False
            self.waiting.appendleft(pending)
        self.sent = []
        if self.lost and self.transactional:
            self._give_up_all()
        elif self.lost:
            self._renew()

    def _give_up_all(self) -> None:
        """The transaction can only be aborted: nothing of it is sent any more."""
        given_up, self.waiting = self.waiting, deque()
        for pending in given_up:
            fate = "may or may not be" if pending.doubtful else "are not"
            pending.settle(DeliveryTimeout(
                f"{pending.count:,} records to {self.topic}-{self.partition} were given up, as a "
                f"batch of their transaction failed; they {fate} in the log."
            ))  # fmt: skip

    def _renew(self) -> None:
        """The next identity. What may be in the log under the old one cannot be sent again."""
        kept: deque[Pending] = deque()
        for pending in self.waiting:
            if pending.doubtful:
                pending.settle(DeliveryTimeout(
                    f"{pending.count:,} records to {self.topic}-{self.partition} were given up, as "
                    "a batch before them failed for good; they may or may not be in the log. "
                    f"The last trouble: {self.trouble}"
                ))  # fmt: skip
            else:
                pending.sequence = -1
                kept.append(pending)
        self.waiting = kept
        self.next_sequence, self.acknowledged, self.lost = 0, False, False
        if self.identity is not None:
            producer_id, producer_epoch = self.identity
            if producer_epoch < EPOCH_MAX:
                self.identity = producer_id, producer_epoch + 1
            else:
                self._leave_id()

    def _leave_id(self) -> None:
        if self.identity is not None:
            self.spent_id = self.identity[0]
            self.identity = None
