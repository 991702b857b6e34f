"""Next-generation groups for our broker and for Apache Kafka: heartbeats in every state (KIP-848).

How often members shall come differs by intent, and which partitions a member gets is the
assignor's: a scenario shows how many.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ledgerstream.wire.versions import Api
from tests.differential.groups import Group, subscription
from tests.differential.raw import Raw
from tests.differential.scenarios import create, scenario, until

MODERN = Api.CONSUMER_GROUP_HEARTBEAT
# a group's first epoch is 1 here and 2 there: epochs are shown from it on
FIRST: dict[tuple[Raw, str], int] = {}


class Member:
    """One member, by hand. It has what it was told to have, once it says so."""

    def __init__(self, raw: Raw, group: str, name: str, topic: str, **more: Any) -> None:
        self.raw, self.group, self.name, self.topic = raw, group, name, topic
        self.more = more  # what it says when it joins
        self.epoch = 0
        self.has: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []

    def join(self, version: int = 1, **more: Any) -> Any:
        self.epoch, self.has, self.told = 0, [], []
        return self.beat(version, **{
            "rebalance_timeout": 60_000, "subscribed_topic_names": [self.topic],
            "topic_partitions": [], **self.more, **more,
        })  # fmt: skip

    def beat(self, version: int = 1, *, epoch: int | None = None, **more: Any) -> Any:
        """(error, epoch, how many partitions, or None if it is not told)."""
        reply = self.raw.ask(
            MODERN, version, group_id=self.group, member_id=self.name,
            member_epoch=self.epoch if epoch is None else epoch,
            **{"topic_partitions": None, "rebalance_timeout": -1, **more},
        )  # fmt: skip
        if reply["error_code"] != "none":
            return reply["error_code"], reply["member_id"], reply["member_epoch"]
        if epoch is None:
            self.epoch = reply["member_epoch"]
        first = FIRST.setdefault((self.raw, self.group), reply["member_epoch"])
        shown = reply["member_epoch"] - first if reply["member_epoch"] > 0 else "away"
        told = reply["assignment"]
        if told is None:
            return "none", shown, None
        self.told = told["topic_partitions"]
        return "none", shown, count(self.told)

    def settle(self) -> Any:
        """It lets go of what it has to, says so, and hears what is next."""
        self.has = [
            {"topic_id": each["topic_id"], "partitions": each["partitions"]} for each in self.told
        ]
        return self.beat(topic_partitions=self.has)

    def leave(self, epoch: int = -1, **more: Any) -> Any:
        return self.beat(epoch=epoch, **more)

    def commit(self, offset: int, *, epoch: int | None = None, version: int = 9) -> Any:
        reply = self.raw.ask(
            Api.OFFSET_COMMIT, version, group_id=self.group, member_id=self.name,
            generation_id_or_member_epoch=self.epoch if epoch is None else epoch,
            topics=[{"name": self.topic, "partitions": [
                {"partition_index": 0, "committed_offset": offset, "committed_metadata": ""},
            ]}],
        )  # fmt: skip
        return [p["error_code"] for t in reply["topics"] for p in t["partitions"]]


def count(topics: list[dict[str, Any]]) -> int:
    return sum(len(each["partitions"]) for each in topics)


def describe(raw: Raw, group: str) -> Any:
    reply = raw.ask(
        Api.CONSUMER_GROUP_DESCRIBE, 1, group_ids=[group], include_authorized_operations=False
    )
    (found,) = reply["groups"]
    if found["error_code"] != "none":
        return found["error_code"], found["group_state"], found["members"]
    first = FIRST.get((raw, group), 0)
    members = sorted(
        (
            each["member_id"], each["instance_id"], max(each["member_epoch"] - first, -1),
            each["member_type"],
            each["subscribed_topic_names"], each["subscribed_topic_regex"],
            count(each["assignment"]["topic_partitions"]),
            count(each["target_assignment"]["topic_partitions"]),
        )
        for each in found["members"]
    )  # fmt: skip
    return (
        found["error_code"], found["group_state"], found["group_epoch"] - first,
        found["assignment_epoch"] - first, found["assignor_name"], members,
    )  # fmt: skip


def begin(raw: Raw, topic: str, partitions: int = 4) -> str:
    create(raw, topic, partitions)
    group = f"group-{topic}"
    until(lambda: raw.ask(Api.FIND_COORDINATOR, 2, key=group, key_type=0))
    until(lambda: {"error_code": describe(raw, group)[0]})
    probe = Member(raw, f"probe-{group}", "probe", topic)  # until the coordinator knows the topic
    until(lambda: dict(zip(("error_code", "epoch", "count"), probe.join(), strict=True)))
    while probe.join()[2] != partitions:
        pass
    return group


@scenario
def modern_group_of_one(raw: Raw, topic: str) -> Iterator[tuple[str, Any]]:
    group = begin(raw, topic)
    a = Member(raw, group, "a", topic)
    yield "nobody is there", describe(raw, group)
    yield "a heartbeat before", a.beat(epoch=3, topic_partitions=[])
    yield "a leave before", a.leave()
    yield "it joins", a.join()
    yield "it goes on", a.settle()
    yield "and on", a.beat()
    yield "seen", describe(raw, group)
    yield "it joins again", a.join()
    yield "an epoch ahead", a.beat(epoch=7, topic_partitions=[])
    yield "an epoch behind", a.beat(epoch=0, topic_partitions=[])
    yield "no member of that name", Member(raw, group, "x", topic).beat(epoch=1)
    yield "it leaves", a.leave()
    yield "it leaves again", a.leave()
    yield "empty", describe(raw, group)
    yield "it comes back", a.join()
    yield "for good", a.leave()


@scenario
def modern_group_of_two(raw: Raw, topic: str) -> Iterator[tuple[str, Any]]:
    group = begin(raw, topic)
    a, b = Member(raw, group, "a", topic), Member(raw, group, "b", topic)
    yield "a joins", a.join()
    yield "a goes on", a.settle()
    yield "b joins", b.join()
    yield "b waits", b.beat()
    yield "seen while it waits", describe(raw, group)
    yield "a is asked to give up", a.beat()
    yield "a says nothing of it", a.beat()
    yield "seen while it is asked", describe(raw, group)
    yield "a has", a.settle()
    yield "b gets", b.beat()
    yield "b goes on", b.settle()
    yield "seen at rest", describe(raw, group)
    before = a.epoch - 1
    yield "an answer was lost", a.beat(epoch=before, topic_partitions=a.has)
    yield "a lost one, with too much", a.beat(epoch=before, topic_partitions=b.has + a.has)
    yield "one ahead", a.beat(epoch=a.epoch + 1, topic_partitions=[])
    yield "commits", [a.commit(3), a.commit(3, epoch=before), a.commit(3, version=8)]
    yield "of nobody", Member(raw, group, "x", topic).commit(3, epoch=1)
    yield "b leaves", b.leave()
    yield "a gets all", a.beat()
    yield "a goes on at last", a.settle()
    yield "a leaves", a.leave()
    yield "anybody commits", Member(raw, group, "", topic).commit(4, epoch=-1)


@scenario
def modern_group_with_static_members(raw: Raw, topic: str) -> Iterator[tuple[str, Any]]:
    group = begin(raw, topic)
    a = Member(raw, group, "a", topic, instance_id="i")
    again = Member(raw, group, "a2", topic, instance_id="i")
    yield "it joins", a.join()
    yield "it goes on", a.settle()
    yield "another of its name", again.join()
    yield "it goes away", a.leave(-2, instance_id="i")
    yield "seen away", describe(raw, group)
    yield "its successor", again.join()
    yield "seen back", describe(raw, group)
    yield "who was before", a.beat(instance_id="i")
    yield "an unknown instance", again.beat(instance_id="j")
    yield "who was before leaves", a.leave(-1, instance_id="i")
    yield "the successor leaves", again.leave(-1, instance_id="i")
    yield "none is left", describe(raw, group)


@scenario
def modern_group_asked_for_nonsense(raw: Raw, topic: str) -> Iterator[tuple[str, Any]]:
    group = begin(raw, topic)
    a = Member(raw, group, "a", topic)
    yield "no name", Member(raw, "", "a", topic).join()
    yield "no member id, v1", Member(raw, group, "", topic).join()
    yield "no timeout", a.join(rebalance_timeout=-1)
    yield "no topics", a.join(subscribed_topic_names=None)
    yield "an empty list", a.join(subscribed_topic_names=[])
    yield "partitions when it joins", a.join(topic_partitions=None)
    yield "an unknown assignor", a.join(server_assignor="magic")
    yield "an empty instance", a.join(instance_id="")
    yield "an empty rack", a.join(rack_id="")
    yield "an odd epoch", a.beat(epoch=-3)
    yield "away without an instance", a.leave(-2)
    yield "a bad pattern", a.join(subscribed_topic_names=None, subscribed_topic_regex="(")
    yield "not a member yet", describe(raw, group)
    yield "a topic that is not there", a.join(subscribed_topic_names=[f"{topic}-none"])
    yield "and leaves", a.leave()


@scenario
def modern_group_of_members_with_other_wishes(raw: Raw, topic: str) -> Iterator[tuple[str, Any]]:
    group = begin(raw, topic)
    other = f"{topic}-other"
    create(raw, other, 2)
    a, b = Member(raw, group, "a", topic), Member(raw, group, "b", topic)
    yield "a joins", a.join(server_assignor="range")
    yield "b joins for the other", b.join(subscribed_topic_names=[other])
    yield "a follows", a.settle()
    yield "b follows", b.settle()
    yield "seen", describe(raw, group)
    yield "a wants both", a.beat(subscribed_topic_names=[topic, other], topic_partitions=a.has)
    yield "b lets go", [b.beat(), b.settle()]
    yield "a gets it", [a.beat(), a.settle()]
    yield "a wants the other alone", [a.beat(subscribed_topic_names=[other]), a.settle()]
    yield "b hears", [b.beat(), b.settle()]
    yield "seen at the end", describe(raw, group)
    yield "they leave", [a.leave(), b.leave()]


@scenario
def modern_group_and_the_classic_requests(raw: Raw, topic: str) -> Iterator[tuple[str, Any]]:
    group = begin(raw, topic)
    a = Member(raw, group, "a", topic)
    yield "it joins", a.join()
    yield (
        "described as a classic one",
        [
            (g["error_code"], g["group_state"])
            for v in (5, 6)
            for g in raw.ask(
                Api.DESCRIBE_GROUPS, v, groups=[group], include_authorized_operations=False
            )["groups"]
        ],
    )
    beat = raw.ask(Api.HEARTBEAT, 4, group_id=group, generation_id=1, member_id="a")
    yield "a classic heartbeat", beat["error_code"]
    leave = raw.ask(Api.LEAVE_GROUP, 4, group_id=group, members=[{"member_id": "a"}])
    yield "a classic leave", [m["error_code"] for m in leave["members"]]
    join = raw.ask(
        Api.JOIN_GROUP, 7, group_id=group, session_timeout=30_000, rebalance_timeout=30_000,
        member_id="", protocol_type="connect", protocols=[{"name": "x", "metadata": b""}],
    )  # fmt: skip
    yield "another type joins", join["error_code"]
    deleted = raw.ask(Api.DELETE_GROUPS, 2, groups_names=[group])
    yield "deleted with a member", [g["error_code"] for g in deleted["results"]]
    yield "it leaves", a.leave()
    deleted = raw.ask(Api.DELETE_GROUPS, 2, groups_names=[group])
    yield "deleted without", [g["error_code"] for g in deleted["results"]]
    yield "gone", describe(raw, group)


@scenario
def modern_group_by_a_pattern(raw: Raw, topic: str) -> Iterator[tuple[str, Any]]:
    group = begin(raw, topic)
    a = Member(raw, group, "a", topic)
    joined = a.join(subscribed_topic_names=None, subscribed_topic_regex=f"{topic}.*")
    while not count(a.told):  # Kafka matches in the background
        joined = a.beat()
    yield "it joins", (joined[0], count(a.told))
    yield "it goes on", a.settle()[0]
    yield "seen", describe(raw, group)[1]
    yield "it leaves", a.leave()


def patterns(topic: str) -> dict[str, bool]:
    """Regular expressions, and whether they match `topic`-foo as a whole."""
    foo, bar = f"{topic}-foo", f"{topic}-bar"
    return {
        **dict.fromkeys([
            foo, f"^{foo}$", f"({foo})", f"(?i){foo.upper()}", f"(?i:{foo.upper()})",
            f"(?P<n>{foo})", f"(?<n>{foo})", rf"\Q{foo}\E", rf"\Q{foo}", rf"{topic}.\Qfoo",
            f"{topic}-fo{{2}}", f"{topic}-fo+", rf"{topic}\W\pL+", f"{topic}-[[:alpha:]]oo",
            f"nothing|{foo}", f"{foo}|", rf"{foo}\z", f"(?s){topic}.foo",
        ], True),
        **dict.fromkeys([
            f"{foo})|(?:{bar}", f"{foo}|{bar})", f"(?:{foo}", "[", "*", "", "|", rf"{foo}\E",
            f"{foo}(?=x)", f"({foo})\\1", f"{foo}#c", rf"{topic}-fo\o", "f{,3}oo", ".*+", "a**",
            "foo\\", "x{1000}", "x{1001}", "(?x)foo", r"\p{Greek}", r"\p{Nope}", r"\Z", "(?z)a",
            "a" * 5_000, "[a-", "[b-a]", "(?P<n>a)(?P<n>b)", r"\Q", r"\Qa\\", "é+", "\0", "$^",
        ], False),
    }  # fmt: skip


@scenario
def modern_group_patterns(raw: Raw, topic: str) -> Iterator[tuple[str, Any]]:
    group = begin(raw, f"{topic}-foo")
    for number, (pattern, matches) in enumerate(patterns(topic).items()):
        member = Member(raw, group, f"m{number}", topic)
        error = member.join(subscribed_topic_names=None, subscribed_topic_regex=pattern)[0]
        deadline = time.monotonic() + 5
        while matches and error == "none" and not member.told and time.monotonic() < deadline:
            error = member.beat()[0]  # Kafka matches in the background
        yield pattern.replace(topic, "topic")[:40], (error, count(member.told))
        if error == "none":
            member.leave()


GROUP = 32
SESSION, INTERVAL = "consumer.session.timeout.ms", "consumer.heartbeat.interval.ms"


def settings_of(raw: Raw, group: str, keys: list[str] | None) -> Any:
    reply = raw.ask(
        Api.DESCRIBE_CONFIGS, 4, include_synonyms=False, include_documentation=False,
        resources=[{
            "resource_type": GROUP, "resource_name": group, "configuration_keys": keys,
        }],
    )  # fmt: skip
    (found,) = reply["results"]
    return found["error_code"], sorted(
        (each["name"], each["value"], each["config_source"], each["config_type"])
        for each in found["configs"] if each["name"] in (SESSION, INTERVAL)
    )  # fmt: skip


def alter(raw: Raw, group: str, *changes: tuple[str, int, Any], validate: bool = False) -> Any:
    reply = raw.ask(
        Api.INCREMENTAL_ALTER_CONFIGS, 1, validate_only=validate, resources=[{
            "resource_type": GROUP, "resource_name": group, "configs": [
                {"name": name, "config_operation": operation, "value": value}
                for name, operation, value in changes
            ],
        }],
    )  # fmt: skip
    return [(each["error_code"], each["error_message"]) for each in reply["responses"]]


def known(raw: Raw, group: str, name: str, value: str) -> Any:
    """Once it is: Kafka answers before its broker has heard of it."""
    while settings_of(raw, group, [name])[1][0][1] != value:
        pass
    return settings_of(raw, group, [name])


@scenario
def modern_group_settings(raw: Raw, topic: str) -> Iterator[tuple[str, Any]]:
    group = f"group-{topic}"
    yield "nothing is set", settings_of(raw, group, [SESSION, "none"])
    yield "all there are", [name for name, *_ in settings_of(raw, group, None)[1]]
    yield "of no group", settings_of(raw, "", None)
    yield "a session", alter(raw, group, (SESSION, 0, "30000"))
    yield "is known", known(raw, group, SESSION, "30000")
    yield "of nobody", alter(raw, "", (SESSION, 0, "30000"))
    for name, values in {
        SESSION: ("x", "-1", "0", "2147483648", "5999", "60001"), INTERVAL: ("99", "15001", "0.5"),
    }.items():  # fmt: skip
        for value in values:
            yield f"{name} {value}", alter(raw, group, (name, 0, value))
    yield "at the bounds", alter(raw, group, (SESSION, 0, "60000"), (INTERVAL, 0, "15000"))
    yield "at the others", alter(raw, group, (SESSION, 0, "6000"), (INTERVAL, 0, "100"))
    yield (
        "a session of two beats",
        [
            alter(raw, group, (SESSION, 0, session), (INTERVAL, 0, "7000"))
            for session in ("6999", "7000", "7001")
        ],
    )
    yield "no value", alter(raw, group, (SESSION, 0, None))
    yield "an unknown one", alter(raw, group, ("none", 0, "1"))
    yield "an unknown one goes", alter(raw, group, ("none", 1, None))
    yield "more of it", alter(raw, group, (SESSION, 2, "1"))
    yield "less of it", alter(raw, group, (SESSION, 3, "1"))
    yield "twice", alter(raw, group, (SESSION, 0, "30000"), (SESSION, 0, "31000"))
    yield "to try", alter(raw, group, (SESSION, 0, "31000"), validate=True)
    yield "to try what is wrong", alter(raw, group, (SESSION, 0, "1"), validate=True)
    yield "is as it was", known(raw, group, SESSION, "7001")
    yield "goes", alter(raw, group, (SESSION, 1, None), (INTERVAL, 1, None))
    yield "has gone", known(raw, group, SESSION, "45000")


@scenario
def modern_group_is_asked_for_heartbeats_as_set(raw: Raw, topic: str) -> Iterator[tuple[str, Any]]:
    group = begin(raw, topic)
    a = Member(raw, group, "a", topic)

    def interval() -> int:
        reply = raw.ask(
            MODERN, 1, group_id=group, member_id="a", member_epoch=a.epoch,
            topic_partitions=a.has, rebalance_timeout=-1,
        )  # fmt: skip
        return int(reply["heartbeat_interval"])

    yield "set before it is there", alter(raw, group, (INTERVAL, 0, "1234"))
    known(raw, group, INTERVAL, "1234")
    yield "joins", a.join()
    yield "settles", a.settle()
    yield "as set", interval()
    yield "set anew", alter(raw, group, (INTERVAL, 0, "4321"))
    known(raw, group, INTERVAL, "4321")
    yield "at the next heartbeat", interval()
    yield "leaves", a.leave()


def classic_state(group: Group) -> Any:
    (found,) = group.describe()["groups"]
    members = [(m["member_id"], m["group_instance_id"]) for m in found["members"]]
    return found["error_code"], found["group_state"], found["protocol_data"], members


def mixed_pair(raw: Raw, topic: str) -> tuple[Member, Group]:
    """A static next-generation member and a classic one, each with half of the partitions."""
    name = begin(raw, topic)
    modern, group = Member(raw, name, "m", topic, instance_id="i"), Group(raw, name, topic)
    modern.join()
    modern.settle()
    for _ in range(2):
        group.join("c")
    group.sync("c")
    modern.beat()
    modern.settle()
    group.join("c")
    group.sync("c")
    return modern, group


def replace_static(group: Group, *topics: str) -> Any:
    """A classic member comes with the instance id of the next-generation one."""
    before = group.generation
    metadata = subscription(*topics)
    joined = group.join(
        "s", group_instance_id="i", protocols=[{"name": "range", "metadata": metadata}]
    )
    group.generation = before
    names = "error_code", "protocol_name", "leader", "members"
    return [joined[name] for name in names]


@scenario
def modern_group_whose_last_member_is_replaced_by_a_classic_one(
    raw: Raw, topic: str
) -> Iterator[tuple[str, Any]]:
    modern, group = mixed_pair(raw, topic)
    yield "half and half", describe(raw, group.name)[:2]
    yield "it is replaced", replace_static(group, topic)
    yield "a classic group", classic_state(group)
    yield "and no other", describe(raw, group.name)
    yield "c goes on", group.beat("c")
    synced = group.sync("s", group_instance_id="i")
    yield "s has what m had", (synced["error_code"], len(synced["assignment"]))
    yield "s goes on", group.beat("s", group_instance_id="i")
    yield "m is none any more", modern.beat(instance_id="i")
    group.send_join("c")
    group.wait_members(2)
    yield "c wants to assign anew", group.beat("s", group_instance_id="i")["error_code"]
    yield "s joins", group.join("s", group_instance_id="i")["error_code"]
    yield "a generation of the two", len(group.joined("c")["members"])
    group.close()


@scenario
def modern_group_whose_last_member_is_replaced_with_another_wish(
    raw: Raw, topic: str
) -> Iterator[tuple[str, Any]]:
    modern, group = mixed_pair(raw, topic)
    yield "it is replaced", replace_static(group, topic, f"{topic}-other")
    yield "a classic group", classic_state(group)
    yield "s syncs", group.sync("s", group_instance_id="i")["error_code"]
    yield "c is called to join", group.beat("c")["error_code"]
    yield "m is none any more", modern.beat(instance_id="i")
    group.send_join("c")
    yield "s joins", group.join("s", group_instance_id="i")["error_code"]
    yield (
        "a generation of the two",
        sorted((name, instance) for name, instance, _ in group.joined("c")["members"]),
    )
    group.close()


@scenario
def modern_group_of_one_static_member_that_comes_back_as_a_classic_one(
    raw: Raw, topic: str
) -> Iterator[tuple[str, Any]]:
    name = begin(raw, topic)
    modern, group = Member(raw, name, "m", topic, instance_id="i"), Group(raw, name, topic)
    yield "it joins", [modern.join(), modern.settle()]
    yield "it goes away", modern.leave(-2, instance_id="i")
    yield "it comes back", replace_static(group, topic)
    yield "a classic group", classic_state(group)
    yield "it leaves", group.leave("s")
    group.close()
