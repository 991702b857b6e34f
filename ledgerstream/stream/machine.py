"""One partition's step, purely: events in, COPY bytes and dead letters out, state moved.

`Machine.step` is a function of state and decoded events. It opens one frame of state a step, which
the caller settles with `forget` once the step is committed, or undoes with `rollback`.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ledgerstream.errors import ConfigError, LedgerStreamError, StoppedPartition
from ledgerstream.limits import LIMITS
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.newest import newest
from ledgerstream.stream.outputs import Events, Sends, joined_sends, sent
from ledgerstream.stream.pgcopy import encode
from ledgerstream.stream.processor import Processor, Topic
from ledgerstream.stream.single import EventFault
from ledgerstream.stream.state import BadEvents, State
from ledgerstream.stream.tables import Rows, Table

REFUSALS_MAX = 4  # of a step, before it is made in halves
SPLIT_EVENTS_MIN = 64  # fewer are run again as a whole


@dataclass(frozen=True)
class DeadLetter:
    """A record that could not be processed. `timestamp_ms` is the record's."""

    offset: int
    timestamp_ms: int
    key: bytes | None
    payload: bytes | None
    error: str


@dataclass(frozen=True)
class Input:
    """Decoded records of one partition in [start, stop): events, and what did not decode."""

    partition: int
    start: int
    stop: int
    batch: Batch
    undecodable: Sequence[DeadLetter] = ()

    def split(self) -> tuple[Input, Input]:
        """Two halves by events; there must be at least two."""
        middle = len(self.batch) // 2
        cut = int(self.batch.offset[middle])
        early = [each for each in self.undecodable if each.offset < cut]
        late = [each for each in self.undecodable if each.offset >= cut]
        return (
            Input(self.partition, self.start, cut, self.batch.take(slice(None, middle)), early),
            Input(self.partition, cut, self.stop, self.batch.take(slice(middle, None)), late),
        )

    def without(self, offsets: Sequence[int] | np.ndarray, error: str) -> Input:
        """The events at these offsets, at least one, turned into dead letters."""
        gone = np.isin(self.batch.offset, offsets)
        assert gone.any()
        dead = [dead_letter(self.batch, int(at), error) for at in np.flatnonzero(gone)]
        return Input(
            self.partition,
            self.start,
            self.stop,
            self.batch.take(~gone),
            sorted([*self.undecodable, *dead], key=lambda each: each.offset),
        )


@dataclass(frozen=True)
class Piece:
    """What one step of one partition does to the world, to be committed whole.

    copies: for each table the bytes of its rows (without COPY's header) and their number.
    sends:  for each output topic its events.
    digest: of the state after it, 16 bytes.
    inputs: what it was made from, one frame of state each.
    watermark: of its windows after it, as `State.watermark`.
    compute_s: what it took, as the one who had it computed says.
    """

    partition: int
    start: int
    stop: int
    events: int
    copies: Mapping[type[Table], tuple[Sequence[bytes], int]]
    dead: Sequence[DeadLetter]
    digest: bytes
    inputs: Sequence[Input]
    watermark: int | None = None
    compute_s: float = 0.0
    sends: Mapping[Topic, Sends] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(count for _, count in self.copies.values())

    @property
    def bytes(self) -> int:
        """Of what would be copied, and sent."""
        copied = sum(len(part) for parts, _ in self.copies.values() for part in parts)
        return copied + sum(sends.bytes for sends in self.sends.values())


def join(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one partition, one after the other, as one: a row that a later one replaces is
    not written at all."""
    if len(pieces) == 1:
        return pieces[0]
    copies: dict[type[Table], tuple[list[bytes], int]] = {}
    for piece in pieces:
        for table, (parts, rows) in piece.copies.items():
            before, count = copies.setdefault(table, ([], 0))
            copies[table] = [*before, *parts], count + rows
    copies = {table: newest(table, *encoded) for table, encoded in copies.items()}
    for earlier, later in pairwise(pieces):
        assert (earlier.partition, earlier.stop) == (later.partition, later.start)
    return Piece(
        pieces[0].partition,
        pieces[0].start,
        pieces[-1].stop,
        sum(piece.events for piece in pieces),
        copies,
        [letter for piece in pieces for letter in piece.dead],
        pieces[-1].digest,
        [given for piece in pieces for given in piece.inputs],
        pieces[-1].watermark,
        sum(piece.compute_s for piece in pieces),
        joined_sends([piece.sends for piece in pieces]),
    )


def dead_letter(batch: Batch, at: int, error: str) -> DeadLetter:
    """A decoded event as a dead letter: its payload is the event in the fixed form."""
    source = batch.source
    prefix = source.event.layouts()[-1].prefix
    row = batch.rows[at]
    key = row[source.key]
    return DeadLetter(
        int(batch.offset[at]),
        int(batch.timestamp[at]),
        bytes(key) if isinstance(key, bytes) else struct.pack(">q", int(key)),
        prefix + row.tobytes(),
        error,
    )


class Machine:
    """A processor on one partition: its state, and the step that moves it.

    topic_number:  the topic id's number in `ls_topics`, which result rows carry.
    muted_below:   events below it have sent what they send: only their rows are made.
    """

    def __init__(
        self, processor: Processor, partition: int, topic_number: int, state: State | None = None
    ) -> None:
        self.processor = processor
        self.partition = partition
        self.topic_number = topic_number
        self.state = State(processor.states) if state is None else state
        self.muted_below = 0
        self.position = 0  # the state is that after all events below it
        self._starts: deque[int] = deque()  # of the steps that are not settled

    @property
    def source(self) -> Topic:
        return self.processor.source

    def step(self, given: Input, *, outputs: bool = True, tables: bool = True) -> Piece:
        """Process [start, stop) and open one frame of state.

        `outputs=False` (replay) encodes nothing, `tables=False` only what is sent. Events that
        `process` or the encoding refuses become dead letters, exactly those; where there are many,
        the step is made of smaller ones, each an input of the piece with a frame of its own. Raises
        StoppedPartition where the processor itself is at fault; no frame is open then.
        """
        work = given
        refused = 0
        while True:
            self.state.begin(len(work.batch))
            try:
                copies, sends = self._process(work.batch, outputs, tables)
                break
            except BadEvents as error:
                self.state.rollback()
                refused += 1
                if refused == REFUSALS_MAX and len(given.batch) > SPLIT_EVENTS_MIN:
                    return self._step_apart(given, outputs, tables)
                work = work.without(error.offsets, str(error.args[0]))
            except BaseException as error:
                self.state.rollback()
                if isinstance(error, LedgerStreamError) or not isinstance(error, Exception):
                    raise
                raise self._at_fault(work, error) from error
        self.state.seal()
        self._starts.append(given.start)
        self.position = given.stop
        return Piece(
            self.partition,
            work.start,
            work.stop,
            len(work.batch),
            copies,
            work.undecodable,
            self.state.digest(),
            [given],
            self.state.watermark(),
            sends=sends,
        )

    def _step_apart(self, given: Input, outputs: bool, tables: bool) -> Piece:
        """In two halves: each refusal costs another run over all events of its step."""
        early, late = given.split()
        first = self.step(early, outputs=outputs, tables=tables)
        try:
            return join([first, self.step(late, outputs=outputs, tables=tables)])
        except BaseException:
            for _ in first.inputs:
                self.rollback()
            raise

    def still(self) -> Piece:
        """A step of no width, where nothing waits to be settled."""
        assert not self._starts
        at = self.position
        return Piece(self.partition, at, at, 0, {}, [], self.state.digest(), [])

    def forget(self) -> None:
        """The oldest step is committed."""
        self.state.forget()
        self._starts.popleft()

    def rollback(self) -> None:
        """Undo the newest step."""
        self.state.rollback()
        self.position = self._starts.pop()

    def _process(
        self, batch: Batch, outputs: bool, tables: bool
    ) -> tuple[Mapping[type[Table], tuple[Sequence[bytes], int]], Mapping[Topic, Sends]]:
        copies: dict[type[Table], tuple[list[bytes], int]] = {}
        sends: list[Mapping[Topic, Sends]] = []
        for segment in self.state.segments(batch) if len(batch) else ():
            result = self.processor.process(segment, self.state)
            if not outputs:
                continue
            rows_of, events_of = gathered(self.processor, result)
            for table, parts in rows_of.items() if tables else ():
                encoded, count = encode(parts, segment, self.topic_number, self.partition)
                before, rows = copies.get(table, ([], 0))
                copies[table] = [*before, *encoded], rows + count
            sends.append({
                topic: sent(some, segment, self.topic_number, self.partition, self.muted_below)
                for topic, some in events_of.items()
            })  # fmt: skip
        return copies, {topic: some for topic, some in joined_sends(sends).items() if len(some)}

    def _at_fault(self, work: Input, error: Exception) -> StoppedPartition:
        name = self.processor.name
        said = f"{name}.process raised {type(error).__name__}: {error}"
        if isinstance(error, EventFault):
            cause = error.__cause__
            said = (
                f"{name}.on_event raised {type(cause).__name__}: {cause} at offset "
                f"{error.offset:,},"
            )
        return StoppedPartition(
            f"{self.source.name}-{self.partition} stopped at offset {work.start:,}.\n"
            f"  {said} in the events [{work.start:,}, {work.stop:,}); nothing of them is "
            "committed.",
            f"Correct {name} and start it again: it goes on from there.",
        )


def gathered(
    processor: Processor, result: object
) -> tuple[dict[type[Table], list[Rows]], dict[Topic, list[Events]]]:
    """What `process` returned, by table and by topic, in the order of first mention."""
    parts = [] if result is None else result if isinstance(result, list) else [result]
    rows_of: dict[type[Table], list[Rows]] = {}
    events_of: dict[Topic, list[Events]] = {}
    for part in parts:
        if isinstance(part, Rows):
            rows_of.setdefault(part.table, []).append(part)
        elif isinstance(part, Events):
            if part.topic not in processor.outputs:
                raise ConfigError(
                    f"{processor.name}.process emits to {part.topic.name!r}, which is none of its "
                    "outputs.",
                    "Name the topic in the class: outputs = (…,).",
                )
            events_of.setdefault(part.topic, []).append(part)
        else:
            raise ConfigError(
                f"{processor.name}.process returned {type(part).__name__}.",
                "Return Rows (as Alert.rows(…) makes them), Events (as a topic's emit(…) does), a "
                "list of them, or None.",
            )
    return rows_of, events_of


def clip(payload: bytes | None) -> bytes | None:
    """A payload as the dead letters keep it."""
    return None if payload is None else payload[: LIMITS.dead_letter_bytes_max]
