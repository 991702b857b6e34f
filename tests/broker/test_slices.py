"""Short time slices, asked of the system and read back."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ledgerstream.broker.slices import ask_for_short_slices, slice_us


def test_threads_started_later_have_short_slices_and_the_same_priority() -> None:
    def in_a_thread_of_a_thread() -> tuple[int | None, int | None, int]:
        before = slice_us()
        ask_for_short_slices(100)
        found: list[int | None] = []
        thread = threading.Thread(target=lambda: found.append(slice_us()))
        thread.start()
        thread.join()
        return before, found[0], os.getpriority(os.PRIO_PROCESS, 0)

    nice = os.getpriority(os.PRIO_PROCESS, 0)
    with ThreadPoolExecutor(1) as pool:
        before, after, nice_after = pool.submit(in_a_thread_of_a_thread).result()
    if before is None:
        pytest.skip("this system does not tell a thread's slice (Linux 6.12 and later do)")
    assert (after, nice_after) == (100, nice)
    assert slice_us() == before, "other threads keep theirs"
