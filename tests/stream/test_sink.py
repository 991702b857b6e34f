"""The step's transaction: one owner, all or nothing, exactly once."""

from __future__ import annotations

import dataclasses
import uuid

import asyncpg
import pytest

from ledgerstream.errors import ConfigError, Overtaken, StoppedPartition
from ledgerstream.limits import LIMITS
from ledgerstream.stream import sink as sink_module
from ledgerstream.stream.faults import DataError, TransientError
from ledgerstream.stream.machine import Machine
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.sink import Sink, Source
from tests.stream.spending import SOURCE, Spending, given, payments

STARTS = {0: 0, 1: 0}


async def sink_of(database: str, partitions: tuple[int, ...] = (0,)) -> Sink:
    sink = await Sink.connect(database, Spending.name, "1", "code")
    await sink.claim(SOURCE, partitions, STARTS)
    return sink


async def machine_of(sink: Sink, partition: int = 0) -> Machine:
    return Machine(Spending(), partition, await sink.topic_number(SOURCE))


async def rows_of(database: str, query: str) -> list[tuple[object, ...]]:
    connection = await asyncpg.connect(database)
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


async def test_a_step_moves_rows_and_offset_together(database: str) -> None:
    sink = await sink_of(database)
    machine = await machine_of(sink)
    rows = payments(1_000)
    for start in (0, 400):
        piece = machine.step(given(rows[start : start + 400], start))
        await sink.commit([piece])
        machine.forget()
    await sink.close()
    stored = await rows_of(
        database, "SELECT payment_id, note, ls_offset, ls_partition, ls_n FROM spent ORDER BY 1"
    )
    assert stored == [(n, "card", n, 0, 0) for n in range(800)]
    progress = await rows_of(database, "SELECT next_offset, digest FROM ls_progress")
    assert progress == [(800, machine.state.digest())]
    steps = await rows_of(database, "SELECT first_offset, next_offset, events FROM ls_steps")
    assert sorted(steps) == [(0, 400, 400), (400, 800, 400)]


async def test_a_zombies_commit_changes_nothing(database: str) -> None:
    zombie = await sink_of(database)
    machine = await machine_of(zombie)
    piece = machine.step(given(payments(100)))
    heir = await sink_of(database)
    with pytest.raises(Overtaken) as refused:
        await zombie.commit([piece])
    assert refused.value.partitions == {0}
    assert await rows_of(database, "SELECT count(*) FROM spent") == [(0,)]
    await heir.commit([(await machine_of(heir)).step(given(payments(100)))])
    assert await rows_of(database, "SELECT count(*) FROM spent") == [(100,)]
    await zombie.close()
    await heir.close()


async def test_a_step_over_two_partitions_fails_whole_and_names_the_lost_one(
    database: str,
) -> None:
    sink = await sink_of(database, (0, 1))
    pieces = [
        (await machine_of(sink, partition)).step(given(payments(10, partition), 0, partition))
        for partition in (0, 1)
    ]
    other = await sink_of(database, (1,))
    with pytest.raises(Overtaken) as refused:
        await sink.commit(pieces)
    assert refused.value.partitions == {1}
    assert await rows_of(database, "SELECT count(*) FROM spent") == [(0,)]
    await sink.commit(pieces[:1])
    assert await rows_of(database, "SELECT count(*) FROM spent") == [(10,)]
    await sink.close()
    await other.close()


async def test_a_recreated_topic_stops(database: str) -> None:
    await (await sink_of(database)).close()
    sink = await Sink.connect(database, Spending.name)
    with pytest.raises(StoppedPartition, match="deleted and created again"):
        await sink.claim(Source("payments", uuid.uuid4()), [0], STARTS)
    await sink.close()


async def test_an_older_timeline_is_refused(database: str) -> None:
    await (await sink_of(database)).close()
    connection = await asyncpg.connect(database)
    await connection.execute("UPDATE ls_progress SET timeline = timeline + 1")
    await connection.close()
    sink = await Sink.connect(database, Spending.name)
    with pytest.raises(StoppedPartition, match="another primary has taken over"):
        await sink.claim(SOURCE, [0], STARTS)
    await sink.close()


async def test_a_database_that_may_forget_commits_is_refused(database: str) -> None:
    connection = await asyncpg.connect(database)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    await connection.close()
    with pytest.raises(ConfigError, match="synchronous_commit"):
        await Sink.connect(database, Spending.name)


async def test_a_database_that_is_not_there_is_said(server: EmbeddedPostgres) -> None:
    with pytest.raises(ConfigError, match='database "absent" does not exist'):
        await Sink.connect(server.url.replace("/ledgerstream?", "/absent?"), Spending.name)


async def test_a_constraint_of_the_users_is_a_data_error(database: str) -> None:
    sink = await sink_of(database)
    machine = await machine_of(sink)
    await sink.commit([machine.step(given(payments(10)))])
    await sink.connection.execute("ALTER TABLE spent ADD CHECK (payment_id <> 15)")
    with pytest.raises(DataError, match="23514"):
        await sink.commit([machine.step(given(payments(20)[10:], 10))])
    assert sink.claims[0].next_offset == 10
    assert await sink.connection.fetchval("SELECT next_offset FROM ls_progress") == 10
    await sink.close()


async def test_a_constraint_that_is_checked_at_commit_is_a_data_error_too(database: str) -> None:
    sink = await sink_of(database)
    machine = await machine_of(sink)
    await sink.commit([machine.step(given(payments(10)))])
    await sink.connection.execute(
        "ALTER TABLE spent ADD UNIQUE (payment_id) DEFERRABLE INITIALLY DEFERRED"
    )
    again = payments(20)
    again["payment_id"][15] = 3
    with pytest.raises(DataError, match="23505"):
        await sink.commit([machine.step(given(again[10:], 10))])
    assert await sink.connection.fetchval("SELECT count(*) FROM spent") == 10
    await sink.close()


async def test_a_backend_terminated_mid_step_is_transient_and_lost(database: str) -> None:
    sink = await sink_of(database)
    piece = (await machine_of(sink)).step(given(payments(10)))
    pid = sink.connection.get_server_pid()
    connection = await asyncpg.connect(database)
    await connection.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
    await connection.close()
    with pytest.raises(TransientError) as failed:
        await sink.commit([piece])
    assert failed.value.lost
    again = await sink_of(database)
    assert again.claims[0].next_offset == 0
    await again.close()


async def test_the_audit_is_merged_and_keeps_its_sums(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = await sink_of(database)
    machine = await machine_of(sink)
    rows = payments(30)
    for start in range(30):
        await sink.commit([machine.step(given(rows[start : start + 1], start))])
        machine.forget()
    monkeypatch.setattr(sink_module, "LIMITS", dataclasses.replace(LIMITS, audit_rows_kept=5))
    await sink.merge_audit()
    await sink.merge_audit()
    steps = await rows_of(
        database,
        "SELECT first_offset, next_offset, steps, events FROM ls_steps ORDER BY next_offset",
    )
    assert steps == [(0, 25, 25, 25), *((n, n + 1, 1, 1) for n in range(25, 30))]
    await sink.close()


async def test_an_audit_that_cannot_be_merged_does_not_fail_the_step_before(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = dataclasses.replace(LIMITS, audit_merge_steps=1, audit_rows_kept=0)
    monkeypatch.setattr(sink_module, "LIMITS", limits)
    sink = await sink_of(database)
    await sink.connection.execute(
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
           $$BEGIN RAISE 'not now' USING ERRCODE = 'deadlock_detected'; END$$;
           CREATE TRIGGER refuse BEFORE DELETE ON ls_steps EXECUTE FUNCTION refuse()"""
    )
    machine = await machine_of(sink)
    for start in range(3):
        await sink.commit([machine.step(given(payments(3)[start : start + 1], start))])
        machine.forget()
    await sink.close()
    assert await rows_of(database, "SELECT next_offset FROM ls_progress") == [(3,)]
