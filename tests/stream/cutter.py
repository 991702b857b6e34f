"""A proxy before Postgres that cuts the connection around a step's COMMIT."""

from __future__ import annotations

import asyncio
from typing import Literal
from urllib.parse import parse_qs, urlsplit

_COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"


class Cutter:
    """`cut` = "before": the COMMIT never reaches Postgres; "after": its answer never comes back.

    It cuts at the `at`-th COMMIT that passes, once.
    """

    def __init__(self, database: str, cut: Literal["before", "after"], at: int = 1) -> None:
        parts = urlsplit(database)
        self._socket = parse_qs(parts.query)["host"][0] + "/.s.PGSQL.5432"
        self._name = parts.path
        self._cut = cut
        self._left = at
        self.cuts = 0

    @property
    def url(self) -> str:
        port = self._server.sockets[0].getsockname()[1]
        return f"postgresql://postgres@127.0.0.1:{port}{self._name}?sslmode=disable"

    async def __aenter__(self) -> Cutter:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        above_reader, above_writer = await asyncio.open_unix_connection(self._socket)
        muted = asyncio.Event()

        async def up() -> None:
            while data := await reader.read(65_536):
                if _COMMIT in data:
                    self._left -= 1
                    if self._left == 0:
                        self.cuts += 1
                        if self._cut == "before":
                            return
                        muted.set()
                above_writer.write(data)
                await above_writer.drain()

        async def down() -> None:
            while data := await above_reader.read(65_536):
                if muted.is_set():  # Postgres has answered the COMMIT; nobody hears it
                    return
                writer.write(data)
                await writer.drain()

        tasks = [asyncio.create_task(up()), asyncio.create_task(down())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for each in (writer, above_writer):
                each.transport.abort()
