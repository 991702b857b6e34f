"""Dead letters appended again: once and in order, whoever is killed in between."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client
from ledgerstream.client.producer import Producer
from ledgerstream.errors import LedgerStreamError
from ledgerstream.limits import LIMITS
from ledgerstream.stream import retry as retry_module
from ledgerstream.stream.retry import Place, Retried, origin_of, retry
from ledgerstream.stream.worker import Worker
from ledgerstream.wire import batches
from tests.stream.spending import Payment, Spending, payments

BAD = 5


class Killed(BaseException):
    pass


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with await Broker.embedded(tmp_path / "log") as broker:
        async with await Client.connect(broker.address) as client:
            yield client


@pytest.fixture
async def connection(client: Client, database: str) -> AsyncIterator[asyncpg.Connection]:
    """A database in which `Spending` has met BAD records that are no payments."""
    await client.create_topic("payments", partitions=1)
    await client.write("payments", payments(10), event=Payment, key="customer")
    producer = await client.producer()
    for number in range(BAD):
        await producer.send(
            "payments", b"bad %d" % number, key=b"k", partition=0, timestamp=1_000 + number,
            headers=[("trace", b"7")],
        )  # fmt: skip
    await Worker(Spending, client, database, until="end").run()
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = dataclasses.replace(LIMITS, request_ms_max=50)
    monkeypatch.setattr(retry_module, "LIMITS", limits)


async def copies(client: Client) -> list[tuple[int, bytes | None, int]]:
    """(origin's offset, value, timestamp) of each retried record in the log, in its order."""
    found = []
    (end,) = (await client.list_offsets("payments", {0: -1})).values()
    async with client.reader("payments", {0: 0}) as reader:
        at = 0
        while at < end:
            chunk = await reader.next()
            if chunk is None:
                continue
            at = chunk.next_offset
            for place, _ in batches.headers(chunk.data):
                for record in batches.records(chunk.data, place):
                    origin = origin_of(record)
                    if origin is not None:
                        assert record.key == b"k"
                        assert record.headers[0] == ("trace", b"7")
                        found.append((origin.offset, record.value, record.timestamp))
    return found


WHOLE = [(10 + n, b"bad %d" % n, 1_000 + n) for n in range(BAD)]


async def test_each_is_appended_once_and_in_order(
    client: Client, connection: asyncpg.Connection, database: str
) -> None:
    done = await retry(connection, client)
    assert done == [Retried(Place("payments", 0, 10 + n), 15 + n, False) for n in range(BAD)]
    assert await retry(connection, client) == []
    assert await copies(client) == WHOLE
    # They are no payments still: each is a dead letter of its own, at its new place.
    await Worker(Spending, client, database, until="end").run()
    rows = await connection.fetch('SELECT "offset", retried_offset FROM ls_dead ORDER BY 1')
    assert [tuple(row) for row in rows] == [
        *((10 + n, 15 + n) for n in range(BAD)), *((15 + n, None) for n in range(BAD)),
    ]  # fmt: skip


async def test_only_what_was_asked_for_is_appended(
    client: Client, connection: asyncpg.Connection
) -> None:
    assert await retry(connection, client, processor="Other") == []
    (one,) = await retry(connection, client, places=[Place.parse("payments-0:12")])
    assert one.origin.offset == 12
    assert len(await retry(connection, client, processor="Spending")) == BAD - 1


async def test_killed_between_append_and_mark(
    client: Client, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(retry_module._Partition, "_mark", killed)
        with pytest.raises(Killed):
            await retry(connection, client)
    assert len(await copies(client)) == BAD
    done = await retry(connection, client)
    assert [(each.origin.offset, each.offset, each.found) for each in done] == [
        (10 + n, 15 + n, True) for n in range(BAD)
    ]
    assert await copies(client) == WHOLE
    assert await retry(connection, client) == []


@pytest.mark.parametrize("sent", range(BAD))
async def test_killed_in_the_middle_of_appending(
    client: Client, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    send, calls = Producer.send, 0

    async def killed_later(self: Producer, *arguments: Any, **options: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > sent:
            await asyncio.sleep(60)  # cut off below
        return await send(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Producer, "send", killed_later)
        first = asyncio.create_task(retry(connection, client))
        async with asyncio.timeout(30):
            while len(await copies(client)) < sent or calls < BAD:
                await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    done = await retry(connection, client)
    assert sum(each.found for each in done) == sent
    assert len(done) == BAD
    assert await copies(client) == WHOLE


async def test_two_retries_exclude_each_other(
    client: Client, connection: asyncpg.Connection, database: str
) -> None:
    other = await asyncpg.connect(database)
    await other.execute("SELECT pg_advisory_lock($1)", retry_module._LOCK)
    with pytest.raises(LedgerStreamError, match="Another retry is under way"):
        await retry(connection, client)
    await other.close()


class Second(Spending):
    """Another processor of the same topic."""


async def test_what_another_processor_has_counted_is_refused(
    client: Client, connection: asyncpg.Connection, database: str
) -> None:
    await Worker(Second, client, database, until="end").run()
    assert len(await retry(connection, client, places=[Place("payments", 0, 10)])) == 1
    await connection.execute("DELETE FROM ls_dead_letters WHERE processor = 'Second'")
    with pytest.raises(LedgerStreamError, match=r"Second reads 'payments' too, and payments-0:11"):
        await retry(connection, client)
    assert len(await retry(connection, client, even_if_counted=True)) == BAD - 1


@pytest.mark.parametrize(
    "text",
    ["payments", "payments-0", "payments-x:1", ":1", "-0:1", f"t-{2**31}:1", f"t-1:{2**63}"],
)
def test_what_names_no_place_is_a_sentence(text: str) -> None:
    with pytest.raises(LedgerStreamError, match="names no dead letter"):
        Place.parse(text)
