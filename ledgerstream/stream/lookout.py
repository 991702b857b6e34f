"""A worker that has nothing to commit would not learn that its claim was taken: look now and then.

Only a hint, on a connection of its own: what decides is the compare-and-set of each step. Where
looking fails the stream goes on, and it is tried again.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Collection

import asyncpg
import structlog

from ledgerstream.errors import LedgerStreamError
from ledgerstream.limits import LIMITS
from ledgerstream.stream.connect import connect

log = structlog.get_logger()


class Lookout:
    """Of one processor's claims.

    owners:  our names, of all connections on which we have claimed.
    held:    the partitions that we hold.
    """

    def __init__(
        self,
        url: str,
        processor: str,
        topic: str,
        owners: Callable[[], Collection[uuid.UUID]],
        held: Callable[[], Collection[int]],
    ) -> None:
        self._url = url
        self._processor = processor
        self._topic = topic
        self._owners = owners
        self._held = held
        self._connection: asyncpg.Connection | None = None
        self._failed = False

    async def wait_taken(self) -> set[int]:
        """Partitions of `held` that others own now, once there are some."""
        while True:
            await asyncio.sleep(LIMITS.claim_look_ms / 1_000)
            try:
                taken = await self._look()
                self._failed = False
            except (
                LedgerStreamError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError,
                TimeoutError,
            ) as error:  # fmt: skip
                self.close()
                if not self._failed:
                    log.warning("claims not looked at", error=str(error))
                self._failed = True
                continue
            if taken:
                return taken

    def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _look(self) -> set[int]:
        if self._connection is None:
            self._connection = await connect(self._url, f"{self._processor} lookout")
        rows = await self._connection.fetch(
            """SELECT partition, owner FROM ls_progress
                WHERE processor = $1 AND topic = $2 AND partition = ANY ($3::int[])""",
            self._processor, self._topic, list(self._held()),
        )  # fmt: skip
        ours = self._owners()
        return {row["partition"] for row in rows if row["owner"] not in ours}
