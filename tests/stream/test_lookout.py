"""A worker without anything to commit learns that its claim was taken."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from ledgerstream.errors import Overtaken
from ledgerstream.stream.worker import Progress, Worker
from tests.stream.spending import Spending, payments
from tests.stream.test_worker import fetch, log_of, results

SOON_S = 5.0  # one look a second, on a busy machine


async def idle(log: object, database: str, **how: object) -> tuple[Worker, asyncio.Task[Progress]]:
    """A worker that has committed all that there is."""
    done = asyncio.Event()

    def note(progress: Progress) -> None:
        if sum(progress.position.values()) == sum(log.ends):  # type: ignore[attr-defined]
            done.set()

    worker = Worker(Spending, log, database, on_progress=note, **how)  # type: ignore[arg-type]
    run = asyncio.create_task(worker.run())
    await done.wait()
    return worker, run


async def test_an_idle_worker_that_was_overtaken_says_so_soon(database: str) -> None:
    log = log_of(payments(500), 2)
    _, first = await idle(log, database)
    await Worker(Spending, log, database, until="end").run()
    with pytest.raises(Overtaken, match="has taken over payments-0, payments-1: what was not"):
        async with asyncio.timeout(SOON_S):
            await first


async def test_what_was_not_taken_goes_on(database: str) -> None:
    log = log_of(payments(500), 2)
    worker, first = await idle(log, database)
    await Worker(Spending, log, database, partitions=[1], until="end").run()
    async with asyncio.timeout(SOON_S):
        while 1 in worker._partitions.active:
            await asyncio.sleep(0.02)
    before = log.ends[0]
    log.write(payments(1_000)[500:])
    async with asyncio.timeout(SOON_S):
        while worker.progress.position[0] < log.ends[0]:
            await asyncio.sleep(0.02)
    worker.stop()
    await first
    assert worker.progress.position[0] == log.ends[0] > before
    assert not worker.stopped
    # And the other one has everything of its partition.
    await Worker(Spending, log, database, partitions=[1], until="end").run()
    rows = await fetch(database, "SELECT next_offset FROM ls_progress ORDER BY partition")
    assert [row for (row,) in rows] == log.ends


async def test_a_lookout_that_cannot_look_harms_nobody(database: str) -> None:
    log = log_of(payments(500), 2)
    worker, first = await idle(log, database)
    admin = await asyncpg.connect(database)
    kill = """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE application_name LIKE '%lookout' AND datname = current_database()"""
    async with asyncio.timeout(SOON_S):
        while not await admin.fetchval(kill):
            await asyncio.sleep(0.02)
    log.write(payments(1_000)[500:])
    async with asyncio.timeout(SOON_S):
        while sum(worker.progress.position.values()) < sum(log.ends):
            await asyncio.sleep(0.02)
    # It looks again on a new connection.
    await Worker(Spending, log, database, until="end").run()
    await admin.close()
    with pytest.raises(Overtaken):
        async with asyncio.timeout(SOON_S):
            await first
    assert len((await results(database))[0]) > 0
