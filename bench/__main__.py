"""`python -m bench [ID …]`: measure, print one table, write build/bench.json."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import (
    atomic,
    bars,
    columns,
    groups,
    log,
    on_event,
    pipeline,
    quix,
    runtime,
    transactions,
    windows,
)
from bench.rows import ROWS, Row
from tests.peers import kafka

OUT = Path(__file__).parents[1] / "build" / "bench.json"
MODULES = (
    log,
    columns,
    pipeline,
    atomic,
    quix,
    runtime,
    on_event,
    bars,
    windows,
    transactions,
    groups,
)  # importing them registers their rows


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n\nIDs: {', '.join(ROWS)}")
        return
    asked = sys.argv[1:] or list(ROWS)
    names = {"produce_cpu": "produce", "txn_rate": "txn_latency"}  # measured in the same runs
    unknown = [name for name in asked if names.get(name, name) not in ROWS]
    if unknown:
        raise SystemExit(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    console = Console(stderr=True)
    found: list[Row] = []
    for name in dict.fromkeys(names.get(name, name) for name in asked):
        console.print(f"measuring {name} …")
        started = time.perf_counter()
        found += ROWS[name]()
        console.print(f"  took {time.perf_counter() - started:.0f} s")
    Console(width=150).print(table(found))
    if why := kafka.why_absent():
        console.print(f"Apache Kafka is absent ({why}); its columns are empty.")
    write(found)


def table(rows: list[Row]) -> Table:
    made = Table(title="LedgerStream's figures")
    for heading in ("id", "figure", "ours", "peer", "unit", "ratio", "bar", "aim", "reached"):
        made.add_column(heading, justify="left" if heading in ("id", "figure", "unit") else "right")
    for row in rows:
        ratio = row.ratio
        made.add_row(
            row.id, row.what, number(row.ours), number(row.peer), row.unit,
            "" if ratio is None else f"{ratio:.2f}", number(row.bar), number(row.aim),
            "" if row.reached is None else "yes" if row.reached else "no",
        )  # fmt: skip
    return made


def number(value: float | None) -> str:
    if value is None:
        return "absent"
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def write(rows: list[Row]) -> None:
    """Merge into the file, so that a row measured alone replaces its old figure."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    old: dict[str, Any] = {}
    if OUT.exists():
        old = {row["id"]: row for row in json.loads(OUT.read_text())["rows"]}
    old.update({row.id: row.as_json() for row in rows})
    OUT.write_text(json.dumps({"versions": versions(), "rows": list(old.values())}, indent=2))


def versions() -> dict[str, str]:
    packages = ("ledgerstream", "numpy", "numba", "uvloop", "kio", "confluent-kafka", "asyncpg")
    found = {name: version(name) for name in packages}
    found["python"] = platform.python_version()
    found["machine"] = f"{platform.machine()}, {platform.processor() or platform.platform()}"
    found["Apache Kafka"] = "absent" if kafka.why_absent() else kafka.VERSION
    try:
        java = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False)
        found["java"] = java.stderr.splitlines()[0]
    except OSError:
        found["java"] = "absent"
    return found


if __name__ == "__main__":
    main()
