"""Trying again: growing, bounded, jittered pauses."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import structlog

from ledgerstream.limits import LIMITS
from ledgerstream.stream.faults import TransientError

log = structlog.get_logger()
T = TypeVar("T")


def pauses() -> Iterator[float]:
    """Seconds to wait before each next try; without end."""
    pause = LIMITS.postgres_retry_first_ms / 1_000
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, LIMITS.postgres_retry_ms_max / 1_000)


async def retried(
    act: Callable[[], Awaitable[T]], stopping: asyncio.Event, limit_ms: float = math.inf
) -> T:
    """The result of `act`, tried until it is not a TransientError; that error after `limit_ms`, or
    once `stopping`."""
    deadline = time.monotonic() + limit_ms / 1_000
    for pause in pauses():
        try:
            return await act()
        except TransientError as error:
            if stopping.is_set() or time.monotonic() > deadline:
                raise
            log.warning("database not there", error=str(error))
            await asyncio.sleep(pause)
    raise AssertionError("pauses do not end")
