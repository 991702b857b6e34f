"""Rows and topics in one atomic step, on our log and on Apache Kafka."""

from __future__ import annotations

import asyncio
import itertools
import struct
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import confluent_kafka as ck
import numpy as np
import pytest
from confluent_kafka.admin import AdminClient
from sqlalchemy.orm import Mapped

from ledgerstream.client import LATEST, Client
from ledgerstream.client import operator as client_operator
from ledgerstream.errors import ConfigError, NotReproduced, Overtaken, StoppedPartition
from ledgerstream.events import Event, Int32, Timestamp
from ledgerstream.limits import LIMITS
from ledgerstream.money import EUR
from ledgerstream.stream import outbox
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.committer import Committer
from ledgerstream.stream.outbox import Outbox, group_of, id_of
from ledgerstream.stream.outputs import HEADER, Events
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.processor import Keyed, Processor, State, Topic
from ledgerstream.stream.sink import Sink
from ledgerstream.stream.tables import Rows, Table
from ledgerstream.stream.verify import verify
from ledgerstream.stream.worker import Worker
from ledgerstream.wire import batches

PARTITIONS = 3


class Order(Event):
    order_id: int
    at: Timestamp
    customer: int
    amount: EUR


class Total(Event):
    """What a customer has spent."""

    order_id: int
    customer: int
    spent: EUR
    grade: Int32 = 0


class TotalRow(Table):
    order_id: Mapped[int]
    customer: Mapped[int]
    spent: Mapped[EUR]


def make(names: str = "") -> type[Processor]:
    """A processor over topics of its own: each third order has no output."""
    orders = Topic(f"orders{names}", Order, key="customer")
    totals = Topic(f"totals{names}", Total, key="order_id")

    class Spending(Processor):
        name = f"Spending{names}"
        source = orders
        outputs = (totals,)
        results = (TotalRow,)
        customers = Keyed(by="customer", spent=EUR)

        def process(self, batch: Batch, state: State) -> list[Rows | Events]:
            held = state.customers.at(batch.customer)
            spent = np.empty(len(batch), np.int64)
            for i, row in enumerate(held.row):
                held.spent[row] += batch.amount[i]
                spent[i] = held.spent[row]
            told = batch.order_id % 3 != 0
            return [
                TotalRow.rows(batch, spent=spent),
                totals.emit(batch, where=told, spent=spent),
            ]

    return Spending


def orders(first: int, count: int) -> np.ndarray:
    rows = np.zeros(count, Order.dtype())
    rows["order_id"] = np.arange(first, first + count)
    rows["at"] = 1_700_000_000_000_000_000 + rows["order_id"] * 10**9
    rows["customer"] = rows["order_id"] * 7 % 11
    rows["amount"] = rows["order_id"] % 100 + 1
    return rows


def expected(count: int) -> dict[int, int]:
    """Of each order: what its customer has spent by then."""
    spent: dict[int, int] = {}
    found = {}
    for row in orders(0, count):
        customer = int(row["customer"])
        spent[customer] = spent.get(customer, 0) + int(row["amount"])
        found[int(row["order_id"])] = spent[customer]
    return found


class Setting:
    """A log, a database, and the processor's topics on them."""

    def __init__(self, address: str, client: Client, database: str) -> None:
        self.address, self.client, self.database = address, client, database
        self.processor = make(f"-{uuid.uuid4().hex[:8]}")
        self.source = self.processor.source
        (self.output,) = self.processor.outputs
        self.written = 0

    async def create(self) -> Setting:
        for topic in (self.source, self.output):
            await self.client.create_topic(topic.name, PARTITIONS, config={"retention.ms": "-1"})
        return self

    async def write(self, count: int) -> None:
        rows = orders(self.written, count)
        self.written += count
        await self.client.write(self.source.name, rows, event=Order, key="customer")

    def worker(self, **how: Any) -> Worker:
        return Worker(self.processor, self.client, self.database, until="end", **how)

    async def outputs(self) -> list[tuple[int, int, tuple[int, int, int]]]:
        """(order, spent, origin) of each event that a read_committed reader sees."""
        found = []
        everywhere = dict.fromkeys(range(PARTITIONS), LATEST)
        ends = await self.client.list_offsets(self.output.name, everywhere)
        left = {p for p, end in ends.items() if end}
        async with self.client.reader(self.output.name, dict.fromkeys(left, 0)) as reader:
            while left:
                chunk = await reader.next()
                if chunk is None:
                    continue
                for at, header in batches.headers(chunk.data):
                    for record in batches.records(chunk.data, at) if not header.control else ():
                        assert record.value is not None
                        row = np.frombuffer(record.value[8:], Total.dtype())[0]
                        ((name, content),) = record.headers
                        assert (name, content is None) == (HEADER, False)
                        topic, *origin = struct.unpack(">iiqh", content)
                        assert topic == 1
                        found.append((int(row["order_id"]), int(row["spent"]), tuple(origin)))
                if chunk.next_offset >= ends[chunk.partition]:
                    left.discard(chunk.partition)
                    reader.drop(chunk.partition)
        return found

    async def check(self) -> None:
        """Rows and events are those of one run that nothing disturbed, once each, in order."""
        wanted = expected(self.written)
        connection = await asyncpg.connect(self.database)
        try:
            rows = await connection.fetch("SELECT order_id, spent FROM total_row")
            progress = await connection.fetch(
                "SELECT partition, next_offset FROM ls_progress ORDER BY partition"
            )
        finally:
            await connection.close()
        assert sorted(map(tuple, rows)) == sorted(wanted.items())
        found = await self.outputs()
        told = {order: spent for order, spent in wanted.items() if order % 3}
        assert sorted((order, spent) for order, spent, _ in found) == sorted(told.items())
        for partition in range(PARTITIONS):
            by_source = [offset for _, _, (p, offset, _) in found if p == partition]
            assert len(by_source) == len(set(by_source))
        places = [(self.source.name, p) for p in range(PARTITIONS)]
        witness = await self.client.committed(group_of(self.processor.name), places)
        assert witness == {(self.source.name, p): at for p, at in progress}


@pytest.fixture(params=["ledgerstream", "apache_kafka"])
def address(request: pytest.FixtureRequest) -> str:
    """Of each kind of broker in turn."""
    name = "our_broker" if request.param == "ledgerstream" else "apache_kafka"
    return str(request.getfixturevalue(name).address)


@pytest.fixture
async def setting(address: str, database: str) -> AsyncIterator[Setting]:
    async with await Client.connect(address) as client:
        yield await Setting(address, client, database).create()


async def test_rows_and_events_are_there_once_each(setting: Setting) -> None:
    """Over several runs, in each of which steps emit and others do not."""
    for count in (40, 1, 0, 25):
        await setting.write(count)
        progress = await setting.worker().run()
        assert progress.events == count
        await setting.check()


class Crash(BaseException):
    """The process is gone: nobody handles it."""


class Chaos:
    """Counts the calls of what touches the log or the database, and dies at one of them."""

    POINTS = [
        (Sink, "claim"), (outbox, "take_slot"), (Sink, "commit"), (Outbox, "end_stored"),
        (Outbox, "read_witness"), (Outbox, "take_identity"), (Outbox, "send"), (Outbox, "commit"),
    ]  # fmt: skip

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.dies: tuple[int, bool] | None = None  # at which call, and whether behind it
        self.dies_behind = ""  # or behind the first call of this name that stores or ends outputs
        self.sent = False
        for kind, name in self.POINTS:
            monkeypatch.setattr(
                kind, name, self._around(f"{kind.__name__}.{name}", getattr(kind, name))
            )

    def _around(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        async def acted(*args: Any, **named: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            if self.dies == (number, False):
                raise Crash
            found = await act(*args, **named)
            self.sent = self.sent or name == "Outbox.send"
            if self.dies == (number, True) or (self.sent and name == self.dies_behind):
                raise Crash
            return found

        return acted


async def test_a_crash_anywhere_is_made_good(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and behind each call of a first run, of a later one, and of the recovery of either."""
    chaos = Chaos(monkeypatch)
    deaths = 0
    for number in itertools.count():
        died = []
        for behind in (False, True):
            await setting.write(10)
            chaos.calls, chaos.dies = [], (number, behind)
            try:
                await setting.worker().run()
            except Crash:
                died.append(chaos.calls[-1])
                deaths += 1
        chaos.dies = None
        await setting.worker().run()
        await setting.check()
        if not died:
            break
    assert deaths > 20


# -- each row of the recovery


async def died_at(setting: Setting, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """A worker that has stepped before does its last step up to behind the call of that name."""
    await setting.write(20)
    await setting.worker().run()
    await setting.write(20)
    with monkeypatch.context() as patched:
        chaos = Chaos(patched)
        chaos.dies_behind = point
        with pytest.raises(Crash):
            await setting.worker().run()


class Seen:
    """What a recovery did: whether its EndTxn were taken, and how many events it sent again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended: list[bool] = []
        self.again = 0
        self.recovering = False
        end, send, recover = client_operator.Transactions.commit, Outbox.send, Worker._recover

        async def recovers(*args: Any) -> None:
            self.recovering = True
            await recover(*args)
            self.recovering = False

        async def ends(it: Any, *identity: Any) -> bool:
            self.ended.append(await end(it, *identity))
            return self.ended[-1]

        async def sends(it: Any, given: Any, witness: Any) -> Any:
            if self.recovering:
                self.again += sum(len(some) for some in given.values())
            return await send(it, given, witness)

        monkeypatch.setattr(client_operator.Transactions, "commit", ends)
        monkeypatch.setattr(Outbox, "send", sends)
        monkeypatch.setattr(Worker, "_recover", recovers)


async def test_a_transaction_that_is_still_open_is_committed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    await died_at(setting, monkeypatch, "Sink.commit")
    seen = Seen(monkeypatch)
    await setting.worker().run()
    assert True in seen.ended
    assert seen.again == 0
    await setting.check()


async def test_one_that_is_committed_is_left_alone(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    await died_at(setting, monkeypatch, "Outbox.commit")
    seen = Seen(monkeypatch)
    await setting.worker().run()
    assert seen.again == 0
    await setting.check()


async def test_one_that_an_operator_ended_is_sent_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that a successor fenced, or that timed out."""
    await died_at(setting, monkeypatch, "Sink.commit")
    assert await setting.client.transactions.abort(id_of(setting.processor.name, 0))
    seen = Seen(monkeypatch)
    await setting.worker().run()
    assert True not in seen.ended
    assert seen.again > 0
    await setting.check()


async def test_one_that_timed_out_is_sent_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Apache Kafka. On a LedgerStream log it never does; there it is committed."""
    brief = partial(Client.transactional, timeout_ms=1_000)
    monkeypatch.setattr(Client, "transactional", lambda *a, **k: brief(*a, **k))
    await died_at(setting, monkeypatch, "Sink.commit")
    txn_id = id_of(setting.processor.name, 0)
    found = await setting.client.transactions.describe(txn_id)
    if found.timeout_ms == 1_000:
        async with asyncio.timeout(30):
            while found.state == "Ongoing":
                found = await setting.client.transactions.describe(txn_id)
    seen = Seen(monkeypatch)
    await setting.worker().run()
    assert (seen.again > 0) is (found.timeout_ms == 1_000)
    await setting.check()


async def test_a_sleeping_workers_transaction_is_in_the_way(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker takes the partitions over while one sleeps before it stores what it has sent;
    when it wakes, it stores and ends nothing of that."""
    monkeypatch.setattr(outbox, "LIMITS", replace(LIMITS, witness_wait_ms=200))
    await setting.write(20)
    await setting.worker().run()
    await setting.write(20)
    asleep, wake = asyncio.Event(), asyncio.Event()
    real = Sink.commit

    async def sleepy(sink: Sink, pieces: Any, *rest: Any) -> None:
        if not asleep.is_set() and any(piece.sends for piece in pieces):
            asleep.set()
            await wake.wait()
        await real(sink, pieces, *rest)

    monkeypatch.setattr(Sink, "commit", sleepy)
    first = asyncio.create_task(setting.worker().run())
    await asleep.wait()
    await setting.worker().run()
    await setting.check()
    wake.set()
    with suppress(Overtaken):  # of the partitions of its step; others it may claim again
        await first
    await setting.check()
    connection = await asyncpg.connect(setting.database)
    assert await connection.fetchval("SELECT count(*) FROM ls_slots") == 2
    await connection.close()


async def restored(setting: Setting, server: EmbeddedPostgres) -> None:
    """The database as it was before the last 20 orders."""
    await setting.write(20)
    await setting.worker().run()
    name = urlsplit(setting.database).path[1:]
    admin = await asyncpg.connect(server.url)
    await admin.execute(f"CREATE DATABASE {name}_old TEMPLATE {name}")
    await admin.close()
    await setting.write(20)
    await setting.worker().run()
    setting.database = setting.database.replace(f"/{name}?", f"/{name}_old?")


async def test_a_database_that_went_back_makes_its_rows_again(
    setting: Setting, server: EmbeddedPostgres
) -> None:
    """And nothing is sent a second time."""
    await restored(setting, server)
    before = await setting.outputs()
    await setting.write(5)
    await setting.worker().run()
    await setting.check()
    assert (await setting.outputs())[: len(before)] != []


async def test_what_retention_took_cannot_be_made_again(
    setting: Setting, server: EmbeddedPostgres
) -> None:
    await restored(setting, server)
    everywhere = dict.fromkeys(range(PARTITIONS), LATEST)
    ends = await setting.client.list_offsets(setting.source.name, everywhere)
    gone = [ck.TopicPartition(setting.source.name, p, end) for p, end in ends.items()]
    admin = AdminClient({"bootstrap.servers": setting.address})
    for done in (await asyncio.to_thread(admin.delete_records, gone)).values():
        await asyncio.to_thread(done.result, 30)
    with pytest.raises(StoppedPartition, match="retention removed"):
        await setting.worker().run()


async def test_a_witness_that_is_gone_stops_the_partition(setting: Setting) -> None:
    await setting.write(20)
    await setting.worker().run()
    admin = AdminClient({"bootstrap.servers": setting.address})
    group = group_of(setting.processor.name)
    await asyncio.to_thread(admin.delete_consumer_groups([group])[group].result, 30)
    with pytest.raises(StoppedPartition, match="up to where its outputs are"):
        await setting.worker().run()


async def test_an_event_that_the_log_refuses_for_good_stops_its_partition(
    setting: Setting,
) -> None:
    """Once, in words, and not again and again; what came before is committed."""
    await setting.write(20)
    await setting.worker().run()
    await setting.client.alter_topic(setting.output.name, {"max.message.bytes": "20"})
    await setting.write(20)
    async with asyncio.timeout(60):
        with pytest.raises(StoppedPartition, match=r"MESSAGE_TOO_LARGE|RECORD_LIST_TOO_LARGE"):
            await setting.worker().run()
    await setting.client.alter_topic(setting.output.name, {"max.message.bytes": None})
    await setting.worker().run()
    await setting.check()


async def test_a_witness_is_written_anew_though_nothing_is_emitted(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the log would forget it after a week; and a step without an output leaves it behind."""
    monkeypatch.setattr(outbox, "LIMITS", replace(LIMITS, witness_age_ms_max=50))
    await setting.write(1)  # which has no output
    commits: list[dict[int, int]] = []
    real = Outbox.commit

    async def commit(it: Outbox, witness: Any) -> None:
        await real(it, witness)
        commits.append(dict(witness))

    monkeypatch.setattr(Outbox, "commit", commit)
    worker = Worker(setting.processor, setting.client, setting.database)
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(30):
        while len(commits) < 2 or sum(commits[-1].values()) < 1:
            await asyncio.sleep(0.01)
    at = len(commits)
    async with asyncio.timeout(30):
        while len(commits) < at + 2:  # again and again, without an event
            await asyncio.sleep(0.01)
    worker.stop()
    await running
    assert await setting.outputs() == []
    await setting.check()


async def test_a_witness_that_cannot_be_written_now_is_asked_for_once(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where rows are made again up to it: the stream would do nothing else otherwise."""
    monkeypatch.setattr(outbox, "LIMITS", replace(LIMITS, witness_age_ms_max=300))
    committer = Committer.__new__(Committer)
    committer.outbox = Outbox(client, make("-idle"), "orders-idle", 0)
    committer.outbox.witness = {0: 5}
    await asyncio.wait_for(committer.wait_witness_due(), 30)
    again = asyncio.create_task(committer.wait_witness_due())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not again.done()
    await asyncio.wait_for(again, 30)


async def test_what_was_emitted_is_verified(setting: Setting) -> None:
    for count in (40, 30):
        await setting.write(count)
        await setting.worker().run()
    found = await verify(setting.processor, setting.client, setting.database)
    assert (found.events, found.rows, found.sent) == (70, 70, 46)
    assert "70 rows, 46 events in topics and every state digest equal" in str(found)

    foreign = await setting.client.producer()  # who writes into the topic without saying whence
    await foreign.send(setting.output.name, b"hello", partition=0)
    await verify(setting.processor, setting.client, setting.database)


@pytest.mark.parametrize("wrong", ["twice", "another", "missing"])
async def test_an_event_that_should_not_be_so_is_named(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """A worker that is wrong: one event too many, one too few, or another one."""
    real, name = Outbox.send, setting.output.name

    async def send(it: Outbox, sends: Any, witness: Any) -> Any:
        for topic, some in sends.items():
            keep = np.arange(len(some))
            if wrong == "missing":
                keep = keep[1:]
            if wrong == "twice":
                keep = np.concatenate([keep[:1], keep])
            rows = some.rows[keep]
            if wrong == "another":
                rows["spent"][-1] += 1
            sends = {**sends, topic: replace(some, rows=rows, stamps=some.stamps[keep],
                                             origin=some.origin[keep])}  # fmt: skip
        return await real(it, sends, witness)

    with monkeypatch.context() as patched:
        patched.setattr(Outbox, "send", send)
        await setting.write(40)
        await setting.worker().run()
    said = {"twice": "should not be there", "another": "has spent", "missing": "is missing"}[wrong]
    with pytest.raises(NotReproduced, match=rf"{name}-\d: the event .*{said}"):
        await verify(setting.processor, setting.client, setting.database)


async def test_an_output_topic_that_is_not_there_is_said(setting: Setting) -> None:
    await setting.write(1)
    await setting.client.delete_topic(setting.output.name)
    with pytest.raises(ConfigError, match="which is not there"):
        await setting.worker().run()
