"""What a run that nobody looks at says."""

from __future__ import annotations

import asyncio

import pytest

from ledgerstream.cli import live
from ledgerstream.stream.worker import Progress


async def test_a_piped_run_says_something_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where something was committed since the last line, and nothing else."""
    monkeypatch.setattr(live, "NOTE_S", 0.005)
    progress = Progress("Fraud")
    said = ""
    async with live.live(progress), asyncio.timeout(10):
        for commits in (1, 2):
            progress.commits, progress.events = commits, 100 * commits
            while f"{100 * commits} events" not in said:
                await asyncio.sleep(0.001)
                said += capsys.readouterr().err
    assert said.count("\n") == 2
    assert "Fraud  100 events" in said
