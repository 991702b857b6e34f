"""A processor's step alone, without log and database."""

from __future__ import annotations

import time

import numpy as np

from ledgerstream.stream.batch import Batch
from ledgerstream.stream.machine import Input, Machine

CHUNK = 65_536  # events a call of `process`, about what a fetch brings


def drive(machine: Machine, events: np.ndarray, *, outputs: bool) -> float:
    """Seconds for the events, in chunks that are committed at once."""
    began = time.perf_counter()
    for first in range(0, len(events), CHUNK):
        part = events[first : first + CHUNK]
        start = machine.position
        batch = Batch(machine.source, part, np.arange(start, start + len(part)))
        machine.step(Input(0, start, start + len(part), batch), outputs=outputs)
        machine.forget()
    return time.perf_counter() - began
