"""The atomic step over a log and a database that are a few lines each, with every fault they have.

Two workers drive the real `recovery` and `step`, an effect at a time. Between any two effects one
may be overtaken, crash, lose the answer to what it has done, or sleep and wake as a zombie; the log
may time a transaction out, and the database go back to an older state, which breaks each connection
to it. Always: a read_committed reader sees the outputs of the events below the witness, in order,
once each. And from wherever it stands, one healthy worker brings rows and outputs to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledgerstream.errors import LedgerStreamError, Overtaken
from ledgerstream.stream import witness
from ledgerstream.stream.witness import (
    Abort,
    Effect,
    End,
    EndStored,
    Fence,
    Lost,
    ReadWitness,
    Send,
    Store,
    Stored,
    TakeIdentity,
    TxnIdentity,
    carried,
)
from tests.txn.play import scenarios

EVENTS, PARTITIONS, WORKERS = 4, 2, 2
SILENT = {1}  # offsets of events without an output
Run = Generator[Effect, Any, Any]


class Refused(LedgerStreamError):
    """The log does not know this producer any more."""


@dataclass
class Row:
    next_offset: int = 0
    owner: int = 0
    identity: TxnIdentity | None = None
    witness: int | None = None


@dataclass
class Slot:
    """A transactional id as its coordinator has it. `open`: by partition, the outputs that its
    transaction holds, and the witness."""

    epoch: int = 0
    open: dict[int, tuple[list[int], int]] | None = None


@dataclass
class Worker:
    run: Run | None = None
    effect: Effect | None = None
    epoch: int = -1
    server: int = 0
    owner: int = 0
    at: dict[int, int] = field(default_factory=dict)  # partitions that it has claimed: next offset
    muted: dict[int, int] = field(default_factory=dict)
    witness: dict[int, int] | None = None  # once it is recovered

    def emits(self, partition: int, offset: int) -> bool:
        return offset not in SILENT and offset >= self.muted.get(partition, 0)


class World:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.rows = [Row() for _ in range(PARTITIONS)]
        self.backup: list[Row] | None = None
        self.server = self.owners = 0
        self.slots = [Slot() for _ in range(WORKERS)]
        self.seen: list[list[int]] = [[] for _ in range(PARTITIONS)]
        self.witness: dict[int, int] = {}
        self.workers = [Worker() for _ in range(WORKERS)]

    # the log

    def commit(self, number: int, epoch: int) -> bool:
        slot = self.slots[number]
        if slot.epoch != epoch or slot.open is None:
            return False
        for partition, (outputs, offset) in slot.open.items():
            self.seen[partition] += outputs
            self.witness[partition] = offset
        self.slots[number] = Slot(epoch + 1)
        return True

    def abort(self, number: int) -> None:
        self.slots[number] = Slot(self.slots[number].epoch + 1)

    def unstable(self, partitions: tuple[int, ...]) -> bool:
        return any(s.open is not None and s.open.keys() & set(partitions) for s in self.slots)

    # what a worker asks for

    def perform(self, number: int, effect: Effect) -> Any:
        me = self.workers[number]
        match effect:
            case EndStored(identity):
                self.commit(int(identity.transactional_id), identity.producer_epoch)
            case TakeIdentity():
                self.abort(number)
                me.epoch = self.slots[number].epoch
            case ReadWitness(partitions):
                if self.unstable(partitions) and self.rules.stable:
                    return None
                return {p: self.witness[p] for p in partitions if p in self.witness}
            case Fence():
                for other, slot in enumerate(self.slots):
                    if slot.open is not None:
                        self.abort(other)
            case Lost(partitions):
                raise AssertionError(f"the witness of {partitions} is said to be gone")
            case Send(ranges, offsets):
                if self.slots[number].epoch != me.epoch:
                    raise Refused("fenced")
                self.slots[number].open = {
                    p: ([o for o in range(*ranges[p]) if me.emits(p, o)], offset)
                    for p, offset in offsets.items()
                }
                return TxnIdentity(str(number), 0, me.epoch)
            case Store(ranges, identity, known):
                self._store(me, ranges, identity, known)
            case End(offsets):
                if not self.commit(number, me.epoch):
                    raise Refused("fenced")
                me.epoch += 1
                if me.witness is not None:
                    me.witness |= offsets
            case Abort():
                if self.slots[number].epoch != me.epoch:
                    raise Refused("fenced")
                self.abort(number)
                me.epoch += 1
        return None

    def _store(self, me: Worker, ranges: Any, identity: Any, known: Any) -> None:
        for p, (start, _) in ranges.items():
            row = self.rows[p]
            gone = me.server != self.server and self.rules.connection
            if gone or (row.next_offset, row.owner) != (start, me.owner):
                raise Overtaken("another has it")
        for p, (_, stop) in ranges.items():
            row = self.rows[p]
            row.next_offset = me.at[p] = stop
            row.identity = identity or row.identity
            row.witness = known.get(p, row.witness)

    # moves

    def moves(self) -> Iterator[tuple[str, Callable[[], None]]]:
        for number in range(WORKERS):
            yield from self.moves_of(number)
            if self.workers[number].run is not None or self.workers[number].at:
                yield f"{number} crashes", lambda n=number: self.crash(n)  # type: ignore[misc]
        for number, slot in enumerate(self.slots):
            if slot.open is not None:
                yield f"slot {number} times out", lambda n=number: self.abort(n)  # type: ignore[misc]
        if self.backup is None:
            yield "backup", self.backup_rows
        else:
            yield "restore", self.restore_rows

    def moves_of(self, number: int) -> Iterator[tuple[str, Callable[[], None]]]:
        me = self.workers[number]
        if me.run is not None:
            yield f"{number}: {me.effect}", lambda: self.advance(number)
            yield f"{number}: {me.effect}, reply lost", lambda: self.advance(number, lost=True)
        elif me.witness is None:
            for some in ([0], [1], [0, 1]):
                yield f"{number} claims {some}", lambda s=some: self.claim(number, s)  # type: ignore[misc]
        else:
            if any(at < EVENTS for at in me.at.values()):
                yield f"{number} steps", lambda: self.step(number, 1)
                yield f"{number} steps wide", lambda: self.step(number, 2)
            if any(me.witness[p] < at for p, at in me.at.items()):
                yield f"{number} carries", lambda: self.step(number, 0)

    def claim(self, number: int, partitions: list[int]) -> None:
        self.owners += 1
        rows = {}
        for p in partitions:
            row = self.rows[p]
            row.owner = self.owners
            rows[p] = Stored(row.next_offset, row.identity, row.witness)
        at = {p: row.next_offset for p, row in rows.items()}
        run = self.rules.recovery(rows)
        self.workers[number] = Worker(run, None, -1, self.server, self.owners, at)
        self._go_on(number, run.send, None)

    def step(self, number: int, width: int) -> None:
        me = self.workers[number]
        assert me.witness is not None
        ranges = {p: (at, min(at + width, EVENTS)) for p, at in me.at.items()}
        if width:
            ranges = {p: each for p, each in ranges.items() if each[0] < each[1]}
        emits = width == 0 or any(
            o not in SILENT and o >= me.muted.get(p, 0)
            for p, r in ranges.items()
            for o in range(*r)
        )
        if width == 0 and not self.rules.recorded:
            self.witness |= me.at
            return
        taken = carried(ranges, emits, me.witness)
        run = me.run = witness.step(ranges, taken, dict(me.witness))
        self._go_on(number, run.send, None)

    def advance(self, number: int, *, lost: bool = False) -> None:
        me = self.workers[number]
        assert me.run is not None
        assert me.effect is not None
        try:
            answer = self.perform(number, me.effect)
        except LedgerStreamError as error:
            if lost:
                self.crash(number)
            else:
                self._go_on(number, me.run.throw, error)
            return
        if lost:
            self.crash(number)
        else:
            self._go_on(number, me.run.send, answer)

    def _go_on(self, number: int, act: Callable[[Any], Effect], given: Any) -> None:
        me = self.workers[number]
        try:
            me.effect = act(given)
        except StopIteration as done:
            me.run = None
            if me.witness is None:
                me.witness = dict(done.value)
                me.muted = dict(done.value)
        except LedgerStreamError:
            self.crash(number)

    def crash(self, number: int) -> None:
        self.workers[number] = Worker()

    def backup_rows(self) -> None:
        self.backup = deepcopy(self.rows)

    def restore_rows(self) -> None:
        assert self.backup is not None
        self.rows, self.backup = self.backup, None
        self.server += 1

    # what holds

    def check(self) -> None:
        for p in range(PARTITIONS):
            wanted = [o for o in range(self.witness.get(p, 0)) if o not in SILENT]
            assert self.seen[p] == wanted, (p, self.seen[p], self.witness.get(p))

    def finish(self) -> None:
        """One healthy worker, from a fresh start, while the other sleeps."""
        self.crash(1)
        self.claim(1, list(range(PARTITIONS)))
        for _ in range(100):
            me = self.workers[1]
            if me.run is not None:
                self.advance(1)
            elif me.witness is None:
                self.claim(1, list(range(PARTITIONS)))
            elif any(at < EVENTS for at in me.at.values()):
                self.step(1, 1)
            elif any(me.witness[p] < EVENTS for p in me.at):
                self.step(1, 0)
            else:
                break
            self.check()
        assert [row.next_offset for row in self.rows] == [EVENTS] * PARTITIONS
        assert self.witness == dict.fromkeys(range(PARTITIONS), EVENTS)


@dataclass
class Rules:
    """What keeps the promise; a test drops one of them."""

    stable: bool = True  # the witness is read when nothing open holds it
    connection: bool = True  # a claim ends with its database connection
    recorded: bool = True  # the witness moves in recorded transactions only
    recovery: Callable[[dict[int, Stored]], Run] = witness.recovery


def walk(choices: Iterator[int], rules: Rules, steps: int) -> list[str]:
    """Play moves by number; what was played. AssertionError where a promise is broken."""
    world, played = World(rules), []
    for _ in range(steps):
        choice = next(choices, None)
        if choice is None:
            break
        options = list(world.moves())
        # what a healthy worker does next is played more often than what goes wrong
        options += [each for each in options if each[0].endswith((")", "steps")) for _ in range(3)]
        name, act = options[choice % len(options)]
        played.append(name)
        act()
        world.check()
    world.finish()
    return played


@given(st.lists(st.integers(0, 10_000), max_size=100))
def test_every_event_is_sent_once_whatever_happens(choices: list[int]) -> None:
    walk(iter(choices), Rules(), 100)


@pytest.mark.torture
@settings(max_examples=20_000)
@given(st.lists(st.integers(0, 10_000), min_size=40, max_size=200))
def test_twenty_thousand_histories(choices: list[int]) -> None:
    walk(iter(choices), Rules(), 200)


def without_again(rows: dict[int, Stored]) -> Run:
    """Trusts the end of what is stored: what was lost with an aborted transaction stays lost."""
    run = witness.recovery(rows)
    answer = None
    while True:
        try:
            effect = run.send(answer)
        except StopIteration as done:
            return done.value
        answer = yield effect
        if isinstance(effect, ReadWitness) and answer is not None:
            answer = {p: rows[p].next_offset for p in rows if rows[p].identity or p in answer}


def without_record(rows: dict[int, Stored]) -> Run:
    """Ends what it sent again without having recorded it in the rows."""
    run = witness.recovery(rows)
    answer = None
    while True:
        try:
            effect = run.send(answer)
        except StopIteration as done:
            return done.value
        answer = None if isinstance(effect, Store) else (yield effect)


SCENARIOS = dict(scenarios(Path(__file__).parents[1] / "scenarios" / "atomic.txt"))
WITHOUT = dict(
    zip(
        SCENARIOS,
        [Rules(stable=False), Rules(connection=False), Rules(recovery=without_again),
         Rules(recovery=without_record), Rules(recorded=False)],
        strict=True,
    )
)  # fmt: skip


def play(world: World, lines: list[str]) -> None:
    for line in lines:
        verb, *words = line.split()
        numbers = [int(word) for word in words]
        match verb:
            case "claim":
                world.claim(numbers[0], numbers[1:])
            case "recover":
                while world.workers[numbers[0]].run is not None:
                    world.advance(numbers[0])
            case "step":
                world.step(*numbers)
            case "go" | "lose":
                if world.workers[numbers[0]].run is not None:  # or it has been fenced meanwhile
                    world.advance(numbers[0], lost=verb == "lose")
            case "time-out":
                world.abort(numbers[0])
            case "backup":
                world.backup_rows()
            case "restore":
                world.restore_rows()
        world.check()
    world.finish()


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_shortest_run_against_each_rule(name: str) -> None:
    play(World(Rules()), SCENARIOS[name])


@pytest.mark.parametrize("name", SCENARIOS)
def test_without_the_rule_that_run_breaks_the_promise(name: str) -> None:
    with pytest.raises(AssertionError):
        play(World(WITHOUT[name]), SCENARIOS[name])
