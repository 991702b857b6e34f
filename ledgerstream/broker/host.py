"""Performs the decisions of a pure machine: append, replay at once, reply when durable.

Whatever is decided next sees the new state; nobody is told of it, and nothing is done about it,
before the log is durable up to it. `settled` is the machine at that point: if an append fails, what
was decided beyond it has never been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Generic, TypeVar

from ledgerstream.broker.replica import Replica
from ledgerstream.errors import CorruptError, StorageError
from ledgerstream.log import Appended, Partition
from ledgerstream.machine import Decision, Machine
from ledgerstream.wire import batches

R = TypeVar("R")
Reply = TypeVar("Reply")
READ_BYTES = 4 * 1024 * 1024


class Host(Generic[R]):
    """A machine, and the replica of the partition that is its log."""

    def __init__(
        self,
        machine: Machine[R],
        settled: Machine[R],
        replica: Replica,
        encode: Callable[[R], bytes],
        now_ms: Callable[[], int],
        performed: Callable[[Sequence[R]], None],
    ) -> None:
        self.machine = machine
        self.settled = settled
        self.replica = replica
        self._encode = encode
        self._now_ms = now_ms
        self._performed = performed  # what the node does about durable records, before the reply

    def act(self, decision: Decision[R, Reply]) -> int:
        """Append and replay; the offset up to which the reply's durability is to be awaited."""
        partition = self.replica.partition
        if decision.records:
            now_ms = self._now_ms()
            items = [batches.NewRecord(None, self._encode(r), now_ms) for r in decision.records]
            batch = batches.encode_batch(items)
            appended = partition.append(batch, batches.parse_header(batch), now_ms)
            if not isinstance(appended, Appended):
                raise StorageError(f"{partition.key} takes no records: {appended}")
            for record in decision.records:
                self.machine.replay(record)
            settle = partial(self._settle, decision.records)
            self.replica.when_durable(partition.next_offset, settle)
        return partition.next_offset

    def _settle(self, records: Sequence[R], durable: bool) -> None:
        if not durable:
            self.machine.become(self.settled)
            return
        for record in records:
            self.settled.replay(record)
        self._performed(records)

    async def perform(self, decision: Decision[R, Reply]) -> Reply:
        """The decision's reply, once all that it rests on is durable; StorageError if it failed."""
        await self.replica.wait_durable(self.act(decision))
        return decision.reply


def replay_log(partition: Partition) -> Iterator[bytes]:
    """Each record's value from the log's start to its durable end. Blocking: for start-up."""
    for data, at, _ in durable_batches(partition):
        for record in batches.records(data, at):
            if record.value is not None:
                yield record.value


def durable_batches(partition: Partition) -> Iterator[tuple[bytes, int, batches.Header]]:
    """(buffer, position, header) of each batch from the log's start to its durable end. Blocks."""
    offset, end = partition.log_start_offset, partition.high_watermark
    while offset < end:
        data = b"".join(partition.read_cold(offset, READ_BYTES, end).data)
        before = offset
        for at, header in batches.headers(data):
            yield data, at, header
            offset = header.next_offset
        if offset == before:
            raise CorruptError(f"{partition.key} cannot be read at offset {offset:,}.")
