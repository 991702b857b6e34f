"""The digest of a state: Σ hash(table, content) mod 2¹²⁸ over live rows and live arena entries.

A sum can be kept up to date by subtracting what a row was and adding what it became, and does not
depend on where rows lie; so it is the same for every growth, restore and split into batches. The
hash is two 64-bit lanes of multiply and xor-shift: against accidents, not against an adversary.
"""

from __future__ import annotations

import hashlib

import numpy as np

from ledgerstream.stream.kernels import AHEAD, I64, U64, kernel, prefetch

_LANE_A = np.uint64(0x9E3779B97F4A7C15)
_LANE_B = np.uint64(0xC2B2AE3D27D4EB4F)
_FINAL = np.uint64(0xFF51AFD7ED558CCD)
_SHIFT = np.uint64(32)
_CARRY = np.uint64(1)


def seed_of(name: str) -> np.ndarray:
    """uint64[2]: where the lanes start for a table of this name."""
    raw = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.frombuffer(raw, "<u8").copy()


def zero() -> np.ndarray:
    """uint64[2], low word first: the digest of nothing."""
    return np.zeros(2, np.uint64)


def total(sums: list[np.ndarray]) -> bytes:
    """16 little-endian bytes of the sum of several digests mod 2¹²⁸."""
    value = sum(int(each[0]) | int(each[1]) << 64 for each in sums)
    return (value % (1 << 128)).to_bytes(16, "little")


@kernel
def mix(lane: np.uint64, word: np.uint64, prime: np.uint64) -> np.uint64:
    """Take one 64-bit word into a lane."""
    lane = (lane ^ word) * prime
    return lane ^ (lane >> _SHIFT)


@kernel
def accumulate(acc: U64, a: np.uint64, b: np.uint64, add: bool) -> None:
    """Finish lanes a and b, and add them to (or take them from) acc, with the carry."""
    a = (a ^ (a >> _SHIFT)) * _FINAL
    a ^= a >> _SHIFT
    b = (b ^ (b >> _SHIFT)) * _FINAL
    b ^= b >> _SHIFT
    before = acc[0]
    if add:
        acc[0] = before + a
        acc[1] += b
        if acc[0] < before:
            acc[1] += _CARRY
    else:
        acc[0] = before - a
        acc[1] -= b
        if acc[0] > before:
            acc[1] -= _CARRY


@kernel
def digest_entry(acc: U64, seed: U64, key: int, time: int, value: int, add: bool) -> None:
    """Add or take one arena entry by its content."""
    k = np.uint64(key)
    t = np.uint64(time)
    v = np.uint64(value)
    a = mix(mix(mix(seed[0], k, _LANE_A), t, _LANE_A), v, _LANE_A)
    b = mix(mix(mix(seed[1], v, _LANE_B), k, _LANE_B), t, _LANE_B)
    accumulate(acc, a, b, add)


@kernel
def digest_rows(acc: U64, seed: U64, rows: I64, which: I64, content: int, add: bool) -> None:
    """Add or take rows[which], each by its first `content` words."""
    for i in range(len(which)):
        if i + AHEAD < len(which):
            prefetch(rows, which[i + AHEAD], 0)
        a = seed[0]
        b = seed[1]
        for c in range(content):
            word = np.uint64(rows[which[i], c])
            a = mix(a, word, _LANE_A)
            b = mix(b, word, _LANE_B)
        accumulate(acc, a, b, add)
