"""One partition: where the next batch goes, and what may be read.

`append` is one synchronous act on the loop: repeat or not, offset, segment and position are decided
and the batch is queued; the disk thread does as it is told, and `advance` moves the high watermark
when that is durable. If a write fails, all that was decided past the high watermark is thrown away.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from operator import attrgetter, itemgetter
from typing import NamedTuple, Protocol

from kio.schema.errors import ErrorCode

from ledgerstream.errors import CorruptError, DecodeError
from ledgerstream.limits import Limits
from ledgerstream.log.config import LogConfig, PartitionKey
from ledgerstream.log.disk import Disk, NotCached
from ledgerstream.log.epochs import Epochs
from ledgerstream.log.producers import Producers
from ledgerstream.log.retention import below
from ledgerstream.log.segment import Segment, Source
from ledgerstream.log.swap import Cleaned
from ledgerstream.log.tail import Batch, Tail, TailCache
from ledgerstream.log.verdicts import Appended, Guard, New, Refused, Repeat
from ledgerstream.wire.batches import (
    Buffer,
    Header,
    parse_header,
    placed_prefix,
    records,
    with_append_time,
)
from ledgerstream.wire.markers import Marker, encode_marker

_base_offset = attrgetter("base_offset")


class Read(NamedTuple):
    """Whole batches, as one or more buffers that never change."""

    data: list[Buffer]
    bound: int  # no batch reaches this offset

    @property
    def size(self) -> int:
        return sum(map(len, self.data))


class State(NamedTuple):
    """What is known of a partition's files: from recovery, a clean stop, or nothing yet."""

    segments: list[Segment]  # at least one, the last is written to
    log_start_offset: int
    next_offset: int
    epochs: Epochs
    producers: Producers
    snapshot_offsets: tuple[int, ...]  # of producer snapshots that exist, oldest first
    cleaned: Cleaned = Cleaned()


class Durable(NamedTuple):
    """The durable end; one object, so that reading threads see it whole."""

    offset: int
    segment: Segment
    position: int


class Host(Protocol):
    """What a partition asks of its store; all of it only queues."""

    limits: Limits
    disk: Disk
    tails: TailCache
    checkpoint_due: bool

    def write(self, batch: Batch) -> None: ...
    def roll(self, partition: Partition, full: Segment) -> None: ...
    def checkpoint(self, partition: Partition) -> None: ...
    def write_epochs(self, partition: Partition) -> None: ...


class Partition:
    """See the module. Offsets are half-open ends: `next_offset` is the first that is free."""

    __slots__ = (
        "broken",
        "cleaned",
        "config",
        "deleted",
        "directory",
        "durable",
        "epochs",
        "exchanging",
        "failure",
        "fresh",
        "high_watermark",
        "host",
        "identity",
        "key",
        "leader_epoch",
        "log_start_offset",
        "next_offset",
        "producers",
        "recovery_point",
        "retriable",
        "retry_at_ms",
        "segments",
        "snapshot_offsets",
        "tail",
        "unchecked_bytes",
    )

    def __init__(
        self, host: Host, key: PartitionKey, config: LogConfig, directory: str, state: State
    ) -> None:
        self.host = host
        self.key = key
        self.identity = key.identity
        self.config = config
        self.directory = directory
        self.failure: str | None = None  # why it stopped; every append is refused with it
        self.retriable = False  # it may be tried again
        self.retry_at_ms: int | None = None
        self.deleted = False
        self.exchanging = False  # compacted segments are taking the place of others
        self.tail = Tail()
        self.recovery_point = state.next_offset  # up to here a crash need not look
        self._adopt(state)
        self.leader_epoch = max(self.epochs.latest, 0)
        # The disk thread's own: set when a write failed, until the partition is repaired.
        self.broken = False
        self.fresh = False  # its directory has not been synced yet

    def _adopt(self, state: State) -> None:
        """Take what the files say; all of it is durable."""
        self.segments = state.segments
        self.log_start_offset = state.log_start_offset
        self.next_offset = state.next_offset
        self.high_watermark = state.next_offset
        self.epochs = state.epochs
        self.producers = state.producers
        self.producers.open.settle(state.next_offset)
        self.snapshot_offsets = state.snapshot_offsets
        self.cleaned = state.cleaned
        last = state.segments[-1]
        self.durable = Durable(state.next_offset, last, last.size)
        self.unchecked_bytes = 0

    @property
    def last_stable_offset(self) -> int:
        """All below it is decided: committed, aborted, or of no transaction."""
        first = self.producers.open.first_undecided
        end = self.high_watermark
        if first is None or first >= end:
            return end
        return max(first, self.log_start_offset)

    @property
    def size_bytes(self) -> int:
        return sum(segment.size for segment in self.segments)

    # writing

    def append(
        self, batch: Buffer, header: Header, now_ms: int, guard: Guard | None = None
    ) -> Appended | Repeat | Refused:
        """Place a batch that `check_client_batch` let through; it is queued, not yet durable.

        `guard`: from `begin_verification`, of a transactional batch whose coordinator knows of this
        partition. The log keeps a copy of `batch`, so it may be a view of a frame.
        """
        if self.failure is not None:
            return Refused(ErrorCode.kafka_storage_error, self.failure)
        verdict = self.producers.check(header, guard)
        if not isinstance(verdict, New):
            return verdict
        return self._append(batch, header, now_ms)

    def append_own(
        self, batch: Buffer, header: Header, now_ms: int, guard: Guard | None = None
    ) -> Appended | Refused:
        """Place a batch that a coordinator of this broker wrote: it has no sequence to check."""
        if self.failure is not None:
            return Refused(ErrorCode.kafka_storage_error, self.failure)
        if refused := self.producers.check_own(header, guard):
            return refused
        return self._append(batch, header, now_ms)

    def append_marker(
        self, marker: Marker, now_ms: int, *, strict: bool = False
    ) -> Appended | Refused:
        """Place the marker that ends a producer's transaction; see `Producers.check_marker`."""
        if self.failure is not None:
            return Refused(ErrorCode.kafka_storage_error, self.failure)
        if refused := self.producers.check_marker(marker, strict=strict):
            return refused
        batch = encode_marker(marker, now_ms)
        return self._append(batch, parse_header(batch), now_ms, marker)

    def begin_verification(self, header: Header) -> Guard | None:
        """What `append` wants to be given once the coordinator has been asked; None if it need
        not be: the transaction has data here, or the batch is refused or a repeat anyhow."""
        producers = self.producers
        if producers.in_transaction(header.producer_id, header.producer_epoch):
            return None
        if isinstance(producers.check(header), Repeat):
            return None
        return producers.begin(header.producer_id, header.producer_epoch, header.base_sequence)

    def _append(
        self, batch: Buffer, header: Header, now_ms: int, marker: Marker | None = None
    ) -> Appended | Refused:
        config, size = self.config, header.size
        if size > config.segment_bytes:
            return Refused(
                ErrorCode.record_list_too_large,
                f"The batch has {size:,} bytes; segment.bytes is {config.segment_bytes:,}.",
            )
        timestamp, append_time = header.max_timestamp, -1
        if config.log_append_time:
            batch, timestamp, append_time = with_append_time(batch, now_ms), now_ms, now_ms
        base_offset = self.next_offset
        last_offset = base_offset + header.last_offset_delta
        if self.leader_epoch > self.epochs.latest:
            self.begin_epoch(self.leader_epoch)
        segment = self.segments[-1]
        if segment.is_full(size, last_offset, timestamp, now_ms, config):
            segment = self._roll(now_ms)
        position = segment.place(last_offset, size, timestamp, config.index_interval_bytes)
        prefix = placed_prefix(base_offset, header.length, self.leader_epoch)
        data = prefix + batch[len(prefix) :]
        self.next_offset = last_offset + 1
        if header.producer_id >= 0:
            ended = self.producers.replay(header, base_offset, timestamp, marker)
            if ended is not None and not ended.committed:
                segment.aborted.add(ended)
        written = Batch(self, segment, position, base_offset, self.next_offset, size, data)
        host = self.host
        host.tails.append(written)
        host.write(written)
        self.unchecked_bytes += size
        if self.unchecked_bytes >= host.limits.checkpoint_bytes:
            host.checkpoint(self)
        return Appended(base_offset, last_offset, append_time)

    def _roll(self, now_ms: int) -> Segment:
        full = self.segments[-1]
        segment = Segment(self.directory, self.next_offset, now_ms)
        self.segments.append(segment)
        self.host.roll(self, full)
        return segment

    def begin_epoch(self, epoch: int) -> None:
        """This node leads from here on at `epoch`."""
        self.leader_epoch = epoch
        if self.epochs.begin(epoch, self.next_offset):
            self.host.write_epochs(self)

    def advance(self, batch: Batch) -> None:
        """Everything up to and with `batch` is durable."""
        self.high_watermark = batch.next_offset
        self.durable = Durable(batch.next_offset, batch.segment, batch.position + batch.size)
        self.producers.open.settle(batch.next_offset)

    def stop(self, failure: str, *, retriable: bool) -> None:
        """Refuse everything from now on; what was not durable has never been."""
        self.failure = failure
        self.retriable = retriable
        self.retry_at_ms = None
        self.next_offset = self.high_watermark
        self.tail.truncate(self.high_watermark)

    def resume(self, state: State) -> None:
        """A stopped partition's files have been put right."""
        self._adopt(state)
        self.failure = None

    def begin_segment(self, now_ms: int) -> None:
        """Go on in a new segment, so that what there is may go."""
        if self.segments[-1].size:
            self._roll(now_ms)

    def raise_log_start(self, offset: int, settled: int) -> list[Segment]:
        """What lies below `offset` is gone, and that is durable: see `trims`. The segments that
        nobody needs any more, of those below `settled`, up to which a recovery believes files."""
        assert offset <= self.high_watermark
        self.log_start_offset = max(self.log_start_offset, offset)
        if self.epochs.trim(self.log_start_offset):
            self.host.write_epochs(self)
        segments = self.segments
        count = 0 if self.exchanging else below(segments, min(self.log_start_offset, settled))
        self.segments = segments[count:]  # a new list: readers go on with the one they have
        return segments[:count]

    def holds(self, some: list[Segment]) -> bool:
        """Whether these segments are still part of the log, side by side."""
        at = bisect_left(self.segments, some[0].base_offset, key=_base_offset)
        return self.segments[at : at + len(some)] == some

    def exchange(self, old: list[Segment], new: Segment) -> None:
        """Compacted, and on the disk. What memory holds of them may be aborted data of which the
        new index knows nothing any more."""
        at = self.segments.index(old[0])
        following = self.segments[at + len(old) :]
        self.segments = [*self.segments[:at], new, *following]
        self.tail.drop_below(following[0].base_offset)

    # reading

    def read(self, offset: int, bytes_max: int, end: int) -> Read | None:
        """Whole batches from the one that contains `offset`, never past `end`.

        At least one batch, even one larger than `bytes_max`; nothing if there is none before `end`.
        None: neither in memory nor in the page cache; call `read_cold` in a thread.
        """
        found = self.tail.read(offset, bytes_max, end)
        if found is not None:
            return Read._make(found)
        try:
            return self._read(self.host.disk.read_cached, offset, bytes_max, end)
        except (NotCached, CorruptError, OSError):
            return None  # a short read looks like damage: the patient one tells what it is

    def read_cold(self, offset: int, bytes_max: int, end: int) -> Read:
        """As `read`, waiting for the disk. CorruptError, OSError as the files have it."""
        self._flush()
        return self._read(self.host.disk.read, offset, bytes_max, end)

    def _read(self, source: Source, offset: int, bytes_max: int, end: int) -> Read:
        segments = self.segments
        at = max(bisect_right(segments, offset, key=_base_offset) - 1, 0)
        while at < len(segments) and segments[at].base_offset < end:
            segment = segments[at]
            end_position = self._end_position(source, segments, at, end)
            found = segment.read(source, offset, bytes_max, end_position)
            if found is not None:
                data, bound = found
                return Read([data], end if bound is None else bound)
            at += 1  # compaction may leave a segment's end empty
        return Read([], offset)

    def aborted(self, offset: int, bound: int) -> list[tuple[int, int]] | None:
        """(producer id, first offset) of aborted transactions with data in [offset, bound).

        Sorted by first offset: clients rely on it. None as for `read`.
        """
        try:
            return self._aborted(self.host.disk.read_cached, offset, bound)
        except (NotCached, CorruptError, OSError):
            return None

    def aborted_cold(self, offset: int, bound: int) -> list[tuple[int, int]]:
        """As `aborted`, waiting for the disk. CorruptError, OSError as the files have it."""
        return self._aborted(self.host.disk.read, offset, bound)

    def _aborted(self, source: Source, offset: int, bound: int) -> list[tuple[int, int]]:
        found = []
        segments = self.segments
        at = max(bisect_right(segments, offset, key=_base_offset) - 1, 0)
        for segment in segments[at:]:
            if not len(segment.aborted):
                continue
            for entry in segment.aborted_since(source, offset):
                if entry.first_offset < bound:
                    found.append((entry.first_offset, entry.producer_id))
                if entry.stable_offset >= bound:  # none that ends later began before it
                    return [(producer_id, first) for first, producer_id in sorted(found)]
        return [(producer_id, first) for first, producer_id in sorted(found)]

    def _flush(self) -> None:
        """Let the files have what only the journal and the tail have."""
        for segment in self.segments:
            if segment.pending and not self.broken:
                segment.flush(self.host.disk)

    def _end_position(self, source: Source, segments: list[Segment], at: int, end: int) -> int:
        """The byte of segment `at` where offset `end` starts."""
        segment, durable = segments[at], self.durable
        if segment is durable.segment and end == durable.offset:
            return durable.position
        if at + 1 < len(segments) and segments[at + 1].base_offset <= end:
            return segment.size
        return segment.find_end(source, end)

    # questions, for a thread

    def offset_for_time(self, timestamp_ms: int, end: int) -> tuple[int, int] | None:
        """(offset, timestamp) of the first record at or after the time, before `end`. Blocks."""
        self._flush()
        source, segments = self.host.disk.read, self.segments
        for at, segment in enumerate(segments):
            if segment.base_offset >= end:
                return None
            if segment.max_timestamp < timestamp_ms:
                continue
            start = segment.position_before(source, timestamp_ms)
            for position, header in segment.walk(
                source, start, self._end_position(source, segments, at, end)
            ):
                if header.max_timestamp < timestamp_ms or header.control:
                    continue
                batch = source(segment.log, position, header.size)
                for offset, timestamp in _times(batch, header):
                    if timestamp >= timestamp_ms and offset >= self.log_start_offset:
                        return offset, timestamp
        return None

    def latest_by_timestamp(self, end: int) -> tuple[int, int] | None:
        """(offset, timestamp) of the first record with the highest time before `end`. Blocks."""
        self._flush()
        source, segments = self.host.disk.read, self.segments
        best: tuple[int, int] | None = None
        for at, segment in enumerate(segments):
            if segment.base_offset >= end:
                break
            if best is not None and segment.max_timestamp <= best[1]:
                continue
            last = self._end_position(source, segments, at, end)
            start = segment.position_before(source, segment.max_timestamp)
            found = self._highest(source, segment, start, last)
            if found is None or found[1] < segment.max_timestamp:  # that one lies past `end`
                found = self._highest(source, segment, 0, last)
            if found is not None and (best is None or found[1] > best[1]):
                best = found
        return best

    def _highest(
        self, source: Source, segment: Segment, start: int, last: int
    ) -> tuple[int, int] | None:
        highest: tuple[int, Header] | None = None
        for position, header in segment.walk(source, start, last):
            late = highest is None or header.max_timestamp > highest[1].max_timestamp
            told = header.record_count and not header.control  # compaction leaves empty ones
            if late and told and header.next_offset > self.log_start_offset:
                highest = position, header
        if highest is None:
            return None
        position, header = highest
        batch = source(segment.log, position, header.size)
        return max(_times(batch, header), key=itemgetter(1))

    def epoch_end(self, leader_epoch: int) -> tuple[int, int]:
        """(epoch, end offset) as OffsetForLeaderEpoch answers; (-1, -1) if unknown."""
        return self.epochs.end_of(leader_epoch, self.high_watermark)


def _times(batch: Buffer, header: Header) -> Iterator[tuple[int, int]]:
    """(offset, timestamp) of each record; of the whole batch where its records do not decode."""
    try:
        for record in records(batch):
            yield record.offset, record.timestamp
    except DecodeError:
        yield header.base_offset, header.max_timestamp
