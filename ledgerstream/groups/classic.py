"""A classic group: members that join, a leader that assigns, generations. Pure.

What is remembered is the last completed generation (`GroupMetadata`), written when its leader has
assigned and when the group becomes empty; `adopt` is how it comes here, live and after a restart
alike. All else is soft and lost on failover by design: members that are joining, parked requests
and timers. After a restart members of the recorded generation go on with their heartbeats, and
those of one that was not completed hear that it is over, and join again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from kio.schema.errors import ErrorCode

from ledgerstream.groups.members import (
    CONSUMER,
    REBALANCE_MS_MIN,
    Join,
    Joined,
    Member,
    Outcome,
    Phase,
    Sync,
    Synced,
    Ticket,
    subscribed_topics,
)
from ledgerstream.groups.records import (
    GroupForgotten,
    GroupMetadata,
    MemberMetadata,
    OffsetCommitted,
)
from ledgerstream.groups.timers import Timer, Timers
from ledgerstream.limits import LIMITS

EMPTY, PREPARING, COMPLETING = Phase.EMPTY, Phase.PREPARING, Phase.COMPLETING
STABLE, DEAD = Phase.STABLE, Phase.DEAD
# (before, after) of a group at work; a restart begins in EMPTY or STABLE
MOVES = frozenset({
    (EMPTY, PREPARING), (STABLE, PREPARING), (COMPLETING, PREPARING),  # somebody comes, goes, asks
    (PREPARING, COMPLETING),  # all have joined, or the time is up
    (PREPARING, EMPTY),  # and nobody has
    (COMPLETING, STABLE),  # the leader has assigned
    (STABLE, STABLE),  # a static member has come back under another id
    (EMPTY, DEAD),
})  # fmt: skip


class Rules(NamedTuple):
    """What a broker asks of its classic groups."""

    initial_delay_ms: int = 0  # an empty group waits so long for more members
    new_member_ms: int = LIMITS.group_new_member_ms
    members_max: int = LIMITS.group_members_max
    metadata_bytes_max: int = LIMITS.group_metadata_bytes_max


class ClassicGroup:
    """One group. Also what a "simple" one is, which only has offsets: empty, without a type."""

    kind = "classic"

    def __init__(self, name: str, timers: Timers, rules: Rules) -> None:
        self.name = name
        self.recorded: GroupMetadata | None = None
        self.phase = EMPTY
        self.generation = 0
        self.protocol_type: str | None = None
        self.protocol: str | None = None
        self.leader: str | None = None
        self.members: dict[str, Member] = {}
        self._static: dict[str, str] = {}  # instance id → member id
        self._pending: dict[str, Timer] = {}  # ids that were given, and have not joined yet
        self._unsynced: set[str] = set()  # members of this generation that have not synced yet
        self._joining = 0  # members with a parked Join
        self._supported: Counter[str] = Counter()  # protocol → members that can do it
        self._subscribed: frozenset[str] | None = None
        self._timers, self._rules = timers, rules
        self._initial = False  # PREPARING, and EMPTY before: it waits for more
        self._initial_left_ms = self._initial_delay_ms = 0
        self._more_came = False
        self._join_timer = Timer(self._join_time_is_up)
        self._sync_timer = Timer(self._sync_time_is_up)
        self._again_timer = Timer(self._begin_again)
        self._stays_stable = False

    # -- what is remembered

    def adopt(self, record: GroupMetadata) -> None:
        """The only way in which a generation is completed: its record is in the log."""
        if record.generation > self.generation:
            self._timers.cancel(self._again_timer)  # it has begun again
        self.recorded = record
        self.protocol_type = record.protocol_type or None
        self.generation, self.protocol, self.leader = record[2:5]
        self.phase = STABLE if record.members else EMPTY
        self.members = {one.member_id: self._restored(one) for one in record.members}
        self._static = {
            member.instance_id: member_id
            for member_id, member in self.members.items()
            if member.instance_id is not None
        }
        self._supported = Counter(name for m in self.members.values() for name, _ in m.protocols)
        self._joining = sum(member.joining is not None for member in self.members.values())
        self._subscribed = self._find_subscribed()

    def _restored(self, one: MemberMetadata) -> Member:
        member = self.members.get(one.member_id)
        if member is None:
            asked = Join(
                one.member_id, "", one.instance_id, one.client_id, one.client_host, one.session_ms,
                one.rebalance_ms, protocols=((self.protocol or "", one.subscription),),
            )  # fmt: skip
            member = Member(one.member_id, asked, self._session_is_over)
        member.assignment = one.assignment
        return member

    def start(self, at_ms: int) -> None:
        """After a restart: members have a session's time to be heard of."""
        for member in self.members.values():
            self._timers.set(member.timer, at_ms + member.session_ms)

    def begin_again(self, *, stable: bool = False) -> None:
        """It was a next-generation group just now: its members are called to join, as soon as
        there is a time; not where each has what it is to have."""
        self._stays_stable = stable
        self._timers.set(self._again_timer, 0)

    def _begin_again(self, out: Outcome) -> None:
        self.start(out.at_ms)
        if self.phase is STABLE and not self._stays_stable:
            self._prepare(out)

    def call_off(self, out: Outcome) -> None:
        """It becomes a next-generation group: whoever waits is to join again."""
        for member in self.members.values():
            reply = Joined(ErrorCode.rebalance_in_progress, member.member_id)
            self._unpark_join(member, reply, out)
            self._unpark_sync(member, Synced(ErrorCode.rebalance_in_progress), out)

    def stop(self) -> None:
        """It is no group of its coordinator any more: no clock runs."""
        own = self._join_timer, self._sync_timer, self._again_timer
        for timer in (*own, *self._pending.values(), *(m.timer for m in self.members.values())):
            self._timers.cancel(timer)

    def _record(self, now_ms: int, assignments: dict[str, bytes]) -> GroupMetadata:
        members = tuple(
            member.recorded(self.protocol, assignments.get(member.member_id, b""))
            for member in self.members.values()
        )
        return GroupMetadata(
            self.name, self.protocol_type or "", self.generation, self.protocol, self.leader,
            now_ms, members,
        )  # fmt: skip

    # -- join

    def join(self, asked: Join, ticket: Ticket, out: Outcome) -> None:
        if not self._accepts(asked):
            self._drop(asked.member_id)
            out.tell(ticket, Joined(ErrorCode.group_max_size_reached))
        elif not self._can_do(asked):
            error = ErrorCode.inconsistent_group_protocol
            out.tell(ticket, Joined(error, asked.member_id))
        elif not asked.member_id:
            self._join_new(asked, ticket, out)
        elif asked.member_id in self._pending and asked.instance_id is None:
            self._add(asked, asked.member_id, ticket, out)
        else:
            self._join_again(asked, ticket, out)

    def _accepts(self, asked: Join) -> bool:
        """New members while there is room; in a rebalance the last to come again find none."""
        most, member_id = self._rules.members_max, asked.member_id
        member = self.members.get(member_id)
        if asked.is_nameless and len(self._pending) >= most:
            return False
        if self.phase is EMPTY:
            return len(self._pending) < most or member_id in self._pending
        if self.phase is PREPARING:
            return (member is not None and member.joining is not None) or self._joining < most
        return member is not None or len(self.members) < most

    def _can_do(self, asked: Join) -> bool:
        """Whether there is a protocol that all members and this one know."""
        if self.phase is EMPTY:
            return bool(asked.protocol_type) and bool(asked.protocols)
        count = len(self.members)
        return asked.protocol_type == self.protocol_type and any(
            self._supported[name] == count for name, _ in asked.protocols
        )

    def _join_new(self, asked: Join, ticket: Ticket, out: Outcome) -> None:
        known = None if asked.instance_id is None else self._static.get(asked.instance_id)
        if known is not None:
            self._replace_static(asked, known, ticket, out)
        elif asked.is_nameless:
            timer = Timer(lambda out: self._pending_is_over(asked.new_id, out))
            self._pending[asked.new_id] = timer
            self._timers.set(timer, out.at_ms + asked.session_ms)
            out.tell(ticket, Joined(ErrorCode.member_id_required, asked.new_id))
        else:
            self._add(asked, asked.new_id, ticket, out)

    def _add(self, asked: Join, member_id: str, ticket: Ticket, out: Outcome) -> None:
        if not self.members:
            self.protocol_type = asked.protocol_type
        member = self.members[member_id] = Member(member_id, asked, self._session_is_over)
        member.is_new = True
        if asked.instance_id is not None:
            self._static[asked.instance_id] = member_id
        self._count(member, 1)
        if self.leader is None:
            self.leader = member_id
        self._park_join(member, ticket, out)
        timer = self._pending.pop(member_id, None)
        if timer is not None:
            self._timers.cancel(timer)
        self._more_came = True
        self._timers.set(member.timer, out.at_ms + self._rules.new_member_ms)
        self._rebalance_or_go_on(out)

    def _join_again(self, asked: Join, ticket: Ticket, out: Outcome) -> None:
        error = self._why_not_member(asked.member_id, asked.instance_id)
        if error is ErrorCode.none and self.phase is EMPTY:
            error = ErrorCode.unknown_member_id
        if error is not ErrorCode.none:
            out.tell(ticket, Joined(error, asked.member_id))
            return
        member = self.members[asked.member_id]
        is_leader = member.member_id == self.leader
        same = member.protocols == asked.protocols
        # a leader that comes again wants to assign anew: topics may have changed
        if self.phase is PREPARING or not same or (self.phase is STABLE and is_leader):
            self._update(member, asked)
            self._park_join(member, ticket, out)
            self._rebalance_or_go_on(out)
        else:  # its answer was lost
            out.tell(ticket, self._joined(member))

    def _replace_static(self, asked: Join, old_id: str, ticket: Ticket, out: Outcome) -> None:
        """A static member has started again (KIP-345): whoever had its name is fenced."""
        old = self.members[old_id]
        self._unpark_join(old, Joined(ErrorCode.fenced_instance_id, old_id), out)
        self._unpark_sync(old, Synced(ErrorCode.fenced_instance_id), out)
        self._timers.cancel(old.timer)
        leader_before = self.leader
        member = Member(asked.new_id, asked, self._session_is_over)
        member.client_id, member.client_host = old.client_id, old.client_host
        member.assignment = old.assignment
        self._count(old, -1)
        self._count(member, 1)
        del self.members[old_id]
        self.members[member.member_id] = member
        assert asked.instance_id is not None
        self._static[asked.instance_id] = member.member_id
        if self.leader == old_id:
            self.leader = member.member_id
        if old_id in self._unsynced:
            self._unsynced.remove(old_id)
            self._unsynced.add(member.member_id)
        self._timers.set(member.timer, out.at_ms + member.session_ms)
        if self.phase is STABLE and self._choose_protocol() == self.protocol:
            # nothing changes for the others: it gets the assignment that it had
            out.records.append(self._record(out.now_ms, self._assignments()))
            leads = asked.may_skip and member.member_id == self.leader
            reply = self._joined(member, skip_assignment=leads, with_members=leads)
            if not asked.may_skip and leader_before is not None:
                reply = reply._replace(leader=leader_before)  # or it would assign, unasked
            out.tell(ticket, reply)
            return
        self._park_join(member, ticket, out)
        self._rebalance_or_go_on(out)

    def _assignments(self) -> dict[str, bytes]:
        return {member_id: member.assignment for member_id, member in self.members.items()}

    # -- the rebalance

    def _rebalance_or_go_on(self, out: Outcome) -> None:
        if self.phase is PREPARING:
            self._go_on_if_all_joined(out)
        else:
            self._prepare(out)

    def _prepare(self, out: Outcome) -> None:
        if self.phase is COMPLETING:
            for member in self.members.values():
                member.assignment = b""
                self._unpark_sync(member, Synced(ErrorCode.rebalance_in_progress), out)
        self._unsynced.clear()
        self._timers.cancel(self._sync_timer)
        self._initial = self.phase is EMPTY
        self._move(PREPARING)
        if self._initial:
            delay_ms = self._rules.initial_delay_ms
            self._initial_delay_ms = delay_ms
            self._initial_left_ms = max(self._rebalance_ms() - delay_ms, 0)
            self._more_came = False
            self._timers.set(self._join_timer, out.at_ms + delay_ms)
        elif self._all_joined():
            self._complete_join(out)
        else:
            self._timers.set(self._join_timer, out.at_ms + self._rebalance_ms())

    def _go_on_if_all_joined(self, out: Outcome) -> None:
        if self.phase is PREPARING and not self._initial and self._all_joined():
            self._complete_join(out)

    def _join_time_is_up(self, out: Outcome) -> None:
        if self.phase is not PREPARING:
            return
        if self._initial and self._more_came and self._initial_left_ms:
            self._more_came = False
            delay_ms = min(self._rules.initial_delay_ms, self._initial_left_ms)
            self._initial_left_ms = max(self._initial_left_ms - self._initial_delay_ms, 0)
            self._initial_delay_ms = delay_ms
            self._timers.set(self._join_timer, out.at_ms + delay_ms)
        else:
            self._complete_join(out)

    def _complete_join(self, out: Outcome) -> None:
        """The next generation: of those that have joined, and of static members."""
        self._timers.cancel(self._join_timer)
        for member in list(self.members.values()):
            if member.joining is None and member.instance_id is None:
                self._drop(member.member_id)
        if self.members and not self._elect():  # static ones only: their sessions end, or they come
            self._timers.set(self._join_timer, out.at_ms + self._rebalance_ms())
            return
        self.generation += 1
        self._initial = False
        if not self.members:
            self.protocol = self.leader = None
            out.records.append(self._record(out.now_ms, {}))  # and it is EMPTY
            return
        self.protocol = self._choose_protocol()
        self._subscribed = self._find_subscribed()
        self._move(COMPLETING)
        self._unsynced = set(self.members)
        for member in self.members.values():
            member.is_new = False
            self._unpark_join(member, self._joined(member), out)
            self._timers.set(member.timer, out.at_ms + member.session_ms)
        self._timers.set(self._sync_timer, out.at_ms + self._rebalance_ms())

    def _elect(self) -> bool:
        """A leader among those that have joined; the one before, if it has."""
        leader = None if self.leader is None else self.members.get(self.leader)
        if leader is None or leader.joining is None:
            joined = (m.member_id for m in self.members.values() if m.joining is not None)
            found = next(joined, None)
            if found is None:
                return False
            self.leader = found
        return True

    def _choose_protocol(self) -> str:
        """Of those that all know the one that most want; of equals the one that came first."""
        count = len(self.members)
        candidates = {name for name, known in self._supported.items() if known == count}
        votes = Counter(member.vote(candidates) for member in self.members.values())
        return votes.most_common(1)[0][0]

    def _find_subscribed(self) -> frozenset[str] | None:
        """The topics that its members consume; None if they cannot be read."""
        if self.protocol_type != CONSUMER:
            return None
        found: set[str] = set()
        for member in self.members.values():
            topics = subscribed_topics(member.metadata(self.protocol))
            if topics is None:
                return None
            found |= topics
        return frozenset(found)

    # -- sync

    def sync(self, asked: Sync, ticket: Ticket, out: Outcome) -> None:
        error = self._why_not_sync(asked)
        if error is not ErrorCode.none:
            out.tell(ticket, Synced(error))
            return
        member = self.members[asked.member_id]
        self._unsynced.discard(asked.member_id)
        if not self._unsynced:
            self._timers.cancel(self._sync_timer)
        if self.phase is STABLE:
            out.tell(ticket, self._synced(member.assignment))
            return
        self._unpark_sync(member, Synced(ErrorCode.rebalance_in_progress), out)  # an earlier try
        member.syncing = ticket
        if asked.member_id == self.leader:
            self._assign(dict(asked.assignments), out)

    def _why_not_sync(self, asked: Sync) -> ErrorCode:
        error = self._why_not_member(asked.member_id, asked.instance_id)
        if error is not ErrorCode.none:
            return error
        if asked.generation != self.generation:
            return ErrorCode.illegal_generation
        if asked.protocol_type not in (None, self.protocol_type) or (
            asked.protocol not in (None, self.protocol)
        ):
            return ErrorCode.inconsistent_group_protocol
        return ErrorCode.rebalance_in_progress if self.phase is PREPARING else ErrorCode.none

    def _assign(self, assignments: dict[str, bytes], out: Outcome) -> None:
        """The leader's word: once it is durable the generation is complete."""
        record = self._record(out.now_ms, assignments)
        size = sum(len(m.subscription) + len(m.assignment) for m in record.members)
        if size > self._rules.metadata_bytes_max:
            for member in self.members.values():
                self._unpark_sync(member, Synced(ErrorCode.unknown_server_error), out)
            self._prepare(out)
            return
        out.records.append(record)  # and it is STABLE
        for member in self.members.values():
            if member.syncing is not None:
                reply = self._synced(assignments.get(member.member_id, b""))
                self._unpark_sync(member, reply, out)

    def _synced(self, assignment: bytes) -> Synced:
        return Synced(ErrorCode.none, self.protocol_type, self.protocol, assignment)

    def _sync_time_is_up(self, out: Outcome) -> None:
        """Who was told of the generation and never took its assignment is gone."""
        if self.phase in (COMPLETING, STABLE) and self._unsynced:
            for member_id in list(self._unsynced):
                self._drop(member_id)
            self._prepare(out)

    # -- heartbeat and leave

    def heartbeat(
        self, member_id: str, instance_id: str | None, generation: int, at_ms: int
    ) -> ErrorCode:
        error = self._why_not_member(member_id, instance_id)
        if error is not ErrorCode.none:
            return error
        if generation != self.generation:
            return ErrorCode.illegal_generation
        self.hear(member_id, at_ms)
        return ErrorCode.rebalance_in_progress if self.phase is PREPARING else ErrorCode.none

    def hear(self, member_id: str, at_ms: int) -> None:
        """It lives: its session begins anew."""
        member = self.members.get(member_id)
        if member is not None:
            self._timers.set(member.timer, at_ms + member.session_ms)

    def leave(self, leaving: list[tuple[str, str | None]], out: Outcome) -> tuple[ErrorCode, ...]:
        """Each by member id, or by instance id alone where an operator removes a static member."""
        found = tuple(
            self._leave(member_id, instance_id, out) for member_id, instance_id in leaving
        )
        if ErrorCode.none in found:
            if self.phase in (STABLE, COMPLETING):
                self._prepare(out)
            else:
                self._go_on_if_all_joined(out)
        return found

    def _leave(self, member_id: str, instance_id: str | None, out: Outcome) -> ErrorCode:
        if member_id in self._pending:
            self._drop(member_id)
            return ErrorCode.none
        if not member_id and instance_id is not None:
            member_id = self._static.get(instance_id, "")
        error = self._why_not_member(member_id, instance_id)
        if error is ErrorCode.none:
            self._gone(self.members[member_id], out)
        return error

    def _gone(self, member: Member, out: Outcome) -> None:
        self._unpark_join(member, Joined(ErrorCode.unknown_member_id), out)
        self._unpark_sync(member, Synced(ErrorCode.unknown_member_id), out)
        self._drop(member.member_id)

    # -- time

    def _session_is_over(self, member: Member, out: Outcome) -> None:
        if self.members.get(member.member_id) is not member:
            return
        if not member.is_new and (member.joining is not None or member.syncing is not None):
            self._timers.set(member.timer, out.at_ms + member.session_ms)  # it waits for us
            return
        self._gone(member, out)
        if self.phase in (STABLE, COMPLETING):
            self._prepare(out)
        elif self.phase is PREPARING and self._all_joined():
            self._complete_join(out)

    def _pending_is_over(self, member_id: str, out: Outcome) -> None:
        gone = self._pending.pop(member_id, None) is not None
        if gone and self.phase is PREPARING and self._all_joined():
            self._complete_join(out)

    # -- what others ask

    @property
    def state(self) -> str:
        return str(self.phase)

    def why_not_commit(
        self, member_id: str, instance_id: str | None, generation: int, *, in_transaction: bool
    ) -> ErrorCode:
        """Fencing of offset commits (KIP-345, 447); `in_transaction` ones know no rebalance."""
        if generation < 0 and self.phase is EMPTY:
            return ErrorCode.none  # of somebody who assigns partitions himself, or an operator
        if generation >= 0 or member_id or instance_id is not None:
            error = self._why_not_member(member_id, instance_id)
            if error is not ErrorCode.none:
                return error
            if generation != self.generation:
                return ErrorCode.illegal_generation
        elif not in_transaction and self.phase is not EMPTY:
            return ErrorCode.unknown_member_id
        if not in_transaction and self.phase is COMPLETING:
            return ErrorCode.rebalance_in_progress
        return ErrorCode.none

    def why_not_commit_at(
        self, member_id: str, generation: int, topic: str, partition: int
    ) -> ErrorCode:
        return ErrorCode.none

    def why_not_fetch(self, member_id: str | None, member_epoch: int) -> ErrorCode:
        return ErrorCode.none  # anybody may look

    def why_not_forget_offsets(self) -> ErrorCode:
        if self.phase is not EMPTY and self.protocol_type != CONSUMER:
            return ErrorCode.non_empty_group
        return ErrorCode.none

    def why_not_delete(self) -> ErrorCode:
        return ErrorCode.none if self.is_empty else ErrorCode.non_empty_group

    @property
    def is_empty(self) -> bool:
        return self.phase is EMPTY

    @property
    def is_idle(self) -> bool:
        """Empty, and nobody is about to join."""
        return self.phase is EMPTY and not self._pending

    def is_subscribed(self, topic: str) -> bool:
        if self._subscribed is None:
            return self.protocol_type == CONSUMER  # it may be
        return topic in self._subscribed

    def expiry_base_ms(self, offset: OffsetCommitted) -> int | None:
        """Since when an offset is unused; None if it is in use."""
        if self.protocol_type is None:
            return offset.committed_ms
        if self.phase is EMPTY:
            known = self.recorded is not None and self.recorded.since_ms >= 0
            return self.recorded.since_ms if known and self.recorded else offset.committed_ms
        known = self.protocol_type == CONSUMER and self._subscribed is not None
        return offset.committed_ms if known and self.phase is STABLE else None

    def tombstones(self) -> tuple[GroupForgotten, ...]:
        return (GroupForgotten(self.name),)

    def parked(self) -> Iterator[Ticket]:
        """Requests that wait for an answer."""
        for member in self.members.values():
            yield from (t for t in (member.joining, member.syncing) if t is not None)

    def check(self) -> None:
        """What is always true of what is counted along the way; tests ask after every step."""
        members = self.members
        assert self._joining == sum(m.joining is not None for m in members.values())
        assert self._static == {m.instance_id: i for i, m in members.items() if m.instance_id}
        names = Counter(n for m in members.values() for n in {name for name, _ in m.protocols})
        assert {n: c for n, c in self._supported.items() if c} == names
        assert self.leader in members if members else self.leader is None
        assert self._unsynced <= members.keys() and not self._pending.keys() & members.keys()
        assert bool(members) or self.phase in (EMPTY, PREPARING)

    # -- small things

    def _why_not_member(self, member_id: str, instance_id: str | None) -> ErrorCode:
        if instance_id is not None:
            known = self._static.get(instance_id)
            if known is None:
                return ErrorCode.unknown_member_id
            if known != member_id:
                return ErrorCode.fenced_instance_id
        return ErrorCode.none if member_id in self.members else ErrorCode.unknown_member_id

    def _joined(
        self, member: Member, *, skip_assignment: bool = False, with_members: bool = True
    ) -> Joined:
        members: tuple[tuple[str, str | None, bytes], ...] = ()
        if with_members and member.member_id == self.leader:
            members = tuple(
                (one.member_id, one.instance_id, one.metadata(self.protocol))
                for one in self.members.values()
            )
        return Joined(
            ErrorCode.none, member.member_id, self.generation, self.protocol_type, self.protocol,
            self.leader or "", members, skip_assignment,
        )  # fmt: skip

    def _update(self, member: Member, asked: Join) -> None:
        self._count(member, -1)
        member.update(asked)
        self._count(member, 1)

    def _count(self, member: Member, by: int) -> None:
        for name in {name for name, _ in member.protocols}:
            self._supported[name] += by

    def _park_join(self, member: Member, ticket: Ticket, out: Outcome) -> None:
        if member.joining is None:
            self._joining += 1
        else:  # its connection broke, and it asks once more
            out.tell(member.joining, Joined(ErrorCode.rebalance_in_progress, member.member_id))
        member.joining = ticket

    def _unpark_join(self, member: Member, reply: Joined, out: Outcome) -> None:
        if member.joining is not None:
            self._joining -= 1
            out.tell(member.joining, reply)
            member.joining = None

    def _unpark_sync(self, member: Member, reply: Synced, out: Outcome) -> None:
        if member.syncing is not None:
            out.tell(member.syncing, reply)
            member.syncing = None
            self._timers.set(member.timer, out.at_ms + member.session_ms)

    def _drop(self, member_id: str) -> None:
        """Out of the group, whatever it was there. Nothing of it may be parked."""
        timer = self._pending.pop(member_id, None)
        member = self.members.pop(member_id, None)
        if member is not None:
            timer = member.timer
            self._count(member, -1)
            self._joining -= member.joining is not None
            if member.instance_id is not None:
                del self._static[member.instance_id]
        if timer is not None:
            self._timers.cancel(timer)
        self._unsynced.discard(member_id)
        if self.leader == member_id:
            self.leader = next(iter(self.members), None)

    def _all_joined(self) -> bool:
        return len(self.members) == self._joining and not self._pending

    def _rebalance_ms(self) -> int:
        return max((m.rebalance_ms for m in self.members.values()), default=REBALANCE_MS_MIN)

    def _move(self, after: Phase) -> None:
        assert (self.phase, after) in MOVES, (self.name, self.phase, after)
        self.phase = after
