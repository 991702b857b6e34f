"""What a transactional producer may do next, and what it has to do first. Pure.

`begin`, `touch`, `doubt`, `fail` and `ask_…` are the caller's side, `told_…` what brokers answer.
Two kinds of transactions: under V2 (KIP-890) each has an epoch of its own, so that whatever arrives
late is about another one and refused; under V1 an epoch serves many, so after anything whose
outcome is not certain a new InitProducerId comes first: it raises the epoch, and what is still on
its way then ends nothing (KIP-360).
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from kio.schema.errors import ErrorCode

from ledgerstream.errors import LedgerStreamError

NOBODY = (-1, -1)


class Phase(StrEnum):
    """Of a transactional id, as its producer knows it."""

    NEW = "new"  # has no identity yet, or needs another
    FOUND = "found"  # took over a prepared transaction, which has to be completed first
    READY = "ready"
    OPEN = "open"
    PREPARED = "prepared"  # everything is written; only its end is left (KIP-939)
    DOOMED = "doomed"  # something of it failed: it can only be aborted
    ENDING = "ending"  # EndTxn is under way, and is asked until it is answered
    OVER = "over"  # another producer has the id, or the broker refuses it for good


MOVES = frozenset({
    (Phase.NEW, Phase.READY), (Phase.NEW, Phase.FOUND), (Phase.FOUND, Phase.ENDING),
    (Phase.READY, Phase.OPEN), (Phase.OPEN, Phase.PREPARED), (Phase.OPEN, Phase.DOOMED),
    (Phase.OPEN, Phase.ENDING), (Phase.PREPARED, Phase.ENDING), (Phase.PREPARED, Phase.DOOMED),
    (Phase.DOOMED, Phase.ENDING), (Phase.OPEN, Phase.READY), (Phase.PREPARED, Phase.READY),
    (Phase.DOOMED, Phase.READY), (Phase.DOOMED, Phase.NEW), (Phase.OPEN, Phase.NEW),
    (Phase.PREPARED, Phase.NEW), (Phase.ENDING, Phase.READY), (Phase.ENDING, Phase.NEW),
    (Phase.ENDING, Phase.DOOMED),
    *((phase, Phase.OVER) for phase in Phase if phase is not Phase.OVER),
})  # fmt: skip


class TransactionError(LedgerStreamError):
    """The transaction failed; `abort` ends it, and the next one may succeed."""


class Fenced(LedgerStreamError):
    """Another producer has taken over the transactional id; this one can do nothing any more."""


class Identity(NamedTuple):
    """Who may write and end: a producer id and an epoch."""

    producer_id: int
    producer_epoch: int


class Ask(NamedTuple):
    """An EndTxn request, to be repeated as it is until it is answered."""

    committed: bool
    identity: Identity


# the id is another's, or was never this producer's
_FENCED = frozenset({
    ErrorCode.producer_fenced, ErrorCode.invalid_producer_epoch,
    ErrorCode.invalid_producer_id_mapping, ErrorCode.transaction_coordinator_fenced,
})  # fmt: skip


class Transaction:
    """One transactional id's state, of which a caller reads `phase`, `identity` and `error`."""

    def __init__(self, txn_id: str, *, v2: bool = True, two_phase: bool = False) -> None:
        self.txn_id, self.v2, self.two_phase = txn_id, v2, two_phase
        self.phase = Phase.NEW
        self.identity: Identity | None = None
        self.found: Identity | None = None  # of a prepared transaction that was taken over
        self.error: Exception | None = None  # why it is doomed, or over
        self.touched = False  # the coordinator knows of something in this transaction
        self.doubtful = False  # something of it may still be on its way
        self._ending: Ask | None = None

    def _move(self, after: Phase) -> None:
        assert (self.phase, after) in MOVES, (self.txn_id, self.phase, after)
        self.phase = after

    # -- an identity

    @property
    def expected(self) -> Identity | None:
        """Whom InitProducerId is to say it is: none the first time, when whoever was there goes."""
        return self.identity

    def told_identity(self, identity: Identity, ongoing: Identity = Identity(*NOBODY)) -> None:
        """The answer to InitProducerId."""
        self.identity = identity
        self.doubtful = False
        self.touched = False
        if ongoing != NOBODY:
            self.found = ongoing
            self._move(Phase.FOUND)
        else:
            self._move(Phase.READY)

    # -- within a transaction

    def begin(self) -> None:
        """Raises what is in the way."""
        self.check("begin", Phase.READY)
        self.error = None
        self._move(Phase.OPEN)

    def check(self, what: str, *phases: Phase) -> None:
        """Raise unless it is in one of these phases."""
        if self.phase in phases:
            return
        if self.phase is Phase.OVER:
            assert self.error is not None
            raise self.error
        if self.phase is Phase.DOOMED:
            raise TransactionError(
                f"The transaction of {self.txn_id!r} has failed: {self.error}",
                "Abort it; then the next one may begin.",
            ) from self.error
        if self.phase is Phase.ENDING:
            raise LedgerStreamError(
                f"Cannot {what} now: the end of {self.txn_id!r} was asked for and not answered.",
                "Ask for the same end again.",
            )
        wanted = " or ".join(phases)
        raise LedgerStreamError(
            f"Cannot {what} now: the producer of {self.txn_id!r} is {self.phase}, not {wanted}."
        )

    def touch(self) -> None:
        """A broker has taken something of it: its coordinator knows of it."""
        self.touched = True

    def doubt(self) -> None:
        """A request of it that no sequence protects was not answered: it may come late."""
        self.doubtful = True

    def fail(self, error: Exception, code: ErrorCode | None, *, doubtful: bool) -> None:
        """Something of the transaction could not be done. `doubtful`: or it may come late.

        Under V1 it has in any case used up a sequence, which leaves a gap in this epoch.
        """
        self.doubtful = self.doubtful or doubtful or not self.v2
        if code in _FENCED:
            self.end_all(code, error)
        elif self.phase in (Phase.OPEN, Phase.PREPARED):
            self.error = error
            self._move(Phase.DOOMED)

    def end_all(self, code: ErrorCode | None, error: Exception) -> None:
        """Nothing can be done under this id any more, by this producer."""
        if self.phase is Phase.OVER:
            return
        if code in _FENCED:
            error = Fenced(
                f"The transactional id {self.txn_id!r} was taken over, or its transaction timed "
                f"out: {error}",
                "Begin again with a new producer if this one ought to have it.",
            )
        self.error = error
        self._move(Phase.OVER)

    # -- its end

    def prepare(self) -> Identity:
        """All is written: what names the transaction, for whoever has to complete it."""
        if not self.two_phase:
            raise LedgerStreamError(
                f"The producer of {self.txn_id!r} was not made for two phases.",
                "Make it with two_phase=True.",
            )
        self.check("prepare", Phase.OPEN)
        self._move(Phase.PREPARED)
        assert self.identity is not None
        return self.identity

    def ask_end(self, *, committed: bool) -> Ask | None:
        """EndTxn as it is to be sent; None where there is nothing to end.

        An abort of a doomed transaction that nothing is known of still goes out under V2: it takes
        the epoch away from what may come late. Under V1 a new InitProducerId does (`phase` NEW).
        Who was cancelled while it was asked asks again, the same.
        """
        if self._ending is not None and self._ending.committed == committed:
            self.doubtful = True
            return self._ending
        if committed:
            self.check("commit", Phase.OPEN, Phase.PREPARED, Phase.FOUND)
        else:
            self.check("abort", Phase.OPEN, Phase.PREPARED, Phase.FOUND, Phase.DOOMED)
        assert self.identity is not None
        if self.phase is not Phase.FOUND and not self.touched and not (self.v2 and self.doubtful):
            self._move(Phase.NEW if self.doubtful else Phase.READY)
            return None
        self._ending = Ask(committed, self.identity)
        self._move(Phase.ENDING)
        return self._ending

    def told_end(self, identity: Identity | None, *, repeated: bool) -> None:
        """EndTxn was answered well; `identity`: of the next transaction (V2). `repeated`: more
        than one was sent, and the others may still arrive."""
        assert self._ending is not None
        self._ending = None
        unsure = not self.v2 and (self.doubtful or repeated)
        if self.found is not None:
            self.found = None
        if self.v2 and identity is not None and identity != NOBODY:
            self.identity = identity
        self.touched = self.doubtful = False
        self._move(Phase.NEW if unsure else Phase.READY)

    def told_not_ended(self, code: ErrorCode | None, error: Exception) -> None:
        """EndTxn was refused for good, or never answered: then nobody here knows how it ended."""
        self._ending = None
        if code is ErrorCode.transaction_abortable:  # the coordinator asks for an abort (KIP-1050)
            self.error = error
            self._move(Phase.DOOMED)
        else:
            self.end_all(code, error)
