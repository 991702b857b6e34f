"""From the log to columns: chunks of one partition, decoded and checked.

The client reads; this room decodes a chunk into an `Input`, turns what is no event into dead
letters, and stops a partition whose keys were spread by another partitioner than ours.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ledgerstream.errors import DecodeError, StoppedPartition
from ledgerstream.limits import LIMITS
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.machine import DeadLetter, Input
from ledgerstream.stream.processor import Topic
from ledgerstream.wire.columns import Decoded, RowCodec


class Chunk(Protocol):
    """Whole record batches of one partition, as the client hands them out.

    `end_offset` is the last stable offset, `log_start` the first that the log still has.
    """

    @property
    def partition(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def data(self) -> bytes: ...
    @property
    def next_offset(self) -> int: ...
    @property
    def end_offset(self) -> int: ...
    @property
    def log_start(self) -> int: ...


class Reader(Protocol):
    """What the runtime needs of the log: the next chunk of any assigned partition."""

    async def next(self, wait_ms: int | None = None) -> Chunk | None: ...
    async def close(self) -> None: ...


class TopicInfo(Protocol):
    """A topic as the log knows it now."""

    @property
    def topic_id(self) -> uuid.UUID | None: ...
    @property
    def partitions(self) -> int: ...


class Log(Protocol):
    """What the runtime needs of a client."""

    async def topic(self, name: str) -> TopicInfo: ...
    async def list_offsets(self, topic: str, at: Mapping[int, int]) -> Mapping[int, int]: ...
    def reader(
        self, topic: str, positions: Mapping[int, int], *, topic_id: uuid.UUID | None = None
    ) -> Reader: ...


EARLIEST, LATEST = -2, -1  # Kafka's timestamps for ListOffsets
OFFSET_OUT_OF_RANGE = 1  # Kafka's error: the log no longer has the offset
INCONSISTENT_TOPIC_ID = 103  # Kafka's error: another topic has taken the name


def lost_by_log(
    topic: str, partition: int, position: int, start: int, end: int
) -> Exception | None:
    """Why a partition cannot go on at `position` in a log of [start, end); None if it can."""
    where = f"{topic}-{partition} stopped at offset {position:,}.\n  "
    if position < start:
        return StoppedPartition(
            f"{where}The log begins at {start:,}: retention removed {start - position:,} events "
            "before they were processed.",
            "Restore them, or give the processor another name and let it begin anew.",
        )
    if position > end:
        return StoppedPartition(
            f"{where}The log ends at {end:,}: {position - end:,} events that were counted are no "
            "longer in it, and what is written now would be taken for them.",
            "Bring back the log that held them, or give the processor another name and let it "
            "begin anew.",
        )
    return None


class Decoder:
    """Chunks of one topic to inputs of steps. Pure."""

    def __init__(self, source: Topic, partitions: int) -> None:
        self.source = source
        self.partitions = partitions
        self._codec = RowCodec(source.event, key=source.key, encoding=source.encoding)

    def decode(self, chunk: Chunk, stop: int | None = None) -> list[Input]:
        """The events of a chunk below `stop`, in steps of at most `LIMITS.step_rows_max` events.

        Raises StoppedPartition for a malformed batch, and for keys in the wrong partition.
        """
        try:
            decoded = self._codec.decode(chunk.data, chunk.start, stop)
        except DecodeError as error:
            raise StoppedPartition(
                f"{self.source.name}-{chunk.partition} stopped at offset {chunk.start:,}.\n"
                f"  {error.args[0]}",
                "The log holds bytes that are no record batch: look at the broker's disk.",
            ) from error
        self._check_partition(chunk.partition, decoded)
        next_offset = chunk.next_offset if stop is None else min(chunk.next_offset, stop)
        undecodable = [
            DeadLetter(each.offset, each.timestamp, each.key, each.value, each.reason)
            for each in decoded.bad
        ]
        batch = Batch(self.source, decoded.rows, decoded.offset, decoded.timestamp)
        whole = Input(chunk.partition, chunk.start, next_offset, batch, undecodable)
        return _bounded(whole)

    def _check_partition(self, partition: int, decoded: Decoded) -> None:
        if self.partitions == 1:
            return
        elsewhere = decoded.partition_hash % self.partitions != partition
        if not elsewhere.any():
            return
        at = int(np.argmax(elsewhere))
        key = decoded.rows[self.source.key][at]
        shown = key.decode(errors="replace") if isinstance(key, bytes) else key
        home = int(decoded.partition_hash[at]) % self.partitions
        raise StoppedPartition(
            f"{self.source.name}-{partition} stopped at offset {int(decoded.offset[at]):,}.\n"
            f'  topic "{self.source.name}" is not partitioned by murmur2, as this processor '
            f"expects: {self.source.key} {shown} is in partition {partition} and belongs in "
            f"{home}. librdkafka's default is another partitioner (CRC32).",
            "Set partitioner=murmur2_random in the producer, and key the records.",
        )


def _bounded(whole: Input) -> list[Input]:
    if len(whole.batch) <= LIMITS.step_rows_max:
        return [whole]
    first, second = whole.split()
    return [*_bounded(first), *_bounded(second)]
