"""Consumers of the next-generation protocol (KIP-848), from librdkafka, against both brokers."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from tests.differential.consumergroups import SESSION, alter, known
from tests.differential.raw import Raw

WAIT_S = 60


class Group:
    """Consumers of one group, polled in turn; who has what, and what was read."""

    def __init__(self, address: str, name: str, topics: list[str], **config: object) -> None:
        self.address, self.name, self.topics = address, name, topics
        self.config = {"group.protocol": "consumer", **config}
        self.consumers: dict[str, Consumer] = {}
        self.read: list[bytes] = []

    def join(self, name: str, **config: object) -> None:
        consumer = Consumer({
            "bootstrap.servers": self.address,
            "group.id": self.name,
            "client.id": name,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            **self.config,
            **config,
        })  # fmt: skip
        consumer.subscribe(self.topics)
        self.consumers[name] = consumer

    def leave(self, name: str) -> None:
        self.consumers.pop(name).close()

    def shares(self) -> dict[str, list[tuple[str, int]]]:
        return {
            name: sorted((each.topic, each.partition) for each in consumer.assignment())
            for name, consumer in self.consumers.items()
        }

    def poll_until(self, well: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not well():
            assert time.monotonic() < deadline, (self.shares(), len(self.read))
            for consumer in self.consumers.values():
                message = consumer.poll(0.02)
                if message is not None:
                    assert message.error() is None, message.error()
                    self.read.append(message.value())

    def is_shared(self, partitions: int, *, most: int) -> bool:
        """Each partition has one consumer, and nobody has more than `most`."""
        shares = self.shares().values()
        found = sorted(each for share in shares for each in share)
        return len(found) == len(set(found)) == partitions and max(map(len, shares)) <= most

    def close(self) -> None:
        for name in list(self.consumers):
            self.leave(name)


@pytest.fixture
def filled(server: str, topic: str) -> tuple[str, str]:
    """A topic of six partitions with sixty records."""
    admin = AdminClient({"bootstrap.servers": server})
    admin.create_topics([NewTopic(topic, 6, 1)])[topic].result(30)
    producer = Producer({"bootstrap.servers": server})
    for number in range(60):
        producer.produce(topic, str(number).encode(), partition=number % 6)
    assert producer.flush(30) == 0
    return server, topic


def test_members_share_come_and_go(filled: tuple[str, str]) -> None:
    server, topic = filled
    group = Group(server, f"g-{topic}", [topic])
    try:
        group.join("a")
        group.poll_until(lambda: group.is_shared(6, most=6) and len(group.read) == 60)
        assert sorted(map(int, group.read)) == list(range(60))
        group.join("b")
        group.join("c")
        group.poll_until(lambda: group.is_shared(6, most=2))
        group.leave("b")
        group.poll_until(lambda: group.is_shared(6, most=3))
    finally:
        group.close()


def test_commits_are_taken_up_by_the_next_member(filled: tuple[str, str]) -> None:
    server, topic = filled
    group = Group(server, f"g-{topic}", [topic])
    try:
        group.join("a")
        group.poll_until(lambda: len(group.read) == 60)
        group.consumers["a"].commit(asynchronous=False)
        committed = group.consumers["a"].committed([TopicPartition(topic, p) for p in range(6)], 30)
        assert [each.offset for each in committed] == [10] * 6
        group.leave("a")
        producer = Producer({"bootstrap.servers": server})
        producer.produce(topic, b"60", partition=0)
        producer.flush(30)
        group.join("b")
        group.poll_until(lambda: len(group.read) == 61)
        assert group.read[-1] == b"60"
    finally:
        group.close()


def test_a_regular_expression_takes_in_topics_that_come_later(server: str, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": server})
    names = [f"{topic}-x-{letter}" for letter in "ab"]
    admin.create_topics([NewTopic(names[0], 2, 1)])[names[0]].result(30)
    group = Group(server, f"g-{topic}", [f"^{topic}-x-.*"])
    try:
        group.join("a")
        group.poll_until(lambda: group.is_shared(2, most=2))
        admin.create_topics([NewTopic(names[1], 2, 1)])[names[1]].result(30)
        group.poll_until(lambda: group.is_shared(4, most=4))
    finally:
        group.close()


def test_an_operator_sees_and_deletes_a_group(filled: tuple[str, str]) -> None:
    server, topic = filled
    admin = AdminClient({"bootstrap.servers": server})
    group = Group(server, f"g-{topic}", [topic])
    try:
        group.join("a")
        group.poll_until(lambda: group.is_shared(6, most=6))
        described = admin.describe_consumer_groups([group.name])[group.name].result(30)
        assert (described.state.name, described.type.name) == ("STABLE", "CONSUMER")
        (member,) = described.members
        assert len(member.assignment.topic_partitions) == 6
        listed = admin.list_consumer_groups().result(30)
        assert group.name in {each.group_id for each in listed.valid}
        group.consumers["a"].commit(
            offsets=[TopicPartition(topic, 0, 5)], asynchronous=False
        )  # fmt: skip
    finally:
        group.close()
    admin.delete_consumer_groups([group.name])[group.name].result(30)
    asked = ConsumerGroupTopicPartitions(group.name, [TopicPartition(topic, 0)])
    found = admin.list_consumer_group_offsets([asked])[group.name].result(30)
    assert [each.offset for each in found.topic_partitions] in ([-1001], [-1])


@pytest.mark.parametrize("first", ["classic", "consumer"])
def test_a_group_is_changed_over_member_by_member(filled: tuple[str, str], first: str) -> None:
    server, topic = filled
    then = "consumer" if first == "classic" else "classic"
    group = Group(server, f"g-{topic}", [topic])
    try:
        group.join("a", **{"group.protocol": first})
        group.join("b", **{"group.protocol": first})
        group.poll_until(lambda: group.is_shared(6, most=3))
        for old, new in (("a", "c"), ("b", "d")):
            group.join(new, **{"group.protocol": then})
            group.poll_until(lambda: group.is_shared(6, most=2))
            group.leave(old)
            group.poll_until(lambda: group.is_shared(6, most=3))
    finally:
        group.close()


CHILD = """
import sys
from confluent_kafka import Consumer

address, group, topic = sys.argv[1:]
consumer = Consumer({
    "bootstrap.servers": address, "group.id": group, "group.protocol": "consumer",
    "client.id": "child", "auto.offset.reset": "earliest", "enable.auto.commit": False,
})
consumer.subscribe([topic])
told = -1
while True:
    consumer.poll(0.05)
    if told != len(consumer.assignment()):
        told = len(consumer.assignment())
        print(told, flush=True)
"""


@pytest.fixture
def child(filled: tuple[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A consumer of the topic, alone in a process of its own; it says how much it has."""
    server, topic = filled
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, server, f"group-{topic}", topic],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_who_takes_over_from_a_member_that_was_killed(
    filled: tuple[str, str], child: subprocess.Popen[str]
) -> None:
    """Nobody says goodbye: its session ends, as soon as an operator has set for the group."""
    server, topic = filled
    name = f"group-{topic}"
    with Raw(server) as raw:
        assert alter(raw, name, (SESSION, 0, "6000")) == [("none", None)]
        known(raw, name, SESSION, "6000")
    assert child.stdout is not None
    while child.stdout.readline().strip() != "6":
        assert child.poll() is None
    group = Group(server, name, [topic])
    group.join("a")
    group.poll_until(lambda: len(group.shares()["a"]) == 3)
    while child.stdout.readline().strip() != "3":
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    killed = time.monotonic()
    group.poll_until(lambda: len(group.shares()["a"]) == 6)
    assert time.monotonic() - killed < 30  # sessions of 45 s are the default
    group.poll_until(lambda: {*group.read} == {str(number).encode() for number in range(60)})
    group.close()
