"""A session that ends, at a broker that is strict about what comes when (KIP-368)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ledgerstream.client import Security
from ledgerstream.client.access import Access
from ledgerstream.client.connection import CLIENT_VERSIONS, Connection
from ledgerstream.errors import SecurityError
from ledgerstream.limits import LIMITS
from ledgerstream.wire import messages
from ledgerstream.wire.versions import Api

SESSION_MS = 100
SECURITY = Security(
    security_protocol="SASL_PLAINTEXT",
    sasl_mechanism="PLAIN",
    sasl_username="alice",
    sasl_password="secret",
)
COORDINATOR = {"key_type": 0, "coordinator_keys": ["g"]}


class Strict:
    """Answers one request after the other, and notes what comes at the wrong time.

    slow_ms: for the next FindCoordinator; refuse: from that proof on no password is right.
    """

    def __init__(self) -> None:
        self.seen: Counter[Api] = Counter()
        self.wrong: list[Api] = []
        self.slow_ms = 0
        self.refuse = 1_000
        self.known: set[asyncio.StreamWriter] = set()
        self._proving: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                key, version, correlation_id = messages.peek_api(await reader.readexactly(size))
                answer = await self._answer(Api(key), writer)
                writer.write(messages.write_response(key, version, correlation_id, answer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, api: Api, who: asyncio.StreamWriter) -> dict[str, Any]:
        self.seen[api] += 1
        if api is Api.API_VERSIONS:
            spoken = [
                {"api_key": each, "min_version": low, "max_version": high}
                for each, (low, high) in CLIENT_VERSIONS.items()
            ]
            return {"error_code": 0, "api_keys": spoken, "throttle_time": 0}
        if api is Api.SASL_HANDSHAKE:
            self._proving.add(who)
            return {"error_code": 0, "mechanisms": ["PLAIN"]}
        if api is Api.SASL_AUTHENTICATE:
            if who not in self._proving:
                self.wrong.append(api)
            self._proving.discard(who)
            self.known.add(who)
            code = 58 if self.seen[api] >= self.refuse else 0
            return {"error_code": code, "error_message": None, "auth_bytes": b"",
                    "session_lifetime": SESSION_MS}  # fmt: skip
        if who in self._proving or who not in self.known:
            self.wrong.append(api)
        slow_ms, self.slow_ms = self.slow_ms, 0
        await asyncio.sleep(slow_ms / 1000)
        return {"throttle_time": 0, "coordinators": []}


async def held(connection: Connection) -> None:
    """Its renewal is due: what is asked from now on is held."""
    async with asyncio.timeout(10):
        while connection._held is None:
            await asyncio.sleep(0.001)


@pytest.fixture
async def broker() -> AsyncIterator[tuple[Strict, Callable[[], Any]]]:
    """It, and what opens a connection to it."""
    strict = Strict()
    async with await asyncio.start_server(strict.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        access = Access(SECURITY)
        yield strict, lambda: Connection.open("127.0.0.1", port, "test", LIMITS, access)


async def test_requests_are_held_while_a_session_is_renewed(
    broker: tuple[Strict, Callable[[], Any]],
) -> None:
    strict, connect = broker
    connection = await connect()
    count = 0

    async def ask() -> None:
        nonlocal count
        while strict.seen[Api.SASL_AUTHENTICATE] < 5:
            await connection.call(Api.FIND_COORDINATOR, COORDINATOR)
            count += 1

    async with asyncio.timeout(20), asyncio.TaskGroup() as asking:
        for _ in range(5):
            asking.create_task(ask())
    connection.close()
    assert strict.wrong == []
    assert count == strict.seen[Api.FIND_COORDINATOR] > 0
    assert strict.seen[Api.API_VERSIONS] == 1  # one connection


async def test_an_answer_that_takes_longer_than_the_session_is_waited_for(
    broker: tuple[Strict, Callable[[], Any]],
) -> None:
    strict, connect = broker
    connection = await connect()
    strict.slow_ms = 3 * SESSION_MS
    slow = asyncio.create_task(connection.call(Api.FIND_COORDINATOR, COORDINATOR))
    await held(connection)
    given_up = asyncio.create_task(connection.call(Api.FIND_COORDINATOR, COORDINATOR))
    behind = asyncio.create_task(connection.call(Api.FIND_COORDINATOR, COORDINATOR))
    await asyncio.sleep(0)
    given_up.cancel()
    await slow
    assert strict.seen[Api.SASL_HANDSHAKE] == 1
    await behind
    assert strict.seen[Api.SASL_HANDSHAKE] >= 2
    assert strict.seen[Api.FIND_COORDINATOR] == 2  # what was given up is not sent
    assert strict.wrong == []
    connection.close()


async def test_who_is_refused_at_a_renewal_loses_the_connection_and_is_told_at_the_next(
    broker: tuple[Strict, Callable[[], Any]],
) -> None:
    strict, connect = broker
    connection = await connect()
    strict.refuse = 2
    strict.slow_ms = 2 * SESSION_MS
    sent = asyncio.create_task(connection.call(Api.FIND_COORDINATOR, COORDINATOR))
    await held(connection)
    behind = asyncio.create_task(connection.call(Api.FIND_COORDINATOR, COORDINATOR))
    await sent
    with pytest.raises(ConnectionError, match="does not take 'alice' by PLAIN"):
        await behind
    assert not connection.is_open
    with pytest.raises(ConnectionError):
        await connection.call(Api.FIND_COORDINATOR, COORDINATOR)
    with pytest.raises(SecurityError, match="does not take 'alice' by PLAIN"):
        await connect()


async def test_a_connection_that_is_closed_renews_nothing(
    broker: tuple[Strict, Callable[[], Any]],
) -> None:
    _, connect = broker
    connection = await connect()
    renewal = connection._renewal
    connection.close()
    await asyncio.wait([renewal], timeout=10)
    assert renewal.cancelled()


async def test_an_alert_of_tls_is_told_from_a_frame() -> None:
    async def alert(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"\x15\x03\x03\x00\x02\x02\x50")
        writer.close()

    async with await asyncio.start_server(alert, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(SecurityError, match="speaks TLS, and we do not"):
            await Connection.open("127.0.0.1", port, "test", LIMITS)
