"""A worker in a process of its own, to be killed. Arguments: SUBJECT ADDRESS DATABASE UNTIL."""

from __future__ import annotations

import asyncio
import sys

from ledgerstream.client import Client
from ledgerstream.stream.worker import Progress, Worker
from tests.crash.subjects import SUBJECTS


def tell(progress: Progress) -> None:
    print(progress.position[0], flush=True)


async def main(subject: str, address: str, database: str, until: str) -> None:
    async with await Client.connect(address) as client:
        worker = Worker(
            SUBJECTS[subject].processor, client, database,
            until="end" if until == "end" else None, on_progress=tell,
        )  # fmt: skip
        worker.stop_on_signals()
        await worker.run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
