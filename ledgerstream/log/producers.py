"""What a partition remembers of its producers (KIP-98): batches, epochs, open transactions. Pure.

`check` decides, `replay` is the only mutation, live and after a restart alike. The last five
batches of each producer are kept, so that a retry of any batch in flight is recognised, before a
restart and after. The first batch of a transaction needs a guard: the word of the transaction's
coordinator that it knows of this partition, obtained after the last marker here (`begin`), so that
a late batch never opens a transaction that nobody will end (KIP-890). Guards are soft state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kio.schema.errors import ErrorCode

from ledgerstream.limits import LIMITS
from ledgerstream.log.opentxns import Ended, OpenTransactions
from ledgerstream.log.verdicts import NEW, Guard, New, Refused, Repeat
from ledgerstream.wire.batches import NO_SEQUENCE, Header
from ledgerstream.wire.markers import Marker

SEQUENCES = 2**31  # sequences run from 0 to 2^31 - 1 and start again at 0
NO_TIME = -1


class Kept(NamedTuple):
    """One remembered batch; sequences and offsets are inclusive."""

    first_sequence: int
    last_sequence: int
    base_offset: int
    last_offset: int
    timestamp: int  # ms: what the batch's reply carries


class ProducerRecord(NamedTuple):
    """A producer as snapshots hold it; the fields from `coordinator_epoch` on since layout 2."""

    producer_id: int
    producer_epoch: int
    kept: tuple[Kept, ...]
    coordinator_epoch: int = -1  # of its last marker here
    last_timestamp: int = NO_TIME  # ms, of its last batch or marker
    txn_first_offset: int = -1  # of the transaction that is open; -1: none is


class Described(NamedTuple):
    """A producer as DescribeProducers tells of it (KIP-664)."""

    producer_id: int
    producer_epoch: int
    last_sequence: int
    last_timestamp: int
    coordinator_epoch: int
    txn_first_offset: int


class Producer:
    """State of one producer id in this partition."""

    __slots__ = (
        "coordinator_epoch",
        "guard",
        "idle_since_ms",
        "kept",
        "last_offset",
        "last_timestamp",
        "next_sequence",
        "opened_ms",
        "producer_epoch",
        "seen_offset",
    )

    def __init__(
        self,
        producer_epoch: int,
        kept: tuple[Kept, ...] = (),
        coordinator_epoch: int = -1,
        last_timestamp: int = NO_TIME,
    ) -> None:
        self.producer_epoch = producer_epoch
        self.kept = kept  # oldest first, all of `producer_epoch`
        self.coordinator_epoch = coordinator_epoch
        self.last_timestamp = last_timestamp
        self.next_sequence = _after(kept[-1].last_sequence) if kept else 0
        self.last_offset = kept[-1].last_offset if kept else -1  # markers count too
        # Soft state, `expire`'s and `late`'s own: where it was seen last, and since when.
        self.seen_offset = -2
        self.idle_since_ms = 0
        self.opened_ms = 0


class Producers:
    """All producers of one partition."""

    __slots__ = ("_by_id", "_guards", "open")

    def __init__(self, records: Iterable[ProducerRecord] = ()) -> None:
        self._by_id: dict[int, Producer] = {}
        self._guards: dict[int, Guard] = {}
        opened = []
        for r in records:
            self._by_id[r.producer_id] = Producer(
                r.producer_epoch, r.kept, r.coordinator_epoch, r.last_timestamp
            )
            if r.txn_first_offset >= 0:
                opened.append((r.txn_first_offset, r.producer_id))
        self.open = OpenTransactions((pid, first) for first, pid in sorted(opened))

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, producer_id: int) -> bool:
        return producer_id in self._by_id

    # verification

    def in_transaction(self, producer_id: int, producer_epoch: int) -> bool:
        """Whether data of a transaction of this epoch stands here, without its marker."""
        return (
            producer_id in self.open and self._by_id[producer_id].producer_epoch == producer_epoch
        )

    def begin(self, producer_id: int, producer_epoch: int, sequence: int) -> Guard:
        """A batch is about to be asked of its coordinator.

        The lowest sequence that waits is remembered: none after it may overtake it if it has to be
        sent again. A marker makes the guard worthless.
        """
        guard = self._guards.get(producer_id)
        if guard is None:
            guard = self._guards[producer_id] = Guard(producer_epoch, sequence)
        elif producer_epoch > guard.producer_epoch:
            guard.producer_epoch, guard.lowest_sequence = producer_epoch, sequence
        elif producer_epoch == guard.producer_epoch and sequence < guard.lowest_sequence:
            guard.lowest_sequence = sequence
        return guard

    # decisions

    def check(self, header: Header, guard: Guard | None = None) -> New | Repeat | Refused:
        """Whether a client's batch may be appended. Repeats are looked for before all else."""
        producer = self._by_id.get(header.producer_id)
        if producer is None:
            if header.transactional and (refused := self._unguarded(header, guard)):
                return refused
            return NEW  # never seen, or forgotten: any sequence lets the producer go on
        if header.producer_epoch == producer.producer_epoch:
            if repeat := _repeat_of(producer, header):
                return repeat
            if header.base_sequence != producer.next_sequence:
                if header.transactional and (refused := self._unguarded(header, guard)):
                    return refused
                return _out_of_order(producer, header)
        elif header.producer_epoch < producer.producer_epoch:
            return _fenced(producer, header)
        elif header.base_sequence != 0:
            return _out_of_order(producer, header)
        if header.transactional:
            return self._unguarded(header, guard) or NEW
        if header.producer_id in self.open:
            return Refused(
                ErrorCode.invalid_txn_state,
                f"Producer {header.producer_id} has a transaction open in this partition.",
            )
        return NEW

    def check_own(self, header: Header, guard: Guard | None) -> Refused | None:
        """Why a batch that a coordinator writes, perhaps for a producer, may not be appended."""
        producer = self._by_id.get(header.producer_id)
        if producer is not None and header.producer_epoch < producer.producer_epoch:
            return _fenced(producer, header)
        return self._unguarded(header, guard) if header.transactional else None

    def check_marker(self, marker: Marker, *, strict: bool = False) -> Refused | None:
        """Why a marker may not be appended: its coordinator or its producer has been overtaken.

        `strict`: each transaction has an epoch of its own (KIP-890), so a marker's is above its
        data's. One of the same epoch without data is a repeat, and harmless.
        """
        producer = self._by_id.get(marker.producer_id)
        if producer is None:
            return None
        epoch, held = marker.producer_epoch, producer.producer_epoch
        if epoch < held or (strict and epoch == held and marker.producer_id in self.open):
            return Refused(
                ErrorCode.invalid_producer_epoch,
                f"Producer {marker.producer_id} is at epoch {held}; a marker of {epoch} is late.",
            )
        if marker.coordinator_epoch < producer.coordinator_epoch:
            return Refused(
                ErrorCode.transaction_coordinator_fenced,
                f"Coordinator epoch {marker.coordinator_epoch} is over; the last marker of producer"
                f" {marker.producer_id} came from epoch {producer.coordinator_epoch}.",
            )
        return None

    def _unguarded(self, header: Header, guard: Guard | None) -> Refused | None:
        """Why a transactional batch may not begin to write here, if it is the first."""
        producer_id = header.producer_id
        waiting = self._guards.get(producer_id)
        if not self.in_transaction(producer_id, header.producer_epoch) and (
            guard is None or guard is not waiting
        ):
            return Refused(
                ErrorCode.invalid_txn_state,
                f"Producer {producer_id} epoch {header.producer_epoch} has no open transaction "
                "that knows of this partition.",
            )
        if (
            waiting is not None
            and waiting.producer_epoch == header.producer_epoch
            and header.base_sequence > waiting.lowest_sequence
        ):
            return Refused(
                ErrorCode.out_of_order_sequence_number,
                f"Producer {producer_id} epoch {header.producer_epoch}: sequence "
                f"{header.base_sequence} came before {waiting.lowest_sequence}, which is to be "
                "sent again.",
            )
        unknown = guard is not None and guard.new_epoch and producer_id not in self._by_id
        if unknown and header.base_sequence > 0:
            return Refused(
                ErrorCode.out_of_order_sequence_number,
                f"Producer {producer_id} epoch {header.producer_epoch}: the first sequence of a "
                f"transaction is 0, not {header.base_sequence}.",
            )
        return None

    # mutation

    def replay(
        self, header: Header, base_offset: int, timestamp: int, marker: Marker | None = None
    ) -> Ended | None:
        """A batch is in the log at `base_offset`. Whatever it says is taken: it was decided.

        `marker`: what it says if it is a control batch. Returns the transaction that it ends, if
        it ends one that has data here.
        """
        producer_id = header.producer_id
        if producer_id < 0:
            return None
        producer = self._by_id.get(producer_id)
        if producer is None:
            producer = self._by_id[producer_id] = Producer(header.producer_epoch)
        elif producer.producer_epoch != header.producer_epoch:
            producer.producer_epoch = header.producer_epoch
            producer.kept = ()
            producer.next_sequence = 0
        producer.last_offset = base_offset + header.last_offset_delta
        producer.last_timestamp = timestamp
        if header.control:
            if marker is None:
                return None
            producer.coordinator_epoch = marker.coordinator_epoch
            self._guards.pop(producer_id, None)
            return self.open.end(producer_id, base_offset, committed=marker.committed)
        if header.transactional:
            if producer_id not in self.open:
                self.open.begin(producer_id, base_offset)
                producer.opened_ms = 0
            if self._guards:
                self._guards.pop(producer_id, None)
        if header.base_sequence == NO_SEQUENCE:
            return None  # written by a coordinator: it moves the epoch and takes no sequence
        last_sequence = (header.base_sequence + header.last_offset_delta) % SEQUENCES
        kept = Kept(
            header.base_sequence, last_sequence, base_offset, producer.last_offset, timestamp
        )
        producer.kept = (*producer.kept[1 - LIMITS.producer_batches_kept :], kept)
        producer.next_sequence = _after(last_sequence)
        return None

    def expire(self, at_ms: int, idle_ms: int = LIMITS.producer_id_expiry_ms) -> int:
        """Forget producers of which nothing was written for `idle_ms`; how many.

        By a clock that never jumps, not by the batches' timestamps: a replayed history would be
        forgotten while its producer still retries. A producer counts as busy when it is first
        looked at, and is kept while a transaction of it is open.
        """
        gone = []
        for producer_id, producer in self._by_id.items():
            if producer.seen_offset != producer.last_offset:
                producer.seen_offset = producer.last_offset
                producer.idle_since_ms = at_ms
            elif at_ms - producer.idle_since_ms >= idle_ms and producer_id not in self.open:
                gone.append(producer_id)
        for producer_id in gone:
            del self._by_id[producer_id]
        for producer_id, guard in list(self._guards.items()):
            if guard.seen:  # since the last look: nobody came back to write
                del self._guards[producer_id]
            guard.seen = True
        return len(gone)

    # questions

    def late(self, now_ms: int, after_ms: int) -> Iterator[tuple[int, int]]:
        """(producer id, first offset) of transactions open longer than `after_ms`, as seen here."""
        for producer_id, first_offset in self.open:
            producer = self._by_id[producer_id]
            producer.opened_ms = producer.opened_ms or now_ms
            if now_ms - producer.opened_ms > after_ms:
                yield producer_id, first_offset

    def describe(self) -> Iterator[Described]:
        for producer_id, p in self._by_id.items():
            last = p.kept[-1].last_sequence if p.kept else NO_SEQUENCE
            yield Described(
                producer_id,
                p.producer_epoch,
                last,
                p.last_timestamp,
                p.coordinator_epoch,
                self.open.first_of(producer_id),
            )

    def last_offsets(self) -> frozenset[int]:
        """Of the batches and markers by which the producers are known: compaction keeps them."""
        found = {p.last_offset for p in self._by_id.values()}
        return frozenset(found.union(k.last_offset for p in self._by_id.values() for k in p.kept))

    def records(self) -> list[ProducerRecord]:
        """Everything that `check` decides by, but for guards."""
        return [
            ProducerRecord(
                i,
                p.producer_epoch,
                p.kept,
                p.coordinator_epoch,
                p.last_timestamp,
                self.open.first_of(i),
            )
            for i, p in self._by_id.items()
        ]


def _after(sequence: int) -> int:
    return (sequence + 1) % SEQUENCES


def _repeat_of(producer: Producer, header: Header) -> Repeat | None:
    if header.base_sequence == producer.next_sequence:
        return None  # the usual case
    last_sequence = (header.base_sequence + header.last_offset_delta) % SEQUENCES
    for kept in producer.kept:
        if (kept.first_sequence, kept.last_sequence) == (header.base_sequence, last_sequence):
            return Repeat(kept.base_offset, kept.last_offset, kept.timestamp)
    return None


def _fenced(producer: Producer, header: Header) -> Refused:
    return Refused(
        ErrorCode.invalid_producer_epoch,
        f"Producer {header.producer_id} is at epoch {producer.producer_epoch}; "
        f"epoch {header.producer_epoch} is over.",
    )


def _out_of_order(producer: Producer, header: Header) -> Refused:
    expected = producer.next_sequence if header.producer_epoch == producer.producer_epoch else 0
    return Refused(
        ErrorCode.out_of_order_sequence_number,
        f"Producer {header.producer_id} epoch {header.producer_epoch}: sequence "
        f"{header.base_sequence} came where {expected} was expected.",
    )
