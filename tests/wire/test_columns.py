"""Batches as columns: the kernels against the record-by-record reader, and against lies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledgerstream import Event, Text, Timestamp
from ledgerstream.events import Int16
from ledgerstream.money import EUR
from ledgerstream.wire import batches
from ledgerstream.wire.batches import NewRecord
from ledgerstream.wire.columns import (
    Decoded,
    RowCodec,
    RowHeader,
    header_values,
    murmur2,
    partition_order,
)


class Old(Event):
    number: int
    at: Timestamp
    name: Text[6]
    amount: EUR


class New(Old):
    grade: Int16 = -3


def rows(count: int, event: type[Event] = New, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    made = np.zeros(count, event.dtype())
    made["number"] = random.integers(-(2**63), 2**63 - 1, count)
    made["at"] = 1_700_000_000_000_000_000 + random.integers(0, 10**12, count)
    made["name"] = [bytes(random.integers(65, 91, i % 7, np.uint8)) for i in range(count)]
    made["amount"] = random.integers(-(10**9), 10**9, count)
    return made


def batch(codec: RowCodec, some: np.ndarray, base: int = 0, compression: int = 0) -> bytes:
    body = codec.encode(some, 0).tobytes()
    stamps = codec.timestamps(some, 0)
    return batches.seal_batch(
        batches.compress(compression, body),
        count=len(some),
        base_offset=base,
        base_timestamp=int(stamps[0]),
        max_timestamp=int(stamps.max()),
        attributes=compression,
    )


KEYS = [(None, None), ("number", "int64"), ("number", "text"), ("name", "text")]


@pytest.mark.parametrize("encoding", ["fixed", "json"])
def test_rows_are_written_with_times_and_a_header_of_ones_own(encoding: str) -> None:
    codec = RowCodec(New, "number", encoding)  # type: ignore[arg-type]
    some, stamps = rows(5), np.array([5, 3, 9, 2, 7])
    header = RowHeader("from", np.arange(15, dtype=np.uint8).reshape(5, 3))
    body = codec.encode(some, 0, stamps, header).tobytes()
    data = batches.seal_batch(body, count=5, base_timestamp=5, max_timestamp=9)
    found = list(batches.records(data, 0))
    assert [record.timestamp for record in found] == stamps.tolist()
    assert [record.headers for record in found] == [
        (("from", bytes(range(at, at + 3))),) for at in range(0, 15, 3)
    ]
    assert (codec.decode(data).rows == some).all()
    offsets, values = header_values(data, "from", 3, 2)
    assert (offsets.tolist(), values.tolist()) == ([2, 3, 4], header.values[2:].tolist())
    for other in (header_values(data, "frim", 3), header_values(data, "from", 4)):
        assert len(other[0]) == len(other[1]) == 0


def test_one_header_is_found_among_others() -> None:
    records = [
        NewRecord(None, None, 5, (("a", b""), ("from", b"xyz"), ("b", None))),
        NewRecord(b"key", b"value", 5),
        NewRecord(b"", b"", 5, (("from", None),)),
        NewRecord(b"", b"", 5, (("from", b"abc"),)),
    ]
    data = batches.encode_batch(records, codec=1)
    offsets, values = header_values(data, "from", 3)
    assert (offsets.tolist(), values.tobytes()) == ([0, 3], b"xyzabc")
    for size in range(len(data)):  # torn ones give nothing, and harm nothing
        header_values(data[:size], "from", 3)


@pytest.mark.parametrize("compression", range(5))
@pytest.mark.parametrize(("key", "form"), KEYS)
@pytest.mark.parametrize("encoding", ["fixed", "json"])
def test_rows_come_back(key: str, form: str, encoding: str, compression: int) -> None:
    codec = RowCodec(New, key, encoding, form)  # type: ignore[arg-type]
    some = rows(300)
    data = batch(codec, some[:200], 10, compression) + batch(codec, some[200:], 210, compression)
    found = codec.decode(data, 10)
    assert found.bad == []
    assert (found.rows == some).all()
    assert (found.offset == np.arange(10, 310)).all()
    assert (found.timestamp == some["at"] // 1_000_000).all()
    assert found.next_offset == 310
    records = [record for at, _ in batches.headers(data) for record in batches.records(data, at)]
    assert [murmur2(record.key or b"") for record in records] == found.partition_hash.tolist()


@given(st.integers(0, 60), st.integers(0, 60), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_a_range_is_cut_out_whatever_the_batches(start: int, stop: int, sizes: list[int]) -> None:
    codec = RowCodec(New, "number")
    some = rows(sum(sizes))
    data, at = b"", 0
    for size in sizes:
        data += batch(codec, some[at : at + size], at)
        at += size
    found = codec.decode(data, start, stop)
    assert (found.rows == some[start:stop]).all()
    assert found.next_offset == max(start, min(stop, len(some)))


def test_a_row_of_an_older_type_gets_the_defaults() -> None:
    old = rows(50, Old)
    found = RowCodec(New, "number").decode(batch(RowCodec(Old, "number"), old))
    assert found.bad == []
    for name in Old.dtype().names or ():
        assert (found.rows[name] == old[name]).all()
    assert (found.rows["grade"] == -3).all()


def mixed(codec: RowCodec, some: np.ndarray, wrong: dict[int, NewRecord]) -> bytes:
    """The rows one by one, some of them replaced."""
    good = list(batches.records(batch(codec, some)))
    items = [
        wrong.get(i, NewRecord(record.key, record.value, record.timestamp))
        for i, record in enumerate(good)
    ]
    return batches.encode_batch(items)


@pytest.mark.parametrize("encoding", ["fixed", "json"])
def test_what_is_no_event_is_a_bad_record_and_the_rest_goes_on(encoding: str) -> None:
    codec = RowCodec(New, "number", encoding)  # type: ignore[arg-type]
    some = rows(20)
    key = codec.keys(some)[0][4].tobytes()
    value = codec.decode(batch(codec, some))
    assert len(value) == 20
    wrong = {
        0: NewRecord(None, None, 1_700_000_000_000),
        3: NewRecord(key, b"not an event", 1_700_000_000_000),
        9: NewRecord(b"x" * 8, list(batches.records(batch(codec, some)))[9].value, 5),
        19: NewRecord(key, b"", 1_700_000_000_000),
    }
    found: Decoded = codec.decode(mixed(codec, some, wrong))
    assert [bad.offset for bad in found.bad] == [0, 3, 9, 19]
    assert found.bad[1].value == b"not an event"
    assert "key" in found.bad[2].reason
    kept = [i for i in range(20) if i not in wrong]
    assert found.offset.tolist() == kept
    assert (found.rows == some[kept]).all()


def test_a_malformed_batch_is_one_bad_record() -> None:
    codec = RowCodec(New, "number")
    some = rows(10)
    good = batch(codec, some, 0)
    torn = bytearray(batch(codec, some, 10))
    torn[batches.HEADER_BYTES] = 0xFE  # a record longer than the batch
    found = codec.decode(good + bytes(torn) + batch(codec, some, 20))
    assert [bad.offset for bad in found.bad] == [10]
    assert found.offset.tolist() == [*range(10), *range(20, 30)]
    assert found.next_offset == 30


@settings(max_examples=300)
@given(st.data())
def test_any_damage_is_bad_records_never_a_crash(data: st.DataObject) -> None:
    codec = RowCodec(New, "number", data.draw(st.sampled_from(["fixed", "json"])))
    damaged = bytearray(batch(codec, rows(8)))
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(batches.HEADER_BYTES, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    found = codec.decode(bytes(damaged))
    assert len(found) + len(found.bad) <= 8
    assert len(found) == len(found.offset) == len(found.timestamp) == len(found.partition_hash)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b'{"number":1}', "required field"),
        (b'{"number":"1","at":0,"name":"a","amount":"1.00"}', "Expected `int`"),
        (b'{"number":99999999999999999999,"at":0,"name":"a","amount":"1"}', "number"),
        (b'{"number":1,"at":"noon","name":"a","amount":"1.00"}', "not a time"),
        (b'{"number":1,"at":0,"name":"too long for it","amount":"1.00"}', "longer than 6"),
        (b'{"number":1,"at":0,"name":"a\\u0000","amount":"1.00"}', "NUL"),
        (b'{"number":1,"at":0,"name":"a","amount":"1.001"}', "more than 2 decimals"),
        (b'{"number":1,"at":0,"name":"a","amount":1e300}', "does not fit"),
        (b"[1]", "Expected `object`"),
        (b'{"number":1,"at":0,"name":"a","amount":"1"} {}', "trailing"),
    ],
)
def test_json_that_is_no_event_says_why(value: bytes, reason: str) -> None:
    codec = RowCodec(Old, None, "json")
    (bad,) = codec.decode(batches.encode_batch([NewRecord(None, value, 0)])).bad
    assert reason in bad.reason


def test_json_money_is_read_from_its_digits() -> None:
    codec = RowCodec(Old, None, "json")
    values = [
        b'{"number":1,"at":0,"name":"a","amount":0.1}',
        b'{"number":1,"at":0,"name":"a","amount":"0.10","more":[1]}',
        b'{"number":1,"at":0,"name":"a","amount":90071992547409.93}',
    ]
    items = [NewRecord(None, value, 0) for value in values]
    found = codec.decode(batches.encode_batch(items))
    assert found.rows["amount"].tolist() == [10, 10, 9_007_199_254_740_993]


def test_murmur2_is_javas() -> None:
    # Apache Kafka's own UtilsTest.testMurmur2, made positive
    known = {
        b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536,
        b"a-little-bit-longer-string": -1486304829,
        b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971, b"abc": 479470107,
    }  # fmt: skip
    for key, expected in known.items():
        assert murmur2(key) == expected & 0x7FFFFFFF


def test_rows_keep_their_order_within_a_partition() -> None:
    hashes = np.array([5, 2, 5, 8, 3, 2], np.int32)
    assert [(p, order.tolist()) for p, order in partition_order(hashes, 3)] == [
        (0, [4]),
        (2, [0, 1, 2, 3, 5]),
    ]
