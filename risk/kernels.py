"""The one way this room compiles: nopython, without the GIL, cached on disk, IEEE arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile with numba when first called. No fast-math: the same bits for every batch split."""
    compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=False)(function)
    return cast(Callable[P, R], compiled)
