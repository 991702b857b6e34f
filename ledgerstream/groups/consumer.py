"""A next-generation consumer group (KIP-848): the server assigns, members follow. Pure.

Each change of members, subscriptions or topics makes the group's epoch one higher; an assignor then
makes a target for that epoch; and each member walks to its target by its own heartbeats
(`reconcile`), so that nobody stops for the others. Every answer and every commit of offsets is
fenced by the member's epoch. What the log remembers changes by `replay` alone; deadlines are soft,
and begin anew where the group is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import NamedTuple, Protocol
from uuid import UUID

from kio.schema.errors import ErrorCode

from ledgerstream.groups.assignors import ASSIGNORS, DEFAULT_ASSIGNOR, Subscriber
from ledgerstream.groups.consumerrecords import (
    AWAY_EPOCH,
    LEFT_EPOCH,
    NOTHING,
    OF_MEMBER,
    Assignment,
    ClassicProtocol,
    ConsumerRecord,
    Current,
    Gone,
    GroupEpoch,
    Key,
    Member,
    MemberState,
    Regex,
    Target,
    TargetEpoch,
)
from ledgerstream.groups.members import CONSUMER, Outcome, Ticket
from ledgerstream.groups.reconcile import Holder, is_within, reconcile
from ledgerstream.groups.records import OffsetCommitted
from ledgerstream.groups.timers import Timer, Timers
from ledgerstream.limits import LIMITS
from ledgerstream.machine import Decision


class Topic(Protocol):
    """What a group has to know of a topic."""

    name: str
    topic_id: UUID
    partitions: int


class Topics(Protocol):
    """The catalogue, as a group sees it."""

    @property
    def topics(self) -> Mapping[str, Topic]: ...
    @property
    def by_id(self) -> Mapping[UUID, Topic]: ...
    @property
    def version(self) -> int:
        """Another one whenever anything has changed."""

    def session_ms(self, group: str) -> int | None:
        """What an operator has set for the group; None: as for all."""


class Beat(NamedTuple):
    """A heartbeat. None (or −1): as it was."""

    member_id: str
    epoch: int  # 0 joins, LEFT_EPOCH and AWAY_EPOCH leave; else where the member is
    instance_id: str | None = None
    rack_id: str | None = None
    rebalance_timeout_ms: int = -1
    topics: frozenset[str] | None = None
    regex: str | None = None
    assignor: str | None = None
    owned: Assignment | None = None
    client_id: str = ""
    client_host: str = ""
    classic: ClassicProtocol | None = None  # it speaks the classic protocol (`mixed`)

    @property
    def full(self) -> bool:
        """Everything is said, as by one that joins or has missed an answer."""
        subscribed = self.topics is not None or self.regex is not None
        return self.rebalance_timeout_ms != -1 and subscribed and self.owned is not None


class Beaten(NamedTuple):
    """The answer; `assignment` None: as it was. `hurry`: there is more to come soon."""

    error: ErrorCode = ErrorCode.none
    message: str | None = None
    member_id: str = ""
    epoch: int = 0
    assignment: Assignment | None = None
    hurry: bool = False


Decided = Decision[ConsumerRecord, Beaten]


def refuse(error: ErrorCode, message: str) -> Decided:
    return Decision((), Beaten(error, message))


class ConsumerRules(NamedTuple):
    """What a broker asks of its next-generation groups."""

    session_ms: int = LIMITS.consumer_session_ms
    members_max: int = LIMITS.group_members_max


class Clock:
    """A member's deadlines: soft, all of them."""

    __slots__ = ("rebalance", "rejoin", "seen", "session", "sync")

    def __init__(self, group: ConsumerGroup, member_id: str) -> None:
        def gone(out: Outcome) -> None:
            group.expire(member_id, out)

        self.seen: Current | None = None  # as of which `rebalance` was set
        self.session = Timer(gone)
        self.rebalance = Timer(gone)  # to give up what it was asked to
        self.rejoin = Timer(gone)  # of a classic member, once it was told to
        self.sync = Timer(gone)  # of one, once it has joined


class ConsumerGroup:
    """One group. `topics` is the catalogue as it is at any time; `replay` does not look at it."""

    kind = CONSUMER
    protocol_type: str | None = CONSUMER

    def __init__(
        self,
        name: str,
        timers: Timers,
        topics: Topics,
        rules: ConsumerRules = ConsumerRules(),
        expire: Callable[[ConsumerGroup, str, Outcome], None] | None = None,
    ) -> None:
        self.name = name
        self.epoch = 0
        self.metadata_hash = 0
        self.target_epoch = 0
        self.members: dict[str, Member] = {}
        self.current: dict[str, Current] = {}
        self.targets: dict[str, Assignment] = {}
        self.regexes: dict[str, Regex] = {}
        self.instances: dict[str, str] = {}  # static members: instance id → member id
        self._holders: dict[UUID, dict[int, str]] = {}  # who has a partition in its hands
        self._topics: Counter[str] = Counter()  # names → members that subscribe to them
        self._regex_users: Counter[str] = Counter()
        # soft: the versions of the catalogue that were looked at last, by all and by each regex
        self._seen = -1
        self._matched: dict[str, int] = {}
        self._clocks: dict[str, Clock] = {}
        self.timers, self.topics, self.rules = timers, topics, rules
        self._expire = expire or _expire
        timers.set(Timer(lambda out: self.start(out.at_ms)), 0)  # as soon as there is a time

    # -- the only mutation

    def replay(self, record: ConsumerRecord) -> None:
        """Live and after a restart alike; a compacted log may have left out what lies between."""
        match record:
            case GroupEpoch():
                self.epoch, self.metadata_hash = record.epoch, record.metadata_hash
            case TargetEpoch():
                self.target_epoch = record.epoch
            case Member():
                self._forget_member(record.member_id)
                self.members[record.member_id] = record
                self._topics.update(record.topics)
                if record.regex:
                    self._regex_users[record.regex] += 1
                if record.instance_id is not None:
                    self.instances[record.instance_id] = record.member_id
                self.current.setdefault(record.member_id, Current(self.name, record.member_id))
            case Target():
                self.targets[record.member_id] = record.partitions
            case Current():
                self._let_go(record.member_id)
                self.current[record.member_id] = record
                for assignment in (record.assigned, record.revoking):
                    for topic, indexes in assignment.items():
                        self._holders.setdefault(topic, {}).update(
                            dict.fromkeys(indexes, record.member_id)
                        )
            case Regex():
                self.regexes[record.regex] = record
            case Gone():
                self._replay_gone(record)

    def _replay_gone(self, gone: Gone) -> None:
        match gone.key:
            case Key.MEMBER:
                self._forget_member(gone.name)
                self.current.pop(gone.name, None)
            case Key.TARGET:
                self.targets.pop(gone.name, None)
            case Key.CURRENT:
                self._let_go(gone.name)
                if gone.name in self.members:
                    self.current[gone.name] = Current(self.name, gone.name)
                else:
                    self.current.pop(gone.name, None)
            case Key.REGEX:
                self.regexes.pop(gone.name, None)
            case Key.GROUP:
                self.epoch = self.metadata_hash = 0
            case Key.TARGET_EPOCH:
                self.target_epoch = 0

    def _forget_member(self, member_id: str) -> None:
        member = self.members.pop(member_id, None)
        if member is None:
            return
        clock = self._clocks.pop(member_id, None)
        if clock is not None:
            self._stop(clock)
        self._topics.subtract(member.topics)
        self._topics += Counter()  # drops what nobody subscribes to
        if member.regex:
            self._regex_users[member.regex] -= 1
            self._regex_users += Counter()
        if member.instance_id is not None and self.instances.get(member.instance_id) == member_id:
            del self.instances[member.instance_id]

    def _let_go(self, member_id: str) -> None:
        current = self.current.get(member_id)
        if current is None:
            return
        for assignment in (current.assigned, current.revoking):
            for topic, indexes in assignment.items():
                holders = self._holders[topic]
                for index in indexes:
                    if holders.get(index) == member_id:
                        del holders[index]

    # -- questions

    def holder(self, topic: UUID, index: int) -> str | None:
        """Who has the partition in its hands, or may still have it."""
        return self._holders.get(topic, {}).get(index)

    @property
    def state(self) -> str:
        """As Kafka's tools show it."""
        if not self.members:
            return "Empty"
        if self.epoch > self.target_epoch:
            return "Assigning"
        if any(not self._is_settled(current) for current in self.current.values()):
            return "Reconciling"
        return "Stable"

    def _is_settled(self, current: Current) -> bool:
        return current.state is MemberState.STABLE and current.epoch == self.target_epoch

    @property
    def assignor(self) -> str:
        """The one that most members ask for."""
        return _assignor(self.members.values())

    @property
    def is_idle(self) -> bool:
        return not self.members

    def is_subscribed(self, topic: str) -> bool:
        return topic in self._topics or any(topic in r.topics for r in self.regexes.values())

    def why_not_commit(
        self, member_id: str, instance_id: str | None, generation: int, *, in_transaction: bool
    ) -> ErrorCode:
        """Fencing of offset commits; a generation is the member's epoch."""
        anonymous = generation < 0 and not member_id and instance_id is None
        if generation < 0 and not self.members:
            return ErrorCode.none  # an operator sets offsets by hand
        if in_transaction and anonymous:
            return ErrorCode.none  # of a client that does not know of KIP-447
        error = self._why_not_epoch(member_id, generation)
        behind = error is ErrorCode.stale_member_epoch and generation >= 0
        if behind and generation < self.current[member_id].epoch:
            return ErrorCode.none  # what it may commit, `why_not_commit_at` says
        return error

    def why_not_fetch(self, member_id: str | None, member_epoch: int) -> ErrorCode:
        if member_id is None and member_epoch < 0:
            return ErrorCode.none  # anybody may look
        return self._why_not_epoch(member_id or "", member_epoch)

    def why_not_commit_at(
        self, member_id: str, generation: int, topic: str, partition: int
    ) -> ErrorCode:
        """After `why_not_commit`: a member that has not heard of its new epoch yet may commit what
        it has had since the one that it knows (KIP-1251)."""
        current, known = self.current.get(member_id), self.topics.topics.get(topic)
        if generation < 0 or current is None or generation == current.epoch:
            return ErrorCode.none
        since = current.since.get(known.topic_id, {}).get(partition) if known is not None else None
        well = since is not None and since <= generation
        return ErrorCode.none if well else ErrorCode.stale_member_epoch

    def _why_not_epoch(self, member_id: str, epoch: int) -> ErrorCode:
        member = self.members.get(member_id)
        if member is None:
            return ErrorCode.unknown_member_id
        if epoch == self.current[member_id].epoch:
            return ErrorCode.none
        modern = member.classic is None
        return ErrorCode.stale_member_epoch if modern else ErrorCode.illegal_generation

    def why_not_forget_offsets(self) -> ErrorCode:
        return ErrorCode.none

    def why_not_delete(self) -> ErrorCode:
        return ErrorCode.non_empty_group if self.members else ErrorCode.none

    def expiry_base_ms(self, offset: OffsetCommitted) -> int | None:
        """Since when an offset of a topic that nobody subscribes to is unused."""
        return offset.committed_ms

    def parked(self) -> Iterator[Ticket]:
        """Nothing waits here: members come again."""
        return iter(())

    def unmatched(self, beat: Beat) -> str | None:
        """The regular expression that has to be matched against the topics' names first, if one."""
        member = self.members.get(beat.member_id)
        regex = beat.regex if beat.regex is not None or member is None else member.regex
        if not regex:
            return None
        fresh = regex in self.regexes and self._matched.get(regex) == self.topics.version
        return None if fresh else regex

    # -- heartbeats

    def decide_heartbeat(
        self, beat: Beat, now_ms: int, matched: frozenset[str] | None = None
    ) -> Decided:
        """A member joins, goes on or rejoins. `matched`: what `unmatched` asked for."""
        members_max = self.rules.members_max
        is_new = beat.member_id not in self.members
        replaced = None
        if is_new and len(self.members) >= members_max:
            return refuse(
                ErrorCode.group_max_size_reached, f"The group has {members_max} members already."
            )
        if beat.instance_id is not None:
            found = self._static(beat)
            if isinstance(found, Beaten):
                return Decision((), found)
            replaced = found if found != beat.member_id else None
        elif is_new and beat.epoch != 0 and beat.classic is None:
            return _unknown(beat.member_id)
        records: list[ConsumerRecord] = []
        before, current, target = self._taken_up(beat, replaced, records)
        fenced = _why_fenced(beat, current)
        if fenced is not None:
            return refuse(ErrorCode.fenced_member_epoch, fenced)
        member = _updated(before, beat)
        members = {**self.members, member.member_id: member}
        if replaced is not None:
            members.pop(replaced, None)
        if member != before or member.member_id not in self.members:
            records.append(member)
        regexes = self._rematched(before, member, matched, now_ms, records)
        changed = (
            (member.topics, member.regex) != (before.topics, before.regex)
            or (is_new and replaced is None)
            or regexes is not self.regexes
        )
        epoch = self._epoch_after(changed, members, regexes, records)
        target_epoch = self.target_epoch
        if epoch > target_epoch:
            targets = self._assign(members, regexes, member, target)
            records += self._target_records(targets, member.member_id, target)
            records.append(TargetEpoch(self.name, epoch, now_ms))
            target, target_epoch = targets[member.member_id], epoch
        after = reconcile(
            current,
            target_epoch,
            target,
            _ids(_names(member, regexes), self.topics),
            self._holder_without(replaced),
            beat.owned,
        )
        if after is not current or (is_new and replaced is None):
            records.append(after)
        tells = beat.epoch == 0 or beat.full or after.assigned != current.assigned
        settled = after.state is MemberState.STABLE and after.epoch == target_epoch
        return Decision(
            tuple(records),
            Beaten(
                member_id=member.member_id,
                epoch=after.epoch,
                assignment=after.assigned if tells else None,
                hurry=not settled,
            ),
        )

    def _static(self, beat: Beat) -> str | Beaten:
        """The member that has the instance id now, to be replaced if it is another; or why not."""
        assert beat.instance_id is not None
        holder = self.instances.get(beat.instance_id)
        if beat.epoch != 0:
            if holder is None:
                return Beaten(ErrorCode.unknown_member_id, f"Nobody is {beat.instance_id} here.")
            if holder != beat.member_id:
                return Beaten(
                    ErrorCode.fenced_instance_id,
                    f"{beat.instance_id} is now {holder}, which came later than {beat.member_id}.",
                )
        elif holder is not None and holder != beat.member_id:
            modern = beat.classic is None and self.members[holder].classic is None
            if modern and self.current[holder].epoch != AWAY_EPOCH:
                return Beaten(
                    ErrorCode.unreleased_instance_id,
                    f"{beat.instance_id} is {holder}, which has not left.",
                )
        return holder if holder is not None else beat.member_id

    def _taken_up(
        self, beat: Beat, replaced: str | None, records: list[ConsumerRecord]
    ) -> tuple[Member, Current, Assignment]:
        """The member as it was, or takes over from the static one that it replaces."""
        member_id = beat.member_id
        if replaced is None:
            return (
                self.members.get(member_id, Member(self.name, member_id)),
                self.current.get(member_id, Current(self.name, member_id)),
                self.targets.get(member_id, NOTHING),
            )
        member = self.members[replaced]._replace(member_id=member_id)
        current = self.current[replaced]._replace(member_id=member_id, epoch=0, previous_epoch=0)
        target = self.targets.get(replaced, NOTHING)
        records += self._removal(replaced)
        records += [member, Target(self.name, member_id, target), current]
        return member, current, target

    def _removal(self, member_id: str) -> list[ConsumerRecord]:
        """In this order, so that a log cut between them has no member without a subscription."""
        return [Gone(key, self.name, member_id) for key in reversed(OF_MEMBER)]

    def _rematched(
        self,
        before: Member,
        member: Member,
        matched: frozenset[str] | None,
        now_ms: int,
        records: list[ConsumerRecord],
    ) -> Mapping[str, Regex]:
        """The regular expressions after this heartbeat; one that nobody uses any more goes."""
        regexes: Mapping[str, Regex] = self.regexes
        if member.regex and matched is not None:
            self._matched[member.regex] = self.topics.version
            known = regexes.get(member.regex)
            if known is None or known.topics != matched:
                found = Regex(self.name, member.regex, matched, self.topics.version, now_ms)
                regexes = {**regexes, member.regex: found}
                records.append(found)
        left = before.regex
        if left and left != member.regex and self._regex_users[left] <= 1 and left in regexes:
            regexes = {name: regex for name, regex in regexes.items() if name != left}
            records.append(Gone(Key.REGEX, self.name, left))
        return regexes

    def _epoch_after(
        self,
        changed: bool,
        members: Mapping[str, Member],
        regexes: Mapping[str, Regex],
        records: list[ConsumerRecord],
    ) -> int:
        """The group's epoch, one higher if members, subscriptions or topics have changed."""
        if not changed and self._seen == self.topics.version:
            return self.epoch
        self._seen = self.topics.version
        seen = _hash(members.values(), regexes, self.topics)
        if not changed and seen == self.metadata_hash:
            return self.epoch
        records.append(GroupEpoch(self.name, self.epoch + 1, seen))
        return self.epoch + 1

    def _assign(
        self,
        members: Mapping[str, Member],
        regexes: Mapping[str, Regex],
        member: Member,
        target: Assignment,
    ) -> dict[str, Assignment]:
        """A new target for everyone."""
        ids: dict[tuple[frozenset[str], str | None], frozenset[UUID]] = {}
        subscribers = {}
        for member_id, each in members.items():
            key = (each.topics, each.regex)
            if key not in ids:
                ids[key] = frozenset(_ids(_names(each, regexes), self.topics))
            had = target if member_id == member.member_id else self.targets.get(member_id, NOTHING)
            subscribers[member_id] = Subscriber(ids[key], each.instance_id, had)
        wanted = frozenset().union(*ids.values())
        counts = {topic: self.topics.by_id[topic].partitions for topic in wanted}
        return ASSIGNORS[_assignor(members.values())](subscribers, counts)

    def _target_records(
        self, targets: Mapping[str, Assignment], member_id: str, target: Assignment
    ) -> Iterator[ConsumerRecord]:
        for each, after in targets.items():
            had = target if each == member_id else self.targets.get(each, NOTHING)
            if after is not had and (after != had or each not in self.targets):
                yield Target(self.name, each, after)

    def _holder_without(self, replaced: str | None) -> Holder:
        if replaced is None:
            return self.holder

        def holder(topic: UUID, index: int) -> str | None:
            found = self.holder(topic, index)
            return None if found == replaced else found

        return holder

    # -- leaving

    def decide_leave(self, member_id: str, instance_id: str | None, epoch: int) -> Decided:
        """By its own wish: for good (−1), or a static one that will be back (−2)."""
        if instance_id is not None:
            holder = self.instances.get(instance_id)
            if holder is None:
                return refuse(ErrorCode.unknown_member_id, f"Nobody is {instance_id} here.")
            if holder != member_id:
                return refuse(ErrorCode.fenced_instance_id, f"{instance_id} is now {holder}.")
        if member_id not in self.members:
            return _unknown(member_id)
        reply = Beaten(member_id=member_id, epoch=epoch)
        if epoch == AWAY_EPOCH and instance_id is not None:
            away = self.current[member_id]._replace(epoch=AWAY_EPOCH, revoking=NOTHING)
            return Decision((away,), reply)
        return Decision(self.removal([member_id]), reply)

    def removal(self, member_ids: Iterable[str]) -> tuple[ConsumerRecord, ...]:
        """They leave, or were not heard of: the group goes on without them."""
        leaving = set(member_ids)
        records: list[ConsumerRecord] = []
        regexes = Counter(self._regex_users)
        for member_id in sorted(leaving):
            records += self._removal(member_id)
            regex = self.members[member_id].regex
            if regex:
                regexes[regex] -= 1
                if not regexes[regex] and regex in self.regexes:
                    records.append(Gone(Key.REGEX, self.name, regex))
        staying = [member for name, member in self.members.items() if name not in leaving]
        seen = _hash(staying, self.regexes, self.topics)
        records.append(GroupEpoch(self.name, self.epoch + 1, seen))
        return tuple(records)

    def tombstones(self) -> tuple[ConsumerRecord, ...]:
        """The group is deleted, or becomes a classic one."""
        records: list[ConsumerRecord] = []
        for member_id in self.members:
            records += self._removal(member_id)
        records += [Gone(Key.REGEX, self.name, regex) for regex in self.regexes]
        records += [Gone(Key.TARGET_EPOCH, self.name), Gone(Key.GROUP, self.name)]
        return tuple(records)

    # -- time

    def start(self, at_ms: int) -> None:
        """Members that were not heard of since the group is here have a session's time."""
        for member_id in self.members:
            if member_id not in self._clocks:
                self.hear(member_id, at_ms)
                self.heard(member_id, at_ms)

    def hear(self, member_id: str, at_ms: int) -> None:
        """It lives: its session begins anew."""
        member = self.members.get(member_id)
        if member is not None:
            if member.classic is None:
                session_ms = self.topics.session_ms(self.name) or self.rules.session_ms
            else:
                session_ms = member.classic.session_timeout_ms
            self.timers.set(self.clock(member_id).session, at_ms + session_ms)

    def heard(self, member_id: str, at_ms: int) -> None:
        """After a heartbeat that was well: what it is to give up now has to be given up in time."""
        self.hear(member_id, at_ms)
        clock, current = self.clock(member_id), self.current[member_id]
        if current is clock.seen:
            return
        clock.seen = current
        if current.state is MemberState.UNREVOKED_PARTITIONS:
            timeout_ms = self.members[member_id].rebalance_timeout_ms
            self.timers.set(clock.rebalance, at_ms + timeout_ms)
        else:
            self.timers.cancel(clock.rebalance)

    def clock(self, member_id: str) -> Clock:
        found = self._clocks.get(member_id)
        if found is None:
            found = self._clocks[member_id] = Clock(self, member_id)
        return found

    def expire(self, member_id: str, out: Outcome) -> None:
        """One of its deadlines has passed."""
        if member_id in self.members:
            self._expire(self, member_id, out)

    def _stop(self, clock: Clock) -> None:
        for timer in (clock.session, clock.rebalance, clock.rejoin, clock.sync):
            self.timers.cancel(timer)


def _expire(group: ConsumerGroup, member_id: str, out: Outcome) -> None:
    out.records += group.removal([member_id])


def _why_fenced(beat: Beat, current: Current) -> str | None:
    """None: the epoch is right, or is the one before and the answer with the new one was lost."""
    if beat.classic is not None or beat.epoch in (0, current.epoch):
        return None
    repeats = beat.epoch == current.previous_epoch and is_within(beat.owned, current.assigned)
    if beat.epoch < current.epoch and repeats:
        return None
    return (
        f"The member is at epoch {current.epoch} and comes with {beat.epoch}: "
        "it must give up its partitions and join again."
    )


def _unknown(member_id: str) -> Decided:
    return refuse(ErrorCode.unknown_member_id, f"{member_id} is no member of the group.")


def _updated(member: Member, beat: Beat) -> Member:
    timeout_ms = beat.rebalance_timeout_ms
    return member._replace(
        instance_id=beat.instance_id if beat.instance_id is not None else member.instance_id,
        rack_id=beat.rack_id if beat.rack_id is not None else member.rack_id,
        client_id=beat.client_id,
        client_host=beat.client_host,
        topics=member.topics if beat.topics is None else beat.topics,
        regex=member.regex if beat.regex is None else beat.regex,
        rebalance_timeout_ms=timeout_ms if timeout_ms != -1 else member.rebalance_timeout_ms,
        assignor=beat.assignor if beat.assignor is not None else member.assignor,
        classic=beat.classic,
    )


def _assignor(members: Iterable[Member]) -> str:
    wishes = Counter(member.assignor for member in members if member.assignor)
    return max(sorted(wishes), key=wishes.__getitem__) if wishes else DEFAULT_ASSIGNOR


def _names(member: Member, regexes: Mapping[str, Regex]) -> frozenset[str]:
    matched = regexes.get(member.regex) if member.regex else None
    return member.topics if matched is None else member.topics | matched.topics


def _ids(names: Iterable[str], topics: Topics) -> set[UUID]:
    return {topics.topics[name].topic_id for name in names if name in topics.topics}


def _hash(members: Iterable[Member], regexes: Mapping[str, Regex], topics: Topics) -> int:
    """Of the topics that are subscribed to, as they are now; never 0."""
    names = frozenset().union(*{_names(member, regexes) for member in members})
    digest = blake2b(digest_size=8)
    for name in sorted(names):
        topic = topics.topics.get(name)
        if topic is not None:
            digest.update(topic.topic_id.bytes + topic.partitions.to_bytes(4, "big"))
    return int.from_bytes(digest.digest(), "big", signed=True) or 1


__all__ = ["LEFT_EPOCH", "Beat", "Beaten", "ConsumerGroup", "Topics", "refuse"]
