"""Members that speak the classic protocol inside a next-generation group (KIP-848). Pure.

So that a group's members can be changed over one by one, and back. A classic group becomes a
next-generation one with the first member that sends a ConsumerGroupHeartbeat, and a classic one
again when the last such member is gone. To a classic member its epoch is a generation, JoinGroup is
a heartbeat that says everything, and SyncGroup fetches what it was given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from kio.schema.errors import ErrorCode

from ledgerstream.errors import DecodeError
from ledgerstream.groups.classic import ClassicGroup
from ledgerstream.groups.consumer import Beat, ConsumerGroup
from ledgerstream.groups.consumerrecords import (
    NOTHING,
    Assignment,
    ClassicProtocol,
    ConsumerRecord,
    Current,
    GroupEpoch,
    Member,
    MemberState,
    Target,
    TargetEpoch,
)
from ledgerstream.groups.members import CONSUMER, Join, Joined, Outcome, Sync, Synced, Ticket
from ledgerstream.groups.records import GroupForgotten, GroupMetadata, GroupRecord, MemberMetadata
from ledgerstream.wire.consumerprotocol import (
    Named,
    Subscription,
    read_assignment,
    read_subscription,
    version_of,
    write_assignment,
)

ANY_EPOCH = 1  # of a classic member that is known: what fences it is its generation
UNREVOKED, UNRELEASED = MemberState.UNREVOKED_PARTITIONS, MemberState.UNRELEASED_PARTITIONS


def join(group: ConsumerGroup, asked: Join, ticket: Ticket, out: Outcome) -> bool:
    """A JoinGroup request. True: the group becomes a classic one and nothing changes for anybody,
    so that nobody is to join again."""
    if not _supports(group, asked):
        out.tell(ticket, Joined(ErrorCode.inconsistent_group_protocol, asked.member_id))
        return False
    if asked.is_nameless:
        out.tell(ticket, Joined(ErrorCode.member_id_required, asked.new_id))
        return False
    protocol, metadata = asked.protocols[0]
    try:
        subscription = read_subscription(metadata)
    except DecodeError:
        out.tell(ticket, Joined(ErrorCode.inconsistent_group_protocol, asked.member_id))
        return False
    replaced = _last_modern(group, asked)
    if replaced is not None:
        _join_as_classic(group, asked, replaced, ticket, out)
        same = subscription.topics == replaced.topics and not replaced.regex
        return same and _is_at_rest(group, replaced.member_id)
    decision = group.decide_heartbeat(_beat(group, asked, subscription), out.now_ms)
    reply = decision.reply
    if reply.error is not ErrorCode.none:
        out.tell(ticket, Joined(reply.error, asked.member_id))
        return False
    out.records += decision.records
    out.tell(ticket, Joined(ErrorCode.none, reply.member_id, reply.epoch, CONSUMER, protocol))
    return False


def _last_modern(group: ConsumerGroup, asked: Join) -> Member | None:
    """The static member that this classic one replaces, if no other speaks the new protocol."""
    if asked.member_id or asked.instance_id is None:
        return None
    modern = [member for member in group.members.values() if member.classic is None]
    return modern[0] if [m.instance_id for m in modern] == [asked.instance_id] else None


def _is_at_rest(group: ConsumerGroup, replaced: str) -> bool:
    """Whether each has what it is to have; the one that is replaced may be away."""
    held, target = group.current[replaced].held, group.targets.get(replaced, NOTHING)
    others = (current for name, current in group.current.items() if name != replaced)
    return (held, group.target_epoch) == (target, group.epoch) and all(
        current.state is MemberState.STABLE and current.epoch == group.epoch for current in others
    )


def _join_as_classic(
    group: ConsumerGroup, asked: Join, replaced: Member, ticket: Ticket, out: Outcome
) -> None:
    """It takes over what the other had, in a group that is a classic one from now on."""
    member = replaced._replace(
        member_id=asked.new_id,
        client_id=asked.client_id,
        client_host=asked.client_host,
        rebalance_timeout_ms=asked.rebalance_ms,
        classic=ClassicProtocol(asked.session_ms, asked.protocols),
    )
    staying = [m for m in group.members.values() if m is not replaced] + [member]
    held = {m.member_id: group.current[m.member_id].held for m in staying[:-1]}
    held[member.member_id] = group.current[replaced.member_id].held
    classic = _as_classic(group, staying, held, out.now_ms)
    assert classic is not None  # `_supports`
    out.records += (*group.tombstones(), classic)
    reply = Joined(ErrorCode.none, asked.new_id, group.epoch, CONSUMER, classic.protocol)
    out.tell(ticket, reply)


def joined(group: ConsumerGroup, member_id: str, asked: Join, at_ms: int) -> None:
    """After `join` was replayed: it has to sync in time."""
    group.heard(member_id, at_ms)
    clock = group.clock(member_id)
    group.timers.cancel(clock.rejoin)
    group.timers.set(clock.sync, at_ms + asked.rebalance_ms)


def _supports(group: ConsumerGroup, asked: Join) -> bool:
    """Whether it can do what all classic members can."""
    if asked.protocol_type != CONSUMER or not asked.protocols:
        return False
    others = [m.classic for name, m in group.members.items() if name != asked.member_id]
    sets = [{name for name, _ in each.protocols} for each in others if each is not None]
    return any(all(name in each for each in sets) for name, _ in asked.protocols)


def _beat(group: ConsumerGroup, asked: Join, subscription: Subscription) -> Beat:
    return Beat(
        asked.member_id or asked.new_id,
        ANY_EPOCH if asked.member_id else 0,
        instance_id=asked.instance_id,
        rack_id=subscription.rack_id,
        rebalance_timeout_ms=asked.rebalance_ms,
        topics=subscription.topics,
        regex="",
        owned=_by_id(subscription.owned or {}, group),
        client_id=asked.client_id,
        client_host=asked.client_host,
        classic=ClassicProtocol(asked.session_ms, asked.protocols),
    )


def sync(group: ConsumerGroup, asked: Sync, ticket: Ticket, out: Outcome) -> None:
    """A SyncGroup request: what the member was given."""
    error = _why_not(group, asked.member_id, asked.instance_id, asked.generation)
    if error is ErrorCode.none:
        member, current = group.members[asked.member_id], group.current[asked.member_id]
        assert member.classic is not None
        protocol, metadata = member.classic.protocols[0]
        if asked.protocol_type not in (None, CONSUMER) or asked.protocol not in (None, protocol):
            error = ErrorCode.inconsistent_group_protocol
        elif group.epoch > current.epoch and current.state is not UNREVOKED:
            _call_back(group, member, out.at_ms)
            error = ErrorCode.rebalance_in_progress
        else:
            group.timers.cancel(group.clock(asked.member_id).sync)
            group.hear(asked.member_id, out.at_ms)
            assignment = write_assignment(_by_name(current.assigned, group), version_of(metadata))
            reply = Synced(ErrorCode.none, asked.protocol_type, asked.protocol, assignment)
            out.tell(ticket, reply)
            return
    out.tell(ticket, Synced(error))


def heartbeat(
    group: ConsumerGroup, member_id: str, instance_id: str | None, generation: int, at_ms: int
) -> ErrorCode:
    error = _why_not(group, member_id, instance_id, generation)
    if error is not ErrorCode.none:
        return error
    group.hear(member_id, at_ms)
    current = group.current[member_id]
    if (
        current.epoch < group.epoch
        or current.state is UNREVOKED
        or (current.state is UNRELEASED and not _waits(group, current))
    ):
        _call_back(group, group.members[member_id], at_ms)
        return ErrorCode.rebalance_in_progress
    return ErrorCode.none


def leave(
    group: ConsumerGroup, leaving: list[tuple[str, str | None]], out: Outcome
) -> tuple[ErrorCode, ...]:
    errors, gone = [], []
    for member_id, instance_id in leaving:
        if not member_id and instance_id is not None:  # an operator removes a static member
            member_id = group.instances.get(instance_id, "")
        error = _why_not(group, member_id, instance_id, None)
        errors.append(error)
        if error is ErrorCode.none:
            gone.append(member_id)
    if gone:
        out.records += removal(group, gone, out.now_ms)
    return tuple(errors)


def _why_not(
    group: ConsumerGroup, member_id: str, instance_id: str | None, generation: int | None
) -> ErrorCode:
    """Whether it is a classic member of this generation; any member at all, where that is None."""
    if instance_id is not None:
        holder = group.instances.get(instance_id)
        if holder is None:
            return ErrorCode.unknown_member_id
        if holder != member_id:
            return ErrorCode.fenced_instance_id
    member = group.members.get(member_id)
    if member is None or (generation is not None and member.classic is None):
        return ErrorCode.unknown_member_id
    if generation is not None and generation != group.current[member_id].epoch:
        return ErrorCode.illegal_generation
    return ErrorCode.none


def _call_back(group: ConsumerGroup, member: Member, at_ms: int) -> None:
    """It was told to join again, and has its rebalance timeout for it."""
    rejoin = group.clock(member.member_id).rejoin
    if rejoin.at_ms is None:
        group.timers.set(rejoin, at_ms + member.rebalance_timeout_ms)


def _waits(group: ConsumerGroup, current: Current) -> bool:
    """Whether others still have something of what it is to have."""
    target = group.targets.get(current.member_id, NOTHING)
    return any(
        group.holder(topic, index) not in (None, current.member_id)
        for topic, indexes in target.items()
        for index in indexes - current.assigned.get(topic, frozenset())
    )


# -- from one kind of group to the other


def upgrade(group: ClassicGroup, ids: ConsumerGroup) -> list[GroupRecord]:
    """A classic group's members, as they are, into a next-generation one; `ids` knows the topics.

    Raises DecodeError if a member's subscription or assignment is not a consumer's.
    """
    name, epoch = group.name, group.generation
    members: list[ConsumerRecord] = []
    targets: list[ConsumerRecord] = []
    currents: list[ConsumerRecord] = []
    for member in group.members.values():
        protocols = member.protocols
        subscription = read_subscription(member.metadata(group.protocol) or protocols[0][1])
        assigned = _by_id(read_assignment(member.assignment), ids)
        members.append(
            Member(
                name, member.member_id, member.instance_id, subscription.rack_id, member.client_id,
                member.client_host, subscription.topics, "", member.rebalance_ms, None,
                ClassicProtocol(member.session_ms, protocols),
            )
        )  # fmt: skip
        targets.append(Target(name, member.member_id, assigned))
        currents.append(Current(name, member.member_id, epoch, epoch, assigned=assigned))
    return [
        GroupForgotten(name), *members, GroupEpoch(name, epoch), *targets, TargetEpoch(name, epoch),
        *currents,
    ]  # fmt: skip


def removal(group: ConsumerGroup, leaving: Iterable[str], now_ms: int) -> tuple[GroupRecord, ...]:
    """They leave; if only classic members stay, the group becomes a classic one."""
    leaving = set(leaving)
    classic = downgrade(group, leaving, now_ms)
    return group.removal(leaving) if classic is None else (*group.tombstones(), classic)


def expire(group: ConsumerGroup, member_id: str, out: Outcome) -> None:
    out.records += removal(group, [member_id], out.now_ms)


def downgrade(group: ConsumerGroup, leaving: Iterable[str], now_ms: int) -> GroupMetadata | None:
    """What the group is as a classic one once these are gone; None if it stays as it is."""
    gone = set(leaving)
    staying = [member for name, member in group.members.items() if name not in gone]
    if not staying or any(member.classic is None for member in staying):
        return None
    if all(group.members[name].classic is not None for name in gone):
        return None  # as it has been: nothing is left that speaks the new protocol
    held = {member.member_id: group.current[member.member_id].held for member in staying}
    return _as_classic(group, staying, held, now_ms)


def _as_classic(
    group: ConsumerGroup, members: list[Member], held: Mapping[str, Assignment], now_ms: int
) -> GroupMetadata | None:
    """The classic group of these members; None if there is no protocol that all of them know."""
    known = Counter(
        name
        for member in members
        if member.classic is not None
        for name, metadata in dict(member.classic.protocols).items()
        if _is_subscription(metadata)
    )
    first = members[0].classic
    assert first is not None
    protocol = next((n for n, _ in first.protocols if known[n] == len(members)), None)
    if protocol is None:
        return None
    recorded = (_recorded(group, each, protocol, held[each.member_id]) for each in members)
    return GroupMetadata(
        group.name, CONSUMER, group.epoch, protocol, members[0].member_id, now_ms, tuple(recorded)
    )


def _is_subscription(metadata: bytes) -> bool:
    """Of its protocols, a member had to say so of the first one only."""
    try:
        read_subscription(metadata)
    except DecodeError:
        return False
    return True


def _recorded(
    group: ConsumerGroup, member: Member, protocol: str, held: Assignment
) -> MemberMetadata:
    """`held`, so that nobody gets what it still has to let go of, should the group be changed back
    meanwhile."""
    assert member.classic is not None
    metadata = dict(member.classic.protocols)[protocol]
    return MemberMetadata(
        member.member_id, member.instance_id, member.client_id, member.client_host,
        member.rebalance_timeout_ms, member.classic.session_timeout_ms, metadata,
        write_assignment(_by_name(held, group), version_of(metadata)),
    )  # fmt: skip


def _by_id(named: Named, group: ConsumerGroup) -> Assignment:
    topics = group.topics.topics
    return {
        topics[name].topic_id: indexes for name, indexes in named.items() if name in topics
    } or NOTHING


def _by_name(assignment: Assignment, group: ConsumerGroup) -> Named:
    by_id = group.topics.by_id
    return {by_id[topic].name: found for topic, found in assignment.items() if topic in by_id}
