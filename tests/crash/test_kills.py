"""`kill -9` at random moments, of worker, broker and Postgres, and nothing is different.

Payments are written while a worker scores them (trades, while it makes bars of them); one of the
three is killed at a random moment,
again and again: while it starts, restores, streams, commits or takes a snapshot. In the end the log
holds each event once, and rows, offset and state digest are those of a run that nobody disturbed;
so do the events that it emits, in order.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import pytest
from pandas.testing import assert_frame_equal

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client
from ledgerstream.limits import LIMITS
from ledgerstream.stream.frames import event_frame
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.processor import Topic
from ledgerstream.stream.trial import drive
from ledgerstream.stream.worker import Worker
from tests.crash.subjects import ROOT, SUBJECTS, Subject

CHILD = Path(__file__).with_name("worker_child.py")
TORTURE = [pytest.mark.torture, pytest.mark.timeout(3_600)]


class Victims:
    """The broker and the worker, started again after each kill."""

    def __init__(
        self, subject: str, directory: Path, server: EmbeddedPostgres, database: str, port: int
    ) -> None:
        self.subject = subject
        self.directory = directory
        self.server = server
        self.database = database
        self.port = port
        self.said = (directory / "worker.log").open("wb")
        self.broker: Broker
        self.worker: asyncio.subprocess.Process

    async def start_broker(self) -> None:
        self.broker = await Broker.embedded(self.directory / "log", port=self.port)

    async def start_worker(self, until: str = "never") -> None:
        self.worker = await asyncio.create_subprocess_exec(
            sys.executable, str(CHILD), self.subject, self.broker.address, self.database, until,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(Path.home())},
            stdout=asyncio.subprocess.PIPE,
            stderr=self.said,
        )  # fmt: skip

    async def wait_for_progress(self) -> None:
        """Until the worker has committed a step."""
        assert self.worker.stdout is not None
        line = await self.worker.stdout.readline()
        assert line, f"the worker ended by itself: {self.words()}"

    def words(self) -> str:
        return (self.directory / "worker.log").read_text()[-4_000:]

    async def kill_broker(self) -> None:
        await self.broker.kill()
        await self.start_broker()

    async def kill_postgres(self) -> None:
        """Its keeper starts it again; what it had begun is undone, what it committed is there."""
        pid_file = self.server.home / "data" / "postmaster.pid"
        pid = int(pid_file.read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while True:
                try:
                    connection = await asyncpg.connect(self.server.url)
                except (OSError, asyncpg.PostgresError):
                    await asyncio.sleep(0.02)
                else:
                    await connection.close()
                    break
        assert int(pid_file.read_text().split()[0]) != pid

    async def kill_worker(self) -> None:
        assert self.worker.returncode is None, f"the worker ended by itself: {self.words()}"
        self.worker.kill()
        await self.worker.wait()
        await self.start_worker()


async def outcome(database: str, subject: Subject) -> list[tuple[Any, ...]]:
    """Counts and fingerprints of all results and dead letters, and the state's digest."""
    connection = await asyncpg.connect(database)
    try:
        found = [tuple(await connection.fetchrow(query)) for query in subject.queries]
        found += [
            tuple(row)
            for row in await connection.fetch("SELECT next_offset, digest FROM ls_progress")
        ]
        dead = await connection.fetch('SELECT "offset", error FROM ls_dead_letters ORDER BY 1')
        found += [tuple(row) for row in dead]
    finally:
        await connection.close()
    return found


async def claims(database: str) -> int:
    """How often a worker got as far as claiming."""
    connection = await asyncpg.connect(database)
    count: int = await connection.fetchval("SELECT owner_epoch FROM ls_progress")
    await connection.close()
    return count


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def directory() -> Iterator[Path]:
    # Not below pytest's own: under root the database is another user, who may not enter there.
    with tempfile.TemporaryDirectory(prefix="ledgerstream-") as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kills", "count"),
    [
        ("payments", 10, 100_000),
        ("trades", 4, 40_000),
        ("purses", 4, 40_000),
        ("reviews", 6, 60_000),
        pytest.param("payments", 100, 600_000, marks=TORTURE),
        pytest.param("trades", 100, 600_000, marks=TORTURE),
        pytest.param("purses", 100, 600_000, marks=TORTURE),
        pytest.param("reviews", 200, 1_200_000, marks=TORTURE),
    ],
)
async def test_kills_change_nothing(directory: Path, name: str, kills: int, count: int) -> None:
    subject = SUBJECTS[name]
    source = subject.processor.source
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    rows = subject.events(count)
    with EmbeddedPostgres.start(directory) as server:
        disturbed = await created(server, "disturbed")
        victims = Victims(name, directory, server, disturbed, free_port())
        killed = dict.fromkeys(("broker", "postgres", "worker"), 0)
        await victims.start_broker()
        patient = dataclasses.replace(LIMITS, connect_ms_max=60_000)
        async with await Client.connect(victims.broker.address, limits=patient) as client:
            for topic in (source, *subject.processor.outputs):
                await client.create_topic(topic.name, partitions=1)
            await victims.start_worker()
            for part in np.array_split(rows, kills):
                writing = asyncio.create_task(write(client, source, part))
                if chance.random() < 0.7:
                    await victims.wait_for_progress()
                    await asyncio.sleep(chance.uniform(0, 0.2))
                else:
                    await asyncio.sleep(chance.uniform(0, 1.5))  # often while it still starts
                (whom,) = chance.choices(list(killed), [3, 3, 4])
                killed[whom] += 1
                await getattr(victims, f"kill_{whom}")()
                await writing
            victims.worker.terminate()
            await victims.worker.wait()
            await victims.start_worker("end")
            assert await victims.worker.wait() == 0, victims.words()

            found = await client.read(source.name, source.event, key=source.key)
            np.testing.assert_array_equal(found[0].rows, rows)
            for topic in subject.processor.outputs:
                sent = await client.read(topic.name, topic.event, key=topic.key)
                emitted = drive(subject.processor, rows).tables[topic]
                assert_frame_equal(event_frame(topic.event, sent[0].rows), emitted)
            undisturbed = await created(server, "undisturbed")
            await Worker(subject.processor, client, undisturbed, until="end").run()
        await victims.broker.stop()
        victims.said.close()
        print(f"{await claims(disturbed)} claims, killed {killed}")
        expected = await outcome(undisturbed, subject)
        assert all(each[0] for each in expected[: len(subject.queries)])
        assert await outcome(disturbed, subject) == expected


async def write(client: Client, source: Topic, rows: np.ndarray) -> None:
    for part in np.array_split(rows, 20):
        await client.write(source.name, part, event=source.event, key=source.key)


async def created(server: EmbeddedPostgres, name: str) -> str:
    connection = await asyncpg.connect(server.url)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    return server.url.replace("/ledgerstream?", f"/{name}?")
