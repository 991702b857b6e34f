"""A log in memory: what a worker needs of a client, over real record batches."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping

import numpy as np

from ledgerstream.client import EARLIEST, Chunk, TopicInfo
from ledgerstream.errors import KafkaError
from ledgerstream.stream.processor import Topic
from ledgerstream.wire.batches import NewRecord, encode_batch, seal_batch
from ledgerstream.wire.columns import RowCodec

BATCH_ROWS = 100


class MemoryLog:
    """One topic. `chunk_batches`: how many batches a reader is handed at a time."""

    def __init__(self, source: Topic, topic_id: uuid.UUID, partitions: int = 1) -> None:
        self.source = source
        self.topic_id = topic_id
        self.codec = RowCodec(source.event, key=source.key, encoding=source.encoding)
        self.batches: list[list[tuple[int, bytes]]] = [[] for _ in range(partitions)]
        self.ends = [0] * partitions
        self.log_start = [0] * partitions
        self.chunk_batches = 3
        self.gate = asyncio.Event()  # readers wait for it before each chunk
        self.gate.set()
        self.reads = 0

    def write(self, rows: np.ndarray) -> None:
        """Append rows to the partitions of their keys."""
        home = self.codec.hashes(rows) % len(self.ends)
        for partition in range(len(self.ends)):
            self.write_to(partition, rows[home == partition])

    def write_to(self, partition: int, rows: np.ndarray) -> None:
        for first in range(0, len(rows), BATCH_ROWS):
            some = rows[first : first + BATCH_ROWS]
            stamps = self.codec.timestamps(some, 0)
            batch = seal_batch(
                self.codec.encode(some, 0).tobytes(),
                count=len(some),
                base_offset=self.ends[partition],
                base_timestamp=int(stamps[0]),
                max_timestamp=int(stamps.max()),
            )
            self._append(partition, batch, len(some))

    def write_bytes(self, partition: int, key: bytes | None, value: bytes | None) -> int:
        """Append a record of any content; its offset."""
        offset = self.ends[partition]
        record = NewRecord(key, value, 1_000)
        self._append(partition, encode_batch([record], base_offset=offset), 1)
        return offset

    def _append(self, partition: int, batch: bytes, count: int) -> None:
        self.batches[partition].append((self.ends[partition], batch))
        self.ends[partition] += count

    async def topic(self, name: str) -> TopicInfo:
        assert name == self.source.name
        return TopicInfo(name, self.topic_id, len(self.ends))

    async def list_offsets(self, topic: str, at: Mapping[int, int]) -> dict[int, int]:
        return {p: self.log_start[p] if t == EARLIEST else self.ends[p] for p, t in at.items()}

    def reader(
        self, topic: str, positions: Mapping[int, int], *, topic_id: uuid.UUID | None = None
    ) -> MemoryReader:
        assert topic_id in (None, self.topic_id)
        return MemoryReader(self, dict(positions))


class MemoryReader:
    def __init__(self, log: MemoryLog, positions: dict[int, int]) -> None:
        self.log = log
        self.positions = positions

    async def next(self, wait_ms: int | None = None) -> Chunk | None:
        log = self.log
        await log.gate.wait()
        for partition, position in sorted(self.positions.items(), key=lambda each: each[1]):
            if position < log.log_start[partition]:
                raise KafkaError(1, "OFFSET_OUT_OF_RANGE", "gone", retriable=False)
            batches = [
                (base, data)
                for n, (base, data) in enumerate(log.batches[partition])
                if n + 1 == len(log.batches[partition])
                or log.batches[partition][n + 1][0] > position
            ][: log.chunk_batches]
            if position >= log.ends[partition] or not batches:
                continue
            after = [base for base, _ in log.batches[partition] if base > batches[-1][0]]
            stop = after[0] if after else log.ends[partition]
            self.positions[partition] = stop
            log.reads += 1
            data = b"".join(data for _, data in batches)
            return Chunk(
                partition, position, data, stop, log.ends[partition], log.log_start[partition]
            )
        await asyncio.sleep(0.001)  # nothing there: what a long poll is
        return None

    async def close(self) -> None:
        pass
