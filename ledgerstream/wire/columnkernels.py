"""The kernels under `columns.py`: records out of a batch's body and into one. numba, nopython.

Bytes are moved by memcpy and read as words where LLVM would otherwise walk them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

NO_KEY, INT64_KEY, TEXT_KEY, DIGITS_KEY = range(4)
NOT_AN_EVENT, WRONG_KEY = 0, 1  # why a record is odd


def _njit(function: F) -> F:
    return cast(F, numba.njit(nogil=True, cache=True, error_model="numpy")(function))


def _intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = intrinsic(function)
    return made


@_intrinsic
def _copy(typing: Any, target: Any, target_at: Any, source: Any, source_at: Any, size: Any) -> Any:
    """memcpy between two uint8[:] arrays; the caller has checked the bounds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to = _pointer(context, builder, signature, arguments, 0)
        out_of = _pointer(context, builder, signature, arguments, 2)
        memcpy: Any = cgutils.raw_memcpy
        memcpy(builder, to, out_of, arguments[4], 1)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.intp), generate


@_intrinsic
def _word(typing: Any, source: Any, at: Any) -> Any:
    """The eight bytes of a uint8[:] array at a position, as a little-endian uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _pointer(context, builder, signature, arguments, 0)
        word = builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return types.uint64(source, types.intp), generate


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, which: int) -> Any:
    """The address of byte `arguments[which + 1]` of array `arguments[which]`."""
    array = context.make_array(signature.args[which])(context, builder, arguments[which])
    return builder.gep(array.data, [arguments[which + 1]])


@_njit
def _swapped(word: np.uint64) -> np.uint64:
    """The bytes of a word in the other order."""
    low = np.uint64(0x00FF00FF00FF00FF)
    word = ((word & low) << np.uint64(8)) | ((word >> np.uint64(8)) & low)
    low = np.uint64(0x0000FFFF0000FFFF)
    word = ((word & low) << np.uint64(16)) | ((word >> np.uint64(16)) & low)
    return (word << np.uint64(32)) | (word >> np.uint64(32))


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
def scan(
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
def find_headers(
    body: np.ndarray, count: int, name: np.ndarray, size: int, values: np.ndarray,
    found: np.ndarray,
) -> bool:  # fmt: skip
    """Of each record the header of this name whose value has `size` bytes: `values` uint8[count,
    size], `found` bool[count] where there is one. False if the body is malformed."""
    at = 0
    for i in range(count):
        length, at = _varint(body, at)
        if at < 0 or length < 0 or at + length > len(body):
            return False
        end = at + length
        _, at = _varint(body, at + 1)
        if at >= 0:
            _, at = _varint(body, at)
        for _ in range(2):  # key and value
            if at >= 0:
                width, at = _varint(body, at)
                at = -1 if width > end - at else at + max(width, 0)
        headers = np.int64(0)
        if at >= 0:
            headers, at = _varint(body, at)
        while at >= 0 and headers > 0:
            headers -= 1
            name_size, at = _varint(body, at)
            if at < 0 or name_size < 0 or name_size > end - at:
                return False
            same = name_size == len(name)
            for k in range(len(name) if same else 0):
                same = same and body[at + k] == name[k]
            width, at = _varint(body, at + name_size)
            if at < 0 or width > end - at:
                return False
            if same and width == size:
                _copy(values, i * size, body, at, size)
                found[i] = True
            at += max(width, 0)
        if at < 0:
            return False
        at = end
    return True


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
def positive_murmur2(data: np.ndarray, at: int, size: int) -> Any:
    """int32: what `% partitions` makes the partition of."""
    return np.int32(_murmur2(data, at, size) & np.uint32(0x7FFFFFFF))


@_njit
def hash_rows(keys: np.ndarray, sizes: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(keys)):
        out[i] = positive_murmur2(keys[i], 0, max(sizes[i], 0))


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
def write_records(
    flat: np.ndarray, width: int, prefix: np.ndarray, keys: np.ndarray, key_width: int,
    key_sizes: np.ndarray, stamps: np.ndarray, headers: np.ndarray, headers_width: int,
    out: np.ndarray,
) -> int:  # fmt: skip
    """Write each row as a record; how many bytes that took.

    `flat` uint8[n * width], `keys` uint8[n * key_width]; `headers` uint8[n * headers_width]: each
    record's headers as they stand on the wire, their count in front.
    """
    at = 0
    value_size = width + 8
    for i in range(len(stamps)):
        delta_time = stamps[i] - stamps[0]
        key_size = key_sizes[i]
        size = (
            1 + _varint_size(delta_time) + _varint_size(i) + _varint_size(key_size)
            + max(key_size, 0) + _varint_size(value_size) + value_size + headers_width
        )  # fmt: skip
        at = _put_varint(out, at, size)
        out[at] = 0
        at = _put_varint(out, at + 1, delta_time)
        at = _put_varint(out, at, i)
        at = _put_varint(out, at, key_size)
        if key_size > 0:
            _copy(out, at, keys, i * key_width, key_size)
            at += key_size
        at = _put_varint(out, at, value_size)
        _copy(out, at, prefix, 0, 8)
        _copy(out, at + 8, flat, i * width, width)
        at += 8 + width
        _copy(out, at, headers, i * headers_width, headers_width)
        at += headers_width
    return at


@_njit
def gather_fixed(
    body: np.ndarray, spans: np.ndarray, prefixes: np.ndarray, sizes: np.ndarray,
    defaults: np.ndarray, key_at: int, key_width: int, key_form: int, flat: np.ndarray,
    offset: np.ndarray, timestamp: np.ndarray, hashes: np.ndarray, filled: int,
    odd: np.ndarray,
) -> Any:  # fmt: skip
    """Copy each row that carries a known prefix and its own key; (rows now, odd records).

    `flat` uint8[rows_max * width]; `odd` int64[n, 2]: which span, and why it is odd.
    """
    width = len(defaults)
    odds = 0
    for i in range(len(spans)):
        at, size = spans[i, 4], spans[i, 5]
        given = np.int64(-1)
        if size >= 8:
            prefix = _word(body, at)
            for known in range(len(prefixes)):
                if prefix == prefixes[known] and size - 8 == sizes[known]:
                    given = sizes[known]
                    break
        if given < 0:
            odd[odds, 0], odd[odds, 1] = i, NOT_AN_EVENT
            odds += 1
            continue
        to = filled * width
        _copy(flat, to, body, at + 8, given)
        if given < width:
            _copy(flat, to + given, defaults, given, width - given)
        key, key_size = spans[i, 2], spans[i, 3]
        if key_form != NO_KEY and not key_matches(
            body, key, key_size, flat, to + key_at, key_width, key_form
        ):
            odd[odds, 0], odd[odds, 1] = i, WRONG_KEY
            odds += 1
            continue
        offset[filled] = spans[i, 0]
        timestamp[filled] = spans[i, 1]
        hashes[filled] = positive_murmur2(body, key, max(key_size, 0))
        filled += 1
    return filled, odds


@_njit
def check_keys(
    body: np.ndarray, spans: np.ndarray, flat: np.ndarray, width: int, key_at: int,
    key_width: int, key_form: int, hashes: np.ndarray, wrong: np.ndarray,
) -> int:  # fmt: skip
    """Hash each record's key; mark those that are not their column's. How many are."""
    count = 0
    for i in range(len(spans)):
        key, key_size = spans[i, 2], spans[i, 3]
        hashes[i] = positive_murmur2(body, key, max(key_size, 0))
        if key_form != NO_KEY and not key_matches(
            body, key, key_size, flat, i * width + key_at, key_width, key_form
        ):
            wrong[i] = 1
            count += 1
    return count


@_njit
def key_matches(
    body: np.ndarray, key: int, key_size: int, flat: np.ndarray, at: int, width: int, form: int
) -> bool:
    """Whether the key's bytes are what the column at `flat[at : at + width]` makes."""
    if form == INT64_KEY and width == 8:
        return key_size == 8 and _swapped(_word(body, key)) == _word(flat, at)
    if form == TEXT_KEY:
        if key_size < 0 or key_size > width:
            return False
        for b in range(width):
            if flat[at + b] != (body[key + b] if b < key_size else 0):
                return False
        return True
    value: Any = np.int64(0)
    for b in range(width - 1, -1, -1):
        byte: Any = np.int64(flat[at + b])
        if b == width - 1 and byte >= 128:
            byte -= 256
        value = value * 256 + byte
    if form == DIGITS_KEY:
        return _is_digits_of(body, key, key_size, value)
    return key_size == 8 and _swapped(_word(body, key)) == np.uint64(value)
