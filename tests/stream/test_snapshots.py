"""Snapshots in Postgres: only new pages are written, and no crash leaves one without its pages."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import numpy as np
import pytest

from ledgerstream.limits import LIMITS
from ledgerstream.stream import snapshots as rooms
from ledgerstream.stream.faults import TransientError
from ledgerstream.stream.sink import Claim, Sink, Source
from ledgerstream.stream.snapshot import Snapshot
from ledgerstream.stream.snapshots import Snapshots
from tests.stream.spending import Spending
from tests.stream.test_worker import fetch

SOURCE = Source("payments", uuid.UUID(int=7))
KEYS, WORDS = 4_000, 5


def content(*changes: int, seed: int = 1) -> np.ndarray:
    """Rows of state; each of `changes` adds to a row."""
    rows = np.random.default_rng(seed).integers(0, 2**40, (KEYS, WORDS))
    for each in changes:
        rows[each, 1] += 1
    return rows


def snapshot(rows: np.ndarray, partition: int = 0) -> Snapshot:
    return Snapshot(partition, 0, b"d" * 16, "code", Spending.states, {"spent": {"rows": rows}})


class Case:
    """A processor's snapshots, as owners come and go."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.claim: Claim
        self.snapshots: Snapshots | Any = None

    async def own(self, partition: int = 0) -> np.ndarray | None:
        """Be a new owner; the rows of the snapshot that it finds."""
        if self.snapshots is not None:
            await self.snapshots.close()
        sink = await Sink.connect(self.url, "Spending")
        try:
            self.claim = (await sink.claim(SOURCE, [partition], {partition: 0}))[partition]
        finally:
            await sink.close()
        self.snapshots = await Snapshots.connect(self.url, "Spending", SOURCE)
        found = await self.snapshots.newest(self.claim, Spending.states)
        return None if found is None else found.content["spent"]["rows"]

    async def take(self, rows: np.ndarray, partition: int = 0) -> bool:
        stored = await self.snapshots.write(snapshot(rows, partition), self.claim.owner_epoch)
        return await self.snapshots.validate(stored)

    async def written(self) -> tuple[int, int]:
        """Of the valid snapshot: all bytes, and those that were written for it."""
        ((size, new),) = await fetch(
            self.url, "SELECT bytes, new_bytes FROM ls_snapshots WHERE valid"
        )
        return size, new

    async def check_no_leftovers(self) -> None:
        """Each page that is there is one of a valid snapshot, and the other way round."""
        rows = await fetch(self.url, "SELECT writers, refs, valid FROM ls_snapshots")
        assert all(valid for _, _, valid in rows)
        wanted = {
            (writers[at], page)
            for writers, refs, _ in rows
            for at, page in np.frombuffer(refs, "<i4").reshape(-1, 2).tolist()
        }
        pages = await fetch(self.url, "SELECT snapshot_id, page FROM ls_snapshot_pages")
        assert set(pages) == wanted
        assert len(pages) == len(wanted)


async def test_only_pages_that_changed_are_written(database: str) -> None:
    case = Case(database)
    assert await case.own() is None
    assert await case.take(content())
    assert await case.written() == (KEYS * WORDS * 8, KEYS * WORDS * 8)
    assert await case.take(content(17))
    size, new = await case.written()
    assert size == KEYS * WORDS * 8
    assert 0 < new <= LIMITS.snapshot_page_bytes_max
    assert await case.take(content(17))
    assert (await case.written())[1] == 0
    await case.check_no_leftovers()
    # The next owner knows what is stored, and pages of several snapshots make one.
    found = await case.own()
    assert np.array_equal(found, content(17))
    assert await case.take(content(17, 2_000, 3_999))
    assert 0 < (await case.written())[1] <= 2 * LIMITS.snapshot_page_bytes_max
    assert len((await fetch(database, "SELECT writers FROM ls_snapshots"))[0][0]) == 3
    assert await case.take(content(seed=2))
    assert await case.written() == (KEYS * WORDS * 8, KEYS * WORDS * 8)
    assert len((await fetch(database, "SELECT writers FROM ls_snapshots"))[0][0]) == 1
    await case.check_no_leftovers()
    assert await case.take(content(seed=2)[:10])
    assert await case.take(content()[:0])
    await case.check_no_leftovers()
    await case.snapshots.close()


async def test_any_sequence_of_snapshots_and_owners(database: str) -> None:
    rng = np.random.default_rng(3)
    case = Case(database)
    await case.own()
    rows = content()
    for turn in range(40):
        rows = rows.copy()
        rows[rng.integers(0, len(rows), rng.integers(0, 40)), 2] += 1
        if turn % 3 == 0:
            rows = np.delete(rows, rng.integers(0, len(rows), 5), axis=0)
        if turn % 4 == 0:
            rows = np.insert(rows, rng.integers(0, len(rows)), rows[:3], axis=0)
        assert await case.take(rows)
        await case.check_no_leftovers()
        if turn % 5 == 0:
            assert np.array_equal(await case.own(), rows)
    await case.snapshots.close()


class Crash(Exception):
    pass


class Crashing:
    """A connection that is gone before its n-th use, or in the midst of its n-th transaction."""

    def __init__(self, connection: asyncpg.Connection, uses: int) -> None:
        self.connection = connection
        self.uses = uses

    def _use(self) -> None:
        self.uses -= 1
        if self.uses < 0:
            self.connection.terminate()
            raise Crash

    def __getattr__(self, name: str) -> Any:
        self._use()
        return getattr(self.connection, name)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        self._use()
        async with self.connection.transaction():
            yield
            self._use()  # before its COMMIT
        self._use()


async def test_a_crash_between_any_two_statements_leaves_the_older_snapshot_or_the_new_one(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "LIMITS", dataclasses.replace(LIMITS, snapshot_txn_bytes=8_192))
    rng = np.random.default_rng(5)
    case = Case(database)
    await case.own()
    valid = content()
    assert await case.take(valid)
    outcomes = []
    for uses in range(200):
        rows = valid.copy()
        rows[rng.integers(0, KEYS, 40), 1] += 1
        connection = case.snapshots._connection
        monkeypatch.setattr(case.snapshots, "_connection", Crashing(connection, uses))
        try:
            done = await case.take(rows)
        except (Crash, TransientError):
            done = False
        monkeypatch.setattr(case.snapshots, "_connection", connection)
        found = await case.own()
        outcomes.append(np.array_equal(found, rows))
        assert outcomes[-1] or (not done and np.array_equal(found, valid))
        await case.check_no_leftovers()
        if done:
            break
        valid = found
        if uses % 2:  # it goes on from what it found
            valid = content(uses)
            assert await case.take(valid)
            await case.check_no_leftovers()
    assert done
    assert outcomes.count(False) > 10
    await case.snapshots.close()


async def test_a_stopped_owner_that_wakes_leaves_nothing(database: str) -> None:
    first, second = Case(database), Case(database)
    await first.own()
    assert await first.take(content())
    stored = await first.snapshots.write(snapshot(content(1, 2)), first.claim.owner_epoch)
    assert np.array_equal(await second.own(), content())
    assert not await first.snapshots.validate(stored)
    await second.check_no_leftovers()
    # Swept between its row and its pages.
    execute = first.snapshots._connection.execute

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

        async def execute(self, statement: str, *args: Any) -> Any:
            done = await execute(statement, *args)
            await second.own()
            return done

    connection = first.snapshots._connection
    first.snapshots._connection = Slow()
    stored = await first.snapshots.write(snapshot(content(3)), first.claim.owner_epoch)
    await second.check_no_leftovers()
    first.snapshots._connection = connection
    assert not await first.snapshots.validate(stored)
    await second.check_no_leftovers()
    assert await second.take(content(4))
    await second.check_no_leftovers()
    await first.snapshots.close()
    await second.snapshots.close()


async def test_after_a_commit_in_doubt_nothing_is_built_on_what_was_known(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(database)
    await case.own()
    assert await case.take(content())
    connection = case.snapshots._connection

    class Doubt:
        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

        @asynccontextmanager
        async def transaction(self) -> AsyncIterator[None]:
            async with connection.transaction():
                yield
            raise ConnectionResetError

    stored = await case.snapshots.write(snapshot(content(9)), case.claim.owner_epoch)
    monkeypatch.setattr(case.snapshots, "_connection", Doubt())
    with pytest.raises(TransientError):
        await case.snapshots.validate(stored)
    monkeypatch.setattr(case.snapshots, "_connection", connection)
    assert await case.take(content(10))
    await case.check_no_leftovers()
    assert np.array_equal(await case.own(), content(10))
    await case.snapshots.close()


async def test_a_snapshot_whose_predecessor_was_removed_by_hand_stands_alone(
    database: str,
) -> None:
    case = Case(database)
    await case.own()
    assert await case.take(content())
    await fetch(database, "DELETE FROM ls_snapshots")
    assert await case.take(content(1))
    assert (await case.written())[1] == KEYS * WORDS * 8
    # Removed while the next one is under way: that one does not count.
    stored = await case.snapshots.write(snapshot(content(2)), case.claim.owner_epoch)
    await fetch(database, "DELETE FROM ls_snapshots WHERE valid")
    assert not await case.snapshots.validate(stored)
    assert await case.take(content(3))
    assert np.array_equal(await case.own(), content(3))
    await case.check_no_leftovers()  # those of removed ones are gone with the new claim
    await case.snapshots.close()


async def test_a_sweep_leaves_other_partitions_alone(database: str) -> None:
    here, there = Case(database), Case(database)
    await here.own(0)
    await there.own(1)
    stored = await there.snapshots.write(snapshot(content(seed=4), 1), there.claim.owner_epoch)
    assert await here.take(content())
    await here.own(0)
    assert await there.snapshots.validate(stored)
    await here.check_no_leftovers()
    assert np.array_equal(await there.own(1), content(seed=4))
    await here.snapshots.close()
    await there.snapshots.close()


async def test_snapshots_of_older_versions_are_read_and_followed(database: str) -> None:
    """They held all their pages, of 256 KiB, under their own id."""
    case = Case(database)
    await case.own()
    rows = content()
    assert await case.take(rows)
    data = rows.tobytes()
    cut = [data[at : at + 65_536] for at in range(0, len(data), 65_536)]
    connection = case.snapshots._connection
    ((number,),) = await fetch(database, "SELECT snapshot_id FROM ls_snapshots")
    await connection.execute("DELETE FROM ls_snapshot_pages")
    await connection.copy_records_to_table(
        "ls_snapshot_pages", records=[(number, at, page) for at, page in enumerate(cut)]
    )
    await connection.execute(
        "UPDATE ls_snapshots SET writers = NULL, refs = NULL, bytes = NULL, new_bytes = NULL, "
        "pages = $1",
        len(cut),
    )
    assert np.array_equal(await case.own(), rows)
    assert await case.take(content(5))
    assert await case.written() == (len(data), len(data))
    await case.check_no_leftovers()
    assert np.array_equal(await case.own(), content(5))
    await case.snapshots.close()
