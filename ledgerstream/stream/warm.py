"""Compile once, say so, and be quick the second time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ledgerstream.errors import LedgerStreamError
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.kernels import compile_lock
from ledgerstream.stream.machine import Input, Machine
from ledgerstream.stream.newest import newest
from ledgerstream.stream.pages import ids_of, match
from ledgerstream.stream.processor import Processor
from ledgerstream.stream.snapshot import paged
from ledgerstream.stream.state import State
from ledgerstream.stream.tables import Table
from ledgerstream.stream.version import code_version
from ledgerstream.wire.batches import seal_batch
from ledgerstream.wire.columns import RowCodec

_SAMPLE = 4
_SAMPLE_TIME_NS = 1_577_836_800 * 10**9  # 2020-01-01
_DAY_NS = 86_400 * 10**9


def warm(processor: type[Processor], say: Callable[[str], None] = lambda _: None) -> None:
    """Compile every kernel that a processor and its state need, by one process at a time.

    It runs the processor over a few made-up events against state that is thrown away; `say` gets
    a sentence if this is the first time for this code.
    """
    with compile_lock() as cache:
        mark = cache / f"warm-{_fingerprint(processor)}"
        if not mark.exists():
            say(f"compiling the kernels of {processor.name}, once for this version …")
        run_sample(processor)
        try:
            mark.touch()
        except OSError:  # a read-only cache compiles each time
            pass


def run_sample(processor: type[Processor]) -> list[type[Table]]:
    """Run the sample; the result tables that the processor has shown."""
    source = processor.source
    codec = RowCodec(source.event, key=source.key, encoding=source.encoding)
    rows = np.repeat(source.event.default_row().reshape(1), _SAMPLE)
    if source.time_column is not None:
        # In order, equal, and late: each way through the windows.
        rows[source.time_column] = _SAMPLE_TIME_NS + np.array([0, 0, 60 * _DAY_NS, 59 * _DAY_NS])
    stamps = codec.timestamps(rows, 0)
    encoded = seal_batch(
        codec.encode(rows, 0).tobytes(),
        count=_SAMPLE,
        base_timestamp=int(stamps[0]),
        max_timestamp=int(stamps.max()),
    )
    codec.decode(encoded)
    machine = Machine(processor(), 0, 0)
    batch = Batch(source, rows, np.arange(_SAMPLE), np.zeros(_SAMPLE, np.int64))
    given = Input(0, 0, _SAMPLE, batch)
    tables: list[type[Table]] = list(processor.results)
    try:
        machine.step(given)
        machine.rollback()
        copies = machine.step(given).copies
        tables += copies
        for table, (parts, count) in copies.items():
            newest(table, [*parts, *parts], 2 * count)  # as two of its steps in one transaction
        machine.step(given)
        machine.rollback()
        machine.forget()
    except LedgerStreamError:
        return tables  # made-up events need not make sense to it
    content = machine.state.dump()
    State(processor.states).load(content)
    pages = paged(content)
    match(ids_of(list(pages)), pages.ids)
    list(pages.rows(np.arange(len(pages)), bytes(16), 1))
    return tables


def _fingerprint(processor: type[Processor]) -> str:
    """Of the processor's code and of our kernels: a mark made for other code says nothing."""
    digest = hashlib.sha256(f"{processor.__qualname__} {code_version(processor)}".encode())
    home = Path(__file__).parent
    for path in [*sorted(home.glob("*.py")), home.parent / "wire" / "columns.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
