"""What goes wrong with Postgres (exactly-once, part 5), each against a real one: nothing is lost,
nothing is doubled, and what cannot be kept is said.

Each test runs the same payments as an undisturbed run, does its harm in the middle, and compares
tables, offsets and state digests to the last bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import numpy as np
import pytest
import structlog
from sqlalchemy.orm import Mapped, mapped_column

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client
from ledgerstream.errors import ConfigError, StoppedPartition
from ledgerstream.limits import LIMITS
from ledgerstream.stream import connect as connect_module
from ledgerstream.stream import postgres, retries, source, streaming, threads
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.processor import Processor, State
from ledgerstream.stream.sink import Sink
from ledgerstream.stream.tables import Rows, Table
from ledgerstream.stream.worker import Progress, Worker
from tests.peers.proxy import Proxy, Verdict
from tests.stream.memorylog import MemoryLog
from tests.stream.spending import Large, Payment, Spending, payments, spending_of

COUNT = 4_000
TOPIC = uuid.UUID(int=7)
ROWS = payments(COUNT)
CHILD = Path(__file__).with_name("hazard_child.py")
ROOT = Path(__file__).parents[2]
PATIENCE_S = 60
Results = list[list[tuple[Any, ...]]]


def log_of(partitions: int = 1) -> MemoryLog:
    log = MemoryLog(Spending.source, TOPIC, partitions)
    log.write(ROWS)
    return log


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several commits a run, and no long pauses after a failure."""
    monkeypatch.setattr(streaming, "LIMITS", dataclasses.replace(LIMITS, step_rows_max=300))
    quick = dataclasses.replace(LIMITS, postgres_retry_ms_max=200)
    monkeypatch.setattr(retries, "LIMITS", quick)


@pytest.fixture
def server_times(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`server_times(postgres_idle_ms_max=200)`: other time limits for connections from now on."""

    def change(**limits: int) -> None:
        monkeypatch.setattr(connect_module, "LIMITS", dataclasses.replace(LIMITS, **limits))

    return change


@pytest.fixture(scope="module")
def frail() -> Iterator[EmbeddedPostgres]:
    """A server of this module's own, to be killed and misconfigured."""
    with tempfile.TemporaryDirectory(prefix="ledgerstream-") as directory:
        with EmbeddedPostgres.start(Path(directory)) as server:
            yield server


@pytest.fixture
async def frail_database(frail: EmbeddedPostgres) -> AsyncIterator[str]:
    name = f"hazard_{uuid.uuid4().hex[:8]}"
    async with admin(frail.url) as connection:
        await connection.execute(f"CREATE DATABASE {name}")
    yield frail.url.replace("/ledgerstream?", f"/{name}?")
    async with admin(frail.url) as connection:
        await connection.execute("ALTER SYSTEM RESET ALL")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@asynccontextmanager
async def admin(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that no setting of a test concerns."""
    settings = {"default_transaction_read_only": "off", "synchronous_commit": "local"}
    connection = await asyncpg.connect(url, server_settings=settings)
    try:
        yield connection
    finally:
        await connection.close()


async def fetch(database: str, query: str) -> list[tuple[Any, ...]]:
    async with admin(database) as connection:
        return [tuple(row) for row in await connection.fetch(query)]


async def results(database: str) -> Results:
    """All that must be equal however a run went."""
    return [
        await fetch(database, "SELECT * FROM spent ORDER BY payment_id"),
        await fetch(database, "SELECT * FROM large ORDER BY payment_id"),
        await fetch(
            database, "SELECT partition, next_offset, digest FROM ls_progress ORDER BY partition"
        ),
        await fetch(database, 'SELECT "offset", error FROM ls_dead_letters ORDER BY 1'),
    ]


_UNDISTURBED: list[Results] = []


@pytest.fixture
async def undisturbed(server: EmbeddedPostgres) -> Results:
    if not _UNDISTURBED:
        async with admin(server.url) as connection:
            await connection.execute("CREATE DATABASE undisturbed")
            url = server.url.replace("/ledgerstream?", "/undisturbed?")
            await Worker(Spending, log_of(), url, until="end").run()
            _UNDISTURBED.append(await results(url))
            await connection.execute("DROP DATABASE undisturbed WITH (FORCE)")
    return _UNDISTURBED[0]


async def until(fact: Callable[[], Awaitable[Any]]) -> Any:
    """Ask until it is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not (found := await fact()):
            await asyncio.sleep(0.01)
    return found


async def terminate(database: str) -> None:
    """End every worker's connection."""
    await fetch(
        database,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'ledgerstream%'",
    )


class Harm:
    """`run` a worker, and do `act` once it has committed `at` steps; it waits for its next chunk
    meanwhile."""

    def __init__(self, database: str, act: Callable[[], Awaitable[None]], at: int = 3) -> None:
        self.log = log_of()
        self.worker = Worker(Spending, self.log, database, until="end", on_progress=self._look)
        self._act = act
        self._at = at
        self._acting: asyncio.Task[None] | None = None

    def _look(self, progress: Progress) -> None:
        if progress.commits == self._at:
            self.log.gate.clear()
            self._acting = asyncio.create_task(self._do())

    async def _do(self) -> None:
        try:
            await self._act()
        finally:
            self.log.gate.set()

    async def run(self) -> Progress:
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.worker.run()
            finally:
                assert self._acting is not None
                await self._acting


# -- the connection


class AtEachMessage(Proxy):
    """Before Postgres: harm at the first message of a step, then at the second of the next try, and
    so on, until a step has no more messages than were harmed."""

    def __init__(
        self, database: str, verdict: Verdict, harm: Callable[[], Awaitable[None]]
    ) -> None:
        parts = urlsplit(database)
        socket = parse_qs(parts.query)["host"][0] + "/.s.PGSQL.5432"
        super().__init__(lambda: asyncio.open_unix_connection(socket))
        self._name = parts.path
        self._verdict = verdict
        self._harm = harm
        self._left: int | None = None  # messages of this step before the harm
        self.harmed = 0
        self.whole = False  # a step passed unharmed: each of its messages has had its turn

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}{self._name}?sslmode=disable"

    async def judged(self, data: bytes) -> Verdict:
        if data.startswith(_BEGIN) and not self.whole:
            self._left = self.harmed
        if self._left is None:
            return "pass"
        if self._left == 0:
            self._left = None
            self.harmed += 1
            await self._harm()
            return self._verdict
        self._left -= 1
        if data.startswith(_COMMIT):
            self.whole, self._left = True, None
        return "pass"


async def test_a_claim_whose_own_answer_is_lost_is_still_ours(
    database: str, undisturbed: Results
) -> None:
    """Hazard 1: the owner that it finds next time is no stranger."""

    class LoseClaims(Proxy):
        harmed = 0

        def __init__(self) -> None:
            host = parse_qs(urlsplit(database).query)["host"][0]
            super().__init__(lambda: asyncio.open_unix_connection(f"{host}/.s.PGSQL.5432"))

        def up(self, data: bytes) -> Verdict:
            commit = _COMMIT if self.harmed == 0 else _CLAIMED
            if self.worker.progress.commits > 0 and commit in data and self.harmed < 3:
                self.harmed += 1
                return "mute"
            return "pass"

    async with LoseClaims() as proxy:
        name = urlsplit(database).path
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}{name}?sslmode=disable"
        proxy.worker = Worker(Spending, log_of(), url, until="end")  # type: ignore[attr-defined]
        await proxy.worker.run()  # type: ignore[attr-defined]
    assert proxy.harmed == 3
    assert await results(database) == undisturbed
    assert await fetch(database, "SELECT owner_epoch FROM ls_progress") == [(4,)]


_CLAIMED = b"Q\x00\x00\x00\x0cCOMMIT;\x00"
_BEGIN = b"Q\x00\x00\x00\x0aBEGIN\x00"
_COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"
MESSAGES_MIN = 6  # of a step: begin, two tables, the offsets, commit


async def nothing() -> None:
    pass


@pytest.mark.parametrize("verdict", ["cut", "mute"])
async def test_a_connection_cut_at_any_message_of_a_step_counts_once(
    database: str, undisturbed: Results, verdict: Verdict
) -> None:
    """Hazards 1, 15: cut before the message arrives, or when its answer comes: COMMIT's too."""
    async with AtEachMessage(database, verdict, nothing) as proxy:
        await Worker(Spending, log_of(), proxy.url, until="end").run()
    assert proxy.whole and proxy.harmed >= MESSAGES_MIN
    assert await results(database) == undisturbed


async def test_a_backend_terminated_at_any_message_of_a_step_counts_once(
    database: str, undisturbed: Results
) -> None:
    async with AtEachMessage(database, "pass", lambda: terminate(database)) as proxy:
        await Worker(Spending, log_of(), proxy.url, until="end").run()
    assert proxy.whole and proxy.harmed >= MESSAGES_MIN
    assert await results(database) == undisturbed


async def test_a_connection_that_falls_silent_at_any_message_is_given_up(
    database: str, undisturbed: Results, server_times: Callable[..., None]
) -> None:
    """Hazard 2: what it held is free once the server, by its own clock, has ended what it had
    begun."""
    server_times(postgres_command_ms_max=500, postgres_idle_ms_max=300)
    async with AtEachMessage(database, "hang", nothing) as proxy:
        await Worker(Spending, log_of(), proxy.url, until="end").run()
    assert proxy.whole and proxy.harmed >= MESSAGES_MIN
    assert await results(database) == undisturbed


async def test_the_server_itself_ends_what_a_stopped_worker_has_begun(database: str) -> None:
    for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
        sink = await Sink.connect(database, Spending.name)
        assert await sink.connection.fetchval(f"SHOW {name}") not in ("0", "")
        await sink.close()


async def test_a_transaction_that_idles_too_long_is_made_again(
    database: str,
    undisturbed: Results,
    server_times: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hazard 13: 25P03."""
    bury, slow = Sink._bury, 2

    async def slowly(sink: Sink, pieces: Any) -> None:
        nonlocal slow
        if slow:
            slow -= 1
            backend = sink.connection.get_server_pid()
            await until(lambda: _is_gone(database, backend))
        await bury(sink, pieces)

    monkeypatch.setattr(Sink, "_bury", slowly)
    server_times(postgres_idle_ms_max=100)
    await Worker(Spending, log_of(), database, until="end").run()
    assert slow == 0
    assert await results(database) == undisturbed


async def _is_gone(database: str, pid: int) -> bool:
    return not await fetch(database, f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid}")


# -- the worker


@pytest.mark.parametrize("where", ["before", "copy", "move", "commit"])
async def test_a_worker_stopped_past_its_replacements_claim_commits_nothing(
    database: str, client: Client, our_broker: Broker, topic: str, where: str
) -> None:
    """Hazard 3: SIGSTOP before a step, inside its COPY, and with the offsets' rows locked; then
    SIGCONT."""
    await client.create_topic(topic)
    await client.write(topic, ROWS[:1_000], event=Payment, key="customer")
    zombie = await asyncio.create_subprocess_exec(
        sys.executable, str(CHILD), our_broker.address, topic, database, where,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert zombie.stdout is not None
        assert await zombie.stdout.readline() == b"1000\n"
        await client.write(topic, ROWS[1_000:], event=Payment, key="customer")
        await until(lambda: _is_stopped(zombie.pid))
        heir = await Worker(spending_of(topic), client, database, until="end").run()
        assert heir.events == COUNT - 1_000
        after = await results(database)
        zombie.send_signal(signal.SIGCONT)
        said, _ = await asyncio.wait_for(zombie.communicate(), PATIENCE_S)
    finally:
        if zombie.returncode is None:
            zombie.kill()
            await zombie.wait()
    assert f"another worker of Spending has taken over {topic}-0" in said.decode()
    assert await results(database) == after
    assert await fetch(database, "SELECT count(*), count(DISTINCT payment_id) FROM spent") == [
        (COUNT, COUNT)
    ]
    assert after[2][0][1] == COUNT


async def _is_stopped(pid: int) -> bool:
    return "State:\tT" in Path(f"/proc/{pid}/status").read_text()


# -- what the server answers


@pytest.mark.parametrize("state", ["40001", "40P01", "53100", "57014", "55P03", "58030"])
async def test_a_step_refused_for_now_is_made_again(
    database: str, undisturbed: Results, state: str
) -> None:
    """Hazards 6, 20: serialisation, deadlock, a full disk, a cancelled statement, a lock, an I/O
    error."""

    async def refuse_twice() -> None:
        # a sequence counts on, whatever becomes of its transaction
        async with admin(database) as connection:
            await connection.execute(f"""CREATE SEQUENCE tries;
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
                IF nextval('tries') <= 2 THEN RAISE 'not now' USING ERRCODE = '{state}'; END IF;
                RETURN NULL; END$$;
            CREATE TRIGGER refuse BEFORE UPDATE ON ls_progress EXECUTE FUNCTION refuse()""")

    await Harm(database, refuse_twice).run()
    assert (await fetch(database, "SELECT last_value FROM tries"))[0][0] > 2
    assert await results(database) == undisturbed


async def test_a_commit_that_is_answered_with_rollback_is_none(
    database: str, undisturbed: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 19."""
    bury, failing = Sink._bury, 2

    async def fail(sink: Sink, pieces: Any) -> None:
        nonlocal failing
        await bury(sink, pieces)
        if failing:  # the transaction fails, and whoever commits has not heard of it
            failing -= 1
            with contextlib.suppress(asyncpg.DivisionByZeroError):
                await sink.connection.execute("SELECT 1 / 0")

    move = Sink._move

    async def moved(sink: Sink, *given: Any) -> set[int]:
        try:
            return await move(sink, *given)
        except asyncpg.InFailedSQLTransactionError:
            return set()

    monkeypatch.setattr(Sink, "_bury", fail)
    monkeypatch.setattr(Sink, "_move", moved)
    with structlog.testing.capture_logs() as lines:
        await Worker(Spending, log_of(), database, until="end").run()
    assert sum("rolled the step back" in str(line.get("error")) for line in lines) == 2
    assert await results(database) == undisturbed


async def test_a_constraint_that_fails_at_commit_is_one_dead_letter(database: str) -> None:
    """Hazard 18: an error reply to COMMIT is a definite no."""
    rows = ROWS.copy()
    rows["payment_id"][2_345] = 17
    log = MemoryLog(Spending.source, TOPIC)
    log.write(rows[:1_000])
    await Worker(Spending, log, database, until="end").run()
    await fetch(database, "ALTER TABLE spent ADD UNIQUE (payment_id) DEFERRABLE INITIALLY DEFERRED")
    log.write(rows[1_000:])
    progress = await Worker(Spending, log, database, until="end").run()
    assert progress.dead == 1
    ((offset, error),) = await fetch(database, 'SELECT "offset", error FROM ls_dead_letters')
    assert offset == 2_345 and "23505" in error
    assert await fetch(database, "SELECT count(*) FROM spent") == [(COUNT - 1,)]
    assert await fetch(database, "SELECT next_offset FROM ls_progress") == [(COUNT,)]


@pytest.mark.parametrize(
    ("refuse", "allow", "said"),
    [
        ("ALTER ROLE clerk CONNECTION LIMIT 0", "ALTER ROLE clerk CONNECTION LIMIT -1", "53300"),
        (
            "ALTER ROLE clerk SET default_transaction_read_only = on",
            "ALTER ROLE clerk RESET default_transaction_read_only",
            "25006",
        ),
    ],
    ids=["too many connections", "read-only"],
)
async def test_a_server_that_refuses_for_a_while_is_waited_for(
    frail_database: str, undisturbed: Results, refuse: str, allow: str, said: str
) -> None:
    """Hazard 20."""
    async with admin(frail_database) as connection:
        with contextlib.suppress(asyncpg.DuplicateObjectError):
            await connection.execute("CREATE ROLE clerk LOGIN")
        await connection.execute("GRANT ALL ON SCHEMA public TO clerk")
    with structlog.testing.capture_logs() as lines:

        async def harm() -> None:
            await fetch(frail_database, refuse)
            await terminate(frail_database)
            allowing.append(asyncio.create_task(allow_later()))

        async def allow_later() -> None:
            await until(lambda: _said(lines, said))
            await fetch(frail_database, allow)
            await terminate(frail_database)

        allowing: list[asyncio.Task[None]] = []
        clerk = frail_database.replace("postgres@", "clerk@")
        await Harm(clerk, harm).run()
        await asyncio.gather(*allowing)
    assert await results(frail_database) == undisturbed


async def _said(lines: list[Any], what: str) -> bool:
    return any(what in str(line) for line in lines)


async def test_a_commit_that_its_standby_may_lack_is_verified_before_going_on(
    frail: EmbeddedPostgres, frail_database: str, undisturbed: Results
) -> None:
    """Hazard 9: a cancelled wait for its standby is answered with COMMIT and a warning."""
    waits = (
        "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE 'COMMIT%' "
        "AND datname = current_database() AND pid <> {}"
    )
    commits: list[int] = []

    async def standby(name: str) -> None:
        async with admin(frail.url) as connection:
            await connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
            await connection.execute("SELECT pg_reload_conf()")

    async def nobody_confirms() -> None:
        await standby("absent")
        watching.append(asyncio.create_task(cancel_the_wait()))

    async def cancel_the_wait() -> None:
        ((first,),) = await until(lambda: fetch(frail_database, waits.format(0)))
        await fetch(frail_database, f"SELECT pg_cancel_backend({first})")
        # it is not believed: another connection claims, and waits for the standby in its turn
        ((second,),) = await until(lambda: fetch(frail_database, waits.format(first)))
        commits.append(worker.progress.commits)
        await fetch(frail_database, f"SELECT pg_cancel_backend({second})")
        await until(lambda: fetch(frail_database, waits.format(second)))
        commits.append(worker.progress.commits)
        await standby("")

    watching: list[asyncio.Task[None]] = []
    harm = Harm(frail_database, nobody_confirms)
    worker = harm.worker
    await harm.run()
    await asyncio.gather(*watching)
    assert commits[0] == commits[1]  # nothing counted as done meanwhile
    assert await results(frail_database) == undisturbed


# -- the server


async def test_a_postgres_that_is_killed_comes_back_and_the_run_goes_on(
    frail: EmbeddedPostgres, frail_database: str, undisturbed: Results
) -> None:
    pids = []

    async def kill() -> None:
        pids.append(postmaster(frail))
        os.kill(pids[-1], signal.SIGKILL)

    await Harm(frail_database, kill).run()
    assert postmaster(frail) not in pids
    assert await results(frail_database) == undisturbed


async def test_state_is_loaded_again_where_the_timeline_has_changed(
    frail: EmbeddedPostgres, frail_database: str, undisturbed: Results
) -> None:
    """Hazard 8, what a failover leaves: what was committed is there, on another timeline."""
    async with admin(frail.url) as connection:
        await connection.execute("ALTER SYSTEM SET restore_command = 'false'")
    ((before,),) = await fetch(frail_database, "SELECT timeline_id FROM pg_control_checkpoint()")

    async def fail_over() -> None:
        (frail.home / "data" / "recovery.signal").touch()
        os.kill(postmaster(frail), signal.SIGKILL)

    with structlog.testing.capture_logs() as lines:
        await Harm(frail_database, fail_over).run()
    assert await _said(lines, "another database server, or another life of it")
    assert await fetch(frail_database, "SELECT DISTINCT timeline FROM ls_progress") == [
        (before + 1,)
    ]
    assert await results(frail_database) == undisturbed


def postmaster(server: EmbeddedPostgres) -> int:
    return int((server.home / "data" / "postmaster.pid").read_text().split()[0])


async def test_another_server_in_the_same_place_gets_all_results_of_its_own(
    database: str, frail_database: str, undisturbed: Results
) -> None:
    """Hazard 10, another system identifier: nothing that is in memory is carried over."""

    class Switch(Proxy):
        def __init__(self) -> None:
            self.target = database
            super().__init__(self._open)

        async def _open(self) -> Any:
            host = parse_qs(urlsplit(self.target).query)["host"][0]
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.5432")

    async with Switch() as switch, admin(frail_database) as connection:
        name = urlsplit(database).path.removeprefix("/")
        await connection.execute(f"CREATE DATABASE {name}")
        other = frail_database.replace(urlsplit(frail_database).path, f"/{name}")

        async def change() -> None:
            switch.target = other
            await terminate(database)

        url = f"postgresql://postgres@127.0.0.1:{switch.port}/{name}?sslmode=disable"
        await Harm(url, change).run()
        assert await results(other) == undisturbed
        assert len((await results(database))[0]) < COUNT
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


# -- the tables


Statement = str


@pytest.mark.parametrize(
    ("spoil", "repair", "said"),
    [
        (
            "ALTER TABLE spent ADD COLUMN approver text NOT NULL DEFAULT 'x';"
            "ALTER TABLE spent ALTER COLUMN approver DROP DEFAULT",
            "ALTER TABLE spent DROP COLUMN approver",
            'null value in column "approver"',
        ),
        (
            "ALTER TABLE spent RENAME COLUMN note TO remark",
            "ALTER TABLE spent RENAME COLUMN remark TO note",
            'column "note" of relation "spent" does not exist',
        ),
        (
            "ALTER TABLE spent ALTER COLUMN number TYPE integer",
            "ALTER TABLE spent ALTER COLUMN number TYPE bigint",
            "incorrect binary data format",
        ),
        (
            "ALTER TABLE spent RENAME TO spent_before",
            "ALTER TABLE spent_before RENAME TO spent",
            'relation "spent" does not exist',
        ),
        (
            "REVOKE INSERT ON spent FROM clerk",
            "GRANT INSERT ON spent TO clerk",
            "permission denied",
        ),
    ],
    ids=["a column more", "a column less", "another type", "no table", "no right"],
)
async def test_a_table_that_is_spoilt_stops_the_partition_until_it_is_put_right(
    frail_database: str, undisturbed: Results, spoil: Statement, repair: Statement, said: str
) -> None:
    """Not one event of it is taken for a bad one."""
    async with admin(frail_database) as connection:
        with contextlib.suppress(asyncpg.DuplicateObjectError):
            await connection.execute("CREATE ROLE clerk LOGIN")
        await connection.execute("GRANT ALL ON SCHEMA public TO clerk")
    clerk = frail_database.replace("postgres@", "clerk@")

    async def harm() -> None:
        async with admin(frail_database) as connection:
            await connection.execute(spoil)

    with pytest.raises(StoppedPartition, match=said) as stopped:
        await Harm(clerk, harm).run()
    assert stopped.value.remedy
    assert await fetch(frail_database, "SELECT * FROM ls_dead_letters") == []
    async with admin(frail_database) as connection:
        await connection.execute(repair)
    await Worker(Spending, log_of(), clerk, until="end").run()
    assert await results(frail_database) == undisturbed


async def test_a_locked_table_is_waited_for_and_named(
    database: str, undisturbed: Results, server_times: Callable[..., None]
) -> None:
    server_times(postgres_lock_ms_max=100)
    with structlog.testing.capture_logs() as lines:
        locked = asyncio.Event()

        async def lock() -> None:
            holding.append(asyncio.create_task(hold()))
            await locked.wait()

        async def hold() -> None:
            async with admin(database) as connection, connection.transaction():
                await connection.execute("LOCK TABLE spent IN ACCESS EXCLUSIVE MODE")
                locked.set()
                await until(lambda: _said(lines, "keeps table 'spent' locked"))

        holding: list[asyncio.Task[None]] = []
        await Harm(database, lock).run()
        await asyncio.gather(*holding)
    assert await results(database) == undisturbed


# -- the processor


class Fraught(Spending):
    """Does what `Fraught.harm` does at the 1,234th payment."""

    source = Spending.source
    harm: Callable[[Batch], Any]

    def process(self, batch: Batch, state: State) -> Any:
        rows = super().process(batch, state)
        if (batch.payment_id == 1_234).any():
            return type(self).harm(batch)
        return rows


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda batch: 1 // 0, "Fraught.process raised ZeroDivisionError"),
        (lambda batch: Large.rows(batch, spent=np.zeros(3, int)), "spent has shape \\(3,\\)"),
        (lambda batch: Large.rows(batch, spent=np.zeros(len(batch))), "spent"),
        (lambda batch: "rows", "Fraught.process returned str"),
        (lambda batch: [None], "Fraught.process returned NoneType"),
    ],
    ids=["raises", "another length", "another type", "no rows", "no rows in a list"],
)
async def test_a_processor_at_fault_stops_its_partition_and_nothing_is_committed(
    database: str, monkeypatch: pytest.MonkeyPatch, harm: Any, said: str
) -> None:
    """In a sentence that names it, and the events."""
    monkeypatch.setattr(Fraught, "harm", staticmethod(harm), raising=False)
    with pytest.raises(StoppedPartition, match=said) as stopped:
        await Worker(Fraught, log_of(), database, until="end").run()
    sentence = str(stopped.value)
    assert "payments-0 stopped at offset 1,200" in sentence
    assert "Fraught" in sentence and "[1,200, 1,500)" in sentence
    assert await fetch(database, "SELECT next_offset FROM ls_progress") == [(1_200,)]
    assert await fetch(database, "SELECT count(*), max(payment_id) FROM spent") == [(1_200, 1_199)]
    assert await fetch(database, "SELECT * FROM ls_dead_letters") == []


async def test_a_processor_that_does_not_end_stops_the_worker_and_nothing_is_committed(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread cannot be stopped: the worker goes, and what it does later is for nobody."""
    ending = threading.Event()

    def wait(batch: Batch) -> list[Rows]:
        ending.wait(PATIENCE_S)
        return []

    monkeypatch.setattr(Fraught, "harm", staticmethod(wait), raising=False)
    monkeypatch.setattr(threads, "LIMITS", dataclasses.replace(LIMITS, compute_ms_max=500))
    log = log_of(2)
    sick = int(log.codec.hashes(ROWS[1_234:1_235])[0]) % 2
    worker = Worker(Fraught, log, database, until="end")
    try:
        with pytest.raises(StoppedPartition, match="does not come to an end over"):
            await asyncio.wait_for(worker.run(), PATIENCE_S)
        assert sorted(worker.stopped) == [0, 1]
        assert f"of payments-{sick}" in str(worker.stopped[1 - sick])
        before = await results(database)
    finally:
        ending.set()
    assert (1_234,) not in await fetch(database, "SELECT payment_id FROM spent")
    await Worker(Spending, log, database, until="restored").run()
    assert (await results(database))[0] == before[0]


def test_a_process_whose_processor_does_not_end_ends(tmp_path: Path) -> None:
    """A thread that is at work for ever does not keep it."""
    code = """
import asyncio, dataclasses, itertools, sys
from ledgerstream.stream import threads
threads.LIMITS = dataclasses.replace(threads.LIMITS, compute_ms_max=200)
async def main():
    compute = threads.Compute()
    try:
        await compute.limited(lambda: [None for _ in itertools.count() if False])
    except threads.Endless as error:
        print(error)
    compute.close()
asyncio.run(main())
sys.exit(4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (4, b"")
    assert b"It has not ended within 0.2 s." in done.stdout


# -- the topic


async def test_a_topic_that_is_made_again_under_a_running_worker_stops_it(
    database: str, client: Client, topic: str
) -> None:
    """Hazard 23: its events stand at the old ones' offsets, and are not taken for them."""
    await client.create_topic(topic)
    await client.write(topic, ROWS[:500], event=Payment, key="customer")
    counted = asyncio.Event()

    def look(progress: Progress) -> None:
        if progress.position[0] == 500:
            counted.set()

    running = asyncio.create_task(
        Worker(spending_of(topic), client, database, on_progress=look).run()
    )
    await asyncio.wait_for(counted.wait(), PATIENCE_S)
    await client.delete_topic(topic)
    await client.create_topic(topic)
    await client.write(topic, ROWS[500:2_000], event=Payment, key="customer")
    with pytest.raises(StoppedPartition, match="was deleted and created again"):
        await asyncio.wait_for(running, PATIENCE_S)
    assert await fetch(database, "SELECT count(*), max(payment_id) FROM spent") == [(500, 499)]


# -- the rest of the table


class Wallet(Table):
    customer: Mapped[int] = mapped_column(primary_key=True)
    spent: Mapped[int]


class Till(Table):
    terminal: Mapped[int] = mapped_column(primary_key=True)
    last: Mapped[int]


class ThisWay(Processor):
    source = Spending.source

    def process(self, batch: Batch, state: State) -> list[Rows]:
        return [
            Wallet.upsert(batch, customer=batch.customer, spent=batch.amount),
            Till.upsert(batch, terminal=batch.terminal, last=batch.payment_id),
        ]


class ThatWay(ThisWay):
    source = Spending.source

    def process(self, batch: Batch, state: State) -> list[Rows]:
        return super().process(batch, state)[::-1]


async def test_processors_that_upsert_the_same_rows_do_not_deadlock(database: str) -> None:
    """Hazard 7: keys sorted, and one order of tables, whatever order `process` returns them in."""
    workers = [Worker(each, log_of(), database, until="end") for each in (ThisWay, ThatWay)]
    before = await fetch(database, _DEADLOCKS)
    with structlog.testing.capture_logs() as lines:
        await asyncio.gather(*[each.run() for each in workers])
    assert all(each.progress.commits >= COUNT / 300 for each in workers)
    assert not await _said(lines, "40P01") and await fetch(database, _DEADLOCKS) == before
    last = {int(row["customer"]): int(row["amount"]) for row in ROWS}
    assert dict(await fetch(database, "SELECT customer, spent FROM wallet")) == last


_DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


async def test_a_deadlock_with_somebody_else_is_made_again(
    database: str, undisturbed: Results
) -> None:
    """Hazard 7, 40P01 by Postgres itself: a stranger takes our rows and tables the other way."""
    tangled = 0

    async def tangle() -> None:
        ready = asyncio.Event()
        tangles.append(asyncio.create_task(lock_against(ready)))
        await ready.wait()

    async def lock_against(ready: asyncio.Event) -> None:
        nonlocal tangled
        async with admin(database) as connection:
            async with connection.transaction():
                # it is the worker who finds the ring, and is refused
                await connection.execute("SET LOCAL deadlock_timeout = '10min'")
                await connection.execute("LOCK TABLE ls_progress IN ROW EXCLUSIVE MODE")
                await connection.execute("SELECT FROM ls_progress FOR UPDATE")
                ready.set()
                await until(lambda: fetch(database, _WAITING))
                await connection.execute("LOCK TABLE spent IN ACCESS EXCLUSIVE MODE")
                tangled += 1

    tangles: list[asyncio.Task[None]] = []
    with structlog.testing.capture_logs() as lines:
        await Harm(database, tangle).run()
        await asyncio.gather(*tangles)
    assert tangled == 1 and await _said(lines, "40P01")
    assert await results(database) == undisturbed


_WAITING = """SELECT 1 FROM pg_stat_activity WHERE datname = current_database()
  AND application_name = 'ledgerstream Spending' AND wait_event_type = 'Lock'"""


async def test_a_step_is_bounded_however_much_a_fetch_brings(
    database: str, undisturbed: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 12."""
    monkeypatch.setattr(source, "LIMITS", dataclasses.replace(LIMITS, step_rows_max=300))
    log = log_of()
    log.chunk_batches = 25  # 2,500 payments in one piece
    await Worker(Spending, log, database, until="end").run()
    ((most, steps),) = await fetch(database, "SELECT max(events), count(*) FROM ls_steps")
    assert most <= 300 and steps >= COUNT / 300
    assert await results(database) == undisturbed


async def test_while_the_database_stands_little_is_read_and_all_else_goes_on(
    database: str, undisturbed: Results
) -> None:
    """Hazard 12: memory is bounded, and what shares the loop, as heartbeats do, does not wait."""
    longest = reads = 0.0

    async def beat() -> None:
        nonlocal longest
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(0.005)
            longest = max(longest, loop.time() - before)

    async def stand_still() -> None:
        ready = asyncio.Event()
        standing.append(asyncio.create_task(hold(ready)))
        await ready.wait()

    async def hold(ready: asyncio.Event) -> None:
        nonlocal longest, reads
        async with admin(database) as connection, connection.transaction():
            await connection.execute("LOCK TABLE spent IN ACCESS EXCLUSIVE MODE")
            ready.set()
            await until(lambda: fetch(database, _WAITING))
            longest, before = 0.0, harm.log.reads
            beats = asyncio.create_task(beat())
            await asyncio.sleep(1)  # how long the database stands
            beats.cancel()
            reads = harm.log.reads - before

    standing: list[asyncio.Task[None]] = []
    harm = Harm(database, stand_still)
    await harm.run()
    await asyncio.gather(*standing)
    assert reads <= 3  # a step that waits, and a chunk ahead
    assert longest < 0.5
    assert await results(database) == undisturbed


async def _copied(database: str, name: str) -> str:
    """A backup, taken and restored: another database with the same content, from here on apart."""
    async with admin(database.replace(urlsplit(database).path, "/ledgerstream")) as connection:
        old = urlsplit(database).path.removeprefix("/")
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {old}")
    return database.replace(urlsplit(database).path, f"/{name}")


async def _dropped(database: str) -> None:
    path = urlsplit(database).path
    async with admin(database.replace(path, "/ledgerstream")) as connection:
        await connection.execute(f"DROP DATABASE {path.removeprefix('/')} WITH (FORCE)")


@pytest.mark.parametrize("removed", [0, 1_500, 2_500])
async def test_a_database_restored_from_a_backup_goes_on_from_its_own_offsets(
    database: str, undisturbed: Results, removed: int
) -> None:
    """Hazards 8, 22: results and offsets are as old as each other. Where retention has removed what
    comes next, the partition stops and says so."""
    log = MemoryLog(Spending.source, TOPIC)
    log.write(ROWS[:2_000])
    await Worker(Spending, log, database, until="end").run()
    backup = await _copied(database, f"restored_{removed}")
    try:
        log.write(ROWS[2_000:])
        await Worker(Spending, log, database, until="end").run()
        assert await results(database) == undisturbed
        log.log_start[0] = removed
        late = Worker(Spending, log, backup, until="end")
        if removed <= 2_000:
            await late.run()
            assert await results(backup) == undisturbed
            return
        before = await results(backup)
        with pytest.raises(StoppedPartition, match="retention removed 500 events") as stopped:
            await late.run()
        assert "payments-0 stopped at offset 2,000" in str(stopped.value)
        assert "Restore them" in stopped.value.remedy
        assert await results(backup) == before
    finally:
        await _dropped(backup)


async def test_offsets_may_have_holes(database: str) -> None:
    """Hazard 4: as compaction and markers leave them; also when state is brought back over them."""
    log = log_of()
    for gone in (30, 20, 9):
        del log.batches[0][gone]
    half, log.ends[0] = log.ends[0], 2_500
    everything, log.batches[0] = log.batches[0], log.batches[0][:23]
    await Worker(Spending, log, database, until="end").run()
    await fetch(database, "DELETE FROM ls_snapshots")
    log.batches[0], log.ends[0] = everything, half
    await Worker(Spending, log, database, until="end").run()
    assert await fetch(database, "SELECT next_offset FROM ls_progress") == [(COUNT,)]
    wanted = [n for n in range(COUNT) if n // 100 not in (9, 20, 30)]
    found = await fetch(database, "SELECT ls_offset FROM spent ORDER BY 1")
    assert [offset for (offset,) in found] == wanted


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_a_stricter_isolation_changes_nothing(
    database: str, undisturbed: Results, level: str
) -> None:
    """Hazard 5: compare-and-set is right under READ COMMITTED, and above it."""
    name = urlsplit(database).path.removeprefix("/")
    await fetch(database, f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")
    await Worker(Spending, log_of(), database, until="end").run()
    assert await results(database) == undisturbed


@pytest.mark.parametrize(
    ("change", "at", "state"),
    [
        ("ALTER TABLE spent ADD CHECK (payment_id <> 2345)", 2_345, "23514"),
        (
            "CREATE TABLE known (id bigint PRIMARY KEY);"
            "INSERT INTO known SELECT n FROM generate_series(0, 4000) n WHERE n <> 2345;"
            "ALTER TABLE spent ADD FOREIGN KEY (payment_id) REFERENCES known",
            2_345,
            "23503",
        ),
        (
            "ALTER TABLE spent ADD EXCLUDE (payment_id WITH =) WHERE (payment_id = 17)",
            2_345,
            "23P01",
        ),
        ("", 2_345, "22021"),
        ("", 2_345, "NUL"),
    ],
    ids=["check", "foreign key", "exclusion", "no UTF-8", "NUL in text"],
)
async def test_what_postgres_refuses_is_one_dead_letter(
    database: str, change: str, at: int, state: str
) -> None:
    """Hazards 16, 17: it is found by halves, and goes in the same transaction as the offset."""
    rows = ROWS.copy()
    if state in ("22021", "NUL"):
        rows["note"][at] = b"a\0b" if state == "NUL" else b"a\xff"
    if state == "23P01":
        rows["payment_id"][at] = 17
    log = MemoryLog(Spending.source, TOPIC)
    log.write(rows[:1_000])
    await Worker(Spending, log, database, until="end").run()
    if change:
        async with admin(database) as connection:
            await connection.execute(change)
    log.write(rows[1_000:])
    progress = await Worker(Spending, log, database, until="end").run()
    assert progress.dead == 1
    ((offset, error),) = await fetch(database, 'SELECT "offset", error FROM ls_dead_letters')
    assert offset == at and state in error
    assert await fetch(database, "SELECT count(*) FROM spent") == [(COUNT - 1,)]
    assert await fetch(database, "SELECT next_offset FROM ls_progress") == [(COUNT,)]


def test_ownership_is_never_an_advisory_lock_nor_a_prepared_transaction() -> None:
    """Hazards 14, 21: advisory locks only keep two from making tables, or retrying, at once."""
    stream = Path(streaming.__file__).parent
    found = {path.name for path in stream.glob("*.py") if "advisory" in path.read_text()}
    assert found == {"schema.py", "retry.py"}
    assert not any("PREPARE TRANSACTION" in path.read_text() for path in stream.glob("*.py"))


async def test_a_server_that_may_forget_is_refused_also_where_it_learns_that_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hazard 24, on a server whose settings are not ours: fsync and synchronous_commit are asked
    for at the start, and what a reload changes then does not reach the worker's session."""
    for name in ("fsync", "synchronous_commit"):
        monkeypatch.delitem(postgres._SETTINGS, name)
    with (
        tempfile.TemporaryDirectory(prefix="ledgerstream-") as directory,
        EmbeddedPostgres.start(Path(directory)) as server,
    ):
        sink = await Sink.connect(server.url, Spending.name)
        plain = await asyncpg.connect(server.url)

        async def reload(name: str, value: str) -> None:
            await plain.execute(f"ALTER SYSTEM SET {name} = {value}")
            await plain.execute("SELECT pg_reload_conf()")
            await until(lambda: _shows(plain, name, value))

        await reload("synchronous_commit", "off")
        assert await sink.connection.fetchval("SHOW synchronous_commit") == "on"
        with pytest.raises(ConfigError, match="synchronous_commit = off"):
            await Worker(Spending, log_of(), server.url, until="end").run()
        await reload("synchronous_commit", "on")
        await reload("fsync", "off")
        with pytest.raises(ConfigError, match="fsync = off") as refused:
            await Worker(Spending, log_of(), server.url, until="end").run()
        assert "fsync = on" in refused.value.remedy
        await plain.close()
        await sink.close()


async def _shows(connection: asyncpg.Connection, name: str, value: str) -> bool:
    return bool(await connection.fetchval(f"SHOW {name}") == value)


async def test_a_table_that_was_dropped_while_stopped_is_not_made_anew_without_a_word(
    database: str, undisturbed: Results
) -> None:
    log = MemoryLog(Spending.source, TOPIC)
    log.write(ROWS[:1_000])
    await Worker(Spending, log, database, until="end").run()
    await fetch(database, "CREATE TABLE kept AS SELECT * FROM spent")
    await fetch(database, "DROP TABLE spent")
    log.write(ROWS[1_000:])
    with pytest.raises(StoppedPartition, match="table 'spent' is gone") as stopped:
        await Worker(Spending, log, database, until="end").run()
    assert "Spending has committed results into it" in str(stopped.value)
    ((why,),) = await fetch(database, "SELECT why FROM ls_lag")
    assert "table 'spent' is gone" in why
    assert await fetch(database, "SELECT next_offset FROM ls_progress") == [(1_000,)]
    await fetch(database, "ALTER TABLE kept RENAME TO spent")
    await Worker(Spending, log, database, until="end").run()
    assert await results(database) == undisturbed


def test_each_hazard_that_one_machine_can_show_is_named_by_a_test() -> None:
    """The table of exactly-once, part 5. 11 needs topics as output, which are not there yet."""
    texts = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = {
        int(number)
        for each in re.findall(r"Hazards? ([0-9, ]+)", texts)
        for number in each.replace(",", " ").split()
    }
    assert named >= set(range(1, 25)) - {11}
