"""What a partition remembers of its idempotent producers (KIP-98). Pure.

`check` decides, `replay` is the only mutation, live and after a restart alike. The last five
batches of each producer are kept, so that a retry of any batch in flight is recognised, before a
restart and after. Open transactions will be kept here too; until then a transactional batch is
data like any other, and a marker only moves its producer's epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kio.schema.errors import ErrorCode

from ledgerstream.limits import LIMITS
from ledgerstream.log.verdicts import NEW, New, Refused, Repeat
from ledgerstream.wire.batches import NO_SEQUENCE, Header

SEQUENCES = 2**31  # sequences run from 0 to 2^31 - 1 and start again at 0


class Kept(NamedTuple):
    """One remembered batch; sequences and offsets are inclusive."""

    first_sequence: int
    last_sequence: int
    base_offset: int
    last_offset: int
    timestamp: int  # ms: what the batch's reply carries


class ProducerRecord(NamedTuple):
    """A producer as snapshots hold it."""

    producer_id: int
    producer_epoch: int
    kept: tuple[Kept, ...]


class Producer:
    """State of one producer id in this partition."""

    __slots__ = (
        "idle_since_ms",
        "kept",
        "last_offset",
        "next_sequence",
        "producer_epoch",
        "seen_offset",
    )

    def __init__(self, producer_epoch: int, kept: tuple[Kept, ...] = ()) -> None:
        self.producer_epoch = producer_epoch
        self.kept = kept  # oldest first, all of `producer_epoch`
        self.next_sequence = _after(kept[-1].last_sequence) if kept else 0
        self.last_offset = kept[-1].last_offset if kept else -1  # markers count too
        # Soft state, `expire`'s own: where it saw the producer last, and since when.
        self.seen_offset = -2
        self.idle_since_ms = 0


class Producers:
    """All producers of one partition."""

    __slots__ = ("_by_id",)

    def __init__(self, records: Iterable[ProducerRecord] = ()) -> None:
        self._by_id = {r.producer_id: Producer(r.producer_epoch, r.kept) for r in records}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, producer_id: int) -> bool:
        return producer_id in self._by_id

    def check(self, header: Header) -> New | Repeat | Refused:
        """Whether a client's batch may be appended. Repeats are looked for before all else."""
        producer = self._by_id.get(header.producer_id)
        if producer is None:
            return NEW  # never seen, or forgotten: any sequence lets the producer go on
        if header.producer_epoch == producer.producer_epoch:
            if header.base_sequence == producer.next_sequence:
                return NEW
            return _repeat_of(producer, header) or _out_of_order(producer, header)
        if header.producer_epoch < producer.producer_epoch:
            return _fenced(producer, header)
        if header.base_sequence != 0:
            return _out_of_order(producer, header)
        return NEW

    def check_own(self, header: Header) -> Refused | None:
        """Why a batch that a coordinator writes in a producer's name may not be appended."""
        producer = self._by_id.get(header.producer_id)
        if producer is not None and header.producer_epoch < producer.producer_epoch:
            return _fenced(producer, header)
        return None

    def replay(self, header: Header, base_offset: int, timestamp: int) -> None:
        """A batch is in the log at `base_offset`. Whatever it says is taken: it was decided."""
        if header.producer_id < 0:
            return
        producer = self._by_id.get(header.producer_id)
        if producer is None:
            producer = self._by_id[header.producer_id] = Producer(header.producer_epoch)
        elif producer.producer_epoch != header.producer_epoch:
            producer.producer_epoch = header.producer_epoch
            producer.kept = ()
            producer.next_sequence = 0
        producer.last_offset = base_offset + header.last_offset_delta
        if header.control or header.base_sequence == NO_SEQUENCE:
            return  # a marker: it moves the epoch and takes no sequence
        last_sequence = (header.base_sequence + header.last_offset_delta) % SEQUENCES
        kept = Kept(
            header.base_sequence, last_sequence, base_offset, producer.last_offset, timestamp
        )
        producer.kept = (*producer.kept[1 - LIMITS.producer_batches_kept :], kept)
        producer.next_sequence = _after(last_sequence)

    def expire(self, now_ms: int, idle_ms: int = LIMITS.producer_id_expiry_ms) -> int:
        """Forget who wrote nothing for `idle_ms`; how many that were.

        Idleness is counted between calls of this method by the local clock. The batches' own
        timestamps may lie years back (a replayed history), and a producer that is forgotten while
        it retries would write twice.
        """
        gone = []
        for producer_id, producer in self._by_id.items():
            if producer.seen_offset != producer.last_offset:
                producer.seen_offset = producer.last_offset
                producer.idle_since_ms = now_ms
            elif now_ms - producer.idle_since_ms >= idle_ms:
                gone.append(producer_id)
        for producer_id in gone:
            del self._by_id[producer_id]
        return len(gone)

    def records(self) -> list[ProducerRecord]:
        """Everything that `check` decides by."""
        return [ProducerRecord(i, p.producer_epoch, p.kept) for i, p in self._by_id.items()]


def _after(sequence: int) -> int:
    return (sequence + 1) % SEQUENCES


def _repeat_of(producer: Producer, header: Header) -> Repeat | None:
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
