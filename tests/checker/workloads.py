"""One process of a workload, which another starts, kills and starts again.

    python -m tests.checker.workloads '{"client": "ours", "workload": "queue", …}'

queue       transactions of up to four sends and polls; partitions are assigned, and now and then
            others, from the beginning
group       the same by members of a group, subscribed; its offsets are part of the transactions
orders      writes transfers, not in transactions
money       read, process, write: members of a group read transfers and write their two sides and
            the group's offsets in one transaction
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ledgerstream.client import Client, membership
from ledgerstream.client import transactional as ours
from ledgerstream.errors import LedgerStreamError
from tests.checker.clients import DELIVERY_MS, Confluent, Face, Ours, Spoilt, Subscribed
from tests.checker.history import Found, Outcome, Partition, Recorder

PARTITIONS, ACTS_MAX, ACCOUNTS = 3, 4, 9
ABORTED, MOVED = 0.1, 0.05  # how often
POLL_RECORDS, POLL_S, THINK_S = 20, 0.05, 0.04


@dataclass(frozen=True)
class Task:
    """What a process is told. `until` is a time of the machine's monotonic clock."""

    client: str  # "confluent", "ours", "ours-v1"
    workload: str
    name: str
    number: int  # among those of its workload
    life: int  # how often it was started before
    address: str
    path: str
    until: float
    seed: int

    def dump(self) -> str:
        return json.dumps(asdict(self))


def places(topic: str) -> list[Partition]:
    return [f"{topic}-{index}" for index in range(PARTITIONS)]


class Worker:
    def __init__(self, task: Task) -> None:
        self.task = task
        self.chance = random.Random(f"{task.seed} {task.name} {task.life}")
        self.rec = Recorder(Path(task.path), "")
        self.births = self.values = 0
        self.face: Face | None = None

    async def run(self) -> None:
        once = {"queue": self.queue, "group": self.group, "money": self.money}
        if self.task.workload == "orders":
            await self.orders()
            return
        while time.monotonic() < self.task.until:
            if self.face is None and not await self.open():
                continue
            assert self.face is not None
            await self.transaction(self.face, once[self.task.workload])

    # -- a client that may have to be made anew

    def named(self) -> str:
        """Each producer is a process of its own: what it sends is in order."""
        self.births += 1
        return f"{self.task.name}.{self.task.life}.{self.births}"

    async def open(self) -> bool:
        task = self.task
        self.rec.process = self.named()
        topic = {"queue": "queue", "group": "shared", "money": "orders"}[task.workload]
        group = None if task.workload == "queue" else (topic, f"of-{topic}")
        if task.client == "confluent":
            face: Face = Confluent(task.address, task.name, self.rec, group)
        elif group is None:
            face = Ours(task.address, task.name, self.rec)
        else:
            face = Subscribed(task.address, task.name, self.rec, group)
        self.rec.begin(transactional=False)
        try:
            await face.open()
            if task.workload == "queue":
                await face.assign(dict.fromkeys(places(topic), 0))
        except Exception as error:
            self.rec.note(f"not opened: {error!r}")
            self.rec.end(Outcome.FAIL)
            await self.close(face)
            await asyncio.sleep(0.1)  # whatever is away comes back
            return False
        self.rec.end(Outcome.OK)
        self.face = face
        return True

    async def transaction(self, face: Face, once: Callable[[Face], Awaitable[None]]) -> None:
        self.rec.begin()
        outcome = Outcome.FAIL
        try:
            await face.begin()
            try:
                await once(face)
                outcome = await face.end(committed=self.chance.random() >= ABORTED)
            except Spoilt as error:
                self.rec.note(f"spoilt: {error}")
                outcome = await face.end(committed=False)
            if outcome is Outcome.FAIL and self.task.workload != "queue":
                await face.go_back(self.group_id)
        except Exception as error:
            self.rec.note(f"lost: {error!r}")
            unsure = self.rec.asked and outcome is not Outcome.OK
            self.rec.end(Outcome.INFO if unsure else outcome)
            self.face = None
            await self.close(face)
        else:
            self.rec.end(outcome)

    @property
    def group_id(self) -> str:
        return "of-shared" if self.task.workload == "group" else "of-orders"

    async def close(self, face: Face) -> None:
        try:
            await face.close()
        except Exception as error:
            self.rec.note(f"not closed: {error!r}")

    # -- workloads

    def value(self, *more: object) -> str:
        self.values += 1
        return ":".join([f"{self.rec.process}.{self.values}", *map(str, more)])

    async def queue(self, face: Face) -> None:
        if self.chance.random() < MOVED:
            kept = self.chance.sample(places("queue"), self.chance.randint(1, PARTITIONS))
            await face.assign(dict.fromkeys(kept, 0))
        for _ in range(self.chance.randint(1, ACTS_MAX)):
            if self.chance.random() < 0.5:
                await face.send(self.chance.choice(places("queue")), self.value())
            else:
                await face.poll(POLL_RECORDS, POLL_S)
            await asyncio.sleep(self.chance.random() * THINK_S)  # so that more falls in between

    async def group(self, face: Face) -> None:
        found: dict[Partition, list[tuple[int, str]]] = {}
        for _ in range(self.chance.randint(1, ACTS_MAX)):
            if self.chance.random() < 0.5:
                await face.send(self.chance.choice(places("shared")), self.value())
            else:
                found |= await face.poll(POLL_RECORDS, POLL_S)
        await self.offsets(face, found)

    async def offsets(self, face: Face, found: Found) -> None:
        nexts = {partition: records[-1][0] + 1 for partition, records in found.items()}
        if nexts:
            await face.send_offsets(self.group_id, nexts)

    async def money(self, face: Face) -> None:
        found = await face.poll(ACTS_MAX, POLL_S)
        for records in found.values():
            for _, order in records:
                name, source, target, amount = order.split(":")
                for account, moved in ((source, -int(amount)), (target, int(amount))):
                    where = places("accounts")[int(account) % PARTITIONS]
                    await face.send(where, self.value(name, account, moved))
        await self.offsets(face, found)

    async def orders(self) -> None:
        self.rec.process = self.named()
        limits_s = DELIVERY_MS / 1000
        async with await Client.connect(self.task.address) as client:
            producer = await client.producer()
            while time.monotonic() < self.task.until:
                self.rec.begin(transactional=False)
                source, target = self.chance.sample(range(ACCOUNTS), 2)
                value = self.value(source, target, self.chance.randint(1, 100))
                where = self.chance.randrange(PARTITIONS)
                self.rec.send(f"orders-{where}", value)
                try:
                    async with asyncio.timeout(limits_s * 4):
                        offset = await producer.send("orders", value.encode(), partition=where)
                    self.rec.acknowledged(value, offset)
                    self.rec.end(Outcome.OK)
                except (LedgerStreamError, OSError, TimeoutError) as error:
                    self.rec.note(repr(error))
                    self.rec.end(Outcome.INFO)
                await asyncio.sleep(self.chance.random() * 0.02)


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    if task.client == "ours-v1":
        ours.V2_LEVEL = membership.MODERN_LEVEL = 99  # as with a cluster that has no more
    asyncio.run(Worker(task).run())


if __name__ == "__main__":
    main()
