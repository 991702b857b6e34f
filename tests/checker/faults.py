"""What befalls brokers, clients and what is between them; each is counted when it is done."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from ledgerstream.wire.versions import Api
from tests.peers.kafka import free_port

START_S_MAX = 30.0
FLEXIBLE_SINCE = 3  # of EndTxn
PAUSE_S = 0.1, 0.5
HOLD_S = 0.9, 2.5  # longer than a client waits for an answer
ROOT = Path(__file__).parents[2]


class Server:
    """A broker process that comes back at the same address with the same data."""

    def __init__(self, directory: Path, module: Sequence[str] = ("ledgerstream.broker.run",)):
        self.port = free_port()
        self.advertised_port = self.port
        self._directory, self._module = directory, module
        self.process: asyncio.subprocess.Process

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        with (self._directory / "out").open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *self._module, "--report",
                f"--data-dir={self._directory / 'log'}", f"--port={self.port}",
                f"--advertised-port={self.advertised_port}", "--group-delay-ms=0",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=out, cwd=ROOT,
            )  # fmt: skip
        assert self.process.stdout is not None
        async with asyncio.timeout(START_S_MAX):
            line = await self.process.stdout.readline()
        assert line, (self._directory / "out").read_text()[-2_000:]

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


class Worker:
    """A client process, started anew when it was killed. `command` is given how often it was."""

    def __init__(self, command: Callable[[int], Sequence[str]]) -> None:
        self._command = command
        self.lives = 0
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        command = self._command(self.lives)
        self.process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
        self.lives += 1

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


class Meddler:
    """A proxy that knows requests: it delays them, holds them past their time, and cuts.

    A request that is held stays on its way when its client has given up: it is delivered late.
    """

    def __init__(self, port: int) -> None:
        self._above = port
        self.hold: dict[int, deque[float]] = {}  # Api → seconds, of its next requests
        self.mute: Counter[int] = Counter()  # Api → how many next answers never come
        self.jitter_s = 0.0  # each request waits up to so long
        self.counts: Counter[str] = Counter()
        self.late_ends: set[str] = set()  # transactional ids with an EndTxn of V1 that came late
        self._chance = random.Random(0)
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> int:
        """Every connection that is open; how many."""
        for writer in self._open:
            writer.transport.abort()
        return len(self._open)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        tasks: list[asyncio.Task[None]] = []
        self._open.add(writer)
        try:
            above_reader, above = await asyncio.open_connection("127.0.0.1", self._above)
            ends.append(above)
            link = Link(self, writer, above)
            steps = link.take(reader), link.deliver(), link.answer(above_reader)
            tasks += [asyncio.ensure_future(step) for step in steps]
            _, deliver, answer = tasks
            await asyncio.wait((deliver, answer), return_when=asyncio.FIRST_COMPLETED)
            if link.gone and not answer.done():
                await asyncio.wait((answer,), timeout=1.0)  # the broker does what came late
        except OSError:
            pass  # the broker is away
        finally:
            self._open.discard(writer)
            for task in tasks:
                task.cancel()
            for each in ends:
                each.transport.abort()
            await asyncio.gather(
                *tasks, *(each.wait_closed() for each in ends), return_exceptions=True
            )

    def delay_s(self, api: int) -> float:
        waiting = self.hold.get(api)
        if waiting:
            self.counts[f"held {Api(api).name}"] += 1
            return waiting.popleft()
        return self._chance.random() * self.jitter_s

    def loses_answer(self, api: int) -> bool:
        if self.mute[api] <= 0:
            return False
        self.mute[api] -= 1
        self.counts[f"lost answer {Api(api).name}"] += 1
        return True


class Link:
    """One connection. `gone`: the client has given it up."""

    def __init__(
        self, meddler: Meddler, client: asyncio.StreamWriter, above: asyncio.StreamWriter
    ) -> None:
        self._meddler, self._client, self._above = meddler, client, above
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._muted = self.gone = False

    async def take(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                size = await reader.readexactly(4)
                self._frames.put_nowait(size + await reader.readexactly(int.from_bytes(size)))
        except (OSError, asyncio.IncompleteReadError):
            self.gone = True
            self._frames.put_nowait(None)

    async def deliver(self) -> None:
        while (frame := await self._frames.get()) is not None:
            (api,) = struct.unpack_from(">h", frame, 4)
            if delay_s := self._meddler.delay_s(api):
                await asyncio.sleep(delay_s)
            if self.gone:
                self._late(api, frame)
            self._muted = self._meddler.loses_answer(api) or self._muted
            self._above.write(frame)
            await self._above.drain()

    def _late(self, api: int, frame: bytes) -> None:
        self._meddler.counts[f"late {Api(api).name}"] += 1
        (version,) = struct.unpack_from(">h", frame, 6)
        if api == Api.END_TXN and version < FLEXIBLE_SINCE:
            (size,) = struct.unpack_from(">h", frame, 12)  # of the client id, before the other one
            (length,) = struct.unpack_from(">h", frame, 14 + size)
            self._meddler.late_ends.add(frame[16 + size : 16 + size + length].decode())

    async def answer(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65_536):
            if self._muted:
                return
            if not self.gone:
                self._client.write(data)


class Faults:
    """Chosen by chance, one after the other, until it is told to end."""

    def __init__(
        self, server: Server, meddler: Meddler, workers: list[Worker], kinds: Sequence[str],
        seed: int,
    ) -> None:  # fmt: skip
        self._server, self._meddler, self._workers = server, meddler, workers
        self._kinds, self._chance = kinds, random.Random(seed)
        self.counts = meddler.counts

    async def run(self, until: float) -> None:
        deck: list[str] = []
        while time.monotonic() < until:
            if not deck:  # each kind comes before any comes again
                deck = self._chance.sample(self._kinds, len(self._kinds))
            await getattr(self, deck.pop())()
            await asyncio.sleep(self._chance.uniform(*PAUSE_S))

    async def rest(self) -> None:
        """Nothing, for as long as it takes to give up a request."""
        await asyncio.sleep(HOLD_S[0])

    async def kill_broker(self) -> None:
        await self._server.kill()
        self.counts["broker killed"] += 1
        await self._server.start()

    async def stop_broker(self) -> None:
        await self._freeze(self._server.process.pid)
        self.counts["broker stopped for a while"] += 1

    async def kill_client(self) -> None:
        worker = self._chance.choice(self._workers)
        if worker.process.returncode is None:
            await worker.kill()
            self.counts["client killed"] += 1
            await worker.start()

    async def stop_client(self) -> None:
        worker = self._chance.choice(self._workers)
        if worker.process.returncode is None:
            await self._freeze(worker.process.pid)
            self.counts["client stopped for a while"] += 1

    async def _freeze(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._chance.uniform(*PAUSE_S))
        finally:
            os.kill(pid, signal.SIGCONT)

    async def cut(self) -> None:
        self.counts["connection cut"] += self._meddler.cut()

    async def delay(self) -> None:
        self._meddler.jitter_s = 0.05
        await asyncio.sleep(self._chance.uniform(*PAUSE_S))
        self._meddler.jitter_s = 0.0
        self.counts["delayed for a while"] += 1

    async def lose_answer(self) -> None:
        self._meddler.mute[self._chance.choice((Api.PRODUCE, Api.END_TXN))] += 1

    async def hold_produce(self) -> None:
        self._hold(Api.PRODUCE)

    async def hold_end(self) -> None:
        self._hold(Api.END_TXN)

    def _hold(self, api: Api) -> None:
        self._meddler.hold.setdefault(api, deque()).append(self._chance.uniform(*HOLD_S))
