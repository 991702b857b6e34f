"""The load that locust makes arrives, each payment once, and is timed from when it was due."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import LATEST, Client
from processors.payments import Payment

ROOT = Path(__file__).parents[2]
HANG_S = 1.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("locust") is None,
        reason="locust is absent: pip install 'ledgerstream[load]'",
    ),
]


async def test_locust_sends_payments_at_its_rate(tmp_path: Path) -> None:
    async with await Broker.embedded(tmp_path / "log") as broker:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "locust", "-f", str(ROOT / "load" / "locustfile.py"),
            "--host", broker.address, "--headless", "-u", "2", "-r", "2", "-t", "4s", "--json",
            cwd=ROOT, env={**os.environ, "LEDGERSTREAM_RATE": "50"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        ended = asyncio.create_task(process.communicate())
        async with await Client.connect(broker.address) as client:
            async with asyncio.timeout(60):
                while not await written(client):
                    assert not ended.done()
                    await asyncio.sleep(0.05)
        time.sleep(HANG_S)  # noqa: ASYNC251 - the broker, which runs in this loop, hangs
        out, said = await asyncio.wait_for(ended, 60)
        assert process.returncode == 0, said.decode()
        (row,) = json.loads(out)
        assert (row["method"], row["name"], row["num_failures"]) == ("produce", "payments", 0)
        async with await Client.connect(broker.address) as client:
            end = await written(client)
            (found,) = (await client.read("payments", Payment, key="customer")).values()
    assert end == row["num_requests"] == len(found)
    assert 50 < end < 2 * 50 * 5
    # 2 users × 50/s × 0.7 s were due more than 0.3 s before the broker went on; a sender that had
    # waited for each answer would show two of them.
    late = sum(times for ms, times in row["response_times"].items() if float(ms) > 300)
    assert late > 10  # 70 where the machine has time for all of them


async def written(client: Client) -> int:
    """How many payments the log has; 0 where there is no topic yet."""
    if "payments" not in [topic.name for topic in await client.topics()]:
        return 0
    return (await client.list_offsets("payments", {0: LATEST}))[0]
