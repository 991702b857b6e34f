"""Events as JSON objects: a batch at a time into columns and back, by msgspec.

Money is major units as text or number and is parsed from its digits, never by way of a float. Times
are ISO 8601 text or integer nanoseconds. Fields that the type does not know are passed over;
optional ones that are absent get their default.
"""

from __future__ import annotations

from decimal import Decimal
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from ledgerstream.errors import DecodeError
from ledgerstream.events import Column, Event, format_timestamp, parse_timestamp
from ledgerstream.money import INT64_MAX, MINOR_DIGITS, parse_minor

_SHAPE_AT = np.array([4, 7, 10, 13, 16, 19])
_SHAPE = np.frombuffer(b"--T::Z", np.uint8)
_DIGITS_AT = np.array([i for i in range(20) if i not in _SHAPE_AT])
_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "text": str}


class JsonRows:
    """JSON objects ↔ rows of one event type."""

    def __init__(self, event: type[Event]) -> None:
        self.event = event
        self.columns = list(event.columns().values())
        fields = [self._field(column) for column in self.columns]
        self._object = msgspec.defstruct(event.__name__, fields, gc=False)
        self._decoder = msgspec.json.Decoder(self._object)

    @staticmethod
    def _field(column: Column) -> tuple[Any, ...]:
        match column.kind:
            case "money":
                kind: Any = Decimal
            case "timestamp":
                kind = int | str
            case "enum":
                kind = type(column.choices[0])
            case _:
                kind = _TYPES[column.kind]
        if not column.optional:
            return (column.name, kind)
        default = column.default
        if column.kind == "money":
            default = Decimal(default).scaleb(-MINOR_DIGITS[column.currency or ""])
        return (column.name, kind, default)

    def decode(self, values: list[bytes | None]) -> tuple[np.ndarray, list[str | None]]:
        """(rows of the good values in order, one reason or None for each value)."""
        reasons: list[str | None] = [None] * len(values)
        try:
            decode: Any = self._decoder.decode
            return self._rows(list(map(decode, values))), reasons
        except (msgspec.MsgspecError, DecodeError, TypeError, ValueError, OverflowError):
            return self._decode_singly(values, reasons)

    def _decode_singly(
        self, values: list[bytes | None], reasons: list[str | None]
    ) -> tuple[np.ndarray, list[str | None]]:
        rows = []
        for i, value in enumerate(values):
            try:
                if value is None:
                    raise DecodeError("it has no value (a tombstone)")
                rows.append(self._rows([self._decoder.decode(value)]))
            except (msgspec.MsgspecError, DecodeError, ValueError, OverflowError) as error:
                reasons[i] = f"The record is not a {self.event.__name__}: {error}"
        empty = np.zeros(0, self.event.dtype())
        return (np.concatenate(rows) if rows else empty), reasons

    def _rows(self, found: list[Any]) -> np.ndarray:
        rows = np.empty(len(found), self.event.dtype())
        for column in self.columns:
            rows[column.name] = _stored(column, list(map(attrgetter(column.name), found)))
        return rows

    def encode(self, rows: np.ndarray) -> list[bytes]:
        """Each row as a JSON object."""
        columns = [_plain(column, rows[column.name]) for column in self.columns]
        encode = msgspec.json.Encoder().encode
        names = [column.name for column in self.columns]
        return [encode(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]


def _stored(column: Column, values: list[Any]) -> Any:
    match column.kind:
        case "money":
            return _minor(values, column.currency or "")
        case "timestamp":
            return _times(values)
        case "enum":
            return [column.store(value) for value in values]
        case "text":
            texts = [value.encode() for value in values]
            size = column.dtype.itemsize
            if any(len(text) > size or b"\x00" in text for text in texts):
                raise DecodeError(f"{column.name} is longer than {size} bytes, or holds a NUL")
            return texts
        case "int":
            limits = np.iinfo(column.dtype)
            if values and not limits.min <= min(values) <= max(values) <= limits.max:
                raise DecodeError(f"{column.name} does not fit {column.dtype}")
    return values


def _times(values: list[Any]) -> np.ndarray:
    """int64[n] ns. Text of the shape 2018-04-01T00:00:31Z is parsed a column at a time."""
    if all(type(value) is str and len(value) == 20 and value.isascii() for value in values):
        text = np.array(values, "S20").view(np.uint8).reshape(-1, 20)
        if (text[:, _SHAPE_AT] == _SHAPE).all() and (text[:, _DIGITS_AT] - 48 < 10).all():
            seconds = text[:, :19].copy().view("S19").ravel().astype("datetime64[s]")
            if int(str(seconds.min())[:4]) >= 1678 and int(str(seconds.max())[:4]) <= 2261:
                return np.asarray(seconds.astype(np.int64) * 1_000_000_000)
    return np.array([parse_timestamp(value) for value in values], np.int64)


def _minor(values: list[Decimal], currency: str) -> list[int]:
    digits = MINOR_DIGITS[currency]
    minor = [value.scaleb(digits) for value in values if value.is_finite()]
    whole = [int(value) for value in minor]
    if len(whole) != len(values) or whole != minor or any(abs(v) > INT64_MAX for v in whole):
        return [parse_minor(value, currency) for value in values]  # raises the sentence
    return whole


def _plain(column: Column, stored: np.ndarray) -> list[Any]:
    match column.kind:
        case "money":
            digits = MINOR_DIGITS[column.currency or ""]
            return [str(Decimal(int(value)).scaleb(-digits)) for value in stored]
        case "timestamp":
            return [format_timestamp(value) for value in stored.tolist()]
        case "enum":
            return [column.load(value).value for value in stored]
        case "text":
            return [value.decode() for value in stored.tolist()]
    return list(stored.tolist())
