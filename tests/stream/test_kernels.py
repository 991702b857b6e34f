"""Kernels: compiled once, and never run stale."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ledgerstream.stream import kernels
from ledgerstream.stream.kernels import kernel
from ledgerstream.stream.version import code_version
from ledgerstream.stream.warm import warm
from tests.stream.spending import Spending

FACTOR = 3


@kernel
def tripled(values: np.ndarray) -> np.ndarray:
    out = np.empty_like(values)
    for i in range(len(values)):
        out[i] = FACTOR * values[i]
    return out


def test_a_kernel_is_a_plain_function_to_its_callers() -> None:
    assert tripled(np.arange(3)).tolist() == [0, 3, 6]


def test_compiling_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "_cache_root", lambda: tmp_path)
    said: list[str] = []
    warm(Spending, said.append)
    warm(Spending, said.append)
    assert said == ["compiling the kernels of Spending, once for this version …"]


LOWER = """
from ledgerstream.stream.kernels import kernel
@kernel
def step(x):
    return x + {step}
"""
UPPER = """
import sys
from ledgerstream.stream.kernels import kernel
from lower import step
@kernel
def twice(x):
    return step(step(x))
print(twice(1), sum(twice.stats.cache_hits.values()))
"""


def run(directory: Path) -> list[int]:
    done = subprocess.run(
        [sys.executable, "upper.py"],
        cwd=directory,
        env={"NUMBA_CACHE_DIR": str(directory / "cache"), "HOME": str(directory)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


def test_a_kernel_is_cached_and_a_change_below_it_makes_it_anew(tmp_path: Path) -> None:
    (tmp_path / "upper.py").write_text(UPPER)
    (tmp_path / "lower.py").write_text(LOWER.format(step=1))
    assert run(tmp_path) == [3, 0]
    assert run(tmp_path) == [3, 1]
    (tmp_path / "lower.py").write_text(LOWER.format(step=2))
    assert run(tmp_path) == [5, 0]


PROJECT = """
from ledgerstream.stream.version import code_version
import sys, importlib
from ledgerstream import Event, Processor, Timestamp, Topic
import rules
class E(Event):
    at: Timestamp
    k: int
class P(Processor):
    source = Topic("t", E, key="k")
    def process(self, batch, state):
        return None
print(code_version(P))
"""


def version(directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import project"],
        cwd=directory,
        env={"HOME": str(Path.home()), "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_code_version_follows_what_the_processor_imports(tmp_path: Path) -> None:
    (tmp_path / "project.py").write_text(PROJECT)
    (tmp_path / "rules.py").write_text("LIMIT = 1\n")
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    first = version(tmp_path)
    (tmp_path / "unrelated.py").write_text("x = 2\n")
    assert version(tmp_path) == first
    (tmp_path / "rules.py").write_text("LIMIT = 2\n")
    assert version(tmp_path) != first
    assert code_version(Spending) == code_version(Spending)
