"""What a member of a group says and does next, as text: `tests/scenarios/member.txt`.

modern [static=I] | classic     which protocol; modern where nothing is said
beat                     what the next heartbeat says;  told EPOCH [PLACES] answers it
missed | fenced          it was not answered; its member is not known
step | done              what its user has to do next, which begins with that; it is done
subscribe TOPIC…|/REGEX/      leave      goodbye: the epoch with which it leaves
ask | id M | joined GENERATION M [TOPIC…] | synced PLACES | rebalance | lost [forgotten] | member
assign TOPIC=PARTITIONS … | M:TOPIC,…[@INSTANCE] …        what the leader of a classic group does

And members of the next generation against the coordinator itself, with answers that are lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kio.schema.errors import ErrorCode

from ledgerstream.client import classicmember
from ledgerstream.client.classicmember import ClassicMember, Peer, Phase, ranges
from ledgerstream.client.member import JOINS, Beat, Kind, Member, Place
from ledgerstream.groups import consumer
from tests.groups.members import FakeTopics, Host
from tests.txn.play import scenarios

SCENARIOS = dict(scenarios(Path(__file__).parents[1] / "scenarios" / "member.txt"))


def places(word: str) -> frozenset[Any]:
    parts = [] if word == "-" else word.split(",")
    return frozenset((topic, int(index)) for topic, _, index in (p.partition("-") for p in parts))


def words(found: frozenset[Any]) -> str:
    return ",".join(f"{topic}-{index}" for topic, index in sorted(found)) or "-"


def names(found: frozenset[str]) -> str:
    return ",".join(sorted(found)) or "-"


class Play:
    member: Any

    def __init__(self) -> None:
        self.said: Beat | None = None
        self.moves: set[tuple[Phase, Phase]] = set()
        self.do_modern()

    def do(self, line: str) -> str:
        verb, *rest = line.split()
        before = getattr(self.member, "phase", None)
        said = getattr(self, "do_" + verb)(*rest)
        after = getattr(self.member, "phase", None)
        if before is not None and after is not None and after is not before:
            self.moves.add((before, after))
        return said or f"has {words(self.member.has)} target {words(self.member.target)}"

    def do_modern(self, static: str = "") -> None:
        instance = static.removeprefix("static=") or None
        self.member = Member("m", frozenset("a"), instance_id=instance, rebalance_ms=1000)

    def do_classic(self) -> None:
        self.member = ClassicMember(frozenset("a"))

    def do_beat(self) -> str:
        beat = self.said = self.member.beat()
        if beat is None:
            return "nothing"
        whole = "WHOLE " if beat.rebalance_ms != -1 else ""
        told = ["JOIN" if beat.epoch == JOINS else f"{whole}{beat.epoch}"]
        if beat.topics is not None:
            told.append(f"topics={names(beat.topics)}")
        if beat.regex is not None:
            told.append(f"regex={beat.regex}")
        if beat.owned is not None and beat.epoch != JOINS:
            told.append(f"owned={words(beat.owned)}")
        return " ".join(told)

    def do_told(self, epoch: str, given: str = "") -> None:
        self.member.told(self.said, int(epoch), places(given) if given else None)

    def do_missed(self) -> None:
        self.member.missed()

    def do_fenced(self) -> None:
        self.member.fenced()

    def do_step(self) -> str:
        step = self.member.step()
        if step is None:
            return "nothing"
        self.member.begin(step)
        return f"{step.kind} {words(step.places)}"

    def do_done(self) -> None:
        self.member.done()

    def do_subscribe(self, *topics: str) -> None:
        if topics[0].startswith("/"):
            self.member.subscribe(frozenset(), topics[0].strip("/"))
        else:
            self.member.subscribe(frozenset(topics))

    def do_leave(self) -> None:
        self.member.leave()

    def do_goodbye(self) -> str:
        return str(self.member.leave_epoch)

    # -- classic

    def do_ask(self) -> str:
        return self.member.ask() or "nothing"

    def do_id(self, member_id: str) -> None:
        self.member.told_id(member_id)

    def do_joined(self, generation: str, member_id: str, *said: str) -> None:
        topics = frozenset(said) or self.member.topics
        self.member.told_joined(int(generation), member_id, (), topics)

    def do_synced(self, given: str) -> None:
        self.member.told_synced(places(given))

    def do_rebalance(self) -> None:
        self.member.rejoin()

    def do_lost(self, forgotten: str = "") -> None:
        self.member.lost(forgotten=bool(forgotten))

    def do_member(self) -> str:
        return f"{self.member.member_id or '-'} {self.member.generation}"

    def do_assign(self, *rest: str) -> str:
        bar = rest.index("|")
        counts = {topic: int(n) for topic, n in (word.split("=") for word in rest[:bar])}
        peers = []
        for word in rest[bar + 1 :]:
            name, _, topics = word.partition(":")
            topics, _, instance = topics.partition("@")
            peers.append(Peer(name, instance or None, frozenset(topics.split(","))))
        found = ranges(tuple(peers), counts)
        return " ".join(
            f"{name} {words(frozenset((t, i) for t, each in found[name].items() for i in each))}"
            for name in sorted(found)
        )


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str) -> None:
    play, said = Play(), ""
    for line in SCENARIOS[name]:
        if line.startswith("> "):
            assert said == line.removeprefix("> "), (line, said)
        else:
            said = play.do(line)


def test_every_classic_move_is_played() -> None:
    moves: set[tuple[Phase, Phase]] = set()
    for lines in SCENARIOS.values():
        play = Play()
        for line in lines:
            if not line.startswith("> "):
                play.do(line)
        moves |= play.moves
    assert moves == classicmember.MOVES


class User:
    """A member and whoever uses what it has: `uses` is what would be read and written now."""

    def __init__(self, name: str, topics: frozenset[str], instance_id: str | None) -> None:
        self.member = Member(name, topics, instance_id=instance_id, rebalance_ms=1000)
        self.uses: frozenset[Place] = frozenset()
        self.doing: Kind | None = None

    def begin(self) -> None:
        step = self.member.step()
        if step is None:
            return
        self.member.begin(step)
        self.doing = step.kind
        if step.kind is Kind.ASSIGNED:
            self.uses |= step.places
        else:
            self.going = step.places
            if step.kind is Kind.LOST:
                self.uses -= step.places  # as one that drops it first, and cleans up then

    def done(self) -> None:
        if self.doing is None:
            return
        if self.doing is Kind.REVOKED:
            self.uses -= self.going
        self.member.done()
        self.doing = None


def exchange(host: Host, member: Member, fate: str) -> None:
    """A heartbeat that is `heard`, or `unheard`, or whose answer is `lost`."""
    beat = member.beat()
    if beat is None:
        return
    if fate == "unheard":
        member.missed()
        return
    owned = beat.owned
    reply = host.beat(consumer.Beat(
        beat.member_id, beat.epoch, instance_id=member.instance_id,
        rebalance_timeout_ms=beat.rebalance_ms, topics=beat.topics, regex=beat.regex,
        owned=None if owned is None else by_topic(owned),
    ))  # fmt: skip
    if fate == "lost":
        member.missed()
    elif reply.error in (ErrorCode.fenced_member_epoch, ErrorCode.unknown_member_id):
        member.fenced()
    else:
        assert reply.error is ErrorCode.none, reply
        given = reply.assignment
        member.told(beat, reply.epoch, None if given is None else by_place(given))


@pytest.mark.parametrize("missed", [False, True])
def test_what_is_about_to_be_taken_up_is_not_given_to_another(missed: bool) -> None:
    """The hazard that random histories seldom find: a member that is slow to take up what it was
    given, a heartbeat whose answer is lost, and another that comes meanwhile."""
    topics = FakeTopics()
    topics.make("t", 3)
    host = Host(topics)
    slow, other = (User(name, frozenset("t"), None) for name in ("slow", "other"))
    exchange(host, slow.member, "heard")
    assert len(slow.member.target) == 3
    exchange(host, other.member, "heard")
    if missed:
        exchange(host, slow.member, "unheard")
    exchange(host, slow.member, "lost")
    for _ in range(3):
        exchange(host, other.member, "heard")
        other.begin()
        other.done()
    slow.begin()
    assert len(slow.uses) == 3
    assert not slow.uses & other.uses
    for _ in range(4):
        for user in (slow, other):
            user.done()
            user.begin()
            user.done()
            exchange(host, user.member, "heard")
    assert sorted((len(slow.uses), len(other.uses))) == [1, 2]


class Members(RuleBasedStateMachine):
    """Members and the real coordinator, with requests and answers that are lost.

    NoPartitionHasTwoUsers, HasIsAllThatIsUsed, and at rest EverybodyHasItsShare.
    """

    def __init__(self) -> None:
        super().__init__()
        self.topics = FakeTopics()
        self.topics.make("t", 3)
        self.topics.make("u", 2)
        self.host = Host(self.topics)
        self.users: dict[str, User] = {}
        self.count = 0

    def pick(self, number: int) -> User:
        return self.users[sorted(self.users)[number % len(self.users)]]

    @rule(wanted=st.sets(st.sampled_from(["t", "u"]), min_size=1), static=st.booleans())
    def join(self, wanted: set[str], static: bool) -> None:
        if len(self.users) < 4:
            self.count += 1
            name = f"m{self.count}"
            self.users[name] = User(name, frozenset(wanted), name if static else None)
            self.beat_one(self.users[name], "heard")

    @rule(number=st.integers(0, 9), fate=st.sampled_from(["heard", "heard", "unheard", "lost"]))
    @precondition(lambda self: self.users)
    def beat(self, number: int, fate: str) -> None:
        self.beat_one(self.pick(number), fate)

    def beat_one(self, user: User, fate: str) -> None:
        exchange(self.host, user.member, fate)

    @rule(number=st.integers(0, 9))
    @precondition(lambda self: self.users)
    def begin(self, number: int) -> None:
        self.pick(number).begin()

    @rule(number=st.integers(0, 9))
    @precondition(lambda self: self.users)
    def done(self, number: int) -> None:
        self.pick(number).done()

    @rule(number=st.integers(0, 9), wanted=st.sets(st.sampled_from(["t", "u"]), min_size=1))
    @precondition(lambda self: self.users)
    def subscribe(self, number: int, wanted: set[str]) -> None:
        self.pick(number).member.subscribe(frozenset(wanted))

    @rule(number=st.integers(0, 9), clean=st.booleans())
    @precondition(lambda self: self.users)
    def go(self, number: int, clean: bool) -> None:
        user = self.pick(number)
        name, instance = user.member.member_id, user.member.instance_id
        if name in self.host.group.members:
            if clean:
                self.host.leave(name, instance)
            else:
                self.host.expire(name)
        del self.users[name]

    @rule(number=st.integers(0, 9))
    @precondition(lambda self: self.users)
    def session_ends(self, number: int) -> None:
        """The member was silent, and noticed it as its coordinator did."""
        user = self.pick(number)
        if user.member.epoch != JOINS:
            user.member.fenced()
            user.uses = frozenset()
            if user.member.member_id in self.host.group.members:
                self.host.expire(user.member.member_id)

    @rule(name=st.sampled_from(["t", "u"]), partitions=st.integers(1, 7))
    def topic(self, name: str, partitions: int) -> None:
        if partitions > self.topics.topics[name].partitions:
            self.topics.make(name, partitions)

    @rule()
    @precondition(lambda self: self.users)
    def rest(self) -> None:
        """Everybody goes on until nobody has anything to say or to do."""
        for _ in range(12):
            for name in sorted(self.users):
                user = self.users[name]
                user.done()
                user.begin()
                user.done()
                self.beat_one(user, "heard")
        assert self.host.group.state == "Stable"
        for topic_name, topic in self.topics.topics.items():
            readers = [u for u in self.users.values() if topic_name in u.member.topics]
            mine = [i for u in readers for t, i in u.uses if t == topic.topic_id]
            if readers:
                assert sorted(mine) == list(range(topic.partitions))

    @invariant()
    def no_partition_has_two_users(self) -> None:
        used = [place for user in self.users.values() for place in user.uses]
        assert len(used) == len(set(used))

    @invariant()
    def has_is_all_that_is_used(self) -> None:
        for user in self.users.values():
            assert user.uses <= user.member.has


def by_topic(found: frozenset[Place]) -> dict[UUID, frozenset[int]]:
    topics = {topic for topic, _ in found}
    return {topic: frozenset(i for t, i in found if t == topic) for topic in topics}


def by_place(found: consumer.Assignment) -> frozenset[Place]:
    return frozenset((topic, index) for topic, indexes in found.items() for index in indexes)


TestMembers = Members.TestCase
TestMembers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.torture
def test_five_thousand_histories() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Members, settings=settings(max_examples=5_000, stateful_step_count=50, deadline=None)
    )
