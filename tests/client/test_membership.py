"""Membership of groups, on our broker and on Apache Kafka, by both protocols."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import (
    Client,
    Group,
    GroupReader,
    Listener,
    NotAssigned,
    TransactionError,
    membership,
)
from ledgerstream.client.groupoffsets import TopicPartition
from ledgerstream.client.grouptalk import ModernTalk
from ledgerstream.client.offsets import LATEST
from ledgerstream.errors import ConfigError, KafkaError
from ledgerstream.limits import KIB, LIMITS, MIB
from ledgerstream.wire import batches
from ledgerstream.wire.versions import Api
from tests.client.test_transactional import Deaf
from tests.peers.kafka import free_port

Places = frozenset[TopicPartition]
SECONDS_MAX = 60


@pytest.fixture(params=["modern", "classic"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As with a cluster that has next-generation groups, and with one that has them not."""
    if request.param == "classic":
        monkeypatch.setattr(membership, "MODERN_LEVEL", 99)
    return str(request.param)


@pytest.fixture
async def both(server: str) -> AsyncIterator[Client]:
    """Classic members hear of a rebalance by a heartbeat: often, here."""
    limits = replace(LIMITS, member_heartbeat_ms=100)
    async with await Client.connect(server, limits=limits) as connected:
        yield connected


class Watch(Listener):
    """What happens to several members; NoPartitionHasTwoUsers."""

    def __init__(self) -> None:
        self.users: Counter[TopicPartition] = Counter()
        self.events: list[str] = []
        self.error: Exception | None = None

    async def assigned(self, places: Places) -> None:
        self.events.append("assigned")
        self.users.update(places)
        assert max(self.users.values()) == 1, self.users
        if self.error is not None:
            raise self.error

    async def revoked(self, places: Places) -> None:
        self.events.append("revoked")
        await asyncio.sleep(0)  # others have their turn
        self.users.subtract(places)

    async def lost(self, places: Places) -> None:
        self.events.append("lost")
        self.users.subtract(places)


async def until(groups: list[Group], holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not holds():
            waits = [asyncio.ensure_future(group.bell.wait()) for group in groups]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for each in waits:
                each.cancel()


def shares(groups: list[Group]) -> list[int]:
    return sorted(len(group.assignment) for group in groups)


async def test_members_share_what_there_is(both: Client, topic: str, kind: str) -> None:
    await both.create_topic(topic, 4)
    watch, name = Watch(), f"g-{topic}"
    async with both.group(name, [topic], listener=watch) as first:
        await until([first], lambda: shares([first]) == [4])
        assert first.is_modern is (kind == "modern")
        second = both.group(name, [topic], listener=watch)
        await second.start()
        await until([first, second], lambda: shares([first, second]) == [2, 2])
        assert first.assignment | second.assignment == {(topic, p) for p in range(4)}
        await second.close()
        await until([first], lambda: shares([first]) == [4])
    assert not +watch.users
    assert "lost" not in watch.events


async def produce(client: Client, topic: str, enough: asyncio.Event) -> int:
    """Numbers, to the partitions in turn, until there are enough; how many."""
    producer, count = await client.producer(), 0
    while not enough.is_set():
        sends = [producer.send(topic, b"%d" % (count + p), partition=p) for p in range(4)]
        await asyncio.gather(*sends)
        count += 4
    return count


async def consume(reader: GroupReader, seen: Counter[bytes], ends: Callable[[int], bool]) -> None:
    """Until that is enough, of so many chunks."""
    chunks = 0
    async with reader:
        while not ends(chunks):
            found = await reader.next(100)
            if found is None:
                continue
            _, chunk = found
            chunks += 1
            await asyncio.sleep(0.002)  # work, during which the partition may be asked for
            for at, _ in batches.headers(chunk.data):
                for record in batches.records(chunk.data, at):
                    if record.offset >= chunk.start:
                        assert record.value is not None
                        seen[record.value] += 1
        await reader.commit()


async def test_every_record_is_read_once_while_members_come_and_go(
    both: Client, topic: str, kind: str
) -> None:
    await both.create_topic(topic, 4)
    seen, name, enough = Counter[bytes](), f"g-{topic}", asyncio.Event()
    async with asyncio.timeout(SECONDS_MAX), asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(produce(both, topic, enough))

        def ends(_: int) -> bool:
            return writing.done() and len(seen) >= writing.result()

        tasks.create_task(consume(both.consume(name, [topic]), seen, ends))
        for _ in range(3):
            await consume(both.consume(name, [topic]), seen, lambda chunks: chunks >= 20)
        enough.set()
    assert set(seen.values()) == {1}
    assert len(seen) == writing.result()


async def test_another_topic_comes_and_one_goes(both: Client, topic: str, kind: str) -> None:
    await both.create_topic(topic, 2)
    await both.create_topic(f"{topic}-b", 1)
    watch = Watch()
    async with both.group(f"g-{topic}", [topic], listener=watch) as group:
        await until([group], lambda: shares([group]) == [2])
        group.subscribe([topic, f"{topic}-b"])
        await until([group], lambda: shares([group]) == [3])
        group.subscribe([f"{topic}-b"])
        await until([group], lambda: group.assignment == {(f"{topic}-b", 0)})
    assert "lost" not in watch.events


async def test_a_topic_that_is_made_again_is_read_from_its_start(
    both: Client, topic: str, kind: str
) -> None:
    """Under the same name, whatever the group had done with in the old one; others are read on."""
    other = f"{topic}-other"
    for name in (topic, other):
        await both.create_topic(name, 1)
    producer = await both.producer()
    await producer.send(topic, b"old")
    async with both.consume(f"g-{topic}", [topic, other]) as reader:
        async with asyncio.timeout(SECONDS_MAX):
            assert (await reader.next())[0] == topic
            await reader.commit()
            await both.delete_topic(topic)
            await both.create_topic(topic, 1)
            again = await both.producer()
            for name in (topic, other):
                await again.send(name, b"new")
            found = dict([await reader.next(), await reader.next()])
    assert {name: chunk.start for name, chunk in found.items()} == {topic: 0, other: 0}
    assert b"new" in found[topic].data


async def test_many_topics_share_what_is_read_ahead(server: str, topic: str) -> None:
    """And none of them is starved."""
    names = [f"{topic}-{number}" for number in range(8)]
    limits = replace(LIMITS, reader_fetch_bytes=MIB, producer_batch_bytes=64 * KIB)
    async with await Client.connect(server, limits=limits) as client:
        producer = await client.producer()
        for name in names:
            await client.create_topic(name, 1)
            await asyncio.gather(*(producer.send(name, bytes(60 * KIB)) for _ in range(40)))
        left = Counter(dict.fromkeys(names, 40))
        async with client.consume(f"g-{topic}", names) as reader, asyncio.timeout(SECONDS_MAX):
            first: list[str] = []
            while left.total():
                name, chunk = await reader.next()
                first.append(name)
                left[name] -= sum(header.record_count for _, header in batches.headers(chunk.data))
                ahead = sum(each._buffered for each in reader._readers.values())
                if len(reader._readers) == len(names):
                    assert ahead <= 3 * MIB + len(names) * 64 * KIB
            assert set(first[: len(first) // 2]) == set(names)


async def test_topics_by_a_pattern(both: Client, topic: str, kind: str) -> None:
    for name in ("a", "b", "x"):
        await both.create_topic(f"{topic}.{name}", 1)
    pattern = re.compile(rf"{topic}\.[ab]")
    async with both.group(f"g-{topic}", pattern, listener=Watch()) as group:
        await until([group], lambda: len(group.assignment) == 2)
        assert group.assignment == {(f"{topic}.a", 0), (f"{topic}.b", 0)}


async def test_a_static_member_comes_back_to_what_it_had(
    both: Client, topic: str, kind: str
) -> None:
    await both.create_topic(topic, 2)
    watch, name = Watch(), f"g-{topic}"
    async with both.group(name, [topic], listener=watch) as other:
        first = both.group(name, [topic], listener=watch, instance_id="i")
        await first.start()
        await until([first, other], lambda: shares([first, other]) == [1, 1])
        had = first.assignment
        await first.close()
        async with both.group(name, [topic], listener=watch, instance_id="i") as again:
            await until([again, other], lambda: shares([again, other]) == [1, 1])
            assert again.assignment == had
            assert again.metadata.instance_id == "i"


async def test_a_static_member_waits_for_the_one_that_was_killed(both: Client, topic: str) -> None:
    """It keeps its place until its session has passed (here: until it says goodbye)."""
    await both.create_topic(topic, 1)
    name = f"g-{topic}"
    killed = both.group(name, [topic], listener=Listener(), instance_id="i")
    await killed.start()
    await until([killed], lambda: len(killed.assignment) == 1)
    await killed.close(remain=True)
    async with both.group(name, [topic], listener=Watch(), instance_id="i") as again:
        before, after = again._talk, killed._talk
        assert isinstance(before, ModernTalk)
        assert after is not None
        await until([again], lambda: before._kept_out_since is not None)
        await after.leave()
        await until([again], lambda: len(again.assignment) == 1)
        after.coordinator.close()


async def test_whoever_takes_a_static_members_place_ends_its_membership(
    both: Client, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "MODERN_LEVEL", 99)
    await both.create_topic(topic, 1)
    name, watch = f"g-{topic}", Watch()
    first = both.group(name, [topic], listener=watch, instance_id="i")
    await first.start()
    await until([first], lambda: len(first.assignment) == 1)
    async with both.group(name, [topic], listener=Listener(), instance_id="i") as second:
        await until([second], lambda: len(second.assignment) == 1)
        with pytest.raises(KafkaError, match="FENCED_INSTANCE_ID"):
            await until([first], lambda: first.assignment == {("never", 0)})
        await first.close()
        assert watch.events == ["assigned", "lost"]


async def test_new_partitions_are_assigned(topic: str, server: str, kind: str) -> None:
    """By the coordinator, or by the leader of a classic group, which has to look."""
    limits = replace(LIMITS, member_heartbeat_ms=100, metadata_age_ms_max=200)
    async with await Client.connect(server, limits=limits) as client:
        await client.create_topic(topic, 1)
        async with client.group(f"g-{topic}", [topic], listener=Watch()) as group:
            await until([group], lambda: len(group.assignment) == 1)
            await client.add_partitions(topic, 3)
            await until([group], lambda: len(group.assignment) == 3)


async def test_a_reader_begins_where_one_says_and_keeps_what_is_not_done(
    both: Client, topic: str, kind: str
) -> None:
    await both.create_topic(topic, 1)
    producer, name = await both.producer(), f"g-{topic}"
    await producer.send(topic, b"0")
    async with both.consume(name, [topic]) as reader:
        assert (await reader.next())[1].next_offset == 1
    async with both.consume(name, [topic]) as reader:  # was not done with
        assert (await reader.next())[1].next_offset == 1
        assert await reader.next(50) is None  # it is now, and was committed when it left
    assert await both.committed(name, [(topic, 0)]) == {(topic, 0): 1}
    async with both.consume(f"{name}-late", [topic], start=LATEST) as reader:
        await until([reader.group], lambda: reader.positions == {(topic, 0): 1})
        await producer.send(topic, b"1")
        assert (await reader.next())[1].start == 1
        await reader.commit()
    async with both.consume(name, [topic], commit_revoked=False) as reader:
        assert (await reader.next())[1].start == 1
        assert await reader.next(50) is None
    assert await both.committed(name, [(topic, 0)]) == {(topic, 0): 1}


async def test_one_that_dies_is_noticed_when_its_session_has_passed(
    both: Client, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "MODERN_LEVEL", 99)  # its members say how long that is
    await both.create_topic(topic, 2)
    name, session_ms = f"g-{topic}", 6_000
    dying = both.group(name, [topic], listener=Listener(), session_ms=session_ms)
    await dying.start()
    async with both.group(name, [topic], listener=Watch(), session_ms=session_ms) as group:
        await until([group, dying], lambda: shares([group, dying]) == [1, 1])
        who = dying.metadata
        await dying.close(remain=True)
        assert len(group.assignment) == 1
        await until([group], lambda: len(group.assignment) == 2)
        with pytest.raises(KafkaError, match="UNKNOWN_MEMBER_ID"):
            await group._offsets.commit({(topic, 0): 1}, who)


async def test_offsets_are_committed_for_what_it_has_alone(
    both: Client, topic: str, kind: str
) -> None:
    await both.create_topic(topic, 2)
    async with both.group(f"g-{topic}", [topic], listener=Watch()) as group:
        with pytest.raises(NotAssigned, match="yet"):
            _ = group.metadata
        with pytest.raises(NotAssigned):
            await group.commit({(topic, 0): 1})
        await until([group], lambda: shares([group]) == [2])
        await group.commit({(topic, 0): 5, (topic, 1): 6})
        with pytest.raises(NotAssigned, match="another member's"):
            await group.commit({(topic, 0): 7, ("other", 0): 1})
        assert await group.committed([(topic, 0), (topic, 1)]) == {(topic, 0): 5, (topic, 1): 6}
    with pytest.raises(NotAssigned):
        await group.commit({(topic, 0): 7})


async def test_a_commit_waits_for_the_epoch_that_it_needs(both: Client, topic: str) -> None:
    await both.create_topic(topic, 1)
    async with both.group(f"g-{topic}", [topic], listener=Watch()) as group:
        await until([group], lambda: shares([group]) == [1])
        talk = group._talk
        assert talk is not None
        right = group.metadata
        wrong = right._replace(generation=right.generation + 1)
        talk.who = wrong  # the next heartbeat's answer puts it right
        with pytest.raises(KafkaError, match="STALE_MEMBER_EPOCH"):
            await group._offsets.commit({(topic, 0): 1}, wrong)
        talk.who = wrong
        await group.commit({(topic, 0): 3})
        assert group.metadata == right
        assert await group.committed([(topic, 0)]) == {(topic, 0): 3}


async def test_a_closed_connection_is_only_a_hint(both: Client, topic: str, kind: str) -> None:
    await both.create_topic(topic, 2)
    watch = Watch()
    async with both.group(f"g-{topic}", [topic], listener=watch) as group:
        await until([group], lambda: shares([group]) == [2])
        talk = group._talk
        assert talk is not None
        for _ in range(3):
            heard_at = talk.heard_at
            talk.coordinator.close()
            talk.coordinator._broker = None
            talk.missed()
            await until([group], lambda before=heard_at: talk.heard_at > before)  # type: ignore[misc]
        assert watch.events == ["assigned"]


async def test_what_a_listener_raises_is_raised_to_whoever_uses_the_group(
    client: Client, topic: str, kind: str
) -> None:
    await client.create_topic(topic, 1)
    watch = Watch()
    watch.error = ZeroDivisionError("nobody foresaw this")
    group = client.group(f"g-{topic}", [topic], listener=watch)
    await group.start()
    with pytest.raises(ZeroDivisionError):
        await until([group], lambda: group.assignment == {("never", 0)})
    with pytest.raises(ZeroDivisionError):
        await group.commit({(topic, 0): 1})
    await group.close()
    watch.error = None
    async with client.group(f"g-{topic}", [topic], listener=Watch()) as after:
        await until([after], lambda: len(after.assignment) == 1)  # the broken one has left


async def test_a_group_that_refuses_says_why(client: Client, topic: str) -> None:
    await client.create_topic(topic, 1)
    with pytest.raises(KafkaError, match="INVALID_REGULAR_EXPRESSION"):
        async with client.group(f"g-{topic}", re.compile("(?=a)"), listener=Watch()) as group:
            await group.wait_settled()
    with pytest.raises(ConfigError, match="one topic"):
        client.group("g", topic, listener=Watch())


async def test_a_transaction_of_one_that_is_no_member_any_more_fails_with_a_sentence(
    both: Client, topic: str, kind: str
) -> None:
    """Read, process, write: of two members that did the same work, one counts."""
    await both.create_topic(topic, 1)
    producer, name = await both.transactional(f"t-{topic}"), f"g-{topic}"
    zombie = both.group(name, [topic], listener=Watch())
    await zombie.start()
    await until([zombie], lambda: len(zombie.assignment) == 1)
    who = zombie.metadata
    async with producer.transaction():
        await producer.send_offsets({(topic, 0): 1}, who)
    await zombie.close()
    async with both.group(name, [topic], listener=Watch()) as group:
        await until([group], lambda: len(group.assignment) == 1)
        await producer.begin()
        await producer.send(topic, b"twice")
        with pytest.raises(TransactionError, match="has failed"):
            await producer.send_offsets({(topic, 0): 2}, who)
        await producer.abort()
        async with producer.transaction():
            await producer.send(topic, b"once")
            await producer.send_offsets({(topic, 0): 3}, group.metadata)
        assert await group.committed([(topic, 0)]) == {(topic, 0): 3}


async def test_answers_that_are_lost_and_a_silent_broker(
    tmp_path: Path, topic: str, kind: str
) -> None:
    """Lost answers change nothing; a session without any answer loses everything, and the member
    comes back by itself."""
    apis = [Api.JOIN_GROUP, Api.SYNC_GROUP, Api.HEARTBEAT]
    if kind == "modern":
        apis = [Api.CONSUMER_GROUP_HEARTBEAT]
    session_ms = 1_500 if kind == "modern" else 6_000
    port = free_port()
    limits = replace(LIMITS, member_heartbeat_ms=100)
    async with (
        Deaf(port) as proxy,
        await Broker.embedded(tmp_path, port=port, advertised_port=proxy.port),
        await Client.connect(f"127.0.0.1:{proxy.port}", limits=limits) as client,
    ):
        await client.create_topic(topic, 2)
        watch = Watch()
        proxy.times = dict.fromkeys(apis, 2)
        async with client.group(
            f"g-{topic}", [topic], listener=watch, session_ms=session_ms
        ) as group:
            await until([group], lambda: len(group.assignment) == 2)
            proxy.times[apis[-1]] = 2
            await until([group], lambda: not any(proxy.times.values()))
            assert watch.events == ["assigned"]
            assert proxy.cut >= 2 * len(apis)
            proxy.times = dict.fromkeys(apis, 1_000_000)
            await until([group], lambda: "lost" in watch.events)
            proxy.times = {}
            await until([group], lambda: watch.events == ["assigned", "lost", "assigned"])
