"""The group coordinator: scenarios as text, the moves, many members, any history at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from kio.schema.errors import ErrorCode

from ledgerstream.groups import (
    MOVES,
    Committing,
    GroupCoordinator,
    Join,
    Joined,
    Phase,
    Sync,
    Synced,
    Wish,
)
from ledgerstream.machine import Decision
from ledgerstream.wire.markers import Marker
from tests.groups import play
from tests.groups.members import FakeTopics

RULES = play.RULES._replace(new_member_ms=500)
PROTOCOLS = (("range", b"\x00\x00\x00\x00\x00\x00"),)

SCENARIOS = dict(play.scenarios(Path(__file__).parents[1] / "scenarios" / "groups.txt"))


@pytest.mark.parametrize("title", SCENARIOS)
def test_scenario(title: str) -> None:
    play.run(SCENARIOS[title])


def test_the_moves_are_kafkas() -> None:
    before = {after: {b for b, a in MOVES if a is after} for _, after in MOVES}
    at_work = {Phase.STABLE, Phase.COMPLETING, Phase.EMPTY}
    assert before[Phase.PREPARING] == at_work
    assert before[Phase.COMPLETING] == {Phase.PREPARING}
    assert before[Phase.STABLE] == {Phase.COMPLETING, Phase.STABLE}
    assert before[Phase.EMPTY] == {Phase.PREPARING}
    assert before[Phase.DEAD] == {Phase.EMPTY}


def grown(members: int) -> play.Play:
    """A group of so many, that are all there."""
    many = play.Play(play.RULES._replace(members_max=members, metadata_bytes_max=2**24))
    for n in range(members):
        ask = Join("", f"m{n}", None, "c", "/h", 10_000, 60_000, "consumer", PROTOCOLS, False)
        many.perform(many.machine.decide_join("g", ask, n, 0, 0))
    told: tuple[Any, ...] = ()
    while not told:  # more came while it waited for more
        told = many.perform(many.machine.decide_tick(0, 0))
    assert len(told) == members
    return many


def test_a_thousand_members_cost_a_thousand_times_one() -> None:
    """Steps of the interpreter, counted: joining, syncing and beating are not quadratic."""

    def steps(members: int) -> int:
        count = 0

        def step(*_: object) -> object:
            nonlocal count
            count += 1
            return step

        before = sys.gettrace()
        sys.settrace(step)
        try:
            many = grown(members)
            plan = tuple((f"m{n}", b"a") for n in range(members))
            for n in reversed(range(members)):
                asked = Sync(f"m{n}", 1, assignments=plan if n == 0 else ())
                many.perform(many.machine.decide_sync("g", asked, n, 0, 0))
            for n in range(members):
                assert many.machine.heartbeat("g", f"m{n}", None, 1, 5) is ErrorCode.none
        finally:
            sys.settrace(before)
        return count

    assert steps(400) < 5 * steps(100)


class GroupsEqualTheirModel(RuleBasedStateMachine):
    """Any requests of any clients in any order, with deadlines, transactions and crashes.

    Items 94 to 99, 101 and 102. Live state is replayed state, of a compacted log as well; a request
    has one answer, in time; a generation has one leader; offsets are what a plain dict says.
    """

    @initialize()
    def start(self) -> None:
        self.machine = GroupCoordinator(FakeTopics(), RULES)
        self.log = play.Log()
        self.now_ms = self.made = 0
        self.parked: set[int] = set()
        self.answered: set[int] = set()
        self.known: list[tuple[str, int]] = [("nobody", 1)]  # member ids and generations, as told
        self.leaders: dict[int, str] = {}  # by generation, of this life
        self.given: dict[tuple[int, str], bytes] = {}
        self.offsets: dict[int, int] = {}
        self.staged: dict[int, dict[int, int]] = {}
        self.staged_at: dict[tuple[int, int], int] = {}
        self.committed_at: dict[int, int] = {}
        self.phase = Phase.EMPTY

    def perform(self, decision: Decision[Any, Any], producer_id: int = -1) -> Any:
        for record in decision.records:
            self.machine.replay(record, self.log.append(record, producer_id))
        return decision.reply

    def told(self, told: Any) -> None:
        for ticket, reply in told:
            assert ticket not in self.answered, "answered twice"
            self.answered.add(ticket)
            self.parked.discard(ticket)
            if reply.error is not ErrorCode.none:
                continue
            if isinstance(reply, Joined):
                self.known.append((reply.member_id, reply.generation))
                if not reply.skip_assignment and reply.members:
                    before = self.leaders.setdefault(reply.generation, reply.leader)
                    assert before == reply.leader

    @property
    def ticket(self) -> int:
        self.made += 1
        self.parked.add(self.made)
        return self.made

    def who(self, which: int) -> tuple[str, int]:
        return self.known[-1 - which % len(self.known)]

    @rule(
        which=st.integers(-1, 4), static=st.sampled_from([None, None, "i", "j"]),
        can=st.sampled_from(["a", "ab", "ba"]), old=st.booleans(),
        session=st.sampled_from([50, 90]), rebalance=st.sampled_from([100, 150]),
    )  # fmt: skip
    def join(
        self, which: int, static: str | None, can: str, old: bool, session: int, rebalance: int
    ) -> None:
        member_id = "" if which < 0 else self.who(which)[0]
        ticket = self.ticket
        asked = Join(
            member_id, f"m{ticket}", static, "c", "/h", session, rebalance, "consumer",
            tuple((name, b"sub") for name in can), not old, not old,
        )  # fmt: skip
        decision = self.machine.decide_join("g", asked, ticket, self.now_ms, self.now_ms)
        for _, reply in decision.reply:
            if isinstance(reply, Joined) and reply.error is ErrorCode.member_id_required:
                self.known.append((reply.member_id, -1))
        self.told(self.perform(decision))

    @rule(which=st.integers(0, 4), static=st.sampled_from([None, None, "i"]))
    def sync(self, which: int, static: str | None) -> None:
        member_id, generation = self.who(which)
        ticket = self.ticket
        plan = tuple((one, b"%d" % generation) for one, _ in self.known)
        asked = Sync(member_id, generation, static, assignments=plan)
        decision = self.machine.decide_sync("g", asked, ticket, self.now_ms, self.now_ms)
        for _, reply in decision.reply:
            if isinstance(reply, Synced) and reply.error is ErrorCode.none:
                assert reply.assignment in (b"%d" % generation, b"")
        self.told(self.perform(decision))

    @rule(which=st.integers(0, 4), static=st.sampled_from([None, None, "i"]))
    def beat(self, which: int, static: str | None) -> None:
        member_id, generation = self.who(which)
        error = self.machine.heartbeat("g", member_id, static, generation, self.now_ms)
        group = self.machine.classic("g")
        if error is ErrorCode.none:
            assert group is not None and group.generation == generation
            assert group.phase in (Phase.STABLE, Phase.COMPLETING)

    @rule(which=st.integers(0, 4), static=st.sampled_from([None, None, "i"]))
    def leave(self, which: int, static: str | None) -> None:
        leaving = [(self.who(which)[0], None)] if static is None else [("", static)]
        decision = self.machine.decide_leave("g", leaving, self.now_ms, self.now_ms)
        _, told = self.perform(decision)
        self.told(told)

    @rule(passed=st.sampled_from([1, 40, 200]))
    def time_passes(self, passed: int) -> None:
        until = self.now_ms + passed
        while (next_ms := self.machine.next_ms) is not None and next_ms <= until:
            self.now_ms = max(next_ms, self.now_ms)
            self.told(self.perform(self.machine.decide_tick(self.now_ms, self.now_ms)))
            self.moved()
        self.now_ms = until

    @rule(partition=st.integers(0, 2), which=st.integers(-1, 3), txn=st.sampled_from([-1, 7, 8]))
    def commit(self, partition: int, which: int, txn: int) -> None:
        member_id, generation = ("", -1) if which < 0 else self.who(which)
        offset = self.made + 1000 * partition
        self.made += 1
        decision = self.machine.decide_commit(
            "g", Committing(member_id, None, generation), [Wish("t", partition, offset)],
            self.now_ms, self.now_ms, in_transaction=txn >= 0,
        )  # fmt: skip
        at = len(self.log.entries)
        found = self.perform(decision, txn)
        if found != (ErrorCode.none,):
            assert decision.records == ()
        elif txn < 0:
            self.offsets[partition], self.committed_at[partition] = offset, at
        else:
            self.staged.setdefault(txn, {})[partition] = offset
            self.staged_at[txn, partition] = at

    @rule(txn=st.sampled_from([7, 8]), committed=st.booleans())
    def end(self, txn: int, committed: bool) -> None:
        origin = self.log.mark(txn, committed)
        self.machine.end(Marker(txn, 0, 0, committed), origin.offset)
        for partition, offset in self.staged.pop(txn, {}).items():
            at = self.staged_at[txn, partition]
            if committed and at > self.committed_at.get(partition, -1):
                self.offsets[partition], self.committed_at[partition] = offset, at

    @rule(partition=st.integers(0, 2))
    def forget(self, partition: int) -> None:
        found = self.perform(self.machine.decide_forget_offsets("g", [("t", partition)]))
        if found == (ErrorCode.none,):
            self.forgotten(partition)

    @rule()
    def topic_is_deleted(self) -> None:
        self.perform(self.machine.decide_forget_partitions("t", range(3)))
        for partition in range(3):
            self.forgotten(partition)

    @rule()
    def group_is_deleted(self) -> None:
        if self.perform(self.machine.decide_delete("g")) is ErrorCode.none:
            for partition in range(3):
                self.forgotten(partition)
            self.leaders.clear()
            self.phase = Phase.EMPTY

    def forgotten(self, partition: int) -> None:
        self.offsets.pop(partition, None)
        for staged in self.staged.values():
            staged.pop(partition, None)

    @rule()
    def crash(self) -> None:
        self.parked.clear()  # their connections are gone
        self.machine = self.log.replayed(RULES)
        self.machine.start(self.now_ms)
        self.leaders.clear()
        group = self.machine.classic("g")
        self.phase = Phase.EMPTY if group is None else group.phase
        assert self.phase in (Phase.EMPTY, Phase.STABLE)

    def moved(self) -> None:
        group = self.machine.classic("g")
        after = Phase.EMPTY if group is None else group.phase
        if after is not self.phase:
            steps = {(self.phase, after)} | {
                (self.phase, by) for by in Phase if (self.phase, by) in MOVES
                and reachable(by, after)
            }  # fmt: skip
            assert steps & MOVES, (self.phase, after)
            self.phase = after

    @invariant()
    def live_state_is_replayed_state(self) -> None:
        replayed = self.log.replayed(RULES)
        assert play.remembered(replayed) == play.remembered(self.machine)
        compacted = self.log.compacted().replayed(RULES)
        assert play.remembered(compacted) == play.remembered(self.machine)
        self.moved()

    @invariant()
    def who_is_parked_will_be_answered(self) -> None:
        assert set(self.machine.parked()) == self.parked
        assert not self.parked or self.machine.next_ms is not None

    @invariant()
    def counts_are_true(self) -> None:
        group = self.machine.classic("g")
        if group is not None:
            group.check()

    @invariant()
    def offsets_are_the_models(self) -> None:
        found = self.machine.fetch("g", [("t", p) for p in range(3)], stable=True)
        assert not isinstance(found, ErrorCode)
        for one in found:
            staged = any(one.partition in places for places in self.staged.values())
            assert (one.error is ErrorCode.unstable_offset_commit) is staged
            if not staged:
                assert one.offset == self.offsets.get(one.partition, -1)


def reachable(before: Phase, after: Phase) -> bool:
    """One step may do several moves at once: all have joined already, and so on."""
    return before is after or any((before, by) in MOVES and by is after for by in Phase)


TestGroupsEqualTheirModel = GroupsEqualTheirModel.TestCase
TestGroupsEqualTheirModel.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_five_thousand_histories() -> None:
    run_state_machine_as_test(
        GroupsEqualTheirModel,
        settings=settings(
            max_examples=5_000, stateful_step_count=60, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
