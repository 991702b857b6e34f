from __future__ import annotations

import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ledgerstream.errors import CorruptError
from ledgerstream.limits import KIB
from ledgerstream.log.disk import Disk
from ledgerstream.log.journal import (
    FRAME_HEAD_BYTES,
    OWED_NAME,
    PAGE_BYTES,
    ROW_BYTES,
    Journal,
    JournalContents,
    JournalRow,
    add_row,
    frame_bytes,
)
from ledgerstream.log.segment import Segment
from ledgerstream.log.tail import Batch
from ledgerstream.wire.batches import parse_header, placed_prefix
from tests.log.harness import batch_of, key_of

IDENTITY = key_of().identity


def placed_batch(base_offset: int, size: int = 50, identity: bytes = IDENTITY) -> Batch:
    raw = batch_of(3, value=bytes(size))
    header = parse_header(raw)
    partition: Any = SimpleNamespace(identity=identity)
    segment: Any = object()
    data = placed_prefix(base_offset, header.length, 0) + raw[16:]
    return Batch(partition, segment, 0, base_offset, base_offset + 3, header.size, data)


def frame_of(*batches: Batch) -> int:
    return frame_bytes(len(batches), sum(batch.size for batch in batches))


def journal_in(directory: Path, generation: int = 0) -> Journal:
    journal = Journal(Disk(), directory, 64 * KIB, generation)
    assert journal.turn() is None
    return journal


def offsets_in(directory: Path, identity: bytes = IDENTITY) -> list[int]:
    contents = JournalContents(Disk(), directory)
    rows = contents.rows().get(identity, [])
    return [row.base_offset for row in rows if contents.batch(row) is not None]


def test_what_was_written_is_found_by_partition(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    other = uuid.UUID(int=9).bytes + bytes(4)
    journal.write([placed_batch(0), placed_batch(0, identity=other), placed_batch(3, 20_000)])
    journal.write([placed_batch(6)])
    assert offsets_in(tmp_path) == [0, 3, 6]
    assert offsets_in(tmp_path, other) == [0]


def test_frames_begin_on_pages_of_their_own(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    assert journal.current is not None
    for size in (0, 100, 5_000):
        batch = placed_batch(0, size)
        before = journal.current.position
        journal.write([batch])
        assert journal.current.position - before == frame_of(batch)
        assert journal.current.position % PAGE_BYTES == 0


def test_what_an_older_generation_left_is_not_read(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    for offset in range(0, 18, 3):
        journal.write([placed_batch(offset)])
    journal.turn()
    journal.write([placed_batch(18)])
    journal.turn()
    journal.write([placed_batch(21)])
    assert offsets_in(tmp_path) == [18, 21]


def test_files_are_read_in_the_order_of_their_generations(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.write([placed_batch(0)])
    journal.turn()
    journal.write([placed_batch(3)])
    journal.turn()
    journal.write([placed_batch(6)])
    assert offsets_in(tmp_path) == [3, 6]
    assert JournalContents(Disk(), tmp_path).generation == 3


def test_a_stale_batch_under_a_new_table_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    """A torn write: the frame's table is there, its batch still that of another partition."""
    journal = journal_in(tmp_path)
    journal.write([placed_batch(0, 3_500, identity=bytes(20))])
    first = (tmp_path / "a.journal").read_bytes()
    journal.turn()
    journal.turn()
    raw = batch_of(3, time=2_000, value=bytes(3_500))
    batch = placed_batch(0, 3_500)
    batch.data = placed_prefix(0, parse_header(raw).length, 0) + raw[16:]
    journal.write([batch])
    assert offsets_in(tmp_path) == [0]
    path = tmp_path / "a.journal"
    second = path.read_bytes()
    table = FRAME_HEAD_BYTES + ROW_BYTES
    path.write_bytes(second[:table] + first[table:])
    assert offsets_in(tmp_path) == []


def test_a_recycled_journal_holds_nothing_and_keeps_its_generation(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.write([placed_batch(0)])
    journal.write([placed_batch(3)])
    contents = JournalContents(Disk(), tmp_path)
    contents.recycle()
    assert offsets_in(tmp_path) == []
    assert JournalContents(Disk(), tmp_path).generation == contents.generation == 2
    again = journal_in(tmp_path, contents.generation)
    again.write([placed_batch(9)])
    assert offsets_in(tmp_path) == [9]


def test_a_journal_set_aside_is_read_too(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.write([placed_batch(0)])
    JournalContents(Disk(), tmp_path).set_aside()
    again = journal_in(tmp_path, 1)
    again.write([placed_batch(3)])
    assert sorted(path.name for path in tmp_path.glob("*.journal")) == ["a.1.journal", "a.journal"]
    assert offsets_in(tmp_path) == [0, 3]
    JournalContents(Disk(), tmp_path).recycle()
    assert [path.name for path in tmp_path.glob("*.journal")] == ["a.journal"]


def test_a_later_batch_takes_the_place_of_one_that_was_never_answered() -> None:
    """A partition that stopped between a frame and its answer goes on at the same offset."""
    rows: list[JournalRow] = []
    for position, base_offset in enumerate((0, 5, 9, 5, 7)):
        add_row(rows, JournalRow("journal", position, base_offset, 100, position, True))
    assert [(row.base_offset, row.position) for row in rows] == [(0, 0), (5, 3), (7, 4)]


def test_a_discarded_segment_is_never_written_behind_our_back(tmp_path: Path) -> None:
    disk = Disk()
    segment = Segment(str(tmp_path), 0, 0)
    batch = placed_batch(0)
    segment.pending.append(batch)
    segment.discard(disk)
    segment.flush(disk)
    assert list(tmp_path.iterdir()) == []


def three_frames(tmp_path: Path) -> Path:
    journal = journal_in(tmp_path)
    for offset in (0, 3, 6):
        journal.write([placed_batch(offset)])
    return tmp_path / "a.journal"


@pytest.mark.parametrize("page", [0, 1])
def test_a_frame_damaged_before_the_last_is_no_torn_end(tmp_path: Path, page: int) -> None:
    """Each frame is synced before the next is written, so the disk has lost what it had."""
    path = three_frames(tmp_path)
    whole = path.read_bytes()
    for at in (page * PAGE_BYTES + 9, page * PAGE_BYTES + FRAME_HEAD_BYTES + ROW_BYTES + 70):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(CorruptError, match=r"damaged|gone") as error:
            offsets_in(tmp_path)
        assert OWED_NAME in error.value.remedy
    path.write_bytes(whole)
    assert offsets_in(tmp_path) == [0, 3, 6]


def test_the_last_frame_may_be_torn(tmp_path: Path) -> None:
    path = three_frames(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: 2 * PAGE_BYTES] + bytes(len(whole) - 2 * PAGE_BYTES))
    assert offsets_in(tmp_path) == [0, 3]


@pytest.mark.parametrize("how", ["gone", "empty", "zeros"])
def test_a_journal_that_is_gone_is_missed(tmp_path: Path, how: str) -> None:
    path = three_frames(tmp_path)
    size = path.stat().st_size
    path.unlink()
    if how != "gone":
        path.write_bytes(bytes(size if how == "zeros" else 0))
    with pytest.raises(CorruptError, match="generation 1 is gone"):
        offsets_in(tmp_path)
    (tmp_path / OWED_NAME).unlink()  # as the remedy has it
    assert offsets_in(tmp_path) == []


def test_a_file_that_is_used_again_is_not_missed_if_its_first_frame_is_torn(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    for offset in (0, 3, 6):  # a, b, then a again
        journal.write([placed_batch(offset)])
        journal.turn()
    journal.turn()
    path = tmp_path / "a.journal"
    path.write_bytes(bytes(path.stat().st_size))
    assert offsets_in(tmp_path) == [3]
