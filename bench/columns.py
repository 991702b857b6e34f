"""The columnar client's figures, against confluent-kafka on the same rows and the same broker."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

from bench import librdkafka
from bench.rows import Row, in_turn, row
from bench.sides import ours

ROWS_COUNT = 2_000_000


def rows(count: int = ROWS_COUNT) -> np.ndarray:
    from bench.events import Trade

    made = np.zeros(count, Trade.dtype())
    made["trade_id"] = np.arange(count)
    made["at"] = 1_700_000_000_000_000_000 + np.arange(count) * 1_000_000
    made["instrument"] = np.arange(count) % 1000
    made["price"] = 10_000 + np.arange(count) % 777
    made["quantity"] = 1 + np.arange(count) % 13
    return made


@row("columnar_read")
def columnar_read() -> Iterator[Row]:
    with ours() as us:
        topic = librdkafka.new_topic(us.address)
        asyncio.run(_fill(us.address, topic))
        mine, theirs = in_turn(
            lambda: _ours("read", us.address, topic),
            lambda: float(
                librdkafka.run("consume", address=us.address, topic=topic, count=ROWS_COUNT)
            ),
        )
    yield Row("columnar_read", "48-byte rows over the socket: our reader ÷ confluent-kafka's",
              "rows/s", mine, theirs, "confluent-kafka", "higher", 8, 12)  # fmt: skip


@row("columnar_produce")
def columnar_produce() -> Iterator[Row]:
    with ours() as us:
        mine, theirs = in_turn(
            lambda: _ours("write", us.address, librdkafka.new_topic(us.address)),
            lambda: float(
                librdkafka.run(
                    "produce", address=us.address, topic=librdkafka.new_topic(us.address),
                    count=ROWS_COUNT, size=56,
                )
            ),
        )  # fmt: skip
    yield Row("columnar_produce", "the same rows written, durable: ours ÷ confluent-kafka's",
              "rows/s", mine, theirs, "confluent-kafka", "higher", 2.5, 4)  # fmt: skip


def read_by_ours(address: str, topic: str) -> float:
    """Rows/s of a topic of `Trade`, keyed by its instrument, in a process of its own."""
    return _ours("read", address, topic)


def _ours(verb: str, address: str, topic: str) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "bench.columns", verb, address, topic],
        stdout=subprocess.PIPE, check=True, timeout=300,
    )  # fmt: skip
    return float(json.loads(done.stdout))


async def _fill(address: str, topic: str) -> None:
    from bench.events import Trade
    from ledgerstream.client import Client

    async with await Client.connect(address) as client:
        await client.write(topic, rows(), event=Trade, key="instrument")


async def _measure(verb: str, address: str, topic: str) -> float:
    from bench.events import Trade
    from ledgerstream.client import LATEST, Client

    async with await Client.connect(address) as client:
        if verb == "write":
            some = rows()
            await client.write(topic, some[:10_000], event=Trade, key="instrument")  # compiles
            started = time.perf_counter()
            await client.write(topic, some, event=Trade, key="instrument")
            return len(some) / (time.perf_counter() - started)
        await client.read(topic, Trade, key="instrument", stops={0: 10_000})  # compiles
        end = (await client.list_offsets(topic, {0: LATEST}))[0]
        seen = volume = 0
        started = time.perf_counter()
        async for _, part in client.stream(topic, Trade, {0: 0}, key="instrument", stops={0: end}):
            seen += len(part)
            volume += int(part.rows["quantity"].sum())
        took = time.perf_counter() - started
        assert seen > 0 < volume
        return seen / took


if __name__ == "__main__":
    import uvloop

    print(json.dumps(uvloop.run(_measure(*sys.argv[1:]))))
