"""A broker of one's own, in its own process, from Python.

async with await Broker.embedded("data") as broker:
    client = await Client.connect(broker.address)
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ledgerstream.errors import DirectoryInUse, LedgerStreamError
from ledgerstream.limits import LIMITS, MIB

LOG_NAME = "broker.log"
LOG_BYTES_MAX = 16 * MIB  # an older log is begun anew at the next start
LINES = 200


class Broker:
    """A broker process that this one started; it stops when this process ends, however it ends."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        log_file: Path,
        host: str,
        port: int,
        metrics_port: int | None,
    ) -> None:
        self.process = process
        self.log_file = log_file
        self.host, self.port, self.metrics_port = host, port, metrics_port

    @classmethod
    async def embedded(
        cls, path: str | Path, *, auto_create_topics: bool = True, port: int = 0, **settings: Any
    ) -> Broker:
        """Start a broker on the data directory `path`; ready when this returns.

        `settings` are those of `ledgerstream broker`. Raises DirectoryInUse if another broker has
        the directory, LedgerStreamError with the broker's own words if it does not start.
        """
        values = {
            "data_dir": path,
            "port": port,
            "auto_create_topics": auto_create_topics,
            "two_phase_commit": True,
            "group_delay_ms": 0,
            "log_format": "json",
            **settings,
        }
        arguments = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in values.items()
            if value is not None
        ]
        log_file = Path(path) / LOG_NAME
        log = await asyncio.to_thread(_open_log, log_file)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ledgerstream.broker.run", "--report", *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C in a terminal is for the parent to act on
        )  # fmt: skip
        os.close(log)
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            code = await process.wait()
            said = "\n".join(_last_lines(log_file))
            if code == DirectoryInUse.exit_code:
                raise DirectoryInUse(said.removeprefix("error: "))
            raise LedgerStreamError(f"The broker on {path} did not start: {said}")
        where = json.loads(line)
        return cls(process, log_file, where["host"], where["port"], where["metrics_port"])

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log_lines(self) -> list[str]:
        """The last lines of the broker's log, JSON each."""
        return _last_lines(self.log_file)

    async def stop(self) -> None:
        """Finish what was accepted, snapshot, end. Does nothing if it has ended."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL: what a crash is."""
        await self._end(signal.SIGKILL)

    async def _end(self, signum: signal.Signals) -> None:
        if self.process.returncode is None:
            try:
                self.process.send_signal(signum)
            except ProcessLookupError:
                pass
        try:
            await asyncio.wait_for(self.process.wait(), LIMITS.shutdown_ms_max / 1000 + 5)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()


def _open_log(path: Path) -> int:
    """A file and not a pipe: a pipe that nobody empties would stop the broker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        mode |= os.O_TRUNC
    return os.open(path, mode, 0o644)


def _last_lines(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 64 * 1024, 0))
        return file.read().decode(errors="replace").splitlines()[-LINES:]
