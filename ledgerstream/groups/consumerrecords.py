"""What is remembered of a next-generation group (KIP-848), and its bytes in Kafka's own layouts.

Seven kinds of record, told apart by the key's version: 3 the group's epoch, 5 a member and what it
subscribes to, 6 the epoch of the target assignment, 7 a member's target, 8 what a member has now,
16 the topics that a regular expression matched. (4 is what Apache Kafka wrote before 4.1 and no
longer uses.) A value of null removes what the key names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import NamedTuple
from uuid import UUID

from ledgerstream.wire.fields import (
    I16,
    I32,
    I64,
    Fields,
    put_array,
    put_bytes,
    put_ints,
    put_plain_string,
    put_string,
    put_tags,
)

Assignment = Mapping[UUID, frozenset[int]]  # by topic id; no empty sets in it; never changed
NOTHING: Assignment = {}
Since = Mapping[UUID, Mapping[int, int]]  # the epoch in which a member got each of its partitions
NEVER: Since = {}

LEFT_EPOCH, AWAY_EPOCH = -1, -2  # a member has left; a static one has, and will be back


class Key(IntEnum):
    """The versions of the keys."""

    GROUP = 3
    MEMBER = 5
    TARGET_EPOCH = 6
    TARGET = 7
    CURRENT = 8
    REGEX = 16


OF_MEMBER = (Key.MEMBER, Key.TARGET, Key.CURRENT)


class MemberState(IntEnum):
    """How far a member is on its way to its target, by the numbers in Kafka's records."""

    STABLE = 0
    UNREVOKED_PARTITIONS = 1  # has to give some up first
    UNRELEASED_PARTITIONS = 2  # waits for some that others still have
    UNKNOWN = 127

    @property
    def label(self) -> str:
        return self.name.title().replace("_", "")


class GroupEpoch(NamedTuple):
    group: str
    epoch: int  # one more whenever members, subscriptions or topics change
    metadata_hash: int = 0  # of the subscribed topics, their ids and partition counts


class ClassicProtocol(NamedTuple):
    """What a member that speaks the classic protocol said when it joined (KIP-848, upgrade)."""

    session_timeout_ms: int
    protocols: tuple[tuple[str, bytes], ...]  # names and metadata, in the member's preference


class Member(NamedTuple):
    group: str
    member_id: str
    instance_id: str | None = None
    rack_id: str | None = None
    client_id: str = ""
    client_host: str = ""
    topics: frozenset[str] = frozenset()
    regex: str = ""  # "": none
    rebalance_timeout_ms: int = -1
    assignor: str | None = None
    classic: ClassicProtocol | None = None


class TargetEpoch(NamedTuple):
    group: str
    epoch: int
    assigned_ms: int = 0  # when it was made


class Target(NamedTuple):
    group: str
    member_id: str
    partitions: Assignment


class Current(NamedTuple):
    """What a member has, or may still have, in its hands."""

    group: str
    member_id: str
    epoch: int = 0
    previous_epoch: int = -1  # a member whose answer was lost comes with it again
    state: MemberState = MemberState.STABLE
    assigned: Assignment = NOTHING
    revoking: Assignment = NOTHING  # asked back, not given yet
    since: Since = NEVER  # of all of these (KIP-1251)

    @property
    def held(self) -> Assignment:
        """What is assigned, and what was asked back and may still be in its hands."""
        nothing: frozenset[int] = frozenset()
        return {
            topic: self.assigned.get(topic, nothing) | self.revoking.get(topic, nothing)
            for topic in {**self.assigned, **self.revoking}
        }


class Regex(NamedTuple):
    group: str
    regex: str
    topics: frozenset[str]
    version: int  # of the catalogue that it was matched against
    matched_ms: int


class Gone(NamedTuple):
    """A record without value: what `key` and the name (a member's, a regex; "") stood for."""

    key: Key
    group: str
    name: str = ""


ConsumerRecord = GroupEpoch | Member | TargetEpoch | Target | Current | Regex | Gone
_KEYS: dict[type, Key] = {
    GroupEpoch: Key.GROUP,
    Member: Key.MEMBER,
    TargetEpoch: Key.TARGET_EPOCH,
    Target: Key.TARGET,
    Current: Key.CURRENT,
    Regex: Key.REGEX,
}
_NAMED = frozenset({*OF_MEMBER, Key.REGEX})


def encode(record: ConsumerRecord) -> tuple[bytes, bytes | None]:
    """Key and value."""
    key = record.key if isinstance(record, Gone) else _KEYS[type(record)]
    out = bytearray(I16.pack(key))
    put_plain_string(out, record.group)
    if isinstance(record, Gone):
        name = record.name
    else:
        name = record.regex if isinstance(record, Regex) else getattr(record, "member_id", "")
    if key in _NAMED:
        put_plain_string(out, name)
    return bytes(out), None if isinstance(record, Gone) else _value(record)


def decode(key: bytes, value: bytes | None) -> ConsumerRecord | None:
    """None: a version that is not known here. Raises DecodeError for damage."""
    fields = Fields(key)
    try:
        version = Key(fields.i16())
    except ValueError:
        return None
    group = fields.plain_string()
    name = fields.plain_string() if version in _NAMED else ""
    if value is None:
        return Gone(version, group, name)
    fields = Fields(value)
    if fields.i16() != 0:
        return None
    return _READERS[version](group, name, fields)


def _value(record: GroupEpoch | Member | TargetEpoch | Target | Current | Regex) -> bytes:
    out = bytearray(I16.pack(0))
    tags: dict[int, bytes] = {}
    match record:
        case GroupEpoch():
            out += I32.pack(record.epoch)
            if record.metadata_hash:
                tags[0] = I64.pack(record.metadata_hash)
        case TargetEpoch():
            out += I32.pack(record.epoch)
            if record.assigned_ms:
                tags[0] = I64.pack(record.assigned_ms)
        case Member():
            _put_member(out, record)
            tags[0] = _classic(record.classic)
        case Target():
            _put_partitions(out, record.partitions)
        case Current():
            out += I32.pack(record.epoch) + I32.pack(record.previous_epoch)
            out.append(record.state)
            _put_partitions(out, record.assigned, record.since)
            _put_partitions(out, record.revoking, record.since)
        case Regex():
            put_array(out, sorted(record.topics), put_string)
            out += I64.pack(record.version) + I64.pack(record.matched_ms)
    put_tags(out, tags)
    return bytes(out)


_NULL, _PRESENT = b"\x00", b"\x01"  # of a struct among the tagged fields


def _put_member(out: bytearray, member: Member) -> None:
    put_string(out, member.instance_id)
    put_string(out, member.rack_id)
    put_string(out, member.client_id)
    put_string(out, member.client_host)
    put_array(out, sorted(member.topics), put_string)
    put_string(out, member.regex)
    out += I32.pack(member.rebalance_timeout_ms)
    put_string(out, member.assignor)


def _classic(classic: ClassicProtocol | None) -> bytes:
    if classic is None:
        return _NULL
    out = bytearray(_PRESENT + I32.pack(classic.session_timeout_ms))
    put_array(out, classic.protocols, _put_protocol)
    put_tags(out, {})
    return bytes(out)


def _put_protocol(out: bytearray, protocol: tuple[str, bytes]) -> None:
    put_string(out, protocol[0])
    put_bytes(out, protocol[1])
    put_tags(out, {})


def _put_partitions(out: bytearray, assignment: Assignment, since: Since = NEVER) -> None:
    def put_topic(out: bytearray, topic: UUID) -> None:
        indexes = sorted(assignment[topic])
        out += topic.bytes
        put_ints(out, indexes)
        tags, known = {}, since.get(topic, {})
        if all(index in known for index in indexes):
            epochs = bytearray()
            put_ints(epochs, (known[index] for index in indexes))
            tags[0] = bytes(epochs)
        put_tags(out, tags)

    put_array(out, sorted(assignment, key=lambda topic: topic.bytes), put_topic)


def _read_group(group: str, _: str, fields: Fields) -> GroupEpoch:
    epoch, tags = fields.i32(), fields.tags()
    return GroupEpoch(group, epoch, Fields(tags[0]).i64() if 0 in tags else 0)


def _read_member(group: str, member_id: str, fields: Fields) -> Member:
    member = Member(
        group,
        member_id,
        instance_id=fields.nullable_string(),
        rack_id=fields.nullable_string(),
        client_id=fields.string(),
        client_host=fields.string(),
        topics=frozenset(fields.array(fields.string)),
        regex=fields.string(),
        rebalance_timeout_ms=fields.i32(),
        assignor=fields.nullable_string(),
    )
    tags = fields.tags()
    return member._replace(classic=_read_classic(Fields(tags[0]))) if 0 in tags else member


def _read_classic(fields: Fields) -> ClassicProtocol | None:
    if fields.varint() == 0:
        return None

    def protocol() -> tuple[str, bytes]:
        found = fields.string(), fields.blob()
        fields.tags()
        return found

    return ClassicProtocol(fields.i32(), tuple(fields.array(protocol)))


def _read_partitions(fields: Fields) -> tuple[Assignment, Since]:
    since: dict[UUID, dict[int, int]] = {}

    def topic() -> tuple[UUID, frozenset[int]]:
        found, indexes, tags = fields.uuid(), fields.ints(), fields.tags()
        if 0 in tags:
            since[found] = dict(zip(indexes, Fields(tags[0]).ints(), strict=False))
        return found, frozenset(indexes)

    return dict(fields.array(topic)), since


def _read_target_epoch(group: str, _: str, fields: Fields) -> TargetEpoch:
    epoch, tags = fields.i32(), fields.tags()
    return TargetEpoch(group, epoch, Fields(tags[0]).i64() if 0 in tags else 0)


def _read_target(group: str, member_id: str, fields: Fields) -> Target:
    return Target(group, member_id, _read_partitions(fields)[0])


def _read_current(group: str, member_id: str, fields: Fields) -> Current:
    epoch, previous, number = fields.i32(), fields.i32(), fields.i8()
    try:
        state = MemberState(number)
    except ValueError:  # of a later version: the member has to begin again
        state = MemberState.UNKNOWN
    assigned, since = _read_partitions(fields)
    revoking, of_revoking = _read_partitions(fields)
    since = {
        topic: {**since.get(topic, {}), **of_revoking.get(topic, {})}
        for topic in {**since, **of_revoking}
    }
    return Current(group, member_id, epoch, previous, state, assigned, revoking, since)


def _read_regex(group: str, regex: str, fields: Fields) -> Regex:
    return Regex(group, regex, frozenset(fields.array(fields.string)), fields.i64(), fields.i64())


_READERS: dict[Key, Callable[[str, str, Fields], ConsumerRecord]] = {
    Key.GROUP: _read_group,
    Key.MEMBER: _read_member,
    Key.TARGET_EPOCH: _read_target_epoch,
    Key.TARGET: _read_target,
    Key.CURRENT: _read_current,
    Key.REGEX: _read_regex,
}

__all__ = [
    "Assignment", "ClassicProtocol", "ConsumerRecord", "Current", "Gone",
    "GroupEpoch", "Key", "Member", "MemberState", "Regex", "Target", "TargetEpoch", "decode",
    "encode",
]  # fmt: skip
