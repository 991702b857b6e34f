"""A plain consumer: reads what its group assigns to it, from what is committed on.

A chunk that was handed out is done with when the next is asked for, or its offsets are committed.
Before partitions go to another member their last chunk is waited for and, unless one says
otherwise, what is done with is committed: then no record is read twice or never.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from types import TracebackType
from typing import Self, overload

from kio.schema.errors import ErrorCode

from ledgerstream.client.cluster import Cluster
from ledgerstream.client.groupoffsets import TopicPartition
from ledgerstream.client.membership import Group, Listener, NotAssigned, Places
from ledgerstream.client.offsets import EARLIEST, list_offsets
from ledgerstream.client.reader import Chunk, Reader
from ledgerstream.errors import KafkaError, LedgerStreamError

NOWHERE = -1  # the position of a partition that is not known yet


class GroupReader(Listener):
    """Use `async with client.consume("g", ["topic"]) as reader: …`; one caller at a time."""

    def __init__(
        self,
        cluster: Cluster,
        group: str,
        topics: Iterable[str] | re.Pattern[str],
        *,
        start: int = EARLIEST,
        committed: bool = True,
        commit_revoked: bool = True,
        instance_id: str | None = None,
        session_ms: int | None = None,
        rebalance_ms: int | None = None,
    ) -> None:
        self.cluster, self.committed = cluster, committed
        self._start, self._commit_revoked = start, commit_revoked
        self.group = Group(
            cluster, group, topics, self,
            instance_id=instance_id, session_ms=session_ms, rebalance_ms=rebalance_ms,
        )  # fmt: skip
        self.positions: dict[TopicPartition, int] = {}  # up to where each is handed out
        self.done: dict[TopicPartition, int] = {}  # up to where it is done with, not committed
        self._in_hand: tuple[TopicPartition, int] | None = None
        self._readers: dict[str, Reader] = {}
        self._pending: dict[str, asyncio.Task[Chunk | None]] = {}
        self._recreated: set[str] = set()  # topics that are others now, under the same name
        self._bell = self.group.bell

    @property
    def closed(self) -> bool:
        return self.group.closed

    @overload
    async def next(self) -> tuple[str, Chunk]: ...
    @overload
    async def next(self, wait_ms: int) -> tuple[str, Chunk] | None: ...
    async def next(self, wait_ms: int | None = None) -> tuple[str, Chunk] | None:
        """Topic and chunk of any partition that it has; None if there was nothing for `wait_ms`,
        where that is given.

        The chunk before counts as done with. Raises as `Reader.next`, and what has ended the
        membership. Cancelling it loses nothing.
        """
        self._finish()
        loop = asyncio.get_running_loop()
        deadline = None if wait_ms is None else loop.time() + wait_ms / 1000
        while True:
            self.group.check()
            if self.group.closed:
                raise LedgerStreamError("The reader is closed.")
            found = self._take()
            if found is not None:
                return found
            if self._recreated:
                await self._begin_anew()
            self._read_ahead()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._bell.wait()
            except TimeoutError:
                return self._take()

    async def commit(self) -> None:
        """What was handed out so far is done with, and stays so. Raises NotAssigned where a part of
        it is another's by now."""
        self._finish()
        done = dict(self.done)
        try:
            await self.group.commit(done)
        finally:
            self._settled(done)

    # -- what was read

    def _read_ahead(self) -> None:
        for topic, reader in self._readers.items():
            if topic not in self._pending and reader.positions:
                task = asyncio.ensure_future(reader.next(self.cluster.limits.request_ms_max))
                self._pending[topic] = task
                task.add_done_callback(lambda _: self._bell.ring())

    def _take(self) -> tuple[str, Chunk] | None:
        """A chunk that has come, of a partition that it still has, where it is to go on."""
        for topic, task in list(self._pending.items()):
            if not task.done():
                continue
            del self._pending[topic]
            if task.cancelled():
                continue
            try:
                chunk = task.result()
            except KafkaError as error:
                if error.code != ErrorCode.inconsistent_topic_id.value:
                    raise
                self._recreated.add(topic)
                continue
            if chunk is None or self.positions.get((topic, chunk.partition)) != chunk.start:
                continue
            place = topic, chunk.partition
            self.positions[place] = chunk.next_offset
            self._in_hand = place, chunk.next_offset
            return topic, chunk
        return None

    async def _begin_anew(self) -> None:
        """In topics that were deleted and created again: where the group is in them, or the start.

        As a consumer of Java's does; what was done with in the old ones is of no use any more.
        """
        for topic in list(self._recreated):
            self._stop_waiting(topic)
            reader = self._readers.pop(topic, None)
            places = frozenset(place for place in self.positions if place[0] == topic)
            self._forget(places)
            if reader is not None:
                await reader.close()
            self.cluster.forget(topic)
            await self._begin(places)
            self._recreated.discard(topic)

    def _finish(self) -> None:
        """The chunk that was handed out is done with."""
        if self._in_hand is not None:
            place, next_offset = self._in_hand
            self._in_hand = None
            self.done[place] = next_offset
            self._bell.ring()

    def _settled(self, done: dict[TopicPartition, int]) -> None:
        for place, offset in done.items():
            if self.done.get(place) == offset:
                del self.done[place]

    # -- partitions come and go

    async def assigned(self, places: Places) -> None:
        self.positions |= dict.fromkeys(places, NOWHERE)
        self._share()
        await self._begin(places)

    async def _begin(self, places: Places) -> None:
        """Of these, read those that it still has when it is known from where."""
        found = await self.group.committed(places)
        for topic in {topic for topic, _ in places}:
            mine = {(t, p): found.get((t, p)) for t, p in places if t == topic}
            unread = {p: self._start for (_, p), offset in mine.items() if offset is None}
            starts = await list_offsets(self.cluster, topic, unread) if unread else {}
            reader = self._readers.get(topic)
            if reader is None:
                reader = self._readers[topic] = Reader(
                    self.cluster, topic, {}, committed=self.committed
                )
                self._share()
            for (_, partition), offset in mine.items():
                at = starts[partition] if offset is None else offset
                if (topic, partition) in self.positions:
                    self.positions[topic, partition] = at
                    reader.seek(partition, at)
            self._stop_waiting(topic)
        self._bell.ring()

    async def revoked(self, places: Places) -> None:
        self._drop(places)
        while self._in_hand is not None and self._in_hand[0] in places:
            if self.group.is_lost or self.group.closed:
                break
            await self._bell.wait()
        if self._commit_revoked:
            mine = {place: self.done[place] for place in self.done.keys() & places}
            try:
                await self.group.commit(mine)
            except NotAssigned:
                pass  # too late: whoever has them reads them again
        self._forget(places)

    async def lost(self, places: Places) -> None:
        self._drop(places)
        self._forget(places)

    def _drop(self, places: Places) -> None:
        """Nothing of these is handed out any more."""
        for topic, partition in places:
            reader = self._readers.get(topic)
            if self.positions.pop((topic, partition), None) is not None and reader is not None:
                reader.drop(partition)
        self._share()

    def _share(self) -> None:
        """What is read ahead does not grow with the topics, and each has its part of it."""
        limits = self.cluster.limits
        part = limits.reader_fetch_bytes // max(1, len({topic for topic, _ in self.positions}))
        for reader in self._readers.values():
            reader.fetch_bytes = max(part, limits.reader_fetch_bytes_low)

    def _forget(self, places: Places) -> None:
        for place in places:
            self.done.pop(place, None)
        if self._in_hand is not None and self._in_hand[0] in places:
            self._in_hand = None

    def _stop_waiting(self, topic: str) -> None:
        """The reader looks anew at what it is to read; cancelling it loses nothing."""
        task = self._pending.get(topic)
        if task is not None and not task.done():
            task.cancel()

    # -- its end

    async def close(self) -> None:
        """Leave. What was handed out last and not committed counts as not done with."""
        try:
            await self.group.close()
        finally:
            for task in self._pending.values():
                task.cancel()
            await asyncio.gather(*self._pending.values(), return_exceptions=True)
            for reader in self._readers.values():
                await reader.close()
            self._bell.ring()

    async def __aenter__(self) -> Self:
        await self.group.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
        if error is None:
            self.group.check()
