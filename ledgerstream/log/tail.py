"""The newest batches of every partition in memory, for the readers that keep up.

One budget for all partitions: the oldest batch anywhere goes first, once its file has it. A batch's
bytes never change after it is placed, so readers are handed the very buffers that were written.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

from ledgerstream.wire.batches import Buffer

if TYPE_CHECKING:
    from ledgerstream.log.partition import Partition
    from ledgerstream.log.segment import Segment

OVERHEAD_BYTES = 256  # of the objects that hold a batch in memory
_PIECES_MAX = 64  # a read of more pieces than this is joined: sockets like few buffers better


class Batch:
    """A batch in its place: what the disk thread writes and what the tail keeps."""

    __slots__ = (
        "base_offset",
        "data",
        "next_offset",
        "partition",
        "position",
        "segment",
        "size",
    )

    def __init__(
        self,
        partition: Partition,
        segment: Segment,
        position: int,
        base_offset: int,
        next_offset: int,
        size: int,
        data: bytes,
    ) -> None:
        self.partition = partition
        self.segment = segment
        self.position = position
        self.base_offset = base_offset
        self.next_offset = next_offset
        self.size = size
        self.data = data


class Tail:
    """One partition's newest batches, without a gap, up to its next offset."""

    __slots__ = ("_bases", "_batches", "_gone")

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._batches: list[Batch] = []
        self._gone = 0  # of the lists' front

    def append(self, batch: Batch) -> None:
        self._bases.append(batch.base_offset)
        self._batches.append(batch)

    def drop_first(self, batch: Batch) -> None:
        """Forget the oldest batch, if it is still this one."""
        gone = self._gone
        if gone == len(self._batches) or self._batches[gone] is not batch:
            return
        self._batches[gone] = _NOTHING
        self._gone = gone + 1
        if self._gone * 2 > len(self._batches):
            del self._bases[: self._gone], self._batches[: self._gone]
            self._gone = 0

    def drop_below(self, offset: int) -> None:
        """Forget the batches that end at or before `offset`."""
        while self._gone < len(self._batches) and self._batches[self._gone].next_offset <= offset:
            self.drop_first(self._batches[self._gone])

    def truncate(self, offset: int) -> None:
        """Forget the batches at `offset` and after."""
        at = bisect_left(self._bases, offset, lo=self._gone)
        del self._bases[at:], self._batches[at:]

    def read(self, offset: int, bytes_max: int, end: int) -> tuple[list[Buffer], int] | None:
        """Batches from the one that contains `offset`, and the offset behind the last of them;
        None if the tail begins after it."""
        bases, batches = self._bases, self._batches
        at = bisect_right(bases, offset, lo=self._gone) - 1
        if at < self._gone:
            return None
        if batches[at].next_offset <= offset:
            at += 1  # at the end, or where compaction left a gap
        out: list[Buffer] = []
        size, next_offset = 0, offset
        for batch in islice(batches, at, None):
            size += batch.size
            if batch.next_offset > end or (out and size > bytes_max):
                break
            out.append(batch.data)
            next_offset = batch.next_offset
        return ([b"".join(out)] if len(out) > _PIECES_MAX else out), next_offset


class TailCache:
    """The budget over all tails."""

    __slots__ = ("_batches", "_bytes_max", "_flush_soon", "size")

    def __init__(self, bytes_max: int, flush_soon: Callable[[], None]) -> None:
        self._bytes_max = bytes_max
        self._flush_soon = flush_soon
        self._batches: deque[Batch] = deque()
        self.size = 0

    def append(self, batch: Batch) -> None:
        batch.partition.tail.append(batch)
        self._batches.append(batch)
        self.size += batch.size + OVERHEAD_BYTES
        if self.size > self._bytes_max:
            self._evict()

    def _evict(self) -> None:
        batches = self._batches
        while self.size > self._bytes_max:
            oldest = batches[0]
            partition = oldest.partition
            unwritten = oldest.position + oldest.size > oldest.segment.written
            if unwritten and partition.failure is None:  # readers could not find it on the disk
                if oldest.next_offset <= partition.high_watermark:
                    self._flush_soon()
                return
            batches.popleft()
            self.size -= oldest.size + OVERHEAD_BYTES
            partition.tail.drop_first(oldest)


_NOTHING = Batch.__new__(Batch)
