"""A program whose wall clock jumps when it is told to.

    python -m tests.checker.clocked FILE MODULE …

It is `MODULE` as `python -m` would run it, with `time.time` and `time.time_ns` read through `FILE`:
two numbers of nanoseconds, what the clock is off by, and what the program has last seen it off by.
The monotonic clock is the machine's, as it is where an operator or NTP sets the time.

Next-generation groups (KIP-848) give up a member that is silent for `SESSION_MS`, so that a run of
a few seconds sees it: their session is a limit of the broker's, not a wish of its members.
"""

from __future__ import annotations

import mmap
import runpy
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

from ledgerstream import limits

SESSION_MS, HEARTBEAT_MS = 3_000, 1_000
_NUMBERS = struct.Struct("<qq")
_SECOND_NS = 1_000_000_000


class Dial:
    """The file, from either side."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(_NUMBERS.pack(0, 0))
        with path.open("r+b") as file:
            self._numbers = mmap.mmap(file.fileno(), _NUMBERS.size)

    @property
    def off_ns(self) -> int:
        return int(_NUMBERS.unpack_from(self._numbers)[0])

    @property
    def seen_ns(self) -> int:
        return int(_NUMBERS.unpack_from(self._numbers)[1])

    def set(self, off_ns: int) -> None:
        struct.pack_into("<q", self._numbers, 0, off_ns)

    def look(self) -> int:
        """What the clock is off by, seen."""
        off_ns, seen_ns = _NUMBERS.unpack_from(self._numbers)
        if off_ns != seen_ns:
            struct.pack_into("<q", self._numbers, 8, off_ns)
        return int(off_ns)


def turn(dial: Dial) -> None:
    """This process's wall clock goes by the dial from now on."""
    real_ns = time.time_ns
    time.time_ns = lambda: real_ns() + dial.look()
    time.time = lambda: (real_ns() + dial.look()) / _SECOND_NS


if __name__ == "__main__":
    turn(Dial(Path(sys.argv[1])))
    limits.LIMITS = replace(
        limits.LIMITS,
        consumer_session_ms=SESSION_MS,
        consumer_session_ms_min=SESSION_MS,
        consumer_heartbeat_ms=HEARTBEAT_MS,
    )
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
