"""The sparse indexes: what is written, what waits, and the floor of anything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ledgerstream.log.index import OffsetIndex, TimeIndex


class Filed:
    """An index and its file, with some of its entries written at some moments."""

    def __init__(self, index: OffsetIndex | TimeIndex) -> None:
        self.index = index
        self.file = bytearray()

    def write(self) -> None:
        position, entries = self.index.waiting()
        self.file[position:] = entries
        self.index.written(position + len(entries))

    def read(self, position: int, size: int) -> bytes:
        return bytes(self.file[position : position + size])


STEPS = st.lists(st.tuples(st.integers(1, 1_000), st.integers(61, 5_000), st.booleans()))


@given(STEPS, st.integers(0, 50_000))
def test_the_floor_is_the_same_wherever_the_entries_are(
    steps: list[tuple[int, int, bool]], asked: int
) -> None:
    filed = Filed(index := OffsetIndex())
    entries: list[tuple[int, int]] = []
    offset = position = 0
    for more_offset, more_position, write in steps:
        offset += more_offset
        position += more_position
        index.add(offset, position)
        entries.append((offset, position))
        if write:
            filed.write()
    assert len(index) == len(entries)
    by_offset = max((p for o, p in entries if o <= asked), default=0)
    assert index.floor(asked, filed.read) == by_offset
    by_position = max((p for _, p in entries if p <= asked), default=0)
    assert index.floor_position(asked, filed.read) == by_position
    filed.write()
    assert index.floor(asked, filed.read) == by_offset
    assert index.count_below(asked, filed.read) == sum(p < asked for _, p in entries)


@given(STEPS, st.integers(-5, 60_000))
def test_everything_up_to_the_answer_is_earlier_than_the_time(
    steps: list[tuple[int, int, bool]], asked: int
) -> None:
    filed = Filed(index := TimeIndex())
    entries: list[tuple[int, int]] = []
    offset = 0
    for more_offset, time, write in steps:
        offset += more_offset
        index.add(time, offset)
        if not entries or time > entries[-1][0]:
            entries.append((time, offset))
        if write:
            filed.write()
    assert len(index) == len(entries)
    assert index.before(asked, filed.read) == max((o for t, o in entries if t < asked), default=0)


def test_entries_are_kafkas_bytes() -> None:
    offsets, times = OffsetIndex(), TimeIndex()
    offsets.add(5, 4_200)
    times.add(1_700_000_000_000, 5)
    assert offsets.waiting() == (0, bytes.fromhex("0000000500001068"))
    assert times.waiting() == (0, bytes.fromhex("0000018bcfe5680000000005"))


def test_what_was_added_while_the_file_was_written_still_waits() -> None:
    index = OffsetIndex()
    index.add(1, 100)
    position, entries = index.waiting()
    index.add(2, 200)
    index.written(position + len(entries))
    index.written(position + len(entries))  # an order that overtook the news of the last
    assert index.waiting() == (8, bytes.fromhex("00000002000000c8"))
    assert len(index) == 2
