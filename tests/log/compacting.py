"""A compacted partition driven by hand, and what readers of it see."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ledgerstream.log import Appended, LogConfig, Partition
from ledgerstream.wire.batches import TRANSACTIONAL, NewRecord, encode_batch, headers, parse_header
from ledgerstream.wire.batches import records as records_of
from ledgerstream.wire.markers import Marker, read_marker
from tests.log.harness import Running

COMPACT = LogConfig(
    segment_bytes=1_500, index_interval_bytes=200, cleanup_policy="compact",
    min_cleanable_dirty_ratio=0.0, delete_retention_ms=1_000,
)  # fmt: skip


class Seen(NamedTuple):
    """A record as a reader has it."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


def put(
    partition: Partition, *pairs: tuple[str | None, str | None], pid: int = -1, epoch: int = 0,
    sequence: int = -1, transactional: bool = False, time: int = 1_000, codec: int = 0,
) -> int:  # fmt: skip
    """The offset of a batch of keys and values."""
    items = [
        NewRecord(
            None if key is None else key.encode(), None if value is None else value.encode(), time
        )
        for key, value in pairs
    ]
    batch = encode_batch(
        items, producer_id=pid, producer_epoch=epoch if pid >= 0 else -1, base_sequence=sequence,
        codec=codec, attributes=TRANSACTIONAL if transactional else 0,
    )  # fmt: skip
    header = parse_header(batch)
    guard = partition.begin_verification(header) if transactional else None
    placed = partition.append(batch, header, time, guard)
    assert isinstance(placed, Appended), placed
    return placed.base_offset


def end(partition: Partition, pid: int, *, committed: bool, epoch: int = 0) -> int:
    placed = partition.append_marker(Marker(pid, epoch, 0, committed), 1_000)
    assert isinstance(placed, Appended), placed
    return placed.base_offset


def roll(running: Running, partition: Partition) -> None:
    running.settle()
    partition.begin_segment(1_000)
    running.drain()


def clean(running: Running, now_ms: int) -> None:
    """One compaction of what may be compacted at `now_ms`."""
    store = running.store
    running.drain()
    done: list[bool] = []
    store.write_checkpoint(done.append)
    running.until(lambda: done)
    store.cleanings._check_at_ms = 0
    store.cleanings.tick(store.partitions(), now_ms, now_ms)
    running.until(lambda: store.cleanings._busy is None)


def committed(partition: Partition, offset: int, bytes_max: int = 1_000) -> list[Seen]:
    """What a read_committed consumer that starts at `offset` delivers."""
    out: list[Seen] = []
    stable = partition.last_stable_offset
    while offset < stable:
        read = partition.read_cold(offset, bytes_max, stable)
        waiting = sorted(partition.aborted_cold(offset, read.bound), key=lambda each: each[1])
        joined = b"".join(read.data)
        assert joined, f"nobody gets past offset {offset} of {stable}"
        gone: set[int] = set()
        for at, header in headers(joined):
            while waiting and waiting[0][1] < header.next_offset:
                gone.add(waiting.pop(0)[0])
            if header.control:
                marker = read_marker(joined, at)
                if marker is not None and not marker.committed:
                    gone.discard(header.producer_id)
            elif not (header.transactional and header.producer_id in gone):
                out += [Seen(*r[:4]) for r in records_of(joined, at) if r.offset >= offset]
            following = header.next_offset
        assert following > offset
        offset = following
    return out


def batches_of(partition: Partition) -> list[tuple[int, int, bool, int]]:
    """(base offset, records, control, producer) of each batch in the files."""
    data = b""
    for segment in partition.segments:
        segment.flush(partition.host.disk)
        data += partition.host.disk.read(segment.log, 0, segment.size)
    return [(h.base_offset, h.record_count, h.control, h.producer_id) for _, h in headers(data)]


def table(seen: list[Seen]) -> dict[bytes, bytes]:
    """The newest value of each key."""
    found = {each.key: each.value for each in seen if each.key is not None}
    return {key: value for key, value in found.items() if value is not None}


def newest_of(seen: list[Seen], below: int) -> list[Seen]:
    """What compaction leaves of records below an offset, tombstones aside."""
    last = {each.key: each.offset for each in seen if each.offset < below}
    return [
        each for each in seen
        if each.offset >= below
        or (each.key is not None and last[each.key] == each.offset and each.value is not None)
    ]  # fmt: skip


Open = Callable[..., Running]
