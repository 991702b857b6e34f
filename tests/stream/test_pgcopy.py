"""COPY bytes: what goes in comes out of a real Postgres, and what cannot go in names its event."""

from __future__ import annotations

import struct

import asyncpg
import numpy as np
import pytest
from sqlalchemy import inspect
from sqlalchemy.orm import Mapped

from ledgerstream.errors import ConfigError
from ledgerstream.events import Event, Int16, Int32, Text, Timestamp
from ledgerstream.money import EUR
from ledgerstream.stream import schema
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.pgcopy import HEADER, TRAILER, encode
from ledgerstream.stream.processor import Topic
from ledgerstream.stream.state import BadEvents
from ledgerstream.stream.tables import ORIGIN, Table


class Thing(Event):
    number: int
    at: Timestamp
    price: EUR
    ratio: float
    good: bool
    name: Text[12]  # type: ignore[valid-type]


class EachType(Table):
    number: Mapped[int]
    small: Mapped[Int16]
    middle: Mapped[Int32]
    at: Mapped[Timestamp]
    price: Mapped[EUR]
    ratio: Mapped[float]
    good: Mapped[bool]
    name: Mapped[str]
    note: Mapped[str]


SOURCE = Topic("things", Thing, key="number")


def things(count: int) -> Batch:
    rng = np.random.default_rng(3)
    rows = np.zeros(count, Thing.dtype())
    rows["number"] = rng.integers(-(2**63), 2**63 - 1, count)
    rows["at"] = rng.integers(0, 2**62, count)
    rows["price"] = rng.integers(-(2**40), 2**40, count)
    rows["ratio"] = rng.normal(size=count)
    rows["good"] = rng.random(count) < 0.5
    rows["name"] = [f"naïve{n % 1000}".encode() if n % 7 else b"" for n in range(count)]
    return Batch(SOURCE, rows, np.arange(count) * 3)


async def test_each_type_comes_back_as_it_went_in(database: str) -> None:
    batch = things(5_000)
    small = np.arange(len(batch)) % 65_536 - 32_768
    notes = np.array([f"note {n}" for n in range(len(batch))])
    where = batch.good | (batch.number % 3 == 0)
    rows = EachType.rows(batch, where=where, small=small, middle=7, note=notes)
    encoded, _ = encode([rows], batch, 9, 4)
    data = b"".join([HEADER, *encoded, TRAILER])
    connection = await asyncpg.connect(database)
    await schema.create_table(connection, EachType)
    await schema.create_table(connection, EachType)

    async def parts() -> object:
        yield data

    await connection.copy_to_table("each_type", source=parts(), format="binary")
    stored = await connection.fetch("SELECT * FROM each_type ORDER BY ls_offset")
    await connection.close()
    at = np.flatnonzero(where)
    assert [tuple(row) for row in stored] == [
        (
            int(batch.number[i]), int(small[i]), 7, int(batch.at[i]), int(batch.price[i]),
            float(batch.ratio[i]), bool(batch.good[i]), batch.name[i].decode(), f"note {i}",
            3 * i, 9, 4, 0,
        )
        for i in at.tolist()
    ]  # fmt: skip


def test_rows_of_one_event_are_numbered() -> None:
    batch = things(3)
    given = {"small": np.zeros(3, np.int16), "middle": 0, "note": "x"}
    first = EachType.rows(batch, of=np.array([0, 0, 2]), **given)
    second = EachType.rows(batch, small=1, middle=1, note="y")
    data = b"".join(encode([first, second], batch, 1, 1)[0])
    # The last field of a row is ls_n: two bytes, after a length of two.
    numbers = []
    position = 0
    while position < len(data):
        (fields,) = struct.unpack_from(">h", data, position)
        position += 2
        for field in range(fields):
            (size,) = struct.unpack_from(">i", data, position)
            position += 4 + size
            if field == fields - 1:
                numbers.append(struct.unpack_from(">h", data, position - 2)[0])
    assert numbers == [0, 1, 0, 2, 0, 1]


def test_a_number_that_does_not_fit_names_its_event() -> None:
    batch = things(10)
    small = np.zeros(10, np.int64)
    small[6] = 40_000
    rows = EachType.rows(batch, where=batch.offset > 15, small=small, middle=0, note="")
    with pytest.raises(BadEvents, match=r"40000 does not fit EachType.small") as refused:
        encode([rows], batch, 1, 1)
    assert refused.value.offsets == [18]


def test_a_nul_in_text_names_its_event() -> None:
    batch = things(5_000)
    batch.rows["name"][4_321] = b"a\0b"
    rows = EachType.rows(batch, small=0, middle=0, note="")
    with pytest.raises(BadEvents, match="NUL") as refused:
        encode([rows], batch, 1, 1)
    assert refused.value.offsets == [3 * 4_321]


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("small", np.zeros(4), "small is an integer, but was given float64"),
        ("small", np.zeros(4, bool), "small is an integer, but was given bool"),
        ("good", np.zeros(4, int), "good is bool, but was given int64"),
        ("note", np.zeros(4, int), "note is text, but was given int64"),
        ("ratio", np.array(["x"] * 4), "ratio is a float"),
    ],
)
def test_an_array_of_another_kind_is_the_processors_fault(
    column: str, value: np.ndarray, sentence: str
) -> None:
    batch = things(4)
    given = {"small": 0, "middle": 0, "note": "", column: value}
    with pytest.raises(ConfigError, match=sentence):
        encode([EachType.rows(batch, **given)], batch, 1, 1)


def test_a_missing_column_and_a_wrong_shape_are_said() -> None:
    batch = things(4)
    with pytest.raises(ConfigError, match="small is neither given nor a field of Thing"):
        EachType.rows(batch, middle=0, note="")
    with pytest.raises(ConfigError, match="no column 'smal'"):
        EachType.rows(batch, smal=0, middle=0, note="")
    with pytest.raises(ConfigError, match="shape"):
        EachType.rows(batch, small=np.zeros(3, int), middle=0, note="")
    with pytest.raises(ConfigError, match=r"must be bool\[4\]"):
        EachType.rows(batch, where=np.arange(4), small=0, middle=0, note="")


def test_where_a_row_came_from_identifies_it_without_a_constraint() -> None:
    identity = inspect(EachType).primary_key
    assert [column.name for column in identity] == list(ORIGIN)
    assert len(EachType.relation().primary_key.columns) == 0


async def test_a_table_that_is_there_with_other_columns_is_refused(database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("CREATE TABLE each_type (number integer)")
    with pytest.raises(ConfigError, match=r"has integer where EachType\.number is bigint"):
        await schema.create_table(connection, EachType)
    await connection.close()
