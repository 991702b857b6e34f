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
            log.warning("waiting for the database", why=str(error))
            await asyncio.sleep(pause)
    raise AssertionError("pauses do not end")


async def awaited(
    act: Callable[[], Awaitable[T]], stopping: asyncio.Event, say: Callable[[str], None]
) -> T:
    """The result of `act` at the start of a run: as `retried`, but for a few seconds only, and a
    person is told at once what is waited for, and for how long."""
    limit_s = LIMITS.postgres_wait_ms_max / 1_000
    told = False

    def tell(why: str) -> None:
        nonlocal told
        if not told:
            told = True
            say(f"Waiting up to {limit_s:g} s for the database: {why}")

    last = TransientError("Postgres has not answered.", lost=True)
    silence = asyncio.get_running_loop().call_later(1, tell, "it has not answered yet.")
    try:
        async with asyncio.timeout(limit_s):
            for pause in pauses():
                try:
                    return await act()
                except TransientError as error:
                    if stopping.is_set():
                        raise
                    last = error
                    tell(str(error.args[0]))
                await asyncio.sleep(pause)
    except TimeoutError:
        raise TransientError(
            f"The database was waited for in vain for {limit_s:g} s.\n  {last.args[0]}",
            lost=True,
            remedy=last.remedy or "Start it, or correct its URL, and run this again.",
        ) from last
    finally:
        silence.cancel()
    raise AssertionError("pauses do not end")
