"""This node's copy of each partition, and who waits for it to be durable.

A round of the store moves high watermarks; `released` then runs whatever waited for an offset, in
order, and wakes the parked fetches. Followers will be served from here too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from uuid import UUID

from ledgerstream.errors import StorageError
from ledgerstream.log import Partition

Waiter = Callable[[bool], None]  # called with whether the offset is durable


class Replica:
    """One partition, what waits for its high watermark, and the fetches parked at its end."""

    __slots__ = ("parked", "partition", "waiting")

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.waiting: deque[tuple[int, Waiter]] = deque()  # by offset, ascending
        self.parked: set[Callable[[], None]] = set()

    def when_durable(self, offset: int, waiter: Waiter) -> None:
        """Call `waiter(True)` once all below `offset` is durable, `waiter(False)` if it failed."""
        if self.partition.failure is not None:
            waiter(False)
        elif offset <= self.partition.high_watermark:
            waiter(True)
        elif not self.waiting or self.waiting[-1][0] <= offset:
            self.waiting.append((offset, waiter))
        else:  # a repeat of an older batch, whose original is not durable yet
            place = next(i for i, (other, _) in enumerate(self.waiting) if other > offset)
            self.waiting.insert(place, (offset, waiter))

    async def wait_durable(self, offset: int) -> None:
        """Raises StorageError if the partition failed first."""
        done = asyncio.get_running_loop().create_future()

        def tell(durable: bool) -> None:
            if not done.done():
                done.set_result(durable)

        self.when_durable(offset, tell)
        if not await done:
            raise StorageError(f"{self.partition.key} stopped: {self.partition.failure}")

    def released(self) -> None:
        """A round is done: tell those whose offset it reached, or all if the partition failed."""
        failed = self.partition.failure is not None
        while self.waiting and (failed or self.waiting[0][0] <= self.partition.high_watermark):
            _, waiter = self.waiting.popleft()
            waiter(not failed)
        if self.parked:
            for wake in tuple(self.parked):
                wake()


class Replicas:
    """Every partition on this node, by topic name and by topic id."""

    def __init__(self) -> None:
        self._by_name: dict[tuple[str, int], Replica] = {}
        self._by_id: dict[tuple[UUID, int], Replica] = {}

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, partition: Partition) -> Replica:
        key = partition.key
        replica = Replica(partition)
        self._by_name[key.topic, key.index] = self._by_id[key.topic_id, key.index] = replica
        return replica

    def remove(self, topic: str, topic_id: UUID, index: int) -> None:
        """Forget a deleted partition; whoever waits for it is told that it failed."""
        self._by_id.pop((topic_id, index), None)
        replica = self._by_name.pop((topic, index), None)
        if replica is None:
            return
        while replica.waiting:
            replica.waiting.popleft()[1](False)
        for wake in tuple(replica.parked):
            wake()

    def named(self, topic: str, index: int) -> Replica | None:
        return self._by_name.get((topic, index))

    def of(self, topic_id: UUID, index: int) -> Replica | None:
        return self._by_id.get((topic_id, index))

    def on_round(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            replica = self._by_id.get((partition.key.topic_id, partition.key.index))
            if replica is not None:
                replica.released()
