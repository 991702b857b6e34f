"""A worker that stops itself (SIGSTOP) in its second step.

    hazard_child.py ADDRESS TOPIC DATABASE WHERE

WHERE: "before" the transaction, inside its "copy", before the offsets "move", before "commit".
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
from typing import Any

from ledgerstream.client import Client
from ledgerstream.errors import Overtaken
from ledgerstream.limits import LIMITS
from ledgerstream.stream import connect, sink
from ledgerstream.stream.sink import Sink
from ledgerstream.stream.worker import Progress, Worker
from tests.stream.spending import spending_of


class Stopping:
    """Calls go on to the real ones; the place that is asked for stops the process once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.steps = 0

    def here(self, where: str) -> None:
        if where == self.where and self.steps == 2:
            self.where = ""
            os.kill(os.getpid(), signal.SIGSTOP)


async def main(address: str, topic: str, database: str, where: str) -> None:
    stopping = Stopping(where)
    commit, move, chunks = Sink.commit, Sink._move, sink.copy_chunks

    async def slow_commit(self: Sink, *given: Any) -> None:
        stopping.steps += 1
        stopping.here("before")
        await commit(self, *given)

    async def slow_move(self: Sink, *given: Any) -> Any:
        stopping.here("move")
        moved = await move(self, *given)
        stopping.here("commit")
        return moved

    async def slow_chunks(parts: Any) -> Any:
        async for chunk in chunks(parts):
            yield chunk
            stopping.here("copy")

    Sink.commit, Sink._move, sink.copy_chunks = slow_commit, slow_move, slow_chunks  # type: ignore
    # the server, which goes on, gives it this long
    connect.LIMITS = dataclasses.replace(
        LIMITS, postgres_idle_ms_max=1_000, postgres_command_ms_max=2_000
    )
    async with await Client.connect(address) as client:
        try:
            await Worker(spending_of(topic), client, database, on_progress=tell).run()
        except Overtaken as error:
            print(error)


def tell(progress: Progress) -> None:
    print(progress.position[0], flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
