"""A TCP proxy that cuts connections and swallows answers as a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal, Self

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
# what becomes of some bytes: "mute" lets them through and cuts when an answer comes; "hang" keeps
# the connection open and silent from now on
Verdict = Literal["pass", "cut", "mute", "hang"]


class Proxy:
    """Stands before a server. `up` and `down` judge what passes; here all of it does."""

    def __init__(self, connect: Callable[[], Awaitable[Streams]]) -> None:
        self._connect = connect
        self._tasks: set[asyncio.Task[None]] = set()

    def up(self, data: bytes) -> Verdict:
        """Of bytes on their way to the server."""
        return "pass"

    def down(self, data: bytes) -> Verdict:
        """Of bytes on their way to the client."""
        return "pass"

    async def judged(self, data: bytes) -> Verdict:
        """As `up`, for those that do something else first."""
        return self.up(data)

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            above_reader, above_writer = await self._connect()
        except OSError:
            writer.transport.abort()
            return
        muted = False

        async def up() -> None:
            nonlocal muted
            while data := await reader.read(65_536):
                verdict = await self.judged(data)
                if verdict == "cut":
                    return
                if verdict == "hang":
                    await asyncio.Event().wait()
                muted = muted or verdict == "mute"
                above_writer.write(data)
                await above_writer.drain()

        async def down() -> None:
            while data := await above_reader.read(65_536):
                verdict = self.down(data)
                if verdict == "hang":
                    await asyncio.Event().wait()
                if muted or verdict != "pass":
                    return
                writer.write(data)
                await writer.drain()

        tasks = [asyncio.create_task(up()), asyncio.create_task(down())]
        self._tasks.update(tasks)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.difference_update(tasks)
            for each in (writer, above_writer):
                each.transport.abort()
