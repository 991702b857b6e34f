"""A workload on a broker, with faults, and what everybody saw of it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ledgerstream.client import LATEST, Client
from ledgerstream.errors import LedgerStreamError
from ledgerstream.limits import LIMITS
from ledgerstream.wire import batches
from tests.checker.checker import ALLOWED, Anomaly, check, errors
from tests.checker.faults import MINUTE_NS, OFF_NS, Faults, Meddler, Server, Worker
from tests.checker.history import (
    NEVER,
    Assign,
    Found,
    Operation,
    Outcome,
    Partition,
    Poll,
    read,
)
from tests.checker.money import balances, transfers
from tests.checker.workloads import PARTITIONS, Task, places

TOPICS = ("queue", "shared", "orders", "accounts")
SIDE_COLONS = 3  # in a value that is one side of a transfer
FINISH_S_MAX = 6.0
READ_S_MAX = 20.0


@dataclass(frozen=True)
class Plan:
    """`workloads`: how many processes of each. `quiet_s`: how long open transactions may take."""

    client: str
    workloads: Mapping[str, int]
    faults: Sequence[str]
    seconds: float
    seed: int
    module: Sequence[str] = ("ledgerstream.broker.run",)
    quiet_s: float = 15.0


@dataclass
class Seen:
    """`found`: what a last reader read of each topic, `whole`: what stands there, aborted or not;
    `done`: how far the orders were read."""

    plan: Plan
    history: list[Operation]
    counts: Counter[str]
    found: dict[str, Found] = field(default_factory=dict)
    whole: dict[str, Found] = field(default_factory=dict)
    done: Mapping[Partition, int] = field(default_factory=dict)
    late_ids: set[str] = field(default_factory=set)  # where V1 cannot hold, as Meddler has them
    drawn: Counter[str] = field(default_factory=Counter)  # how often each fault was to be

    def reused(self) -> dict[str, str]:
        """Values that were acknowledged in the place of another one.

        When librdkafka aborts a transaction it forgets what it has in flight, and uses those
        sequences again; where the broker has the batch, the next one is a repeat of it, here as in
        Apache Kafka, and its offset is told. Under V1 the epoch is the same and no broker can tell.
        """
        if self.plan.client != "confluent":
            return {}
        stands = {
            (partition, offset): value for topic in self.whole.values()
            for partition, records in topic.items() for offset, value in records
        }  # fmt: skip
        failed = {
            send.value: each.process for each in self.history for send in each.sends()
            if each.outcome is Outcome.FAIL
        }  # fmt: skip
        return {
            send.value: there for each in self.history for send in each.sends()
            if (there := stands.get((send.partition, send.offset), send.value)) != send.value
            and failed.get(there) == each.process
        }  # fmt: skip

    def errors(self) -> list[Anomaly]:
        """What `reused` explains left out: those values were never sent, as a broker has it."""
        lost = self.reused()
        history = [
            replace(each, acts=[a for a in each.acts if getattr(a, "value", None) not in lost])
            for each in self.history
        ]
        wrong = errors(history)
        if "money" in self.plan.workloads:
            sides = [(0, value) for value in lost if value.count(":") == SIDE_COLONS]
            accounts = {**self.found["accounts"], "lost": sides}
            wrong += transfers(self.found["orders"], accounts, self.done)
            if total := sum(balances(accounts).values()):
                wrong.append(Anomaly("sum", "accounts", f"{total} more than there was"))
        return wrong

    def told(self) -> str:
        """What was done and injected, for whoever reads the test's output."""
        indeterminate = sum(1 for each in self.history if each.outcome is Outcome.INFO)
        acts = Counter(type(act).__name__.lower() for each in self.history for act in each.acts)
        read_ = sum(len(r) for f in self.found.values() for r in f.values())
        wrong = Counter(anomaly.kind for anomaly in self.errors())
        allowed = Counter(each.kind for each in check(self.history) if each.kind in ALLOWED)
        return "\n  ".join([
            f"{self.plan.client}, seed {self.plan.seed}, {self.plan.seconds:g} s: "
            f"{len(self.history)} operations, {indeterminate} of them indeterminate; "
            f"{read_} values at the end",
            *(f"{workload}: {_listed(counts)}" for workload, counts in self.by_workload().items()),
            f"acts: {_listed(acts)}",
            f"faults: {_listed(self.counts)}",
            f"anomalies: {_listed(wrong)}; allowed by Kafka's model: {_listed(allowed)}",
            *(f"explained: {lost} was taken for {there}, which had been aborted, by its sequence"
              for lost, there in self.reused().items()),
        ])  # fmt: skip

    def by_workload(self) -> dict[str, Counter[str]]:
        """Operations by their outcome, a client's coming to be among them."""
        found: dict[str, Counter[str]] = {}
        for each in self.history:
            workload = each.process.partition(".")[0].rstrip("0123456789")
            found.setdefault(workload, Counter())[each.outcome.value] += 1
        return found


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items()) if n) or "none"


async def perform(plan: Plan, directory: Path) -> Seen:
    server = Server(directory, plan.module)
    async with Meddler(server.port) as meddler:
        server.advertised_port = meddler.port
        await server.start()
        workers: list[Worker] = []
        try:
            async with await Client.connect(server.address) as client:
                for topic in TOPICS:
                    await client.create_topic(topic, PARTITIONS)
            until = time.monotonic() + plan.seconds
            address = f"127.0.0.1:{meddler.port}"
            workers = [_worker(task, directory) for task in _tasks(plan, address, until)]
            await asyncio.gather(*(worker.start() for worker in workers))
            faults = Faults(server, meddler, workers, plan.faults, plan.seed)
            if plan.faults:
                await faults.run(until)
            meddler.calm()
            await _finish(workers, meddler.counts)
            # a transaction that began when the clock was ahead times out when that time has come
            # again, as in Kafka: what nobody is left to end does so now
            await server.set_clock(max(OFF_NS) + MINUTE_NS)
            history = read(sorted(directory.glob("*.history")))
            seen = Seen(plan, history, meddler.counts, late_ids=meddler.late_ids)
            seen.drawn = faults.drawn
            await _read_all(seen, f"127.0.0.1:{server.port}")
            seen.counts["transaction timed out"] = server.said("transaction timed out")
            return seen
        finally:
            for worker in workers:
                await worker.kill()
            await server.kill()


def _tasks(plan: Plan, address: str, until: float) -> list[Task]:
    return [
        Task(plan.client, workload, f"{workload}{number}", number, 0, address, "", until, plan.seed)
        for workload, count in plan.workloads.items()
        for number in range(count)
    ]


def _worker(task: Task, directory: Path) -> Worker:
    def command(life: int) -> list[str]:
        path = str(directory / f"{task.name}.{life}.history")
        mine = replace(task, life=life, path=path).dump()
        return [sys.executable, "-m", "tests.checker.workloads", mine]

    return Worker(command)


async def _finish(workers: list[Worker], counts: Counter[str]) -> None:
    try:
        async with asyncio.timeout(FINISH_S_MAX):
            for worker in workers:
                code = await worker.process.wait()
                assert code == 0, f"a client ended with {code}"
    except TimeoutError:  # killed, like any other
        for worker in workers:
            counts["client that did not finish"] += worker.process.returncode is None
            await worker.kill()


async def _read_all(seen: Seen, address: str) -> None:
    """By one who reads everything, when nothing is open any more or should not be."""
    limits = replace(LIMITS, delivery_ms_max=10_000, request_ms_max=5_000, reader_wait_ms=50)
    async with await Client.connect(address, limits=limits) as client:
        latest = dict.fromkeys(range(PARTITIONS), LATEST)
        deadline = time.monotonic() + seen.plan.quiet_s
        ends: dict[str, dict[int, int]] = {}
        for topic in TOPICS:
            while True:
                ends[topic] = await client.list_offsets(topic, latest)
                whole = await client.list_offsets(topic, latest, committed=False)
                if ends[topic] == whole or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.05)
        for topic in TOPICS:
            seen.found[topic] = await _read(client, topic, ends[topic])
            seen.whole[topic] = await _read(client, topic, ends[topic], committed=False)
        acts: list[Assign | Poll] = [Assign({p: 0 for topic in TOPICS for p in places(topic)})]
        acts += [Poll(found, time.monotonic_ns()) for found in seen.found.values()]
        for topic in ("shared", "orders"):
            at = time.monotonic_ns()
            group = f"of-{topic}"
            try:
                told = await client.committed(group, [(topic, p) for p in range(PARTITIONS)])
            except LedgerStreamError:
                seen.counts["group without stable offsets"] += 1
                continue
            offsets = {f"{t}-{p}": offset for (t, p), offset in told.items()}
            acts.append(Assign({p: offsets.get(p, 0) for p in places(topic)}, group, at))
            seen.done = offsets
    seen.history.append(
        Operation("the last reader", list(acts), Outcome.OK, False, time.monotonic_ns(), NEVER)
    )


async def _read(
    client: Client, topic: str, ends: Mapping[int, int], *, committed: bool = True
) -> Found:
    found: dict[Partition, list[tuple[int, str]]] = {p: [] for p in places(topic)}
    left = {partition for partition, end in ends.items() if end > 0}
    if not left:
        return found
    async with (
        asyncio.timeout(READ_S_MAX),
        client.reader(topic, dict.fromkeys(left, 0), committed=committed) as reader,
    ):
        while left:
            chunk = await reader.next()
            if chunk is None:
                continue
            for at, header in batches.headers(chunk.data):
                if not header.control:
                    found[f"{topic}-{chunk.partition}"] += [
                        (record.offset, (record.value or b"").decode())
                        for record in batches.records(chunk.data, at)
                        if record.offset >= chunk.start
                    ]
            if chunk.next_offset >= ends[chunk.partition]:
                left.discard(chunk.partition)
                reader.drop(chunk.partition)
    return found
