"""What is remembered of groups and their offsets, and its bytes: Kafka's own formats.

A key begins with its kind (i16): 0 and 1 an offset (group, topic as strings, partition i32), 2 a
group's metadata (group). An offset's value: version i16, offset i64, from 3 on leader epoch i32,
metadata string, commit time i64, in 1 alone expiry time i64. A group's: version i16, protocol type,
generation i32, protocol and leader (null where there is none), from 2 on the time of its state i64,
members; each has its id, from 3 on instance id, client id and host, from 1 on rebalance timeout
i32, session timeout i32, subscription and assignment as bytes. Version 4 of both has lengths as
varints, and tags; of an offset, tag 0 is the topic's id. All are read; as Apache Kafka 4.3 does, 4
is written of an offset (1 if it has an expiry time of its own) and 3 of a group.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple, TypeVar
from uuid import UUID

from ledgerstream.errors import DecodeError
from ledgerstream.groups import consumerrecords
from ledgerstream.groups.consumerrecords import ConsumerRecord
from ledgerstream.wire.batches import unsigned_varint
from ledgerstream.wire.fields import I16, I32, I64, Fields

NO_TIME = NO_EPOCH = -1
TEXT_BYTES_MAX = 2**15 - 1  # of the format: no longer string can be written
OFFSET_KEY_0, OFFSET_KEY, GROUP_KEY = 0, 1, 2
OFFSET_VALUE, OFFSET_VALUE_EXPIRING, GROUP_VALUE, FLEXIBLE = 4, 1, 3, 4
TOPIC_ID_TAG, TOPIC_ID_BYTES = 0, 16


class OffsetCommitted(NamedTuple):
    """A group has come so far in a partition. Times in ms since 1970 UTC."""

    group: str
    topic: str
    partition: int
    offset: int
    leader_epoch: int = NO_EPOCH
    metadata: str = ""
    committed_ms: int = NO_TIME
    expires_ms: int = NO_TIME  # by the wish of an old client (OffsetCommit 2 to 4)
    topic_id: UUID | None = None  # where the client named its topic by it


class OffsetForgotten(NamedTuple):
    """Deleted, expired, or its partition is no more; a record without value."""

    group: str
    topic: str
    partition: int


class MemberMetadata(NamedTuple):
    """A member of a classic group, as of a completed generation."""

    member_id: str
    instance_id: str | None  # of a static member (KIP-345)
    client_id: str
    client_host: str
    rebalance_ms: int
    session_ms: int
    subscription: bytes  # of the protocol that was chosen; the clients' own format
    assignment: bytes


class GroupMetadata(NamedTuple):
    """A classic group: its last completed generation, or that it is empty."""

    group: str
    protocol_type: str
    generation: int
    protocol: str | None
    leader: str | None
    since_ms: int  # when it came to be as it is
    members: tuple[MemberMetadata, ...] = ()


class GroupForgotten(NamedTuple):
    """Deleted, or empty for long; a record without value."""

    group: str


GroupRecord = OffsetCommitted | OffsetForgotten | GroupMetadata | GroupForgotten | ConsumerRecord

T = TypeVar("T")


class GroupCodec:
    """Records to key and value, and back."""

    def encode(self, record: GroupRecord) -> tuple[bytes, bytes | None]:
        match record:
            case OffsetCommitted():
                return _offset_key(record), _offset_value(record)
            case OffsetForgotten():
                return _offset_key(record), None
            case GroupMetadata():
                return I16.pack(GROUP_KEY) + _text(record.group), _group_value(record)
            case GroupForgotten():
                return I16.pack(GROUP_KEY) + _text(record.group), None
        return consumerrecords.encode(record)

    def decode(self, key: bytes, value: bytes | None) -> GroupRecord | None:
        """None: of a kind or version that is not known here. Raises DecodeError for damage."""
        try:
            return _decode(key, value)
        except ValueError as error:
            raise DecodeError(f"A record of the groups' log is malformed: {error}") from error


def _decode(key: bytes, value: bytes | None) -> GroupRecord | None:
    found = _Reader(key)
    kind = found.i16()
    if kind not in (OFFSET_KEY_0, OFFSET_KEY, GROUP_KEY):
        return consumerrecords.decode(key, value)
    group = found.text()
    if kind == GROUP_KEY:
        return GroupForgotten(group) if value is None else _read_group(group, value)
    topic, partition = found.text(), found.i32()
    if value is None:
        return OffsetForgotten(group, topic, partition)
    return _read_offset(group, topic, partition, value)


# offsets


def _offset_key(record: OffsetCommitted | OffsetForgotten) -> bytes:
    group, topic, partition = record[:3]
    return I16.pack(OFFSET_KEY) + _text(group) + _text(topic) + I32.pack(partition)


def _offset_value(record: OffsetCommitted) -> bytes:
    committed = I64.pack(record.committed_ms)
    if record.expires_ms != NO_TIME:
        head = struct.pack(">hq", OFFSET_VALUE_EXPIRING, record.offset) + _text(record.metadata)
        return head + committed + I64.pack(record.expires_ms)
    head = struct.pack(">hqi", OFFSET_VALUE, record.offset, record.leader_epoch)
    metadata = record.metadata.encode()
    tags = b"\x00"
    if record.topic_id is not None:
        tags = bytes((1, TOPIC_ID_TAG, TOPIC_ID_BYTES)) + record.topic_id.bytes
    return head + unsigned_varint(len(metadata) + 1) + metadata + committed + tags


def _read_offset(group: str, topic: str, partition: int, value: bytes) -> OffsetCommitted | None:
    found = _Reader(value)
    version = found.i16()
    if not 0 <= version <= FLEXIBLE:
        return None
    found.flexible = version >= FLEXIBLE
    offset = found.i64()
    leader_epoch = found.i32() if version >= 3 else NO_EPOCH
    metadata, committed_ms = found.text(), found.i64()
    expires_ms = found.i64() if version == OFFSET_VALUE_EXPIRING else NO_TIME
    topic_id = found.tags().get(TOPIC_ID_TAG)
    return OffsetCommitted(
        group, topic, partition, offset, leader_epoch, metadata, committed_ms, expires_ms,
        None if topic_id is None else UUID(bytes=topic_id),
    )  # fmt: skip


# groups


def _group_value(record: GroupMetadata) -> bytes:
    out = bytearray(I16.pack(GROUP_VALUE))
    out += _text(record.protocol_type) + I32.pack(record.generation)
    out += _text_or_null(record.protocol) + _text_or_null(record.leader)
    out += I64.pack(record.since_ms) + I32.pack(len(record.members))
    for member in record.members:
        out += _text(member.member_id) + _text_or_null(member.instance_id)
        out += _text(member.client_id) + _text(member.client_host)
        out += struct.pack(">ii", member.rebalance_ms, member.session_ms)
        for content in (member.subscription, member.assignment):
            out += I32.pack(len(content)) + content
    return bytes(out)


def _read_group(group: str, value: bytes) -> GroupMetadata | None:
    found = _Reader(value)
    version = found.i16()
    if not 0 <= version <= FLEXIBLE:
        return None
    found.flexible = version >= FLEXIBLE
    protocol_type, generation = found.text(), found.i32()
    protocol, leader = found.text_or_null(), found.text_or_null()
    since_ms = found.i64() if version >= 2 else NO_TIME
    members = tuple(found.items(lambda: _read_member(found, version)))
    return GroupMetadata(group, protocol_type, generation, protocol, leader, since_ms, members)


def _read_member(found: _Reader, version: int) -> MemberMetadata:
    member_id = found.text()
    instance_id = found.text_or_null() if version >= 3 else None
    client_id, client_host = found.text(), found.text()
    rebalance_ms = found.i32() if version >= 1 else NO_TIME
    session_ms = found.i32()
    subscription, assignment = found.content(), found.content()
    found.tags()
    return MemberMetadata(
        member_id, instance_id, client_id, client_host,
        session_ms if rebalance_ms == NO_TIME else rebalance_ms, session_ms, subscription,
        assignment,
    )  # fmt: skip


# bytes


def fits(text: str | None) -> bool:
    """Whether the record format has room for it."""
    return text is None or len(text) <= TEXT_BYTES_MAX // 4 or len(text.encode()) <= TEXT_BYTES_MAX


def _text(text: str) -> bytes:
    data = text.encode()
    return I16.pack(len(data)) + data


def _text_or_null(text: str | None) -> bytes:
    return I16.pack(-1) if text is None else _text(text)


class _Reader(Fields):
    """Fields in the form that the record's version has. Raises DecodeError where it ends early."""

    __slots__ = ("flexible",)

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.flexible = False

    def text(self) -> str:
        found = self.text_or_null()
        if found is None:
            raise DecodeError("A name that has to be there is null.")
        return found

    def text_or_null(self) -> str | None:
        return self.nullable_string() if self.flexible else self.nullable_plain_string()

    def content(self) -> bytes:
        return self.blob() if self.flexible else self.raw(max(self.i32(), 0))

    def items(self, take: Callable[[], T]) -> list[T]:
        return self.array(take) if self.flexible else self.plain_array(take)

    def tags(self) -> dict[int, bytes]:
        return super().tags() if self.flexible else {}
