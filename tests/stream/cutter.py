"""A proxy before Postgres that cuts the connection around a step's COMMIT."""

from __future__ import annotations

import asyncio
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from tests.peers.proxy import Proxy, Verdict

_COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"


class Cutter(Proxy):
    """`cut` = "before": the COMMIT never reaches Postgres; "after": its answer never comes back.

    It cuts at the `at`-th COMMIT that passes, once.
    """

    def __init__(self, database: str, cut: Literal["before", "after"], at: int = 1) -> None:
        parts = urlsplit(database)
        socket = parse_qs(parts.query)["host"][0] + "/.s.PGSQL.5432"
        super().__init__(lambda: asyncio.open_unix_connection(socket))
        self._name = parts.path
        self._verdict: Verdict = "cut" if cut == "before" else "mute"
        self._left = at
        self.cuts = 0

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}{self._name}?sslmode=disable"

    def up(self, data: bytes) -> Verdict:
        if _COMMIT not in data:
            return "pass"
        self._left -= 1
        if self._left:
            return "pass"
        self.cuts += 1
        return self._verdict
