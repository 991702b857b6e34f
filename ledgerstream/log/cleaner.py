"""The third thread: compacts one partition at a time, at a bounded pace, beside everything else.

It reads segments that no longer change and prepares what takes their place, synced, under names
that nothing else looks at (`swap`). The disk thread makes the exchange, in its turn between rounds;
the loop then reads from the new segments, and who was reading an old one reads on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

import structlog

from ledgerstream.errors import CorruptError, DecodeError
from ledgerstream.limits import Limits
from ledgerstream.log.aborted import Aborted
from ledgerstream.log.cleanable import groups
from ledgerstream.log.compaction import Compaction, Newest, Rules, Transactions, learn
from ledgerstream.log.config import LogConfig
from ledgerstream.log.disk import Disk, File
from ledgerstream.log.opentxns import Ended
from ledgerstream.log.partition import Partition
from ledgerstream.log.segment import ABORTED, INDEX, LOG, TIME_INDEX, Segment
from ledgerstream.log.swap import CLEANED_SUFFIX, Cleaned, Swap, discard, write_cleaned
from ledgerstream.wire.batches import HEADER_BYTES, Buffer, Header, crc_matches, parse_header

log = structlog.get_logger("log")
_READ_BYTES = 128 * 1024  # between two looks at the pace: other threads wait for the interpreter
_WRITE_BYTES = 1024 * 1024


class Job(NamedTuple):
    """A partition as the loop saw it when it decided to have it compacted."""

    partition: Partition
    whole: list[Segment]  # of the log: what is below `end` may have been aborted beyond it
    segments: list[Segment]  # sealed, synced and decided, from the first of the log on
    start: int  # dirty from here
    end: int  # of the last segment
    config: LogConfig
    rules: Rules
    cleaned: Cleaned


class Exchange(NamedTuple):
    """A prepared segment and those whose place it is to take."""

    job: Job
    old: list[Segment]
    new: Segment
    swap: Swap


@dataclass(slots=True)
class CleanerStats:
    """Sums since the start, for metrics."""

    runs: int = 0
    failures: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0


class Damaged(NamedTuple):
    """Why a partition cannot be compacted: a segment of it does not hold what was written."""

    why: str
    segment: int  # its base offset
    end: int  # what lies below has to go before it can be compacted again


class Stopped(Exception):
    """The store closes, or the partition is no longer what the job says."""


class Cleaner:
    """`queue` is for the loop; `answers` for whoever made, or did not make, an exchange."""

    def __init__(
        self,
        disk: Disk,
        limits: Limits,
        exchange: Callable[[Exchange], None],
        done: Callable[[Job, Cleaned | None, Damaged | None], None],
    ) -> None:
        """`done`: how far it is compacted now, and why it cannot be if it cannot."""
        self.queue: SimpleQueue[Job | None] = SimpleQueue()
        self.answers: SimpleQueue[bool] = SimpleQueue()
        self.stats = CleanerStats()
        self._disk = disk
        self._limits = limits
        self._exchange = exchange
        self._done = done
        self._stopping = threading.Event()
        self._began = self._paced = 0.0
        self._reading = 0  # base offset of the segment

    def run(self) -> None:
        while (job := self.queue.get()) is not None:
            began = time.monotonic()
            cleaned, damaged = None, None
            try:
                cleaned = self._clean(job)
            except Stopped:
                pass
            except OSError as error:  # as on a full disk: it is tried again
                if not self._gone(job.partition):
                    self.stats.failures += 1
                    log.warning("not compacted", partition=str(job.partition.key), why=str(error))
            except (CorruptError, DecodeError) as error:
                self.stats.failures += 1
                damaged = self._damaged(job, error)
            self.stats.seconds += time.monotonic() - began
            self.stats.runs += 1
            self._done(job, cleaned, damaged)

    def stop(self) -> None:
        """What was prepared is thrown away; an exchange that had begun is finished."""
        self._stopping.set()
        self.answers.put(False)
        self.queue.put(None)

    # one partition

    def _clean(self, job: Job) -> Cleaned:
        self._began, self._paced = time.monotonic(), 0.0
        aborted = self._aborted(job.whole)
        newest = self._learn(job, aborted)
        end, directory = newest.end, job.partition.directory
        gaps_below = max(job.cleaned.gaps_below, end)
        write_cleaned(self._disk, directory, Cleaned(gaps_below, job.cleaned.clean_below))
        compaction = Compaction(newest, Transactions(aborted), job.rules)
        reached = [segment for segment in job.segments if segment.base_offset < end]
        following = [*(segment.base_offset for segment in job.segments[1:]), job.end]
        for group in groups(reached, following[len(reached) - 1], job.config):
            prepared = self._prepare(job, group, compaction)
            if prepared is not None:
                self._exchange(prepared)  # from here on the files are the disk thread's
                if not self.answers.get():
                    raise Stopped
        cleaned = Cleaned(gaps_below, end)
        write_cleaned(self._disk, directory, cleaned)
        return cleaned

    def _damaged(self, job: Job, error: CorruptError | DecodeError) -> Damaged:
        at = self._reading
        later = (each.base_offset for each in job.whole if each.base_offset > at)
        return Damaged(str(error), at, next(later, job.end))

    def _aborted(self, segments: Sequence[Segment]) -> list[Aborted]:
        found: list[Aborted] = []
        for segment in segments:
            self._reading = segment.base_offset
            if len(segment.aborted):
                found += segment.aborted_since(self._disk.read, segment.base_offset)
        return found

    def _learn(self, job: Job, aborted: Sequence[Aborted]) -> Newest:
        newest = Newest(self._limits.cleaner_keys_max, job.start)
        dirty = [entry for entry in aborted if entry.last_offset >= job.start]
        transactions = Transactions(dirty)
        for at, segment in enumerate(job.segments):
            last = at + 1 == len(job.segments)
            following = job.end if last else job.segments[at + 1].base_offset
            if following <= job.start:
                continue
            for header, batch in self._batches(job, segment):
                if header.next_offset <= job.start:
                    continue
                if not learn(newest, transactions, header, batch):
                    return newest  # the rest is for the next time
            newest.end = following
        return newest

    def _prepare(self, job: Job, group: list[Segment], compaction: Compaction) -> Exchange | None:
        """One segment in the place of the group, or nothing if it would be the same."""
        try:
            prepared = self._rewrite(job, group, compaction)
        except BaseException:
            discard(self._disk, job.partition.directory, group[0].base_offset)
            raise
        if prepared is None:
            discard(self._disk, job.partition.directory, group[0].base_offset)
        return prepared

    def _rewrite(self, job: Job, group: list[Segment], compaction: Compaction) -> Exchange | None:
        new = Segment(job.partition.directory, group[0].base_offset, group[-1].created_ms)
        out = _Output(self._disk, new)
        changed = len(group) > 1
        for segment in group:
            for header, batch in self._batches(job, segment):
                left = compaction.keep(header, batch)
                changed |= left is not batch
                if left is not None:
                    out.add(left, job.config.index_interval_bytes)
                if compaction.aborted:
                    out.take(compaction.aborted)
        if not changed:
            return None
        suffixes = out.finish()
        self.stats.bytes_written += new.size
        swap = Swap([segment.base_offset for segment in group], suffixes)
        return Exchange(job, group, new, swap)

    def _batches(self, job: Job, segment: Segment) -> Iterator[tuple[Header, Buffer]]:
        """Each batch of a segment, as it was written: damage must not get a new checksum."""
        position, offset = 0, segment.base_offset
        self._reading = segment.base_offset
        while position < segment.size:
            size = min(_READ_BYTES, segment.size - position)
            chunk = self._disk.read(segment.log, position, size)
            at = 0
            while at + HEADER_BYTES <= len(chunk):
                header = parse_header(chunk, at)
                where = f"{segment.log.path} at byte {position + at:,} (offset {offset:,} or later)"
                if header.size < HEADER_BYTES or position + at + header.size > segment.size:
                    raise CorruptError(f"{where} holds no batch.")
                if at + header.size > len(chunk):
                    if at:
                        break
                    chunk = self._disk.read(segment.log, position, header.size)
                if header.base_offset < offset or not crc_matches(chunk, at, header):
                    raise CorruptError(f"{where} holds a batch that is damaged.")
                yield header, memoryview(chunk)[at : at + header.size]
                at += header.size
                offset = header.next_offset
            if not at:
                raise CorruptError(f"{segment.log.path} ends inside a batch at {position:,}.")
            position += at
            self._pace(job.partition, at)

    def _pace(self, partition: Partition, size: int) -> None:
        """Not faster than `cleaner_bytes_s`; Stopped where there is nothing left to do."""
        self.stats.bytes_read += size
        self._paced += size / self._limits.cleaner_bytes_s
        ahead = self._began + self._paced - time.monotonic()
        if (ahead > 0 and self._stopping.wait(ahead)) or self._gone(partition):
            raise Stopped

    def _gone(self, partition: Partition) -> bool:
        return self._stopping.is_set() or partition.deleted or partition.failure is not None


class _Output:
    """The files of a segment that is not there yet."""

    def __init__(self, disk: Disk, segment: Segment) -> None:
        self._disk = disk
        self._segment = segment
        self._stem = segment.log.path.removesuffix(LOG)
        self._file = self._create(LOG)
        self._waiting: list[Buffer] = []
        self._waiting_bytes = 0

    def add(self, batch: Buffer, interval_bytes: int) -> None:
        header = parse_header(batch)
        self._segment.place(
            header.next_offset - 1, header.size, header.max_timestamp, interval_bytes
        )
        self._waiting.append(batch)
        self._waiting_bytes += header.size
        if self._waiting_bytes >= _WRITE_BYTES:
            self._flush()

    def take(self, aborted: list[Aborted]) -> None:
        for entry in aborted:
            self._segment.aborted.add(Ended(*entry, committed=False))
        aborted.clear()

    def finish(self) -> list[str]:
        """All of it is on the disk; which files there are."""
        self._flush()
        self._disk.sync(self._file)
        segment = self._segment
        segment.index_time()
        suffixes = [LOG]
        for suffix, index in (
            (INDEX, segment.offsets),
            (TIME_INDEX, segment.times),
            (ABORTED, segment.aborted),
        ):
            _, entries = index.waiting()
            if suffix == ABORTED and not entries:
                continue
            file = self._create(suffix)
            self._disk.write(file, [entries], 0)
            self._disk.sync(file)
            index.written(len(entries))
            suffixes.append(suffix)
        segment.written = segment.size
        segment.named = True
        return suffixes

    def _create(self, suffix: str) -> File:
        return self._disk.create_anew(self._stem + suffix + CLEANED_SUFFIX)

    def _flush(self) -> None:
        position = self._segment.size - self._waiting_bytes
        self._disk.write(self._file, self._waiting, position)
        self._waiting, self._waiting_bytes = [], 0
