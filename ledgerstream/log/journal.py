"""The journal: one file that makes a round durable, however many segments are dirty.

Two files take turns; each grows to its full size once and is overwritten from then on. A round's
batches are written to the current one as a frame, past the page cache, and synced once; their
segments are written and synced behind the round's back. When a file is full the other one takes
over, once every segment that it covers has been synced. A file is recycled, never emptied: frames
carry its generation, so what an older one left is told apart.

Until then it is the only copy of what was acknowledged. So a small file beside it names the
generations that a recovery must find, and a frame that is damaged where another follows is no torn
end: each is synced before the next is written.

A frame, padded to whole pages so that no synced page is ever written again:

    tag 8s · crc u32 (of the rest of the head and the rows) · generation u64 · rows u32 · bytes u64
    rows: topic id 16s · partition i32 · base_offset i64 · size i32 · the batch's own crc u32
    the batches, in the order of the rows
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from crc32c import crc32c

from ledgerstream.errors import CorruptError
from ledgerstream.log.disk import PAGE_BYTES, Disk, File
from ledgerstream.log.sealed import seal, unseal
from ledgerstream.log.segment import Segment
from ledgerstream.log.tail import Batch
from ledgerstream.wire.batches import HEADER_BYTES, Buffer, crc_matches, parse_header

if TYPE_CHECKING:
    from ledgerstream.log.partition import Partition

SUFFIX = ".journal"
NAMES = ("a" + SUFFIX, "b" + SUFFIX)
OWED_NAME = "journal.owed"
_OWED_TAG = b"lsowed\x00\x01"
_SCAN_BYTES = 4 * 1024 * 1024
REMEDY = (
    "Restore the data directory from a copy. To go on without what is lost, remove its *.journal "
    f"files and {OWED_NAME}."
)
TAG = b"lsround\x01"
IDENTITY_BYTES = 20
_HEAD = struct.Struct(">8sI")
_HEAD_REST = struct.Struct(">QIQ")
_PLACE = struct.Struct(">qi")
ROW_BYTES = IDENTITY_BYTES + _PLACE.size + 4
FRAME_HEAD_BYTES = _HEAD.size + _HEAD_REST.size
_PADDING = bytes(PAGE_BYTES)
_ZEROS = bytes(1024 * 1024)  # a file grows by so many


def frame_bytes(batches: int, size: int) -> int:
    """What a frame of so many batches and bytes takes in the file."""
    return _pages(FRAME_HEAD_BYTES + batches * ROW_BYTES + size)


def _pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


@dataclass(slots=True, eq=False)
class JournalFile:
    """One of the two, or one that was set aside; `covers` are segments that nobody synced yet."""

    path: str
    generation: int
    file: File
    position: int = 0
    size: int = 0
    covers: dict[Segment, Partition] = field(default_factory=dict)


class Journal:
    """Written by the disk thread alone."""

    def __init__(self, disk: Disk, directory: Path, bytes_max: int, generation: int) -> None:
        self._disk = disk
        self._directory = directory
        self._bytes_max = bytes_max
        self._generation = generation  # the highest that any file has had
        self._turns = 0
        self._owed: dict[str, int] = {}  # by path: generations whose segments may not be synced yet
        self.current: JournalFile | None = None

    def fits(self, size: int) -> bool:
        """Whether the current file has room for a frame of this size."""
        return self.current is not None and self.current.position + size <= self._bytes_max

    def turn(self) -> JournalFile | None:
        """Go on with the other file, which must be free; the one that was current until now.

        OSError if it cannot be made, and nothing has changed.
        """
        full = self.current
        path = str(self._directory / NAMES[self._turns % len(NAMES)])
        if path in self._owed:
            self._write_owed({each: g for each, g in self._owed.items() if each != path})
        file = self._disk.open_direct(path)
        size = self._disk.size(path) // PAGE_BYTES * PAGE_BYTES
        if not size:
            self._disk.sync_directory(str(self._directory))
        self._turns += 1
        self._generation += 1
        self.current = JournalFile(path, self._generation, file, size=size)
        return full

    def grow(self, size: int) -> None:
        """The current file has blocks for a frame of this size, each of them written before.

        A frame then overwrites, which its sync takes for half of what a longer file costs (or one
        whose blocks were allocated and never written). OSError if there is no room.
        """
        current = self.current
        assert current is not None
        while current.size < current.position + size:
            self._disk.write(current.file, [_ZEROS], current.size)
            current.size += len(_ZEROS)

    @property
    def direct(self) -> bool:
        """Whether a frame is cheaper than a sync of the one segment that it is for."""
        return self.current is None or self.current.file.direct

    def write(self, batches: Sequence[Batch]) -> None:
        """The round, durable. Any OSError is the end of the store."""
        current = self.current
        assert current is not None
        rows: list[Buffer] = []
        buffers: list[Buffer] = []
        for batch in batches:
            data = batch.data
            rows += (
                batch.partition.identity,
                _PLACE.pack(batch.base_offset, batch.size),
                data[17:21],
            )
            buffers.append(data)
            current.covers[batch.segment] = batch.partition
        table = b"".join(rows)
        size = sum([batch.size for batch in batches])
        rest = _HEAD_REST.pack(current.generation, len(batches), size)
        head = _HEAD.pack(TAG, crc32c(table, crc32c(rest)))
        used = FRAME_HEAD_BYTES + len(table) + size
        padding = _PADDING[: _pages(used) - used]
        self._disk.write(current.file, [head, rest, table, *buffers, padding], current.position)
        self._disk.sync(current.file)
        if current.path not in self._owed:
            with suppress(OSError):  # a full disk: the frame is there, the next one tries again
                self._write_owed({**self._owed, current.path: current.generation})
        current.position += used + len(padding)

    def _write_owed(self, owed: dict[str, int]) -> None:
        path = str(self._directory / OWED_NAME)
        self._disk.write_file(path, seal(_OWED_TAG, sorted(owed.values())), sync=True)
        self._owed = owed


class JournalRow(NamedTuple):
    """A batch that a journal holds."""

    path: str
    position: int
    base_offset: int
    size: int
    crc: int
    synced: bool  # another frame follows: this one was whole


def add_row(rows: list[JournalRow], row: JournalRow) -> None:
    """Behind what was journaled before. A later row takes the place of those at and above its own
    offset: theirs were never answered, the partition stopped and went on from there."""
    while rows and rows[-1].base_offset >= row.base_offset:
        rows.pop()
    rows.append(row)


class JournalContents:
    """What the journals of a stopped store hold, by partition, oldest first."""

    def __init__(self, disk: Disk, directory: Path) -> None:
        self._disk = disk
        self._directory = directory
        self._paths = [
            str(directory / name) for name in disk.names(str(directory)) if name.endswith(SUFFIX)
        ]
        self._heads = {path: self._head(path, 0) for path in self._paths}
        self.generation = max((head.generation for head in self._heads.values() if head), default=0)

    def rows(self) -> dict[bytes, list[JournalRow]]:
        """By identity. Raises CorruptError where something is missing that had been synced."""
        found = {head.generation for head in self._heads.values() if head}
        if missing := sorted(set(self._owed()) - found):
            raise CorruptError(
                f"The journal of generation {missing[0]} is gone from {self._directory}, or its "
                "beginning is damaged, though it held acknowledged records.",
                REMEDY,
            )
        out: dict[bytes, list[JournalRow]] = {}
        heads = [(head.generation, path) for path, head in self._heads.items() if head]
        for _, path in sorted(heads):
            for identity, row in self._rows(path):
                add_row(out.setdefault(identity, []), row)
        return out

    def batch(self, row: JournalRow) -> bytes | None:
        """The batch, or None if it is not whole (its round was never answered). Raises CorruptError
        for one that was."""
        data = self._batch(row)
        if data is None and row.synced:
            raise CorruptError(
                f"{row.path} is damaged at byte {row.position:,}, which had been synced.", REMEDY
            )
        return data

    def _batch(self, row: JournalRow) -> bytes | None:
        data = self._disk.read_once(row.path, row.position, row.size)
        if len(data) < max(row.size, HEADER_BYTES):
            return None
        header = parse_header(data)
        whole = (
            header.size == row.size
            and header.base_offset == row.base_offset
            and header.crc == row.crc
            and crc_matches(data, 0, header)
        )
        return data if whole else None

    def recycle(self) -> None:
        """All of it is in the segments: let no later recovery find it again."""
        self._disk.remove(str(self._directory / OWED_NAME))
        for path in self._paths:
            if not path.endswith(NAMES):
                self._disk.remove(path)
                continue
            self.generation += 1
            rest = _HEAD_REST.pack(self.generation, 0, 0)
            file = File(self._disk.open_fd(path, os.O_RDWR))
            self._disk.write(file, [_HEAD.pack(TAG, crc32c(rest)), rest], 0)
            self._disk.sync(file)

    def set_aside(self) -> None:
        """A partition could not be recovered: keep these for when it can."""
        for path, head in self._heads.items():
            if head and path.endswith(NAMES):
                set_aside(self._disk, path, head.generation)

    def _head(self, path: str, position: int) -> _FrameHead | None:
        head = self._disk.read_once(path, position, FRAME_HEAD_BYTES)
        if len(head) < FRAME_HEAD_BYTES:
            return None
        tag, crc = _HEAD.unpack_from(head)
        generation, count, size = _HEAD_REST.unpack_from(head, _HEAD.size)
        at = position + FRAME_HEAD_BYTES
        room = max(self._disk.size(path) - at, 0)
        table = self._disk.read_once(path, at, min(count * ROW_BYTES, room)) if tag == TAG else b""
        if tag != TAG or crc32c(table, crc32c(head[_HEAD.size :])) != crc:
            return None
        return _FrameHead(generation, table, at + len(table), _pages(at + len(table) + size))

    def _rows(self, path: str) -> Iterator[tuple[bytes, JournalRow]]:
        head = self._head(path, 0)
        while head is not None:
            following = self._head(path, head.next_at)
            if following is not None and following.generation != head.generation:
                following = None
            if following is None:
                self._check_end(path, head)
            yield from _rows(path, head.table, head.batches_at, synced=following is not None)
            head = following

    def _check_end(self, path: str, last: _FrameHead) -> None:
        """No frame of this generation stands behind what seems to be the last."""
        for at in range(last.next_at, self._disk.size(path), _SCAN_BYTES):
            data = self._disk.read_once(path, at, _SCAN_BYTES)
            for page in range(0, len(data), PAGE_BYTES):
                if data[page : page + len(TAG)] != TAG:
                    continue
                head = self._head(path, at + page)
                if head is not None and head.generation == last.generation:
                    raise CorruptError(
                        f"{path} is damaged at byte {last.next_at:,}: what stands at byte "
                        f"{at + page:,} was written after that had been synced.",
                        REMEDY,
                    )

    def _owed(self) -> list[int]:
        data = self._disk.read_file(str(self._directory / OWED_NAME))
        return [] if data is None else unseal(_OWED_TAG, data, list[int])


class _FrameHead(NamedTuple):
    generation: int
    table: bytes
    batches_at: int
    next_at: int


def set_aside(disk: Disk, path: str, generation: int) -> None:
    """Keep a journal file whose segments could not be synced; the next start fills from it."""
    disk.rename(path, path.removesuffix(SUFFIX) + f".{generation}{SUFFIX}")


def _rows(
    path: str, table: Buffer, start: int, *, synced: bool
) -> Iterator[tuple[bytes, JournalRow]]:
    for at in range(0, len(table), ROW_BYTES):
        identity = bytes(table[at : at + IDENTITY_BYTES])
        base_offset, size = _PLACE.unpack_from(table, at + IDENTITY_BYTES)
        (crc,) = struct.unpack_from(">I", table, at + ROW_BYTES - 4)
        yield identity, JournalRow(path, start, base_offset, size, crc, synced)
        start += size
