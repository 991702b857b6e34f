"""Tables with a key: the newest row of each, whatever the splits, crashes and poison."""

from __future__ import annotations

import dataclasses
import uuid
from itertools import pairwise
from typing import Any

import asyncpg
import numpy as np
import pytest
from sqlalchemy.orm import Mapped, mapped_column

from ledgerstream.errors import ConfigError
from ledgerstream.events import Event, Int16, Text
from ledgerstream.limits import LIMITS
from ledgerstream.money import EUR
from ledgerstream.stream import schema, streaming
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.kernels import I64, kernel
from ledgerstream.stream.machine import Input, Machine, Piece, join
from ledgerstream.stream.newest import NewRows
from ledgerstream.stream.pgcopy import encode
from ledgerstream.stream.pgread import decode
from ledgerstream.stream.processor import Keyed, Processor, State, Topic
from ledgerstream.stream.sink import Sink, Source
from ledgerstream.stream.state import BadEvents
from ledgerstream.stream.tables import Rows, Table
from ledgerstream.stream.worker import Worker
from tests.stream.cutter import Cutter
from tests.stream.memorylog import MemoryLog

TOPIC = uuid.UUID(int=9)


class Posting(Event):
    account: int
    book: Text[12]  # type: ignore[valid-type]
    amount: EUR


class Balance(Table):
    account: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[EUR]


class Book(Table):
    book: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[int] = mapped_column(primary_key=True)
    small: Mapped[Int16]
    note: Mapped[str]


class Entry(Table):
    account: Mapped[int]


@kernel
def running_balance(row: I64, amount: I64, balance: I64) -> I64:
    after = np.empty_like(amount)
    for i in range(len(row)):
        balance[row[i]] += amount[i]
        after[i] = balance[row[i]]
    return after


class Balances(Processor):
    source = Topic("postings", Posting, key="account")
    accounts = Keyed(by="account", balance=EUR)

    def process(self, postings: Batch, state: State) -> list[Rows]:
        held = state.accounts.at(postings.account)
        after = running_balance(held.row, postings.amount, held.balance)
        return [
            Balance.upsert(account=postings.account, balance=after),
            Book.upsert(postings, where=postings.amount > 0, small=1, note="in"),
            Book.upsert(postings, where=postings.amount < 0, small=-1, note="out"),
            Entry.rows(postings),
        ]


def postings(count: int, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, Posting.dtype())
    rows["account"] = rng.integers(0, 40, count)
    rows["book"] = np.array([b"", b"a", b"b\xc3\xa9", b"twelve bytes"])[rng.integers(0, 4, count)]
    rows["amount"] = rng.integers(-500, 500, count)
    return rows


def batch_of(rows: np.ndarray, start: int = 0) -> Batch:
    return Batch(Balances.source, rows, np.arange(start, start + len(rows)))


def given(rows: np.ndarray, start: int = 0) -> Input:
    return Input(0, start, start + len(rows), batch_of(rows, start))


def newest(rows: np.ndarray) -> tuple[list[Any], list[Any]]:
    """Both tables after these postings, by dict."""
    balance: dict[int, int] = {}
    balances: dict[int, tuple[int, int]] = {}
    books: dict[tuple[str, int], tuple[int, str, int]] = {}
    for offset, (account, book, amount) in enumerate(rows.tolist()):
        balance[account] = balance.get(account, 0) + amount
        balances[account] = balance[account], offset
        if amount:
            way = (1, "in") if amount > 0 else (-1, "out")
            books[book.decode(), account] = (*way, offset)
    return (
        sorted((key, *value) for key, value in balances.items()),
        sorted((*key, *value) for key, value in books.items()),
    )


async def fetch(database: str, query: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(database)
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


async def stored(database: str, *tables: type[Table]) -> tuple[list[Any], ...]:
    """The content of the tables, both unless some are named."""
    queries = {
        Balance: "SELECT account, balance, ls_offset FROM balance",
        Book: "SELECT book, account, small, note, ls_offset FROM book",
    }
    return tuple([sorted(await fetch(database, queries[each])) for each in tables or queries])


async def sink_of(database: str) -> Sink:
    sink = await Sink.connect(database, Balances.name, "1", "code")
    await sink.claim(Source("postings", TOPIC), [0], {0: 0})
    return sink


def test_a_key_is_declared_as_sqlalchemy_does() -> None:
    assert Balance.key_columns() == ("account",)
    assert Book.key_columns() == ("book", "account")
    assert Entry.key_columns() == ()
    with pytest.raises(ConfigError, match="a key cannot be a float"):
        type(
            "Ratio",
            (Table,),
            {
                "__annotations__": {"ratio": Mapped[float]},
                "__module__": __name__,
                "ratio": mapped_column(primary_key=True),
            },
        )


def test_the_wrong_call_is_refused_with_the_right_one() -> None:
    batch = batch_of(postings(3))
    with pytest.raises(ConfigError, match=r"Return Balance\.upsert"):
        Balance.rows(batch, balance=0)
    with pytest.raises(ConfigError, match=r"Return Entry\.rows"):
        Entry.upsert(batch)
    with pytest.raises(ConfigError, match="balance is not given"):
        Balance.upsert(account=batch.account)
    with pytest.raises(ConfigError, match=r"have \[2, 3\] lengths"):
        Balance.upsert(account=batch.account, balance=np.zeros(2, int))
    with pytest.raises(ConfigError, match="have no lengths"):
        Balance.upsert(account=1, balance=2)
    with pytest.raises(ConfigError, match="need the batch in front"):
        Balance.upsert(where=batch.amount > 0, account=batch.account, balance=0)
    with pytest.raises(ConfigError, match="no column 'acount'"):
        Balance.upsert(acount=batch.account, balance=0)
    with pytest.raises(ConfigError, match="2 rows were given for 3 events"):
        encode([Balance.upsert(account=np.zeros(2, int), balance=0)], batch, 1, 0)


def test_a_row_that_cannot_be_stored_is_refused_even_if_it_is_not_the_last_of_its_key() -> None:
    rows = postings(4)
    rows["account"], rows["book"] = 7, b"same"
    batch = batch_of(rows)
    small = np.array([1, 40_000, 2, 3])
    with pytest.raises(BadEvents, match=r"40000 does not fit Book\.small") as refused:
        encode([Book.upsert(batch, small=small, note="")], batch, 1, 0)
    assert refused.value.offsets == [1]
    note = np.array([b"a", b"b", b"c\0d", b"e"])
    with pytest.raises(BadEvents, match="NUL") as refused:
        encode([Book.upsert(batch, small=0, note=note)], batch, 1, 0)
    assert refused.value.offsets == [2]
    _, count = encode([Book.upsert(batch, small=0, note="")], batch, 1, 0)
    assert count == 1


async def test_pieces_of_one_step_with_the_same_keys(database: str) -> None:
    rows = postings(3_000)
    sink = await sink_of(database)
    machine = Machine(Balances(), 0, await sink.topic_number(Source("postings", TOPIC)))
    bounds = [0, 1, 700, 1_500, 1_501, 3_000]
    pieces = [machine.step(given(rows[a:b], a)) for a, b in pairwise(bounds)]
    await sink.commit([join(pieces[:3])])
    assert await stored(database) == newest(rows[:1_500])
    await sink.commit([join(pieces[3:])])
    assert await stored(database) == newest(rows)
    assert await fetch(database, "SELECT count(*) FROM entry") == [(3_000,)]
    origin = "SELECT ls_topic_id, ls_partition, ls_n FROM balance GROUP BY 1, 2, 3"
    assert await fetch(database, origin) == [(1, 0, 0)]
    await sink.close()


def test_a_row_that_a_later_one_of_its_step_replaces_is_not_written() -> None:
    rows, met = postings(400), {(b"a", 1), (b"", 2), ("bé".encode(), 3)}  # keys of earlier steps
    pieces, started, last = [], set(met), {}
    for a, b in pairwise([0, 1, 60, 61, 200, 390, 400]):
        batch = batch_of(rows[a:b], a)
        keys = [(book, account) for account, book, _ in rows[a:b].tolist()]
        new = np.array([key not in started for key in keys])
        started |= set(keys)
        last |= {key: a + n for n, key in enumerate(keys)}
        shown = Book.upsert(batch, small=0, note=batch.book)
        copies = {Book: encode([dataclasses.replace(shown, new=new)], batch, 1, 0)}
        pieces.append(Piece(0, a, b, b - a, copies, [], bytes(16), []))
    one = join([join(pieces[:2]), pieces[2], join(pieces[3:])])
    (fresh, known), count = one.copies[Book]
    assert count == one.rows == len(last)
    found: dict[tuple[bytes, int], int] = {}
    for part, of_earlier in ((fresh, False), (known, True)):
        columns = decode(Book, part)[0]
        keys = list(zip(columns["book"].tolist(), columns["account"].tolist(), strict=True))
        assert all((key in met) is of_earlier for key in keys)
        found |= dict(zip(keys, columns["ls_offset"].tolist(), strict=True))
    assert found == last
    assert isinstance(fresh, NewRows)
    assert not isinstance(known, NewRows)


async def test_the_key_is_a_primary_key_and_another_one_is_refused(database: str) -> None:
    sink = await sink_of(database)
    await sink.create_tables([Balance])
    await sink.close()
    key = await fetch(
        database,
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE conrelid = 'balance'::regclass AND contype = 'p'",
    )
    assert key == [("PRIMARY KEY (account)",)]
    default = "SELECT column_default FROM information_schema.columns WHERE table_name = 'balance'"
    assert set(await fetch(database, default)) == {(None,)}
    await fetch(database, "ALTER TABLE balance DROP CONSTRAINT balance_pkey")
    connection = await asyncpg.connect(database)
    with pytest.raises(ConfigError, match=r"primary key \(none\) where Balance has \(account\)"):
        await schema.create_table(connection, Balance)
    await connection.close()


def totals(rows: np.ndarray, start: int, new: list[bool]) -> Piece:
    """A piece that shows `rows` as balances, of which it takes some keys for new."""
    batch = batch_of(rows, start)
    shown = Balance.upsert(account=batch.account, balance=batch.amount)
    encoded, count = encode([dataclasses.replace(shown, new=np.array(new))], batch, 1, 0)
    stop = start + len(rows)
    return Piece(0, start, stop, len(rows), {Balance: (encoded, count)}, [], bytes(16), [])


async def test_rows_that_are_new_go_straight_and_those_that_are_not_after_all_do_no_harm(
    database: str,
) -> None:
    rows = np.zeros(9, Posting.dtype())
    rows["account"], rows["amount"] = [1, 2, 3, 1, 4, 4, 2, 9, 5], np.arange(9)
    sink = await sink_of(database)
    # The second piece replaces what the first one of the same step has newly written.
    first, second = totals(rows[:3], 0, [True] * 3), totals(rows[3:5], 3, [False, True])
    await sink.commit([join([first, second])])
    assert (await stored(database, Balance))[0] == [(1, 3, 3), (2, 1, 1), (3, 2, 2), (4, 4, 4)]
    # Somebody else has written 9 and 5: the step is taken for what it is.
    await fetch(database, "INSERT INTO balance VALUES (9, 0, 0, 0, 0, 0), (5, 0, 0, 0, 0, 0)")
    await sink.commit([totals(rows[5:8], 5, [False, False, True])])
    await sink.commit([totals(rows[8:], 8, [True])])
    assert (await stored(database, Balance))[0] == [
        (1, 3, 3), (2, 6, 6), (3, 2, 2), (4, 5, 5), (5, 8, 8), (9, 7, 7),
    ]  # fmt: skip
    assert await fetch(database, "SELECT next_offset FROM ls_progress") == [(9,)]
    await sink.close()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LIMITS", dataclasses.replace(LIMITS, step_rows_max=300))


def log_of(rows: np.ndarray) -> MemoryLog:
    log = MemoryLog(Balances.source, TOPIC)
    log.write(rows)
    return log


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("cut", ["before", "after"])
async def test_a_step_that_is_sent_again_counts_once(database: str, cut: Any) -> None:
    rows = postings(3_000)
    async with Cutter(database, cut, at=3) as cutter:
        await Worker(Balances, log_of(rows), cutter.url, until="end").run()
        assert cutter.cuts == 1
    assert await stored(database) == newest(rows)
    assert await fetch(database, "SELECT count(*) FROM entry") == [(3_000,)]


@pytest.mark.usefixtures("small_steps")
async def test_the_events_at_fault_and_no_others_are_dead(database: str) -> None:
    rows = postings(3_000)
    rows["amount"][[800, 801, 2_345]] = 77_777  # nobody else comes near
    await Worker(Balances, log_of(rows[:0]), database, until="end").run()
    await fetch(
        database,
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
             IF NEW.ls_offset IN (800, 801, 2345) THEN
               RAISE 'refused' USING ERRCODE = 'check_violation'; END IF; RETURN NEW; END$$""",
    )
    await fetch(
        database,
        "CREATE TRIGGER refuse BEFORE INSERT ON entry FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    progress = await Worker(Balances, log_of(rows), database, until="end").run()
    dead = await fetch(database, 'SELECT "offset" FROM ls_dead_letters ORDER BY 1')
    assert (progress.dead, dead) == (3, [(800,), (801,), (2_345,)])
    alive = np.delete(np.arange(3_000), [800, 801, 2_345])
    balances, books = newest(rows[alive])
    assert await stored(database) == (
        [(*row[:-1], int(alive[row[-1]])) for row in balances],
        [(*row[:-1], int(alive[row[-1]])) for row in books],
    )


@pytest.mark.usefixtures("small_steps")
async def test_a_constraint_on_the_table_with_the_key_names_the_event(database: str) -> None:
    rows = postings(1_000)
    rows["account"][640] = 999  # its only posting, so that its row is written in every split
    await Worker(Balances, log_of(rows[:0]), database, until="end").run()
    await fetch(database, "ALTER TABLE balance ADD CHECK (account <> 999)")
    await Worker(Balances, log_of(rows), database, until="end").run()
    dead = await fetch(database, 'SELECT "offset", error FROM ls_dead_letters')
    assert [(offset, "23514" in error) for offset, error in dead] == [(640, True)]
    alive = np.delete(np.arange(1_000), 640)
    balances, _ = newest(rows[alive])
    assert (await stored(database))[0] == [(*row[:-1], int(alive[row[-1]])) for row in balances]
