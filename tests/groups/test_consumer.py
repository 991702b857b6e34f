"""Next-generation groups: any order of joins, heartbeats, lost answers and deaths."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kio.schema.errors import ErrorCode

from ledgerstream.groups.consumer import Beat, ConsumerRules
from ledgerstream.groups.consumerrecords import NOTHING, MemberState
from tests.groups.members import Client, FakeTopics, Host, remembered

TOPICS = frozenset({"t"})
T = UUID(int=1)  # the first topic of the catalogue


@pytest.fixture
def host() -> Host:
    topics = FakeTopics()
    topics.make("t", 4)
    return Host(topics)


def join(host: Host, name: str, **more: object) -> Client:
    client = Client(name, TOPICS, **more)  # type: ignore[arg-type]
    client.hear(host.beat(client.beat()))
    return client


def turn(host: Host, *clients: Client) -> None:
    """Each lets go of what it must, says so, and hears what is new."""
    for client in clients:
        client.reconcile()
        client.hear(host.beat(client.beat()))


def commit(host: Host, member_id: str, epoch: int) -> ErrorCode:
    return host.group.why_not_commit(member_id, None, epoch, in_transaction=False)


def indexes(client: Client) -> list[int]:
    return sorted(index for found in client.wanted.values() for index in found)


def test_the_first_member_gets_everything_at_once(host: Host) -> None:
    a = join(host, "a")
    assert (a.epoch, indexes(a), host.group.state) == (1, [0, 1, 2, 3], "Stable")


def test_a_partition_moves_only_when_the_one_before_has_let_go(host: Host) -> None:
    a, b = join(host, "a"), None
    a.reconcile()
    b = join(host, "b")
    assert (b.epoch, indexes(b), host.group.state) == (2, [], "Reconciling")
    a.hear(host.beat(a.beat()))  # it is asked to give two up, and still has them
    assert (a.epoch, len(indexes(a))) == (1, 2)
    assert host.group.current["a"].state is MemberState.UNREVOKED_PARTITIONS
    b.hear(host.beat(b.beat()))
    assert indexes(b) == []
    turn(host, a)
    assert a.epoch == 2
    turn(host, b)
    assert len(indexes(b)) == 2
    assert host.group.state == "Stable"


def test_a_member_whose_answer_was_lost_comes_with_the_epoch_before(host: Host) -> None:
    a = join(host, "a")
    a.reconcile()
    join(host, "b")
    host.beat(a.beat())
    a.wanted = host.group.current["a"].assigned
    a.reconcile()
    lost = host.beat(a.beat())
    assert lost.epoch == 2
    again = host.beat(a.beat())  # epoch 1 still
    assert (again.error, again.epoch) == (ErrorCode.none, 2)
    ahead = host.beat(a.beat()._replace(epoch=9))
    assert ahead.error is ErrorCode.fenced_member_epoch
    more = host.beat(
        a.beat()._replace(owned={host.topics.topics["t"].topic_id: frozenset(range(4))})
    )
    assert more.error is ErrorCode.fenced_member_epoch


def test_commits_are_fenced_by_the_epoch(host: Host) -> None:
    a = join(host, "a")
    assert commit(host, "a", a.epoch) is ErrorCode.none
    assert commit(host, "a", a.epoch + 1) is ErrorCode.stale_member_epoch
    assert commit(host, "x", 1) is ErrorCode.unknown_member_id
    assert commit(host, "", -1) is ErrorCode.unknown_member_id
    host.leave("a")
    assert commit(host, "", -1) is ErrorCode.none


def test_a_member_that_missed_its_new_epoch_commits_what_it_has_had(host: Host) -> None:
    """KIP-1251: it is fenced only where a partition is another's, or came with a later epoch."""
    a, b = join(host, "a"), join(host, "b")
    turn(host, a, a, b, b)
    early, late = sorted(a.owned[T])[0], sorted(b.owned[T])[0]
    host.leave("b")
    turn(host, a)
    assert a.epoch == 3

    def commit_at(generation: int, index: int) -> ErrorCode:
        assert commit(host, "a", generation) is ErrorCode.none
        return host.group.why_not_commit_at("a", generation, "t", index)

    assert commit_at(1, early) is commit_at(3, late) is ErrorCode.none
    assert commit_at(2, late) is ErrorCode.stale_member_epoch
    assert commit_at(0, early) is ErrorCode.stale_member_epoch


def test_who_is_unknown_joins_first(host: Host) -> None:
    join(host, "a")
    reply = host.beat(Beat("b", 1, topics=TOPICS, owned=NOTHING))
    assert reply.error is ErrorCode.unknown_member_id


def test_a_full_group_takes_no_more(host: Host) -> None:
    host.group.rules = ConsumerRules(members_max=1)
    a = join(host, "a")
    assert host.beat(Client("b", TOPICS).beat()).error is ErrorCode.group_max_size_reached
    turn(host, a)


def test_a_static_member_comes_back_to_what_it_had(host: Host) -> None:
    a, b = join(host, "a", instance_id="i"), join(host, "b")
    for _ in range(3):
        turn(host, a, b)
    had, epoch = a.owned, host.group.epoch
    assert host.beat(Client("a2", TOPICS, "i").beat()).error is ErrorCode.unreleased_instance_id
    away = host.leave("a", "i", -2)
    assert away.epoch == -2
    turn(host, b)
    back = join(host, "a2", instance_id="i")
    assert back.wanted == had
    assert host.group.epoch == epoch  # nobody else noticed
    assert "a" not in host.group.members
    assert host.beat(a.beat()).error is ErrorCode.fenced_instance_id


def test_new_partitions_and_topics_are_noticed_by_the_next_heartbeat(host: Host) -> None:
    a = join(host, "a")
    a.reconcile()
    host.topics.make("other", 1)
    turn(host, a)
    assert a.epoch == 1  # nobody subscribes to it
    host.topics.make("t", 6)
    turn(host, a)
    assert (a.epoch, indexes(a)) == (2, [0, 1, 2, 3, 4, 5])
    host.topics.drop("t")
    turn(host, a)
    turn(host, a)
    assert (a.epoch, indexes(a)) == (3, [])


def test_a_regular_expression_follows_the_topics(host: Host) -> None:
    host.topics.make("t2", 2)
    beat = Beat("a", 0, rebalance_timeout_ms=1000, regex="t.*", owned=NOTHING)
    assert host.group.unmatched(beat) == "t.*"
    first = host.beat(beat, matched=frozenset({"t", "t2"}))
    assert first.assignment is not None
    assert sum(map(len, first.assignment.values())) == 6
    again = Beat("a", first.epoch, owned=first.assignment)
    assert host.group.unmatched(again) is None
    host.topics.make("t3", 1)
    assert host.group.unmatched(again) == "t.*"
    grown = host.beat(again, matched=frozenset({"t", "t2", "t3"}))
    assert grown.assignment is not None
    assert sum(map(len, grown.assignment.values())) == 7
    host.beat(Beat("a", grown.epoch, topics=TOPICS, regex="", owned=grown.assignment))
    assert not host.group.regexes
    assert remembered(host.replayed()) == remembered(host.group)


def test_members_choose_the_assignor(host: Host) -> None:
    a = Client("a", TOPICS)
    host.beat(a.beat()._replace(assignor="range"))
    assert host.group.assignor == "range"


def test_a_deleted_group_leaves_nothing(host: Host) -> None:
    join(host, "a", instance_id="i")
    for record in host.group.tombstones():
        host.group.replay(record)
    assert remembered(host.group) == remembered(Host(host.topics).group)


class Groups(RuleBasedStateMachine):
    """Clients that join, go on, lose answers and die, over topics that come, grow and go.

    NoPartitionHasTwoUsers, LiveStateIsReplayedState (whole or compacted), and at rest
    EverybodyHasItsShare.
    """

    def __init__(self) -> None:
        super().__init__()
        self.topics = FakeTopics()
        self.topics.make("t", 3)
        self.topics.make("u", 2)
        self.host = Host(self.topics)
        self.clients: dict[str, Client] = {}
        self.count = 0

    @rule(names=st.sets(st.sampled_from(["t", "u"]), min_size=1), static=st.booleans())
    def join(self, names: set[str], static: bool) -> None:
        if len(self.clients) < 5:
            self.count += 1
            name = f"m{self.count}"
            instance = name if static else None
            self.clients[name] = Client(name, frozenset(names), instance)
            self.beat_one(name, lost=False)

    @rule(pick=st.integers(0, 9), lost=st.booleans())
    @precondition(lambda self: self.clients)
    def beat(self, pick: int, lost: bool) -> None:
        self.beat_one(sorted(self.clients)[pick % len(self.clients)], lost)

    def beat_one(self, name: str, lost: bool) -> None:
        client = self.clients[name]
        reply = self.host.beat(client.beat())
        if lost:
            client.missed = True
        else:
            client.hear(reply)

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.clients)
    def reconcile(self, pick: int) -> None:
        self.clients[sorted(self.clients)[pick % len(self.clients)]].reconcile()

    @rule(pick=st.integers(0, 9), names=st.sets(st.sampled_from(["t", "u"]), min_size=1))
    @precondition(lambda self: self.clients)
    def subscribe(self, pick: int, names: set[str]) -> None:
        self.clients[sorted(self.clients)[pick % len(self.clients)]].topics = frozenset(names)

    @rule(pick=st.integers(0, 9), clean=st.booleans())
    @precondition(lambda self: self.clients)
    def go(self, pick: int, clean: bool) -> None:
        name = sorted(self.clients)[pick % len(self.clients)]
        client = self.clients.pop(name)
        if name in self.host.group.members:
            if clean:
                self.host.leave(name, client.instance_id)
            else:
                self.host.expire(name)  # its session has passed: it uses nothing any more

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.clients)
    def rejoin(self, pick: int) -> None:
        """It has lost its memory of the group, and gives everything up."""
        client = self.clients[sorted(self.clients)[pick % len(self.clients)]]
        client.epoch, client.owned, client.wanted = 0, NOTHING, NOTHING

    @rule(name=st.sampled_from(["t", "u"]), partitions=st.integers(1, 7))
    def topic(self, name: str, partitions: int) -> None:
        known = self.topics.topics.get(name)
        if known is not None and partitions > known.partitions:
            self.topics.make(name, partitions)

    @rule()
    def crash(self) -> None:
        self.host.group = self.host.replayed()

    @rule()
    @precondition(lambda self: self.clients)
    def rest(self) -> None:
        for _ in range(8):
            for name in sorted(self.clients):
                self.clients[name].reconcile()
                self.beat_one(name, lost=False)
        group = self.host.group
        assert group.state == "Stable"
        for topic_name, topic in self.topics.topics.items():
            readers = [c for c in self.clients.values() if topic_name in c.topics]
            mine = [c.wanted.get(topic.topic_id, frozenset()) for c in readers]
            if readers:
                assert sorted(i for each in mine for i in each) == list(range(topic.partitions))
        if len({client.topics for client in self.clients.values()}) == 1:
            shares = [sum(map(len, c.wanted.values())) for c in self.clients.values()]
            assert max(shares) - min(shares) <= 1

    @invariant()
    def no_partition_has_two_users(self) -> None:
        users: dict[object, str] = {}
        for name, client in self.clients.items():
            for topic, found in client.owned.items():
                for index in found:
                    assert users.setdefault((topic, index), name) == name

    @invariant()
    def live_state_is_replayed_state(self) -> None:
        live = remembered(self.host.group)
        assert remembered(self.host.replayed()) == live
        assert remembered(self.host.replayed(compacted=True)) == live


TestGroups = Groups.TestCase
TestGroups.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.torture
def test_five_thousand_histories() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Groups, settings=settings(max_examples=5_000, stateful_step_count=40, deadline=None)
    )
