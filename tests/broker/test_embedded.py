"""A broker of one's own: its directory is its alone, and it does not outlive who started it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import EARLIEST, LATEST, Client
from ledgerstream.errors import DirectoryInUse, LedgerStreamError


async def write(broker: Broker, count: int) -> None:
    async with await Client.connect(broker.address) as client:
        producer = await client.producer()
        await asyncio.gather(*(producer.send("kept", b"%d" % i, partition=0) for i in range(count)))


async def ends(broker: Broker) -> tuple[int, int]:
    async with await Client.connect(broker.address) as client:
        first = await client.list_offsets("kept", {0: EARLIEST})
        last = await client.list_offsets("kept", {0: LATEST})
    return first[0], last[0]


@pytest.mark.parametrize("durability", ["sync", "page-cache"])
@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_what_was_acknowledged_is_there_again(
    tmp_path: Path, end: str, durability: str
) -> None:
    broker = await Broker.embedded(tmp_path, durability=durability)
    await write(broker, 100)
    await (broker.stop() if end == "stop" else broker.kill())
    async with await Broker.embedded(tmp_path, durability=durability) as again:
        assert await ends(again) == (0, 100)
        await write(again, 10)
        assert await ends(again) == (0, 110)


async def test_a_second_broker_on_the_directory_is_refused_with_a_sentence(tmp_path: Path) -> None:
    async with await Broker.embedded(tmp_path) as broker:
        with pytest.raises(DirectoryInUse, match=str(broker.pid)):
            await Broker.embedded(tmp_path)
        await write(broker, 1)


async def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    async with await Broker.embedded(tmp_path / "one") as broker:
        with pytest.raises(LedgerStreamError, match="did not start"):
            await Broker.embedded(tmp_path / "two", port=broker.port)


CHILD = """
import asyncio, json, sys, time
from ledgerstream.broker.embedded import Broker
async def main():
    broker = await Broker.embedded(sys.argv[1])
    print(json.dumps({"pid": broker.pid}), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_a_broker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    broker = psutil.Process(json.loads(parent.stdout.readline())["pid"])
    parent.kill()
    parent.wait()
    parent.stdout.close()
    broker.wait(30)
