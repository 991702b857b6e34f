"""The embedded server: shared, and stopped with the last of its users, killed ones included."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pytest

from ledgerstream.stream.keeper import STARTS_MAX, came_up, running_pid
from ledgerstream.stream.postgres import EmbeddedPostgres

PATIENCE_S = 30

USER = """
import sys
from pathlib import Path
from ledgerstream.stream.postgres import EmbeddedPostgres
server = EmbeddedPostgres.start(Path(sys.argv[1]))
print(server.url, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ledgerstream-") as name:
        yield Path(name)


def postmaster(directory: Path) -> int | None:
    try:
        return int((directory / "postgres/data/postmaster.pid").read_text().split()[0])
    except (FileNotFoundError, IndexError):  # not there, or not written yet
        return None


def wait_until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def user(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", USER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("postgresql://")
    return process


async def test_users_share_a_server_and_the_last_stops_it(directory: Path) -> None:
    first = EmbeddedPostgres.start(directory)
    second = EmbeddedPostgres.start(directory)
    assert first.url == second.url
    first.close(wait=True)
    connection = await asyncpg.connect(second.url)
    assert await connection.fetchval("SHOW fsync") == "on"
    assert await connection.fetchval("SHOW synchronous_commit") == "on"
    assert await connection.fetchval("SHOW listen_addresses") == ""
    await connection.execute("CREATE TABLE kept (n int)")
    await connection.close()
    second.close(wait=True)
    assert postmaster(directory) is None
    with EmbeddedPostgres.start(directory) as third:
        connection = await asyncpg.connect(third.url)
        assert await connection.fetchval("SELECT count(*) FROM kept") == 0
        await connection.close()


def test_a_user_that_is_killed_counts_as_gone(directory: Path) -> None:
    killed, other = user(directory), user(directory)
    pid = postmaster(directory)
    assert pid is not None
    killed.kill()
    killed.communicate()
    assert postmaster(directory) == pid
    other.kill()
    other.communicate()
    wait_until(lambda: postmaster(directory) is None)


async def test_a_server_that_is_killed_is_started_again(directory: Path) -> None:
    with EmbeddedPostgres.start(directory) as server:
        pid = postmaster(directory)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: postmaster(directory) not in (pid, None))

        async def connect() -> asyncpg.Connection:
            while True:
                try:
                    return await asyncpg.connect(server.url)
                except (OSError, asyncpg.PostgresError):
                    await asyncio.sleep(0.02)

        connection = await connect()
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()


def test_another_server_under_the_same_number_is_left_alone(directory: Path) -> None:
    """Numbers come again: what is adopted is also stopped."""
    with EmbeddedPostgres.start(directory) as server:
        assert running_pid(server.home) == postmaster(directory)
        other = directory / "other"
        (other / "data").mkdir(parents=True)
        pid_file = server.home / "data" / "postmaster.pid"
        (other / "data" / "postmaster.pid").write_text(pid_file.read_text())
        assert running_pid(other) is None


def test_a_server_that_is_killed_again_and_again_comes_back(directory: Path) -> None:
    """More often than it may fail to start."""
    with EmbeddedPostgres.start(directory) as server:
        killed: set[int | None] = {None}
        for _ in range(STARTS_MAX + 2):
            wait_until(lambda: postmaster(directory) not in killed)
            pid = postmaster(directory)
            assert pid is not None
            wait_until(lambda pid=pid: came_up(server.home, pid))  # type: ignore[misc]
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        wait_until(lambda: postmaster(directory) not in killed)


async def test_a_path_too_long_for_a_socket_works(directory: Path) -> None:
    deep = directory / ("long" * 20) / ("name" * 10)
    with EmbeddedPostgres.start(deep) as server:
        connection = await asyncpg.connect(server.url)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
