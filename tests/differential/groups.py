"""Requests of consumer groups for our broker and for Apache Kafka: members, offsets, operators.

Member ids end in chance, so a scenario shows them by the client that has them; what waits for
others is asked over connections of its own.
"""

from __future__ import annotations

import struct
from typing import Any

from ledgerstream.wire.versions import Api
from tests.differential.raw import Raw
from tests.differential.scenarios import (
    NOWHERE,
    Seen,
    create,
    scenario,
    topic_id,
    until,
)
from tests.differential.transactions import Producer


def subscription(*topics: str) -> bytes:
    names = b"".join(struct.pack(">h", len(name)) + name.encode() for name in topics)
    return struct.pack(">hi", 0, len(topics)) + names + struct.pack(">i", -1)


LOADING = {"not_coordinator", "coordinator_load_in_progress", "coordinator_not_available"}


class Group:
    """One group, by hand, over as many connections as it has members."""

    def __init__(self, raw: Raw, name: str, topic: str) -> None:
        self.raw, self.name, self.topic = raw, name, topic
        self.address = "{}:{}".format(*raw.socket.getpeername()[:2])
        self.wires: dict[str, Raw] = {}
        self.ids: dict[str, str] = {}
        self.generation = -1
        until(lambda: raw.ask(Api.FIND_COORDINATOR, 2, key=name, key_type=0))
        while (
            raw.ask(  # Kafka answers before its coordinator has loaded
                Api.OFFSET_FETCH, 7, group_id=name, topics=[], require_stable=False
            )["error_code"]
            in LOADING
        ):
            pass

    def wire(self, client: str) -> Raw:
        if client not in self.wires:
            self.wires[client] = Raw(self.address)
        return self.wires[client]

    def close(self) -> None:
        for wire in self.wires.values():
            wire.close()

    def named(self, member_id: str) -> str:
        for client, one in self.ids.items():
            if one == member_id:
                return client
        return "?" if member_id else ""

    # join

    def send_join(self, client: str, *, version: int = 9, **more: Any) -> None:
        fields = {
            "group_id": self.name, "session_timeout": 30_000, "rebalance_timeout": 20_000,
            "member_id": self.ids.get(client, ""), "group_instance_id": None,
            "protocol_type": "consumer", "reason": "asked to",
            "protocols": [{"name": "range", "metadata": subscription(self.topic)}], **more,
        }  # fmt: skip
        self.wire(client).send(Api.JOIN_GROUP, version, **fields)

    def joined(self, client: str, version: int = 9) -> Any:
        reply = self.wire(client).reply(Api.JOIN_GROUP, version)
        if reply == "closed":
            return reply
        if reply["member_id"] and reply["error_code"] in ("none", "member_id_required"):
            self.ids[client] = reply["member_id"]
        if reply["error_code"] == "none":
            self.generation = reply["generation_id"]
        return {
            **reply,
            "member_id": self.named(reply["member_id"]),
            "leader": self.named(reply["leader"]),
            "members": sorted(
                (self.named(m["member_id"]), m.get("group_instance_id"), m["metadata"].hex())
                for m in reply["members"]
            ),
        }

    def join(self, client: str, *, version: int = 9, **more: Any) -> Any:
        self.send_join(client, version=version, **more)
        return self.joined(client, version)

    def enter(self, *clients: str, static: dict[str, str] | None = None, **more: Any) -> list[Any]:
        """All of them, new, to a generation that they are told of in this order.

        The first joins alone and leads; it joins again when the others are known to be there.
        """
        names = static or {}

        def send(client: str) -> None:
            self.send_join(client, group_instance_id=names.get(client), **more)

        first, *others = clients
        for client in clients:
            if client not in names:
                self.join(client, **more)
        send(first)
        alone = self.joined(first)
        if not others:
            return [alone]
        self.sync(first, {first: b"alone"}, group_instance_id=names.get(first))
        for count, client in enumerate(others, 2):
            send(client)
            self.wait_members(count)
        send(first)
        return [self.joined(client) for client in clients]

    def wait_members(self, count: int, state: str = "PreparingRebalance") -> None:
        """Until so many are in the group, in this state."""
        for _ in range(5_000):
            (group,) = self.raw.ask(
                Api.DESCRIBE_GROUPS, 5, groups=[self.name], include_authorized_operations=False
            )["groups"]
            if (len(group["members"]), group["group_state"]) == (count, state):
                return
        raise AssertionError(f"never {count} members: {group}")

    # sync, beat, leave

    def send_sync(
        self, client: str, plan: dict[str, bytes] | None = None, *, version: int = 5, **more: Any
    ) -> None:
        self.wire(client).send(
            Api.SYNC_GROUP, version,
            **{
                "group_id": self.name, "generation_id": self.generation,
                "member_id": self.ids.get(client, ""), "group_instance_id": None,
                "protocol_type": "consumer", "protocol_name": "range",
                "assignments": [
                    {"member_id": self.ids.get(one, one), "assignment": content}
                    for one, content in (plan or {}).items()
                ],
                **more,
            },
        )  # fmt: skip

    def synced(self, client: str, version: int = 5) -> Any:
        return self.wire(client).reply(Api.SYNC_GROUP, version)

    def sync(self, client: str, plan: Any = None, *, version: int = 5, **more: Any) -> Any:
        self.send_sync(client, plan, version=version, **more)
        return self.synced(client, version)

    def beat(self, client: str, *, version: int = 4, **more: Any) -> Any:
        fields = {
            "group_id": self.name, "generation_id": self.generation,
            "member_id": self.ids.get(client, ""), "group_instance_id": None, **more,
        }  # fmt: skip
        return self.wire(client).ask(Api.HEARTBEAT, version, **fields)

    def leave(self, *clients: str, version: int = 5) -> Any:
        members = [
            {"member_id": self.ids.get(one, one), "group_instance_id": None, "reason": "done"}
            for one in clients
        ]
        reply = self.raw.ask(
            Api.LEAVE_GROUP, version, group_id=self.name, members=members,
            member_id=members[0]["member_id"],
        )  # fmt: skip
        for member in reply.get("members", ()):
            member["member_id"] = self.named(member["member_id"])
        return reply

    # offsets

    def commit(
        self, offsets: dict[int, int], *, version: int = 9, who: str = "", **more: Any
    ) -> Any:
        fields = {
            "group_id": self.name, "generation_id_or_member_epoch": self.generation if who else -1,
            "member_id": self.ids.get(who, ""), "group_instance_id": None, "retention_time": -1,
            "topics": [self.commits(offsets, version)], **more,
        }  # fmt: skip
        return self.raw.ask(Api.OFFSET_COMMIT, version, **fields)

    def commits(self, offsets: dict[int, int], version: int = 9, metadata: str | None = "m") -> Any:
        return {
            "name": self.topic,
            "topic_id": topic_id(self.raw, self.topic) if version >= 10 else None,
            "partitions": [
                {
                    "partition_index": index, "committed_offset": offset,
                    "committed_leader_epoch": 0, "committed_metadata": metadata,
                }
                for index, offset in offsets.items()
            ],
        }  # fmt: skip

    def fetch(
        self, *partitions: int, version: int = 9, stable: bool = False, all_of: bool = False
    ) -> Any:
        topic: dict[str, Any] = {"name": self.topic, "partition_indexes": list(partitions)}
        if version >= 10:
            topic["topic_id"] = topic_id(self.raw, self.topic)
        topics = None if all_of else [topic]
        return self.raw.ask(
            Api.OFFSET_FETCH, version, group_id=self.name, topics=topics, require_stable=stable,
            groups=[{"group_id": self.name, "member_id": None, "member_epoch": -1,
                     "topics": topics}],
        )  # fmt: skip

    def stage(
        self, producer: Producer, offsets: dict[int, int], *, version: int = 3, **more: Any
    ) -> Any:
        fields = {
            "transactional_id": producer.txn_id, "group_id": self.name,
            "producer_id": producer.pid, "producer_epoch": producer.epoch, "generation_id": -1,
            "member_id": "", "group_instance_id": None, "topics": [self.commits(offsets)], **more,
        }  # fmt: skip
        while True:
            reply = self.raw.ask(Api.TXN_OFFSET_COMMIT, version, **fields)
            if reply == "closed" or not BUSY & {
                part["error_code"] for t in reply["topics"] for part in t["partitions"]
            }:
                return reply

    def add_to(self, producer: Producer) -> Any:
        while True:
            reply = self.raw.ask(
                Api.ADD_OFFSETS_TO_TXN, 3, transactional_id=producer.txn_id,
                producer_id=producer.pid, producer_epoch=producer.epoch, group_id=self.name,
            )  # fmt: skip
            if reply["error_code"] not in BUSY:
                return reply["error_code"]

    def describe(self, version: int = 6, *names: str) -> Any:
        reply = self.raw.ask(
            Api.DESCRIBE_GROUPS, version, groups=list(names or (self.name,)),
            include_authorized_operations=True,
        )  # fmt: skip
        for group in reply["groups"]:
            for member in group["members"]:
                member["member_id"] = self.named(member["member_id"])
            group["members"].sort(key=lambda member: str(member["member_id"]))
        reply["groups"].sort(key=lambda group: str(group["group_id"]))
        return reply

    def listed(self, version: int = 5, states: Any = (), types: Any = ()) -> Any:
        """Of the groups of this scenario alone."""
        reply = self.raw.ask(
            Api.LIST_GROUPS, version, states_filter=list(states), types_filter=list(types)
        )
        found = [group for group in reply["groups"] if group["group_id"].startswith(self.name)]
        return reply["error_code"], sorted(found, key=lambda group: str(group["group_id"]))


BUSY = {
    "concurrent_transactions", "coordinator_load_in_progress", "coordinator_not_available",
}  # fmt: skip


# -- offsets


@scenario
def group_offsets_in_every_version(raw: Raw, name: str) -> Seen:
    create(raw, name, 2)
    group = Group(raw, name, name)
    for version in range(2, 11):
        yield f"commit v{version}", group.commit({0: version, 1: 2 * version}, version=version)
    for version in range(1, 11):
        yield f"fetch v{version}", group.fetch(0, 1, version=version)
        if version >= 2:
            yield f"fetch all v{version}", group.fetch(version=version, all_of=True)
    yield "state", group.describe()


@scenario
def group_offsets_of_what_is_not_there(raw: Raw, name: str) -> Seen:
    create(raw, name, 2)
    group = Group(raw, name, name)
    nowhere = {"name": name + "-none", "topic_id": NOWHERE}
    parts = group.commits({0: 1})["partitions"]
    yield "nothing", group.fetch(0, 1)
    yield "all of nothing", group.fetch(all_of=True)
    yield "no partition", group.commit({0: 1, 2: 1, -1: 1})
    for version in (2, 9, 10):
        yield (
            f"no topic v{version}",
            group.commit({}, version=version, topics=[{**nowhere, "partitions": parts}]),
        )
    yield "no topics", group.commit({}, topics=[])
    yield "fetch no partition", group.fetch(0, 7)
    for version in (9, 10):
        topics = [{**nowhere, "partition_indexes": [0]}]
        yield f"fetch no topic v{version}", raw.ask(
            Api.OFFSET_FETCH, version, require_stable=False,
            groups=[{"group_id": name, "member_id": None, "member_epoch": -1, "topics": topics}],
        )  # fmt: skip
    yield "no group", group.commit({0: 1}, group_id="")
    yield (
        "an unknown generation v9",
        group.commit(
            {0: 1}, group_id=name + "-other", generation_id_or_member_epoch=3, member_id="m"
        ),
    )
    yield (
        "an unknown generation v8",
        group.commit(
            {0: 1},
            version=8,
            group_id=name + "-other",
            generation_id_or_member_epoch=3,
            member_id="m",
        ),
    )
    yield "a member of no group", group.commit({0: 1}, group_id=name + "-new", member_id="m")


@scenario
def group_offsets_with_too_much_metadata(raw: Raw, name: str) -> Seen:
    """Item 93."""
    create(raw, name, 2)
    group = Group(raw, name, name)
    for size in (4096, 4097):
        yield f"{size}", group.commit({}, topics=[group.commits({0: size}, metadata="x" * size)])
    yield "none", group.commit({}, topics=[group.commits({1: 7}, metadata=None)])
    yield "offsets", group.fetch(0, 1)


@scenario
def group_offsets_of_several_groups(raw: Raw, name: str) -> Seen:
    create(raw, name)
    first, second = Group(raw, name, name), Group(raw, name + "-2", name)
    first.commit({0: 1})
    second.commit({0: 2})
    topics = [{"name": name, "partition_indexes": [0]}]
    yield "fetched", raw.ask(
        Api.OFFSET_FETCH, 8, require_stable=True,
        groups=[{"group_id": one, "topics": each}
                for one in (name, name + "-2", name + "-3") for each in (topics, None)],
    )  # fmt: skip


@scenario
def group_offsets_deleted(raw: Raw, name: str) -> Seen:
    create(raw, name, 2)
    group = Group(raw, name, name)

    def delete(topic: str = name, group_id: str = name) -> Any:
        parts = [{"partition_index": index} for index in (0, 1, 5)]
        return raw.ask(
            Api.OFFSET_DELETE, 0, group_id=group_id,
            topics=[{"name": topic, "partitions": parts}],
        )  # fmt: skip

    yield "no group", delete()
    yield "the empty group", delete(group_id="")
    group.commit({0: 1})
    yield "deleted", delete()
    yield "another topic", delete(name + "-none")
    yield "offsets", group.fetch(0, 1)
    group.enter("a")
    group.sync("a", {"a": b"x"})
    yield "subscribed", delete()
    group.close()


# -- members


@scenario
def group_join_in_every_version(raw: Raw, name: str) -> Seen:
    create(raw, name)
    for version in range(10):
        group = Group(raw, f"{name}-{version}", name)
        yield f"join v{version}", group.join("a", version=version)
        if version >= 4:
            yield f"join again v{version}", group.join("a", version=version)
        sync = min(version, 5)
        yield f"sync v{sync} of {version}", group.sync("a", {"a": b"all"}, version=sync)
        beat = min(version, 4)
        yield f"beat v{beat} of {version}", group.beat("a", version=beat)
        yield f"describe v{version}", group.describe(min(version, 6))
        yield f"leave v{version}", group.leave("a", version=min(version, 5))
        yield f"describe empty v{version}", group.describe(min(version, 6))
        group.close()


@scenario
def group_join_refused(raw: Raw, name: str) -> Seen:
    create(raw, name)
    group = Group(raw, name, name)
    yield "no group id", group.join("a", group_id="")
    yield "unknown id", group.join("a", member_id="somebody")
    yield "session too short", group.join("a", session_timeout=5_999)
    yield "session too long", group.join("a", session_timeout=1_800_001)
    yield "no protocols", group.join("a", protocols=[])
    yield "no protocol type", group.join("a", protocol_type="")
    yield "state", group.describe()
    group.enter("a")
    other = [{"name": "other", "metadata": b""}]
    yield "another protocol", group.join("b", protocols=other)
    yield "another type", group.join("b", protocol_type="connect")
    yield "sync without protocol", group.sync("a", protocol_name=None)
    yield "sync with another", group.sync("a", protocol_name="other")
    yield "sync with another type", group.sync("a", protocol_type="other")
    yield "sync generation 0", group.sync("a", generation_id=0)
    yield "sync of another", group.sync("a", member_id="other")
    yield "sync with an instance", group.sync("a", group_instance_id="other")
    yield "sync of no group", group.sync("a", group_id=name + "-none")
    yield "sync group empty", group.sync("a", group_id="")
    yield "beat generation 0", group.beat("a", generation_id=0)
    yield "beat generation 2", group.beat("a", generation_id=2)
    yield "beat of another", group.beat("a", member_id="other")
    yield "beat of no group", group.beat("a", group_id=name + "-none")
    yield "beat group empty", group.beat("a", group_id="")
    yield "leave another", group.leave("nobody")
    for version in (0, 2, 3, 5):
        yield f"leave no group v{version}", raw.ask(
            Api.LEAVE_GROUP, version, group_id=name + "-none", member_id="x",
            members=[{"member_id": "x", "group_instance_id": None, "reason": None}],
        )  # fmt: skip
        yield f"leave group empty v{version}", raw.ask(
            Api.LEAVE_GROUP, version, group_id="", member_id="x",
            members=[{"member_id": "x", "group_instance_id": None, "reason": None}],
        )  # fmt: skip
    group.close()


@scenario
def group_rebalances(raw: Raw, name: str) -> Seen:
    create(raw, name, 2)
    group = Group(raw, name, name)
    yield "a alone", group.enter("a")
    yield "its assignment", group.sync("a", {"a": b"all"})
    yield "its assignment again", group.sync("a")
    yield "a commits", group.commit({0: 1}, who="a")
    yield "an operator may not", group.commit({0: 9})
    yield "nor generation 0", group.commit({0: 9}, who="a", generation_id_or_member_epoch=0)
    yield "nor another", group.commit({0: 9}, who="a", member_id="other")
    yield "b is told its id", group.join("b")
    group.send_join("b")
    group.wait_members(2)
    yield "a hears of it", group.beat("a")
    yield "a may still commit", group.commit({0: 2}, who="a")
    yield "a may not sync", group.sync("a")
    yield "described", group.describe()
    yield "a again", group.join("a")
    yield "b with it", group.joined("b")
    yield "described before the assignment", group.describe()
    yield "nobody commits now", group.commit({0: 3}, who="a")
    group.send_sync("b")
    yield "b beats while it waits", group.beat("a")
    yield "a assigns", group.sync("a", {"a": b"1", "b": b"2", "nobody": b"3"})
    yield "b has it", group.synced("b")
    yield "described after", group.describe()
    yield "listed", group.listed()
    yield "b joins as it is", group.join("b")
    yield "b leaves", group.leave("b")
    yield "a hears of that", group.beat("a")
    yield "a goes on alone", group.join("a")
    yield "assigned nothing", group.sync("a")
    yield "both leave", group.leave("a", "b")
    yield "empty", group.describe()
    yield "offsets", group.fetch(0, 1)
    group.close()


@scenario
def group_leaders_that_do_not_assign(raw: Raw, name: str) -> Seen:
    create(raw, name)
    group = Group(raw, name, name)
    group.enter("a", "b")
    group.send_sync("b")
    yield "a joins as it is", group.join("a")
    topics = [{"name": "range", "metadata": subscription("other")}]
    group.send_join("a", protocols=topics)
    yield "b hears", group.synced("b")
    yield "b again", group.join("b")
    yield "a again", group.joined("a")
    yield "a leaves", group.leave("a")
    yield "b beats", group.beat("b")
    yield "b leads", group.join("b")
    group.close()


@scenario
def group_protocols(raw: Raw, name: str) -> Seen:
    create(raw, name)
    group = Group(raw, name, name)

    def can(*names: str) -> list[dict[str, Any]]:
        return [{"name": each, "metadata": each.encode()} for each in names]

    wanted = {"a": can("x", "y"), "b": can("y", "x"), "c": can("y", "x")}
    for client, protocols in wanted.items():
        group.join(client, protocols=protocols)
    yield "a alone", group.join("a", protocols=wanted["a"])
    for count, client in enumerate("bc", 2):
        group.send_join(client, protocols=wanted[client])
        group.wait_members(count)
    group.send_join("a", protocols=wanted["a"])
    yield "what most want", [group.joined(client) for client in "abc"]
    yield "described", group.describe()
    group.close()


@scenario
def group_static_members(raw: Raw, name: str) -> Seen:
    create(raw, name)
    group = Group(raw, name, name)
    yield "joined", group.enter("a", "b", static={"a": "i", "b": "j"})
    group.send_sync("b", group_instance_id="j")
    yield "a assigns", group.sync("a", {"a": b"1", "b": b"2"}, group_instance_id="i")
    yield "b has it", group.synced("b")
    before = group.ids["b"]
    yield "b comes again", group.join("b", member_id="", group_instance_id="j")
    yield "and syncs", group.sync("b", group_instance_id="j")
    yield "a was not disturbed", group.beat("a", group_instance_id="i")
    for what, ask in (
        ("beat", group.beat), ("sync", group.sync), ("join", group.join),
    ):  # fmt: skip
        yield f"the one before: {what}", ask("b", member_id=before, group_instance_id="j")
    yield (
        "the one before commits",
        group.commit({0: 1}, who="b", member_id=before, group_instance_id="j"),
    )
    yield "an unknown instance", group.beat("a", group_instance_id="k")
    yield "a comes again, the leader", group.join("a", member_id="", group_instance_id="i")
    yield "and an old one", group.join("a", version=8, member_id="", group_instance_id="i")
    yield "described", group.describe()
    for instance in ("j", "k"):
        yield f"an operator removes {instance}", raw.ask(
            Api.LEAVE_GROUP, 5, group_id=name,
            members=[{"member_id": "", "group_instance_id": instance, "reason": None}],
        )  # fmt: skip
    yield "a beats", group.beat("a", group_instance_id="i")
    group.close()


@scenario
def group_static_members_that_fence_while_they_wait(raw: Raw, name: str) -> Seen:
    create(raw, name)
    group = Group(raw, name, name)
    group.enter("a")
    group.sync("a", {"a": b"x"})
    group.send_join("b", group_instance_id="j")
    group.wait_members(2)
    group.send_join("c", group_instance_id="j")
    yield "b is fenced", {**group.joined("b"), "member_id": ""}
    yield "a again", group.join("a")
    yield "c", group.joined("c")
    group.close()


# -- operators


@scenario
def group_lists(raw: Raw, name: str) -> Seen:
    create(raw, name)
    simple, full = Group(raw, name + "-simple", name), Group(raw, name + "-full", name)
    empty = Group(raw, name, name)
    simple.commit({0: 1})
    full.enter("a")
    full.sync("a", {"a": b"x"})
    empty.enter("a")
    empty.sync("a", {"a": b"x"})
    empty.leave("a")
    for version in range(6):
        yield f"v{version}", empty.listed(version)
    for states in (["Stable"], ["empty"], ["Empty", "STABLE"], ["Dead"], ["nonsense"]):
        yield f"{states}", empty.listed(states=states)
    for types in (["classic"], ["Consumer"], ["CLASSIC", "consumer"]):
        yield f"{types}", empty.listed(types=types)
    for group in (simple, full, empty):
        group.close()


@scenario
def group_descriptions_of_what_is_not_there(raw: Raw, name: str) -> Seen:
    group = Group(raw, name, name)
    for version in range(7):
        yield f"v{version}", group.describe(version, name, "")


def once(value: Any) -> Any:
    """What a reply tells, however often it tells it."""
    if isinstance(value, dict):
        return {name: once(each) for name, each in value.items()}
    if isinstance(value, list):
        found: list[Any] = []
        for each in map(once, value):
            if each not in found:
                found.append(each)
        return found
    return value


def named_twice(raw: Raw, name: str) -> Seen:
    """Requests that name everything twice; `name` is a topic and a group."""
    yield (
        "groups",
        raw.ask(Api.DESCRIBE_GROUPS, 6, groups=[name, name], include_authorized_operations=False),
    )
    yield "next-generation groups", raw.ask(
        Api.CONSUMER_GROUP_DESCRIBE, 1, group_ids=[name, name],
        include_authorized_operations=False,
    )  # fmt: skip
    yield (
        "coordinators",
        raw.ask(Api.FIND_COORDINATOR, 4, key_type=0, coordinator_keys=[name, name]),
    )
    until(lambda: raw.ask(Api.FIND_COORDINATOR, 2, key=name, key_type=1))

    def transactions() -> Any:
        return raw.ask(Api.DESCRIBE_TRANSACTIONS, 0, transactional_ids=[name, name])

    until(lambda: transactions()["transaction_states"][0])
    yield "transactions", transactions()
    topic = {"name": name, "topic_id": None}
    yield "topics", raw.ask(
        Api.METADATA, 12, topics=[topic, topic], allow_auto_topic_creation=False,
        include_topic_authorized_operations=False,
    )  # fmt: skip
    resource = {
        "resource_type": 2, "resource_name": name, "configuration_keys": ["max.message.bytes"],
    }  # fmt: skip
    yield "settings", raw.ask(
        Api.DESCRIBE_CONFIGS, 4, resources=[resource, resource], include_synonyms=False,
        include_documentation=False,
    )  # fmt: skip
    both = {"name": name, "partition_indexes": [0, 0]}
    yield "producers", raw.ask(Api.DESCRIBE_PRODUCERS, 0, topics=[both, both])
    for what, topics in {"all offsets": None, "some offsets": [both, both]}.items():
        wanted = {"group_id": name, "member_id": None, "member_epoch": -1, "topics": topics}
        yield what, raw.ask(
            Api.OFFSET_FETCH, 9, require_stable=False, groups=[wanted, wanted]
        )  # fmt: skip


@scenario
def what_is_named_twice(raw: Raw, name: str) -> Seen:
    """Ours tells it once: clients look their answers up by name."""
    create(raw, name)
    Group(raw, name, name).commit({0: 1})
    for what, reply in named_twice(raw, name):
        yield what, once(reply)


@scenario
def group_deletion(raw: Raw, name: str) -> Seen:
    create(raw, name)
    group = Group(raw, name, name)

    def delete(*names: str, version: int = 2) -> Any:
        reply = raw.ask(Api.DELETE_GROUPS, version, groups_names=list(names))
        return sorted(reply["results"], key=lambda each: str(each["group_id"]))

    for version in range(3):
        yield f"not there v{version}", delete(name, "", version=version)
    group.commit({0: 1})
    group.enter("a")
    group.sync("a", {"a": b"x"})
    yield "not empty", delete(name)
    group.leave("a")
    yield "twice in one", delete(name, name)
    yield "offsets", group.fetch(0)
    yield "described", group.describe()
    group.close()


# -- offsets in transactions


@scenario
def group_offsets_in_a_transaction(raw: Raw, name: str) -> Seen:
    """Items 93, 94, 95, 97."""
    create(raw, name, 2)
    group, producer = Group(raw, name, name), Producer(raw, name)
    producer.init()
    group.commit({0: 1})
    for version in (3, 4):
        yield f"before it is added v{version}", group.stage(producer, {0: 9}, version=version)
    yield "added", group.add_to(producer)
    yield "added twice", group.add_to(producer)
    for version in range(5):
        yield f"staged v{version}", group.stage(producer, {0: 10 + version}, version=version)
    huge = [group.commits({0: 20}), group.commits({1: 20}, metadata="x" * 5000)]
    yield "too large", group.stage(producer, {}, topics=huge)
    yield "no partition", group.stage(producer, {7: 1})
    yield "not seen yet", group.fetch(0, 1)
    yield "unstable", group.fetch(0, 1, stable=True)
    yield "unstable, all", group.fetch(version=7, all_of=True, stable=True)
    yield "committed", producer.end(True)
    producer.describe()
    yield "seen", until_stable(group)
    yield "again", group.add_to(producer)
    group.stage(producer, {0: 30, 1: 31})
    yield "aborted", producer.end(False)
    producer.describe()
    yield "as before", until_stable(group)


def until_stable(group: Group) -> Any:
    """Kafka writes the marker after it has answered."""
    while True:
        reply = group.fetch(0, 1, stable=True)
        parts = reply["groups"][0]["topics"][0]["partitions"]
        if not any(part["error_code"] == "unstable_offset_commit" for part in parts):
            return reply


@scenario
def group_offsets_in_a_transaction_with_implicit_adding(raw: Raw, name: str) -> Seen:
    """Items 92, 94."""
    create(raw, name, 2)
    group, producer = Group(raw, name, name), Producer(raw, name, v2=True)
    producer.init()
    yield "staged", group.stage(producer, {0: 5}, version=5)
    yield "described", producer.describe()
    yield "unstable", group.fetch(0, 1, stable=True)
    old = producer.pid, producer.epoch
    yield "committed", producer.end(True)
    producer.describe()  # until its marker is there
    late = group.stage(producer, {0: 6}, version=5, producer_id=old[0], producer_epoch=old[1])
    yield "late", late
    yield "seen", until_stable(group)
    yield "next", group.stage(producer, {0: 7}, version=5)
    yield "aborted", producer.end(False)
    producer.describe()
    yield "as before", until_stable(group)


@scenario
def group_offsets_in_a_transaction_are_fenced(raw: Raw, name: str) -> Seen:
    """Items 96, 97."""
    create(raw, name, 2)
    group, producer = Group(raw, name, name), Producer(raw, name)
    group.send_join("a", group_instance_id="i")
    group.joined("a")
    group.sync("a", {"a": b"x"}, group_instance_id="i")
    producer.init()
    group.add_to(producer)
    me = {"member_id": group.ids["a"], "generation_id": 1, "group_instance_id": "i"}
    for what, more in (
        ("as it is", {}), ("generation 0", {"generation_id": 0}),
        ("generation 2", {"generation_id": 2}), ("another member", {"member_id": "other"}),
        ("another instance", {"group_instance_id": "j"}),
        ("no instance", {"group_instance_id": None}),
        ("no member", {"member_id": "", "generation_id": -1, "group_instance_id": None}),
        ("no generation", {"generation_id": -1}),
        ("no group", {"group_id": name + "-none"}),
        ("the empty group", {"group_id": ""}),
        ("an old epoch", {"producer_epoch": -1}),
        ("another producer", {"producer_id": 2**40}),
    ):  # fmt: skip
        yield what, group.stage(producer, {0: 1}, **{**me, **more})
    yield "an old client", group.stage(producer, {0: 1}, version=2)
    yield "end", producer.end(True)
    group.close()


@scenario
def group_offsets_of_a_transaction_that_goes_over_a_deletion(raw: Raw, name: str) -> Seen:
    """Item 99."""
    create(raw, name, 2)
    group, producer = Group(raw, name, name), Producer(raw, name)
    producer.init()
    group.commit({0: 1})
    group.add_to(producer)
    group.stage(producer, {0: 5, 1: 5})
    yield "deleted", raw.ask(Api.DELETE_GROUPS, 2, groups_names=[name])
    yield "none", group.fetch(0, 1, stable=True)
    yield "committed", producer.end(True)
    producer.describe()
    yield "still none", until_stable(group)


@scenario
def group_offsets_of_plain_commits_that_race_with_a_transaction(raw: Raw, name: str) -> Seen:
    """Item 98."""
    create(raw, name, 2)
    group, producer = Group(raw, name, name), Producer(raw, name)
    producer.init()
    group.add_to(producer)
    group.stage(producer, {0: 5, 1: 5})
    group.commit({0: 3})
    producer.end(True)
    producer.describe()
    yield "the later one", until_stable(group)
