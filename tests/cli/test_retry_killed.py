"""`dead-letters retry` killed while it appends: in the end each record is there once, in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import time
from pathlib import Path

import asyncpg

from ledgerstream.client import Client
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.retry import origin_of
from ledgerstream.stream.worker import Worker
from ledgerstream.wire import batches
from tests.cli.conftest import PROGRAM
from tests.stream.spending import spending_of

BAD = 1_000
KILLS = 2


async def test_a_retry_that_is_killed_is_taken_up_again(broker: str, home: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with EmbeddedPostgres.start(home) as server:
        async with await Client.connect(broker) as client:
            await client.create_topic("retried", partitions=1)
            producer = await client.producer()
            sends = [
                producer.send("retried", b"%d" % n + bytes(chance.randrange(1_000)), partition=0)
                for n in range(BAD)
            ]
            await asyncio.gather(*sends)
            await Worker(spending_of("retried"), client, server.url, until="end").run()
            command = [PROGRAM, "dead-letters", "retry", "--log", broker,
                       "--database", server.url]  # fmt: skip
            midway = 0
            for _ in range(KILLS):
                before = await _end(client)
                process = await asyncio.create_subprocess_exec(*command, cwd=home,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
                deadline = time.monotonic() + 60
                while process.returncode is None and await _end(client) == before:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0)
                await asyncio.sleep(chance.uniform(0, 0.03))
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                midway += await process.wait() != 0
                await _settle(server.url, client)
            assert midway > 0
            last = await asyncio.create_subprocess_exec(*command, "--json", cwd=home,
                stdout=subprocess.PIPE)  # fmt: skip
            said, _ = await last.communicate()
            assert last.returncode == 0, said
            json.loads(said or "[]")
            assert await _copies(client) == list(range(BAD))


async def _settle(database: str, client: Client) -> None:
    """Until nothing of a killed command is under way; its intent is as old as if we had waited for
    half a minute more."""
    connection = await asyncpg.connect(database)
    while await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ledgerstream command'"
    ):
        await asyncio.sleep(0.01)
    end = None
    while end != (end := await _end(client)):
        await asyncio.sleep(0.1)
    await connection.execute("UPDATE ls_dead_letters SET retry_at = retry_at - interval '1 min'")
    await connection.close()


async def _end(client: Client) -> int:
    (end,) = (await client.list_offsets("retried", {0: -1})).values()
    return end


async def _copies(client: Client) -> list[int]:
    """The origins of the retried records, in the order of the log."""
    found, at, end = [], 0, await _end(client)
    async with client.reader("retried", {0: 0}) as reader:
        while at < end:
            chunk = await reader.next()
            if chunk is None:
                continue
            at = chunk.next_offset
            for place, _ in batches.headers(chunk.data):
                origins = [origin_of(each) for each in batches.records(chunk.data, place)]
                found += [each.offset for each in origins if each is not None]
    return found
