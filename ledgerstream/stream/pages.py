"""A state's bytes in pages, so that a snapshot writes only what its predecessor lacks.

Where a page ends is decided by the content: after a word that, mixed with the one before it, has
enough leading zeros. So what is inserted or removed moves the pages behind it without changing
them, as it does not with pages of one size: a sliding window's events lie packed, and each new one
moves all others.

Pages are small. Of a million keys with a percent of them changed at random, 256 KiB pages are all
touched; and what is over 2 KB Postgres cuts and stores apart anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from ledgerstream.limits import LIMITS
from ledgerstream.stream.digest import mix
from ledgerstream.stream.kernels import I64, U8, U64, kernel
from ledgerstream.stream.keyed import slot_of

_A = np.uint64(0x9E3779B97F4A7C15)
_B = np.uint64(0xC2B2AE3D27D4EB4F)
_FINAL = np.uint64(0xFF51AFD7ED558CCD)
_HALF = np.uint64(32)
_TOP = np.uint64(48)  # of a boundary's mix, the 16 highest bits count
_ROW_BYTES = 34  # of a COPY row besides the page itself

# Ids are compared within one process only, and nobody outside knows where they start: pages that
# were made up to have equal ids cannot be.
_SEED = np.frombuffer(os.urandom(16), np.uint64).copy()


@dataclass(frozen=True)
class Pages:
    """Arrays cut into pages, in order.

    data:    the bytes of each array, uint8[…].
    bounds:  of each array, where its pages begin, and its end.
    ids:     uint64[pages, 2]: equal where the bytes are, and nowhere else.
    """

    data: Sequence[np.ndarray]
    bounds: Sequence[np.ndarray]
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[bytes]:
        for data, bounds in zip(self.data, self.bounds, strict=True):
            for start, stop in pairwise(bounds.tolist()):
                yield data[start:stop].tobytes()

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64[pages]: the bytes of each."""
        return np.concatenate([np.zeros(0, np.int64), *map(np.diff, self.bounds)])

    def rows(self, which: np.ndarray, owner: bytes, bytes_max: int) -> Iterator[bytes]:
        """The pages `which`, int64 ascending, as COPY rows (owner 16 bytes, number, page), numbered
        from 0; in pieces of about `bytes_max`."""
        number = first = 0
        name = np.frombuffer(owner, np.uint8)
        for data, bounds in zip(self.data, self.bounds, strict=True):
            pages = len(bounds) - 1
            here = which[np.searchsorted(which, first) : np.searchsorted(which, first + pages)]
            here = here - first
            first += pages
            ends = np.cumsum(bounds[here + 1] - bounds[here] + _ROW_BYTES)
            at = 0
            while at < len(here):
                before = int(ends[at - 1]) if at else 0
                to = max(at + 1, int(np.searchsorted(ends, before + bytes_max, "right")))
                out = np.empty(int(ends[to - 1]) - before, np.uint8)
                _copy_rows(data, bounds, here[at:to], name, number, out)
                yield out.tobytes()
                number += to - at
                at = to


def cut(arrays: Sequence[np.ndarray]) -> Pages:
    """The pages of arrays; those of one are not joined with those of the next."""
    mean = LIMITS.snapshot_page_bytes_max // 2
    every = np.uint64(2 ** (mean // 8 - 1).bit_length() - 1)
    limits = (mean // 4 // 8, LIMITS.snapshot_page_bytes_max // 8 - 1)
    data, bounds, ids = [], [], []
    for array in arrays:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        words = raw[: len(raw) // 8 * 8].view(np.int64)
        found, named = _cut(words, raw[len(words) * 8 :], every, *limits, _SEED)
        data.append(raw)
        bounds.append(found)
        ids.append(named)
    return Pages(data, bounds, np.concatenate([np.zeros((0, 2), np.uint64), *ids]))


def ids_of(pages: Sequence[bytes]) -> np.ndarray:
    """uint64[pages, 2]: the ids of pages as they are."""
    joined = np.frombuffer(b"".join(pages), np.uint8)
    sizes = np.fromiter(map(len, pages), np.int64, len(pages))
    return _ids(joined, np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]), _SEED)


def match(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64[len(wanted)]: where each id, uint64[·, 2], first stands in `known` followed by
    `wanted`."""
    return _match(np.concatenate([known, wanted]), len(known))


@kernel
def _cut(
    words: I64, tail: U8, every: np.uint64, words_min: int, words_max: int, seed: U64
) -> tuple[I64, U64]:
    """Bounds in bytes, and ids. Odd bytes at the end belong to the last page."""
    most = len(words) // words_min + 2
    bounds = np.zeros(most + 1, np.int64)
    ids = np.empty((most, 2), np.uint64)
    pages = start = 0
    a, b = seed[0], seed[1]
    before = np.uint64(0)
    for i in range(len(words)):
        word = np.uint64(words[i])
        a = mix(a, word, _A)
        b = mix(b, word, _B)
        size = i + 1 - start
        mixed = ((word ^ before * _B) * _A) >> _TOP
        before = word
        if i + 1 == len(words):
            end = len(tail) == 0
        else:
            end = size == words_max or (size >= words_min and mixed & every == 0)
        if end:
            _finish(ids, pages, a, b, size * 8)
            pages += 1
            start = i + 1
            bounds[pages] = start * 8
            a, b = seed[0], seed[1]
    if len(tail):
        word = np.uint64(0)
        for i in range(len(tail)):
            word |= np.uint64(tail[i]) << np.uint64(8 * i)
        size = (len(words) - start) * 8 + len(tail)
        _finish(ids, pages, mix(a, word, _A), mix(b, word, _B), size)
        pages += 1
        bounds[pages] = len(words) * 8 + len(tail)
    return bounds[: pages + 1].copy(), ids[:pages].copy()


@kernel
def _ids(data: U8, bounds: I64, seed: U64) -> U64:
    ids = np.empty((len(bounds) - 1, 2), np.uint64)
    for page in range(len(ids)):
        a, b = seed[0], seed[1]
        for at in range(bounds[page], bounds[page + 1], 8):
            word = np.uint64(0)
            for i in range(min(8, bounds[page + 1] - at)):
                word |= np.uint64(data[at + i]) << np.uint64(8 * i)
            a = mix(a, word, _A)
            b = mix(b, word, _B)
        _finish(ids, page, a, b, bounds[page + 1] - bounds[page])
    return ids


@kernel
def _finish(ids: U64, page: int, a: np.uint64, b: np.uint64, size: int) -> None:
    a = mix(a, np.uint64(size), _FINAL)
    b = mix(b, np.uint64(size), _FINAL)
    ids[page, 0] = mix(a, b, _A)
    ids[page, 1] = mix(b, a, _B)


@kernel
def _match(ids: U64, known: int) -> I64:
    slots = 16
    while slots < 2 * len(ids):
        slots *= 2
    index = np.zeros(slots, np.int64)  # id + 1
    found = np.empty(len(ids) - known, np.int64)
    for i in range(len(ids)):
        slot = slot_of(np.int64(ids[i, 0]), slots - 1)  # type: ignore[arg-type]
        while index[slot] != 0:
            at = index[slot] - 1
            if ids[at, 0] == ids[i, 0] and ids[at, 1] == ids[i, 1]:
                break
            slot = (slot + 1) & (slots - 1)
        if index[slot] == 0:
            index[slot] = i + 1
        if i >= known:
            found[i - known] = index[slot] - 1
    return found


@kernel
def _copy_rows(data: U8, bounds: I64, which: I64, owner: U8, number: int, out: U8) -> None:
    at = 0
    for k in range(len(which)):
        start, end = bounds[which[k]], bounds[which[k] + 1]
        out[at], out[at + 1] = 0, 3
        at = _big(out, at + 2, 16)
        for i in range(16):
            out[at + i] = owner[i]
        at = _big(out, at + 16, 4)
        at = _big(out, at, number + k)
        at = _big(out, at, end - start)
        for i in range(end - start):
            out[at + i] = data[start + i]
        at += end - start


@kernel
def _big(out: U8, at: int, value: int) -> int:
    """An int32, big-endian; where it ends."""
    for i in range(4):
        out[at + i] = value >> (24 - 8 * i) & 255
    return at + 4
