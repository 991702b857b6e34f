"""Event types: what has a column, what stays compatible, and what is refused with a reason."""

from __future__ import annotations

import datetime as dt
import enum

import numpy as np
import pytest

from ledgerstream import Event, Text, Timestamp
from ledgerstream.errors import DecodeError, EventTypeError
from ledgerstream.events import (
    Int8,
    Int16,
    Int32,
    check_compatible,
    format_timestamp,
    parse_timestamp,
    why_not,
)
from ledgerstream.money import EUR, JPY


class Side(enum.Enum):
    BUY = "buy"
    SELL = "sell"


class Level(enum.IntEnum):
    LOW = 3
    HIGH = 7


class Everything(Event):
    number: int
    small: Int8
    middle: Int16
    wide: Int32
    ratio: float
    flag: bool
    side: Side
    level: Level
    at: Timestamp
    amount: EUR
    whole: JPY
    note: Text[8] = "none"


def test_columns_are_packed_and_little_endian() -> None:
    assert Everything.dtype() == np.dtype(
        [
            ("number", "<i8"), ("small", "<i1"), ("middle", "<i2"), ("wide", "<i4"),
            ("ratio", "<f8"), ("flag", "?"), ("side", "<i2"), ("level", "<i4"), ("at", "<i8"),
            ("amount", "<i8"), ("whole", "<i8"), ("note", "S8"),
        ]
    )  # fmt: skip


def everything() -> Everything:
    return Everything(
        number=-(2**63), small=-128, middle=-5, wide=2**31 - 1, ratio=0.1, flag=True,
        side=Side.SELL, level=Level.HIGH, at="2018-04-01T00:00:31.000000001Z", amount="-12.34",
        whole="500", note="grüße",
    )  # fmt: skip


def test_an_event_is_its_row() -> None:
    event = everything()
    row = np.array(event.row(), Everything.dtype())
    assert Everything.of(row) == event
    assert event.amount == -1234
    assert event.whole == 500


def test_the_only_timestamp_is_the_event_time() -> None:
    class Two(Event):
        at: Timestamp
        seen: Timestamp

    assert Everything.time_column() == "at"
    assert Two.time_column() is None


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2018-04-01T00:00:31Z", 1_522_540_831_000_000_000),
        ("2018-04-01 00:00:31", 1_522_540_831_000_000_000),
        ("2018-04-01T02:00:31+02:00", 1_522_540_831_000_000_000),
        ("2018-04-01T00:00:31.123456789Z", 1_522_540_831_123_456_789),
        ("1969-12-31T23:59:59.5Z", -500_000_000),
    ],
)
def test_times_are_exact_to_the_nanosecond(text: str, ns: int) -> None:
    assert parse_timestamp(text) == ns
    assert parse_timestamp(format_timestamp(ns)) == ns
    assert parse_timestamp(ns) == ns


def test_an_aware_datetime_is_a_time_and_a_naive_one_is_not() -> None:
    moment = dt.datetime(2018, 4, 1, tzinfo=dt.UTC)
    assert parse_timestamp(moment) == 1_522_540_800_000_000_000
    with pytest.raises(DecodeError, match="no time zone"):
        parse_timestamp(moment.replace(tzinfo=None))


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2018-02-30T00:00:00Z", "2018-04-01T25:00Z", 1.5]
)
def test_what_is_no_time_is_refused(text: object) -> None:
    with pytest.raises(DecodeError, match="not a time"):
        parse_timestamp(text)


@pytest.mark.parametrize(
    ("annotation", "sentence"),
    [(str, r"text needs its size"), (list[int], "has no column"), (int | None, "has no column")],
)
def test_a_type_without_a_column_is_refused_when_declared(
    annotation: object, sentence: str
) -> None:
    with pytest.raises(EventTypeError, match=sentence):
        type("Bad", (Event,), {"__annotations__": {"field": annotation}})


def test_a_default_of_none_is_refused() -> None:
    with pytest.raises(EventTypeError, match="columns have no null"):
        type("Bad", (Event,), {"__annotations__": {"field": int}, "field": None})


def test_a_required_field_behind_an_optional_one_is_refused() -> None:
    with pytest.raises(EventTypeError, match="goes to the end"):
        type("Bad", (Event,), {"__annotations__": {"a": int, "b": int}, "a": 0})


class V1(Event):
    number: int
    amount: EUR


class V2(V1):
    note: Text[4] = "none"


class V3(V2):
    count: Int32 = 7


def test_an_optional_field_at_the_end_is_compatible() -> None:
    check_compatible(V1, V2)
    check_compatible(V1, V3)
    assert [layout.fields for layout in V3.layouts()] == [2, 3, 4]
    assert V1(number=1, amount=2).encode()[:8] == V3.layouts()[0].prefix


class Renamed(Event):
    count: int
    amount: EUR


class Retyped(Event):
    number: Int32
    amount: EUR


class OtherMoney(Event):
    number: int
    amount: JPY


class Shorter(Event):
    number: int


class Required(V1):
    more: int


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        (Renamed, "Only optional fields may be added"),
        (Retyped, "Only optional fields may be added"),
        (OtherMoney, "Only optional fields may be added"),
        (Shorter, "no longer has 'amount'"),
        (Required, "is new and has no default"),
    ],
)
def test_any_other_change_is_refused_with_a_reason(new: type[Event], sentence: str) -> None:
    with pytest.raises(EventTypeError, match=sentence):
        check_compatible(V1, new)
    assert new.layouts()[-1].prefix != V1.layouts()[-1].prefix


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "no value"),
        (b"abc", "too short"),
        (b"{}                ", "does not start with the prefix"),
        (V1(number=1, amount=2).encode()[:-1], "takes 16 bytes"),
        (V3(number=1, amount=2).encode(), "newer V1"),
        (Renamed(count=1, amount=2).encode(), "another layout"),
    ],
)
def test_why_a_record_is_not_an_event(value: bytes | None, sentence: str) -> None:
    assert sentence in why_not(V1, value)
