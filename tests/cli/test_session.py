"""Commands that share a directory find the broker that has it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ledgerstream.broker.embedded import Broker
from ledgerstream.cli.session import log_address


async def test_a_broker_that_is_just_starting_is_waited_for(tmp_path: Path) -> None:
    """It has the directory, and the address that lies there is another's."""
    async with await Broker.embedded(tmp_path / "log") as broker:
        file = tmp_path / "log" / "address"
        said = file.read_text()
        file.write_text("127.0.0.1:1 1\n")

        async def look() -> str:
            async with log_address(None, tmp_path) as address:
                return address

        looking = asyncio.create_task(look())
        while not list((tmp_path / "log").glob("broker.log")) or len(broker.log_lines) < 2:
            await asyncio.sleep(0.01)  # the second broker has come, and been refused
        assert not looking.done()
        file.write_text(said)
        assert await asyncio.wait_for(looking, 20) == broker.address
