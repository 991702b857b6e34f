"""What goes in and out of a classic group: who asks to join or sync, what each is told, a member.

A request that cannot be answered yet is parked in the member as a `ticket`, which is the caller's:
anything that it will know the request by. An `Outcome` gathers what one step brings: records, and
who is told what once they are durable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, NamedTuple

from kio.schema.errors import ErrorCode

from ledgerstream.errors import DecodeError
from ledgerstream.groups.records import GroupRecord, MemberMetadata
from ledgerstream.groups.timers import Timer
from ledgerstream.machine import Decision
from ledgerstream.wire.fields import Fields

Ticket = Any
CONSUMER = "consumer"  # the protocol type whose subscriptions are understood here
REBALANCE_MS_MIN = 100  # a client that gives its group less time would only keep the clock busy


class Phase(StrEnum):
    """Of a classic group, by the names that Kafka's tools show."""

    EMPTY = "Empty"
    PREPARING = "PreparingRebalance"  # waits for members to (re)join
    COMPLETING = "CompletingRebalance"  # waits for the leader's assignment
    STABLE = "Stable"
    DEAD = "Dead"  # deleted, or never there


class Join(NamedTuple):
    """A JoinGroup request. `new_id` is what the member is called if it has no id yet."""

    member_id: str
    new_id: str
    instance_id: str | None = None
    client_id: str = ""
    client_host: str = ""
    session_ms: int = 45_000
    rebalance_ms: int = 300_000
    protocol_type: str = CONSUMER
    protocols: tuple[tuple[str, bytes], ...] = ()  # name and metadata, the best first
    must_know_id: bool = True  # it is told its id, and asks again with it (KIP-394)
    may_skip: bool = True  # a leader that comes back need not assign again (KIP-814)

    @property
    def is_nameless(self) -> bool:
        """It has to be told its id first."""
        return not self.member_id and self.instance_id is None and self.must_know_id


class Sync(NamedTuple):
    """A SyncGroup request; only the leader's has assignments."""

    member_id: str
    generation: int
    instance_id: str | None = None
    protocol_type: str | None = None
    protocol: str | None = None
    assignments: tuple[tuple[str, bytes], ...] = ()


class Joined(NamedTuple):
    """The reply to a Join. `members`, (id, instance id, metadata) each, for the leader alone."""

    error: ErrorCode
    member_id: str = ""
    generation: int = -1
    protocol_type: str | None = None
    protocol: str | None = None
    leader: str = ""
    members: tuple[tuple[str, str | None, bytes], ...] = ()
    skip_assignment: bool = False


class Synced(NamedTuple):
    """The reply to a Sync."""

    error: ErrorCode
    protocol_type: str | None = None
    protocol: str | None = None
    assignment: bytes = b""


Told = tuple[Ticket, Joined | Synced]


class Outcome:
    """What one step brings. `at_ms` is of the clock that never jumps, `now_ms` of the wall's."""

    __slots__ = ("at_ms", "now_ms", "records", "told")

    def __init__(self, at_ms: int, now_ms: int) -> None:
        self.at_ms, self.now_ms = at_ms, now_ms
        self.records: list[GroupRecord] = []
        self.told: list[Told] = []

    def tell(self, ticket: Ticket, reply: Joined | Synced) -> None:
        if ticket is not None:
            self.told.append((ticket, reply))

    def decision(self) -> Decision[GroupRecord, tuple[Told, ...]]:
        return Decision(tuple(self.records), tuple(self.told))


class Member:
    """One member of a classic group. All but what `recorded` gives is soft: lost on failover."""

    __slots__ = (
        "assignment", "client_host", "client_id", "instance_id", "is_new", "joining", "member_id",
        "protocols", "rebalance_ms", "session_ms", "syncing", "timer",
    )  # fmt: skip

    def __init__(self, member_id: str, asked: Join, expire: Callable[[Member, Outcome], None]):
        self.member_id = member_id
        self.instance_id = asked.instance_id
        self.client_id, self.client_host = asked.client_id, asked.client_host
        self.joining: Ticket = None  # a parked Join, a parked Sync
        self.syncing: Ticket = None
        self.is_new = False  # it does not know its id yet, so it sends no heartbeats
        self.assignment = b""
        self.timer = Timer(lambda out: expire(self, out))
        self.update(asked)

    def update(self, asked: Join) -> None:
        self.protocols = asked.protocols
        self.rebalance_ms = max(asked.rebalance_ms, REBALANCE_MS_MIN)
        self.session_ms = asked.session_ms

    def metadata(self, protocol: str | None) -> bytes:
        return next((content for name, content in self.protocols if name == protocol), b"")

    def vote(self, candidates: Iterable[str]) -> str:
        """The best of what all can do."""
        return next(name for name, _ in self.protocols if name in candidates)

    def recorded(self, protocol: str | None, assignment: bytes) -> MemberMetadata:
        return MemberMetadata(
            self.member_id, self.instance_id, self.client_id, self.client_host, self.rebalance_ms,
            self.session_ms, self.metadata(protocol), assignment,
        )  # fmt: skip


def subscribed_topics(subscription: bytes) -> frozenset[str] | None:
    """What a consumer's subscription (ConsumerProtocolSubscription, any version) names.

    None where it is not one; versions only add to what the first has.
    """
    fields = Fields(subscription)
    try:
        fields.i16()
        names = fields.plain_array(fields.nullable_plain_string)
    except DecodeError:
        return None
    found = frozenset(name for name in names if name is not None)
    return None if None in names else found
