"""The groups of one partition of `__consumer_offsets`, and their offsets. Pure.

`decide_…` answers with records and a reply; `replay` and `end` are the only methods that change
what the log remembers. Joining, syncing, leaving and the clock also change soft state: their reply
is whom to tell what, by the tickets under which requests were parked, once the records are durable.
A heartbeat writes nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol
from uuid import UUID

from kio.schema.errors import ErrorCode

from ledgerstream.errors import DecodeError
from ledgerstream.groups import mixed
from ledgerstream.groups.classic import ClassicGroup, Rules
from ledgerstream.groups.consumer import (
    Beat,
    Beaten,
    ConsumerGroup,
    ConsumerRules,
    Topics,
)
from ledgerstream.groups.consumerrecords import (
    AWAY_EPOCH,
    LEFT_EPOCH,
    ConsumerRecord,
    Gone,
    Key,
)
from ledgerstream.groups.members import CONSUMER, Join, Joined, Outcome, Sync, Synced, Ticket, Told
from ledgerstream.groups.offsets import Kept, Offsets, TopicPartition
from ledgerstream.groups.records import (
    NO_EPOCH,
    NO_TIME,
    GroupForgotten,
    GroupMetadata,
    GroupRecord,
    OffsetCommitted,
    OffsetForgotten,
)
from ledgerstream.groups.timers import Timers
from ledgerstream.limits import LIMITS
from ledgerstream.machine import Decision
from ledgerstream.wire.markers import Marker

STALE_KNOWN_SINCE = 9  # of OffsetCommit: clients that know KIP-848's errors


class Group(Protocol):
    """What the coordinator asks of a group of any kind."""

    name: str
    kind: str
    protocol_type: str | None

    def why_not_commit(
        self, member_id: str, instance_id: str | None, generation: int, *, in_transaction: bool
    ) -> ErrorCode: ...
    def why_not_commit_at(
        self, member_id: str, generation: int, topic: str, partition: int
    ) -> ErrorCode: ...
    def why_not_fetch(self, member_id: str | None, member_epoch: int) -> ErrorCode: ...
    def why_not_forget_offsets(self) -> ErrorCode: ...
    def why_not_delete(self) -> ErrorCode: ...
    def is_subscribed(self, topic: str) -> bool: ...
    def expiry_base_ms(self, offset: OffsetCommitted) -> int | None: ...
    def tombstones(self) -> tuple[GroupRecord, ...]: ...
    def hear(self, member_id: str, at_ms: int) -> None: ...
    def start(self, at_ms: int) -> None: ...
    def parked(self) -> Iterator[Ticket]: ...

    @property
    def state(self) -> str: ...
    @property
    def is_idle(self) -> bool: ...


class Origin(Protocol):
    """Where a record stands in the log, and of which producer's transaction it is part, or -1."""

    @property
    def offset(self) -> int: ...
    @property
    def producer_id(self) -> int: ...


class Committing(NamedTuple):
    """Who commits offsets: a member of a generation, or somebody without a group to join."""

    member_id: str = ""
    instance_id: str | None = None
    generation: int = -1  # of a consumer group (KIP-848): the member's epoch


class Wish(NamedTuple):
    """An offset that is to be committed."""

    topic: str
    partition: int
    offset: int
    leader_epoch: int = -1
    metadata: str | None = None
    topic_id: UUID | None = None  # where the client named its topic by it


class Found(NamedTuple):
    """The answer for one partition of an OffsetFetch; an offset of -1 is none."""

    topic: str
    partition: int
    offset: int = -1
    leader_epoch: int = -1
    metadata: str = ""
    error: ErrorCode = ErrorCode.none


Committed = tuple[ErrorCode, ...] | ErrorCode  # by partition, or for all of them


class GroupCoordinator:
    """All groups of one partition."""

    def __init__(
        self,
        topics: Topics,
        rules: Rules = Rules(),
        consumer_rules: ConsumerRules = ConsumerRules(),
        *,
        metadata_chars_max: int = LIMITS.offset_metadata_chars_max,
    ) -> None:
        self.groups: dict[str, Group] = {}
        self.offsets = Offsets()
        self.timers = Timers()
        self._topics, self._rules, self._consumer_rules = topics, rules, consumer_rules
        self._ended: tuple[str, int] | None = None  # group and epoch, of the record just before
        self._go_on: set[str] = set()  # of which nobody need join again when they are classic ones
        self._metadata_chars_max = metadata_chars_max

    # -- what the log remembers

    def replay(self, record: GroupRecord, origin: Origin) -> None:
        """Live and after a restart alike."""
        ended, self._ended = self._ended, None
        match record:
            case OffsetCommitted():
                if record.group not in self.groups:
                    self._make_classic(record.group)
                if origin.producer_id >= 0:
                    self.offsets.stage(record, origin.offset, origin.producer_id)
                else:
                    self.offsets.put(record, origin.offset)
            case OffsetForgotten():
                self.offsets.forget(record)
            case GroupMetadata():
                group = self.groups.get(record.group)
                if not isinstance(group, ClassicGroup):
                    group = self._make_classic(record.group)
                group.adopt(record)
                if ended == (record.group, record.generation):  # a downgrade is written as one
                    group.begin_again(stable=record.group in self._go_on)
                    self._go_on.discard(record.group)
            case GroupForgotten():
                forgotten = self.classic(record.group)
                if forgotten is not None:
                    forgotten.stop()
                    del self.groups[record.group]
            case _:
                self._replay_modern(record)

    def _replay_modern(self, record: ConsumerRecord) -> None:
        group = self.modern(record.group)
        if group is None:
            if isinstance(record, Gone):
                return  # of a group that a compacted log has no more of
            group = self.groups[record.group] = self._make_modern(record.group)
        epoch = group.epoch
        group.replay(record)
        if isinstance(record, Gone) and record.key is Key.GROUP:
            del self.groups[record.group]
            self._ended = record.group, epoch

    def end(self, marker: Marker, offset: int) -> None:
        """A transaction's offsets are committed, or have never been."""
        self.offsets.end(marker.producer_id, committed=marker.committed)

    def start(self, at_ms: int) -> None:
        """All is replayed: members have a session's time from now on."""
        for group in self.groups.values():
            group.start(at_ms)

    def parked(self) -> Iterator[Ticket]:
        """Requests that wait for an answer; it will never come if this machine is thrown away."""
        for group in self.groups.values():
            yield from group.parked()

    def classic(self, name: str) -> ClassicGroup | None:
        group = self.groups.get(name)
        return group if isinstance(group, ClassicGroup) else None

    def modern(self, name: str) -> ConsumerGroup | None:
        group = self.groups.get(name)
        return group if isinstance(group, ConsumerGroup) else None

    def _make_modern(self, name: str) -> ConsumerGroup:
        return ConsumerGroup(name, self.timers, self._topics, self._consumer_rules, mixed.expire)

    def _make_classic(self, name: str) -> ClassicGroup:
        group = self.groups[name] = ClassicGroup(name, self.timers, self._rules)
        return group

    # -- members of classic groups

    def decide_join(
        self, name: str, asked: Join, ticket: Ticket, at_ms: int, now_ms: int
    ) -> Decision[GroupRecord, tuple[Told, ...]]:
        out = Outcome(at_ms, now_ms)
        group = self.groups.get(name)
        if group is None and asked.member_id:
            out.tell(ticket, Joined(ErrorCode.unknown_member_id, asked.member_id))
        elif isinstance(group, ConsumerGroup) and group.members:
            if mixed.join(group, asked, ticket, out):
                self._go_on.add(name)
        elif isinstance(group, ConsumerGroup) and asked.is_nameless:
            out.tell(ticket, Joined(ErrorCode.member_id_required, asked.new_id))
        else:
            if isinstance(group, ConsumerGroup):  # an empty one is whatever comes first
                out.records += group.tombstones()
            if not isinstance(group, ClassicGroup):
                group = self._make_classic(name)
            group.join(asked, ticket, out)
        return out.decision()

    def decide_sync(
        self, name: str, asked: Sync, ticket: Ticket, at_ms: int, now_ms: int
    ) -> Decision[GroupRecord, tuple[Told, ...]]:
        out = Outcome(at_ms, now_ms)
        group = self.groups.get(name)
        if isinstance(group, ClassicGroup):
            group.sync(asked, ticket, out)
        elif isinstance(group, ConsumerGroup):
            mixed.sync(group, asked, ticket, out)
        else:
            out.tell(ticket, Synced(ErrorCode.unknown_member_id))
        return out.decision()

    def heartbeat(
        self, name: str, member_id: str, instance_id: str | None, generation: int, at_ms: int
    ) -> ErrorCode:
        group = self.groups.get(name)
        if isinstance(group, ConsumerGroup):
            return mixed.heartbeat(group, member_id, instance_id, generation, at_ms)
        if not isinstance(group, ClassicGroup):
            return ErrorCode.unknown_member_id
        return group.heartbeat(member_id, instance_id, generation, at_ms)

    def decide_leave(
        self, name: str, leaving: list[tuple[str, str | None]], at_ms: int, now_ms: int
    ) -> Decision[GroupRecord, tuple[tuple[ErrorCode, ...], tuple[Told, ...]]]:
        """The reply: an error for each that leaves, and who else is told what."""
        out = Outcome(at_ms, now_ms)
        group = self.groups.get(name)
        if isinstance(group, ClassicGroup):
            errors = group.leave(leaving, out)
        elif isinstance(group, ConsumerGroup):
            errors = mixed.leave(group, leaving, out)
        else:
            errors = tuple(ErrorCode.unknown_member_id for _ in leaving)
        return Decision(tuple(out.records), (errors, tuple(out.told)))

    # -- members of next-generation groups

    def unmatched(self, name: str, beat: Beat) -> str | None:
        """A regular expression to be matched against the topics' names before `decide_beat`."""
        group = self.modern(name)
        return (beat.regex or None) if group is None else group.unmatched(beat)

    def decide_upgrade(
        self, name: str, beat: Beat, at_ms: int, now_ms: int
    ) -> Decision[GroupRecord, tuple[Told, ...]]:
        """Before `decide_beat`: a classic group with members becomes a next-generation one, if
        this heartbeat may join it. Nothing, where there is nothing to do."""
        out = Outcome(at_ms, now_ms)
        group = self.classic(name)
        if (
            group is not None
            and not group.is_empty
            and beat.epoch == 0
            and group.protocol_type == CONSUMER
            and len(group.members) < self._consumer_rules.members_max
        ):
            try:
                out.records += mixed.upgrade(group, self._make_modern(name))
            except DecodeError:  # its members are no consumers: it stays what it is
                return out.decision()
            group.call_off(out)
        return out.decision()

    def decide_beat(
        self, name: str, beat: Beat, now_ms: int, matched: frozenset[str] | None = None
    ) -> Decision[GroupRecord, Beaten]:
        """A ConsumerGroupHeartbeat. `beaten` is to be called once it is replayed."""
        known = self.groups.get(name)
        tombstones: tuple[GroupRecord, ...] = ()
        if isinstance(known, ConsumerGroup):
            group = known
        elif beat.epoch != 0 or (known is not None and known.why_not_delete()):
            return Decision(
                (), Beaten(ErrorCode.group_id_not_found, f"{name} is no consumer group.")
            )
        else:
            tombstones = () if known is None else known.tombstones()
            group = self._make_modern(name)
        if beat.epoch not in (LEFT_EPOCH, AWAY_EPOCH):
            decision = group.decide_heartbeat(beat, now_ms, matched)
            records = (*tombstones, *decision.records) if decision.records else ()
            return Decision(records, decision.reply)
        decision = group.decide_leave(beat.member_id, beat.instance_id, beat.epoch)
        if decision.records and beat.epoch == LEFT_EPOCH:
            return Decision(mixed.removal(group, [beat.member_id], now_ms), decision.reply)
        return Decision(tuple(decision.records), decision.reply)

    def beaten(self, name: str, member_id: str, at_ms: int) -> None:
        """A heartbeat was well: its member's deadlines begin anew."""
        group = self.modern(name)
        if group is not None and member_id in group.members:
            group.heard(member_id, at_ms)

    def joined(self, name: str, member_id: str, asked: Join, at_ms: int) -> None:
        """A classic member's Join was replayed."""
        group = self.modern(name)
        if group is not None and member_id in group.members:
            mixed.joined(group, member_id, asked, at_ms)

    # -- time

    @property
    def next_ms(self) -> int | None:
        """When `decide_tick` has something to do, or a little before."""
        return self.timers.next_ms

    def decide_tick(self, at_ms: int, now_ms: int) -> Decision[GroupRecord, tuple[Told, ...]]:
        """One deadline that has passed, if any has: decided and replayed before the next."""
        out = Outcome(at_ms, now_ms)
        for timer in self.timers.due(at_ms):
            timer.fire(out)
            break
        return out.decision()

    # -- offsets

    def decide_commit(
        self,
        name: str,
        who: Committing,
        wishes: Iterable[Wish],
        at_ms: int,
        now_ms: int,
        *,
        in_transaction: bool = False,
        version: int = STALE_KNOWN_SINCE,
        retention_ms: int = -1,
    ) -> Decision[GroupRecord, Committed]:
        """`version`: of OffsetCommit. `retention_ms`: what a client asks for, to version 4."""
        error = self._why_not_commit(name, who, in_transaction, version)
        if error is not ErrorCode.none:
            return Decision((), error)
        group = self.groups.get(name)
        if group is not None and not in_transaction:
            group.hear(who.member_id, at_ms)
        expires_ms = NO_TIME if retention_ms < 0 else now_ms + retention_ms
        records: list[GroupRecord] = []
        errors = []
        for topic, partition, offset, leader_epoch, metadata, topic_id in wishes:
            if metadata is not None and len(metadata) > self._metadata_chars_max:
                errors.append(ErrorCode.offset_metadata_too_large)
                continue
            error = ErrorCode.none
            if group is not None:
                error = group.why_not_commit_at(who.member_id, who.generation, topic, partition)
            errors.append(_in_words_of(error, in_transaction))
            if error is not ErrorCode.none:
                continue
            if expires_ms != NO_TIME:
                leader_epoch = NO_EPOCH  # the format has either; clients of that time had none
            kept = (offset, leader_epoch, metadata or "", now_ms, expires_ms, topic_id)
            records.append(OffsetCommitted(name, topic, partition, *kept))
        return Decision(tuple(records), tuple(errors))

    def _why_not_commit(
        self, name: str, who: Committing, in_transaction: bool, version: int
    ) -> ErrorCode:
        group = self.groups.get(name)
        if group is None:
            if who.generation < 0:
                return ErrorCode.none  # a simple group begins
            known = version >= STALE_KNOWN_SINCE and not in_transaction
            return ErrorCode.group_id_not_found if known else ErrorCode.illegal_generation
        error = group.why_not_commit(
            who.member_id, who.instance_id, who.generation, in_transaction=in_transaction
        )
        if version < STALE_KNOWN_SINCE and not in_transaction and self._is_modern(name, who):
            known = error in (ErrorCode.none, ErrorCode.stale_member_epoch)
            return ErrorCode.unsupported_version if known else error
        return _in_words_of(error, in_transaction)

    def _is_modern(self, name: str, who: Committing) -> bool:
        """Whether it is a member that speaks the next-generation protocol."""
        group = self.modern(name)
        member = None if group is None else group.members.get(who.member_id)
        return member is not None and member.classic is None

    def fetch(
        self,
        name: str,
        places: Iterable[TopicPartition] | None,
        *,
        stable: bool,
        member_id: str | None = None,
        member_epoch: int = -1,
    ) -> list[Found] | ErrorCode:
        """What is committed; `places` None: of all partitions that have an offset.

        `stable`: a partition with an offset staged in an open transaction has none yet (KIP-447).
        """
        group = self.groups.get(name)
        if group is not None:
            error = group.why_not_fetch(member_id, member_epoch)
            if error is not ErrorCode.none:
                return error
        kept = self.offsets.of(name)
        wanted = list(kept) if places is None else list(places)
        staged = self.offsets.staged(name) if stable else ()
        return [_found(place, kept.get(place), place in staged) for place in wanted]

    def decide_forget_offsets(
        self, name: str, places: Iterable[TopicPartition]
    ) -> Decision[GroupRecord, Committed]:
        """OffsetDelete: an error by partition, or one for all."""
        group = self.groups.get(name)
        error = ErrorCode.group_id_not_found if group is None else group.why_not_forget_offsets()
        if group is None or error is not ErrorCode.none:
            return Decision((), error)
        there = self.offsets.of(name).keys() | self.offsets.staged(name)
        records, errors = [], []
        for place in places:
            if group.is_subscribed(place[0]):
                errors.append(ErrorCode.group_subscribed_to_topic)
                continue
            errors.append(ErrorCode.none)
            if place in there:
                records.append(OffsetForgotten(name, *place))
        return Decision(tuple(records), tuple(errors))

    def decide_forget_partitions(self, topic: str, indexes: range) -> Decision[GroupRecord, None]:
        """A topic was deleted: one of the same name begins without offsets."""
        return Decision(tuple(self.offsets.tombstones_of(topic, indexes)), None)

    def decide_expire(self, now_ms: int, retention_ms: int) -> Decision[GroupRecord, None]:
        """Forget offsets that are unused for long, and groups of which nothing is left."""
        records: list[GroupRecord] = []
        for name, group in self.groups.items():
            gone = self._expired(group, now_ms, retention_ms)
            records += (OffsetForgotten(name, *place) for place in gone)
            left = len(self.offsets.of(name)) - len(gone)
            if not left and not self.offsets.in_transactions(name) and group.is_idle:
                records += group.tombstones()
        return Decision(tuple(records), None)

    def _expired(self, group: Group, now_ms: int, retention_ms: int) -> list[TopicPartition]:
        found = []
        for place, (record, _) in self.offsets.of(group.name).items():
            base_ms = group.expiry_base_ms(record)
            if base_ms is None or group.is_subscribed(place[0]):
                continue
            if record.expires_ms != NO_TIME:
                over = now_ms >= record.expires_ms
            else:
                over = now_ms - base_ms >= retention_ms
            if over and not self.offsets.is_staged(group.name, place):
                found.append(place)
        return found

    def decide_delete(self, name: str) -> Decision[GroupRecord, ErrorCode]:
        """DeleteGroups: the group, its offsets, and what transactions have staged of it."""
        group = self.groups.get(name)
        error = ErrorCode.group_id_not_found if group is None else group.why_not_delete()
        if group is None or error is not ErrorCode.none:
            return Decision((), error)
        return Decision((*self.offsets.tombstones(name), *group.tombstones()), error)


def _in_words_of(error: ErrorCode, in_transaction: bool) -> ErrorCode:
    """TxnOffsetCommit knows of generations alone."""
    if in_transaction and error is ErrorCode.stale_member_epoch:
        return ErrorCode.illegal_generation
    return error


def _found(place: TopicPartition, kept: Kept | None, staged: bool) -> Found:
    if staged:
        return Found(*place, error=ErrorCode.unstable_offset_commit)
    if kept is None:
        return Found(*place)
    record = kept.record
    return Found(*place, record.offset, record.leader_epoch, record.metadata)
