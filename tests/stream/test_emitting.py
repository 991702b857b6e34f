"""Rows and topics in one atomic step, on our log and on Apache Kafka."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import numpy as np
import pytest
from sqlalchemy.orm import Mapped

from ledgerstream.client import LATEST, Client
from ledgerstream.events import Event, Int32, Timestamp
from ledgerstream.money import EUR
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.outbox import Outbox, group_of
from ledgerstream.stream.outputs import HEADER, ORIGIN, Events
from ledgerstream.stream.processor import Keyed, Processor, State, Topic
from ledgerstream.stream.sink import Sink
from ledgerstream.stream.tables import Rows, Table
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
        self.client, self.database = client, database
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
                        origin = np.frombuffer(content, ORIGIN)[0]
                        found.append(
                            (int(row["order_id"]), int(row["spent"]),
                             (int(origin["partition"]), int(origin["offset"]), int(origin["n"])))
                        )  # fmt: skip
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
        (Sink, "claim"), (Sink, "take_slot"), (Sink, "commit"), (Outbox, "end_stored"),
        (Outbox, "read_witness"), (Outbox, "take_identity"), (Outbox, "send"), (Outbox, "commit"),
    ]  # fmt: skip

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.dies: tuple[int, bool] | None = None  # at which call, and whether behind it
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
            if self.dies == (number, True):
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
