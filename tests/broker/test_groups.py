"""Groups through the wire: restarts, coordinators that are lost, the clock, Kafka's own decoder."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kio.schema.errors import ErrorCode

from ledgerstream.broker.embedded import Broker
from ledgerstream.broker.grouphost import TOPIC
from ledgerstream.broker.node import Node
from ledgerstream.broker.settings import Settings
from ledgerstream.broker.shards import Unavailable
from ledgerstream.groups import Committing, Join, Phase, Sync, Wish
from ledgerstream.limits import Limits
from ledgerstream.wire.described import read_described
from ledgerstream.wire.markers import coordinator_partition
from ledgerstream.wire.versions import Api
from tests.broker.fulldisk import full_for
from tests.differential.consumergroups import Member
from tests.differential.groups import Group, subscription
from tests.differential.raw import Raw
from tests.differential.scenarios import create
from tests.differential.transactions import Producer
from tests.peers import kafka

RANGE = (("range", b""),)
QUICK = Limits(
    storage_retry_ms=20, tick_ms=5, coordinator_partitions=4, offsets_expiry_check_ms=20,
    group_session_ms_min=100,
    round_journal_bytes=0, round_direct_files_max=10_000,  # a failing file fails its round
)  # fmt: skip


@asynccontextmanager
async def running(
    path: Path, limits: Limits = QUICK, now_ms: Any = None, **settings: Any
) -> AsyncIterator[Node]:
    how = {"group_delay_ms": 0, **settings}
    clock = {} if now_ms is None else {"now_ms": now_ms}
    node = Node(Settings(data_dir=path, port=0, **how), limits, **clock)
    await node.start()
    try:
        yield node
    finally:
        await node.stop()


def offsets_of(group: Group, *partitions: int) -> list[int]:
    reply = group.fetch(*partitions)
    return [p["committed_offset"] for p in reply["groups"][0]["topics"][0]["partitions"]]


async def test_offsets_and_members_survive_a_crash(tmp_path: Path) -> None:
    """Items 50, 94: also offsets that are staged. A client that went on does not notice."""

    def before(address: str) -> tuple[dict[str, str], int, Producer]:
        with Raw(address) as raw:
            create(raw, "t", 2)
            group, producer = Group(raw, "g", "t"), Producer(raw, "p")
            producer.init()
            group.enter("a", "b")
            group.send_sync("b")
            group.sync("a", {"a": b"1", "b": b"2"})
            group.synced("b")
            assert group.commit({0: 5}, who="a")["topics"][0]["partitions"][0][
                "error_code"
            ] == "none"  # fmt: skip
            group.add_to(producer)
            group.stage(producer, {1: 7})
            group.close()
            return group.ids, group.generation, producer

    def after(address: str, ids: dict[str, str], generation: int, producer: Producer) -> None:
        with Raw(address) as raw:
            group = Group(raw, "g", "t")
            group.ids, group.generation = ids, generation
            producer.raw = raw
            assert group.beat("a")["error_code"] == "none"
            assert group.sync("b")["assignment"] == b"2"
            assert offsets_of(group, 0, 1) == [5, -1]
            reply = group.fetch(1, stable=True)["groups"][0]["topics"][0]["partitions"][0]
            assert reply["error_code"] == "unstable_offset_commit"
            assert producer.end(True) == "none"
            producer.describe()
            assert offsets_of(group, 0, 1) == [5, 7]
            group.close()

    broker = await Broker.embedded(tmp_path)
    told = await asyncio.to_thread(before, broker.address)
    await broker.kill()
    broker = await Broker.embedded(tmp_path)
    await asyncio.to_thread(after, broker.address, *told)
    await broker.stop()


def test_a_marker_is_answered_when_the_offsets_are_there(our_broker: Broker, topic: str) -> None:
    """Item 72; bug 9: whoever hears that the marker is written sees the offsets."""
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        group, producer = Group(raw, topic, topic), Producer(raw, topic)
        producer.init()
        for n in range(20):
            group.add_to(producer)
            group.stage(producer, {0: n})
            raw.ask(
                Api.WRITE_TXN_MARKERS, 1,
                markers=[{
                    "producer_id": producer.pid, "producer_epoch": producer.epoch,
                    "transaction_result": True, "coordinator_epoch": 0,
                    "topics": [{"name": TOPIC, "partition_indexes": list(range(50))}],
                }],
            )  # fmt: skip
            assert offsets_of(group, 0) == [n]
            producer.end(True)


def test_the_groups_partition_is_added_to_the_transaction(our_broker: Broker, topic: str) -> None:
    """Items 49, 92: by AddOffsetsToTxn, and by TxnOffsetCommit of version 5."""
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        group = Group(raw, topic, topic)
        where = (TOPIC, coordinator_partition(topic, 50))
        for v2 in (False, True):
            producer = Producer(raw, f"{topic}-{v2}", v2=v2)
            producer.init()
            if v2:
                group.stage(producer, {0: 1}, version=5)
            else:
                assert group.add_to(producer) == "none"
            raw.send(Api.DESCRIBE_TRANSACTIONS, 0, transactional_ids=[producer.txn_id])
            frame = raw.frame()
            assert frame is not None
            (state,) = read_described(frame)
            assert state.state == "Ongoing"
            assert list(state.partitions) == [where]
            producer.end(False)


@pytest.mark.parametrize(
    ("version", "code"), [(0, "invalid_txn_state"), (3, "invalid_txn_state"),
                          (4, "transaction_abortable")]
)  # fmt: skip
def test_offsets_of_no_transaction_are_refused(
    our_broker: Broker, topic: str, version: int, code: str
) -> None:
    """Items 85, 93."""
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        group, producer = Group(raw, topic, topic), Producer(raw, topic)
        producer.init()
        reply = group.stage(producer, {0: 1}, version=version)
        assert reply["topics"][0]["partitions"][0]["error_code"] == code
        assert offsets_of(group, 0) == [-1]


def test_offsets_that_come_after_their_transaction_begin_no_other(
    our_broker: Broker, topic: str
) -> None:
    """Item 91, of offsets; bug 2: nothing of the group stays unstable."""
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        group, producer = Group(raw, topic, topic), Producer(raw, topic)
        producer.init()
        group.add_to(producer)
        group.stage(producer, {0: 1})
        producer.end(False)
        producer.describe()
        late = group.stage(producer, {0: 1})
        assert late["topics"][0]["partitions"][0]["error_code"] == "invalid_txn_state"
        part = group.fetch(0, stable=True)["groups"][0]["topics"][0]["partitions"][0]
        assert (part["error_code"], part["committed_offset"]) == ("none", -1)


@pytest.mark.parametrize(
    ("version", "code"),
    [(1, "coordinator_not_available"), (2, "coordinator_load_in_progress")],
)
async def test_clients_that_cannot_hear_of_loading_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, code: str
) -> None:
    """Item 100."""

    async def loading(*_: Any, **__: Any) -> ErrorCode:
        return ErrorCode.coordinator_load_in_progress

    async with running(tmp_path) as node:
        await node.create_topic("t", 1)
        monkeypatch.setattr(node.groups.shards, "find", loading)

        def ask() -> Any:
            part = {
                "partition_index": 0, "committed_offset": 1, "committed_leader_epoch": -1,
                "committed_metadata": "",
            }  # fmt: skip
            with Raw(f"127.0.0.1:{node.port}") as raw:
                return raw.ask(
                    Api.TXN_OFFSET_COMMIT, version, transactional_id="p", group_id="g",
                    producer_id=1, producer_epoch=0,
                    topics=[{"name": "t", "partitions": [part]}],
                )  # fmt: skip

        reply = await asyncio.to_thread(ask)
        assert reply["topics"][0]["partitions"][0]["error_code"] == code


async def test_a_dead_producers_offsets_are_aborted_in_time(tmp_path: Path) -> None:
    """Bug 25: the group is not stuck."""
    now = 1_000_000
    quick = Limits(tick_ms=5, transaction_timeout_check_ms=1, coordinator_partitions=4)
    async with running(tmp_path, quick, now_ms=lambda: now) as node:
        await node.create_topic("t", 1)
        address = f"127.0.0.1:{node.port}"

        def stage() -> None:
            with Raw(address) as raw:
                group, producer = Group(raw, "g", "t"), Producer(raw, "p")
                producer.init()
                group.add_to(producer)
                group.stage(producer, {0: 1})

        await asyncio.to_thread(stage)
        shard = await node.groups.shards.find("g")
        assert not isinstance(shard, ErrorCode)
        assert shard.machine.offsets.in_transactions("g")
        now += 61_000
        async with asyncio.timeout(20):
            while shard.machine.offsets.in_transactions("g"):
                await asyncio.sleep(0.005)
        assert shard.machine.fetch("g", None, stable=True) == []


class Ticket:
    """Of a request without a connection."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def tell(self, reply: Any) -> None:
        self.told.append(reply)


def join(node: Node, shard: Any, member_id: str, new_id: str) -> Ticket:
    ticket = Ticket()
    asked = Join(member_id, new_id, None, "c", "/h", 100, 60_000, "consumer", RANGE, False)
    decision = shard.machine.decide_join("g", asked, ticket, node.groups.at_ms, 0)
    node.groups.perform(shard, decision, lambda _: None, decision.reply)
    return ticket


async def told(ticket: Ticket) -> Any:
    async with asyncio.timeout(20):
        while not ticket.told:
            await asyncio.sleep(0.002)
    (reply,) = ticket.told
    return reply


async def test_who_is_parked_is_told_when_the_coordinator_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full: the machine is thrown away, and nobody waits for what it knew."""
    switch = full_for(monkeypatch, TOPIC)
    async with running(tmp_path) as node:
        shard = await node.groups.shards.find("g")
        assert not isinstance(shard, ErrorCode)
        assert (await told(join(node, shard, "", "a"))).error is ErrorCode.none
        waits = join(node, shard, "", "b")
        assert list(shard.machine.parked()) == [waits]
        switch(True)
        decision = shard.machine.decide_commit("h", Committing(), [Wish("t", 0, 1)], 0, 0)
        with pytest.raises(Unavailable):
            await shard.perform(decision)
        assert await told(waits) is ErrorCode.not_coordinator
        switch(False)
        async with asyncio.timeout(20):
            while not shard.ready:
                await asyncio.sleep(0.005)
        assert shard.machine.classic("g") is None  # its generation was never completed


async def test_a_clean_stop_answers_who_is_parked(tmp_path: Path) -> None:
    began = time.monotonic()
    async with running(tmp_path) as node:
        await node.create_topic("t", 1)
        address = f"127.0.0.1:{node.port}"

        def waits() -> Any:
            with Raw(address) as raw:
                group = Group(raw, "g", "t")
                group.enter("a")
                group.sync("a", {"a": b"x"})
                group.send_join("b", version=3)
                reply = group.joined("b", 3)
                group.close()
                return reply

        waiting = asyncio.create_task(asyncio.to_thread(waits))
        shard = await node.groups.shards.find("g")
        assert not isinstance(shard, ErrorCode)

        def waits_for_a() -> bool:
            group = shard.machine.classic("g")
            again = group is not None and (group.phase, group.generation) == (Phase.PREPARING, 1)
            return again and bool(list(shard.machine.parked()))

        async with asyncio.timeout(20):
            while not waits_for_a():
                await asyncio.sleep(0.005)
    assert (await waiting)["error_code"] == "not_coordinator"
    assert time.monotonic() - began < 20


async def test_old_offsets_and_groups_are_forgotten_by_the_clock(tmp_path: Path) -> None:
    """Item 99."""
    now = 1_000_000
    quick = Limits(tick_ms=5, offsets_expiry_check_ms=1)
    async with running(tmp_path, quick, now_ms=lambda: now, offsets_kept_hours=1) as node:
        await node.create_topic("t", 1)
        shard = await node.groups.shards.find("g")
        assert not isinstance(shard, ErrorCode)
        await shard.perform(
            shard.machine.decide_commit("g", Committing(), [Wish("t", 0, 1)], 0, now)
        )
        now += 3_599_000
        await asyncio.sleep(0.1)  # many ticks: it stays
        assert "g" in shard.machine.groups
        now += 1_001
        async with asyncio.timeout(20):
            while "g" in shard.machine.groups:
                await asyncio.sleep(0.005)
        assert len(shard.machine.offsets) == 0


async def test_offsets_go_with_their_topic(tmp_path: Path) -> None:
    """Also where the broker was killed in between: a topic of that name begins without."""
    async with running(tmp_path) as node:
        await node.create_topic("t", 1)
        shard = await node.groups.shards.find("g")
        assert not isinstance(shard, ErrorCode)

        async def commit() -> None:
            await shard.perform(
                shard.machine.decide_commit("g", Committing(), [Wish("t", 0, 1)], 0, 0)
            )

        await commit()
        await node.perform(node.catalog.decide_delete(node.catalog.topics["t"]))
        assert len(shard.machine.offsets) == 0
        await commit()  # as if it had been deleted just before a crash
    async with running(tmp_path) as node:
        shard = await node.groups.shards.find("g")
        assert not isinstance(shard, ErrorCode)
        assert len(shard.machine.offsets) == 0


async def test_sessions_end_by_the_clock(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        shard = await node.groups.shards.find("g")
        assert not isinstance(shard, ErrorCode)
        await told(join(node, shard, "", "a"))
        began, ticket = node.groups.at_ms, Ticket()
        sync = Sync("a", 1, assignments=(("a", b"x"),))
        assigned = shard.machine.decide_sync("g", sync, ticket, began, 0)
        node.groups.perform(shard, assigned, lambda _: None, assigned.reply)
        assert (await told(ticket)).assignment == b"x"
        group = shard.machine.classic("g")
        assert group is not None and group.phase is Phase.STABLE
        async with asyncio.timeout(20):
            while group.phase is not Phase.EMPTY:
                await asyncio.sleep(0.002)
        assert 100 <= node.groups.at_ms - began < 5_000
        assert group.generation == 2


async def test_a_group_that_fails_at_its_time_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is read from its log again: what was acknowledged is there, and sessions end."""
    async with running(tmp_path) as node:
        await node.create_topic("t", 1)
        shard = await node.groups.shards.find("g")
        assert not isinstance(shard, ErrorCode)
        await told(join(node, shard, "", "a"))
        ticket = Ticket()
        sync = Sync("a", 1, assignments=(("a", b"x"),))
        assigned = shard.machine.decide_sync("g", sync, ticket, node.groups.at_ms, 0)
        node.groups.perform(shard, assigned, lambda _: None, assigned.reply)
        await told(ticket)
        failed: list[int] = []

        def fail_once(at_ms: int, now_ms: int) -> None:
            failed.append(at_ms)
            # what another decides at this very time is not durable yet, and not forgotten either
            wish = shard.machine.decide_commit("h", Committing(), [Wish("t", 0, 7)], at_ms, now_ms)
            node.groups.perform(shard, wish, lambda _: None)
            raise RuntimeError("planted")

        monkeypatch.setattr(shard.machine, "decide_tick", fail_once)
        async with asyncio.timeout(20):
            while not failed or not shard.ready:
                await asyncio.sleep(0.002)
            group = shard.machine.classic("g")
            assert group is not None
            assert group.phase is Phase.STABLE
            while group.phase is not Phase.EMPTY:
                await asyncio.sleep(0.002)
        assert shard.machine.offsets.of("h")["t", 0].record.offset == 7
        assert len(failed) == 1


async def test_ids_that_nobody_takes_up_are_given_to_so_many(tmp_path: Path) -> None:
    """Also beside members that are settled; and a client's name is kept short."""
    limits = replace(QUICK, group_members_max=3, group_client_id_bytes_max=20)

    def ask(address: str) -> list[str]:
        with Raw(address) as raw:
            create(raw, "t")
            group = Group(raw, "g", "t")
            group.enter("a")
            group.sync("a", {"a": b"x"})
            group.wire("b").client_id = "c" * 1_000
            errors = []
            for _ in range(5):
                group.ids.pop("b", None)
                errors.append(group.join("b")["error_code"])
                assert len(group.ids.get("b", "")) < 60
            assert group.beat("a")["error_code"] == "none"
            group.close()
            return errors

    async with running(tmp_path, limits) as node:
        errors = await asyncio.to_thread(ask, f"127.0.0.1:{node.port}")
    assert errors == ["member_id_required"] * 3 + ["group_max_size_reached"] * 2


def test_a_group_goes_back_by_a_protocol_that_all_have_a_subscription_for(
    our_broker: Broker, topic: str
) -> None:
    """What they have in common beside it may be anything: then the group stays what it is."""
    with Raw(our_broker.address) as raw:
        create(raw, topic, 4)
        group, modern = Group(raw, topic, topic), Member(raw, topic, "modern", topic)
        assert modern.join()[0] == "none"
        good = subscription(topic)
        for client, own in (("a", "range"), ("b", "cool")):
            protocols = [{"name": own, "metadata": good}, {"name": "odd", "metadata": b""}]
            assert group.join(client, protocols=protocols)["error_code"] == "member_id_required"
            assert group.join(client, protocols=protocols)["error_code"] == "none"
        assert modern.leave()[:2] == ("none", "away")
        reply = raw.ask(Api.LIST_GROUPS, 5, states_filter=[], types_filter=[])
        (kind,) = {g["group_type"] for g in reply["groups"] if g["group_id"] == topic}
        assert kind.lower() == "consumer"
        group.close()


async def test_a_heartbeat_writes_nothing_and_waits_for_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await node.create_topic("t", 1)
        address = f"127.0.0.1:{node.port}"

        def beats() -> None:
            with Raw(address) as raw:
                group = Group(raw, "g", "t")
                group.enter("a")
                group.sync("a", {"a": b"x"})
                ends.append(shard_end())
                for _ in range(50):
                    assert group.beat("a")["error_code"] == "none"
                ends.append(shard_end())
                group.close()

        def shard_end() -> int:
            return sum(shard.replica.partition.next_offset for shard in node.groups.shards)

        ends: list[int] = []
        await asyncio.to_thread(beats)
        assert ends[0] == ends[1] > 0


def test_members_of_a_large_group_are_heard_of_less_often(our_broker: Broker, topic: str) -> None:
    """5 ms for each member of it, also in the answer to a heartbeat that wrote nothing."""
    count = 120
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        members = [Member(raw, topic, f"m{n}", topic) for n in range(count)]
        for member in members:
            assert member.join()[0] == "none"
        first = members[0]
        intervals = []
        for _ in range(3):
            reply = raw.ask(
                Api.CONSUMER_GROUP_HEARTBEAT, 1, group_id=topic, member_id=first.name,
                member_epoch=first.epoch, topic_partitions=None, rebalance_timeout=-1,
            )  # fmt: skip
            assert reply["error_code"] == "none"
            first.epoch = reply["member_epoch"]
            intervals.append(reply["heartbeat_interval"])
        assert intervals[-2:] == [5 * count] * 2
        for member in members:
            member.leave()


@pytest.mark.skipif(kafka.why_absent() is not None, reason=str(kafka.why_absent()))
async def test_kafkas_decoder_reads_our_records(tmp_path: Path) -> None:
    """Item 102, as far as the bytes go."""

    def work(address: str) -> None:
        with Raw(address) as raw:
            create(raw, "t", 2)
            group, producer = Group(raw, "g", "t"), Producer(raw, "p")
            group.commit({0: 3}, version=4, retention_time=600_000)
            group.commit({1: 4})
            group.enter("a")
            group.sync("a", {"a": b"plan"})
            producer.init()
            group.add_to(producer)
            group.stage(producer, {0: 5})
            producer.end(True)
            producer.describe()
            group.leave("a")
            raw.ask(Api.DELETE_GROUPS, 2, groups_names=["g"])
            group.close()

    broker = await Broker.embedded(tmp_path)
    await asyncio.to_thread(work, broker.address)
    await broker.stop()
    files = [f for f in tmp_path.glob(f"{TOPIC}-*/*.log") if f.stat().st_size]
    assert len(files) == 1
    said = await asyncio.to_thread(
        kafka.tool,
        "org.apache.kafka.tools.DumpLogSegments",
        "--offsets-decoder",
        "--files",
        files[0],
    )
    assert '"offset":3' in said and '"expireTimestamp"' in said
    assert re.search(r'"offset":4,"leaderEpoch":0,"metadata":"m"', said), said
    assert '"protocolType":"consumer"' in said and '"assignment":' in said
    assert re.search(r'"offset":5', said)
    assert "endTxnMarker: COMMIT" in said
    assert said.count("payload: null") + said.count("payload:<DELETE>") >= 2 or "<DELETE>" in said
