"""Rows in and rows out, on our broker and on Apache Kafka alike."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
from confluent_kafka import Producer as TheirProducer
from kafka.partitioner import murmur2 as their_murmur2

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import LATEST, Client
from ledgerstream.client.rows import as_rows
from ledgerstream.errors import ConfigError
from ledgerstream.limits import Limits
from tests.client.events import Channel, Trade, trades
from tests.peers import kafka

Encoding = Literal["fixed", "json"]


@pytest.mark.parametrize("encoding", ["fixed", "json"])
async def test_rows_come_back_each_once_and_in_order(
    both: Client, topic: str, encoding: Encoding
) -> None:
    await both.create_topic(topic, partitions=3)
    rows = trades(30_000)  # as JSON over a megabyte a partition: several batches
    assert await both.write(topic, rows, event=Trade, key="account", encoding=encoding) == 30_000
    found = await both.read(topic, Trade, key="account", encoding=encoding)
    assert found.keys() == {0, 1, 2}
    for partition, part in found.items():
        assert part.bad == []
        assert (part.partition_hash % 3 == partition).all()
        assert (part.offset == np.arange(len(part))).all()
        key = part.rows["account"][0]
        wanted = their_murmur2(int(key).to_bytes(8, "big")) & 0x7FFFFFFF
        assert wanted % 3 == partition
        mine = np.isin(rows["account"], part.rows["account"])
        assert (part.rows == rows[mine]).all()
    assert sum(map(len, found.values())) == 30_000


async def test_a_range_is_read_and_a_stop_beyond_the_end_is_the_end(
    both: Client, topic: str
) -> None:
    await both.create_topic(topic)
    await both.write(topic, trades(1_000), event=Trade)
    part = (await both.read(topic, Trade, starts={0: 100}, stops={0: 150}))[0]
    assert part.rows["number"].tolist() == list(range(100, 150))
    assert part.next_offset == 150
    part = (await both.read(topic, Trade, starts={0: 990}, stops={0: 10_000}))[0]
    assert len(part) == 10
    assert len((await both.read(topic, Trade, starts={0: 1_000}))[0]) == 0


async def test_rows_without_a_key_go_to_all_partitions_in_turn(server: str, topic: str) -> None:
    small = Limits(producer_batch_bytes=8_192)
    async with await Client.connect(server, limits=small) as client:
        await client.create_topic(topic, partitions=3)
        await client.write(topic, trades(2_000), event=Trade)
        found = await client.read(topic, Trade)
        assert all(len(part) > 200 for part in found.values())
        numbers = np.concatenate([part.rows["number"] for part in found.values()])
        assert sorted(numbers.tolist()) == list(range(2_000))


async def test_a_stream_goes_on_with_what_is_written_meanwhile(both: Client, topic: str) -> None:
    await both.create_topic(topic)
    await both.write(topic, trades(10), event=Trade)
    seen: list[int] = []
    async for partition, part in both.stream(topic, Trade, {0: 2}, stops={0: 500}):
        assert partition == 0
        seen += part.rows["number"].tolist()
        if len(seen) == 8:
            await both.write(topic, trades(1_000, first=10), event=Trade)
    assert seen == list(range(2, 500))


def frame(**changes: Any) -> pd.DataFrame:
    columns = {
        "number": [1, 2], "at": ["2018-04-01T00:00:31Z", "2018-04-01T02:00:31.5+02:00"],
        "account": [7, 8], "amount": ["12.34", "-0.01"], "channel": ["shop", "web"],
    }  # fmt: skip
    return pd.DataFrame({name: v for name, v in {**columns, **changes}.items() if v is not None})


SPRING = 1_522_540_831_000_000_000


async def test_data_frames_are_written(both: Client, topic: str) -> None:
    await both.create_topic(topic)
    times = pd.to_datetime(["2018-04-01T00:00:31.0Z", "2018-04-01T00:00:31.5Z"])
    for at in (frame()["at"], times, times.tz_localize(None), times.as_unit("ms")):
        await both.write(topic, frame(at=at), event=Trade, key="account")
    rows = (await both.read(topic, Trade, key="account"))[0].rows
    one = [(1, SPRING, 7, 1_234, 1, b""), (2, SPRING + 500_000_000, 8, -1, 0, b"")]
    assert rows.tolist() == one * 4
    assert Trade.of(rows[0]).channel is Channel.SHOP


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"account": None}, "The rows have no column 'account', which Trade needs."),
        ({"amount": [1.5, 2.0]}, "given as floats, whose digits are already lost"),
        ({"amount": ["1.234", "1"]}, r"'amount' \(money\), row 0: .*more than 2 decimals"),
        ({"amount": ["1", None]}, r"'amount' \(money\), row 1"),
        ({"number": [1.0, 2.0]}, r"'number' \(int\) needs integers, not float64"),
        ({"number": np.array([1, 2**63], "u8")}, "do not fit int64"),
        ({"at": ["yesterday", "2018-04-01T00:00Z"]}, r"'at' \(timestamp\), row 0: .*not a time"),
        ({"at": pd.to_datetime(["2018-04-01", None])}, "missing times"),
        ({"account": pd.to_datetime(["2018-04-01"] * 2)}, "does not hold times"),
        ({"channel": ["shop", "post"]}, r"row 1: 'post' is none of web, shop"),
        ({"channel": [0, 2]}, "do not fit"),
        ({"note": ["ok", "x" * 17]}, r"'note' \(text\), row 1: .*longer than 16 bytes"),
        ({"note": ["ok", None]}, r"'note' \(text\), row 1: .* is not text"),
    ],
)
def test_wrong_columns_are_refused_with_the_sentence(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        as_rows(frame(**changes), Trade)


def test_structured_arrays_of_other_types_are_fitted() -> None:
    rows = trades(3)
    assert as_rows(rows, Trade) is rows
    narrow = rows[["number", "at", "account", "amount"]].astype(
        [("number", "i4"), ("at", "i8"), ("account", "u2"), ("amount", "i8")]
    )
    assert as_rows(narrow, Trade)["account"].tolist() == rows["account"].tolist()
    assert as_rows(narrow, Trade)["channel"].tolist() == [0, 0, 0]


async def test_aborted_transactions_are_not_seen_by_who_reads_committed(
    apache_kafka: kafka.ApacheKafka, topic: str
) -> None:
    """Written by librdkafka: committed, aborted, plain, open, of two producers."""

    def fill() -> TheirProducer:
        plain = TheirProducer({"bootstrap.servers": apache_kafka.address})
        one, two = (
            TheirProducer({
                "bootstrap.servers": apache_kafka.address, "transactional.id": f"{topic}-{name}",
            })
            for name in ("one", "two")
        )  # fmt: skip
        for each in (one, two):
            each.init_transactions(60)

        def put(producer: TheirProducer, *numbers: int) -> None:
            for number in numbers:
                producer.produce(topic, Trade.of(rows[number]).encode(), partition=0)
            assert producer.flush(60) == 0

        rows = trades(20)
        one.begin_transaction()
        put(one, 0, 1)
        two.begin_transaction()
        put(two, 2, 3)
        put(plain, 4)
        put(one, 5)
        one.abort_transaction(60)
        put(two, 6)
        two.commit_transaction(60)
        one.begin_transaction()
        put(one, 7)
        one.commit_transaction(60)
        two.begin_transaction()
        put(two, 8)
        two.abort_transaction(60)
        put(plain, 9)
        one.begin_transaction()
        put(one, 10)  # stays open
        put(plain, 11)
        return one

    async with await Client.connect(apache_kafka.address) as client:
        await client.create_topic(topic)
        still_open = await asyncio.to_thread(fill)
        part = (await client.read(topic, Trade))[0]
        assert part.rows["number"].tolist() == [2, 3, 4, 6, 7, 9]
        assert part.bad == []
        everything = (await client.read(topic, Trade, committed=False))[0]
        assert everything.rows["number"].tolist() == list(range(12))
        # begun in the middle of the aborted transaction, it is cut out all the same
        assert (await client.read(topic, Trade, starts={0: 1}))[0].rows["number"][0] == 2
        last = (await client.list_offsets(topic, {0: LATEST}))[0]
        assert last == part.next_offset < everything.next_offset

        reader = client.reader(topic, {0: last})
        assert await reader.next(50) is None  # the open transaction holds all behind it
        await asyncio.to_thread(still_open.abort_transaction, 60)
        seen: list[int] = []
        async for _, more in client.stream(topic, Trade, {0: last}, stops={0: last + 2}):
            seen += more.rows["number"].tolist()
        assert seen == [11]


async def test_two_at_once_write_through_one_client(our_broker: Broker, topic: str) -> None:
    async with await Client.connect(our_broker.address) as client:
        await asyncio.gather(
            client.write(topic, trades(5_000), event=Trade, key="account"),
            client.write(topic, trades(5_000, first=5_000), event=Trade, key="account"),
        )
        rows = (await client.read(topic, Trade, key="account"))[0].rows
        assert sorted(rows["number"].tolist()) == list(range(10_000))
