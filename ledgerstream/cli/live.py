"""How a running processor looks: one live line on a terminal, one sentence at the end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ledgerstream.cli import show

if TYPE_CHECKING:
    from ledgerstream.stream.worker import Progress

REFRESH_S = 0.1
NOTE_S = 10.0
RATE_WINDOW_S = 2.0


@asynccontextmanager
async def live(progress: Progress) -> AsyncIterator[None]:
    """Show the progress on stderr while the block runs: a live line on a terminal, elsewhere a
    line now and then, where something was committed since the last."""
    rate = Rate()

    def line() -> str:
        return f"{progress.processor}  {figures(progress, rate(progress.events))}"

    if not sys.stderr.isatty():
        task = asyncio.create_task(_note_now_and_then(progress, line))
        try:
            yield
        finally:
            task.cancel()
        return
    from rich.console import Console
    from rich.live import Live

    async def refresh() -> None:
        while True:
            display.update(line())
            await asyncio.sleep(REFRESH_S)

    console = Console(stderr=True, highlight=False)
    aside = sys.stdout.isatty()  # what is printed meanwhile appears above the line
    with Live(line(), console=console, transient=True, redirect_stdout=aside) as display:
        task = asyncio.create_task(refresh())
        try:
            yield
        finally:
            task.cancel()


async def _note_now_and_then(progress: Progress, line: Callable[[], str]) -> None:
    told = 0
    while True:
        await asyncio.sleep(NOTE_S)
        if progress.commits > told:
            told = progress.commits
            show.note(line())


class Rate:
    """Events a second over the last two seconds."""

    def __init__(self) -> None:
        self._seen = [(time.monotonic(), 0)]

    def __call__(self, events: int) -> float:
        now = time.monotonic()
        self._seen.append((now, events))
        while len(self._seen) > 2 and self._seen[0][0] < now - RATE_WINDOW_S:
            self._seen.pop(0)
        then, before = self._seen[0]
        return (events - before) / max(now - then, REFRESH_S)


def figures(progress: Progress, rate: float) -> str:
    """`1,204,000 events · 412,000/s · lag 30,100 · 13 commits, the last 80 ms · alert 9,120`"""
    if not progress.commits:
        committed = sum(progress.position.values())
        return f"committed up to {committed:,}, waiting for more" if committed else "starting"
    commits = show.count(progress.commits, "commit")
    parts = [
        show.count(progress.events, "event"),
        f"{rate:,.0f}/s",
        f"lag {sum(progress.lag.values()):,}",
        f"{commits}, the last {show.duration(progress.commit_ms / 1000)}",
        *(f"{table} {rows:,}" for table, rows in progress.rows.items()),
    ]
    if progress.dead:
        parts.append(show.count(progress.dead, "dead letter"))
    return " · ".join(parts)


def summary(progress: Progress, seconds: float) -> str:
    """What was done, for the end of a run."""
    rate = progress.events / max(seconds, 1e-3)
    rows = ", ".join(
        f"{show.count(count, 'row')} of {table}" for table, count in progress.rows.items()
    )
    dead = ""
    if progress.dead:
        count = show.count(progress.dead, "dead letter")
        dead = f", {count} (`ledgerstream dead-letters list` says why)"
    return (
        f"{progress.processor}: {show.count(progress.events, 'event')} in {show.duration(seconds)} "
        f"({rate:,.0f}/s), {show.count(progress.commits, 'commit')}: {rows or 'no rows'}{dead}."
    )
