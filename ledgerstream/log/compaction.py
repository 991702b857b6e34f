"""What compaction keeps of a log, batch by batch. Pure.

Two passes. The first learns the newest offset of each key in the part that was not cleaned yet; the
second walks the whole log below that and says of each batch what is left of it. Offsets never
change: a batch keeps its base and its last offset whatever it loses.

- A record stays while it is the newest of its key. One without a value, a tombstone, stays for
  `delete.retention.ms` more, counted from the first time that compaction finds it: the time is kept
  in the batch's header, as Apache Kafka does (KIP-534).
- What was aborted goes at once. A marker stays while anything of its transaction is left, and then
  for `delete.retention.ms`. Markers have no key that counts.
- The batches by which a producer is recognised stay, as empty ones if need be, and its last marker.
- So does the last batch of what is cleaned: a reader's position always reaches the end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from hashlib import blake2b
from typing import NamedTuple

from ledgerstream.log.aborted import Aborted
from ledgerstream.wire.batches import (
    DELETE_HORIZON,
    HEADER_BYTES,
    LOG_APPEND_TIME,
    NO_TIMESTAMP,
    NONE,
    Buffer,
    Header,
    compress,
    decompress,
    seal_batch,
)
from ledgerstream.wire.keyed import Keyed, keyed_records, with_base_time
from ledgerstream.wire.markers import read_marker

_DIGEST_BYTES = 32  # keys below this length stand for themselves


class Newest:
    """The newest offset of each key, for at most `keys_max` of them.

    Long keys are known by a 256-bit hash, which no two share.
    """

    __slots__ = ("_offsets", "end", "keys_max")

    def __init__(self, keys_max: int, start: int) -> None:
        self.keys_max = keys_max
        self.end = start  # everything below, from the start on, is in here
        self._offsets: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._offsets)

    def has_room(self, count: int) -> bool:
        """For another batch; the first one always fits, however many records it has."""
        return not self._offsets or len(self._offsets) + count <= self.keys_max

    def add(self, base_offset: int, records: Iterable[Keyed]) -> None:
        offsets = self._offsets
        for record in records:
            key = record.key
            if key is not None:
                if len(key) >= _DIGEST_BYTES:
                    key = blake2b(key, digest_size=_DIGEST_BYTES).digest()
                offsets[key] = base_offset + record.offset_delta

    def of(self, key: bytes) -> int:
        """-1 if it is not known."""
        if len(key) >= _DIGEST_BYTES:
            key = blake2b(key, digest_size=_DIGEST_BYTES).digest()
        return self._offsets.get(key, -1)


class Ending(NamedTuple):
    """What a marker ends."""

    has_data: bool  # something of its transaction is in the log
    aborted: Aborted | None


class Transactions:
    """Which data was aborted, and which markers have none left, along one pass over a log.

    It goes on over all segments and groups of a pass: a transaction may span them.
    """

    def __init__(self, aborted: Iterable[Aborted]) -> None:
        """`aborted`: all that the segments' indexes know."""
        self._waiting = sorted(aborted, key=lambda each: each.first_offset, reverse=True)
        self._aborted: dict[int, Aborted] = {}  # by producer, those that are not ended yet
        self._with_data: set[int] = set()

    def is_aborted(self, header: Header) -> bool:
        """Of a batch of data."""
        self._reach(header.next_offset)
        if not header.transactional:
            return False
        self._with_data.add(header.producer_id)
        aborted = self._aborted.get(header.producer_id)
        return aborted is not None and header.base_offset < aborted.last_offset

    def end(self, header: Header) -> Ending:
        """Of a marker."""
        self._reach(header.next_offset)
        has_data = header.producer_id in self._with_data
        self._with_data.discard(header.producer_id)
        return Ending(has_data, self._aborted.pop(header.producer_id, None))

    def _reach(self, offset: int) -> None:
        while self._waiting and self._waiting[-1].first_offset < offset:
            begun = self._waiting.pop()
            self._aborted[begun.producer_id] = begun


def learn(newest: Newest, transactions: Transactions, header: Header, batch: Buffer) -> bool:
    """The first pass, a batch; False if there is no room for it. DecodeError."""
    if header.control:
        transactions.end(header)
    elif not transactions.is_aborted(header) and header.record_count:
        if not newest.has_room(header.record_count):
            return False
        newest.add(header.base_offset, keyed_records(_body(header, batch), header.record_count))
    newest.end = header.next_offset
    return True


class Rules(NamedTuple):
    """What a pass goes by."""

    now_ms: int
    delete_retention_ms: int
    remembered: Collection[int]  # last offsets of the batches by which producers are known


class Compaction:
    """The second pass. `keep` is called with every batch of the log, in order."""

    def __init__(self, newest: Newest, transactions: Transactions, rules: Rules) -> None:
        self._newest = newest
        self._transactions = transactions
        self._rules = rules
        self.aborted: list[Aborted] = []  # of markers that stay and have data; taken by the caller

    def keep(self, header: Header, batch: Buffer) -> Buffer | None:
        """What is left of it: itself where nothing changes, None if all goes. DecodeError."""
        if header.base_offset >= self._newest.end:
            if header.control and (ended := self._transactions.end(header).aborted):
                self.aborted.append(ended)
            return batch
        last_offset = header.next_offset - 1
        needed = last_offset in self._rules.remembered
        if header.control:
            left = self._of_marker(header, batch, needed)
        else:
            left = self._of_data(header, batch)
        if left is None and (needed or header.next_offset == self._newest.end):
            return batch if header.record_count == 0 else _emptied(header)
        return left

    def _of_marker(self, header: Header, batch: Buffer, needed: bool) -> Buffer | None:
        if header.record_count and read_marker(batch) is None:
            return batch  # of another kind: a leader change, …
        ending = self._transactions.end(header)
        if ending.has_data:
            if ending.aborted is not None:
                self.aborted.append(ending.aborted)
            return batch
        if header.record_count == 0:
            return None
        horizon = _horizon(header)
        if horizon is None:
            return self._with_horizon(header, _body(header, batch))
        return None if horizon <= self._rules.now_ms and not needed else batch

    def _of_data(self, header: Header, batch: Buffer) -> Buffer | None:
        if self._transactions.is_aborted(header) or header.record_count == 0:
            return None
        body = _body(header, batch)
        records = keyed_records(body, header.record_count)
        horizon = _horizon(header)
        kept, tombstones = self._newest_of(header, records, horizon)
        if not kept:
            return None
        if tombstones and horizon is None:
            return self._with_horizon(header, body, kept)
        if len(kept) == len(records):
            return batch
        parts = [body[record.start : record.end] for record in kept]
        return _rebuilt(header, parts, kept, header.base_timestamp, header.attributes)

    def _newest_of(
        self, header: Header, records: list[Keyed], horizon: int | None
    ) -> tuple[list[Keyed], bool]:
        """Those that stay, and whether one of them has no value."""
        of, end = self._newest.of, self._newest.end
        gone = horizon is not None and horizon <= self._rules.now_ms
        kept, tombstones = [], False
        for record in records:
            offset = header.base_offset + record.offset_delta
            if offset < end:
                if record.key is None or of(record.key) > offset:
                    continue
                if not record.has_value:
                    if gone:
                        continue
                    tombstones = True
            kept.append(record)
        return kept, tombstones

    def _with_horizon(self, header: Header, body: bytes, kept: list[Keyed] | None = None) -> bytes:
        """The batch with the time from which on its tombstones, or its marker, may go."""
        if kept is None:
            kept = keyed_records(body, header.record_count)
        horizon = self._rules.now_ms + self._rules.delete_retention_ms
        shift_ms = horizon - header.base_timestamp
        parts = [with_base_time(body, record, shift_ms) for record in kept]
        return _rebuilt(header, parts, kept, horizon, header.attributes | DELETE_HORIZON)


def _body(header: Header, batch: Buffer) -> bytes:
    return decompress(header.codec, memoryview(batch)[HEADER_BYTES : header.size])


def _horizon(header: Header) -> int | None:
    """ms since 1970 UTC, in the place of the base timestamp (KIP-534)."""
    return header.base_timestamp if header.attributes & DELETE_HORIZON else None


def _rebuilt(
    header: Header, parts: list[bytes], kept: list[Keyed], base_timestamp: int, attributes: int
) -> bytes:
    newest = header.max_timestamp
    if not header.attributes & LOG_APPEND_TIME:
        newest = header.base_timestamp + max(record.timestamp_delta for record in kept)
    return seal_batch(
        compress(header.codec, b"".join(parts)),
        count=len(kept),
        base_offset=header.base_offset,
        last_offset_delta=header.last_offset_delta,
        leader_epoch=header.leader_epoch,
        attributes=attributes,
        base_timestamp=base_timestamp,
        max_timestamp=newest,
        producer_id=header.producer_id,
        producer_epoch=header.producer_epoch,
        base_sequence=header.base_sequence,
    )


def _emptied(header: Header) -> bytes:
    """The header without records, as Apache Kafka writes it."""
    return seal_batch(
        compress(NONE, b""),
        count=0,
        base_offset=header.base_offset,
        last_offset_delta=header.last_offset_delta,
        leader_epoch=header.leader_epoch,
        attributes=header.attributes & ~(header.codec | DELETE_HORIZON),
        base_timestamp=NO_TIMESTAMP,
        max_timestamp=header.max_timestamp,
        producer_id=header.producer_id,
        producer_epoch=header.producer_epoch,
        base_sequence=header.base_sequence,
    )
