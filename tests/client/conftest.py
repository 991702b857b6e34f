"""A client on each kind of broker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from ledgerstream.client import Client


@pytest.fixture
async def both(server: str) -> AsyncIterator[Client]:
    """Our client on our broker, then on Apache Kafka."""
    async with await Client.connect(server) as connected:
        yield connected
