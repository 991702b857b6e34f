"""Short time slices: how the broker's threads get a processor as soon as they wake.

A record's way through the broker wakes four threads in turn, each of which works for some tens of
microseconds. Where producers keep the processors busy, each of them otherwise waits until a
neighbour's slice (some milliseconds) is used up. Since Linux 6.12 an ordinary thread may ask for
shorter slices (`sched_setattr(2)`, `sched_runtime` of SCHED_OTHER): it is let in earlier, and for
less. It gets no more time than before, so no privilege is needed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # sched_setattr, sched_getattr
# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")


def ask_for_short_slices(slice_us: int) -> None:
    """For the calling thread and those that it starts. Without effect where there is no such thing,
    and for a broker that was given another scheduling policy."""
    calls = _CALLS.get(platform.machine())
    if calls is None or platform.system() != "Linux":
        return
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    wanted = _ATTRIBUTES.pack(_ATTRIBUTES.size, 0, 0, nice, 0, slice_us * 1000, 0, 0)
    ctypes.CDLL(None).syscall(calls[0], 0, wanted, 0)  # an older kernel's refusal changes nothing


def slice_us() -> int | None:
    """The calling thread's slice; None where the system does not tell."""
    calls = _CALLS.get(platform.machine())
    if calls is None or platform.system() != "Linux":
        return None
    told = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if ctypes.CDLL(None).syscall(calls[1], 0, told, _ATTRIBUTES.size, 0) != 0:
        return None
    runtime_ns: int = _ATTRIBUTES.unpack(told.raw)[5]
    return runtime_ns // 1000 or None
