"""Watching a processor: what is noted beside its steps, a row explained, state now and then."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Mapping
from typing import Any

import asyncpg
import numpy as np
import pytest

from ledgerstream.errors import ConfigError, LedgerStreamError, StoppedPartition
from ledgerstream.limits import LIMITS
from ledgerstream.stream import streaming
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.explain import Explained, explain, find_rows, key_rows, state_at
from ledgerstream.stream.processor import State
from ledgerstream.stream.replay import Past
from ledgerstream.stream.status import Status, statuses
from ledgerstream.stream.tables import Rows
from ledgerstream.stream.worker import Worker
from tests.stream.memorylog import MemoryLog
from tests.stream.spending import DAY, Spending, Spent, payments
from tests.stream.test_worker import log_of

COUNT = 2_000


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LIMITS", dataclasses.replace(LIMITS, step_rows_max=300))


class Told(Spending):
    """It says of a row why it is there."""

    name = "Spending"
    source = Spending.source

    @classmethod
    def explain(cls, row: Mapping[str, Any]) -> list[str]:
        return [f"payment {row['payment_id']} makes {row['spent']}, number {row['number']}"]


class Breaks(Spending):
    """It stops at one event."""

    def process(self, batch: Batch, state: State) -> list[Rows]:
        if (batch.payment_id == 700).any():
            raise ValueError("no more")
        return super().process(batch, state)


async def look(database: str) -> list[Status]:
    connection = await asyncpg.connect(database)
    try:
        return await statuses(connection)
    finally:
        await connection.close()


async def test_status_of_what_never_ran_is_empty(database: str) -> None:
    assert await look(database) == []


async def test_status_knows_each_partition(database: str) -> None:
    rows = payments(COUNT)
    log = log_of(rows, partitions=2)
    log.write_bytes(0, b"1", b"no payment")
    worker = Worker(Spending, log, database, until="end")
    await worker.run()
    alive = [each.owner_alive for each in await look(database)]
    found = await look(database)
    assert [each.partition for each in found] == [0, 1]
    assert [each.next_offset for each in found] == log.ends
    assert [each.lag for each in found] == [0, 0]
    assert [each.dead for each in found] == [1, 0]
    assert alive == [False, False]
    assert found[0].place == "tests.stream.spending:Spending"
    for each in found:
        assert each.why is None
        assert each.state_bytes is not None and each.state_bytes > 0
        assert each.snapshot_offset == each.next_offset
        assert each.event_time is not None and each.event_time > 9 * DAY
        assert each.step_events is not None and 0 < each.step_events <= 300
        assert each.step_ms is not None and 0 < each.step_ms < 60_000
        assert each.commit_ms is not None and 0 < each.commit_ms < 60_000
        assert each.watermark is None  # no windows by watermark


async def test_a_living_owner_is_seen_and_a_dead_one_too(database: str) -> None:
    log = log_of(payments(COUNT))
    seen: list[Status] = []
    worker = Worker(Spending, log, database)
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(60):
        while not seen or not (seen[0].owner_alive and seen[0].lag == 0):
            assert not running.done()
            seen = await look(database)
            await asyncio.sleep(0.05)
    worker.stop()
    await running
    assert not (await look(database))[0].owner_alive


async def test_why_a_partition_stopped_is_kept_until_it_goes_on(database: str) -> None:
    log = log_of(payments(COUNT))
    with pytest.raises(StoppedPartition):
        await Worker(Breaks, log, database, until="end").run()
    (stopped,) = await look(database)
    assert stopped.why is not None
    assert "Breaks.process raised ValueError: no more" in stopped.why
    assert stopped.remedy == "Correct Breaks and start it again: it goes on from there."
    assert stopped.next_offset < 700

    connection = await asyncpg.connect(database)
    assert "no more" in await connection.fetchval("SELECT why FROM ls_lag")
    await connection.execute("UPDATE ls_watch SET log_end = NULL")
    assert await connection.fetchval("SELECT lag FROM ls_lag") is None
    await connection.close()
    log.batches[0] = log.batches[0][:7]  # as if the event had never been
    log.ends[0] = 700
    await Worker(Breaks, log, database, until="end").run()
    (going,) = await look(database)
    assert (going.why, going.remedy, going.next_offset) == (None, None, 700)


async def test_a_recreated_topic_is_a_reason_too(database: str) -> None:
    await Worker(Spending, log_of(payments(100)), database, until="end").run()
    other = MemoryLog(Spending.source, uuid.UUID(int=8))
    other.write(payments(200))
    with pytest.raises(StoppedPartition):
        await Worker(Spending, other, database, until="end").run()
    (stopped,) = await look(database)
    assert stopped.why is not None
    assert "deleted and created again" in stopped.why


async def explained(database: str, log: MemoryLog, *keys: str) -> list[Explained]:
    connection = await asyncpg.connect(database)
    try:
        past = await Past.open(Told, log, connection)
        return [await explain(past, Spent, row) for row in await find_rows(connection, Spent, keys)]
    finally:
        await connection.close()


@pytest.mark.parametrize("snapshot_at", [0, 1_000])
async def test_a_row_is_explained(database: str, snapshot_at: int) -> None:
    rows = payments(COUNT)
    log = log_of(rows[:snapshot_at]) if snapshot_at else log_of(rows)
    await Worker(Spending, log, database, until="end").run()
    if snapshot_at:
        log.write(rows[snapshot_at:])
        await Worker(Spending, log, database, until="end").run()

    (told,) = await explained(database, log, "1234")
    before = (rows["customer"] == rows["customer"][1234])[:1234]
    assert told.row == told.recomputed
    assert told.row["payment_id"] == 1234
    assert told.row["number"] == before.sum() + 1
    assert told.state["seen"] == [{"customer": rows["customer"][1234], "payments": before.sum()}]
    assert len(told.state["day"]) == 1
    assert told.event["note"] == "card"
    assert told.origin["offset"] == 1234
    assert told.step["first_offset"] <= 1234 < told.step["next_offset"]
    assert told.rules == [f"payment 1234 makes {told.row['spent']}, number {told.row['number']}"]
    assert await explained(database, log, "payments/0/1234") == [told]
    assert (await explained(database, log, "0"))[0].state == {"day": [], "seen": []}


async def test_a_row_that_was_changed_is_shown_beside_what_it_should_be(database: str) -> None:
    log = log_of(payments(100))
    await Worker(Spending, log, database, until="end").run()
    connection = await asyncpg.connect(database)
    await connection.execute("UPDATE spent SET spent = 5 WHERE payment_id = 50")
    await connection.close()
    (told,) = await explained(database, log, "50")
    assert told.recomputed is not None
    assert (told.row["spent"], told.row | {"spent": 0}) == (5, told.recomputed | {"spent": 0})
    assert told.recomputed["spent"] != 5


async def test_what_cannot_be_explained_is_a_sentence(database: str) -> None:
    log = log_of(payments(100))
    await Worker(Spending, log, database, until="end").run()
    assert await explained(database, log, "5000") == []
    with pytest.raises(ConfigError, match=r"'many' is no value of Spent\.payment_id"):
        await explained(database, log, "many")
    with pytest.raises(ConfigError, match=f"'{2**63}' is no key of Spent"):
        await explained(database, log, str(2**63))
    with pytest.raises(ConfigError, match="has 5 columns, not 6"):
        await explained(database, log, *"123456")
    connection = await asyncpg.connect(database)
    await connection.execute("UPDATE spent SET ls_offset = 5000 WHERE payment_id = 50")
    await connection.close()
    with pytest.raises(LedgerStreamError, match="no event at offset 5,000"):
        await explained(database, log, "50")


async def test_state_now_and_then(database: str) -> None:
    rows = payments(COUNT)
    log = log_of(rows)
    await Worker(Spending, log, database, until="end").run()
    connection = await asyncpg.connect(database)
    past = await Past.open(Spending, log, connection)
    machine, offset = await state_at(past, 0, None)
    mine = rows["customer"] == 3
    assert offset == COUNT
    assert key_rows(machine.state, "seen", 3) == [{"customer": 3, "payments": mine.sum()}]
    assert key_rows(machine.state, "seen", 99) == []

    then = int(rows["at"][900])
    first_later = int(np.flatnonzero(rows["at"] > then)[0])
    machine, offset = await state_at(past, 0, then)
    assert offset == first_later
    assert key_rows(machine.state, "seen", 3) == [
        {        "customer": 3, "payments": mine[:first_later].sum()}
    ]  # fmt: skip
    await connection.close()
