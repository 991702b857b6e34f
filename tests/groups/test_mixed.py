"""Classic and next-generation members in one group, which changes its kind as they come and go."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ledgerstream.groups import (
    ClassicGroup,
    Committing,
    GroupCodec,
    GroupCoordinator,
    Join,
    Sync,
    Wish,
)
from ledgerstream.groups.consumer import Beat
from ledgerstream.groups.consumerrecords import NOTHING, Assignment
from ledgerstream.wire.consumerprotocol import (
    Named,
    read_assignment,
    read_subscription,
    write_assignment,
)
from tests.groups.members import FakeTopics, remembered

SESSION_MS = 10_000


class Origin:
    offset, producer_id = 0, -1


class Host:
    """The coordinator of one partition, its log in bytes, and a clock."""

    def __init__(self) -> None:
        self.topics = FakeTopics()
        self.topics.make("t", 4)
        self.at_ms = 1000
        self.log: list[tuple[bytes, bytes | None]] = []
        self.machine = self.empty()

    def empty(self) -> GroupCoordinator:
        return GroupCoordinator(self.topics)

    def perform(self, decision: Any) -> Any:
        codec = GroupCodec()
        for record in decision.records:
            key, value = codec.encode(record)
            self.log.append((key, value))
            read = codec.decode(key, value)
            assert read is not None
            self.machine.replay(read, Origin())
        return decision.reply

    def tell(self, told: Any) -> None:
        for client, reply in told:
            client.hear(reply)

    def tick(self) -> None:
        """Everything that is due now, one after the other, as the broker does."""
        while (next_ms := self.machine.next_ms) is not None and next_ms <= self.at_ms:
            self.tell(self.perform(self.machine.decide_tick(self.at_ms, self.at_ms)))

    def replayed(self) -> GroupCoordinator:
        machine, codec = self.empty(), GroupCodec()
        for key, value in self.log:
            record = codec.decode(key, value)
            assert record is not None
            machine.replay(record, Origin())
        return machine


def subscription(topics: list[str], owned: Named) -> bytes:
    """ConsumerProtocolSubscription version 1."""
    names = b"".join(struct.pack(">h", len(t)) + t.encode() for t in topics)
    partitions = write_assignment(owned, 1)[2:-4]  # without version and user data
    return struct.pack(">hi", 1, len(topics)) + names + struct.pack(">i", -1) + partitions


class Classic:
    """Cooperative: it lets go of what it is not given again, and joins once more if it had to."""

    def __init__(self, host: Host, name: str, instance_id: str | None = None) -> None:
        self.host, self.name, self.instance_id = host, name, instance_id
        self.owned: Named = {}
        self.generation = -1
        self.state = "join"  # join → joining → sync → syncing → member
        self.known = False
        self.leads: Any = ()

    def turn(self) -> None:
        host, machine = self.host, self.host.machine
        if self.state == "join":
            self.state = "joining"
            content = subscription(["t"], self.owned)
            asked = Join(
                self.name if self.known else "", self.name, self.instance_id,
                rebalance_ms=60_000, session_ms=SESSION_MS,
                protocols=(("cooperative-sticky", content),),
            )  # fmt: skip
            told = host.perform(machine.decide_join("g", asked, self, host.at_ms, host.at_ms))
            machine.joined("g", self.name, asked, host.at_ms)
            host.tell(told)
        elif self.state == "sync":
            self.state = "syncing"
            asked_sync = Sync(
                self.name, self.generation, self.instance_id, None, None, self.assign()
            )
            host.tell(
                host.perform(machine.decide_sync("g", asked_sync, self, host.at_ms, host.at_ms))
            )
        elif self.state == "member":
            error = machine.heartbeat("g", self.name, self.instance_id, self.generation, host.at_ms)
            self.fail(error.name)

    def assign(self) -> tuple[tuple[str, bytes], ...]:
        """As the leader of a classic group: nobody gets what another has, until it lets go."""
        if not self.leads:
            return ()
        names = sorted(name for name, _, _ in self.leads)
        has = {n: read_subscription(m).owned or {} for n, _, m in self.leads}
        taken = {i: n for n, each in has.items() for i in each.get("t", ())}
        given: dict[str, set[int]] = {name: set() for name in names}
        for index in range(self.host.topics.topics["t"].partitions):
            wanted = names[index % len(names)]
            if taken.get(index, wanted) == wanted:
                given[wanted].add(index)
        return tuple(
            (name, write_assignment({"t": frozenset(found)} if found else {}, 1))
            for name, found in given.items()
        )

    def hear(self, reply: Any) -> None:
        if reply.error:
            self.fail(reply.error.name)
        elif self.state == "joining":
            self.known, self.state = True, "sync"
            self.generation, self.leads = reply.generation, reply.members
        else:
            given = read_assignment(reply.assignment)
            lost = any(found - given.get(t, frozenset()) for t, found in self.owned.items())
            self.owned = given
            self.state = "join" if lost else "member"

    def fail(self, error: str) -> None:
        if error in ("member_id_required", "rebalance_in_progress"):
            self.known = self.known or error == "member_id_required"
            self.state = "join"
        elif error != "none":
            assert error in ("unknown_member_id", "illegal_generation"), error
            self.state, self.owned = "join", {}
            self.known = error == "illegal_generation"

    def partitions(self) -> set[int]:
        return {index for found in self.owned.values() for index in found}

    def leave(self) -> None:
        host = self.host
        leaving = [(self.name, self.instance_id)]
        decision = host.machine.decide_leave("g", leaving, host.at_ms, host.at_ms)
        _, told = host.perform(decision)
        host.tell(told)


class Modern:
    def __init__(self, host: Host, name: str, instance_id: str | None = None) -> None:
        self.host, self.name, self.instance_id = host, name, instance_id
        self.epoch = 0
        self.owned: Assignment = NOTHING

    def turn(self) -> None:
        host, machine = self.host, self.host.machine
        beat = Beat(
            self.name, self.epoch, self.instance_id, rebalance_timeout_ms=60_000,
            topics=frozenset({"t"}), owned=self.owned,
        )  # fmt: skip
        host.tell(host.perform(machine.decide_upgrade("g", beat, host.at_ms, host.at_ms)))
        reply = host.perform(machine.decide_beat("g", beat, host.at_ms))
        if reply.error:
            assert reply.error.name in ("unknown_member_id", "group_id_not_found"), reply
            self.epoch, self.owned = 0, NOTHING
            return
        machine.beaten("g", self.name, host.at_ms)
        self.epoch = reply.epoch
        if reply.assignment is not None:
            self.owned = reply.assignment

    def partitions(self) -> set[int]:
        return {index for found in self.owned.values() for index in found}

    def leave(self) -> None:
        beat = Beat(self.name, -1)
        self.host.perform(self.host.machine.decide_beat("g", beat, self.host.at_ms))


class Static:
    """Whoever waits for an answer to a JoinGroup."""

    def __init__(self) -> None:
        self.replies: list[Any] = []

    def hear(self, reply: Any) -> None:
        self.replies.append(reply)


def come_as_classic(host: Host, *topics: str) -> Static:
    """A classic member with the instance id of the next-generation one."""
    client, content = Static(), subscription(list(topics), {})
    asked = Join(
        "", "s", instance_id="i", rebalance_ms=60_000, session_ms=SESSION_MS,
        protocols=(("cooperative-sticky", content),),
    )  # fmt: skip
    decision = host.machine.decide_join("g", asked, client, host.at_ms, host.at_ms)
    host.tell(host.perform(decision))
    host.machine.joined("g", "s", asked, host.at_ms)
    return client


def halves(host: Host) -> tuple[Modern, Classic]:
    """A static next-generation member and a classic one, at rest."""
    modern, classic = Modern(host, "m", instance_id="i"), Classic(host, "c")
    for _ in range(20):
        modern.turn()
        classic.turn()
        host.tick()
    assert len(modern.partitions()) == len(classic.partitions()) == 2
    return modern, classic


@pytest.mark.parametrize("topics", [("t",), ("t", "u")])
def test_the_last_modern_member_is_replaced_by_a_classic_one(topics: tuple[str, ...]) -> None:
    """As in Kafka: a classic group, in which nobody has to join again unless a wish changed."""
    host = Host()
    modern, classic = halves(host)
    owned = {"t": frozenset(modern.partitions())}
    (joined,) = come_as_classic(host, *topics).replies
    group = host.machine.classic("g")
    assert group is not None
    assert (joined.error.name, joined.generation) == ("none", group.generation)
    assert read_assignment(group.members["s"].assignment) == owned
    host.tick()
    same = topics == ("t",)
    assert group.state == ("Stable" if same else "PreparingRebalance")
    error = host.machine.heartbeat("g", "c", None, classic.generation, host.at_ms)
    assert error.name == ("none" if same else "rebalance_in_progress")
    error = host.machine.heartbeat("g", "s", "i", joined.generation, host.at_ms)
    assert error.name == ("none" if same else "rebalance_in_progress")
    for _ in range(12):  # the sessions run: one that is silent is gone
        host.at_ms += SESSION_MS // 4
        classic.turn()
        host.tick()
    assert "s" not in group.members
    assert classic.partitions() == set(range(4))


def test_while_partitions_are_on_their_way_all_are_to_join_again() -> None:
    host = Host()
    modern, classic = Modern(host, "m", instance_id="i"), Classic(host, "c")
    for _ in range(3):
        modern.turn()
    assert modern.partitions() == set(range(4))
    for _ in range(2):
        classic.turn()  # it is to have half of them, and waits
    come_as_classic(host, "t")
    host.tick()
    group = host.machine.classic("g")
    assert group is not None
    assert group.state == "PreparingRebalance"
    assert read_assignment(group.members["s"].assignment) == {"t": frozenset(range(4))}


def test_another_modern_member_keeps_the_group_as_it_is() -> None:
    host = Host()
    halves(host)
    Modern(host, "n").turn()
    come_as_classic(host, "t")
    assert host.machine.modern("g") is not None


def test_a_downgrade_is_carried_out_after_a_restart_and_only_once() -> None:
    """Whether it was is in the log: then there is a later generation."""
    host = Host()
    modern, classic = Modern(host, "m"), Classic(host, "c")
    for _ in range(20):
        modern.turn()
        classic.turn()
    modern.leave()
    again = host.replayed()
    again.start(host.at_ms)
    for _ in range(5):
        again.decide_tick(host.at_ms, host.at_ms)
    assert again.groups["g"].state == "PreparingRebalance"
    for _ in range(5):
        classic.turn()
        host.tick()
    assert classic.partitions() == set(range(4))
    for _ in range(2):
        host.machine = host.replayed()
        host.machine.start(host.at_ms)
        host.tick()
        assert host.machine.groups["g"].state == "Stable"
        classic.turn()
        assert classic.state == "member"


def test_what_is_deleted_is_nothing_to_a_classic_group_of_its_name() -> None:
    host = Host()
    modern = Modern(host, "m")
    modern.turn()
    modern.leave()
    assert host.perform(host.machine.decide_delete("g")).name == "none"
    wish = Wish("t", 0, 3)
    host.perform(host.machine.decide_commit("g", Committing(), [wish], host.at_ms, host.at_ms))
    classic = Classic(host, "c")
    for _ in range(5):
        classic.turn()
        host.tick()
    assert (classic.state, classic.generation) == ("member", 1)


class Mixed(RuleBasedStateMachine):
    """NoPartitionHasTwoUsers, LiveStateIsReplayedState, and at rest EveryPartitionIsRead, in the
    kind of group that fits its members."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Host()
        self.clients: dict[str, Classic | Modern] = {}
        self.count = 0

    @rule(modern=st.booleans(), static=st.booleans())
    @precondition(lambda self: len(self.clients) < 4)
    def come(self, modern: bool, static: bool) -> None:
        self.count += 1
        name = f"m{self.count}"
        kind = Modern if modern else Classic
        self.clients[name] = kind(self.host, name, name if static else None)
        self.clients[name].turn()

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.static_modern())
    def come_back_as_classic(self, pick: int) -> None:
        """A next-generation member was stopped, and starts again with the other protocol."""
        modern = self.static_modern()
        before = self.clients.pop(modern[pick % len(modern)])
        self.count += 1
        name = f"m{self.count}"
        self.clients[name] = Classic(self.host, name, before.instance_id)
        self.clients[name].turn()

    def static_modern(self) -> list[str]:
        found = [c for c in self.clients.values() if isinstance(c, Modern) and c.instance_id]
        return sorted(client.name for client in found)

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.clients)
    def turn(self, pick: int) -> None:
        self.clients[sorted(self.clients)[pick % len(self.clients)]].turn()
        self.host.tick()

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.clients)
    def go(self, pick: int) -> None:
        self.clients.pop(sorted(self.clients)[pick % len(self.clients)]).leave()

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.clients)
    def die(self, pick: int) -> None:
        """It is never heard of again, and others go on."""
        self.clients.pop(sorted(self.clients)[pick % len(self.clients)])

    @rule()
    @precondition(lambda self: self.clients)
    def rest(self) -> None:
        for _ in range(60):
            self.host.at_ms += SESSION_MS // 4
            for name in sorted(self.clients):
                self.clients[name].turn()
            self.host.tick()
        group = self.host.machine.groups["g"]
        kinds = {type(client) for client in self.clients.values()}
        assert isinstance(group, ClassicGroup) or Modern in kinds or len(kinds) == 1
        if Modern in kinds:
            assert not isinstance(group, ClassicGroup)
        found = sorted(index for c in self.clients.values() for index in c.partitions())
        assert found == list(range(4))

    @invariant()
    def no_partition_has_two_users(self) -> None:
        users: dict[int, str] = {}
        for name, client in self.clients.items():
            for index in client.partitions():
                assert users.setdefault(index, name) == name

    @invariant()
    def live_state_is_replayed_state(self) -> None:
        live, again = self.host.machine.modern("g"), self.host.replayed().modern("g")
        assert (live is None) == (again is None)
        if live is not None and again is not None:
            assert remembered(live) == remembered(again)


TestMixed = Mixed.TestCase
TestMixed.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.torture
def test_five_thousand_histories() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Mixed, settings=settings(max_examples=5_000, stateful_step_count=40, deadline=None)
    )
