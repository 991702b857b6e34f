"""The transaction coordinator: scenarios as text, epochs that run out, and any history at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kio.schema.errors import ErrorCode

from ledgerstream.machine import Decision
from ledgerstream.txn import Coordinator, Ended, Txn, TxnCodec, TxnState
from ledgerstream.txn.coordinator import V1, V2
from ledgerstream.txn.moves import AT_REST, MOVES
from ledgerstream.txn.records import EPOCH_LAST, EPOCH_MAX
from tests.txn import play

SCENARIOS = dict(play.scenarios(Path(__file__).parents[1] / "scenarios" / "transactions.txt"))
PART = ("a", 0)


@pytest.mark.parametrize("title", SCENARIOS)
def test_scenario(title: str) -> None:
    play.run(SCENARIOS[title])


def test_the_moves_are_kafkas() -> None:
    """Item 43."""
    before = {after: {b for b, a in MOVES if a is after} for _, after in MOVES}
    at_rest = set(AT_REST)
    assert before[TxnState.EMPTY] == at_rest | {None}
    assert before[TxnState.ONGOING] == at_rest | {TxnState.ONGOING}
    assert before[TxnState.PREPARE_COMMIT] == {TxnState.ONGOING}
    assert before[TxnState.PREPARE_ABORT] == at_rest | {TxnState.ONGOING}
    assert before[TxnState.COMPLETE_COMMIT] == {TxnState.PREPARE_COMMIT}
    assert before[TxnState.COMPLETE_ABORT] == {TxnState.PREPARE_ABORT}
    assert before[None] == at_rest


def at_epoch(epoch: int, **how: Any) -> Coordinator:
    machine = Coordinator()
    machine.replay(Txn("t", 7, epoch, **how))
    return machine


def ongoing(epoch: int, **how: Any) -> Coordinator:
    return at_epoch(
        epoch, state=TxnState.ONGOING, partitions=frozenset({PART}), started_ms=0, **how
    )


def perform(machine: Coordinator, decision: Decision[Any, Any]) -> Any:
    for record in decision.records:
        machine.replay(record)
    return decision.reply


def complete(machine: Coordinator) -> Txn:
    """Markers durable; the transaction as it was while it ended."""
    txn = machine.txns["t"]
    assert perform(machine, machine.decide_complete("t", txn.producer_id, txn.producer_epoch, 1))
    return txn


def test_init_with_the_last_epoch_takes_a_new_id_and_knows_the_old_one() -> None:
    """Items 37, 38."""
    machine = at_epoch(EPOCH_LAST - 1)
    reply = perform(machine, machine.decide_init("t", 1, 0))
    assert (reply.producer_id, reply.producer_epoch) == (7, EPOCH_LAST)
    given = (7, EPOCH_LAST)
    asked = machine.decide_init("t", 1, 0, expected=given)
    assert asked.reply.needs_id and not asked.records
    reply = perform(machine, machine.decide_init("t", 1, 0, expected=given, new_id=8))
    assert (reply.error, reply.producer_id, reply.producer_epoch) == (ErrorCode.none, 8, 0)
    again = perform(machine, machine.decide_init("t", 1, 0, expected=given))
    assert (again.error, again.producer_id, again.producer_epoch) == (ErrorCode.none, 8, 0)
    fenced = perform(machine, machine.decide_init("t", 1, 0, expected=(7, 3)))
    assert fenced.error is ErrorCode.producer_fenced


def test_v2_goes_on_under_a_new_id_after_the_last_epoch() -> None:
    """Item 54: markers carry the epoch that is kept back, and no client ever has it."""
    machine = ongoing(EPOCH_LAST)
    end = {"committed": True, "version": V2}
    asked = machine.decide_end("t", 7, EPOCH_LAST, 0, **end)
    assert asked.reply.needs_id and not asked.records
    reply = perform(machine, machine.decide_end("t", 7, EPOCH_LAST, 0, **end, new_id=8))
    assert reply == Ended(ErrorCode.none, 8, 0, ending=True)
    waiting = perform(machine, machine.decide_add("t", 8, 0, [PART], 0, V2))
    assert waiting is ErrorCode.concurrent_transactions
    marked = complete(machine)
    assert (marked.producer_id, marked.producer_epoch) == (7, EPOCH_MAX)
    repeat = perform(machine, machine.decide_end("t", 7, EPOCH_LAST, 0, **end))
    assert (repeat.error, repeat.producer_id, repeat.producer_epoch) == (ErrorCode.none, 8, 0)
    opposite = machine.decide_end("t", 7, EPOCH_LAST, 0, committed=False, version=V2)
    assert opposite.reply.error is ErrorCode.invalid_txn_state
    assert perform(machine, machine.decide_add("t", 8, 0, [PART], 0, V2)) is ErrorCode.none


@pytest.mark.parametrize("by", ["timeout", "init"])
def test_a_fence_at_the_last_epoch_rotates_the_id(by: str) -> None:
    """Bugs 5 and 6: no epoch goes negative, nothing stays open, a delayed end finds its answer."""
    machine = ongoing(EPOCH_LAST, timeout_ms=10)

    def fence(new_id: int | None = None) -> Decision[Any, Any]:
        if by == "timeout":
            return machine.decide_timeout("t", 99, new_id)
        return machine.decide_init("t", 1, 99, new_id=new_id)

    assert fence().reply.needs_id
    perform(machine, fence(8))
    marked = complete(machine)
    assert (marked.producer_epoch, marked.state) == (EPOCH_MAX, TxnState.PREPARE_ABORT)
    assert machine.txns["t"][1:4] == (8, 0, TxnState.COMPLETE_ABORT)
    late = perform(machine, machine.decide_end("t", 7, EPOCH_LAST, 0, committed=False, version=V2))
    assert late.error is ErrorCode.none
    wrong = machine.decide_end("t", 7, EPOCH_LAST, 0, committed=True, version=V2)
    assert wrong.reply.error is ErrorCode.invalid_txn_state


def test_a_fence_bumps_the_epoch_once() -> None:
    """Bug 5."""
    machine = ongoing(4, timeout_ms=10)
    perform(machine, machine.decide_timeout("t", 99))
    complete(machine)
    assert machine.txns["t"].producer_epoch == 5


def test_a_timeout_looks_again_before_it_acts() -> None:
    machine = ongoing(4, timeout_ms=10)
    perform(machine, machine.decide_end("t", 7, 4, 0, committed=True))
    assert machine.decide_timeout("t", 99).records == ()


def test_what_is_found_prepared_at_the_last_epoch_is_ended_by_a_new_id() -> None:
    """Items 114, 116, where epochs run out on the way."""
    machine = ongoing(EPOCH_LAST, timeout_ms=2**31 - 1)
    how = {"two_phase": True, "keep_prepared": True}
    assert machine.decide_init("t", 1, 0, **how).reply.needs_id
    found = perform(machine, machine.decide_init("t", 1, 0, **how, new_id=8))
    assert found[1:5] == (8, 0, 7, EPOCH_LAST)
    again = perform(machine, machine.decide_init("t", 1, 0, **how))
    assert again[1:5] == (8, 1, 7, EPOCH_LAST)
    for who in ((7, EPOCH_LAST), (8, 0)):
        refused = machine.decide_end("t", *who, 0, committed=True, version=V2)
        assert refused.reply.error is ErrorCode.producer_fenced
    ended = perform(machine, machine.decide_end("t", 8, 1, 0, committed=True, version=V2))
    assert ended[:3] == (ErrorCode.none, 8, 2)
    marked = complete(machine)
    assert (marked.producer_id, marked.producer_epoch) == (7, EPOCH_MAX)
    repeat = perform(machine, machine.decide_end("t", 8, 1, 0, committed=True, version=V2))
    assert repeat[:3] == (ErrorCode.none, 8, 2)


class CoordinatorEqualsItsModel(RuleBasedStateMachine):
    """Any requests, in any order, with crashes: a transaction is decided once, an identity is
    handed out once, and live state is replayed state."""

    @initialize()
    def start(self) -> None:
        self.machine, self.codec = Coordinator(), TxnCodec()
        self.log: dict[bytes, bytes | None] = {}
        self.now_ms, self.next_id = 0, 100
        self.handed: list[tuple[int, int]] = [(1, 0)]  # identities that clients have been given
        self.decided: dict[tuple[int, int], TxnState] = {}  # by the markers' identity
        self.current: tuple[int, int] | None = None

    def perform(self, decision: Decision[Any, Any]) -> Any:
        for record in decision.records:
            key, value = self.codec.encode(record)
            self.log[key] = value
            self.machine.replay(record)
            if isinstance(record, Txn) and record.state.ending:
                who = record.producer_id, record.producer_epoch
                version_1 = record.version == V1
                if version_1:  # an epoch serves many transactions: they end one after the other
                    self.decided.pop(who, None)
                assert who not in self.decided
                self.decided[who] = record.state
        return decision.reply

    def ask(self, decide: Any) -> Any:
        decision = decide(None)
        if getattr(decision.reply, "needs_id", False):
            self.next_id += 1
            decision = decide(self.next_id)
        return self.perform(decision)

    def hand(self, reply: Any, *, repeat: bool) -> None:
        if reply.error is ErrorCode.none:
            who = reply.producer_id, reply.producer_epoch
            assert 0 <= who[1] <= EPOCH_LAST
            assert repeat or who not in self.handed, who
            if who not in self.handed:
                self.handed.append(who)
            self.current = who

    @rule(which=st.integers(-1, 3), two_phase=st.booleans(), keep=st.booleans())
    def init(self, which: int, two_phase: bool, keep: bool) -> None:
        expected = None if which < 0 else self.handed[-1 - which % len(self.handed)]
        reply = self.ask(lambda new_id: self.machine.decide_init(
            "t", 50, self.now_ms, expected=expected, two_phase=two_phase,
            keep_prepared=two_phase and keep, new_id=new_id,
        ))  # fmt: skip
        self.hand(reply, repeat=expected is not None)

    @rule()
    def epochs_are_nearly_used_up(self) -> None:
        txn = self.machine.txns.get("t")
        if txn is not None and txn.state in AT_REST and txn.producer_epoch < EPOCH_LAST - 2:
            self.perform(Decision((txn._replace(producer_epoch=EPOCH_LAST - 2, last_epoch=-1),), 0))
            self.handed.append((txn.producer_id, EPOCH_LAST - 2))

    @rule(which=st.integers(0, 2), partition=st.integers(0, 2), version=st.sampled_from([V1, V2]))
    def add(self, which: int, partition: int, version: int) -> None:
        who = self.handed[-1 - which % len(self.handed)]
        before = self.machine.txns.get("t")
        error = self.perform(
            self.machine.decide_add("t", *who, [("a", partition)], self.now_ms, version)
        )
        if error is ErrorCode.none:
            assert before is not None and who == before.client
            assert ("a", partition) in self.machine.txns["t"].partitions

    @rule(which=st.integers(0, 3), committed=st.booleans(), version=st.sampled_from([V1, V2]))
    def end(self, which: int, committed: bool, version: int) -> None:
        who = self.handed[-1 - which % len(self.handed)]
        before = self.machine.txns.get("t")
        reply = self.ask(lambda new_id: self.machine.decide_end(
            "t", *who, self.now_ms, committed=committed, version=version, new_id=new_id
        ))  # fmt: skip
        if before is not None and before.state is TxnState.ONGOING:
            assert (reply.error is ErrorCode.none) is (who == before.client)
        if reply.error is ErrorCode.none and version == V2:
            self.hand(reply, repeat=not reply.ending)

    @rule()
    def markers_are_durable(self) -> None:
        for txn in list(self.machine.ending()):
            assert self.perform(self.machine.decide_complete(
                "t", txn.producer_id, txn.producer_epoch, self.now_ms
            ))  # fmt: skip
            after = self.machine.txns["t"]
            wanted = self.decided[txn.producer_id, txn.producer_epoch]
            assert (after.state is TxnState.COMPLETE_COMMIT) is (wanted is TxnState.PREPARE_COMMIT)

    @rule(passed=st.sampled_from([10, 60]))
    def time_passes(self, passed: int) -> None:
        self.now_ms += passed
        for txn_id in self.machine.overdue(self.now_ms):
            self.ask(lambda new_id, one=txn_id: self.machine.decide_timeout(
                one, self.now_ms, new_id
            ))  # fmt: skip

    @rule()
    def crash(self) -> None:
        self.machine = self.replayed()

    def replayed(self) -> Coordinator:
        return play.replayed(self.log)

    @invariant()
    def live_state_is_replayed_state(self) -> None:
        assert self.replayed().txns == self.machine.txns

    @invariant()
    def only_an_open_or_ending_transaction_has_partitions(self) -> None:
        for txn in self.machine.txns.values():
            assert not (txn.partitions and txn.state in AT_REST)
            assert txn.producer_epoch <= (EPOCH_MAX if txn.state.ending else EPOCH_LAST)


TestCoordinatorEqualsItsModel = CoordinatorEqualsItsModel.TestCase
TestCoordinatorEqualsItsModel.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_five_thousand_histories() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        CoordinatorEqualsItsModel,
        settings=settings(
            max_examples=5_000, stateful_step_count=60, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
