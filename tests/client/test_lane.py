"""A lane against a broker that keeps producers as ours does, whatever befalls its requests."""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from kio.schema.errors import ErrorCode

from ledgerstream.client.errors import kafka_error
from ledgerstream.client.lane import EPOCH_MAX, SEQUENCES, Lane, Pending
from ledgerstream.errors import DeliveryTimeout, KafkaError
from ledgerstream.log.producers import Producers
from ledgerstream.log.verdicts import New, Repeat
from ledgerstream.wire.batches import Header

IN_FLIGHT_MAX = 5


class Model:
    """One partition of a broker, a lane, and the requests between them, in order."""

    def __init__(self, first_sequence: int = 0) -> None:
        self.producers = Producers()
        self.log: list[int] = []  # batch numbers, in the order they were appended
        self.lane = Lane("t", 0, identity=(7, 0), next_sequence=first_sequence)
        self.under_way: deque[tuple[Pending, Header, int]] = deque()
        self.late: list[tuple[Header, int]] = []
        self.outcomes: dict[int, Any] = {}
        self.offset = 0
        self.now = 0.0
        self.written = 0

    def write(self, count: int) -> None:
        number = self.written
        self.written += 1

        def settle(outcome: int | Exception) -> None:
            assert number not in self.outcomes, "settled twice"
            self.outcomes[number] = outcome

        self.lane.waiting.append(Pending(b"%d" % number, count, 0, 0, 0, self.now + 100, settle))

    def send(self) -> None:
        while self.lane.ready(self.now, IN_FLIGHT_MAX):
            pending = self.lane.take()
            assert self.lane.identity is not None
            producer_id, epoch = self.lane.identity
            header = Header(
                0, 0, 0, 2, 0, 0, pending.count - 1, 0, 0, producer_id, epoch,
                pending.sequence, pending.count,
            )  # fmt: skip
            self.under_way.append((pending, header, int(bytes(pending.body))))

    def append(self, header: Header, number: int) -> tuple[ErrorCode, int]:
        verdict = self.producers.check(header)
        if isinstance(verdict, Repeat):
            return ErrorCode.none, verdict.base_offset
        if not isinstance(verdict, New):
            return verdict.code, -1
        base, self.offset = self.offset, self.offset + header.record_count
        self.producers.replay(header, base, 0)
        self.log.append(number)
        return ErrorCode.none, base

    def answer(self, fate: str, order: int) -> None:
        """A request reaches the broker (or not), and its reply the lane (or not).

        `order`: how far from the front; 0 is the oldest. "late": the lane gives up on it, and it
        reaches the broker some time afterwards.
        """
        place = order % len(self.under_way)
        pending, header, number = self.under_way[place]
        del self.under_way[place]
        if fate == "never sent":
            self.lane.unsent(pending, "no connection")
        elif fate == "lost":
            self.lane.unanswered(pending, "cut before")
        elif fate == "late":
            self.late.append((header, number))
            self.lane.unanswered(pending, "half open")
        elif fate == "reply lost":
            self.append(header, number)
            self.lane.unanswered(pending, "cut after")
        elif fate in ("not_leader_or_follower", "message_too_large"):
            self.refuse(pending, ErrorCode[fate])
        else:
            code, offset = self.append(header, number)
            if code is ErrorCode.none:
                self.lane.delivered(pending, offset)
            else:
                self.refuse(pending, code)
        self.check_limits()

    def refuse(self, pending: Pending, code: ErrorCode) -> None:
        self.lane.refused(pending, code, kafka_error(code, "a batch"))

    def check_limits(self) -> None:
        assert len(self.lane.sent) <= IN_FLIGHT_MAX
        if not self.under_way:
            assert not self.lane.sent  # nobody is forgotten

    def finish(self) -> None:
        """The network is well again."""
        for _ in range(10_000):
            self.send()
            if not self.under_way:
                break
            self.answer("answered", 0)
        assert not self.lane.waiting
        while self.late:
            self.append(*self.late.pop(0))

    def check(self) -> None:
        """AcknowledgedIsThereOnceAndInOrder."""
        assert len(self.outcomes) == self.written
        assert len(self.log) == len(set(self.log)), "doubled"
        assert self.log == sorted(self.log), "out of order"
        for number, outcome in self.outcomes.items():
            if isinstance(outcome, int):
                assert number in self.log
            elif "are not in the log" in str(outcome):
                assert number not in self.log


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 3)),
        st.tuples(st.just("send"), st.just(0)),
        st.tuples(
            st.sampled_from([
                "answered", "answered", "never sent", "lost", "late", "reply lost",
                "not_leader_or_follower", "message_too_large",
            ]),
            st.integers(0, 4),
        ),
        st.tuples(st.just("arrives"), st.just(0)),
        st.tuples(st.just("time"), st.sampled_from([1, 60, 120])),
    ),
    max_size=80,
)  # fmt: skip


@settings(max_examples=1_500, deadline=None)
@given(STEPS, st.sampled_from([0, SEQUENCES - 4]))
def test_acknowledged_batches_are_in_the_log_once_and_in_order(
    steps: list[tuple[str, int]], first_sequence: int
) -> None:
    model = Model(first_sequence)
    for what, amount in steps:
        if what == "write":
            model.write(amount)
        elif what == "send":
            model.send()
        elif what == "time":
            model.now += amount
            model.lane.expire(model.now, 100_000)
        elif what == "arrives":
            if model.late:
                model.append(*model.late.pop(0))
        elif model.under_way:
            model.answer(what, amount)
    model.finish()
    model.check()


def test_until_the_first_batch_is_there_no_second_may_overtake_it() -> None:
    model = Model()
    for _ in range(10):
        model.write(1)
    model.send()
    assert len(model.under_way) == 1
    model.answer("answered", 0)
    model.send()
    assert len(model.under_way) == IN_FLIGHT_MAX


def test_batches_behind_one_refused_for_good_go_on_under_the_next_epoch() -> None:
    model = Model()
    for _ in range(6):
        model.write(2)
    model.send()
    model.answer("answered", 0)
    model.send()
    model.answer("message_too_large", 0)
    model.finish()
    model.check()
    assert model.lane.identity == (7, 1)
    assert model.log == [0, 2, 3, 4, 5]
    assert isinstance(model.outcomes[1], KafkaError)


def test_what_may_be_in_the_log_is_never_sent_under_another_identity() -> None:
    model = Model()
    for _ in range(4):
        model.write(1)
    model.send()
    model.answer("answered", 0)
    model.send()
    model.answer("not_leader_or_follower", 0)
    model.answer("reply lost", 0)
    model.answer("never sent", 0)
    model.now = 101
    model.lane.expire(model.now, 100_000)
    assert isinstance(model.outcomes[2], DeliveryTimeout)
    assert "may or may not be in the log" in str(model.outcomes[2])
    assert "are not in the log" in str(model.outcomes[3])
    model.write(1)
    model.finish()
    model.check()
    assert isinstance(model.outcomes[4], int)  # no gap was left behind


def test_what_may_be_in_the_log_is_given_up_with_what_expires_before_it() -> None:
    model = Model()
    model.write(1)
    model.send()
    model.answer("answered", 0)
    for _ in range(3):
        model.write(1)
        model.now += 10
    model.send()
    model.answer("reply lost", 0)
    model.answer("reply lost", 0)
    model.answer("never sent", 0)
    model.now = 105  # the first of the three is too old
    model.lane.expire(model.now, 100_000)
    assert isinstance(model.outcomes[1], DeliveryTimeout)
    assert "given up" in str(model.outcomes[2])
    model.finish()
    model.check()
    assert model.log == [0, 1, 2, 3]


def test_the_last_epoch_of_an_id_is_followed_by_another_id() -> None:
    model = Model()
    model.lane.identity = (7, EPOCH_MAX)
    model.write(1)
    model.send()
    model.answer("message_too_large", 0)
    assert model.lane.identity is None
    assert model.lane.spent_id == 7
