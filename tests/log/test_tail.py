from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ledgerstream.log.tail import OVERHEAD_BYTES, Batch, Tail, TailCache


def batch(base_offset: int, count: int, size: int = 10, partition: Any = None) -> Batch:
    segment: Any = SimpleNamespace(written=1 << 40)
    content = (b"%09d" % base_offset + b"." * size)[:size]
    return Batch(partition, segment, 0, base_offset, base_offset + count, size, content)


@given(
    counts=st.lists(st.integers(1, 5), max_size=40),
    dropped=st.integers(0, 40),
    offset=st.integers(0, 120),
    bytes_max=st.integers(0, 200),
    upto=st.integers(0, 40),
)
def test_reads_are_those_of_a_plain_list(
    counts: list[int], dropped: int, offset: int, bytes_max: int, upto: int
) -> None:
    tail, plain, base = Tail(), [], 0
    for count in counts:
        plain.append(batch(base, count))
        tail.append(plain[-1])
        base += count
    end = plain[min(upto, len(plain)) - 1].next_offset if plain and upto else 0
    for old in plain[:dropped]:
        tail.drop_first(old)
    plain = plain[dropped:]
    read = tail.read(offset, bytes_max, end)
    if not plain or offset < plain[0].base_offset:
        assert read is None
        return
    wanted: list[Batch] = []
    for one in plain:
        if one.next_offset > offset and one.next_offset <= end:
            if wanted and 10 * (len(wanted) + 1) > bytes_max:
                break
            wanted.append(one)
    assert read is not None
    assert b"".join(read[0]) == b"".join(one.data for one in wanted)
    assert read[1] == (wanted[-1].next_offset if wanted else offset)


def test_a_truncated_tail_forgets_the_end_only() -> None:
    tail = Tail()
    for base in (0, 3, 6):
        tail.append(batch(base, 3))
    tail.truncate(3)
    assert tail.read(0, 100, 9) == ([batch(0, 3).data], 3)
    tail.append(batch(3, 2))
    assert tail.read(3, 100, 9) == ([batch(3, 2).data], 5)


def partition_of(high_watermark: int) -> Any:
    return SimpleNamespace(tail=Tail(), high_watermark=high_watermark, failure=None)


def test_the_oldest_batch_of_any_partition_goes_first() -> None:
    cache = TailCache(3 * (10 + OVERHEAD_BYTES), lambda: None)
    first, second = partition_of(100), partition_of(100)
    for base in (0, 1):
        cache.append(batch(base, 1, partition=first))
        cache.append(batch(base, 1, partition=second))
    assert first.tail.read(0, 10, 100) is None
    assert first.tail.read(1, 10, 100) is not None
    assert second.tail.read(0, 10, 100) is not None


def test_what_no_file_has_is_kept_and_asked_to_be_written() -> None:
    asked: list[None] = []
    cache = TailCache(0, lambda: asked.append(None))
    partition = partition_of(high_watermark=0)
    unwritten = batch(0, 1, partition=partition)
    unwritten.segment.written = 0
    cache.append(unwritten)
    assert not asked  # its round is not done yet
    partition.high_watermark = 1
    cache.append(batch(1, 1, partition=partition))
    assert asked
    assert partition.tail.read(0, 10, 2)
    unwritten.segment.written = 10
    cache.append(batch(2, 1, partition=partition))
    assert partition.tail.read(0, 10, 3) is None
