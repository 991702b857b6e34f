"""Names what is wrong with a history of sends and polls. Pure.

After the Kafka workload of Jepsen (`jepsen.tests.kafka`, and the report on Bufstream 0.1.0): the
order of a partition's values is known from their offsets, so each anomaly is a question to a
dictionary. Readers are read_committed. What Kafka's own model allows is in `ALLOWED`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from tests.checker.cycles import components
from tests.checker.history import (
    NEVER,
    Assign,
    CommitOffsets,
    Operation,
    Outcome,
    Partition,
    Poll,
)

# Kafka does not isolate writes from each other: two open transactions may write to two partitions
# in opposite orders. So cycles with a write-write edge in them are no errors.
ALLOWED = frozenset({"G0", "G1c"})


class Anomaly(NamedTuple):
    kind: str
    where: str  # a partition, or the processes that it is about
    what: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.where}): {self.what}"


def check(history: Sequence[Operation]) -> list[Anomaly]:
    """Every anomaly, those that Kafka allows too; `errors` leaves them out.

    duplicate, inconsistent-offsets   a value at two offsets, an offset with two values
    lost-write, unseen                committed and read by nobody, though somebody read beyond it,
                                      or nobody did (the history ends with a read of everything)
    aborted-read (G1a)                a value of an operation that failed; or that nobody sent
    precommitted-read                 one's own, or before its commit was asked for
    int-poll-skip, ext-poll-skip      a value between two that were read one after the other, in
                                      one operation or from one to the next
    int-, ext-nonmonotonic-poll       the second of them lay before the first
    int-, ext-nonmonotonic-send       as sent by one process
    aborted-offset, lost-offset       a group went on where only a failed transaction had led it,
                                      or before an offset that was committed
    G0, G1c, G1c-wr                   cycles of write-write edges; of these and write-read edges;
                                      of write-read edges alone
    """
    facts = Facts(history)
    rules = (values, reads, polls, sends, offsets, cycles)
    return [anomaly for rule in rules for anomaly in rule(facts)]


def errors(history: Sequence[Operation]) -> list[Anomaly]:
    return [anomaly for anomaly in check(history) if anomaly.kind not in ALLOWED]


class Facts:
    """What follows from a history alone."""

    def __init__(self, history: Sequence[Operation]) -> None:
        self.history = history
        self.writer: dict[str, Operation] = {}
        self.readers: dict[str, list[tuple[Operation, int]]] = defaultdict(list)  # and when
        self.places: dict[str, set[tuple[Partition, int]]] = defaultdict(set)
        self.values: dict[tuple[Partition, int], set[str]] = defaultdict(set)
        self.read_to: dict[Partition, int] = {}  # the greatest offset that anybody read
        for operation in history:
            for act in operation.acts:
                if isinstance(act, Poll):
                    self._polled(operation, act)
            for send in operation.sends():
                assert send.value not in self.writer, f"{send.value} was sent twice"
                self.writer[send.value] = operation
                if send.offset >= 0:
                    self._placed(send.partition, send.offset, send.value, operation)

    def _polled(self, operation: Operation, poll: Poll) -> None:
        for partition, records in poll.records.items():
            for offset, value in records:
                self.readers[value].append((operation, poll.at))
                self.places[value].add((partition, offset))
                self.values[partition, offset].add(value)
                self.read_to[partition] = max(self.read_to.get(partition, -1), offset)

    def _placed(self, partition: Partition, offset: int, value: str, by: Operation) -> None:
        self.places[value].add((partition, offset))
        if by.outcome is not Outcome.FAIL:
            self.values[partition, offset].add(value)

    @cached_property
    def committed(self) -> set[Operation]:
        """Acknowledged, or seen by somebody."""
        seen = {self.writer[value] for value in self.readers if value in self.writer}
        return {
            each for each in self.history
            if each.outcome is Outcome.OK or (each.outcome is Outcome.INFO and each in seen)
        }  # fmt: skip

    @cached_property
    def stands(self) -> set[str]:
        """The values that have to be there. Outside of transactions each stands for itself."""
        return {
            send.value for operation in self.history for send in operation.sends()
            if (operation in self.committed if operation.transactional else send.offset >= 0)
        }  # fmt: skip

    @cached_property
    def order(self) -> dict[Partition, list[int]]:
        """The offsets at which readers find something."""
        found: dict[Partition, set[int]] = defaultdict(set)
        for value in self.stands | self.readers.keys():
            for partition, offset in self.places[value]:
                found[partition].add(offset)
        return {partition: sorted(offsets) for partition, offsets in found.items()}


def values(facts: Facts) -> Iterator[Anomaly]:
    for value, places in facts.places.items():
        if len(places) > 1:
            yield Anomaly("duplicate", value, f"at {sorted(places)}")
    for (partition, offset), found in facts.values.items():
        if len(found) > 1:
            yield Anomaly("inconsistent-offsets", partition, f"{sorted(found)} at {offset}")
    for operation in facts.history:
        for send in operation.sends():
            if send.value not in facts.stands or facts.readers.get(send.value):
                continue
            beyond = 0 <= send.offset <= facts.read_to.get(send.partition, -1)
            kind = "lost-write" if beyond else "unseen"
            what = f"{send.value} at {send.offset}, sent by {operation.process}, was read by nobody"
            yield Anomaly(kind, send.partition, what)


def reads(facts: Facts) -> Iterator[Anomaly]:
    for value, found in facts.readers.items():
        writer = facts.writer.get(value)
        ((where, _), *_) = sorted(facts.places[value])
        reader, at = min(found, key=lambda each: each[1])
        if writer is None:
            yield Anomaly("aborted-read", where, f"{value} was sent by nobody")
        elif writer.outcome is Outcome.FAIL:
            what = f"{value} of {writer.process}, which failed, was read by {reader.process}"
            yield Anomaly("aborted-read", where, what)
        elif writer.transactional:
            if any(each is writer for each, _ in found):
                yield Anomaly(
                    "precommitted-read", where, f"{value} was read by its own transaction"
                )
            elif at < writer.asked != NEVER:
                what = f"{value} was read by {reader.process} before its commit was asked for"
                yield Anomaly("precommitted-read", where, what)


def polls(facts: Facts) -> Iterator[Anomaly]:
    """Each process reads what there is, in order, from where it was or was put."""
    going: dict[str, dict[Partition, tuple[int, Operation]]] = defaultdict(dict)
    for operation in facts.history:
        nexts = going[operation.process]
        for act in operation.acts:
            if isinstance(act, Assign):
                nexts.clear()
                for partition, start in act.positions.items():
                    if start is not None:
                        nexts[partition] = start, operation
            elif isinstance(act, Poll):
                for partition, records in act.records.items():
                    for offset, value in records:
                        if partition in nexts:
                            start, by = nexts[partition]
                            side = "int" if by is operation else "ext"
                            if kind := _misstep(facts.order[partition], start, offset):
                                what = (
                                    f"{operation.process} read {value} at {offset}, after {start}"
                                )
                                yield Anomaly(f"{side}-{kind}", partition, what)
                        nexts[partition] = offset + 1, operation


def _misstep(order: list[int], start: int, offset: int) -> str | None:
    if offset < start:
        return "nonmonotonic-poll"
    return "poll-skip" if order[bisect_left(order, start)] < offset else None


def sends(facts: Facts) -> Iterator[Anomaly]:
    """A process's values to a partition stand there in the order in which it sent them."""
    last: dict[tuple[str, Partition], tuple[int, Operation]] = {}
    for operation in facts.history:
        for send in operation.sends():
            if send.offset < 0:
                continue
            key = operation.process, send.partition
            before, by = last.get(key, (-1, operation))
            if send.offset <= before:
                side = "int" if by is operation else "ext"
                what = f"{send.value} at {send.offset} was sent after {before}"
                yield Anomaly(f"{side}-nonmonotonic-send", send.partition, what)
            last[key] = send.offset, operation


def offsets(facts: Facts) -> Iterator[Anomaly]:
    """A group's offsets only grow, so what it is told says which commits it knows of."""
    wrote: dict[tuple[str, Partition], list[tuple[int, Operation]]] = defaultdict(list)
    for operation in facts.history:
        for act in operation.acts:
            if isinstance(act, CommitOffsets):
                for partition, offset in act.offsets.items():
                    wrote[act.group, partition].append((offset, operation))
    for operation in facts.history:
        for act in operation.acts:
            if isinstance(act, Assign) and act.group is not None:
                for partition, told in act.positions.items():
                    yield from _told(wrote[act.group, partition], partition, told or 0, act)


def _told(
    wrote: list[tuple[int, Operation]], partition: Partition, told: int, assign: Assign
) -> Iterator[Anomaly]:
    by = [operation for offset, operation in wrote if offset == told]
    if by and all(operation.outcome is Outcome.FAIL for operation in by):
        what = f"{assign.group} was told {told}, of {by[0].process}, which failed"
        yield Anomaly("aborted-offset", partition, what)
    due = max((offset for offset, operation in wrote if operation.outcome is Outcome.OK
               and operation.ended < assign.at), default=0)  # fmt: skip
    if told < due:
        yield Anomaly("lost-offset", partition, f"{assign.group} was told {told}, not {due}")


def cycles(facts: Facts) -> Iterator[Anomaly]:
    """One anomaly for each knot of operations that depend on each other in a circle."""
    by_write: set[tuple[Operation, Operation]] = set()
    for partition, order in facts.order.items():
        found = (value for offset in order for value in sorted(facts.values[partition, offset]))
        by_write.update(pairwise(facts.writer[value] for value in found if value in facts.writer))
    by_read = {
        (facts.writer[value], reader)
        for value, found in facts.readers.items()
        if value in facts.writer
        for reader, _ in found
    }
    for kind, edges in (("G0", by_write), ("G1c-wr", by_read), ("G1c", by_write | by_read)):
        edges = {(a, b) for a, b in edges if a is not b and {a, b} <= facts.committed}
        for knot in components(edges):
            inside = {edge for edge in edges if set(edge) <= knot}
            if kind == "G1c" and (inside <= by_write or inside <= by_read):
                continue  # named already
            where = ", ".join(sorted({operation.process for operation in knot}))
            yield Anomaly(kind, where, f"{len(knot)} operations in a circle")
