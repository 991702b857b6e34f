"""Record batches as numpy columns and back, by numba kernels: no Python object a record.

`RowCodec` reads and writes the events of one type. Decoding copies each row that carries the
type's prefix into one structured array; anything else comes back as a `BadRecord` with the reason.
Encoding makes whole batches from a structured array, with keys as Java's serialisers write them, so
that murmur2 sends them where Java would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import numba
import numpy as np

from ledgerstream.errors import ConfigError, DecodeError
from ledgerstream.events import Event, why_not
from ledgerstream.wire import batches
from ledgerstream.wire.batches import HEADER_BYTES, Buffer, Header

Encoding = Literal["fixed", "json"]
KeyForm = Literal["int64", "text"]
F = TypeVar("F", bound=Callable[..., Any])

NO_KEY, INT64_KEY, TEXT_KEY, DIGITS_KEY = range(4)
RECORD_BYTES_MIN = 7  # the least that a record takes on the wire
RECORD_OVERHEAD_MAX = 40  # its length, attributes, deltas and sizes, at their longest
END = np.iinfo(np.int64).max


def _njit(function: F) -> F:
    return cast(F, numba.njit(nogil=True, cache=True, error_model="numpy")(function))


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

        Control batches are passed over. Raises DecodeError where a batch itself is malformed.
        """
        end = END if stop is None else stop
        next_offset, wanted = start, []
        for at, header in batches.headers(data):
            if header.base_offset >= end:
                break
            next_offset = max(next_offset, min(header.next_offset, end))
            if header.next_offset > start and not header.control:
                wanted.append((header, self._body(data, at, header)))
        out = _Filling(sum(header.record_count for header, _ in wanted), self.dtype)
        for header, body in wanted:
            spans = _spans(header, body, start, end)
            if self.encoding == "fixed":
                self._take_fixed(out, body, spans)
            else:
                self._take_json(out, body, spans)
        return out.decoded(next_offset)

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

    def _take_fixed(self, out: _Filling, body: np.ndarray, spans: np.ndarray) -> None:
        taken = np.empty(len(spans), np.uint8)
        out.filled = _gather_fixed(
            body, spans, self._prefixes, self._sizes, self._defaults[: self.dtype.itemsize],
            out.flat, out.offset, out.timestamp, out.filled, taken,
        )  # fmt: skip
        if not taken.all():
            for span in spans[taken == 0]:
                key, value = _content(body, span)
                out.bad.append(BadRecord(span[0], span[1], key, value, why_not(self.event, value)))
        self._take_keys(out, body, spans[taken == 1])

    def _take_json(self, out: _Filling, body: np.ndarray, spans: np.ndarray) -> None:
        if self._json is None:
            from ledgerstream.wire.jsonrows import JsonRows

            self._json = JsonRows(self.event)
        values = [_content(body, span)[1] for span in spans]
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
                out.bad.append(BadRecord(int(span[0]), int(span[1]), key, value, reason))
        self._take_keys(out, body, spans[good])

    def _take_keys(self, out: _Filling, body: np.ndarray, spans: np.ndarray) -> None:
        """Hash the keys of the newest rows, and turn out those whose key is not their column's."""
        first = out.filled - len(spans)
        wrong = np.zeros(len(spans), np.uint8)
        at, width = self._key_place()
        odd = _hash_keys(
            body, spans, out.flat[first : out.filled], at, width, self.key_form,
            out.partition_hash[first : out.filled], wrong,
        )  # fmt: skip
        if not odd:
            return
        for index in np.flatnonzero(wrong):
            key, value = _content(body, spans[index])
            reason = (
                f"The record's key {key!r} is not its {self.key} "
                f"({out.rows[first + index][self.key]}) in the declared form."
            )
            out.bad.append(
                BadRecord(int(spans[index, 0]), int(spans[index, 1]), key, value, reason)
            )
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
        _hash_rows(keys, sizes, out)
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

    def encode(self, rows: np.ndarray, now_ms: int) -> np.ndarray:
        """The body of one uncompressed batch of these rows, in order: uint8[bytes].

        Base timestamp is `timestamps(rows, now_ms)[0]`. Rows of `json` are written by `JsonRows`.
        """
        keys, key_sizes = self.keys(rows)
        stamps = self.timestamps(rows, now_ms)
        if self.encoding == "json":
            from ledgerstream.wire.jsonrows import JsonRows

            texts = JsonRows(self.event).encode(rows)
            items = [
                batches.NewRecord(
                    None if size < 0 else keys[i, :size].tobytes(), texts[i], int(stamps[i])
                )
                for i, size in enumerate(key_sizes)
            ]
            return np.frombuffer(batches.encode_records(items), np.uint8)
        rows = np.ascontiguousarray(rows, self.dtype)
        prefix = np.frombuffer(self.event.layouts()[-1].prefix, np.uint8)
        most = keys.shape[1] + 8 + self.dtype.itemsize + RECORD_OVERHEAD_MAX
        out = np.empty(len(rows) * most, np.uint8)
        size = _write_records(
            rows.view(np.uint8).reshape(len(rows), -1), prefix, keys, key_sizes, stamps, out
        )
        return out[:size]


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


def concatenate(parts: Sequence[Decoded], dtype: np.dtype, start: int) -> Decoded:
    """Consecutive decoded parts as one; an empty one at `start` if there are none."""
    if len(parts) == 1:
        return parts[0]
    empty = [np.zeros(0, np.int64)]
    return Decoded(
        np.concatenate([part.rows for part in parts] or [np.zeros(0, dtype)]),
        np.concatenate([part.offset for part in parts] or empty),
        np.concatenate([part.timestamp for part in parts] or empty),
        np.concatenate([part.partition_hash for part in parts] or [np.zeros(0, np.int32)]),
        parts[-1].next_offset if parts else start,
        [bad for part in parts for bad in part.bad],
    )


def murmur2(data: bytes) -> int:
    """Kafka's murmur2 of a key, made positive: `% partitions` is where Java sends it."""
    row = np.frombuffer(data, np.uint8)
    return int(_murmur2(row, 0, len(row)) & np.uint32(0x7FFFFFFF))


class _Filling:
    """The arrays of a `Decoded` while they fill up."""

    def __init__(self, rows_max: int, dtype: np.dtype) -> None:
        self.rows = np.empty(rows_max, dtype)
        self.flat = self.rows.view(np.uint8).reshape(rows_max, dtype.itemsize)
        self.offset = np.empty(rows_max, np.int64)
        self.timestamp = np.empty(rows_max, np.int64)
        self.partition_hash = np.empty(rows_max, np.int32)
        self.bad: list[BadRecord] = []
        self.filled = 0

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
    found = _scan(
        body, header.record_count, header.base_offset, base_timestamp, append_time, start, stop,
        spans,
    )  # fmt: skip
    if found < 0:
        raise DecodeError(f"The batch at offset {header.base_offset:,} is malformed.")
    return spans[:found]


def _content(body: np.ndarray, span: np.ndarray) -> tuple[bytes | None, bytes | None]:
    _, _, key_at, key_size, value_at, value_size = (int(part) for part in span)
    key = None if key_size < 0 else body[key_at : key_at + key_size].tobytes()
    return key, None if value_size < 0 else body[value_at : value_at + value_size].tobytes()


# -- kernels


@_njit
def _varint(body: np.ndarray, at: int) -> Any:
    """(zigzag value, next position); the position is -1 where the number runs past its end."""
    raw = np.uint64(0)
    shift = np.uint64(0)
    while True:
        if at >= len(body) or shift > np.uint64(63):
            return 0, -1
        byte = body[at]
        at += 1
        raw |= np.uint64(byte & 0x7F) << shift
        if byte < 0x80:
            return np.int64(raw >> np.uint64(1)) ^ -np.int64(raw & np.uint64(1)), at
        shift += np.uint64(7)


@_njit
def _scan(
    body: np.ndarray, count: int, base_offset: int, base_timestamp: int, append_time: bool,
    start: int, stop: int, spans: np.ndarray,
) -> int:  # fmt: skip
    """Fill `spans` with the records in [start, stop); how many, or -1 if the body is malformed."""
    at, found = 0, 0
    for _ in range(count):
        size, at = _varint(body, at)
        if at < 0 or size < 0 or at + size > len(body):
            return -1
        end = at + size
        delta_time, at = _varint(body, at + 1)
        if at < 0:
            return -1
        delta, at = _varint(body, at)
        if at < 0:
            return -1
        key_size, at = _varint(body, at)
        if at < 0 or key_size > end - at:
            return -1
        key_at = at
        at += max(key_size, 0)
        value_size, at = _varint(body, at)
        if at < 0 or value_size > end - at:
            return -1
        offset = base_offset + delta
        if start <= offset < stop:
            span = spans[found]
            span[0] = offset
            span[1] = base_timestamp if append_time else base_timestamp + delta_time
            span[2], span[3] = key_at, key_size
            span[4], span[5] = at, value_size
            found += 1
        at = end  # headers are passed over
    return found if at == len(body) else -1


@_njit
def _gather_fixed(
    body: np.ndarray, spans: np.ndarray, prefixes: np.ndarray, sizes: np.ndarray,
    defaults: np.ndarray, flat: np.ndarray, offset: np.ndarray, timestamp: np.ndarray,
    filled: int, taken: np.ndarray,
) -> int:  # fmt: skip
    """Copy each row that carries a known prefix; `taken` says which. How many rows now."""
    width = flat.shape[1]
    for i in range(len(spans)):
        taken[i] = 0
        at, size = spans[i, 4], spans[i, 5]
        if size < 8:
            continue
        prefix = np.uint64(0)
        for b in range(8):
            prefix |= np.uint64(body[at + b]) << np.uint64(8 * b)
        for known in range(len(prefixes)):
            if prefix == prefixes[known] and size - 8 == sizes[known]:
                row = flat[filled]
                given = sizes[known]
                for b in range(given):
                    row[b] = body[at + 8 + b]
                for b in range(given, width):
                    row[b] = defaults[b]
                offset[filled] = spans[i, 0]
                timestamp[filled] = spans[i, 1]
                filled += 1
                taken[i] = 1
                break
    return filled


@_njit
def _murmur2(data: np.ndarray, at: int, size: int) -> np.uint32:
    """murmur2 with Kafka's seed, over data[at : at + size]."""
    m = np.uint32(0x5BD1E995)
    h = np.uint32(np.uint32(0x9747B28C) ^ np.uint32(size))
    whole = size // 4
    for i in range(whole):
        p = at + 4 * i
        k = np.uint32(
            np.uint32(data[p])
            | (np.uint32(data[p + 1]) << np.uint32(8))
            | (np.uint32(data[p + 2]) << np.uint32(16))
            | (np.uint32(data[p + 3]) << np.uint32(24))
        )
        k = np.uint32(k * m)
        k = np.uint32(k ^ (k >> np.uint32(24)))
        k = np.uint32(k * m)
        h = np.uint32(np.uint32(h * m) ^ k)
    rest, p = size % 4, at + 4 * whole
    if rest == 3:
        h = np.uint32(h ^ (np.uint32(data[p + 2]) << np.uint32(16)))
    if rest >= 2:
        h = np.uint32(h ^ (np.uint32(data[p + 1]) << np.uint32(8)))
    if rest >= 1:
        h = np.uint32(np.uint32(h ^ np.uint32(data[p])) * m)
    h = np.uint32(h ^ (h >> np.uint32(13)))
    h = np.uint32(h * m)
    return np.uint32(h ^ (h >> np.uint32(15)))


@_njit
def _hash_rows(keys: np.ndarray, sizes: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(keys)):
        out[i] = np.int32(_murmur2(keys[i], 0, max(sizes[i], 0)) & np.uint32(0x7FFFFFFF))


@_njit
def _hash_keys(
    body: np.ndarray, spans: np.ndarray, flat: np.ndarray, column_at: int, width: int, form: int,
    out: np.ndarray, wrong: np.ndarray,
) -> int:  # fmt: skip
    """Hash each record's key bytes, and mark the records whose key is not their column's."""
    odd = 0
    for i in range(len(spans)):
        at, size = spans[i, 2], spans[i, 3]
        out[i] = np.int32(_murmur2(body, at, max(size, 0)) & np.uint32(0x7FFFFFFF))
        same = True
        if form == 1:
            same = size == 8
            if same:
                negative = flat[i, column_at + width - 1] >= 128
                for b in range(8):
                    low = 7 - b
                    want = flat[i, column_at + low] if low < width else (255 if negative else 0)
                    same = same and body[at + b] == want
        elif form == 2:
            same = 0 <= size <= width
            if same:
                for b in range(width):
                    have = body[at + b] if b < size else 0
                    same = same and flat[i, column_at + b] == have
        elif form == 3:
            value: Any = np.int64(0)
            for b in range(width - 1, -1, -1):
                byte: Any = np.int64(flat[i, column_at + b])
                if b == width - 1 and byte >= 128:
                    byte -= 256
                value = value * 256 + byte
            same = _is_digits_of(body, at, size, value)
        if not same:
            wrong[i] = 1
            odd += 1
    return odd


@_njit
def _is_digits_of(body: np.ndarray, at: int, size: int, value: int) -> bool:
    """Whether the text is the shortest decimal form of the value."""
    last, first = at + size - 1, at
    if size < 1 or size > 20:
        return False
    if value < 0:
        if body[at] != 45:
            return False
        first += 1
    rest = value
    while True:
        digit = rest % 10
        if value < 0 and digit != 0:
            digit = 10 - digit
        rest = (rest - digit) // 10 if value >= 0 else (rest + digit) // 10
        if last < first or body[last] != 48 + digit:
            return False
        last -= 1
        if rest == 0:
            return last == first - 1


@_njit
def _put_varint(out: np.ndarray, at: int, value: int) -> int:
    raw = np.uint64(value << 1) ^ np.uint64(value >> 63)
    while raw >= np.uint64(0x80):
        out[at] = np.uint8(raw & np.uint64(0x7F)) | np.uint8(0x80)
        raw >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(raw)
    return at + 1


@_njit
def _varint_size(value: int) -> int:
    raw = np.uint64(value << 1) ^ np.uint64(value >> 63)
    size = 1
    while raw >= np.uint64(0x80):
        raw >>= np.uint64(7)
        size += 1
    return size


@_njit
def _write_records(
    flat: np.ndarray, prefix: np.ndarray, keys: np.ndarray, key_sizes: np.ndarray,
    stamps: np.ndarray, out: np.ndarray,
) -> int:  # fmt: skip
    """Write each row as a record without headers; how many bytes that took."""
    at = 0
    width = flat.shape[1]
    value_size = width + 8
    for i in range(len(flat)):
        delta_time = stamps[i] - stamps[0]
        key_size = key_sizes[i]
        size = (
            1 + _varint_size(delta_time) + _varint_size(i) + _varint_size(key_size)
            + max(key_size, 0) + _varint_size(value_size) + value_size + 1
        )  # fmt: skip
        at = _put_varint(out, at, size)
        out[at] = 0
        at = _put_varint(out, at + 1, delta_time)
        at = _put_varint(out, at, i)
        at = _put_varint(out, at, key_size)
        for b in range(key_size):
            out[at + b] = keys[i, b]
        at += max(key_size, 0)
        at = _put_varint(out, at, value_size)
        for b in range(8):
            out[at + b] = prefix[b]
        at += 8
        for b in range(width):
            out[at + b] = flat[i, b]
        at += width
        out[at] = 0
        at += 1
    return at
