"""A changed declaration of state: what can be migrated is, and anything else is named."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
from typing import Any

import asyncpg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Mapped

from ledgerstream.errors import LedgerStreamError, NotReproduced, StoppedPartition
from ledgerstream.events import Event, Int8, Int16, Int32, Text, Timestamp
from ledgerstream.limits import LIMITS
from ledgerstream.money import EUR, USD
from ledgerstream.stream import streaming
from ledgerstream.stream import worker as worker_module
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.explain import explain, find_rows, state_at
from ledgerstream.stream.migration import differences, migrated, moves, stored_specs
from ledgerstream.stream.processor import Keyed, Processor, Sliding, State, Topic
from ledgerstream.stream.replay import Past
from ledgerstream.stream.reports import ReportKind, Reports
from ledgerstream.stream.sessions import Session
from ledgerstream.stream.snapshot import declared, layout_of
from ledgerstream.stream.state import Declaration, Spec
from ledgerstream.stream.tables import Rows, Table
from ledgerstream.stream.verify import verify
from ledgerstream.stream.windows import Count, Distinct, Ewm, Max, Sum, TopK, Tumbling
from ledgerstream.stream.worker import Progress, Worker
from tests.stream.memorylog import MemoryLog
from tests.stream.spending import Payment, payments
from tests.stream.test_worker import TOPIC, fetch


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class MoreColours(enum.Enum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


class OtherColours(enum.Enum):
    BLUE = "blue"
    RED = "red"


class Order(Event):
    at: Timestamp
    account: int
    other: int
    amount: EUR
    country: Text[2]  # type: ignore[valid-type]
    name: Text[9]  # type: ignore[valid-type]
    kind: ReportKind = ReportKind.NEW


SOURCE = Topic("orders", Order, key="account")
REPORTS = Reports(id="account", of="other", kind="kind")


def resolved(**states: Declaration) -> dict[str, Spec]:
    return {name: each.resolve(f"Balances.{name}", SOURCE) for name, each in states.items()}


def between(new: dict[str, Spec], old: dict[str, Spec]) -> list[str]:
    return differences("Balances", declared(new), declared(old))


def accounts(by: str = "account", expire: str | None = None, **columns: Any) -> dict[str, Spec]:
    return resolved(accounts=Keyed(by=by, expire=expire, **columns))


INTS = {Int8: np.int8, Int16: np.int16, Int32: np.int32, int: np.int64}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_migrated_is_what_a_table_with_these_columns_would_hold(data: Any) -> None:
    """Any columns, widened, reordered and with others between; every key; against a state that
    had the new declaration from the beginning."""
    kinds = list(INTS)
    widths = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))
    old = {f"c{n}": kinds[width] for n, width in enumerate(widths)} | {"word": Text[3]}
    wider = {
        name: kinds[data.draw(st.integers(kinds.index(kind), 3))]
        for name, kind in old.items()
        if name != "word"
    } | {"word": Text[data.draw(st.integers(3, 12))]}
    added = {f"new{n}": data.draw(st.sampled_from([*kinds, bool, float])) for n in range(2)}
    new = dict(data.draw(st.permutations([*wider.items(), *added.items()])))
    by = data.draw(st.sampled_from(["account", "country", "name"]))
    expire = data.draw(st.sampled_from([None, "1h"]))
    count = data.draw(st.integers(0, 20))

    orders = np.zeros(count, Order.dtype())
    orders["account"] = np.arange(count)
    orders["country"] = [b"%d" % n for n in range(count)]
    orders["name"] = [b"number %d" % n for n in range(count)]
    values = {
        name: np.array(
            [data.draw(st.integers(np.iinfo(dtype).min, np.iinfo(dtype).max)) for _ in orders],
            dtype,
        )
        for name, dtype in ((name, INTS.get(kind)) for name, kind in old.items())
        if dtype is not None
    } | {"word": np.array([b"abc", b"d", b""] * 7, "S3")[:count]}

    def state(columns: dict[str, Any]) -> tuple[dict[str, Spec], State]:
        specs = accounts(by, expire, **columns)
        state = State(specs)
        state.begin(count)
        for segment in state.segments(Batch(SOURCE, orders, np.arange(count))):
            held = state.accounts.at(segment[by])
            for name, column in values.items():
                getattr(held, name)[held.row] = column
        state.seal()
        return specs, state

    before, there = state(old)
    after, wanted = state(new)
    assert between(after, before) == []
    assert moves(before, after)
    content = there.dump()
    known = stored_specs(after, declared(before))
    checked = State(known)
    checked.load(content)
    assert checked.digest() == there.digest()
    result = State(after)
    result.load(migrated(known, after, content))
    assert result.digest() == wanted.digest()
    for name, column in wanted.columns()["accounts"].items():
        np.testing.assert_array_equal(result.columns()["accounts"][name], column)


def test_the_same_declaration_moves_nothing() -> None:
    specs = accounts(balance=EUR, note=Text[4])
    assert not moves(stored_specs(specs, declared(specs)), specs)


DAY = {"over": "24h", "sum": "amount"}
BARS = {"over": "1min", "low": Count(), "high": Max("amount")}


@pytest.mark.parametrize(
    ("old", "new", "sentences"),
    [
        (
            accounts(balance=EUR, limit=int),
            accounts(balance=EUR, limit=Int32),
            ["Balances.accounts: column 'limit' is declared as int32, and stored as int64."],
        ),
        (
            accounts(balance=EUR, limit=int),
            accounts(balance=EUR),
            ["Balances.accounts: column 'limit' is stored as int64, and not declared."],
        ),
        (
            accounts(balance=EUR, note=Text[8], big=bool),
            accounts(balance=USD, note=Text[7], big=Int8),
            [
                "Balances.accounts: column 'balance' is declared as USD, and stored as EUR.",
                "Balances.accounts: column 'note' is declared as Text[7], and stored as Text[8].",
                "Balances.accounts: column 'big' is declared as int8, and stored as bool.",
            ],
        ),
        (
            accounts(n=int, since=int, some=Int32),
            accounts(n=float, since=Timestamp, some=EUR),
            [
                "Balances.accounts: column 'n' is declared as float64, and stored as int64.",
                "Balances.accounts: column 'since' is declared as Timestamp, and stored as int64.",
                "Balances.accounts: column 'some' is declared as EUR, and stored as int32.",
            ],
        ),
        (
            accounts(colour=Colour),
            accounts(colour=OtherColours),
            [
                "Balances.accounts: column 'colour' is declared as an enum (BLUE, RED), and stored "
                "as an enum (RED, BLUE)."
            ],
        ),
        (accounts(colour=Colour), accounts(colour=MoreColours), []),
        (
            accounts(n=int),
            accounts("other", n=int),
            ["Balances.accounts is declared by 'other', and stored by 'account'."],
        ),
        (
            accounts("country", n=int),
            accounts(n=int),
            ["Balances.accounts is declared by 'account', and stored by 'country' (Text[2])."],
        ),
        (
            accounts(expire="30d", n=int),
            accounts(expire="36h", n=int),
            ["Balances.accounts: 'expire' is declared as 36h, and stored as 30d."],
        ),
        (
            accounts(n=int),
            accounts(expire="30d", n=int),
            [
                "Balances.accounts: 'expire' is declared as 30d, and stored as none.",
                "Balances.accounts: 'time' is declared as 'at', and stored as none.",
            ],
        ),
        (
            resolved(day=Sliding(by="account", **DAY)),
            resolved(day=Sliding(by="account", over=("1h", "24h"), late="2h", delay="1min")),
            [
                "Balances.day: 'sum' is declared as none, and stored as 'amount'.",
                "Balances.day: 'over' is declared as 1h, 1d, and stored as 1d.",
                "Balances.day: 'delay' is declared as 1m, and stored as 0d.",
                "Balances.day: 'late' is declared as 2h, and stored as 1h.",
            ],
        ),
        (
            resolved(day=Sliding(by="account", **DAY), seen=Keyed(by="account", n=int)),
            resolved(day=Keyed(by="account", n=int), last=Keyed(by="account", n=int)),
            [
                "Balances.day is declared as Keyed, and stored as Sliding.",
                "Balances.seen is stored, and not declared.",
                "Balances.last is declared, and not stored.",
            ],
        ),
        (
            resolved(bars=Tumbling(by="country", **BARS)),
            resolved(bars=Tumbling(by="country", over="1min", high=Sum("amount"), n=Count())),
            [
                "Balances.bars: column 'low' is stored, and not declared.",
                "Balances.bars: column 'high' is declared with another aggregate than is stored.",
                "Balances.bars: column 'n' is declared, and not stored.",
            ],
        ),
        (
            resolved(bars=Tumbling(by="account", **BARS)),
            resolved(bars=Tumbling(by="account", over="1min", high=Max("amount"), low=Count())),
            ["Balances.bars: columns are declared in the order high, low, and stored in the order "
             "low, high."],
        ),
        (
            resolved(bars=Tumbling(
                by="country", over="1min", n=Distinct("name"), m=Ewm("amount", halflife="1s"),
                t=TopK("other", k=3, by=Count()), s=Distinct("other", limit=9),
            )),
            resolved(bars=Tumbling(
                by="country", over="1min", n=Distinct("name", approximate=True),
                m=Ewm("amount", halflife="2s"), t=TopK("other", k=4, by=Count()),
                s=Distinct("other", limit=8),
            )),
            [f"Balances.bars: column {name!r} is declared with another aggregate than is stored."
             for name in "nmts"],
        ),
        (
            resolved(bars=Session(by="country", gap="1min", n=Count())),
            resolved(bars=Session(
                by="account", gap="2min", delay="1s", late="3s", on_late="drop", n=Sum("amount")
            )),
            [
                "Balances.bars is declared by 'account', and stored by 'country' (Text[2]).",
                "Balances.bars: 'gap' is declared as 2m, and stored as 1m.",
                "Balances.bars: 'delay' is declared as 1s, and stored as 0d.",
                "Balances.bars: 'late' is declared as 0d, and stored as 1m.",
                "Balances.bars: 'on_late' is declared as 'drop', and stored as 'correct'.",
                "Balances.bars: column 'n' is declared with another aggregate than is stored.",
            ],
        ),
        (
            resolved(bars=Session(by="country", gap="1min", n=Count())),
            resolved(bars=Tumbling(by="country", over="1min", n=Count())),
            ["Balances.bars is declared as Tumbling or Hopping, and stored as Session."],
        ),
        (
            resolved(bars=Tumbling(by="country", **BARS)),
            resolved(bars=Tumbling(by="country", reports=REPORTS, **BARS)),
            ["Balances.bars: 'reports' is declared as ['account', 'other', 'kind', 'count'], and "
             "stored as none."],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_migrated_is_named(
    old: dict[str, Spec], new: dict[str, Spec], sentences: list[str]
) -> None:
    assert between(new, old) == sentences
    assert between(new, new) == between(old, old) == []


def test_a_layout_that_does_not_tell_kinds_is_judged_by_its_types() -> None:
    """As snapshots had it before kinds were stored."""
    stored = {"accounts": ["keyed", "country", "|S2", [["balance", "<i8"], ["n", "<i4"]]]}
    new = accounts("country", n=int, balance=EUR)
    assert differences("Balances", declared(new), stored) == []
    old = stored_specs(new, stored)
    assert moves(old, new)
    assert old["accounts"].row == accounts("country", balance=EUR, n=Int32)["accounts"].row  # type: ignore[attr-defined]


def test_stored_layouts_are_what_they_always_were() -> None:
    """If this must change, so must `snapshot.FORMAT`: what is stored would be misread."""
    specs = resolved(
        seen=Keyed(by="name", expire="1h", n=Int32, big=bool, sum=EUR, colour=Colour),
        day=Sliding(by="account", **DAY),
        bars=Tumbling(by="account", **BARS),
    )
    state = State(specs)
    rows = np.zeros(1, Order.dtype())
    rows["name"] = b"one"
    batch = Batch(SOURCE, rows, np.arange(1))
    state.begin(1)
    for segment in state.segments(batch):
        state.seen.at(segment.name)
        state.day.add(segment)
        state.bars.add(segment)
    state.seal()
    assert json.loads(layout_of(specs, state.dump())) == {
        "format": 1,
        "states": {
            "seen": [
                "keyed", "name", "|S9",
                [["n", "<i4", "int"], ["big", "|b1", "bool"], ["sum", "<i8", "money:EUR"],
                 ["colour", "<i2", "enum|RED|BLUE|"]],
                3600 * 10**9, "at",
            ],
            "day": ["sliding", "account", "at", "amount", [86_400 * 10**9], 0, 3600 * 10**9],
            "bars": [
                "windows", "account", "at", [60 * 10**9], [60 * 10**9], 0, 60 * 10**9,
                [["low", 5, None, None], ["high", 3, "amount", None]],
            ],
        },
        "arrays": [
            ["seen", "rows", "<i8", [1, 7]], ["seen", "clock", "<i8", [1, 3]],
            ["day", "rows", "<i8", [1, 4]], ["day", "lives", "<i8", [1]],
            ["day", "pairs", "<i8", [1, 2]],
            ["bars", "rows", "<i8", [1, 9]], ["bars", "clock", "<i8", [1, 4]],
        ],
    }  # fmt: skip


class Sums(Table):
    payment_id: Mapped[int]
    balance: Mapped[EUR]
    payments: Mapped[int]
    largest: Mapped[EUR]


class Old(Processor):
    name = "Balances"
    source = Topic("payments", Payment, key="customer")
    accounts = Keyed(by="customer", balance=EUR, payments=Int32)
    keeps = ("balance", "payments")

    def process(self, batch: Batch, state: State) -> Rows:
        held = state.accounts.at(batch.customer)
        seen = np.zeros((3, len(batch)), np.int64)
        for n, (row, amount) in enumerate(zip(held.row, batch.amount, strict=True)):
            held.balance[row] += amount
            held.payments[row] += 1
            seen[:2, n] = held.balance[row], held.payments[row]
            if "largest" in self.keeps:
                held.largest[row] = max(held.largest[row], amount)
                seen[2, n] = held.largest[row]
        return Sums.rows(batch, balance=seen[0], payments=seen[1], largest=seen[2])


class New(Old):
    name = "Balances"
    accounts = Keyed(by="customer", largest=EUR, payments=int, balance=EUR)
    keeps = (*Old.keeps, "largest")


class Stateless(Processor):
    name = "Balances"
    source = Old.source

    def process(self, batch: Batch, state: State) -> None:
        pass


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several commits a run; and the code of a class is known by its name."""
    monkeypatch.setattr(streaming, "LIMITS", dataclasses.replace(LIMITS, step_rows_max=300))
    monkeypatch.setattr(worker_module, "code_version", lambda processor: processor.__name__)


def log_of(rows: np.ndarray, partitions: int = 1) -> MemoryLog:
    log = MemoryLog(Old.source, TOPIC, partitions)
    log.write(rows)
    return log


async def run(processor: type[Processor], log: MemoryLog, database: str, **options: Any) -> None:
    await Worker(processor, log, database, until="end", **options).run()


async def crash(processor: type[Processor], log: MemoryLog, database: str) -> None:
    """Run it, and take it down after its second commit, without a snapshot."""

    def down(progress: Progress) -> None:
        if progress.commits == 2:
            task.cancel()

    task = asyncio.create_task(run(processor, log, database, on_progress=down))
    await asyncio.wait([task])
    assert task.cancelled()


def sums(rows: np.ndarray, since: int) -> list[tuple[int, ...]]:
    """What `Old` gives below payment `since`, and `New` from there on, by hand."""
    found = []
    for n, row in enumerate(rows):
        mine = rows[: n + 1][rows["customer"][: n + 1] == row["customer"]]
        new = mine["amount"][mine["payment_id"] >= since]
        found.append((n, int(mine["amount"].sum()), len(mine), int(new.max(initial=0))))
    return found


async def stored(database: str) -> list[tuple[Any, ...]]:
    return await fetch(
        database, "SELECT payment_id, balance, payments, largest FROM sums ORDER BY 1"
    )


async def changes(database: str) -> list[tuple[Any, ...]]:
    return await fetch(
        database,
        "SELECT first_offset, next_offset, old_code_version, new_code_version "
        "FROM ls_code_changes ORDER BY accepted_at, next_offset",
    )


@pytest.mark.parametrize("crashes", [False, True])
async def test_state_goes_on_with_a_changed_declaration(database: str, crashes: bool) -> None:
    """Also where the worker dies before it has taken a snapshot in the new layout."""
    rows = payments(2_000)
    log = log_of(rows[:1_000], partitions=2)
    await run(Old, log, database)
    before = await fetch(database, "SELECT layout FROM ls_snapshots")
    assert [json.loads(layout)["states"] for (layout,) in before] == 2 * [declared(Old.states)]
    ends = list(log.ends)
    await run(New, log, database)  # nothing to do: it only takes over, as often as it likes
    await run(New, log, database)
    log.write(rows[1_000:])
    if crashes:
        await crash(New, log, database)
        assert 1_000 < len(await stored(database)) < 2_000
    await run(New, log, database)
    assert await stored(database) == sums(rows, since=1_000)
    after = await fetch(database, "SELECT layout FROM ls_snapshots")
    assert [json.loads(layout)["states"] for (layout,) in after] == 2 * [declared(New.states)]
    assert sorted(await changes(database)) == sorted((end, end, "Old", "New") for end in ends)
    await run(New, log, database)  # from the new layout


async def test_a_new_declaration_that_is_given_up_leaves_the_old_one_running(
    database: str,
) -> None:
    rows = payments(1_000)
    log = log_of(rows[:500])
    await run(Old, log, database)
    await run(New, log, database)
    log.write(rows[500:])
    await run(Old, log, database)
    assert await stored(database) == sums(rows, since=1_000)


async def test_a_changed_declaration_with_a_replay_pending_is_refused_or_recorded(
    database: str,
) -> None:
    rows = payments(2_000)
    log = log_of(rows[:500])
    await run(Old, log, database)
    log.write(rows[500:1_500])
    await crash(Old, log, database)
    ((position,),) = await fetch(database, "SELECT next_offset FROM ls_progress")
    with pytest.raises(
        StoppedPartition, match=r"Balances changed since its snapshot at offset 500"
    ):
        await run(New, log, database)
    await Worker(New, log, database, until="restored", accept_new_code=True).run()
    assert await changes(database) == [
        (500, 500, "Old", "New"),
        (500, position, "Old", "New"),
    ]
    await run(New, log, database)  # no consent is asked for again
    log.write(rows[1_500:])
    await run(New, log, database)
    late = [row[3] for row in await stored(database)][1_500:]
    assert late == [row[3] for row in sums(rows, since=500)][1_500:]


async def test_accepted_code_that_stops_before_an_event_goes_on(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot of its stop has another digest than the code before it had recorded."""
    log = log_of(payments(500))
    await run(Old, log, database)
    await fetch(database, "DELETE FROM ls_snapshots")
    await run(New, log, database, accept_new_code=True)
    ((digest,),) = await fetch(database, "SELECT digest FROM ls_snapshots")
    assert await fetch(database, "SELECT digest, code_version FROM ls_progress") == [
        (digest, "New")
    ]
    await run(New, log, database)


async def test_a_look_back_over_a_migration_says_what_it_shows(database: str) -> None:
    rows = payments(2_000)
    log = log_of(rows[:1_000])
    await run(Old, log, database)
    log.write(rows[1_000:])
    await run(New, log, database)
    connection = await asyncpg.connect(database)
    try:
        past = await Past.open(New, log, connection)
        await state_at(past, 0, None)
        assert past.notes == {}  # the snapshot in the new layout is what stands there
        row = (await find_rows(connection, Sums, ["1500"]))[0]
        assert (await explain(past, Sums, row)).row["payment_id"] == 1_500
        assert "payments-0 is computed as if it had always been declared" in past.notes[0]
        assert "migrated at offset 1,000" in past.notes[0]
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("processor", "sentence"),
    [
        (
            type("Narrow", (Old,), {"name": "Balances", "accounts": Keyed(
                by="customer", balance=EUR, payments=Int16)}),
            "column 'payments' is declared as int16, and stored as int32.",
        ),
        (Stateless, "Balances.accounts is stored, and not declared."),
        (
            type("More", (Old,), {"name": "Balances", "day": Sliding(
                by="customer", over="24h", sum="amount")}),
            "Balances.day is declared, and not stored.",
        ),
    ],
)  # fmt: skip
async def test_what_cannot_be_migrated_stops_and_changes_nothing(
    database: str, processor: type[Processor], sentence: str
) -> None:
    log = log_of(payments(500))
    await run(Old, log, database)
    log.write(payments(100))
    with pytest.raises(StoppedPartition, match="another name") as stopped:
        await run(processor, log, database)
    assert sentence in str(stopped.value)
    assert await fetch(database, "SELECT next_offset FROM ls_progress") == [(500,)]
    await run(Old, log, database)
    assert await changes(database) == []


async def test_a_spoilt_snapshot_is_not_migrated(database: str) -> None:
    log = log_of(payments(500))
    await run(Old, log, database)
    await fetch(database, "UPDATE ls_snapshot_pages SET data = set_byte(data, 9, 7)")
    with pytest.raises(StoppedPartition, match="does not hold what was written to it"):
        await run(New, log, database)


async def test_a_snapshot_of_another_format_is_refused(database: str) -> None:
    log = log_of(payments(500))
    await run(Old, log, database)
    await fetch(
        database, """UPDATE ls_snapshots SET layout = replace(layout, '"format":1', '"format":2')"""
    )
    with pytest.raises(StoppedPartition, match="It is of format 2, and this version"):
        await run(Old, log, database)


async def test_after_a_migration_verify_says_what_it_covers(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = payments(2_000)
    log = log_of(rows[:1_000])
    await run(Old, log, database)
    log.write(rows[1_000:])
    await crash(New, log, database)
    done = await verify(New, log, database)  # from the old snapshot on, migrated
    assert done.first_offset == {0: 1_000}
    assert done.migrated_at == {0: 1_000}
    assert done.rows == done.events == done.next_offset[0] - 1_000 > 0
    assert done.digests > 0
    said = "payments-0 from offset 1,000 on (its state was migrated at 1,000: what came before was"
    assert said in str(done)
    await fetch(database, "UPDATE sums SET largest = 1 WHERE ls_offset = 1100")
    with pytest.raises(NotReproduced, match="row 0 of offset 1,100 in partition 0: largest is 1"):
        await verify(New, log, database)
    await run(New, log, database)
    assert (await verify(New, log, database)).first_offset == {0: 2_000}
    await fetch(database, "DELETE FROM ls_snapshots")
    with pytest.raises(LedgerStreamError, match="migrated at offset 1,000, and no snapshot"):
        await verify(New, log, database)
