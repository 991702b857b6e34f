"""The partitions that a worker has under way, and those that stopped."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import structlog

from ledgerstream.errors import LedgerStreamError, Overtaken, StoppedPartition
from ledgerstream.stream.faults import Reload, TransientError
from ledgerstream.stream.machine import Machine, Piece
from ledgerstream.stream.threads import Endless

log = structlog.get_logger()


class Partition:
    """One partition under way: `committed` ≤ `machine.position`, the pieces between them computed.

    snapshot_at:  the offset of its newest snapshot, or where its replay began.
    compute_s:    spent on events since then, which is what a replay would take.
    log_end:      the last stable offset, as last seen.
    witness:      of one that emits: up to where its outputs are in the log.
    """

    def __init__(self, machine: Machine, snapshot_at: int, compute_s: float) -> None:
        self.machine = machine
        self.committed = machine.position
        self.snapshot_at = snapshot_at
        self.compute_s = compute_s
        self.log_end = machine.position
        self.witness: int | None = None

    def settle(self, piece: Piece) -> None:
        """The oldest piece is committed."""
        for _ in piece.inputs:
            self.machine.forget()
        self.committed = piece.stop

    def reached(self, offset: int) -> bool:
        """Whether a snapshot there may count: what comes before it need never be made again."""
        witness = self.committed if self.witness is None else self.witness
        return min(self.committed, witness) >= offset

    def undo(self) -> None:
        """Back to what is committed."""
        while self.machine.state.frames:
            self.machine.rollback()
        assert self.machine.position == self.committed


class Partitions:
    """By number. `assigned` are ours to work on; `active` have their state in memory.

    on_stop: told of each partition that stops, and why.
    """

    def __init__(
        self,
        topic: str,
        assigned: Iterable[int],
        on_stop: Callable[[int, Exception], None] = lambda number, error: None,
    ) -> None:
        self.topic = topic
        self._on_stop = on_stop
        self.assigned = list(assigned)
        self.active: dict[int, Partition] = {}
        self.stopped: dict[int, Exception] = {}

    @property
    def startable(self) -> list[int]:
        return [number for number in self.assigned if number not in self.stopped]

    def leave(self, numbers: Iterable[int]) -> None:
        """Others have them: forget them, and do not claim them again."""
        gone = set(numbers)
        self.assigned = [number for number in self.assigned if number not in gone]
        for number in gone:
            self.active.pop(number, None)

    def stop(self, number: int, error: Exception) -> None:
        """This one goes no further; the others do."""
        log.error("partition stopped", topic=self.topic, partition=number, why=str(error))
        self.stopped[number] = error
        self.active.pop(number, None)
        self._on_stop(number, error)

    def of(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces whose partitions are still active."""
        return [piece for piece in pieces if piece.partition in self.active]

    async def guard(
        self, number: int, work: Awaitable[Any], processor: str, start: int, stop: int
    ) -> None:
        """Let a processor's events [start, stop) be worked on; an error that nobody knows stops
        their partition, and it alone."""
        try:
            await work
        except (Reload, TransientError, Overtaken, Endless):
            raise
        except StoppedPartition as error:
            self.stop(number, error)
        except Exception as error:  # noqa: BLE001 - the one supervisor
            plain = isinstance(error, LedgerStreamError)
            why = error.args[0] if plain else f"{type(error).__name__}: {error}"
            remedy = getattr(error, "remedy", "") or "Correct the cause and start again."
            stopped = StoppedPartition(
                f"{self.topic}-{number} stopped at offset {start:,}: {processor}, over the events "
                f"[{start:,}, {stop:,}).\n  {why}",
                f"{remedy} Nothing of them is committed.",
            )
            stopped.__cause__ = error
            self.stop(number, stopped)
