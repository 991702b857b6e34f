"""This node's copy of each partition, and who waits for it to be durable.

A round of the store moves high watermarks; `released` then runs whatever waited for an offset, in
order, and wakes the parked fetches. Followers will be served from here too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from uuid import UUID

import structlog

from ledgerstream.errors import StorageError
from ledgerstream.log import Partition

log = structlog.get_logger("broker")
Waiter = Callable[[bool], None]  # called with whether the offset is durable
_NONE: dict[int, Replica] = {}  # of a topic that is not here


class Replica:
    """One partition, what waits for its high watermark, and the fetches parked at its end."""

    __slots__ = ("parked", "partition", "waiting", "watcher")

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.waiting: deque[tuple[int, Waiter]] = deque()  # by offset, ascending
        self.parked: set[Callable[[], None]] = set()
        self.watcher: Callable[[], None] | None = None  # a coordinator over this partition

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
            self._tell(waiter, not failed)
        if self.watcher is not None:
            self.watcher()
        if self.parked:
            for wake in tuple(self.parked):
                wake()

    def _tell(self, waiter: Waiter, durable: bool) -> None:
        """One that fails is no reason for the others to wait for ever."""
        try:
            waiter(durable)
        except Exception:  # a supervisor, where the disk's news are told
            log.exception("a request failed", partition=str(self.partition.key))


class Replicas:
    """Every partition on this node, by topic name and by topic id."""

    def __init__(self) -> None:
        self._by_partition: dict[Partition, Replica] = {}
        self._by_name: dict[str, dict[int, Replica]] = {}
        self._by_id: dict[UUID, dict[int, Replica]] = {}

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._by_partition.values())

    def __len__(self) -> int:
        return len(self._by_partition)

    def add(self, partition: Partition) -> Replica:
        key = partition.key
        replica = Replica(partition)
        self._by_partition[partition] = replica
        self._by_name.setdefault(key.topic, {})[key.index] = replica
        self._by_id.setdefault(key.topic_id, {})[key.index] = replica
        return replica

    def remove(self, topic: str, topic_id: UUID, index: int) -> None:
        """Forget a deleted partition; whoever waits for it is told that it failed."""
        replica = self._by_id.get(topic_id, _NONE).pop(index, None)
        if replica is None:
            return
        del self._by_partition[replica.partition]
        if not self._by_id[topic_id]:
            del self._by_id[topic_id]
        named = self._by_name[topic]
        if named.get(index) is replica:  # and not of a topic of this name that came after it
            del named[index]
            if not named:
                del self._by_name[topic]
        while replica.waiting:
            replica._tell(replica.waiting.popleft()[1], False)
        for wake in tuple(replica.parked):
            wake()

    def named(self, topic: str, index: int) -> Replica | None:
        return self._by_name.get(topic, _NONE).get(index)

    def of(self, topic_id: UUID, index: int) -> Replica | None:
        return self._by_id.get(topic_id, _NONE).get(index)

    def topic(self, name: str) -> Mapping[int, Replica]:
        """A topic's replicas on this node, by partition."""
        return self._by_name.get(name, _NONE)

    def topic_of(self, topic_id: UUID) -> Mapping[int, Replica]:
        return self._by_id.get(topic_id, _NONE)

    def on_round(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            replica = self._by_partition.get(partition)
            if replica is not None:
                replica.released()
