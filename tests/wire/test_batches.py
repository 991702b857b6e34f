"""Record batches: every codec both ways, and what is malformed is refused, not believed."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledgerstream.errors import DecodeError
from ledgerstream.wire import batches
from ledgerstream.wire.batches import (
    GZIP,
    LZ4,
    SNAPPY,
    ZSTD,
    NewRecord,
    compress,
    decompress,
)

binary = st.none() | st.binary(max_size=200)
new_records = st.lists(
    st.builds(
        NewRecord,
        binary,
        binary,
        st.integers(0, 2**42),
        st.lists(st.tuples(st.text(max_size=5), binary), max_size=3),
    ),
    min_size=1,
    max_size=20,
)


@given(new_records, st.integers(0, 4), st.integers(0, 2**62))
def test_what_is_written_is_read(items: list[NewRecord], codec: int, base: int) -> None:
    data = batches.encode_batch(items, codec=codec, base_offset=base)
    header = batches.parse_header(data)
    assert header.size == len(data)
    assert batches.crc_matches(data, 0, header)
    found = list(batches.records(data))
    assert [(r.key, r.value, r.timestamp, list(r.headers)) for r in found] == [
        (i.key, i.value, i.timestamp, list(i.headers)) for i in items
    ]
    assert [r.offset for r in found] == list(range(base, base + len(items)))


@settings(max_examples=300)
@given(new_records, st.data())
def test_damaged_records_are_an_error_of_ours(items: list[NewRecord], data: st.DataObject) -> None:
    """Any byte may change: the answer is records or DecodeError, nothing else."""
    batch = bytearray(batches.encode_batch(items, codec=data.draw(st.integers(0, 4))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(batches.HEADER_BYTES, len(batch) - 1))
        batch[place] = data.draw(st.integers(0, 255))
    try:
        list(batches.records(batch))
    except DecodeError:
        pass


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
def test_a_bomb_is_not_inflated(codec: int) -> None:
    small = batches.compress(codec, bytes(5_000_000))
    with pytest.raises(DecodeError, match="inflates to more"):
        batches.decompress(codec, small, bytes_max=1_000_000)
    assert batches.decompress(codec, small) == bytes(5_000_000)


def test_append_time_restamps_the_header_and_its_crc() -> None:
    data = batches.encode_batch([NewRecord(None, b"x", 5), NewRecord(None, b"y", 9)])
    stamped = batches.with_append_time(data, 77)
    header = batches.parse_header(stamped)
    assert batches.crc_matches(stamped, 0, header)
    assert header.max_timestamp == 77
    assert [record.timestamp for record in batches.records(stamped)] == [77, 77]


def test_a_torn_batch_at_the_end_is_left_out() -> None:
    one = batches.encode_batch([NewRecord(None, b"x", 5)])
    for cut in range(len(one)):
        assert [at for at, _ in batches.headers(one + one[:cut])] == [0]


@given(st.integers(-(2**63), 2**63 - 1))
def test_varints_are_inverse(value: int) -> None:
    out = bytearray()
    batches.write_varint(out, value)
    assert batches.read_varint(out, 0) == (value, len(out))


def test_a_number_without_end_is_refused() -> None:
    with pytest.raises(DecodeError):
        batches.read_unsigned_varint(b"\xff" * 20, 0)
    with pytest.raises(DecodeError):
        batches.read_unsigned_varint(struct.pack("B", 0x80), 0)


@pytest.mark.parametrize("codec", [GZIP, SNAPPY, LZ4, ZSTD])
@pytest.mark.parametrize("size", [0, 1, 60_000, 70_000, 900_000, 5_000_000])
def test_a_body_of_any_size_comes_back_from_each_codec(codec: int, size: int) -> None:
    """Compressible or not, and however many pieces a decompressor would like."""
    rng = random.Random(size)
    for body in (bytes(size), rng.randbytes(size), rng.randbytes(size // 4) * 4):
        assert decompress(codec, compress(codec, body)) == body


@pytest.mark.parametrize("codec", [GZIP, SNAPPY, LZ4, ZSTD])
def test_a_body_may_grow_to_its_limit_and_no_further(codec: int) -> None:
    data = compress(codec, bytes(1_000_000))
    assert len(decompress(codec, data, 1_000_000)) == 1_000_000
    with pytest.raises(DecodeError, match="inflates to more than"):
        decompress(codec, data, 999_999)
