"""The code version: what would have to be equal for a replay to give the same bits.

A hash of the sources of the processor's module and of the project modules that it imports, with
the versions of ledgerstream, numba and numpy. A project module is one of the processor's own
top-level package, of the packages that ship with ledgerstream, or one that is not installed (lies
neither in the standard library nor in site-packages).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numba
import numpy as np

import ledgerstream

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Processor

_SHIPPED = ("processors", "risk")
_INSTALLED = tuple(
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib")
)


def code_version(processor: type[Processor]) -> str:
    """16 hex digits."""
    digest = hashlib.sha256(
        f"{ledgerstream.__version__} {numba.__version__} {np.__version__}".encode()
    )
    sources = _sources(processor)
    for name in sorted(sources):
        digest.update(f"{name}\0".encode() + sources[name] + b"\0")
    return digest.hexdigest()[:16]


def _sources(processor: type[Processor]) -> dict[str, bytes]:
    """Module name → source, over the import graph from the processor's module."""
    found: dict[str, bytes] = {}
    home = processor.__module__.partition(".")[0]
    waiting = [processor.__module__]
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in found or module is None or not _is_project(name, module, home):
            continue
        path = getattr(module, "__file__", None)
        if path is None:  # typed at a prompt or in a notebook: the class is all there is
            found[name] = _class_source(processor)
            continue
        found[name] = Path(path).read_bytes()
        waiting += _imports(found[name], module)
    return found


def _is_project(name: str, module: ModuleType, home: str) -> bool:
    top = name.partition(".")[0]
    if top == "ledgerstream":
        return False  # its version stands for it
    if top == home or top in _SHIPPED:
        return True
    path = getattr(module, "__file__", None)
    if path is None:
        return False
    where = Path(path).resolve()
    return not any(where.is_relative_to(root) for root in _INSTALLED)


def _imports(source: bytes, module: ModuleType) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = (module.__package__ or "").split(".")
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def _class_source(processor: type[Processor]) -> bytes:
    try:
        return inspect.getsource(processor).encode()
    except (OSError, TypeError):
        return processor.process.__code__.co_code + processor.on_event.__code__.co_code
