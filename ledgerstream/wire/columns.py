"""Record batches as numpy columns and back, by numba kernels: no Python object a record.

`RowCodec` reads and writes the events of one type. Decoding copies each row that carries the
type's prefix into one structured array; anything else comes back as a `BadRecord` with the reason.
Encoding makes whole batches from a structured array, with keys as Java's serialisers write them, so
that murmur2 sends them where Java would.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ledgerstream.errors import ConfigError, DecodeError
from ledgerstream.events import Event, why_not
from ledgerstream.wire import batches
from ledgerstream.wire.batches import HEADER_BYTES, Buffer, Header
from ledgerstream.wire.columnkernels import (
    DIGITS_KEY,
    INT64_KEY,
    NO_KEY,
    TEXT_KEY,
    WRONG_KEY,
    check_keys,
    find_headers,
    gather_fixed,
    hash_rows,
    positive_murmur2,
    scan,
    write_records,
)

Encoding = Literal["fixed", "json"]
KeyForm = Literal["int64", "text"]
RECORD_BYTES_MIN = 7  # the least that a record takes on the wire
RECORD_OVERHEAD_MAX = 40  # its length, attributes, deltas and sizes, at their longest
END = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that is no event of the type: data for the dead letters. `timestamp` in ms."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    reason: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """The events of some batches, in offset order; n rows.

    `rows` has the event's dtype; `offset` int64; `timestamp` int64 ms; `partition_hash` int32, the
    positive murmur2 of each key's bytes, so that `% partitions` is the partition that Java chooses.
    `next_offset` is where reading goes on; `bad` is in offset order.
    """

    rows: np.ndarray
    offset: np.ndarray
    timestamp: np.ndarray
    partition_hash: np.ndarray
    next_offset: int
    bad: list[BadRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class RowHeader:
    """A record header that each of some rows has: its name, and `values` uint8[n, size]."""

    name: str
    values: np.ndarray

    def __getitem__(self, which: Any) -> RowHeader:
        return RowHeader(self.name, self.values[which])

    def written(self) -> np.ndarray:
        """uint8[n, width]: each record's headers as they go onto the wire, their count in front."""
        front = bytearray()
        name = self.name.encode()
        batches.write_varint(front, 1)
        batches.write_varint(front, len(name))
        front += name
        batches.write_varint(front, self.values.shape[1])
        out = np.empty((len(self.values), len(front) + self.values.shape[1]), np.uint8)
        out[:, : len(front)] = np.frombuffer(front, np.uint8)
        out[:, len(front) :] = self.values
        return out


class RowCodec:
    """Events of one type in one encoding, keyed by one of its columns or by none.

    `key_form` is how the key's bytes are made: `int64` Java's eight big-endian bytes, `text` UTF-8
    (of an integer: its decimal digits). By default int64 for integers and text for text.
    """

    def __init__(
        self,
        event: type[Event],
        key: str | None = None,
        encoding: Encoding = "fixed",
        key_form: KeyForm | None = None,
    ) -> None:
        if encoding not in ("fixed", "json"):
            raise ConfigError(f"Encoding {encoding!r} is not known: use 'fixed' or 'json'.")
        self.event, self.key, self.encoding = event, key, encoding
        self.dtype = event.dtype()
        self.key_form = NO_KEY if key is None else _key_form(event, key, key_form)
        known = tuple(reversed(event.layouts()))  # newest first: nearly every row is of it
        self._prefixes = np.frombuffer(b"".join(entry.prefix for entry in known), "<u8").copy()
        self._sizes = np.array([entry.dtype.itemsize for entry in known], np.int64)
        self._defaults = event.default_row().reshape(1).view(np.uint8)
        self._json: Any = None

    # -- reading

    def decode(self, data: Buffer, start: int = 0, stop: int | None = None) -> Decoded:
        """The events with `start <= offset < stop` of `data`: whole batches, first to last.

        Control batches are passed over; a batch whose records are malformed is one bad record.
        """
        out = Filling(self.dtype)
        return out.decoded(self.decode_into(out, data, start, stop))

    def decode_into(
        self, out: Filling, data: Buffer, start: int = 0, stop: int | None = None
    ) -> int:
        """As `decode`, behind what `out` holds already; where reading goes on."""
        end = END if stop is None else stop
        next_offset, wanted = start, []
        for at, header in batches.headers(data):
            if header.base_offset >= end:
                break
            next_offset = max(next_offset, min(header.next_offset, end))
            if header.next_offset > start and not header.control:
                wanted.append((at, header))
        rooms = sum(min(h.record_count, h.size // RECORD_BYTES_MIN) for _, h in wanted)
        out.make_room(rooms)
        for at, header in wanted:
            try:
                body = self._body(data, at, header)
                spans = _spans(header, body, start, end)
            except DecodeError as error:
                if start <= header.base_offset:
                    raw = bytes(memoryview(data)[at : at + header.size])
                    bad = BadRecord(header.base_offset, header.max_timestamp, None, raw, str(error))
                    out.bad.append(bad)
                continue
            out.make_room(len(spans))
            if self.encoding == "fixed":
                self._take_fixed(out, body, spans)
            else:
                self._take_json(out, body, spans)
        return next_offset

    @staticmethod
    def _body(data: Buffer, at: int, header: Header) -> np.ndarray:
        """A batch's records as bytes, inflated; a lying count cannot ask for endless memory."""
        raw = memoryview(data)[at + HEADER_BYTES : at + header.size]
        body = batches.decompress(header.codec, raw) if header.codec else raw
        if not 0 <= header.record_count * RECORD_BYTES_MIN <= len(body):
            raise DecodeError(
                f"The batch at offset {header.base_offset:,} states {header.record_count:,} "
                f"records in {len(body):,} bytes."
            )
        return np.frombuffer(body, np.uint8)

    def _take_fixed(self, out: Filling, body: np.ndarray, spans: np.ndarray) -> None:
        odd = np.empty((len(spans), 2), np.int64)
        at, width = self._key_place()
        out.filled, odds = gather_fixed(
            body, spans, self._prefixes, self._sizes, self._defaults, at, width, self.key_form,
            out.flat, out.offset, out.timestamp, out.partition_hash, out.filled, odd,
        )  # fmt: skip
        for place, why in odd[:odds]:
            key, value = _content(body, spans[place])
            reason = self._wrong_key(key) if why == WRONG_KEY else why_not(self.event, value)
            out.add_bad(spans[place], key, value, reason)

    def _wrong_key(self, key: bytes | None) -> str:
        return (
            f"The record's key {key!r} is not its {self.key} in the declared form. Does its "
            "producer write keys another way (key_form)?"
        )

    def _take_json(self, out: Filling, body: np.ndarray, spans: np.ndarray) -> None:
        if self._json is None:
            from ledgerstream.wire.jsonrows import JsonRows

            self._json = JsonRows(self.event)
        values = _values(body, spans)
        rows, reasons = self._json.decode(values)
        good = np.array([reason is None for reason in reasons], bool)
        n, at = len(rows), out.filled
        out.rows[at : at + n] = rows
        out.offset[at : at + n] = spans[good, 0]
        out.timestamp[at : at + n] = spans[good, 1]
        out.filled += n
        for span, reason in zip(spans, reasons, strict=True):
            if reason is not None:
                key, value = _content(body, span)
                out.add_bad(span, key, value, reason)
        first, (key_at, width) = at, self._key_place()
        wrong = np.zeros(n, np.uint8)
        size = self.dtype.itemsize
        if check_keys(
            body, spans[good], out.flat[first * size : out.filled * size], size, key_at, width,
            self.key_form, out.partition_hash[first : out.filled], wrong,
        ):  # fmt: skip
            for span in spans[good][wrong == 1]:
                key, value = _content(body, span)
                out.add_bad(span, key, value, self._wrong_key(key))
            out.keep(first, wrong == 0)

    def _key_place(self) -> tuple[int, int]:
        if self.key is None:
            return 0, 0
        assert self.dtype.fields is not None
        dtype, at = self.dtype.fields[self.key][:2]
        return at, dtype.itemsize

    # -- writing

    def hashes(self, rows: np.ndarray) -> np.ndarray:
        """int32[n]: the positive murmur2 of each row's key bytes. Needs a key."""
        keys, sizes = self.keys(rows)
        out = np.empty(len(rows), np.int32)
        hash_rows(keys, sizes, out)
        return out

    def keys(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(uint8[n, width], int64[n] sizes): each row's key as it goes onto the wire."""
        n = len(rows)
        if self.key is None or self.key_form == NO_KEY:
            return np.zeros((n, 0), np.uint8), np.full(n, -1, np.int64)
        column = np.ascontiguousarray(rows[self.key])
        if self.key_form == INT64_KEY:
            wide = column.astype(">i8").view(np.uint8).reshape(n, 8)
            return wide, np.full(n, 8, np.int64)
        text = column.astype("S20") if self.key_form == DIGITS_KEY else column
        sizes = np.char.str_len(text).astype(np.int64)
        return np.ascontiguousarray(text).view(np.uint8).reshape(n, text.dtype.itemsize), sizes

    def values(self, rows: np.ndarray) -> np.ndarray:
        """uint8[n, 8 + row]: prefix and row of each event, as it goes onto the wire."""
        n, size = len(rows), self.dtype.itemsize
        rows = np.ascontiguousarray(rows, self.dtype)
        out = np.empty((n, 8 + size), np.uint8)
        out[:, :8] = np.frombuffer(self.event.layouts()[-1].prefix, np.uint8)
        out[:, 8:] = rows.view(np.uint8).reshape(n, size)
        return out

    def timestamps(self, rows: np.ndarray, now_ms: int) -> np.ndarray:
        """int64[n] ms: each row's event time, or `now_ms` where the type has none."""
        time = self.event.time_column()
        if time is None:
            return np.full(len(rows), now_ms, np.int64)
        return np.asarray(rows[time] // 1_000_000, np.int64)

    def encode(
        self,
        rows: np.ndarray,
        now_ms: int,
        stamps: np.ndarray | None = None,
        header: RowHeader | None = None,
    ) -> np.ndarray:
        """The body of one uncompressed batch of these rows, in order: uint8[bytes].

        stamps:  int64[n] ms; without it `timestamps(rows, now_ms)`.
        header:  one record header for each row.

        Base timestamp is the first of `stamps`. Rows of `json` are written by `JsonRows`.
        """
        keys, key_sizes = self.keys(rows)
        stamps = self.timestamps(rows, now_ms) if stamps is None else stamps
        if self.encoding == "json":
            from ledgerstream.wire.jsonrows import JsonRows

            texts = JsonRows(self.event).encode(rows)
            items = [
                batches.NewRecord(
                    None if size < 0 else keys[i, :size].tobytes(),
                    texts[i],
                    int(stamps[i]),
                    () if header is None else ((header.name, header.values[i].tobytes()),),
                )
                for i, size in enumerate(key_sizes)
            ]
            return np.frombuffer(batches.encode_records(items), np.uint8)
        rows = np.ascontiguousarray(rows, self.dtype)
        prefix = np.frombuffer(self.event.layouts()[-1].prefix, np.uint8)
        headers = np.zeros((len(rows), 1), np.uint8) if header is None else header.written()
        width = headers.shape[1]
        most = keys.shape[1] + 8 + self.dtype.itemsize + width + RECORD_OVERHEAD_MAX
        out = np.empty(len(rows) * most, np.uint8)
        size = write_records(
            rows.view(np.uint8), self.dtype.itemsize, prefix, keys.reshape(-1), keys.shape[1],
            key_sizes, stamps, headers.reshape(-1), width, out,
        )  # fmt: skip
        return out[:size]


def header_values(
    data: Buffer, name: str, size: int, start: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(int64[n] offsets, uint8[n, size]): of the records from `start` on that have a header of this
    name and size, its value. `data`: whole batches; those that are malformed are passed over."""
    wanted = np.frombuffer(name.encode(), np.uint8)
    offsets, values = [np.empty(0, np.int64)], [np.empty((0, size), np.uint8)]
    for at, header in batches.headers(data):
        if header.control or header.next_offset <= start:
            continue
        try:
            body = RowCodec._body(data, at, header)
            spans = _spans(header, body, 0, END)
        except DecodeError:
            continue
        these = np.empty((len(spans), size), np.uint8)
        found = np.zeros(len(spans), np.bool_)
        if find_headers(body, len(spans), wanted, size, these.reshape(-1), found):
            found &= spans[:, 0] >= start
            offsets.append(spans[found, 0])
            values.append(these[found])
    return np.concatenate(offsets), np.concatenate(values)


def partition_order(hashes: np.ndarray, partitions: int) -> list[tuple[int, np.ndarray]]:
    """(partition, int64 row numbers in order) for each partition that gets rows."""
    if partitions == 1:
        return [(0, np.arange(len(hashes)))] if len(hashes) else []
    chosen = hashes % partitions
    order = np.argsort(chosen, kind="stable")
    bounds = np.searchsorted(chosen[order], np.arange(partitions + 1))
    return [
        (p, order[bounds[p] : bounds[p + 1]])
        for p in range(partitions)
        if bounds[p] < bounds[p + 1]
    ]


def murmur2(data: bytes) -> int:
    """Kafka's murmur2 of a key, made positive: `% partitions` is where Java sends it."""
    row = np.frombuffer(data, np.uint8)
    return int(positive_murmur2(row, 0, len(row)))


class Filling:
    """The arrays of a `Decoded` while they fill up, over one fetch or many."""

    def __init__(self, dtype: np.dtype, rows_expected: int = 0) -> None:
        self.bad: list[BadRecord] = []
        self.filled = 0
        self._allocate(dtype, rows_expected)

    def _allocate(self, dtype: np.dtype, rooms: int) -> None:
        self.rows = np.empty(rooms, dtype)
        self.flat = self.rows.view(np.uint8)
        self.offset = np.empty(rooms, np.int64)
        self.timestamp = np.empty(rooms, np.int64)
        self.partition_hash = np.empty(rooms, np.int32)

    def make_room(self, more: int) -> None:
        """See to it that so many rows more have room."""
        n = self.filled
        if n + more <= len(self.rows):
            return
        before: tuple[np.ndarray, ...] = (
            self.rows, self.offset, self.timestamp, self.partition_hash,
        )  # fmt: skip
        self._allocate(self.rows.dtype, n + more if n == 0 else max(n + more, 2 * len(self.rows)))
        after: tuple[np.ndarray, ...] = (
            self.rows, self.offset, self.timestamp, self.partition_hash,
        )  # fmt: skip
        for old, new in zip(before, after, strict=True):
            new[:n] = old[:n]

    def add_bad(
        self, span: np.ndarray, key: bytes | None, value: bytes | None, reason: str
    ) -> None:
        self.bad.append(BadRecord(int(span[0]), int(span[1]), key, value, reason))

    def keep(self, first: int, good: np.ndarray) -> None:
        """Of the rows from `first` on, keep those marked good."""
        last = first + int(good.sum())
        for array in (self.rows, self.offset, self.timestamp, self.partition_hash):
            array[first:last] = array[first : self.filled][good]
        self.filled = last

    def decoded(self, next_offset: int) -> Decoded:
        n = self.filled
        self.bad.sort(key=lambda record: record.offset)
        return Decoded(
            self.rows[:n], self.offset[:n], self.timestamp[:n], self.partition_hash[:n],
            next_offset, self.bad,
        )  # fmt: skip


def _key_form(event: type[Event], key: str, form: KeyForm | None) -> int:
    column = event.columns().get(key)
    if column is None:
        raise ConfigError(
            f"{event.__name__} has no column {key!r} to be the key.",
            f"Its columns are {', '.join(event.columns())}.",
        )
    if column.kind == "text" and form in (None, "text"):
        return TEXT_KEY
    if column.kind in ("int", "enum", "money", "timestamp") and form in (None, "int64", "text"):
        return DIGITS_KEY if form == "text" else INT64_KEY
    raise ConfigError(
        f"{event.__name__}.{key} ({column.kind}) cannot be a key in the form {form or 'default'}.",
        "Keys are integers (int64 or text) or text.",
    )


def _spans(header: Header, body: np.ndarray, start: int, stop: int) -> np.ndarray:
    """int64[n, 6] (offset, timestamp ms, key at, key size, value at, value size) of each record."""
    append_time = bool(header.attributes & batches.LOG_APPEND_TIME)
    base_timestamp = header.max_timestamp if append_time else header.base_timestamp
    spans = np.empty((header.record_count, 6), np.int64)
    found = scan(
        body, header.record_count, header.base_offset, base_timestamp, append_time, start, stop,
        spans,
    )  # fmt: skip
    if found < 0:
        raise DecodeError(f"The batch at offset {header.base_offset:,} is malformed.")
    return spans[:found]


def _values(body: np.ndarray, spans: np.ndarray) -> list[bytes | None]:
    """The value of each record, None for a tombstone."""
    data = body.tobytes()
    starts, sizes = spans[:, 4].tolist(), spans[:, 5].tolist()
    return [
        data[at : at + size] if size >= 0 else None for at, size in zip(starts, sizes, strict=True)
    ]


def _content(body: np.ndarray, span: np.ndarray) -> tuple[bytes | None, bytes | None]:
    _, _, key_at, key_size, value_at, value_size = (int(part) for part in span)
    key = None if key_size < 0 else body[key_at : key_at + key_size].tobytes()
    return key, None if value_size < 0 else body[value_at : value_at + value_size].tobytes()
