"""Several worker processes of one processor: `ledgerstream run … --workers N`.

Partition p belongs to worker p mod N, for good (of several topics: one goes on where the other
ends). Each worker is a process of this program that gets
its task as a line of JSON on stdin and answers with its progress, line by line, on stdout; when its
stdin ends, because its parent is gone, it stops at the end of a step. A worker that dies is started
again: its claim settles what became of its last step.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ledgerstream.cli import options, show
from ledgerstream.limits import LIMITS

if TYPE_CHECKING:
    from ledgerstream.stream.worker import Progress

TELL_S = 0.1  # between two lines of progress
LINE_BYTES_MAX = 16 * 1024 * 1024  # a line names each partition of a worker
TOLD_TO_STOP = (0, 130, -signal.SIGTERM)  # the latter two while it had only begun to start
CRASHED = 1  # exit code of an error that starting again may mend, as for one killed by a signal


@dataclass(frozen=True)
class Task:
    """What a worker process does. `place` is module:Class."""

    place: str
    log: str
    database: str
    partitions: dict[str, list[int]]  # by topic
    until: Literal["end", "restored"] | None
    accept_new_code: bool
    # how to be let in is read again there: no secret goes from process to process
    secured: bool = False
    log_config: str | None = None


def shares(partitions: Mapping[str, int], workers: int) -> list[dict[str, list[int]]]:
    """The partitions of each worker, by topic; none is without any."""
    places = [(topic, at) for topic, count in partitions.items() for at in range(count)]
    count = min(len(places), workers)
    found: list[dict[str, list[int]]] = [{} for _ in range(count)]
    for number, (topic, at) in enumerate(places):
        found[number % count].setdefault(topic, []).append(at)
    return found


class Fleet:
    """Runs a worker process for each task.

    progress:  the sum of all; of a worker that was killed, what it had told.
    on_tell:   called with a worker's number and process id when it has told its progress.
    """

    def __init__(
        self,
        processor: str,
        tasks: Sequence[Task],
        *,
        say: Callable[[str], None] = lambda _: None,
        on_tell: Callable[[int, int], None] = lambda worker, pid: None,
    ) -> None:
        from ledgerstream.stream.worker import Progress

        self.progress = Progress(processor)
        self._tasks = tasks
        self._say = say
        self._on_tell = on_tell
        self._stopping = asyncio.Event()
        self._running: dict[int, asyncio.subprocess.Process] = {}
        self._told: dict[tuple[int, int], Progress] = {}  # of each life of each worker

    def stop(self) -> None:
        """Each worker stops at the end of its step, with a snapshot."""
        self._stopping.set()
        for process in self._running.values():
            _terminate(process)

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT call `stop`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    async def run(self) -> int:
        """The worst exit code, once all have ended."""
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(self._keep(number)) for number in range(len(self._tasks))]
        return max(worker.result() for worker in workers)

    async def _keep(self, number: int) -> int:
        """One worker, started again when it dies; its exit code."""
        from ledgerstream.stream.retries import pauses

        deaths, pause = 0, pauses()
        life = 0
        while True:
            code = await self._live(number, life)
            if self._stopping.is_set() and code in TOLD_TO_STOP:
                return 0
            if code in (0, *range(CRASHED + 1, 256)) or self._stopping.is_set():
                return code if code >= 0 else CRASHED
            if self._told.get((number, life)) is not None:
                deaths, pause = 0, pauses()  # it had got somewhere
            deaths, life = deaths + 1, life + 1
            name = self._name(number)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed"
            if deaths > LIMITS.worker_deaths_max:
                self._say(f"{name} {how}, again and again: it is given up.")
                return CRASHED
            self._say(f"{name} {how} and is started again.")
            with suppress(TimeoutError):
                async with asyncio.timeout(next(pause)):
                    await self._stopping.wait()

    async def _live(self, number: int, life: int) -> int:
        """One life of a worker; its return code, negative for a signal."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ledgerstream.cli.main", "fleet-worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE_BYTES_MAX,
        )  # fmt: skip
        self._running[number] = process
        assert process.stdin is not None and process.stdout is not None
        try:
            if self._stopping.is_set():
                _terminate(process)
            process.stdin.write(json.dumps(asdict(self._tasks[number])).encode() + b"\n")
            async for line in process.stdout:
                self._told[number, life] = _progress(json.loads(line))
                self._sum()
                self._on_tell(number, process.pid)
            return await process.wait()
        finally:
            del self._running[number]
            if process.returncode is None:  # we are cancelled, or its words make no sense
                process.kill()
                await process.wait()

    def _sum(self) -> None:
        from ledgerstream.stream.several import add_up

        add_up(self.progress, self._told.values())

    def _name(self, number: int) -> str:
        share = self._tasks[number].partitions
        places = [f"{topic}-{at}" for topic, partitions in share.items() for at in partitions]
        return f"worker {number} ({', '.join(places)})"


def _progress(told: dict[str, Any]) -> Progress:
    from ledgerstream.stream.worker import Progress

    for name in ("position", "lag"):
        told[name] = {
            int(place) if place.isdigit() else place: value for place, value in told[name].items()
        }
    return Progress(**told)


def _terminate(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()


def fleet_worker() -> None:
    """One worker process of `run --workers`; its task comes on stdin."""
    from ledgerstream.cli.logconfig import load
    from ledgerstream.cli.session import run_async
    from ledgerstream.client import Client
    from ledgerstream.stream.processor import Processor
    from ledgerstream.stream.several import Workers

    task = Task(**json.loads(sys.stdin.readline()))
    kind = options.load(task.place, Processor)
    told = 0.0

    def tell(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_S:
            told = time.monotonic()
            print(json.dumps(asdict(progress)), flush=True)

    async def work() -> None:
        security = load(task.log_config) if task.secured else None
        async with await Client.connect(task.log, security=security) as client:
            worker = Workers(
                kind, client, task.database, partitions=task.partitions, until=task.until,
                accept_new_code=task.accept_new_code, on_progress=tell, say=show.note,
            )  # fmt: skip
            worker.stop_on_signals()
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _gone, worker.stop)
            try:
                await worker.run()
            finally:
                asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
                with suppress(BrokenPipeError):
                    print(json.dumps(asdict(worker.progress)), flush=True)

    run_async(work())


def _gone(stop: Callable[[], None]) -> None:
    """Nothing comes on stdin after the task: what there is to read is its end."""
    asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
    stop()
