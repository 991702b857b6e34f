"""The two sides of a comparison: a fresh broker of ours, and a fresh Apache Kafka beside it."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.peers import kafka


@dataclass(frozen=True)
class Side:
    """A running broker."""

    name: str
    address: str
    pid: int

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def send_signal(self, number: int) -> None:
        psutil.Process(self.pid).send_signal(number)

    def memory_bytes(self) -> int:
        return psutil.Process(self.pid).memory_info().rss


@contextlib.contextmanager
def directory(name: str) -> Iterator[Path]:
    """A directory on the disk that the project is on, removed afterwards."""
    base = Path(__file__).parents[1] / "build" / "bench"
    base.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=name, dir=base))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def ours() -> Iterator[Side]:
    """Our broker, syncing before each acknowledgement; groups begin at once, as with the peer."""
    with directory("ours") as where, ours_in(where) as side:
        yield side


@contextlib.contextmanager
def ours_in(where: Path) -> Iterator[Side]:
    """Our broker over a directory that may hold a log already."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ledgerstream.broker.run", "--report", f"--data-dir={where}",
         "--port=0", "--auto-create-topics=false", "--log-format=json",
         "--group-delay-ms=0"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,  # as Apache Kafka's: Linux shares the processors by session
    )  # fmt: skip
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline())
        yield Side("LedgerStream", f"{told['host']}:{told['port']}", process.pid)
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def apache_kafka() -> Iterator[Side | None]:
    """Apache Kafka as it comes; None where there is none."""
    if kafka.why_absent() is not None:
        yield None
        return
    with directory("kafka") as where, kafka.ApacheKafka.start(where) as running:
        yield Side(f"Apache Kafka {kafka.VERSION}", running.address, running.pid)


@contextlib.contextmanager
def both() -> Iterator[tuple[Side, Side | None]]:
    with ours() as one, apache_kafka() as other:
        yield one, other
