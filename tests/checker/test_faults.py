"""The proxy does to requests and answers what it says."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from ledgerstream.wire.versions import Api
from tests.checker.faults import Meddler


class Fake:
    """A broker that answers each request with its correlation id, and remembers them."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                frame = await reader.readexactly(int.from_bytes(await reader.readexactly(4)))
                self.heard.append(int.from_bytes(frame[4:8]))
                writer.write(struct.pack(">i", 4) + frame[4:8])
        except asyncio.IncompleteReadError:
            writer.close()


class Caller:
    """One connection of a client."""

    def __init__(self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self._reader, self._writer = streams

    def ask(self, api: Api, correlation_id: int, client: str, version: int = 1) -> None:
        name, txn_id = client.encode(), b"txn"
        body = struct.pack(f">hhih{len(name)}sh3s", api, version, correlation_id, len(name), name,
                           len(txn_id), txn_id)  # fmt: skip
        self._writer.write(struct.pack(">i", len(body)) + body)

    async def answer(self) -> int:
        async with asyncio.timeout(10):
            frame = await self._reader.readexactly(8)
        return int.from_bytes(frame[4:])

    async def hang_up(self) -> None:
        self._writer.transport.abort()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
async def meddler(fake: Fake) -> AsyncIterator[Meddler]:
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    async with Meddler(server.sockets[0].getsockname()[1]) as meddler:
        yield meddler
    server.close()
    await server.wait_closed()


@pytest.fixture
async def callers(meddler: Meddler) -> AsyncIterator[list[Caller]]:
    """Three connections."""
    found = [Caller(await asyncio.open_connection("127.0.0.1", meddler.port)) for _ in range(3)]
    yield found
    for each in found:
        await each.hang_up()


async def wait_for(meddler: Meddler, what: str) -> None:
    async with asyncio.timeout(10):
        while not meddler.counts[what]:
            await asyncio.sleep(0.005)


async def test_a_later_request_of_another_connection_overtakes(
    meddler: Meddler, fake: Fake, callers: list[Caller]
) -> None:
    first, second, stranger = callers
    meddler.overtake[Api.PRODUCE] = 1
    first.ask(Api.PRODUCE, 1, "c")
    first.ask(Api.FETCH, 2, "c")  # behind it, as on any connection
    stranger.ask(Api.PRODUCE, 3, "d")
    assert await stranger.answer() == 3
    second.ask(Api.FETCH, 4, "c")
    assert await second.answer() == 4
    second.ask(Api.END_TXN, 5, "c")
    assert [await second.answer(), await first.answer(), await first.answer()] == [5, 1, 2]
    assert fake.heard == [3, 4, 5, 1, 2]
    assert meddler.counts == {"PRODUCE overtaken by END_TXN": 1}


async def test_a_request_outlives_its_connection(
    meddler: Meddler, fake: Fake, callers: list[Caller]
) -> None:
    caller = callers[0]
    meddler.hold[Api.END_TXN] = deque([0.2])
    caller.ask(Api.END_TXN, 1, "c")
    await wait_for(meddler, "held END_TXN")
    await caller.hang_up()
    await wait_for(meddler, "late END_TXN")
    async with asyncio.timeout(10):
        while fake.heard != [1]:
            await asyncio.sleep(0.005)
    assert meddler.late_ids == {"txn"}


async def test_an_answer_comes_when_its_client_has_gone(
    meddler: Meddler, fake: Fake, callers: list[Caller]
) -> None:
    caller = callers[0]
    meddler.hold_answer[Api.PRODUCE] = deque([0.2])
    caller.ask(Api.PRODUCE, 1, "c")
    await wait_for(meddler, "held answer PRODUCE")
    await caller.hang_up()
    await wait_for(meddler, "late answer PRODUCE")
    assert fake.heard == [1]


async def test_answers_of_a_connection_keep_their_order(
    meddler: Meddler, callers: list[Caller]
) -> None:
    caller = callers[0]
    meddler.hold_answer[Api.PRODUCE] = deque([0.1])
    caller.ask(Api.PRODUCE, 1, "c")
    caller.ask(Api.FETCH, 2, "c")
    assert [await caller.answer(), await caller.answer()] == [1, 2]
    assert meddler.counts == {"held answer PRODUCE": 1, "late answer PRODUCE": 0}
