"""A processor without broker and database: a data frame in, data frames of results out.

The same machine, state, encoding of rows and snapshot bytes as in a worker, driven by hand: where
batches are cut and where the process "dies" is for the caller to choose, and must not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from ledgerstream.client.rows import as_rows
from ledgerstream.errors import ConfigError
from ledgerstream.limits import LIMITS
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.frames import event_frame, state_frames, table_frame
from ledgerstream.stream.machine import DeadLetter, Input, Machine, Piece
from ledgerstream.stream.outputs import joined_sends
from ledgerstream.stream.pgread import decode, joined
from ledgerstream.stream.processor import Processor, Topic
from ledgerstream.stream.snapshot import layout_of, paged, unpaged
from ledgerstream.stream.state import State
from ledgerstream.stream.tables import Table
from ledgerstream.wire.columns import RowCodec


class Tables(dict["type[Table] | Topic", pd.DataFrame]):
    """Result table → its rows in the order of events, and output topic → its events. What got none
    is an empty frame."""

    def __missing__(self, key: type[Table] | Topic) -> pd.DataFrame:
        if isinstance(key, Topic):
            return event_frame(key.event, np.empty(0, key.event.dtype()))
        return table_frame(key, joined(key, []))


@dataclass(frozen=True)
class Driven:
    """What a processor did with the events of a frame; row i of it is the event at offset i.

    tables:   results, typed as `ls.table` shows them; output topics, as `ls.read` does.
    dead:     the events that were refused: columns `offset` and `error`.
    digest:   16 bytes over all live state at the end.
    state:    the content of each declared state, a row a key.
    columns:  the results as columns with their origin, as they would stand in Postgres.
    """

    tables: Tables
    dead: pd.DataFrame
    digest: bytes
    state: Mapping[str, pd.DataFrame]
    columns: Mapping[type[Table], Mapping[str, np.ndarray]]


def drive(
    processor: type[Processor],
    frame: pd.DataFrame | np.ndarray,
    *,
    splits: Iterable[int] = (),
    crashes: Iterable[int] = (),
) -> Driven:
    """Run a processor over the rows of a frame, as one partition.

    splits:   rows that begin a new batch.
    crashes:  rows before or at which the process dies. Where that row begins a batch, it dies
              between two steps: state goes through the bytes of a snapshot into a new process.
              Otherwise the step that holds it is undone and made again.

    Raises ConfigError for rows that are not events of the processor's source, StoppedPartition
    where the processor itself is at fault.
    """
    source = processor.source
    rows = as_rows(frame, source.event)
    stamps = RowCodec(source.event, key=source.key).timestamps(rows, 0)
    batch = Batch(source, rows, np.arange(len(rows)), stamps)
    machine = Machine(processor(), 0, 0)
    pieces: list[Piece] = []
    dies = _within(crashes, len(rows), "crashes")
    for start, stop in pairwise(_cuts(splits, len(rows))):
        given = Input(0, start, stop, batch.take(slice(start, stop)))
        if start in dies:
            machine = restarted(machine)
        piece = machine.step(given)
        if any(start < each < stop for each in dies):
            for _ in piece.inputs:
                machine.rollback()
            piece = machine.step(given)
        for _ in piece.inputs:
            machine.forget()
        pieces.append(piece)
    columns = results(processor, pieces)
    tables = Tables({table: table_frame(table, found) for table, found in columns.items()})
    for topic, sends in joined_sends([piece.sends for piece in pieces]).items():
        tables[topic] = event_frame(topic.event, sends.rows)
    return Driven(
        tables,
        _dead([letter for piece in pieces for letter in piece.dead]),
        machine.state.digest(),
        state_frames(machine.state),
        columns,
    )


def results(
    processor: type[Processor], pieces: Iterable[Piece]
) -> dict[type[Table], dict[str, np.ndarray]]:
    """The rows of steps that follow each other, by table."""
    parts: dict[type[Table], list[dict[str, np.ndarray]]] = {}
    for piece in pieces:
        for table, (encoded, _) in piece.copies.items():
            parts.setdefault(table, []).append(decode(table, b"".join(encoded))[0])
    tables = dict.fromkeys([*processor.results, *parts])
    return {table: joined(table, parts.get(table, [])) for table in tables}


def restarted(machine: Machine) -> Machine:
    """The machine as another process would find it: its state from the bytes of a snapshot."""
    specs = machine.processor.states
    content = machine.state.dump()
    data = b"".join(paged(content))
    state = State(specs)
    state.load(unpaged(layout_of(specs, content), data))
    kind = type(machine.processor)
    after = Machine(kind(), machine.partition, machine.topic_number, state)
    after.position = machine.position
    return after


def _cuts(splits: Iterable[int], count: int) -> list[int]:
    """The ends of all batches, none larger than a step may be."""
    bounds = {0, count, *range(0, count, LIMITS.step_rows_max)}
    return sorted(bounds | _within(splits, count, "splits"))


def _within(rows: Iterable[int], count: int, what: str) -> set[int]:
    found = {int(each) for each in rows}
    outside = sorted(each for each in found if not 0 <= each <= count)
    if outside:
        raise ConfigError(f"{what}: there is no row {outside[0]:,}; the frame has {count:,}.")
    return found


def _dead(letters: list[DeadLetter]) -> pd.DataFrame:
    return pd.DataFrame(
        [(letter.offset, letter.error) for letter in letters], columns=["offset", "error"]
    )
