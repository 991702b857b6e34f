"""The checker, the workloads and the faults together find bugs that are put into the broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checker.runs import Plan, perform

# bug → what it shows as, who works, and what befalls them
HALF = {"aborted-read", "unseen", "lost-write"}
BUGS = {
    "marker_missing": ({"unseen", "lost-write"}, {"queue": 1}, ()),
    "unstable_reads": ({"aborted-read", "precommitted-read"}, {"queue": 2}, ()),
    "no_deduplication": ({"duplicate"}, {"queue": 1, "orders": 1}, ("lose_answer",)),
    "early_acknowledgement": (
        {"lost-write", "unseen", "inconsistent-offsets"}, {"queue": 1, "orders": 1},
        ("kill_broker",),
    ),
    "old_epoch_ends": (HALF, {"queue": 4}, ("hold_end", "hold_end", "rest")),
    "aborted_offsets_kept": ({"aborted-offset"}, {"money": 1, "orders": 1}, ()),
    "offsets_outside": ({"aborted-offset"}, {"group": 2}, ()),
    "given_before_released": (
        {"transfer", "sum"}, {"money": 2, "orders": 1}, ("kill_client", "rest", "rest"),
    ),
    "timeout_without_fence": ({"lost-write", "unseen"}, {"queue": 6}, ("rest", "jump_over")),
}  # fmt: skip
SECONDS, TRIES = 2.5, 5
LONGER = {
    "old_epoch_ends": 5.0,  # a request has to be given up, and to meet the next transaction
    "given_before_released": 5.0,  # a member has to come while another has two partitions
    "timeout_without_fence": 6.0,  # a client has to sleep between two sends of a transaction
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
async def test_bug_is_found_and_named(bug: str, tmp_path: Path) -> None:
    kinds, workloads, faults = BUGS[bug]
    module = ("tests.checker.planted", bug)
    told = []
    for seed in range(TRIES):
        directory = tmp_path / str(seed)
        directory.mkdir()
        seconds = LONGER.get(bug, SECONDS) * (1 + seed)
        plan = Plan("ours", workloads, faults, seconds, seed, module, quiet_s=2.0)
        seen = await perform(plan, directory)
        found = {anomaly.kind for anomaly in seen.errors()}
        told.append(seen.told())
        if found & kinds:
            print(told[-1])
            return
    pytest.fail("\n".join(told))
