"""HyperLogLog: about how many different values there were, from registers of a fixed size.

2,048 registers of a byte, eight to a word of state. Each holds the greatest rank (leading zeros of
a hash, plus 1) of the values that fall to it, so the registers are a function of the set of values
alone: order, repeats and merges do not matter. The estimate is Ertl's (arXiv:1702.01284, algorithm
6), which needs no tables and has no bias for few values; its standard error is 1.04 ÷ √2,048.
"""

from __future__ import annotations

import math

import numpy as np

from ledgerstream.stream.kernels import I64, kernel

_INDEX_BITS = 11
REGISTERS = 1 << _INDEX_BITS
SKETCH_WORDS = REGISTERS // 8
STANDARD_ERROR = 0.023  # relative, of the number of values

_RANKS = 64 - _INDEX_BITS + 1  # the greatest rank: all other bits are zero
_ALPHA = 0.7213475204444817  # 1 ÷ (2 ln 2)
_PRIME_A = np.uint64(0xFF51AFD7ED558CCD)  # the finalizer of MurmurHash3
_PRIME_B = np.uint64(0xC4CEB9FE1A85EC53)
_START = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(33)
_ONE = np.uint64(1)


@kernel
def sketch_value(
    rows: I64, row: int, place: int, values: I64, column: int, words: int, event: int
) -> None:
    """Take values[column : column + words, event] into the registers at rows[row, place]."""
    h = _START
    for c in range(words):
        h ^= np.uint64(values[column + c, event])
        h = (h ^ (h >> _SHIFT)) * _PRIME_A
        h = (h ^ (h >> _SHIFT)) * _PRIME_B
        h ^= h >> _SHIFT
    register: int = np.int64(h >> np.uint64(64 - _INDEX_BITS))  # type: ignore[assignment]
    rest = h << np.uint64(_INDEX_BITS)
    rank = 1
    while rank < _RANKS and rest >> np.uint64(63) == np.uint64(0):
        rest <<= _ONE
        rank += 1
    _raise(rows, row, place + register // 8, 8 * (register % 8), rank)


@kernel
def merge_sketch(rows: I64, into: int, source: int, place: int) -> None:
    """The registers of both sets of values together, in row `into`."""
    for word in range(place, place + SKETCH_WORDS):
        for shift in range(0, 64, 8):
            _raise(rows, into, word, shift, rows[source, word] >> shift & 0xFF)


@kernel
def _raise(rows: I64, row: int, word: int, shift: int, rank: int) -> None:
    held = rows[row, word] >> shift & 0xFF
    if rank > held:
        rows[row, word] ^= (held ^ rank) << shift


@kernel
def estimates(registers: I64, out: I64) -> None:
    """out[n]: how many values each row of registers[n, SKETCH_WORDS] has seen, about."""
    counts = np.empty(_RANKS + 1, np.float64)
    for i in range(len(out)):
        counts[:] = 0
        for word in range(SKETCH_WORDS):
            for shift in range(0, 64, 8):
                counts[registers[i, word] >> shift & 0xFF] += 1
        z = REGISTERS * _tau(1 - counts[_RANKS] / REGISTERS)
        for rank in range(_RANKS - 1, 0, -1):
            z = 0.5 * (z + counts[rank])
        if counts[0] == REGISTERS:
            out[i] = 0
            continue
        z += REGISTERS * _sigma(counts[0] / REGISTERS)
        out[i] = np.int64(round(_ALPHA * REGISTERS * REGISTERS / z))


@kernel
def _sigma(x: float) -> float:
    y, z, before = 1.0, x, -1.0
    while z != before:
        x *= x
        before = z
        z += x * y
        y += y
    return z


@kernel
def _tau(x: float) -> float:
    if x == 0 or x == 1:
        return 0.0
    y, z, before = 1.0, 1 - x, -1.0
    while z != before:
        x = math.sqrt(x)
        before = z
        y *= 0.5
        z -= (1 - x) * (1 - x) * y
    return z / 3
