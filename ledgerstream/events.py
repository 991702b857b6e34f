"""Event types: a pydantic model that is also a row of columns.

    class Payment(Event):
        payment_id: int          # int64; Int8, Int16, Int32 are narrower
        at: Timestamp            # int64, nanoseconds since 1970 UTC
        amount: EUR              # int64, minor units
        country: Text[2]         # UTF-8 of at most two bytes
        note: Text[16] = ""      # a field with a default is optional; only at the end

An event type is checked when it is declared and maps to one packed little-endian numpy dtype.

**On the wire** an event is `fixed` or `json`. A fixed value is an eight-byte prefix and the row:

    magic u8 (0x4C) · form u8 (1) · fields u16 · layout u32 (CRC-32C of the fields' names and types)

so a reader knows at once whether a row is its own. A row that an older version of the type wrote,
with fewer optional fields at its end, is read with their defaults; any other row is not an event of
this type and goes to the dead letters with a sentence that says why.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import numpy as np
from crc32c import crc32c
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic.fields import FieldInfo

from ledgerstream.errors import DecodeError, EventTypeError
from ledgerstream.money import Money

MAGIC = 0x4C
FORM = 1
PREFIX = struct.Struct("<BBHI")
PREFIX_BYTES = PREFIX.size
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

Kind = Literal["int", "float", "bool", "enum", "text", "timestamp", "money"]


@dataclass(frozen=True, slots=True)
class Width:
    """The mark of a narrower integer: bytes of it."""

    bytes: int


@dataclass(frozen=True, slots=True)
class FixedText:
    """The mark of a text column: at most so many bytes of UTF-8."""

    bytes: int


class _TimestampMark:
    """The mark of an event time."""


_ISO = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?(Z|[+-]\d\d:?\d\d)?"
)
_EPOCH = dt.date(1970, 1, 1).toordinal()


def parse_timestamp(value: object) -> int:
    """Nanoseconds since 1970 UTC from an integer of them, ISO 8601 text, or an aware datetime.

    Text without a zone is UTC. Raises DecodeError. Exact to the nanosecond: no float on the way.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, dt.datetime):
        if value.tzinfo is None:
            raise DecodeError(f"{value} has no time zone: give an aware datetime, or text in UTC.")
        since = value - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
        return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1_000
    match = _ISO.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise DecodeError(
            f"{value!r} is not a time: give ISO 8601 text such as 2018-04-01T00:00:31Z, "
            "or integer nanoseconds since 1970 UTC."
        )
    year, month, day, hour, minute = (int(part) for part in match.groups()[:5])
    try:
        days = dt.date(year, month, day).toordinal() - _EPOCH
        dt.time(hour, minute, int(match[6] or 0))
    except ValueError as error:
        raise DecodeError(f"{value!r} is not a time: {error}.") from error
    seconds = ((days * 24 + hour) * 60 + minute) * 60 + int(match[6] or 0)
    zone = match[8]
    if zone and zone != "Z":
        offset = int(zone[1:3]) * 3600 + int(zone[-2:]) * 60
        seconds -= offset if zone[0] == "+" else -offset
    return seconds * 1_000_000_000 + int((match[7] or "").ljust(9, "0"))


def format_timestamp(ns: int) -> str:
    """ISO 8601 in UTC with as many decimals as it has: `2018-04-01T00:00:31Z`."""
    seconds, rest = divmod(int(ns), 1_000_000_000)
    days, within = divmod(seconds, 86_400)
    date = dt.date.fromordinal(_EPOCH + days)
    clock = f"{within // 3600:02}:{within // 60 % 60:02}:{within % 60:02}"
    fraction = f".{rest:09}".rstrip("0") if rest else ""
    return f"{date.isoformat()}T{clock}{fraction}Z"


def _fits_int64(value: int) -> int:
    if not INT64_MIN <= value <= INT64_MAX:
        raise ValueError("does not fit 64 bits")
    return value


def _to_timestamp(value: object) -> int:
    try:
        return _fits_int64(parse_timestamp(value))
    except DecodeError as error:
        raise ValueError(str(error)) from error


Timestamp = Annotated[int, _TimestampMark(), BeforeValidator(_to_timestamp)]
Int8 = Annotated[int, Width(1)]
Int16 = Annotated[int, Width(2)]
Int32 = Annotated[int, Width(4)]


class Text:
    """`Text[16]`: text of at most 16 bytes of UTF-8, without NUL."""

    def __class_getitem__(cls, size: int) -> Any:
        if not isinstance(size, int) or not 1 <= size <= 4096:
            raise EventTypeError(f"Text[{size!r}]: give the most bytes of UTF-8, 1 to 4096.")

        def check(value: str) -> str:
            if len(value.encode()) > size:
                raise ValueError(f"is longer than {size} bytes of UTF-8")
            if "\x00" in value:
                raise ValueError("holds a NUL character")
            return value

        return Annotated[str, FixedText(size), AfterValidator(check)]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of an event type. `choices`: the members of an enum, in code order."""

    name: str
    kind: Kind
    dtype: np.dtype
    currency: str | None = None
    choices: tuple[enum.Enum, ...] = ()
    optional: bool = False
    default: Any = None

    @property
    def signature(self) -> str:
        """What the layout hash covers: a change of it makes another layout."""
        currency = f":{self.currency}" if self.currency else ""
        choices = "".join(f"|{choice.name}={choice.value}" for choice in self.choices)
        return f"{self.name} {self.kind}{currency}{choices} {self.dtype.str}"

    @property
    def meaning(self) -> str:
        """What stored values mean, apart from their width: `int`, `money:EUR`, `enum|A|B|`. With
        the members of an enum only where their places are stored; further ones may follow."""
        if self.kind == "enum" and self.dtype == np.int16:
            return "enum|" + "".join(f"{choice.name}|" for choice in self.choices)
        return f"{self.kind}:{self.currency}" if self.currency else self.kind

    def store(self, value: Any) -> Any:
        """A validated Python value as what the column holds."""
        if self.kind == "enum":
            return self.choices.index(value) if self.dtype == np.int16 else value.value
        return value.encode() if self.kind == "text" else value

    def load(self, stored: Any) -> Any:
        """What the column holds as a Python value."""
        if self.kind == "enum":
            if self.dtype == np.int16:
                return self.choices[int(stored)]
            return type(self.choices[0])(int(stored))
        if self.kind == "text":
            return bytes(stored).rstrip(b"\0").decode()
        return stored.item() if hasattr(stored, "item") else stored


@dataclass(frozen=True, slots=True)
class Layout:
    """The rows of one version of an event type: its first `fields` columns."""

    fields: int
    dtype: np.dtype
    prefix: bytes  # the eight bytes in front of each row of it


class Event(BaseModel):
    """Base of event types; see the module's docstring."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    _columns: ClassVar[dict[str, Column]] = {}
    _layouts: ClassVar[tuple[Layout, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls._columns = {name: _column(cls, name, f) for name, f in cls.model_fields.items()}
        cls._layouts = _layouts(cls)

    @classmethod
    def columns(cls) -> Mapping[str, Column]:
        """The columns in order."""
        return cls._columns

    @classmethod
    def dtype(cls) -> np.dtype:
        """The packed little-endian row."""
        return cls._layouts[-1].dtype

    @classmethod
    def layouts(cls) -> tuple[Layout, ...]:
        """Every layout that this type reads, oldest first; the last is what it writes."""
        return cls._layouts

    @classmethod
    def time_column(cls) -> str | None:
        """The name of the event's only Timestamp, or None if there is none or more than one."""
        times = [c.name for c in cls._columns.values() if c.kind == "timestamp"]
        return times[0] if len(times) == 1 else None

    @classmethod
    def default_row(cls) -> np.ndarray:
        """One row with the optional columns' defaults, zero elsewhere. Shape ()."""
        row = np.zeros((), cls.dtype())
        for column in cls._columns.values():
            if column.optional:
                row[column.name] = column.store(column.default)
        return row

    def row(self) -> tuple[Any, ...]:
        """The stored values in column order, as an element of `dtype()`."""
        return tuple(c.store(getattr(self, c.name)) for c in self._columns.values())

    def encode(self) -> bytes:
        """The `fixed` form: prefix and row."""
        return self._layouts[-1].prefix + np.array(self.row(), self.dtype()).tobytes()

    @classmethod
    def of(cls, row: Any) -> Any:
        """An event object from one row of `dtype()`."""
        return cls.model_construct(**{c.name: c.load(row[c.name]) for c in cls._columns.values()})


def _column(event: type[Event], name: str, field: FieldInfo) -> Column:
    where = f"{event.__name__}.{name}"
    optional = not field.is_required()
    default = field.get_default(call_default_factory=False) if optional else None
    if optional and default is None:
        raise EventTypeError(
            f"{where}: an optional field needs a default that its column can hold.",
            "Give it a value such as 0 or '': columns have no null.",
        )
    kind, dtype, currency, choices = _type(where, field)
    column = Column(name, kind, dtype, currency, choices, optional, default)
    if optional:
        try:
            if kind == "enum" and default not in choices:
                raise ValueError
            np.zeros((), dtype)[()] = np.array(column.store(default), dtype)
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise EventTypeError(f"{where}: the default {default!r} is no {kind}.") from error
    return column


def _type(where: str, field: FieldInfo) -> tuple[Kind, np.dtype, str | None, tuple[Any, ...]]:
    annotation, marks = field.annotation, list(field.metadata)
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        marks += inner
    mark = next((m for m in marks if isinstance(m, (Money, FixedText, Width, _TimestampMark))), 0)
    match annotation, mark:
        case _, Money(currency=currency):
            return "money", np.dtype("<i8"), currency, ()
        case _, FixedText(bytes=size):
            return "text", np.dtype(f"S{size}"), None, ()
        case _, _TimestampMark():
            return "timestamp", np.dtype("<i8"), None, ()
        case _, Width(bytes=size):
            return "int", np.dtype(f"<i{size}"), None, ()
    if annotation is bool:
        return "bool", np.dtype("?"), None, ()
    if annotation is int:
        return "int", np.dtype("<i8"), None, ()
    if annotation is float:
        return "float", np.dtype("<f8"), None, ()
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        members = tuple(annotation)
        if issubclass(annotation, enum.IntEnum):
            return "enum", np.dtype("<i4"), None, members
        return "enum", np.dtype("<i2"), None, members
    raise EventTypeError(
        f"{where}: {annotation} has no column.",
        "Use int, Int8, Int16, Int32, float, bool, an enum, Text[n], Timestamp, or money such as "
        "EUR; text needs its size, as in Text[16].",
    )


def _layouts(event: type[Event]) -> tuple[Layout, ...]:
    columns = list(event._columns.values())
    required = sum(not c.optional for c in columns)
    if any(c.optional for c in columns[:required]):
        late = next(c.name for c in columns[required:] if not c.optional)
        raise EventTypeError(
            f"{event.__name__}.{late} has no default but follows a field that has one.",
            "A field added later goes to the end and has a default, so that old rows can be read.",
        )
    layouts = []
    for fields in range(max(required, 1), len(columns) + 1):
        some = columns[:fields]
        dtype = np.dtype([(c.name, c.dtype) for c in some])
        layout = crc32c("\n".join(c.signature for c in some).encode())
        layouts.append(Layout(fields, dtype, PREFIX.pack(MAGIC, FORM, fields, layout)))
    return tuple(layouts)


def check_compatible(old: type[Event], new: type[Event]) -> None:
    """Raise EventTypeError unless rows of `old` can be read as `new`."""
    befores, afters = list(old.columns().values()), list(new.columns().values())
    for before, after in zip(befores, afters, strict=False):
        if before.signature != after.signature:
            raise EventTypeError(
                f"{new.__name__}.{after.name} is {after.signature!r} where rows written before "
                f"have {before.signature!r}.",
                "Only optional fields may be added, at the end: for anything else make a new "
                "event type and a new topic.",
            )
    if len(afters) < len(befores):
        raise EventTypeError(
            f"{new.__name__} no longer has {befores[len(afters)].name!r}, which old rows hold.",
            "Keep the field: fields are never removed from an event type.",
        )
    for added in afters[len(befores) :]:
        if not added.optional:
            raise EventTypeError(
                f"{new.__name__}.{added.name} is new and has no default.",
                "Give it one, so that rows written before can be read.",
            )


def why_not(event: type[Event], value: bytes | None) -> str:
    """The sentence for a record that is not a `fixed` event of this type."""
    name = event.__name__
    if value is None:
        return f"The record has no value (a tombstone); a {name} was expected."
    if len(value) < PREFIX_BYTES:
        return f"{len(value)} bytes are too short for the {PREFIX_BYTES}-byte prefix of a {name}."
    magic, form, fields, layout = PREFIX.unpack_from(value)
    if (magic, form) != (MAGIC, FORM):
        return f"The value does not start with the prefix of a fixed-layout event; {name} expected."
    known = {entry.prefix: entry for entry in event.layouts()}
    match = known.get(value[:PREFIX_BYTES])
    if match is not None:
        return (
            f"A {name} of {fields} fields takes {match.dtype.itemsize} bytes, "
            f"this one has {len(value) - PREFIX_BYTES}."
        )
    newest = event.layouts()[-1]
    if fields > newest.fields:
        return (
            f"Written with a newer {name} of {fields} fields where {newest.fields} are known here: "
            "deploy the new event type to the processor, then retry the dead letter."
        )
    return (
        f"Written with another layout ({fields} fields, {layout:#010x}) than this {name}'s: a "
        "field was renamed, retyped, removed or reordered. Read such rows with the type that "
        "wrote them."
    )
