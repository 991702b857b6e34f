"""`python -m bench.paced ADDRESS FILE RATE`: write postings at a set rate, each at its own time.

Prints the monotonic time (ns) from which event n is due n / RATE seconds later.
"""

from __future__ import annotations

import asyncio
import sys
import time

import numpy as np

from bench.states import Posting
from ledgerstream.client import Client

EVERY_S = 0.001


async def main(address: str, path: str, rate: int) -> None:
    events = np.load(path)
    async with await Client.connect(address) as client, asyncio.TaskGroup() as writes:
        await client.topic("postings")  # so that no write has to wait for it
        began = time.monotonic_ns() + 200_000_000
        print(began, flush=True)
        sent = 0
        while sent < len(events):
            due = min((time.monotonic_ns() - began) * rate // 1_000_000_000, len(events))
            if due > sent:
                writes.create_task(
                    client.write("postings", events[sent:due], event=Posting, key="account")
                )
                sent = due
            await asyncio.sleep(EVERY_S)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
