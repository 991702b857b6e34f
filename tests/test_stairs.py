"""Arrows point down only: who may import whom, and who may touch the world."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {"errors", "limits", "machine", "events", "money"}
CORES = {"log", "raft", "txn", "groups", "catalog", "topicconfig", "groupconfig"}
# room → the rooms that it may import besides itself and the ground
MAY: dict[str, set[str]] = {
    **dict.fromkeys(GROUND, GROUND),
    "wire": GROUND,
    **{name: GROUND | {"wire"} for name in CORES},
    "groupconfig": GROUND | {"topicconfig"},
    "catalog": GROUND | {"wire", "topicconfig", "groupconfig"},  # settings are part of it
    "client": GROUND | {"wire"},
    "broker": GROUND | {"wire"} | CORES,
    "stream": GROUND | {"wire", "client"},
    "testing": GROUND | {"client", "stream"},
    "sandbox": GROUND | {"wire", "client", "stream", "broker"},
    "cli": GROUND
    | {"wire", "client", "stream", "broker", "sandbox", "topicconfig", "processors", "risk"},
    "processors": GROUND | {"stream", "client", "risk"},
    "risk": set(),
    "": set(),  # the package itself imports nothing until asked
}
PURE = {"wire", "raft", "txn", "groups", "catalog", "topicconfig", "groupconfig", "machine"}
IMPURE_MODULES = {
    "asyncio", "socket", "time", "random", "secrets", "os", "threading", "subprocess", "pathlib",
    "shutil", "tempfile", "select", "ssl", "uvloop", "asyncpg",
}  # fmt: skip
NUMBA_HOMES = {"stream", "risk", "processors"}
NUMBA_FILES = {"ledgerstream/wire/columnkernels.py"}
FILES = sorted(
    path
    for package in ("ledgerstream", "processors", "risk")
    for path in (ROOT / package).rglob("*.py")
)


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "ledgerstream":
        return parts[0]
    if parts == ("ledgerstream", "__init__"):
        return ""
    return parts[1]


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
            if node.module == "ledgerstream":
                names += [f"ledgerstream.{alias.name}" for alias in node.names]
    return names


PUBLIC = {
    "Event": "events", "Timestamp": "events", "Text": "events", "Topic": "stream",
    "Processor": "stream", "Rows": "stream", "Sliding": "stream", "State": "stream",
    "Table": "stream", "Keyed": "stream", "kernel": "stream", "Broker": "broker",
    **dict.fromkeys(
        ["Count", "First", "Hopping", "Last", "Max", "Mean", "Min", "Sum", "Tumbling",
         "WindowTable"], "stream"
    ),
    "Client": "client", "Security": "client", "local": "sandbox",
}  # fmt: skip


def rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for name in imported(path):
        first, *rest = name.split(".")
        if first in ("processors", "risk"):
            rooms.add(first)
        elif first == "ledgerstream" and rest:
            rooms.add(PUBLIC.get(rest[0], rest[0]))
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    assert here in MAY, f"{here} has no place on the stairs"
    assert rooms_imported(path) <= MAY[here] | {here}


@pytest.mark.parametrize(
    "path", [p for p in FILES if room(p) in PURE], ids=lambda p: str(p.relative_to(ROOT))
)
def test_pure_rooms_have_no_io_clock_or_chance(path: Path) -> None:
    assert {name.split(".")[0] for name in imported(path)} & IMPURE_MODULES == set()


@pytest.mark.parametrize(
    "path", [p for p in FILES if room(p) == "log"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_only_disk_opens_files(path: Path) -> None:
    if path.name == "disk.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "open"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "os" or node.attr.startswith("O_")
    assert not {"socket", "asyncio"} & set(imported(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_numba_stays_where_kernels_are(path: Path) -> None:
    if "numba" in {name.split(".")[0] for name in imported(path)}:
        home = room(path) in NUMBA_HOMES
        assert home or str(path.relative_to(ROOT)) in NUMBA_FILES


@pytest.mark.parametrize("module", ["ledgerstream.broker.run", "ledgerstream.cli.main"])
def test_starts_without_numba_and_pandas(module: str) -> None:
    heavy = "{'numba', 'pandas', 'pyarrow', 'sqlalchemy'} & set(sys.modules)"
    code = f"import sys, {module}; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
