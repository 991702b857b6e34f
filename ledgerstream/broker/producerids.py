"""Producer ids that are unique for ever: the catalogue remembers a block before its first use."""

from __future__ import annotations

import asyncio
from collections import deque

from ledgerstream.broker.host import Host
from ledgerstream.catalog import Catalog, CatalogRecord
from ledgerstream.limits import Limits


class ProducerIds:
    """Hands out ids from a block, and asks for the next block when it is used up."""

    def __init__(self, catalog: Catalog, host: Host[CatalogRecord], limits: Limits) -> None:
        self._catalog, self._host, self._limits = catalog, host, limits
        self._free: deque[int] = deque()
        self._asking: asyncio.Task[None] | None = None

    async def take(self) -> int:
        while not self._free:
            if self._asking is None:
                self._asking = asyncio.ensure_future(self._ask())
            await asyncio.shield(self._asking)
        return self._free.popleft()

    async def _ask(self) -> None:
        try:
            block = await self._host.perform(
                self._catalog.decide_give_producer_ids(self._limits.producer_id_block)
            )
            self._free.extend(block)
        finally:
            self._asking = None
