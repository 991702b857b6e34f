"""A worker for each topic of a processor, in one process, with the face of one worker.

Topics have nothing in common but the code: state, progress, snapshots and fence are kept by topic
and partition, and each topic's steps are transactions of their own.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ledgerstream.stream.worker import Progress, Worker

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Processor
    from ledgerstream.stream.source import Log


class Workers:
    """As `Worker`.

    partitions:  by topic, those to work on; without it, all of all topics.
    progress:    the sum; of several topics the partitions are called `topic-partition`.
    """

    def __init__(
        self,
        processor: type[Processor],
        log: Log,
        database: str,
        *,
        partitions: Mapping[str, Sequence[int]] | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
        **how: Any,
    ) -> None:
        self.progress = Progress(processor.name)
        self._on_progress = on_progress
        self._several = len(processor.sources) > 1
        self.workers = [
            Worker(
                processor.over(topic),
                log,
                database,
                partitions=None if partitions is None else partitions[topic.name],
                on_progress=self._tell,
                **how,
            )
            for topic in processor.sources
            if partitions is None or topic.name in partitions
        ]

    def _tell(self, _: Progress) -> None:
        told = [
            _named(worker.progress, worker.topic) if self._several else worker.progress
            for worker in self.workers
        ]
        add_up(self.progress, told)
        self._on_progress(self.progress)

    def stop(self) -> None:
        """Stop each at the end of the step under way, with a snapshot."""
        for worker in self.workers:
            worker.stop()

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT call `stop`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    async def run(self) -> Progress:
        """Until all have ended. Raises what the first of them raised that did."""
        ended = await asyncio.gather(
            *(worker.run() for worker in self.workers), return_exceptions=True
        )
        self._tell(self.progress)
        for each in ended:
            if isinstance(each, BaseException):
                raise each
        return self.progress


def _named(progress: Progress, topic: str) -> Progress:
    """Partitions by the names that they have among several topics."""
    named = Progress(**{each.name: getattr(progress, each.name) for each in fields(progress)})
    named.position = {f"{topic}-{at}": value for at, value in progress.position.items()}
    named.lag = {f"{topic}-{at}": value for at, value in progress.lag.items()}
    return named


def summed(processor: str, told: Iterable[Progress]) -> Progress:
    """Several workers' progress as one; of each partition the last that was told."""
    total = Progress(processor)
    for each in told:
        total.events += each.events
        total.dead += each.dead
        total.commits += each.commits
        total.snapshots += each.snapshots
        total.commit_ms = max(total.commit_ms, each.commit_ms)
        for table, rows in each.rows.items():
            total.rows[table] = total.rows.get(table, 0) + rows
        total.position |= each.position
        total.lag |= each.lag
    return total


def add_up(progress: Progress, told: Iterable[Progress]) -> None:
    """Make it the sum, in place: whoever shows it has it already."""
    total = summed(progress.processor, told)
    for each in fields(total):
        setattr(progress, each.name, getattr(total, each.name))
