"""Files become the rows that their text says, or a sentence."""

import gzip
from enum import IntEnum, StrEnum
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import Field

from ledgerstream.client.tabular import read
from ledgerstream.errors import ConfigError, DecodeError, LedgerStreamError
from ledgerstream.events import Event, Int16, Text, Timestamp, parse_timestamp
from ledgerstream.money import EUR, JPY


class Side(StrEnum):
    BUY = "B"
    SELL = "S"


class Venue(IntEnum):
    PARIS = 7
    TOKYO = 9


class Order(Event):
    order_id: int = Field(validation_alias="id")
    at: Timestamp
    side: Side
    venue: Venue
    price: EUR
    fee: JPY
    weight: float
    lots: Int16
    urgent: bool
    note: Text[6] = "none"


HEADER = "id,at,side,venue,price,fee,weight,lots,urgent,note,unknown\n"
LINE = "1,2024-02-29T12:00:00.000000001Z,S,9,-0.07,12,0.1,-3,1,café,x\n"


def rows_of(path: Path) -> np.ndarray:
    return np.concatenate([rows for rows, _ in read(path, Order)])


def csv(directory: Path, text: str) -> Path:
    path = directory / "orders.csv"
    path.write_text(text)
    return path


def test_a_csv_line_becomes_the_row_of_the_event(tmp_path: Path) -> None:
    (row,) = rows_of(csv(tmp_path, HEADER + LINE))
    assert Order.of(row) == Order(
        order_id=1,
        at="2024-02-29T12:00:00.000000001Z",
        side="S",
        venue=9,
        price="-0.07",
        fee="12",
        weight=0.1,
        lots=-3,
        urgent=True,
        note="café",
    )


def test_compressed_text_and_its_share(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write(HEADER + LINE * 1000)
    pieces = list(read(path, Order))
    assert sum(len(rows) for rows, _ in pieces) == 1000
    assert pieces[-1][1] == 1.0


def test_an_absent_optional_column_takes_its_default(tmp_path: Path) -> None:
    cut = [line.rsplit(",", 2)[0] for line in (HEADER.strip(), LINE.strip())]
    (row,) = rows_of(csv(tmp_path, "\n".join(cut) + "\n"))
    assert row["note"] == b"none"


def test_times_are_iso_text_or_integer_nanoseconds(tmp_path: Path) -> None:
    ns = parse_timestamp("2024-02-29T12:00:00.000000001Z")
    (row,) = rows_of(
        csv(tmp_path, HEADER + LINE.replace("2024-02-29T12:00:00.000000001Z", str(ns)))
    )
    assert row["at"] == ns


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("-0.07", "0.075"),  # half a cent
        ("-0.07", "cheap"),
        (",12,", ",12.5,"),  # yen have no decimals
        (",-3,", ",40000,"),  # Int16
        (",S,", ",X,"),
        ("café", "caféteria"),
        (",-3,", ",,"),
        ("2024-02-29T12:00:00.000000001Z", "2023-02-29T12:00:00Z"),
    ],
)
def test_a_value_that_does_not_fit_is_a_sentence(tmp_path: Path, good: str, bad: str) -> None:
    assert good in LINE
    with pytest.raises(DecodeError, match=r"orders\.csv"):
        rows_of(csv(tmp_path, HEADER + LINE.replace(good, bad)))


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column 'order_id' or 'id' .*\n.*It has number, at"):
        rows_of(csv(tmp_path, HEADER.replace("id,", "number,", 1) + LINE))


def test_a_file_without_rows_is_none_of_another_kind(tmp_path: Path) -> None:
    assert list(read(csv(tmp_path, HEADER), Order)) == []
    with pytest.raises(ConfigError, match="It has a word"):
        rows_of(csv(tmp_path, "a word\n"))


def test_a_damaged_file_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv.gz"
    whole = gzip.compress((HEADER + LINE * 1_000).encode())
    for content in (whole[: len(whole) // 2], b"no gzip at all"):
        path.write_bytes(content)
        with pytest.raises(DecodeError, match=r"orders\.csv\.gz, after row 0: .*\n.*damaged"):
            rows_of(path)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LedgerStreamError, match="no file"):
        rows_of(tmp_path / "nowhere.csv")


def test_parquet_of_pandas_gives_the_same_rows(tmp_path: Path) -> None:
    path = csv(tmp_path, HEADER + LINE)
    frame = pd.read_csv(path)
    frame["at"] = pd.to_datetime(frame["at"])
    frame.to_parquet(tmp_path / "orders.parquet")
    assert frame["price"].dtype == np.float64  # 57.16 is taken by its digits
    assert rows_of(tmp_path / "orders.parquet").tobytes() == rows_of(path).tobytes()


class Sale(Event):
    sale: int
    at: Timestamp
    amount: EUR


SALE = b"7,2026-01-01T00:00:00Z,1.20\n"


@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
@pytest.mark.parametrize(
    "bad",
    [
        b"7,2026-01-01T00:00:00Z,abc\n",
        b"7,2026-01-01T00:00:00Z,1.234\n",
        b"7,2026-01-01T00:00:00Z,\n",
        b"7,yesterday,1.20\n",
        b"7,2026-01-01T00:00:00Z\n",
        b"7,2026-01-01T00:00:00Z,1,20\n",
        b"\xe9,2026-01-01T00:00:00Z,1.20\n",
        b"1," * 100_000 + b"\n",
    ],
    ids=["text", "digits", "empty", "time", "short", "long", "latin-1", "very long"],
)
def test_the_line_that_is_no_event_is_named(tmp_path: Path, suffix: str, bad: bytes) -> None:
    """Counting the header, and lines without anything; a mark at the front and CRLF are fine."""
    path = tmp_path / f"sales.{suffix}"
    content = b"\xef\xbb\xbfsale,at,amount\r\n" + SALE * 700 + b"\n" + bad + SALE * 50
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(DecodeError, match=r"sales\.csv(\.gz)?, line 703: ") as refused:
        list(read(path, Sale))
    assert len(str(refused.value)) < 700
