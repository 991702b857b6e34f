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
from itertools import cycle
from pathlib import Path
from typing import NamedTuple, Self

from ledgerstream.wire.versions import Api
from tests.checker.clocked import Dial
from tests.peers.kafka import free_port

START_S_MAX = 30.0
# what has no sequence: under V1 it may come late and be of a later transaction of the same epoch;
# from which version on its header and strings are flexible, and from which on it is V2
LATE_UNDER_V1 = {Api.END_TXN: (3, 5), Api.TXN_OFFSET_COMMIT: (3, 5)}
PAUSE_S = 0.1, 0.5
HOLD_S = 0.9, 2.5  # longer than a client waits for an answer
OVERTAKEN_S_MAX = 4.0  # a request that nothing overtakes goes on
OUTLIVED_S = 3.5, 7.5  # than a member's session, and then than its transaction as well
SEEN_S_MAX = 5.0  # by the broker, whatever it looks at its clock for
TICK_S = 1.1  # a little longer than until the broker looks at what is open too long
# What a broker's clock is off by, in turn. Records' own times are the clients': Kafka refuses those
# that are more than an hour ahead of the broker's, so back it is by less.
MINUTE_NS = 60_000_000_000
OFF_NS = tuple(minutes * MINUTE_NS for minutes in (2, 0, 90, -10, 360, -50, 0, -50, 600, 1, 0))
ROOT = Path(__file__).parents[2]
OF_A_TRANSACTION = frozenset({
    Api.PRODUCE, Api.INIT_PRODUCER_ID, Api.ADD_PARTITIONS_TO_TXN, Api.ADD_OFFSETS_TO_TXN,
    Api.END_TXN, Api.TXN_OFFSET_COMMIT,
})  # fmt: skip


class Server:
    """A broker process that comes back at the same address with the same data."""

    def __init__(self, directory: Path, module: Sequence[str] = ("ledgerstream.broker.run",)):
        self.port = free_port()
        self.advertised_port = self.port
        self._directory, self._module = directory, module
        self.dial = Dial(directory / "clock")
        self.process: asyncio.subprocess.Process

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        with (self._directory / "out").open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.checker.clocked", str(self._directory / "clock"),
                *self._module, "--report",
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

    async def set_clock(self, off_ns: int) -> None:
        """Until the broker has seen it."""
        self.dial.set(off_ns)
        async with asyncio.timeout(SEEN_S_MAX):
            while self.dial.seen_ns != off_ns:
                await asyncio.sleep(0.02)

    def said(self, what: str) -> int:
        """How often its log has it."""
        return (self._directory / "out").read_text().count(what)


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
    """A proxy that knows requests: it delays them, holds them and their answers past their time,
    lets others overtake them, and cuts.

    A request that is held stays on its way when its client has given up: it is delivered late.
    Requests are reordered between connections alone. Within one, TCP delivers in order or not at
    all; a proxy that exchanged two of its frames would show the broker a client that asked in
    another order, and no network can do that.
    """

    def __init__(self, port: int) -> None:
        self._above = port
        self.hold: dict[int, deque[float]] = {}  # Api → seconds, of its next requests
        self.mute: Counter[int] = Counter()  # Api → how many next answers never come
        self.hold_answer: dict[int, deque[float]] = {}  # as `hold`
        self.overtake: Counter[int] = Counter()  # Api → how many next requests others overtake
        self._overtaken: list[Overtaken] = []
        self.jitter_s = 0.0  # each request waits up to so long
        self.counts: Counter[str] = Counter()
        self.late_ids: set[str] = set()  # with something `LATE_UNDER_V1`
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

    def calm(self) -> None:
        """Nothing befalls what comes from now on."""
        self.hold.clear()
        self.hold_answer.clear()
        self.mute.clear()
        self.overtake.clear()
        self.jitter_s = 0.0

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

    def answer_delay_s(self, api: int) -> float:
        waiting = self.hold_answer.get(api)
        if not waiting:
            return 0.0
        self.counts[f"held answer {Api(api).name}"] += 1
        return waiting.popleft()

    async def wait_overtaken(self, link: Link, api: int, client: str) -> None:
        """Until another connection of the client has delivered a request, if that is wanted."""
        if self.overtake[api] <= 0:
            return
        self.overtake[api] -= 1
        mine = Overtaken(link, api, client, asyncio.get_running_loop().create_future())
        self._overtaken.append(mine)
        try:
            async with asyncio.timeout(OVERTAKEN_S_MAX):
                await mine.by
        except TimeoutError:
            self.counts["overtaken by nothing"] += 1
        finally:
            self._overtaken.remove(mine)

    def delivered(self, link: Link, api: int, client: str) -> None:
        """A request has reached the broker: does it overtake another one?"""
        for each in self._overtaken:
            away = each.link is not link and each.client == client and not each.by.done()
            if away and api in OF_A_TRANSACTION:
                each.by.set_result(api)
                self.counts[f"{Api(each.api).name} overtaken by {Api(api).name}"] += 1

    def loses_answer(self, api: int) -> bool:
        if self.mute[api] <= 0:
            return False
        self.mute[api] -= 1
        self.counts[f"lost answer {Api(api).name}"] += 1
        return True


class Overtaken(NamedTuple):
    """A request that waits until one of another connection of its client has gone ahead: what a
    client sends again after it has given up is there before what it had sent first."""

    link: Link
    api: int
    client: str
    by: asyncio.Future[int]


class Link:
    """One connection. `gone`: the client has given it up."""

    def __init__(
        self, meddler: Meddler, client: asyncio.StreamWriter, above: asyncio.StreamWriter
    ) -> None:
        self._meddler, self._client, self._above = meddler, client, above
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._apis: dict[int, int] = {}  # of what is not answered, by correlation id
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
            api, version, correlation_id, size = struct.unpack_from(">hhih", frame, 4)
            size = max(size, 0)  # −1: it has no name
            client = frame[14 : 14 + size].decode()
            if delay_s := self._meddler.delay_s(api):
                await asyncio.sleep(delay_s)
            await self._meddler.wait_overtaken(self, api, client)
            if self.gone:
                self._late(api, version, frame[14 + size :])
            self._muted = self._meddler.loses_answer(api) or self._muted
            self._apis[correlation_id] = api
            self._above.write(frame)
            await self._above.drain()
            self._meddler.delivered(self, api, client)

    def _late(self, api: int, version: int, body: bytes) -> None:
        self._meddler.counts[f"late {Api(api).name}"] += 1
        flexible_since, v2_since = LATE_UNDER_V1.get(Api(api), (0, 0))
        if version < v2_since:  # each begins with the transactional id
            flexible = version >= flexible_since
            size = body[1] - 1 if flexible else int.from_bytes(body[:2])  # after no tagged fields
            self._meddler.late_ids.add(body[2 : 2 + size].decode())

    async def answer(self, reader: asyncio.StreamReader) -> None:
        while True:
            size = await reader.readexactly(4)
            frame = await reader.readexactly(int.from_bytes(size))
            if self._muted:
                return
            api = self._apis.pop(int.from_bytes(frame[:4]))
            if delay_s := self._meddler.answer_delay_s(api):
                await asyncio.sleep(delay_s)
                self._meddler.counts[f"late answer {Api(api).name}"] += self.gone
            if not self.gone:
                self._client.write(size + frame)


class Faults:
    """Chosen by chance, one after the other, until it is told to end."""

    def __init__(
        self, server: Server, meddler: Meddler, workers: list[Worker], kinds: Sequence[str],
        seed: int,
    ) -> None:  # fmt: skip
        self._server, self._meddler, self._workers = server, meddler, workers
        self._kinds, self._chance = kinds, random.Random(seed)
        self._clock = cycle(OFF_NS)
        self.drawn: Counter[str] = Counter()
        self.counts = meddler.counts

    async def run(self, until: float) -> None:
        deck: list[str] = []
        while time.monotonic() < until:
            if not deck:  # each kind comes before any comes again
                deck = self._chance.sample(self._kinds, len(self._kinds))
            kind = deck.pop()
            await getattr(self, kind)()
            self.drawn[kind] += 1
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
        await self._stop_client(PAUSE_S, "for a while")

    async def outlive_session(self) -> None:
        """It wakes in the middle of what is another's by then."""
        await self._stop_client(OUTLIVED_S, "past its session")

    async def _stop_client(self, how_long_s: tuple[float, float], what: str) -> None:
        worker = self._chance.choice(self._workers)
        if worker.process.returncode is None:
            await self._freeze(worker.process.pid, how_long_s)
            self.counts[f"client stopped {what}"] += 1

    async def _freeze(self, pid: int, how_long_s: tuple[float, float] = PAUSE_S) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._chance.uniform(*how_long_s))
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

    async def hold_offsets(self) -> None:
        self._hold(Api.TXN_OFFSET_COMMIT)

    async def hold_answer(self) -> None:
        api = self._chance.choice((Api.PRODUCE, Api.END_TXN, Api.TXN_OFFSET_COMMIT))
        self._meddler.hold_answer.setdefault(api, deque()).append(self._chance.uniform(*HOLD_S))

    async def overtake_produce(self) -> None:
        self._meddler.overtake[Api.PRODUCE] += 1

    async def overtake_end(self) -> None:
        self._meddler.overtake[Api.END_TXN] += 1

    async def jump(self) -> None:
        """The broker's clock, forward or back; counted when the broker has looked at it."""
        off_ns = next(self._clock)
        await self._jump(off_ns if off_ns != self._server.dial.off_ns else next(self._clock))

    async def jump_over(self) -> None:
        """All clients sleep while it goes forward: what they have open times out meanwhile."""
        if self._server.dial.off_ns:
            await self._jump(0)
        pids = [each.process.pid for each in self._workers if each.process.returncode is None]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            await self._jump(max(OFF_NS))
            await asyncio.sleep(TICK_S)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        self.counts["clock forward over sleeping clients"] += 1

    async def _jump(self, after: int) -> None:
        before = self._server.dial.off_ns
        await self._server.set_clock(after)
        way = "forward" if after > before else "back"
        far = abs(after - before) // MINUTE_NS
        self.counts[f"clock {way} by {'hours' if far >= 60 else 'minutes'}"] += 1
