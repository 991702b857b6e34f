"""What is committed is computed again, and the first difference is named."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import asyncpg
import numpy as np
import pytest
from sqlalchemy.orm import Mapped, mapped_column

from ledgerstream.errors import ConfigError, NotReproduced
from ledgerstream.limits import LIMITS
from ledgerstream.money import EUR
from ledgerstream.stream import streaming
from ledgerstream.stream import verify as verify_module
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.processor import Keyed, Processor, State
from ledgerstream.stream.tables import Rows, Table
from ledgerstream.stream.verify import Verified, verify
from ledgerstream.stream.windows import Sum, Tumbling, WindowTable
from ledgerstream.stream.worker import Worker
from ledgerstream.testing import assert_splits_do_not_matter
from tests.stream.memorylog import MemoryLog
from tests.stream.spending import Spending, Spent, payments
from tests.stream.test_worker import TOPIC, log_of

COUNT = 2_000


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several commits a run, and several ranges a verification."""
    limits = dataclasses.replace(LIMITS, step_rows_max=300)
    for module in (streaming, verify_module):
        monkeypatch.setattr(module, "LIMITS", limits)


async def changed(database: str, *statements: str) -> None:
    connection = await asyncpg.connect(database)
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


async def run_and_verify(
    processor: type[Processor], log: MemoryLog, database: str, **options: Any
) -> Verified:
    await Worker(processor, log, database, until="end").run()
    return await verify(processor, log, database, **options)


class Newest(Table):
    customer: Mapped[int] = mapped_column(primary_key=True)
    payment_id: Mapped[int]
    amount: Mapped[EUR]
    number: Mapped[int]


class Both(Spending):
    """A table with a key beside the others."""

    def process(self, batch: Batch, state: State) -> list[Rows]:
        every, large = super().process(batch, state)
        return [every, large, Newest.upsert(batch, number=every.columns["number"])]


async def test_what_was_committed_comes_out_again(database: str) -> None:
    log = log_of(payments(COUNT), partitions=2)
    log.write_bytes(0, b"1", b"no payment")
    shares: list[float] = []
    done = await run_and_verify(
        Both, log, database, splits=3, advance=lambda more, share: shares.append(share)
    )
    connection = await asyncpg.connect(database)
    counts = [await connection.fetchval(f"SELECT count(*) FROM {t}")
              for t in ("spent", "large", "newest")]  # fmt: skip
    await connection.close()
    assert done.events == COUNT
    assert done.rows == sum(counts)
    assert done.dead == 1
    assert done.digests > 2
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


async def test_a_second_run_is_verified_with_the_first(database: str) -> None:
    log = log_of(payments(COUNT // 2))
    await Worker(Spending, log, database, until="end").run()
    log.write(payments(COUNT // 2, seed=2))
    assert (await run_and_verify(Spending, log, database)).events == COUNT


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        (
            "UPDATE spent SET spent = 7 WHERE ls_offset = 1234",
            r"spent: row 0 of offset 1,234 in partition 0: spent is 7 in Postgres, and \d+ recomp",
        ),
        (
            "UPDATE spent SET note = 'cash' WHERE ls_offset = 5",
            "row 0 of offset 5 in partition 0: note is 'cash' in Postgres, and 'card' recomputed",
        ),
        (
            "DELETE FROM spent WHERE ls_offset IN (700, 900)",
            r"spent: row 0 of offset 700 in partition 0 is missing in Postgres: \{'payment_id': 70",
        ),
        (
            "INSERT INTO large SELECT 1, 2, 640, ls_topic_id, 0, 9 FROM spent LIMIT 1",
            r"large: row 9 of offset 640 in partition 0 should not be in Postgres: \{'payment_id'",
        ),
        (
            "INSERT INTO large SELECT 1, 2, 9999, ls_topic_id, 0, 0 FROM spent LIMIT 1",
            "large: row 0 of offset 9,999 in partition 0 should not be in Postgres",
        ),
        (
            "UPDATE newest SET amount = amount + 1 WHERE customer = 3",
            r"newest: row 0 of offset 1,\d+ in partition 0: amount is \d+ in Postgres, and \d+ rec",
        ),
        (
            "DELETE FROM newest WHERE customer = 3",
            r"newest: row 0 of offset 1,\d+ in partition 0 is missing in Postgres",
        ),
        (
            "UPDATE ls_steps SET digest = '\\x00' WHERE next_offset = "
            "(SELECT min(next_offset) FROM ls_steps)",
            r"payments-0: offset \d+ has the state digest 00 in Postgres, and [0-9a-f]{32} recomp",
        ),
        (
            "UPDATE ls_progress SET digest = '\\x11'",
            "payments-0: offset 2,000 has the state digest 11 in Postgres",
        ),
        (
            "INSERT INTO ls_dead_letters SELECT topic_id, 0, 1500, 'Both', topic, 0, '', '', '' "
            "FROM ls_progress",
            r"row 0 of offset 1,500 in partition 0 should not be|has the state digest",
        ),
    ],
)
async def test_what_was_changed_by_hand_is_named(
    database: str, statement: str, sentence: str
) -> None:
    log = log_of(payments(COUNT))
    await run_and_verify(Both, log, database)
    await changed(database, statement)
    with pytest.raises(NotReproduced, match=sentence) as caught:
        await verify(Both, log, database)
    assert "written into the database" in caught.value.remedy


async def test_a_difference_early_in_a_large_table_is_told_at_once(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits to be compared is given up, however full its queue is."""
    monkeypatch.setattr(verify_module, "BUFFERED_MAX", 1)
    log = log_of(payments(20_000))
    await Worker(Spending, log, database, until="end").run()
    await changed(database, "UPDATE spent SET note = 'cash' WHERE ls_offset = 5")
    async with asyncio.timeout(60):
        with pytest.raises(NotReproduced, match="row 0 of offset 5"):
            await verify(Spending, log, database)


async def test_a_dead_letter_that_is_gone_is_named(database: str) -> None:
    log = log_of(payments(100))
    offset = log.write_bytes(0, b"1", b"no payment")
    await run_and_verify(Both, log, database)
    await changed(database, "DELETE FROM ls_dead_letters")
    with pytest.raises(NotReproduced, match=rf"offset {offset} is no event, and no dead letter"):
        await verify(Both, log, database)


class Counts(Processor):
    """Wrong on purpose: it remembers outside of its state how many events it has seen."""

    source = Spending.source

    def __init__(self) -> None:
        self.count = 0

    def process(self, batch: Batch, state: State) -> Rows:
        number = self.count + np.arange(len(batch))
        self.count += len(batch)
        return Spent.rows(batch, spent=0, number=number)


class Reaches(Processor):
    """Wrong on purpose: it writes to a row that it did not ask for."""

    source = Spending.source
    seen = Keyed(by="customer", payments=int)

    def process(self, batch: Batch, state: State) -> None:
        held = state.seen.at(batch.customer)
        held.payments[0] += int(batch.amount.sum())


class FirstOfBatch(Processor):
    """Wrong on purpose: the first of a batch is another."""

    source = Spending.source
    seen = Keyed(by="customer", payments=int)

    def process(self, batch: Batch, state: State) -> None:
        held = state.seen.at(batch.customer[:1])
        held.payments[held.row] += 1


@pytest.mark.parametrize(
    ("processor", "sentence"),
    [
        (Counts, r"spent: row 0 of offset \d+.*: number is \d+ (in Postgres|under others), and \d"),
        (Reaches, "content of state 'seen' is not what its digest says.\n  Reaches has changed a"),
        (FirstOfBatch, "two splits of the same events|has the state digest"),
    ],
)
async def test_a_processor_that_cannot_be_repeated_is_named(
    database: str, processor: type[Processor], sentence: str
) -> None:
    log = MemoryLog(Spending.source, TOPIC)
    # One customer for a while, and then others: row 0 is asked for at first, and then not.
    rows = payments(COUNT)
    rows["customer"] = np.arange(COUNT) // 100
    log.write(rows)
    with pytest.raises(NotReproduced, match=sentence):
        await run_and_verify(processor, log, database, splits=2, seed=5)


async def test_what_retention_removed_is_verified_from_the_snapshot_on(database: str) -> None:
    log = log_of(payments(1_000))
    await Worker(Spending, log, database, until="end").run()
    log.write(payments(1_000, seed=2))
    await Worker(Spending, log, database, until="end").run()
    await changed(database, "DELETE FROM spent WHERE ls_offset < 5")
    log.log_start[0] = 100
    assert (await verify(Spending, log, database)).first_offset == {0: 2_000}


class Hour(WindowTable):
    customer: Mapped[int] = mapped_column(primary_key=True)
    spent: Mapped[EUR]


class Hours(Processor):
    source = Spending.source
    hours = Tumbling(by="customer", over=("1h", "24h"), late="12h", spent=Sum("amount"))

    def process(self, batch: Batch, state: State) -> Rows:
        return Hour.versions(state.hours.add(batch))


async def test_of_windows_what_is_final_is_verified(database: str) -> None:
    log = log_of(payments(COUNT))
    done = await run_and_verify(Hours, log, database, splits=3)
    connection = await asyncpg.connect(database)
    count, version = await connection.fetchrow(
        "SELECT count(*), max(version) FROM hour WHERE final"
    )
    assert done.rows == count > 0
    assert version > 1
    assert_splits_do_not_matter(Hours, payments(500), rounds=5)

    changed_rows = (
        "WHERE (customer, width, start, version) = (SELECT customer, width, start, version"
    )
    open_row = f"UPDATE hour SET spent = 0 {changed_rows} FROM hour WHERE NOT final LIMIT 1)"
    assert await connection.execute(open_row) == "UPDATE 1"
    await verify(Hours, log, database)
    await connection.execute(open_row.replace("NOT final", "final"))
    await connection.close()
    with pytest.raises(NotReproduced, match=r"hour: row .*: spent is 0 in Postgres, and"):
        await verify(Hours, log, database)


async def test_a_processor_that_never_ran_here_is_a_sentence(database: str) -> None:
    with pytest.raises(ConfigError, match="has committed nothing of 'payments'"):
        await verify(Spending, log_of(payments(10)), database)
