"""A broker of one's own, in its own process, from Python.

async with await Broker.embedded("data") as broker:
    client = await Client.connect(broker.address)
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ledgerstream.errors import DirectoryInUse, LedgerStreamError
from ledgerstream.limits import LIMITS


class Broker:
    """A broker process that this one started; it stops when this process ends, however it ends."""

    def __init__(
        self, process: asyncio.subprocess.Process, host: str, port: int, metrics_port: int | None
    ) -> None:
        self.process = process
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
            "log_format": "json",
            **settings,
        }
        arguments = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in values.items()
            if value is not None
        ]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ledgerstream.broker.run", "--report", *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for the parent to act on
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        words = _Words(process.stderr)
        line = await process.stdout.readline()
        if not line:
            code = await process.wait()
            said = await words.all()
            if code == DirectoryInUse.exit_code:
                raise DirectoryInUse(said.removeprefix("error: "))
            raise LedgerStreamError(f"The broker on {path} did not start: {said}")
        where = json.loads(line)
        broker = cls(process, where["host"], where["port"], where["metrics_port"])
        broker._words = words
        return broker

    _words: _Words

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log_lines(self) -> list[str]:
        """The last lines of the broker's log, JSON each."""
        return self._words.lines

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
        await self._words.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()


class _Words:
    """Keeps the last lines that a process wrote, so that its pipe never fills."""

    LINES_MAX = 200

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self.lines: list[str] = []
        self._task = asyncio.ensure_future(self._read(stream))

    async def _read(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            self.lines.append(line.decode(errors="replace").rstrip())
            del self.lines[: -self.LINES_MAX]

    async def all(self) -> str:
        await self._task
        return "\n".join(self.lines)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
