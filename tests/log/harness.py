"""A store driven by hand: its calls to the loop wait in a queue until a test takes them."""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ledgerstream.limits import KIB, LIMITS, MIB, Limits
from ledgerstream.log import Appended, LogConfig, Partition, PartitionKey, Refused, Repeat, Store
from ledgerstream.log.disk import Disk, File
from ledgerstream.wire.batches import NewRecord, encode_batch, headers, parse_header, records

TOPIC_ID = uuid.UUID(int=7)
WAIT_SECONDS = 20
# Small, so that the tests pass every threshold: many rolls, checkpoints and journal turns.
SMALL = replace(
    LIMITS,
    segment_bytes=64 * KIB,
    index_interval_bytes=1 * KIB,
    journal_bytes=1 * MIB,
    round_bytes_max=256 * KIB,
    checkpoint_bytes=20 * KIB,
    tail_cache_bytes=64 * KIB,
    round_journal_bytes=8 * KIB,
)
DIRECT = replace(SMALL, round_journal_bytes=0, round_direct_files_max=10_000)
JOURNAL = replace(SMALL, round_direct_files_max=0)
MODES = {"direct": DIRECT, "journal": JOURNAL, "mixed": SMALL}

CONFIG = LogConfig(segment_bytes=SMALL.segment_bytes, index_interval_bytes=1 * KIB)


def key_of(index: int = 0, topic: str = "payments", topic_id: uuid.UUID = TOPIC_ID) -> PartitionKey:
    return PartitionKey(topic, topic_id, index)


def batch_of(
    count: int = 3,
    *,
    time: int = 1_000,
    value: bytes = b"v" * 50,
    pid: int = -1,
    epoch: int = -1,
    sequence: int = -1,
    codec: int = 0,
    attributes: int = 0,
) -> bytes:
    """`count` records, a millisecond apart."""
    return encode_batch(
        [NewRecord(b"key", value, time + i) for i in range(count)],
        producer_id=pid,
        producer_epoch=epoch if pid < 0 or epoch >= 0 else 0,
        base_sequence=sequence,
        codec=codec,
        attributes=attributes,
    )


class Running:
    """A started store and the loop that the test is."""

    def __init__(
        self,
        directory: Path,
        limits: Limits = SMALL,
        *,
        sync: bool = True,
        disk: Disk | None = None,
    ) -> None:
        self.directory = directory
        self.store = Store.open(directory, limits, sync=sync, disk=disk)
        self.calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.rounds: list[list[Partition]] = []
        self.fatal: list[str] = []
        self.store.start(self.calls.put, self.rounds.append, self.fatal.append)

    def create(self, index: int = 0, config: LogConfig | None = None) -> Partition:
        return self.store.create(key_of(index), config or CONFIG, 1_000)

    def partition(self, index: int = 0) -> Partition:
        found = self.store.get(key_of(index))
        assert found is not None
        return found

    def append(
        self, partition: Partition, batch: bytes | None = None, now_ms: int = 1_000, **fields: Any
    ) -> Appended | Repeat | Refused:
        batch = batch or batch_of(**fields)
        return partition.append(batch, parse_header(batch), now_ms)

    def write(self, partition: Partition, times: int, **fields: Any) -> None:
        """`times` batches, all durable."""
        for _ in range(times):
            assert isinstance(self.append(partition, **fields), Appended)
        self.settle()

    def settle(self) -> None:
        """Until everything that was appended is durable, or its partition has stopped."""
        self.until(
            lambda: (
                all(p.high_watermark == p.next_offset for p in self.store.partitions())
                or bool(self.fatal)
            )
        )

    def trim(self, partition: Partition, offset: int) -> bool:
        """Let the log begin at `offset`; whether that is durable."""
        told: list[bool] = []
        self.store.trims.raise_to(partition, offset, told.append)
        self.until(lambda: told)
        return told[0]

    def until(self, holds: Callable[[], object]) -> None:
        while not holds():
            try:
                self.calls.get(timeout=WAIT_SECONDS)()
            except Empty:
                raise AssertionError("the store did not do what the test waits for") from None

    def drain(self) -> None:
        """Let both threads finish what they have, checkpoints included, and hear of it."""
        done: list[None] = []
        store = self.store
        background = store._background.queue
        store.write(lambda: background.put(lambda: self.calls.put(lambda: done.append(None))))
        self.until(lambda: done)

    def close(self) -> None:
        self.store.close()

    def abandon(self) -> None:
        """End without a clean stop, as a crash would, but with both threads finished."""
        store = self.store
        store.cleanings.cleaner.stop()
        store._threads[2].join()
        for thread, queue in zip(
            store._threads, (store._writer.queue, store._background.queue), strict=False
        ):
            queue.put([None] if queue is store._writer.queue else None)
            thread.join()
        store._lock = None


def offsets_of(data: Iterable[Any]) -> list[int]:
    """The offset of every record in what was read."""
    joined = b"".join(data)
    return [r.offset for at, _ in headers(joined) for r in records(joined, at)]


def read_all(partition: Partition, start: int | None = None) -> list[int]:
    """Every offset from the start of the log, read patiently."""
    offset = partition.log_start_offset if start is None else start
    out: list[int] = []
    while offset < partition.high_watermark:
        data = partition.read_cold(offset, 10_000, partition.high_watermark).data
        assert data, offset
        out += [o for o in offsets_of(data) if o >= offset]
        offset = out[-1] + 1
    return out


def log_files(directory: Path, suffix: str = ".log") -> list[Path]:
    return sorted(directory.rglob(f"*{suffix}"))


class FailingDisk(Disk):
    """Raises what a test has planted: `plant("write", OSError(…), "payments-0")`."""

    def __init__(self) -> None:
        super().__init__()
        self.planted: list[tuple[str, OSError, str]] = []
        self.syncs: list[str] = []
        self.writes: list[tuple[str, int, int]] = []

    def plant(self, act: str, error: OSError, path: str) -> None:
        self.planted.append((act, error, path))

    def heal(self) -> None:
        self.planted.clear()

    def write(self, file: File, buffers: Any, position: int) -> None:
        self._fail("write", file)
        self.writes.append((self._path(file), position, sum(map(len, buffers))))
        super().write(file, buffers, position)

    def sync(self, file: File) -> None:
        self.syncs.append(self._path(file))
        self._fail("sync", file)
        super().sync(file)

    def _fail(self, act: str, file: File) -> None:
        path = self._path(file)
        for planted, error, where in self.planted:
            if planted == act and where in path:
                raise error

    def _path(self, file: File) -> str:
        return os.readlink(f"/proc/self/fd/{file.fd}")


def last_batch_sizes(path: Path, count: int) -> list[tuple[int, int]]:
    """(position, size) of the last `count` batches of a segment."""
    data = path.read_bytes()
    return [(at, header.size) for at, header in headers(data)][-count:]


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def flip(path: Path, position: int) -> None:
    (byte,) = struct.unpack("B", path.read_bytes()[position : position + 1])
    overwrite(path, position, bytes([byte ^ 0xFF]))
