"""A broker whose wall clock jumps by hours: `test_runs.py` says what must hold, here is each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ledgerstream.client import Client
from ledgerstream.client.membership import Listener, Places
from ledgerstream.errors import KafkaError
from tests.checker.clocked import SESSION_MS, Dial
from tests.checker.faults import MINUTE_NS, Server

HOUR_NS = 60 * MINUTE_NS

pytestmark = pytest.mark.slow


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    await server.start()
    yield server
    await server.kill()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with await Client.connect(server.address) as connected:
        await connected.create_topic("t", 1)
        yield connected


async def timed_out(server: Server, times: int = 1) -> None:
    async with asyncio.timeout(10):
        while server.said("transaction timed out") < times:
            await asyncio.sleep(0.02)


async def test_a_jump_ahead_ends_open_transactions_and_nothing_else(
    server: Server, client: Client
) -> None:
    early, other = await client.transactional("early"), await client.transactional("other")
    async with early.transaction():
        await early.send("t", b"kept", partition=0)
    await other.begin()
    await other.send("t", b"aborted", partition=0)
    await server.set_clock(10 * HOUR_NS)
    await timed_out(server)
    with pytest.raises(KafkaError, match="INVALID_TXN_STATE"):  # as Kafka has it under V2
        await other.commit()
    async with early.transaction():
        await early.send("t", b"after", partition=0)
    async with client.reader("t", {0: 0}) as reader:
        data = b""
        while b"after" not in data:
            chunk = await reader.next()
            data += chunk.data if chunk is not None else b""
    assert b"kept" in data
    assert await client.list_offsets("t", {0: -1}) == await client.list_offsets(
        "t", {0: -1}, committed=False
    )


async def test_a_clock_that_was_ahead_keeps_no_transaction_open(
    server: Server, client: Client
) -> None:
    await server.set_clock(10 * HOUR_NS)
    await asyncio.sleep(1.5)  # the broker looks at its transactions once a second
    await server.set_clock(0)
    silent = await client.transactional("silent", timeout_ms=1_000)
    await silent.begin()
    began = time.monotonic()
    await silent.send("t", b"aborted", partition=0)
    await timed_out(server)
    assert time.monotonic() - began > 0.9


async def test_a_jump_ends_no_membership(server: Server, client: Client) -> None:
    class Told(Listener):
        lost_count = 0

        async def lost(self, places: Places) -> None:
            self.lost_count += 1

    told = Told()
    async with client.group("g", ["t"], listener=told) as group:
        await group.wait_settled()
        member = group.metadata
        for off_ns in (10 * HOUR_NS, -10 * HOUR_NS, 0):
            await server.set_clock(off_ns)
            await asyncio.sleep(SESSION_MS / 2_000)
        assert (group.metadata, told.lost_count) == (member, 0)
        await group.commit({("t", 0): 0})


def test_a_dial_says_what_was_seen(tmp_path: Path) -> None:
    mine, theirs = Dial(tmp_path / "clock"), Dial(tmp_path / "clock")
    mine.set(-5)
    assert (mine.off_ns, mine.seen_ns) == (-5, 0)
    assert theirs.look() == -5
    assert mine.seen_ns == -5
