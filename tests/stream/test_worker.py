"""The worker: whatever fails, each event counts exactly once."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from typing import Any

import asyncpg
import numpy as np
import pytest

from ledgerstream.errors import ConfigError, Overtaken, StoppedPartition
from ledgerstream.limits import LIMITS
from ledgerstream.stream import snapshotter, streaming
from ledgerstream.stream import worker as worker_module
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.processor import Keyed, Processor, Sliding, State, Topic
from ledgerstream.stream.sink import Sink, Source
from ledgerstream.stream.tables import Rows
from ledgerstream.stream.worker import Progress, Worker
from tests.stream.cutter import Cutter
from tests.stream.memorylog import MemoryLog
from tests.stream.spending import Large, Payment, Spending, Spent, payments

TOPIC = uuid.UUID(int=7)


def log_of(rows: np.ndarray, partitions: int = 1) -> MemoryLog:
    log = MemoryLog(Spending.source, TOPIC, partitions)
    log.write(rows)
    return log


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several commits a run, however fast things are computed."""
    monkeypatch.setattr(streaming, "LIMITS", dataclasses.replace(LIMITS, step_rows_max=300))


async def fetch(database: str, query: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(database)
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


async def results(database: str) -> list[list[tuple[Any, ...]]]:
    """Both tables and the progress: what must be equal however a run went."""
    return [
        await fetch(database, "SELECT * FROM spent ORDER BY payment_id"),
        await fetch(database, "SELECT * FROM large ORDER BY payment_id"),
        await fetch(
            database, "SELECT partition, next_offset, digest FROM ls_progress ORDER BY partition"
        ),
    ]


@pytest.fixture
async def wanted(server: Any) -> dict[int, list[list[tuple[Any, ...]]]]:
    """What an undisturbed run over `payments(4_000)` gives, by number of partitions."""
    if not _WANTED:
        for partitions in (1, 2):
            admin = await asyncpg.connect(server.url)
            await admin.execute(f"CREATE DATABASE wanted_{partitions}")
            url = server.url.replace("/ledgerstream?", f"/wanted_{partitions}?")
            await Worker(Spending, log_of(payments(4_000), partitions), url, until="end").run()
            _WANTED[partitions] = await results(url)
            await admin.close()
    return _WANTED


_WANTED: dict[int, list[list[tuple[Any, ...]]]] = {}


async def test_two_partitions_run_to_their_ends(database: str) -> None:
    rows = payments(4_000)
    progress = await Worker(Spending, log_of(rows, 2), database, until="end").run()
    assert progress.events == 4_000
    assert progress.rows["spent"] == 4_000
    stored = await fetch(database, "SELECT payment_id, spent, number FROM spent ORDER BY 1")
    assert stored == _by_hand(rows)
    assert progress.snapshots == 2
    again = await Worker(Spending, log_of(rows, 2), database, until="end").run()
    assert (again.events, again.snapshots) == (0, 0)


def _by_hand(rows: np.ndarray) -> list[tuple[int, int, int]]:
    day = 86_400 * 10**9
    out = []
    for n, row in enumerate(rows):
        mine = rows[: n + 1][rows["customer"][: n + 1] == row["customer"]]
        inside = (mine["at"] > row["at"] - day) & (mine["at"] <= row["at"])
        out.append((n, int(mine["amount"][inside].sum()), len(mine)))
    return out


@pytest.mark.parametrize("cut", ["before", "after"])
async def test_a_commit_whose_answer_is_lost_counts_once(
    database: str, wanted: Any, cut: Any
) -> None:
    log = log_of(payments(4_000), 2)
    async with Cutter(database, cut, at=3) as cutter:
        await Worker(Spending, log, cutter.url, until="end").run()
        assert cutter.cuts == 1
    assert await results(database) == wanted[2]
    epochs = await fetch(database, "SELECT owner_epoch FROM ls_progress")
    assert epochs == [(2,), (2,)]


async def test_a_terminated_backend_changes_nothing(database: str, wanted: Any) -> None:
    killed = 0
    killers = []

    async def kill() -> None:
        await fetch(
            database,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE 'ledgerstream%'",
        )

    def after_commit(progress: Progress) -> None:
        nonlocal killed
        if progress.commits in (1, 4, 7):
            killed += 1
            killers.append(asyncio.ensure_future(kill()))

    log = log_of(payments(4_000))
    await Worker(Spending, log, database, until="end", on_progress=after_commit).run()
    await asyncio.gather(*killers)
    assert killed >= 1
    assert await results(database) == wanted[1]


async def test_a_worker_that_wakes_as_a_zombie_commits_nothing(database: str, wanted: Any) -> None:
    log = log_of(payments(4_000))
    asleep = asyncio.Event()

    def pause(progress: Progress) -> None:
        if progress.commits == 2:
            log.gate.clear()
            asleep.set()

    zombie = asyncio.create_task(
        Worker(Spending, log, database, until="end", on_progress=pause).run()
    )
    await asleep.wait()
    await Worker(Spending, log_of(payments(4_000)), database, until="end").run()
    log.gate.set()
    with pytest.raises(Overtaken, match="another worker of Spending has taken over payments-0"):
        await zombie
    assert await results(database) == wanted[1]


async def test_a_partition_that_is_taken_over_leaves_the_other_running(
    database: str, wanted: Any
) -> None:
    log = log_of(payments(4_000), 2)
    thief = await Sink.connect(database, Spending.name)
    theft: list[asyncio.Task[Any]] = []

    def steal(progress: Progress) -> None:
        if progress.commits == 2:
            log.gate.clear()
            theft.append(asyncio.create_task(claim()))

    async def claim() -> None:
        await thief.claim(Source("payments", TOPIC), [1], {1: 0})
        log.gate.set()

    worker = Worker(Spending, log, database, until="end", on_progress=steal)
    progress = await worker.run()
    await asyncio.gather(*theft)
    assert progress.position[0] == log.ends[0]
    assert progress.position[1] < log.ends[1]
    await thief.close()
    await Worker(Spending, log_of(payments(4_000), 2), database, until="end").run()
    assert await results(database) == wanted[2]


async def test_one_poison_record_is_one_dead_letter(database: str) -> None:
    rows = payments(4_000)
    log = log_of(rows)
    await Worker(Spending, log_of(rows[:0]), database, until="end").run()
    await fetch(database, "ALTER TABLE spent ADD CHECK (payment_id <> 2345)")
    progress = await Worker(Spending, log, database, until="end").run()
    dead = await fetch(
        database, 'SELECT partition, "offset", processor, error, payload FROM ls_dead_letters'
    )
    assert progress.dead == 1
    ((partition, offset, processor, error, payload),) = dead
    assert (partition, offset, processor) == (0, 2345, "Spending")
    assert "23514" in error
    assert payload[8:] == rows[2345].tobytes()
    # As if the event had never been: its amount is in no total.
    without = np.delete(rows, 2345)
    stored = await fetch(database, "SELECT spent, number FROM spent ORDER BY payment_id")
    assert stored == [row[1:] for row in _by_hand(without)]


async def test_what_does_not_decode_is_a_dead_letter_and_a_replay_skips_it(
    database: str,
) -> None:
    rows = payments(1_000)
    log = MemoryLog(Spending.source, TOPIC)
    log.write(rows[:500])
    bad = log.write_bytes(0, b"\0" * 8, b"not an event")
    log.write(rows[500:])
    worker = Worker(Spending, log, database, until="end")
    progress = await worker.run()
    assert (progress.events, progress.dead) == (1_000, 1)
    dead = await fetch(database, 'SELECT "offset", payload FROM ls_dead_letters')
    assert dead == [(bad, b"not an event")]
    await fetch(database, "DELETE FROM ls_snapshots")
    again = await Worker(Spending, log, database, until="end").run()
    assert (again.events, again.snapshots) == (0, 1)


class SpendingInJson(Spending):
    source = Topic("payments", Payment, key="customer", encoding="json")


async def test_json_events_give_the_same_rows(database: str, wanted: Any) -> None:
    log = MemoryLog(SpendingInJson.source, TOPIC, 2)
    log.write(payments(4_000))
    await Worker(SpendingInJson, log, database, until="end").run()
    assert (await results(database))[:2] == wanted[2][:2]


async def test_a_total_that_overflows_is_a_dead_letter(database: str) -> None:
    rows = payments(300, customers=1)
    rows["at"] = np.arange(300)
    rows["amount"][[10, 20]] = 2**63 - 1
    progress = await Worker(Spending, log_of(rows), database, until="end").run()
    dead = await fetch(database, 'SELECT "offset", error FROM ls_dead_letters ORDER BY 1')
    assert progress.dead == 2
    assert [offset for offset, _ in dead] == [10, 20]
    assert "64 bits" in dead[0][1]


async def test_a_flood_of_overflows_costs_little_and_each_is_a_dead_letter(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run over the step for each of them would take hours."""
    rows = payments(6_000, customers=2)
    rows["at"] = np.arange(6_000)
    rows["amount"][0] = 2**63 - 1  # every later event of this customer is one too many
    runs = 0
    process = Spending.process

    def counted(self: Spending, batch: Batch, state: State) -> Any:
        nonlocal runs
        runs += len(batch)
        return process(self, batch, state)

    monkeypatch.setattr(Spending, "process", counted)
    log = log_of(rows)
    log.chunk_batches = 60
    progress = await Worker(Spending, log, database, until="end").run()
    other = rows["customer"] != rows["customer"][0]
    assert progress.dead == 6_000 - other.sum() - 1
    kept = await fetch(database, "SELECT payment_id FROM spent ORDER BY 1")
    assert [n for (n,) in kept] == [0, *np.flatnonzero(other)]
    assert runs < 60 * 6_000
    state = await fetch(database, "SELECT next_offset, digest FROM ls_progress")
    await fetch(database, "DELETE FROM ls_snapshots")
    await Worker(Spending, log, database, until="restored").run()  # the same digest again
    assert await fetch(database, "SELECT next_offset, digest FROM ls_progress") == state


async def test_a_crash_loses_the_memory_and_nothing_else(
    database: str, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for snapshots in (False, True):
        if snapshots:
            often = dataclasses.replace(LIMITS, replay_ms_target=0, snapshot_share_max=0.99)
            monkeypatch.setattr(snapshotter, "LIMITS", often)
        log = log_of(payments(4_000), 2)
        done = asyncio.Event()
        limit = 3

        def crash(progress: Progress, limit: int = limit, done: asyncio.Event = done) -> None:
            if progress.commits == limit:
                done.set()

        run = asyncio.create_task(
            Worker(Spending, log, database, until="end", on_progress=crash).run()
        )
        waiting = asyncio.create_task(done.wait())
        await asyncio.wait([run, waiting], return_when=asyncio.FIRST_COMPLETED)
        assert not run.done()
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
    await Worker(Spending, log_of(payments(4_000), 2), database, until="end").run()
    assert await results(database) == wanted[2]
    valid = await fetch(database, "SELECT partition, valid FROM ls_snapshots ORDER BY 1")
    assert valid == [(0, True), (1, True)]
    orphans = await fetch(
        database,
        "SELECT count(*) FROM ls_snapshot_pages WHERE snapshot_id NOT IN "
        "(SELECT unnest(writers) FROM ls_snapshots)",
    )
    assert orphans == [(0,)]


async def test_a_restart_begins_from_a_snapshot_taken_while_streaming(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = dataclasses.replace(LIMITS, replay_ms_target=0, snapshot_share_max=0.99)
    monkeypatch.setattr(snapshotter, "LIMITS", often)
    rows = payments(1_000)
    log = log_of(rows)

    def crash_after_a_snapshot(progress: Progress) -> None:
        if progress.snapshots:
            run.cancel()
        elif log.ends[0] < progress.position[0] + 1_000:
            log.write(rows)

    run = asyncio.create_task(
        Worker(Spending, log, database, on_progress=crash_after_a_snapshot).run()
    )
    await asyncio.wait([run])
    ((state_offset,),) = await fetch(
        database, "SELECT max(state_offset) FROM ls_snapshots WHERE valid"
    )
    ((next_offset,),) = await fetch(database, "SELECT next_offset FROM ls_progress")
    assert 0 < state_offset <= next_offset
    log.log_start[0] = state_offset  # what lies before is not needed
    progress = await Worker(Spending, log, database, until="end").run()
    assert progress.events == log.ends[0] - next_offset


async def test_stop_ends_at_a_step_with_a_snapshot(database: str) -> None:
    log = log_of(payments(4_000))
    worker: Worker

    def stop(progress: Progress) -> None:
        if progress.commits == 2:
            worker.stop()

    worker = Worker(Spending, log, database, on_progress=stop)
    progress = await worker.run()
    assert 0 < progress.events < 4_000
    assert await fetch(database, "SELECT state_offset, valid FROM ls_snapshots") == [
        (progress.position[0], True)
    ]
    assert await fetch(database, "SELECT next_offset FROM ls_progress") == [(progress.position[0],)]


class Fragile(Spending):
    """Raises at one payment."""

    source = Spending.source

    def process(self, batch: Batch, state: State) -> list[Rows]:
        if (batch.payment_id == 1_234).any():
            raise ZeroDivisionError("a bug")
        return super().process(batch, state)


async def test_a_processor_that_raises_stops_its_partition_and_no_other(database: str) -> None:
    rows = payments(4_000)
    log = log_of(rows, 2)
    sick = int(log.codec.hashes(rows[1_234:1_235])[0]) % 2
    worker = Worker(Fragile, log, database, until="end")
    with pytest.raises(StoppedPartition, match=r"Fragile\.process raised ZeroDivisionError"):
        await worker.run()
    assert list(worker.stopped) == [sick]
    assert worker.progress.position[1 - sick] == log.ends[1 - sick]
    ids = await fetch(database, "SELECT payment_id FROM spent")
    assert (1_234,) not in ids


async def test_what_was_computed_before_a_processor_raised_is_committed(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if that commit is still under way, or due, when the partition stops."""
    monkeypatch.setattr(streaming, "LIMITS", LIMITS)
    slow = Sink.commit

    async def commit(sink: Sink, *given: Any) -> None:
        await asyncio.sleep(0.02)  # meanwhile the next chunks are computed
        await slow(sink, *given)

    monkeypatch.setattr(Sink, "commit", commit)
    rows = payments(4_000)
    log = log_of(rows, 2)
    sick = int(log.codec.hashes(rows[1_234:1_235])[0]) % 2
    worker = Worker(Fragile, log, database, until="end")
    with pytest.raises(StoppedPartition, match=r"Fragile\.process raised") as stopped:
        await worker.run()
    assert worker.progress.position[1 - sick] == log.ends[1 - sick]
    said = f"stopped at offset {worker.progress.position[sick]:,}."
    assert said in str(stopped.value)


async def test_keys_from_another_partitioner_stop_with_the_setting_to_change(
    database: str,
) -> None:
    log = MemoryLog(Spending.source, TOPIC, 2)
    log.write_to(0, payments(100))
    with pytest.raises(StoppedPartition, match="partitioner=murmur2_random"):
        await Worker(Spending, log, database, until="end").run()


async def test_changed_code_with_a_replay_pending_is_refused_or_recorded(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_of(payments(1_000))
    await Worker(Spending, log, database, until="end").run()
    monkeypatch.setattr(worker_module, "code_version", lambda _: "new")
    await Worker(Spending, log, database, until="end").run()  # nothing to replay: taken over
    await fetch(database, "DELETE FROM ls_snapshots")
    with pytest.raises(StoppedPartition, match="1,000 payments would be replayed with the new"):
        await Worker(Spending, log, database, until="end").run()
    await Worker(Spending, log, database, until="end", accept_new_code=True).run()
    changes = await fetch(
        database, "SELECT first_offset, next_offset, new_code_version FROM ls_code_changes"
    )
    assert changes == [(0, 1_000, "new")]


async def test_a_replay_that_comes_out_differently_stops(database: str) -> None:
    await Worker(Spending, log_of(payments(1_000)), database, until="end").run()
    await fetch(database, "DELETE FROM ls_snapshots")
    other = payments(1_000)
    other["amount"][990] += 1
    with pytest.raises(StoppedPartition, match="gives the state digest"):
        await Worker(Spending, log_of(other), database, until="end").run()


async def test_a_replay_of_what_retention_removed_stops(database: str) -> None:
    log = log_of(payments(1_000))
    await Worker(Spending, log, database, until="end").run()
    await fetch(database, "DELETE FROM ls_snapshots")
    log.log_start[0] = 100
    with pytest.raises(StoppedPartition, match="retention removed them"):
        await Worker(Spending, log, database, until="end").run()


async def test_events_that_retention_removed_unread_stop(database: str) -> None:
    log = log_of(payments(1_000))
    await Worker(Spending, log, database, until="end").run()
    log.write(payments(500))
    log.log_start[0] = 1_200
    with pytest.raises(StoppedPartition, match="200 events before they were processed"):
        await Worker(Spending, log, database, until="end").run()


async def test_a_log_that_lost_what_was_counted_stops(database: str) -> None:
    await Worker(Spending, log_of(payments(1_000)), database, until="end").run()
    shorter = log_of(payments(900))
    with pytest.raises(StoppedPartition, match="100 events that were counted are no longer in it"):
        await Worker(Spending, shorter, database, until="end").run()
    assert await fetch(database, "SELECT next_offset FROM ls_progress") == [(1_000,)]


async def test_a_changed_state_declaration_is_refused(database: str) -> None:
    await Worker(Spending, log_of(payments(100)), database, until="end").run()

    class Other(Spending):
        name = "Spending"
        source = Spending.source
        day = Sliding(by="customer", over="12h", sum="amount")

    with pytest.raises(StoppedPartition, match="declares other state"):
        await Worker(Other, log_of(payments(100)), database, until="end").run()


async def test_state_by_another_key_needs_a_single_partition(database: str) -> None:
    class ByTerminal(Processor):
        source = Topic("payments", Payment, key="customer")
        tills = Keyed(by="terminal", seen=int)

        def process(self, batch: Batch, state: State) -> None:
            state.tills.at(batch.terminal)

    with pytest.raises(ConfigError, match="2 partitions and is keyed by 'customer'"):
        await Worker(ByTerminal, log_of(payments(10), 2), database, until="end").run()
    await Worker(ByTerminal, log_of(payments(10)), database, until="end").run()


def test_the_tables_of_the_tests_are_named_like_their_classes() -> None:
    assert (Spent.relation().name, Large.relation().name) == ("spent", "large")
