"""The one compute thread: kernels release the GIL in it while the loop feeds fetches and COPY.

No thread can be interrupted from outside. So work that does not end keeps the thread for good:
nothing more is computed, the worker says so and stops, and since the thread is a daemon the process
can end all the same.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from ledgerstream.errors import LedgerStreamError
from ledgerstream.limits import LIMITS

P = ParamSpec("P")
R = TypeVar("R")
Work = tuple[Callable[[], Any], asyncio.Future[Any]]


class Endless(LedgerStreamError):
    """The compute thread is taken by work that does not end."""


class Compute:
    """`await compute(function, …)` runs functions one after the other, in the order asked for."""

    def __init__(self) -> None:
        self.endless = False  # the thread is lost
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ledgerstream-compute", daemon=True)
        self._thread.start()

    async def __call__(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Its result, however long it takes. Raises Endless if the thread is lost."""
        if self.endless:
            raise Endless("The compute thread is taken by work that does not end.")
        done: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.put((partial(function, *args, **kwargs), done))
        return await done

    async def limited(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """As a call, for `compute_ms_max` at the most: Endless then, and the thread is lost."""
        try:
            async with asyncio.timeout(LIMITS.compute_ms_max / 1_000) as limit:
                return await self(function, *args, **kwargs)
        except TimeoutError as error:
            if not limit.expired():
                raise
            self.endless = True
            seconds = LIMITS.compute_ms_max / 1_000
            raise Endless(f"It has not ended within {seconds:g} s.") from error

    def close(self) -> None:
        """Wait for what is under way, unless that does not end."""
        self._queue.put(None)
        if not self.endless:
            self._thread.join(LIMITS.compute_ms_max / 1_000)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            act, done = work
            if done.cancelled():
                continue
            try:
                tell = partial(_settle, done, done.set_result, act())
            except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
                tell = partial(_settle, done, done.set_exception, error)
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                done.get_loop().call_soon_threadsafe(tell)
            del work, act, done, tell


def _settle(done: asyncio.Future[Any], act: Callable[[Any], None], outcome: Any) -> None:
    if not done.done():
        act(outcome)
