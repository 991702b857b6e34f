"""What a member of a group has in its hands, is to have, and says next. Pure.

`Holding` is what both protocols have in common: the coordinator's answers set a `target`, `step`
says what the member's user has to do to get there, one thing after the other, and `has` is what it
uses or may use. `Member` is one of a next-generation group (KIP-848), whose heartbeats say all of
it; that of a classic group is in `classicmember.py`.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar
from uuid import UUID

P = TypeVar("P", bound=Hashable)
Place = tuple[UUID, int]  # a partition, by its topic's id
JOINS, LEAVES, AWAY = 0, -1, -2  # in an epoch's place


class Kind(StrEnum):
    """The names of a listener's methods."""

    REVOKED = "revoked"
    ASSIGNED = "assigned"
    LOST = "lost"


class Step(NamedTuple, Generic[P]):
    kind: Kind
    places: frozenset[P]


class Holding(Generic[P]):
    """What a member has, and is to have; a caller reads `has` and `target`."""

    def __init__(self) -> None:
        self.has: frozenset[P] = frozenset()  # what is in use, or is being taken up or let go of
        self.target: frozenset[P] = frozenset()
        self.leaving = False
        self._lost = False
        self._busy: Step[P] | None = None

    def step(self) -> Step[P] | None:
        """What its user has to do next; None while there is nothing, or while it is at it."""
        if self._busy is not None:
            return None
        if self._lost and self.has:
            return Step(Kind.LOST, self.has)
        if gone := self.has - self.target:
            return Step(Kind.REVOKED, gone)
        if new := self.target - self.has:
            return Step(Kind.ASSIGNED, new)
        return None

    def begin(self, step: Step[P]) -> None:
        """The step, or a part of it, is under way."""
        assert self._busy is None
        if step.kind is Kind.ASSIGNED:
            self.has |= step.places
        self._busy = step

    def done(self) -> None:
        """What was begun is done."""
        assert self._busy is not None
        if self._busy.kind is not Kind.ASSIGNED:
            self.has -= self._busy.places
        self._busy = None
        self._lost = self._lost and bool(self.has)

    @property
    def free(self) -> bool:
        """It uses nothing, and may join."""
        return not self.has and self._busy is None

    @property
    def is_lost(self) -> bool:
        """What it has may be another's already."""
        return self._lost

    def lose(self) -> None:
        """It is no member any more; what it has is lost."""
        self.target = frozenset()
        self._lost = self._lost or not self.free

    def leave(self) -> None:
        """It is to let go of everything, and takes nothing up any more."""
        self.leaving = True
        self.target = frozenset()


class Beat(NamedTuple):
    """A heartbeat. None (or −1): as it was."""

    member_id: str
    epoch: int
    rebalance_ms: int = -1
    topics: frozenset[str] | None = None
    regex: str | None = None
    owned: frozenset[Place] | None = None


class Member(Holding[Place]):
    """One of a next-generation group. `member_id` is its own choice and never changes."""

    def __init__(
        self,
        member_id: str,
        topics: frozenset[str],
        regex: str | None = None,
        *,
        instance_id: str | None = None,
        rebalance_ms: int,
    ) -> None:
        super().__init__()
        self.member_id, self.instance_id = member_id, instance_id
        self.topics, self.regex = topics, regex
        self.rebalance_ms = rebalance_ms
        self.epoch = JOINS
        self._missed = False  # an answer: nobody knows what the coordinator has heard
        self._told: frozenset[Place] | None = None  # what it knows that we own, since it last gave
        self._subscribed: tuple[frozenset[str], str | None] | None = None  # as it knows

    def subscribe(self, topics: frozenset[str], regex: str | None = None) -> None:
        """From the next heartbeat on."""
        if regex is None and self.regex is not None:
            regex = ""  # which takes it back
        self.topics, self.regex = topics, regex

    def beat(self) -> Beat | None:
        """What the next heartbeat says; None while nothing can be said: it has to let go of what it
        lost before it joins again.

        Everything when it joins, or has missed an answer. What it owns is said only when it has
        taken up all that it was given: before, the coordinator would believe that the rest was
        given up, and give it to another. Where everything has to be said in between, what is still
        to be taken up or let go of counts as owned.
        """
        if self.epoch == JOINS:
            return self._whole(frozenset()) if self.free and not self.leaving else None
        if self._missed:
            return self._whole(self.has | self.target)
        changed = (self.topics, self.regex) != self._subscribed
        return Beat(
            self.member_id,
            self.epoch,
            topics=self.topics if changed else None,
            regex=self.regex if changed else None,
            owned=self.has if self._owes else None,
        )

    def _whole(self, owned: frozenset[Place]) -> Beat:
        return Beat(
            self.member_id, self.epoch, self.rebalance_ms, self.topics, self.regex, owned
        )  # fmt: skip

    @property
    def _owes(self) -> bool:
        """The coordinator waits to hear that we have what it gave, and nothing else."""
        settled = self.has == self.target and self._busy is None
        return settled and self._told != self.has and not self.leaving

    @property
    def urgent(self) -> bool:
        """Whether the next heartbeat has news."""
        if self.epoch == JOINS:
            return self.free and not self.leaving
        return self._owes or (self.topics, self.regex) != self._subscribed

    def told(self, beat: Beat, epoch: int, assignment: frozenset[Place] | None) -> None:
        """The answer to `beat`; `assignment` None: as it was."""
        if self.epoch == JOINS:
            assert self.free
        self.epoch = epoch
        self._missed = False
        if beat.topics is not None:
            self._subscribed = beat.topics, beat.regex
        if assignment is not None:
            self._told = None
            self.target = frozenset() if self.leaving else assignment
        elif beat.owned is not None:
            self._told = beat.owned

    def missed(self) -> None:
        """There was no answer; whether it was heard is not known."""
        self._missed = True

    def fenced(self) -> None:
        """The coordinator does not know it, or not as it is, or was silent for a session."""
        self.epoch = JOINS
        self._missed = False
        self._told = self._subscribed = None
        self.lose()

    @property
    def leave_epoch(self) -> int:
        """How it says goodbye: a static member will be back, and keeps what it has meanwhile."""
        return LEAVES if self.instance_id is None else AWAY
