"""Halving over time, the same to the bit on every machine.

The library's `pow` and `exp2` differ in the last bit between processors; what is stored and must
come out again is made of +, × and ÷ alone, each rounded once.
"""

from __future__ import annotations

import math

from ledgerstream.stream.kernels import kernel

_LN2 = 0.6931471805599453
_TERMS = tuple(1 / math.factorial(n) for n in range(14, -1, -1))  # of e^x, the last first
_HALVINGS_MAX = 1_000  # beyond, a weight is nothing beside the one of the newest event


@kernel
def decay(age: int, halflife: int) -> float:
    """2^(−age ÷ halflife), to about one unit in the last place; 0 beyond a thousand half-lives.

    age and halflife are integers of one unit, at least 0 and at least 1. For kernels of one's own
    too: `mean[row] = mean[row] * decay(age, halflife) + …`.
    """
    whole = age // halflife
    if whole >= _HALVINGS_MAX:
        return 0.0
    part = float(age - whole * halflife) / float(halflife)
    if part > 0.5:
        part -= 1.0
        whole += 1
    x = -part * _LN2  # at most 0.35 from 0, where these terms are enough
    value = 0.0
    for n in range(len(_TERMS)):
        value = value * x + _TERMS[n]
    return math.ldexp(value, -whole)
