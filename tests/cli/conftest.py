"""The installed `ledgerstream`, as a person at a shell has it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("ledgerstream")
Shell = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def home() -> Iterator[Path]:
    """A working directory. Not pytest's: those close to others each time that pytest starts, and
    Postgres under root runs as somebody else."""
    with tempfile.TemporaryDirectory(prefix="ledgerstream-cli-") as directory:
        yield Path(directory)


@pytest.fixture
def shell(home: Path) -> Shell:
    """`shell("topic", "list", input="…", code=0)` in `home`; checks the exit code."""

    def run(*arguments: str, input: str = "", code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [PROGRAM, *arguments],
            input=input,
            text=True,
            capture_output=True,
            cwd=home,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    """The address of `ledgerstream broker`, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="ledgerstream-cli-") as directory:
        process = subprocess.Popen(
            [PROGRAM, "broker", "--port", "0", "--auto-create-topics", "--log-format", "json"],
            cwd=directory,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        ready = re.search(r'"address": "(.+?)"', process.stderr.readline())
        assert ready is not None
        yield ready[1]
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "broker stopped" in said


@pytest.fixture
def on_broker(broker: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`--log` of every command is that broker."""
    monkeypatch.setenv("LEDGERSTREAM_LOG", broker)
    assert os.environ["LEDGERSTREAM_LOG"] == broker
    return broker
