"""CSV and Parquet files as rows of an event type, a piece at a time, without Python objects.

A file's column belongs to the field of the same name or alias (`validation_alias`); columns that
the event does not have are passed over, and optional fields may be absent. Money is read from its
digits as a decimal, never by way of a float, and a number that is not exact is refused.
"""

from __future__ import annotations

import csv
import io
import re
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from ledgerstream.errors import ConfigError, DecodeError
from ledgerstream.events import Column, Event
from ledgerstream.money import MINOR_DIGITS

PIECE_BYTES = 8 * 1024 * 1024  # of CSV text, inflated: about 150,000 payments
PIECE_ROWS = 131_072  # of Parquet
LINES_AT_FAULT_MAX = 1_000_000  # looked through for the one that is no event
HEAD_BYTES = 4_096  # that are looked at to see what a file is
TEXT_MAX = 300  # of a file's own words in a message

_COLUMN = re.compile(r"In CSV column #(\d+): ")


def read(path: Path, event: type[Event]) -> Iterator[tuple[np.ndarray, float]]:
    """Pieces of the file as rows of `event.dtype()`, each with the share of the file read so far.

    Raises ConfigError for a file that cannot be one of these events, DecodeError for a bad value.
    """
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise ConfigError(f"{path} is empty.")
    read_pieces = _read_parquet if path.suffix in (".parquet", ".pq") else _read_csv
    pieces = read_pieces(path, event)
    rows_read = 0
    try:
        for piece, share in pieces:
            yield _rows(piece, event), share
            rows_read += len(piece)
    except pa.ArrowInvalid as error:
        where = f"after row {rows_read:,}"
        if read_pieces is _read_csv and (line := _line_at_fault(path, event, rows_read)):
            where = f"line {line:,}"
        said = str(error) if read_pieces is _read_parquet else _with_name(str(error), path)
        raise DecodeError(
            f"{path}, {where}: {_clipped(said)}.",
            f"The values must fit the columns of {event.__name__}; "
            f"the {rows_read:,} rows before are not affected.",
        ) from error
    except OSError as error:  # such as a compressed file that was cut
        raise DecodeError(
            f"{path}, after row {rows_read:,}: {error}.",
            "The file is damaged, or not of the kind that its name says.",
        ) from error


def _line_at_fault(path: Path, event: type[Event], rows_before: int) -> int | None:
    """The first line that is no event, after so many that are: pyarrow names a block of them."""
    with pa.OSFile(str(path)) as file, _inflated(path, file) as text:
        lines = io.BufferedReader(text)
        head = lines.readline()
        there = ((n, line) for n, line in enumerate(lines, 2) if line.strip())
        some = list(islice(there, rows_before, rows_before + LINES_AT_FAULT_MAX))

    def fails(count: int) -> bool:
        content = head + b"".join(line for _, line in some[:count])
        try:
            for piece in _open_csv(pa.BufferReader(content), event):
                _rows(piece, event)
        except pa.ArrowInvalid:
            return True
        return False

    at = bisect_left(range(1, len(some) + 1), True, key=fails)
    return some[at][0] if at < len(some) else None


def _with_name(said: str, path: Path) -> str:
    """pyarrow's words on a CSV, with the name of the column for its number, counted from 0."""
    found = _COLUMN.match(said)
    if found is None:
        return said
    with pa.OSFile(str(path)) as file, _inflated(path, file) as text:
        head = io.TextIOWrapper(io.BufferedReader(text), "utf-8-sig", newline="")
        names = next(csv.reader(head), [])
    number = int(found[1])
    return f"column {names[number]!r}: {said[found.end() :]}" if number < len(names) else said


def _check_text(path: Path, text: Any) -> None:
    """Raises ConfigError for what is no CSV at all."""
    head = text.read(HEAD_BYTES)
    if head.startswith(b"PAR1"):
        raise ConfigError(f"{path} is a Parquet file.", "Give it the ending .parquet.")
    if head.lstrip()[:1] in (b"{", b"["):
        raise ConfigError(
            f"{path} holds JSON, and CSV or Parquet is read here.",
            "Objects of one line each go in with "
            f"`ledgerstream produce TOPIC --event MODULE:CLASS < {path.name}`.",
        )
    try:
        known = b"\0" not in head and head.decode("utf-8", "strict") is not None
    except UnicodeDecodeError as error:
        known = error.start > len(head) - 4  # a character that was cut
    if not known:
        raise ConfigError(
            f"{path} is no text in UTF-8, and so no CSV.",
            "Compressed files are known by their ending (.gz, .zst, .bz2, .lz4), Parquet by "
            ".parquet.",
        )
    if not head.strip():
        raise ConfigError(f"{path} has no line with the names of its columns.")


def _clipped(text: str) -> str:
    return text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + " …"


def _open_csv(text: Any, event: type[Event]) -> Any:
    types = {
        name: csv_type
        for column in event.columns().values()
        if (csv_type := _csv_type(column)) is not None
        for name in _names(event, column.name)
    }
    return pyarrow.csv.open_csv(
        text,
        read_options=pyarrow.csv.ReadOptions(block_size=PIECE_BYTES),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types),
    )


def _read_csv(path: Path, event: type[Event]) -> Iterator[tuple[pa.RecordBatch, float]]:
    size = path.stat().st_size
    with pa.OSFile(str(path)) as file, _inflated(path, file) as text:
        _check_text(path, text)
    with pa.OSFile(str(path)) as file:
        with _inflated(path, file) as text:
            reader = _open_csv(text, event)
            _check_columns(reader.schema, event, path)  # also of a file without rows
            for piece in reader:
                yield piece, file.tell() / size


def _inflated(path: Path, file: Any) -> Any:
    codecs = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
    codec = codecs.get(path.suffix)
    return pa.CompressedInputStream(file, codec) if codec else file


def _read_parquet(path: Path, event: type[Event]) -> Iterator[tuple[pa.RecordBatch, float]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        _check_columns(file.schema_arrow, event, path)
        total, rows = max(file.metadata.num_rows, 1), 0
        for piece in file.iter_batches(PIECE_ROWS):
            rows += len(piece)
            yield piece, rows / total


def _csv_type(column: Column) -> pa.DataType | None:
    match column.kind:
        case "money":
            return pa.decimal128(18, MINOR_DIGITS[column.currency or ""])
        case "timestamp":
            return None  # ISO 8601 or integer nanoseconds: whatever it is
        case "enum" if column.dtype == np.int16:
            return pa.string()
        case "text":
            return pa.string()
        case "bool":
            return pa.bool_()
        case "float":
            return pa.float64()
        case _:
            return pa.int64()


def _names(event: type[Event], field: str) -> list[str]:
    alias = event.model_fields[field].validation_alias
    return [field, alias] if isinstance(alias, str) else [field]


def _check_columns(schema: pa.Schema, event: type[Event], path: Path) -> None:
    there = schema.names
    for column in event.columns().values():
        names = _names(event, column.name)
        if not column.optional and not any(name in there for name in names):
            raise ConfigError(
                f"{path} has no column {' or '.join(map(repr, names))} "
                f"for {event.__name__}.{column.name}.",
                f"It has {_clipped(', '.join(there))}.",
            )


def _rows(piece: pa.RecordBatch, event: type[Event]) -> np.ndarray:
    rows = np.full(len(piece), event.default_row())
    for column in event.columns().values():
        name = next((n for n in _names(event, column.name) if n in piece.schema.names), None)
        if name is not None:
            rows[column.name] = _values(column, piece.column(name), name)
    return rows


def _values(column: Column, array: pa.Array, name: str) -> np.ndarray:
    if array.null_count:
        raise pa.ArrowInvalid(f"column {name!r} has {array.null_count:,} empty values")
    match column.kind:
        case "money":
            return _minor_units(array, MINOR_DIGITS[column.currency or ""])
        case "timestamp":
            if pa.types.is_timestamp(array.type):
                array = array.cast(pa.timestamp("ns", array.type.tz))
            return _numpy(array.cast(pa.int64()))
        case "enum" if column.dtype == np.int16:
            return _codes(column, array, name)
        case "text":
            return _texts(column, array, name)
        case "enum":
            return _numpy(array.cast(pa.int32()))
        case "bool":
            return _numpy(array.cast(pa.bool_()))
        case _:
            return _numpy(array.cast(pa.from_numpy_dtype(column.dtype)))


def _minor_units(array: pa.Array, digits: int) -> np.ndarray:
    """Exactly; a Parquet double is taken by its shortest digits, as it would be printed."""
    if pa.types.is_floating(array.type):
        array = array.cast(pa.string())
    elif pa.types.is_integer(array.type):
        array = array.cast(pa.decimal128(19, 0))
    exact = array.cast(pa.decimal128(18, digits))
    halves = np.frombuffer(exact.buffers()[1], "<i8")[::2]  # 18 digits fill the lower half alone
    return halves[exact.offset : exact.offset + len(exact)]


def _codes(column: Column, array: pa.Array, name: str) -> np.ndarray:
    known = [choice.value for choice in column.choices]
    codes = pyarrow.compute.index_in(array.cast(pa.string()), pa.array(known))
    if codes.null_count:
        raise pa.ArrowInvalid(f"column {name!r} holds other values than {', '.join(known)}")
    return _numpy(codes)


def _texts(column: Column, array: pa.Array, name: str) -> np.ndarray:
    array = array.cast(pa.string())
    size = column.dtype.itemsize
    longest = pyarrow.compute.max(pyarrow.compute.binary_length(array)).as_py() or 0
    if longest > size:
        raise pa.ArrowInvalid(f"column {name!r} has {longest} bytes of text where {size} fit")
    return np.array(array.cast(pa.binary()).to_pylist(), column.dtype)


def _numpy(array: pa.Array) -> np.ndarray:
    values: np.ndarray = array.to_numpy(zero_copy_only=False)
    return values
