"""What consumers say to each other inside the classic protocol: ConsumerProtocol, versions 0 to 3.

Members write it and read it; so does the group coordinator where members of both kinds are in one
group (KIP-848). A version only adds to what the one before has, so a later one is read as 3. Pure.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ledgerstream.wire.fields import I16, I32, Fields, put_plain_string

Named = dict[str, frozenset[int]]  # partitions by the topic's name
VERSION_MAX = 3


class Subscription(NamedTuple):
    topics: frozenset[str]
    owned: Named | None = None  # since version 1 (KIP-429): what the member has in its hands
    generation: int = -1  # since 2 (KIP-792): in which it got that
    rack_id: str | None = None  # since 3 (KIP-881)


def read_subscription(data: bytes) -> Subscription:
    """Raises DecodeError for what is none."""
    fields = Fields(data)
    version = fields.i16()
    topics = frozenset(fields.plain_array(fields.plain_string))
    _skip_bytes(fields)
    found = Subscription(topics)
    if version >= 1:
        found = found._replace(owned=_read_partitions(fields))
    if version >= 2:
        found = found._replace(generation=fields.i32())
    if version >= 3:
        found = found._replace(rack_id=fields.nullable_plain_string())
    return found


def write_subscription(subscription: Subscription, version: int) -> bytes:
    version = min(max(version, 0), VERSION_MAX)
    out = bytearray(I16.pack(version) + I32.pack(len(subscription.topics)))
    for topic in sorted(subscription.topics):
        put_plain_string(out, topic)
    out += I32.pack(-1)  # no user data
    if version >= 1:
        _put_partitions(out, subscription.owned or {})
    if version >= 2:
        out += I32.pack(subscription.generation)
    if version >= 3:
        put_plain_string(out, subscription.rack_id)
    return bytes(out)


def read_assignment(data: bytes) -> Named:
    """Nothing, where a member has been given nothing yet. Raises DecodeError for what is none."""
    if not data:
        return {}
    fields = Fields(data)
    fields.i16()
    return _read_partitions(fields)


def write_assignment(partitions: Named, version: int) -> bytes:
    out = bytearray(I16.pack(min(max(version, 0), VERSION_MAX)))
    _put_partitions(out, partitions)
    return bytes(out + I32.pack(-1))  # no user data


def version_of(data: bytes) -> int:
    return Fields(data).i16()


def _read_partitions(fields: Fields) -> Named:
    def topic() -> tuple[str, frozenset[int]]:
        return fields.plain_string(), frozenset(fields.plain_array(fields.i32))

    found: dict[str, frozenset[int]] = {}
    for name, indexes in fields.plain_array(topic):
        found[name] = found.get(name, frozenset()) | indexes
    return found


def _put_partitions(out: bytearray, partitions: Named) -> None:
    out += I32.pack(len(partitions))
    for topic in sorted(partitions):
        indexes = sorted(partitions[topic])
        put_plain_string(out, topic)
        out += I32.pack(len(indexes)) + struct.pack(f">{len(indexes)}i", *indexes)


def _skip_bytes(fields: Fields) -> None:
    size = fields.i32()
    if size > 0:
        fields.raw(size)
