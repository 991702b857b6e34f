"""`kernel`: the one way to compile a loop, and the cache that makes the second start quick.

A kernel is nopython, releases the GIL, and never reorders floating point, so it gives the same bits
for the same input wherever batches are cut. Compiled code is kept on disk under a fingerprint of
the kernel's module, the kernels and constants that it uses, and the versions of numba and numpy:
a change anywhere below makes a new entry (numba's own cache looks at one file only, and would run
stale code of another).

`NUMBA_CACHE_DIR` moves the cache; otherwise it is `ledgerstream/kernels` in the user's cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core.registry import CPUDispatcher
from numpy.typing import NDArray

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]
BOOLS = NDArray[np.bool_]
F = TypeVar("F", bound=Callable[..., Any])

_CONFIG: Any = numba.config
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False}


def kernel(function: F) -> F:
    """Compile with numba: nopython, without the GIL, cached on disk, no fast-math.

    Arguments are numpy arrays and scalars; the annotations of the function stay as they are.
    Where its source has no file (typed at a prompt), it is compiled anew in each process.
    """
    previous = _CONFIG.CACHE_DIR
    _CONFIG.CACHE_DIR = str(_cache_root() / _fingerprint(cast(FunctionType, function)))
    try:
        compiled = numba.njit(cache=True, **_OPTIONS)(function)
    except (RuntimeError, OSError):  # no file to key the cache by, or nowhere to write
        compiled = numba.njit(**_OPTIONS)(function)
    finally:
        _CONFIG.CACHE_DIR = previous
    return cast(F, compiled)


@contextmanager
def compile_lock() -> Iterator[Path]:
    """Hold the cache's lock: one process compiles, the others then find its work."""
    root = _cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # a read-only home: each process compiles for itself
        yield root
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root
    finally:
        os.close(lock)


def _cache_root() -> Path:
    if os.environ.get("NUMBA_CACHE_DIR"):
        return Path(os.environ["NUMBA_CACHE_DIR"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ledgerstream" / "kernels"


def _fingerprint(function: FunctionType) -> str:
    digest = hashlib.sha256(f"{numba.__version__} {np.__version__}".encode())
    try:
        digest.update(Path(function.__code__.co_filename).read_bytes())
    except OSError:
        digest.update(function.__code__.co_code)
    for name in sorted(function.__code__.co_names):
        used = function.__globals__.get(name)
        if isinstance(used, CPUDispatcher):
            digest.update(_fingerprint(cast(FunctionType, used.py_func)).encode())
        elif isinstance(used, (int, float, str, bytes, tuple, np.generic)):
            digest.update(f"{name}={used!r}".encode())
    return digest.hexdigest()[:16]
