"""What is remembered of a transactional id, and its bytes: Kafka's TransactionLogKey and -Value.

Key: version i16 (0), the id as a string. Value, version 1: producer id i64, epoch i16, timeout i32,
status i8, partitions (compact array of topic and i32s, null where there are none), last update and
start i64, then tagged fields: 0 previous producer id, 1 next producer id, 2 client's transaction
version, 3 next producer epoch (KIP-939), and our own 10000: the last epoch (KIP-360), which Kafka
forgets at a restart. Version 0 has fixed-width lengths and no tags; both are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from ledgerstream.errors import DecodeError
from ledgerstream.wire.batches import read_unsigned_varint, unsigned_varint

NO_ID = NO_EPOCH = NO_TIME = -1
EPOCH_MAX = 2**15 - 1  # kept back: the coordinator must be able to fence whoever is there
EPOCH_LAST = EPOCH_MAX - 1  # the last that a client is ever given
NO_TIMEOUT = 2**31 - 1  # of transactions in two phases: they wait for their decision for ever
LAST_EPOCH_TAG = 10_000

TopicPartition = tuple[str, int]


class TxnState(IntEnum):
    """By the numbers that Kafka's log has for them."""

    EMPTY = 0
    ONGOING = 1
    PREPARE_COMMIT = 2
    PREPARE_ABORT = 3
    COMPLETE_COMMIT = 4
    COMPLETE_ABORT = 5

    @property
    def label(self) -> str:
        """As Kafka's tools show it and filter by it."""
        return self.name.title().replace("_", "")

    @property
    def ending(self) -> bool:
        """Decided for good; its markers are on their way."""
        return self in (TxnState.PREPARE_COMMIT, TxnState.PREPARE_ABORT)


class Txn(NamedTuple):
    """A transactional id as it is now."""

    txn_id: str
    producer_id: int
    producer_epoch: int
    state: TxnState = TxnState.EMPTY
    timeout_ms: int = 60_000
    partitions: frozenset[TopicPartition] = frozenset()
    started_ms: int = NO_TIME  # when the first partition was added
    updated_ms: int = NO_TIME
    last_epoch: int = NO_EPOCH  # whose holder may repeat what brought it to `producer_epoch`
    previous_id: int = NO_ID  # whose epochs were used up
    next_id: int = NO_ID  # ONGOING: see `client`; ending: takes over when it is complete
    next_epoch: int = NO_EPOCH
    version: int = 0  # of the transaction protocol that the client speaks

    @property
    def client(self) -> tuple[int, int]:
        """The identity that was handed out last, which alone may go on: the id's own; or, while a
        transaction is open, that of somebody who found it prepared (KIP-939); or, while it ends
        with its id's last epoch, that of the next one."""
        if self.next_epoch != NO_EPOCH:
            return (self.producer_id if self.next_id == NO_ID else self.next_id), self.next_epoch
        return self.producer_id, self.producer_epoch

    @property
    def two_phase(self) -> bool:
        return self.timeout_ms == NO_TIMEOUT


class Forgotten(NamedTuple):
    """The id was not used for a long time; a record without value."""

    txn_id: str


TxnRecord = Txn | Forgotten

_I16, _I32, _I64 = struct.Struct(">h"), struct.Struct(">i"), struct.Struct(">q")
_FRONT = struct.Struct(">hqhib")
_TIMES = struct.Struct(">qq")


class TxnCodec:
    """Records to key and value, and back."""

    def encode(self, record: TxnRecord) -> tuple[bytes, bytes | None]:
        name = record.txn_id.encode()
        key = _I16.pack(0) + _I16.pack(len(name)) + name
        return key, None if isinstance(record, Forgotten) else _encode_value(record)

    def decode(self, key: bytes, value: bytes | None) -> TxnRecord | None:
        """None: a version that is not known here. Raises DecodeError for damage."""
        try:
            (version,) = _I16.unpack_from(key)
            if version != 0:
                return None
            (size,) = _I16.unpack_from(key, 2)
            txn_id = key[4 : 4 + size].decode()
            if size < 0 or len(key) < 4 + size:
                raise DecodeError("A key of the transaction log ends too early.")
            return Forgotten(txn_id) if value is None else _decode_value(txn_id, value)
        except (struct.error, ValueError, IndexError) as error:
            raise DecodeError(f"A record of the transaction log is malformed: {error}") from error


def _encode_value(txn: Txn) -> bytes:
    out = bytearray(_FRONT.pack(1, txn.producer_id, txn.producer_epoch, txn.timeout_ms, txn.state))
    if txn.state is TxnState.EMPTY:
        out += b"\x00"  # null
    else:
        topics = _by_topic(txn.partitions)
        out += unsigned_varint(len(topics) + 1)
        for topic, indexes in topics:
            name = topic.encode()
            out += unsigned_varint(len(name) + 1) + name + unsigned_varint(len(indexes) + 1)
            out += struct.pack(f">{len(indexes)}i", *indexes) + b"\x00"
    out += _TIMES.pack(txn.updated_ms, txn.started_ms)
    tags = [
        (tag, form.pack(number))
        for tag, form, number, default in (
            (0, _I64, txn.previous_id, NO_ID),
            (1, _I64, txn.next_id, NO_ID),
            (2, _I16, txn.version, 0),
            (3, _I16, txn.next_epoch, NO_EPOCH),
            (LAST_EPOCH_TAG, _I16, txn.last_epoch, NO_EPOCH),
        )
        if number != default
    ]
    out += unsigned_varint(len(tags))
    for tag, content in tags:
        out += unsigned_varint(tag) + unsigned_varint(len(content)) + content
    return bytes(out)


def _decode_value(txn_id: str, value: bytes) -> Txn | None:
    version, producer_id, producer_epoch, timeout_ms, status = _FRONT.unpack_from(value)
    if version not in (0, 1):
        return None
    state = TxnState(status)
    at = _FRONT.size
    partitions, at = (_read_partitions if version else _read_partitions_0)(value, at)
    updated_ms, started_ms = _TIMES.unpack_from(value, at)
    txn = Txn(
        txn_id, producer_id, producer_epoch, state, timeout_ms, partitions, started_ms, updated_ms
    )
    if version == 0:
        return txn
    tags = _read_tags(value, at + _TIMES.size)
    return txn._replace(
        previous_id=tags.get(0, NO_ID),
        next_id=tags.get(1, NO_ID),
        version=tags.get(2, 0),
        next_epoch=tags.get(3, NO_EPOCH),
        last_epoch=tags.get(LAST_EPOCH_TAG, NO_EPOCH),
    )


def _read_partitions(value: bytes, at: int) -> tuple[frozenset[TopicPartition], int]:
    count, at = read_unsigned_varint(value, at)
    found = []
    for _ in range(count - 1):
        size, at = read_unsigned_varint(value, at)
        topic = value[at : at + size - 1].decode()
        indexes, at = read_unsigned_varint(value, at + size - 1)
        for _ in range(indexes - 1):
            found.append((topic, _I32.unpack_from(value, at)[0]))
            at += 4
        at = _skip_tags(value, at)
    return frozenset(found), at


def _read_partitions_0(value: bytes, at: int) -> tuple[frozenset[TopicPartition], int]:
    (count,) = _I32.unpack_from(value, at)
    at += 4
    found = []
    for _ in range(count):
        (size,) = _I16.unpack_from(value, at)
        topic = value[at + 2 : at + 2 + size].decode()
        (indexes,) = _I32.unpack_from(value, at + 2 + size)
        at += 6 + size
        for _ in range(indexes):
            found.append((topic, _I32.unpack_from(value, at)[0]))
            at += 4
    return frozenset(found), at


_TAGS = {0: _I64, 1: _I64, 2: _I16, 3: _I16, LAST_EPOCH_TAG: _I16}


def _read_tags(value: bytes, at: int) -> dict[int, int]:
    """The numbers of the tags that are known here."""
    count, at = read_unsigned_varint(value, at)
    found = {}
    for _ in range(count):
        tag, at = read_unsigned_varint(value, at)
        size, at = read_unsigned_varint(value, at)
        if tag in _TAGS:
            found[tag] = _TAGS[tag].unpack_from(value, at)[0]
        at += size
    return found


def _skip_tags(value: bytes, at: int) -> int:
    count, at = read_unsigned_varint(value, at)
    for _ in range(count):
        _, at = read_unsigned_varint(value, at)
        size, at = read_unsigned_varint(value, at)
        at += size
    return at


def _by_topic(partitions: Iterable[TopicPartition]) -> list[tuple[str, list[int]]]:
    topics: dict[str, list[int]] = {}
    for topic, index in sorted(partitions):
        topics.setdefault(topic, []).append(index)
    return list(topics.items())
