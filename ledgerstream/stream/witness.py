"""Rows and topics in one atomic step: what is to be done, and in which order. Pure.

A step that emits runs in one log transaction, which also carries the *witness*: the offsets up to
which outputs are in the log, kept as those of a group without members. So each side can tell what
the other has seen. The order: outputs and witness, flushed; rows and offsets in Postgres, with the
identity of the log transaction beside them; then the end of that transaction. Only the holder of a
row asks for the end that it names.

`recovery` and `step` are generators of what is to be done (`Send`, `Store`, `End`, …); whoever
drives them, `performed` or a test over a log and a database of its own, sends the answers back in.

Where it is decided what becomes of a crash: before the rows are committed the log transaction is
aborted, by the successor's own or by its time limit; after that, the successor ends it, or sends
its outputs again if it has been aborted meanwhile (the witness stands lower than the offset), in a
transaction whose identity it records first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from ledgerstream.errors import LedgerStreamError

T = TypeVar("T")
Offsets = Mapping[int, int]  # by partition


class TxnIdentity(NamedTuple):
    """What names one log transaction under Transactions V2."""

    transactional_id: str
    producer_id: int
    producer_epoch: int


@dataclass(frozen=True)
class Stored:
    """What a claimed row of `ls_progress` says.

    identity:  of the log transaction of the last step that had one.
    witness:   as its writer knew it; None until there has been one.
    """

    next_offset: int
    identity: TxnIdentity | None
    witness: int | None


# -- what is to be done


@dataclass(frozen=True)
class EndStored:
    """EndTxn(commit) of the transaction that a row names. Any answer will do."""

    identity: TxnIdentity


@dataclass(frozen=True)
class ReadWitness:
    """Answer: the witness of each of these partitions that has one, nothing open in its way; None
    if something is for too long."""

    partitions: tuple[int, ...]


@dataclass(frozen=True)
class Fence:
    """Abort what is open of this processor's transactional ids."""


@dataclass(frozen=True)
class TakeIdentity:
    """InitProducerId of our own transactional id."""


@dataclass(frozen=True)
class Lost:
    """The witness that these partitions had is gone: they stop, and somebody has to look."""

    partitions: tuple[int, ...]


@dataclass(frozen=True)
class Send:
    """Outputs of `ranges`, those that have any, and the witness, in a new transaction; flushed.

    Answer: its identity.
    """

    ranges: Mapping[int, tuple[int, int]]
    witness: Offsets


@dataclass(frozen=True)
class Store:
    """The compare-and-set of the rows, committed, with what belongs to it. Raises Overtaken.

    identity:  of the transaction that belongs to it; None leaves what is there.
    witness:   as it is known before that transaction ends.
    """

    ranges: Mapping[int, tuple[int, int]]
    identity: TxnIdentity | None
    witness: Offsets


@dataclass(frozen=True)
class Abort:
    """The transaction under way is not to be."""


@dataclass(frozen=True)
class End:
    """EndTxn(commit) of our transaction, whose rows are stored: the witness stands there now."""

    witness: Offsets


Effect = EndStored | ReadWitness | Fence | TakeIdentity | Lost | Send | Store | Abort | End


# -- in which order


def recovery(rows: Mapping[int, Stored]) -> Generator[Effect, Any, dict[int, int]]:
    """From fresh claims to partitions that may go on; the witness of each that may.

    A witness above the offset is that of a database that went back: rows up to it are made again,
    and nothing is sent for them.
    """
    for identity in sorted({row.identity for row in rows.values() if row.identity is not None}):
        yield EndStored(identity)
    yield TakeIdentity()  # first: what we had open ourselves is in nobody's way then
    while (found := (yield ReadWitness(tuple(sorted(rows))))) is None:
        yield Fence()
    lost = tuple(p for p, row in sorted(rows.items()) if p not in found and row.witness is not None)
    if lost:
        yield Lost(lost)
    rows = {p: row for p, row in rows.items() if p not in lost}
    # nothing has been stored before the first witness was there, so it begins where we do
    witness = {p: found.get(p, row.next_offset) for p, row in rows.items()}
    again = {
        p: (witness[p], row.next_offset)
        for p, row in rows.items()
        if p not in found or found[p] < row.next_offset
    }
    if again:
        stops = {p: stop for p, (_, stop) in again.items()}
        identity = yield Send(again, stops)
        nothing = {p: (stop, stop) for p, stop in stops.items()}
        before = {p: found[p] for p in again if p in found}
        yield from _stored_and_ended(Store(nothing, identity, before), stops)
        witness |= stops
        yield Store(nothing, None, stops)
    return witness


def step(
    ranges: Mapping[int, tuple[int, int]], carried: Offsets, witness: Offsets
) -> Generator[Effect, Any, None]:
    """One step. `carried`: the witness's new offsets, without which there is no log transaction."""
    identity = None
    if carried:
        identity = yield Send(ranges, carried)
    store = Store(ranges, identity, {p: witness[p] for p in ranges})
    yield from _stored_and_ended(store, carried)


def _stored_and_ended(store: Store, carried: Offsets) -> Generator[Effect, Any, None]:
    try:
        yield store
    except Exception:  # if the rows are there after all, a recovery sends their outputs again
        if store.identity is not None:
            with suppress(LedgerStreamError):  # whoever has fenced us has aborted it
                yield Abort()
        raise
    if store.identity is not None:
        yield End(carried)


async def performed(
    effects: Generator[Effect, Any, T], perform: Callable[[Effect], Awaitable[Any]]
) -> T:
    """Do one after the other; what fails is for the generator to answer, and comes out if it has no
    answer. The generator's result."""
    answer: Any = None
    error: Exception | None = None
    while True:
        try:
            effect = effects.send(answer) if error is None else effects.throw(error)
        except StopIteration as done:
            result: T = done.value
            return result
        answer = error = None
        try:
            answer = await perform(effect)
        except Exception as failed:  # noqa: BLE001 - it is raised in the generator
            error = failed


def carried(ranges: Mapping[int, tuple[int, int]], emits: bool, witness: Offsets) -> dict[int, int]:
    """The witness that a step takes along: none if nothing is emitted, and none of a partition that
    is behind the one it has."""
    if not emits:
        return {}
    return {p: stop for p, (_, stop) in ranges.items() if stop >= witness[p]}
