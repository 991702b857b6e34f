"""When snapshots are taken: in the background, when a replay would take too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from ledgerstream.limits import LIMITS
from ledgerstream.stream.committer import Committer
from ledgerstream.stream.faults import TransientError
from ledgerstream.stream.partitions import Partition, Partitions
from ledgerstream.stream.retries import retried
from ledgerstream.stream.snapshot import Specs, freeze
from ledgerstream.stream.snapshots import Snapshots
from ledgerstream.stream.threads import Compute

log = structlog.get_logger()


class Snapshotter:
    """One snapshot at a time. What is frozen is the state as computed; the snapshot is made valid
    once that is committed, and given up if it is rolled back."""

    def __init__(
        self,
        snapshots: Snapshots,
        connect: Callable[[], Awaitable[Snapshots]],
        specs: Specs,
        code_version: str,
        partitions: Partitions,
        committer: Committer,
        compute: Compute,
        stopping: asyncio.Event,
    ) -> None:
        self.snapshots = snapshots
        self.taken = 0
        self._connect = connect
        self._specs = specs
        self._code_version = code_version
        self._partitions = partitions
        self._committer = committer
        self._compute = compute
        self._stopping = stopping
        self._task: asyncio.Task[None] | None = None
        self._not_before = 0.0  # so that all snapshots together stay within their share
        self._moved = asyncio.Event()  # set, and made anew, when something is committed

    def note_commit(self) -> None:
        """Something was committed: a snapshot may have become valid, or due."""
        self._moved.set()
        self._moved = asyncio.Event()
        if self._task is not None and not self._task.done():
            return
        if not self._specs or time.monotonic() < self._not_before:
            return
        for number, each in self._partitions.active.items():
            if each.compute_s * 1_000 > LIMITS.replay_ms_target:
                self._task = asyncio.create_task(self._take(number, each))
                return

    async def cancel(self) -> None:
        """Give up the one under way: its state is rolled back, or its time is over."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def take_last(self) -> None:
        """At a clean stop: a snapshot at each next_offset, so that the next start replays none."""
        await self.cancel()
        for number, each in self._partitions.active.items():
            assert each.machine.position == each.committed
            if self._specs and each.snapshot_at < each.committed:
                await self._take(number, each)

    async def close(self) -> None:
        await self.cancel()
        await self.snapshots.close()

    async def _take(self, number: int, partition: Partition) -> None:
        began = time.monotonic()
        computed, partition.compute_s = partition.compute_s, 0.0
        machine = partition.machine
        valid = False
        try:
            arrange = await self._compute(
                lambda: freeze(
                    machine.state, self._specs, number, machine.position, self._code_version
                )
            )
            frozen = await asyncio.to_thread(arrange)
            epoch = self._committer.sink.epochs[number]
            stored = await self.snapshots.write(frozen, epoch)
            spent = time.monotonic() - began
            while not partition.reached(frozen.state_offset):
                if partition.committed >= frozen.state_offset:
                    self._committer.ask_for_witness()
                await self._moved.wait()
                if self._partitions.active.get(number) is not partition:
                    return
            valid = await self.snapshots.validate(stored)
            if valid:
                partition.snapshot_at = frozen.state_offset
                self.taken += 1
        except TransientError as error:
            log.warning("snapshot given up", partition=number, error=str(error))
            await self.snapshots.close()
            self.snapshots = await retried(self._connect, self._stopping)
            spent = time.monotonic() - began
        finally:
            if not valid:
                partition.compute_s += computed
        self._not_before = time.monotonic() + spent / LIMITS.snapshot_share_max
