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
import numba.extending
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import CPUDispatcher
from numba.np import arrayobj
from numpy.typing import NDArray

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]
BOOLS = NDArray[np.bool_]
F = TypeVar("F", bound=Callable[..., Any])

AHEAD = 8  # items of a loop: the memory that they will need is on its way to the cache

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


@numba.extending.intrinsic
def _prefetch(_: Any, array: Any, row: Any, word: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        given = arrayobj.make_array(kind)(context, builder, args[0])  # type: ignore[no-untyped-call]
        strides = cgutils.unpack_tuple(builder, given.strides, kind.ndim)  # type: ignore[no-untyped-call]
        int32, int64, pointer = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
        at = builder.add(
            builder.mul(args[1], strides[0]), builder.mul(args[2], strides[kind.ndim - 1])
        )
        place = builder.inttoptr(builder.add(builder.ptrtoint(given.data, int64), at), pointer)
        load = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [pointer],
            ir.FunctionType(ir.VoidType(), [pointer, int32, int32, int32]),
        )
        builder.call(load, [place, int32(0), int32(3), int32(1)])  # for reading, keep it, data
        return context.get_dummy_value()

    return numba.types.void(array, numba.types.int64, numba.types.int64), generate


prefetch: Any = _prefetch
"""Inside a kernel: `prefetch(rows, row, word)` begins to load that word of an int64 array into the
cache and goes on at once. It changes nothing and reads nothing, so that any place will do; it is
for loops over memory that lies far apart, some `AHEAD` items before they need it."""


@numba.extending.intrinsic
def _float_of(_: Any, word: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return numba.types.float64(numba.types.int64), generate


@numba.extending.intrinsic
def _bits_of(_: Any, value: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return numba.types.int64(numba.types.float64), generate


float_of: Any = _float_of
"""Inside a kernel: the float64 whose bits are an int64, as rows of state hold it."""
bits_of: Any = _bits_of
"""Inside a kernel: the int64 with the bits of a float64."""


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
