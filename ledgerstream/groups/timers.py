"""Deadlines in a heap that may be put off for nothing: a heartbeat is one assignment.

A timer has one entry in the heap, at a time not after its deadline; when the entry comes up and the
deadline has moved, it is queued again. Pure: the time is told.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any


class Timer:
    """Something that is due at `at_ms`, unless it is put off or cancelled first."""

    __slots__ = ("at_ms", "fire", "queued_ms")

    def __init__(self, fire: Callable[[Any], None]) -> None:
        self.fire = fire  # called with what `due` is called for
        self.at_ms: int | None = None
        self.queued_ms: int | None = None


class Timers:
    """All timers of one machine. Times in ms of a clock that never jumps."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Timer]] = []
        self._count = 0

    @property
    def next_ms(self) -> int | None:
        """When `due` is to be asked again; now and then it will have nothing."""
        return self._heap[0][0] if self._heap else None

    def set(self, timer: Timer, at_ms: int) -> None:
        timer.at_ms = at_ms
        if timer.queued_ms is None or at_ms < timer.queued_ms:
            self._queue(timer, at_ms)

    def cancel(self, timer: Timer) -> None:
        timer.at_ms = None

    def due(self, now_ms: int) -> Iterator[Timer]:
        while self._heap and self._heap[0][0] <= now_ms:
            queued_ms, _, timer = heapq.heappop(self._heap)
            if timer.queued_ms != queued_ms:
                continue  # another entry has come in its place
            timer.queued_ms = None
            if timer.at_ms is None:
                continue
            if timer.at_ms > now_ms:
                self._queue(timer, timer.at_ms)
                continue
            timer.at_ms = None
            yield timer

    def _queue(self, timer: Timer, at_ms: int) -> None:
        self._count += 1
        timer.queued_ms = at_ms
        heapq.heappush(self._heap, (at_ms, self._count, timer))
