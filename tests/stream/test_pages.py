"""Pages cut by content, their ids, and their rows for COPY."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledgerstream.limits import LIMITS
from ledgerstream.stream.pages import cut, ids_of, match


def words(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**62), 2**62, count)


@given(
    st.lists(st.integers(0, 9_000), max_size=4),
    st.integers(0, 3),
    st.sampled_from([np.uint8, np.int32, np.int64]),
)
def test_pages_joined_are_the_arrays_and_none_is_too_large(
    counts: list[int], seed: int, dtype: type
) -> None:
    rng = np.random.default_rng(seed)
    # Few different values, so that an array is anything from constant to random.
    arrays = [rng.integers(0, 3**seed, count).astype(dtype) for count in counts]
    pages = cut(arrays)
    each = list(pages)
    assert b"".join(each) == b"".join(array.tobytes() for array in arrays)
    assert [len(page) for page in each] == pages.sizes.tolist()
    assert len(each) == len(pages)
    assert max(map(len, each), default=0) <= LIMITS.snapshot_page_bytes_max
    assert min(map(len, each), default=1) > 0
    assert np.array_equal(ids_of(each), pages.ids)


def test_ids_are_equal_where_the_bytes_are() -> None:
    base = words(50_000)
    pages = cut([base])
    contents = list(pages)
    for at in (0, 7, len(contents) // 2):
        for bit in (0, 63):
            changed = bytearray(contents[at])
            changed[bit // 8] ^= 1 << bit % 8
            assert not (ids_of([bytes(changed)]) == pages.ids).all(axis=1).any()
    # A page that is another's beginning, or that with zeros behind it, is another one.
    ids = ids_of([b"", b"\0", b"\0" * 8, b"\0" * 9, b"\1", b"\1\0"])
    assert len(np.unique(ids, axis=0)) == 6


@pytest.mark.parametrize("at", [0, 1, 31_337, 49_999])
def test_what_is_inserted_changes_the_pages_around_it_only(at: int) -> None:
    base = words(50_000)
    before = cut([base])
    for after in (
        np.insert(base, at, [5, 6]),
        np.delete(base, at),
        np.concatenate([base[:at], base[at:] + (np.arange(50_000 - at) == 0)]),
    ):
        pages = cut([after])
        place = match(before.ids, pages.ids)
        new = int((place >= len(before)).sum())
        assert 1 <= new <= 4
        assert len(pages) > 200


def test_match_finds_the_first_place_of_each() -> None:
    known = np.array([[1, 2], [1, 3], [1, 2]], np.uint64)
    wanted = np.array([[1, 3], [4, 4], [1, 2], [4, 4], [2, 1]], np.uint64)
    assert match(known, wanted).tolist() == [1, 4, 0, 4, 7]
    assert match(known[:0], wanted[:0]).tolist() == []


@pytest.mark.parametrize("limit", [1, 5_000, 10**9])
def test_rows_for_copy(limit: int) -> None:
    pages = cut([words(3_000), words(0), np.arange(5, dtype=np.uint8), words(2_000, 2)])
    which = np.flatnonzero(np.arange(len(pages)) % 3 != 1)
    owner = bytes(range(16))
    parts = list(pages.rows(which, owner, limit))
    assert all(len(part) <= limit or limit == 1 for part in parts)
    assert (len(parts) == len(which)) == (limit == 1)
    each = list(pages)
    wanted = b"".join(
        struct.pack(">hi16siiI", 3, 16, owner, 4, number, len(each[at])) + each[at]
        for number, at in enumerate(which)
    )
    assert b"".join(parts) == wanted
