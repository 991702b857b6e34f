"""Members of a next-generation group as clients are, and a catalogue: tests without a broker."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID

from ledgerstream.groups.consumer import Beat, Beaten, ConsumerGroup
from ledgerstream.groups.consumerrecords import NOTHING, Assignment, decode, encode
from ledgerstream.groups.timers import Timers
from ledgerstream.machine import Decision


@dataclass
class FakeTopic:
    name: str
    topic_id: UUID
    partitions: int


@dataclass
class FakeTopics:
    """A catalogue: `make` adds a topic, or gives one more partitions."""

    topics: dict[str, FakeTopic] = field(default_factory=dict)
    version: int = 0
    sessions: dict[str, int] = field(default_factory=dict)  # by group, where one was set

    @property
    def by_id(self) -> dict[UUID, FakeTopic]:
        return {topic.topic_id: topic for topic in self.topics.values()}

    def make(self, name: str, partitions: int) -> UUID:
        self.version += 1
        found = self.topics.setdefault(name, FakeTopic(name, UUID(int=len(self.topics) + 1), 0))
        found.partitions = partitions
        return found.topic_id

    def session_ms(self, group: str) -> int | None:
        return self.sessions.get(group)

    def drop(self, name: str) -> None:
        self.version += 1
        self.topics.pop(name, None)


class Host:
    """Decides, appends (as bytes) and replays, as the broker does. `replayed`: from the log."""

    def __init__(self, topics: FakeTopics) -> None:
        self.topics = topics
        self.group = self.empty()
        self.log: list[tuple[bytes, bytes | None]] = []

    def perform(self, decision: Decision) -> Beaten:
        for record in decision.records:
            key, value = encode(record)
            self.log.append((key, value))
            read = decode(key, value)
            assert read == record
            self.group.replay(read)
        return decision.reply

    def beat(self, beat: Beat, matched: frozenset[str] | None = None) -> Beaten:
        return self.perform(self.group.decide_heartbeat(beat, 0, matched))

    def leave(self, member_id: str, instance_id: str | None = None, epoch: int = -1) -> Beaten:
        return self.perform(self.group.decide_leave(member_id, instance_id, epoch))

    def expire(self, member_id: str) -> None:
        self.perform(Decision(self.group.removal([member_id]), Beaten()))

    def empty(self) -> ConsumerGroup:
        return ConsumerGroup("g", Timers(), self.topics)

    def replayed(self, *, compacted: bool = False) -> ConsumerGroup:
        group, log = self.empty(), self.log
        if compacted:
            last = {key: at for at, (key, _) in enumerate(log)}
            log = [each for at, each in enumerate(log) if last[each[0]] == at]
        for key, value in log:
            record = decode(key, value)
            assert record is not None
            group.replay(record)
        return group


def remembered(group: ConsumerGroup) -> dict[str, object]:
    """Everything that the log remembers of a group."""
    holders = {
        (topic, index): member
        for topic, found in group._holders.items()
        for index, member in found.items()
    }
    return {
        "epochs": (group.epoch, group.metadata_hash, group.target_epoch),
        "members": group.members,
        "current": {name: each for name, each in group.current.items() if name in group.members},
        "targets": group.targets,
        "regexes": group.regexes,
        "instances": group.instances,
        "holders": holders,
        "counts": (group._topics, group._regex_users),
    }


class Client:
    """A consumer: it uses what it was told to, until it has let go of it."""

    def __init__(self, name: str, topics: frozenset[str], instance_id: str | None = None) -> None:
        self.name, self.topics, self.instance_id = name, topics, instance_id
        self.epoch = 0
        self.missed = False  # an answer
        self.owned: Assignment = NOTHING
        self.wanted: Assignment = NOTHING

    def beat(self) -> Beat:
        if self.epoch == 0:
            return Beat(
                self.name, 0, instance_id=self.instance_id, rebalance_timeout_ms=1000,
                topics=self.topics, owned=NOTHING,
            )  # fmt: skip
        if self.missed:  # all is said again; what it was about to take counts as its own
            self.reconcile()
        return Beat(
            self.name,
            self.epoch,
            instance_id=self.instance_id,
            topics=self.topics,
            owned=self.owned if self.owned == self.wanted else None,
            rebalance_timeout_ms=1000 if self.missed else -1,
        )

    def hear(self, reply: Beaten) -> None:
        self.missed = False
        if reply.error.name in ("fenced_member_epoch", "unknown_member_id"):
            self.epoch, self.owned, self.wanted = 0, NOTHING, NOTHING
            return
        assert reply.error.value == 0, reply
        self.epoch = reply.epoch
        if reply.assignment is not None:
            self.wanted = reply.assignment

    def reconcile(self) -> None:
        """Let go first; what is new was free when it was given."""
        self.owned = self.wanted
