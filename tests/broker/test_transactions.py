"""Transactions through the wire: holds, crashes, late requests, deleted topics, two phases."""

from __future__ import annotations

import asyncio
import errno
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from kio.schema.errors import ErrorCode

from ledgerstream.broker.embedded import Broker
from ledgerstream.broker.metrics import NodeCollector
from ledgerstream.broker.node import Node
from ledgerstream.broker.settings import Settings
from ledgerstream.errors import StorageError
from ledgerstream.limits import Limits
from ledgerstream.log.disk import Disk
from ledgerstream.machine import Decision
from ledgerstream.txn import TxnState
from ledgerstream.txn.coordinator import V2
from ledgerstream.wire import batches
from ledgerstream.wire.markers import read_marker
from ledgerstream.wire.versions import BROKER_VERSIONS, Api
from tests.broker.test_versions import LEAST
from tests.differential.raw import Raw
from tests.differential.scenarios import create, fetch
from tests.differential.transactions import Producer, batch, settled, stable
from tests.peers import kafka


def committed(raw: Raw, topic: str, partition: int = 0) -> tuple[list[bytes], bool]:
    """(values that a read_committed consumer delivers, whether it reached the log's end)."""
    out: list[bytes] = []
    offset = 0
    while True:
        part = fetch(raw, topic, offset, isolation=1, partition=partition)["responses"][0][
            "partitions"
        ][0]
        data = part["records"] or b""
        if not data:
            return out, part["last_stable_offset"] == part["high_watermark"]
        waiting = [(a["first_offset"], a["producer_id"]) for a in part["aborted_transactions"]]
        assert waiting == sorted(waiting)
        gone = set()
        for at, header in batches.headers(data):
            while waiting and waiting[0][0] < header.next_offset:
                gone.add(waiting.pop(0)[1])
            if header.control:
                marker = read_marker(data, at)
                if marker is not None and not marker.committed:
                    gone.discard(header.producer_id)
            elif not (header.transactional and header.producer_id in gone):
                out += [r.value or b"" for r in batches.records(data, at) if r.offset >= offset]
            following = header.next_offset
        offset = following


def test_the_feature_is_advertised_only_with_all_that_it_takes(our_broker: Broker) -> None:
    """Clients switch to Transactions V2 by the feature alone."""
    spoken = {int(api): high for api, (_, high) in BROKER_VERSIONS.items()}
    whole = (
        spoken[Api.PRODUCE] >= 12 and spoken[Api.END_TXN] >= 5
        and spoken[Api.TXN_OFFSET_COMMIT] >= 5
    )  # fmt: skip
    with Raw(our_broker.address) as raw:
        reply = raw.ask(Api.API_VERSIONS, 3, **LEAST[Api.API_VERSIONS])
    levels = {each["name"]: each["max_version_level"] for each in reply["finalized_features"]}
    assert levels.get("transaction.version") == (2 if whole else None)


@pytest.mark.parametrize("v2", [False, True])
def test_who_comes_while_markers_are_written_waits_and_is_not_refused(
    our_broker: Broker, topic: str, v2: bool
) -> None:
    """Item 44; bug 10: the next transaction begins while the one before it ends."""
    with Raw(our_broker.address) as raw:
        create(raw, topic, 2)
        producer = Producer(raw, topic, v2=v2)
        producer.init()
        for n in range(40):
            if not v2:
                reply = raw.ask(
                    Api.ADD_PARTITIONS_TO_TXN, 3, v3_and_below_transactional_id=topic,
                    v3_and_below_producer_id=producer.pid,
                    v3_and_below_producer_epoch=producer.epoch,
                    v3_and_below_topics=[{"name": topic, "partitions": [n % 2]}],
                )  # fmt: skip
                (result,) = reply["results_by_topic_v3_and_below"][0]["results_by_partition"]
                assert result["partition_error_code"] == "none"
            assert producer.send(topic, partition=n % 2)[0] == "none"
            reply = raw.ask(
                Api.END_TXN, 5 if v2 else 3, transactional_id=topic, producer_id=producer.pid,
                producer_epoch=producer.epoch, committed=n % 3 != 0,
            )  # fmt: skip
            assert reply["error_code"] == "none"
            if v2:
                producer.epoch, producer.sequence = reply["producer_epoch"], {}
        reply = raw.ask(
            Api.INIT_PRODUCER_ID, 4, transactional_id=topic, transaction_timeout=1000,
            producer_id=-1, producer_epoch=-1,
        )  # fmt: skip
        assert reply["error_code"] == "none"


@pytest.mark.parametrize("v2", [False, True])
def test_batches_in_flight_keep_their_order_while_the_coordinator_is_asked(
    our_broker: Broker, topic: str, v2: bool
) -> None:
    """Items 15, 88: a batch that need not ask does not overtake one before it that does."""
    with Raw(our_broker.address) as raw:
        create(raw, topic, 3)
        producer = Producer(raw, topic, v2=v2)
        producer.init()
        for committed_now in (True, False, True, True):
            if not v2:
                producer.add((topic, 0), (topic, 1), (topic, 2))
            sequences = [0, 0, 0] if v2 else [producer.sequence.get(p, 0) for p in range(3)]
            # [0] again and again: one of them comes when an earlier [0] is in, and another waits
            requests = [[0], [1, 0], *[[0]] * 8, [2, 1, 0], *[[0]] * 4, [1, 2]]
            for at, partitions in enumerate(requests):
                time.sleep(0.0004 if at > 1 else 0)  # over the rounds of what is asked
                parts = []
                for partition in partitions:
                    data = batch(
                        2, producer_id=producer.pid, producer_epoch=producer.epoch,
                        base_sequence=sequences[partition], attributes=batches.TRANSACTIONAL,
                    )  # fmt: skip
                    sequences[partition] += 2
                    parts.append({"index": partition, "records": data})
                raw.send(
                    Api.PRODUCE, 12 if v2 else 9, transactional_id=topic, acks=-1, timeout=10_000,
                    topic_data=[{"name": topic, "partition_data": parts}],
                )  # fmt: skip
            for _ in requests:
                reply = raw.reply(Api.PRODUCE, 12 if v2 else 9)
                for part in reply["responses"][0]["partition_responses"]:
                    assert part["error_code"] == "none", part
            producer.sequence = dict(enumerate(sequences))
            ended = producer.end(committed_now)
            assert ended == "none" if not v2 else ended[0] == "none"


def test_a_batch_without_acknowledgement_is_part_of_its_transaction(
    our_broker: Broker, topic: str
) -> None:
    """Item 22."""
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        producer = Producer(raw, topic, v2=True)
        producer.init()
        data = batch(
            1, producer_id=producer.pid, producer_epoch=producer.epoch, base_sequence=0,
            attributes=batches.TRANSACTIONAL,
        )  # fmt: skip
        raw.send(
            Api.PRODUCE, 12, transactional_id=topic, acks=0, timeout=10_000,
            topic_data=[{"name": topic, "partition_data": [{"index": 0, "records": data}]}],
        )  # fmt: skip
        producer.sequence[0] = 1
        assert producer.send(topic)[0] == "none"  # behind it, in its turn
        assert producer.end(True)[0] == "none"
        assert stable(raw, topic, 3) == 3
        assert committed(raw, topic) == ([b"v0", b"v0"], True)


def test_init_over_an_open_transaction_is_answered_when_that_is_aborted(
    our_broker: Broker, topic: str
) -> None:
    """Items 31, 44: one answer, where Kafka's clients have to ask twice."""
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        producer = Producer(raw, topic)
        producer.init()
        producer.add((topic, 0))
        producer.send(topic)
        reply = raw.ask(
            Api.INIT_PRODUCER_ID, 4, transactional_id=topic, transaction_timeout=1000,
            producer_id=-1, producer_epoch=-1,
        )  # fmt: skip
        assert (reply["error_code"], reply["producer_epoch"]) == ("none", 2)
        assert committed(raw, topic) == ([], True)


def test_late_requests_never_leave_a_transaction_open(our_broker: Broker, topic: str) -> None:
    """Item 91; bugs 1, 2, 12: any produce, add or end of any time, again at any time."""
    chance = random.Random(5)
    with Raw(our_broker.address) as raw, Raw(our_broker.address) as late:
        create(raw, topic)
        for v2 in (False, True):
            sent: list[tuple[int, int, dict[str, Any]]] = []
            producer = Producer(raw, f"{topic}-{v2}", v2=v2)
            producer.init()
            told: list[bytes] = []
            for n in range(60):
                if not v2:
                    producer.add((topic, 0))
                    sent.append((Api.ADD_PARTITIONS_TO_TXN, 3, {
                        "v3_and_below_transactional_id": producer.txn_id,
                        "v3_and_below_producer_id": producer.pid,
                        "v3_and_below_producer_epoch": producer.epoch,
                        "v3_and_below_topics": [{"name": topic, "partitions": [0]}],
                    }))  # fmt: skip
                sequence = producer.sequence.get(0, 0)
                data = batches.encode_batch(
                    [batches.NewRecord(None, b"%d-%d" % (v2, n), 1)],
                    producer_id=producer.pid, producer_epoch=producer.epoch,
                    base_sequence=sequence, attributes=batches.TRANSACTIONAL,
                )  # fmt: skip
                fields = {
                    "transactional_id": producer.txn_id, "acks": -1, "timeout": 10_000,
                    "topic_data": [
                        {"name": topic, "partition_data": [{"index": 0, "records": data}]}
                    ],
                }  # fmt: skip
                sent.append((Api.PRODUCE, 12 if v2 else 9, fields))
                reply = raw.ask(Api.PRODUCE, sent[-1][1], **fields)
                part = reply["responses"][0]["partition_responses"][0]
                assert part["error_code"] == "none", part
                producer.sequence[0] = sequence + 1
                for _ in range(chance.randrange(3)):
                    api, version, again = chance.choice(sent)
                    late.ask(api, version, **again)
                commit = chance.random() < 0.6
                if v2:  # under V1 a late end may end a later transaction: the protocol's flaw
                    sent.append((Api.END_TXN, 5, {
                        "transactional_id": producer.txn_id, "producer_id": producer.pid,
                        "producer_epoch": producer.epoch, "committed": commit,
                    }))  # fmt: skip
                ended = producer.end(commit)
                assert ended == "none" if not v2 else ended[0] == "none"
                if commit:
                    told.append(b"%d-%d" % (v2, n))
            assert Producer(raw, producer.txn_id).init()[0] == "none"
            mine = [value for value in committed(raw, topic)[0] if value.startswith(b"%d-" % v2)]
            assert mine == told
            for api, version, again in chance.sample(sent, 40):
                late.ask(api, version, **again)
            assert committed(raw, topic)[1], "a late request has left a transaction open"


def test_a_deleted_topic_does_not_hold_up_the_others(our_broker: Broker, topic: str) -> None:
    """Item 70, bug 26."""
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        create(raw, topic + "-gone")
        producer = Producer(raw, topic)
        producer.init()
        for name in (topic, topic + "-gone"):
            producer.add((name, 0))
            producer.sequence = {}
            producer.send(name)
        deleted = [{"name": topic + "-gone", "topic_id": None}]
        raw.ask(Api.DELETE_TOPICS, 6, topics=deleted, timeout=1000)
        assert producer.end(True) == "none"
        assert stable(raw, topic, 2) == 2
        assert producer.describe()[1] == "CompleteCommit"


def test_what_no_record_can_hold_is_refused(our_broker: Broker, topic: str) -> None:
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        reply = raw.ask(
            Api.INIT_PRODUCER_ID, 4, transactional_id="x" * 40_000, transaction_timeout=1000,
            producer_id=-1, producer_epoch=-1,
        )  # fmt: skip
        assert reply["error_code"] == "invalid_request"
        reply = raw.ask(
            Api.WRITE_TXN_MARKERS, 1,
            markers=[{
                "producer_id": -1, "producer_epoch": 0, "transaction_result": True,
                "topics": [{"name": topic, "partition_indexes": [0, 5]}], "coordinator_epoch": 0,
            }],
        )  # fmt: skip
        parts = reply["markers"][0]["topics"][0]["partitions"]
        assert {part["error_code"] for part in parts} == {"invalid_producer_id_mapping"}


def test_a_topic_made_anew_with_fewer_partitions_does_not_hold_up_the_others(
    our_broker: Broker, topic: str
) -> None:
    """Item 70: the name is there again, the partition is not."""
    again = topic + "-again"
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        create(raw, again, 2)
        producer = Producer(raw, topic)
        producer.init()
        assert producer.add((topic, 0), (again, 1)) == ["none", "none"]
        producer.send(topic)
        deleted = [{"name": again, "topic_id": None}]
        raw.ask(Api.DELETE_TOPICS, 6, topics=deleted, timeout=1000)
        create(raw, again)
        assert producer.end(True) == "none"
        assert stable(raw, topic, 2) == 2
        init = {
            "transactional_id": topic, "transaction_timeout": 60_000, "producer_id": -1,
            "producer_epoch": -1,
        }  # fmt: skip
        asked = (raw.ask(Api.INIT_PRODUCER_ID, 4, **init)["error_code"] for _ in range(100))
        assert "none" in asked, "held a hundred times, and its transaction has not ended"


def test_a_partition_is_added_all_or_nothing(our_broker: Broker, topic: str) -> None:
    """Item 48."""
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        producer = Producer(raw, topic)
        producer.init()
        assert producer.add((topic, 0), (topic, 5)) == [
            "operation_not_attempted", "unknown_topic_or_partition"
        ]  # fmt: skip
        assert producer.describe()[1] == "Empty"


def test_two_phases_over_the_wire(our_broker: Broker, topic: str) -> None:
    """Items 113 to 120: prepare, crash, find, complete from the new identity."""
    two_phase = {"enable2_pc": True}
    with Raw(our_broker.address) as raw:
        create(raw, topic)
        producer = Producer(raw, topic, v2=True)
        producer.init(6, **two_phase)
        prepared = producer.pid, producer.epoch
        producer.send(topic)
        reply = raw.ask(
            Api.INIT_PRODUCER_ID, 6, transactional_id=topic, transaction_timeout=1,
            producer_id=-1, producer_epoch=-1, enable2_pc=True, keep_prepared_txn=True,
        )  # fmt: skip
        assert reply["error_code"] == "none"
        ongoing = reply["ongoing_txn_producer_id"], reply["ongoing_txn_producer_epoch"]
        assert ongoing == prepared  # as was kept elsewhere: commit
        assert producer.end(True, pid=prepared[0], epoch=prepared[1])[0] == "producer_fenced"
        producer.pid, producer.epoch = reply["producer_id"], reply["producer_epoch"]
        assert producer.end(True)[0] == "none"
        assert stable(raw, topic, 2) == 2
        assert committed(raw, topic) == ([b"v0"], True)
        assert producer.init(6, keep_prepared_txn=True)[0] == "invalid_request"
        found = raw.ask(
            Api.INIT_PRODUCER_ID, 6, transactional_id=topic, transaction_timeout=1,
            producer_id=-1, producer_epoch=-1, enable2_pc=True, keep_prepared_txn=True,
        )  # fmt: skip
        assert found["ongoing_txn_producer_id"] == -1


async def test_two_phases_are_refused_where_they_are_off(tmp_path: Path) -> None:
    """Item 111."""
    async with await Broker.embedded(tmp_path, two_phase_commit=False) as broker:

        def ask() -> Any:
            with Raw(broker.address) as raw:
                return Producer(raw, "t").init(6, enable2_pc=True)[0]

        assert await asyncio.to_thread(ask) == "transactional_id_authorization_failed"


@pytest.mark.skipif(kafka.why_absent() is not None, reason=kafka.why_absent() or "")
async def test_kafkas_tool_reads_the_transaction_log(tmp_path: Path) -> None:
    """The coordinator's records are Kafka's own, our tagged field included."""
    async with await Broker.embedded(tmp_path) as broker:

        def work() -> None:
            with Raw(broker.address) as raw:
                create(raw, "t")
                for v2 in (False, True):
                    producer = Producer(raw, f"dump-{v2}", v2=v2)
                    producer.init()
                    producer.add(("t", 0)) if not v2 else None
                    producer.send("t")
                    producer.end(True)
                    producer.describe()
                    producer.init(given=(producer.pid, producer.epoch))

        await asyncio.to_thread(work)
    files = [p for p in tmp_path.glob("__transaction_state-*/*.log") if p.stat().st_size]
    assert files
    out = await asyncio.to_thread(
        kafka.tool, "org.apache.kafka.tools.DumpLogSegments", "--transaction-log-decoder",
        "--files", ",".join(map(str, files)),
    )  # fmt: skip
    for v2 in ("False", "True"):
        told = [line for line in out.splitlines() if f'"transactionalId":"dump-{v2}"' in line]
        states = [int(n) for line in told for n in re.findall(r'"transactionStatus":(\d)', line)]
        assert states == [0, 1, 2, 4, 0], told
    assert not re.search("invalid|corrupt|unknown|exception", out, re.I)


# -- crashes


class Account:
    """What a client was told of each of its transactions: one record in each of two partitions."""

    def __init__(self) -> None:
        self.number = 0
        self.committed: set[bytes] = set()
        self.unsure: set[bytes] = set()
        self.aborted: set[bytes] = set()

    def work(self, address: str, v2: bool, many: int) -> None:
        """Transactions until the broker is gone."""
        with Raw(address) as raw:
            producer = Producer(raw, f"killed-{v2}", v2=v2)
            assert producer.init()[0] == "none"
            for _ in range(many):
                self.number += 1
                name = b"%d" % self.number
                self.unsure.add(name)
                for partition in (0, 1):
                    if not v2:
                        producer.add(("killed", partition))
                    data = batches.encode_batch(
                        [batches.NewRecord(None, name, 1)], producer_id=producer.pid,
                        producer_epoch=producer.epoch, attributes=batches.TRANSACTIONAL,
                        base_sequence=producer.sequence.get(partition, 0),
                    )  # fmt: skip
                    part = settled(lambda data=data, partition=partition: raw.ask(
                        Api.PRODUCE, 12 if v2 else 9, transactional_id=producer.txn_id, acks=-1,
                        timeout=10_000, topic_data=[{"name": "killed", "partition_data": [
                            {"index": partition, "records": data}
                        ]}],
                    )["responses"][0]["partition_responses"][0])  # fmt: skip
                    assert part["error_code"] == "none", part
                    producer.sequence[partition] = producer.sequence.get(partition, 0) + 1
                commit = self.number % 4 != 0
                ended = producer.end(commit)
                assert ended == "none" if not v2 else ended[0] == "none"
                self.unsure.discard(name)
                (self.committed if commit else self.aborted).add(name)

    def check(self, address: str) -> None:
        """Whole or not at all, and what was told is so."""
        with Raw(address) as raw:
            for v2 in (False, True):  # ends what the kill left open
                assert Producer(raw, f"killed-{v2}").init()[0] == "none"
            values = []
            for partition in (0, 1):
                found, whole = committed(raw, "killed", partition)
                assert whole
                assert len(found) == len(set(found))
                values.append(set(found))
        assert values[0] == values[1]
        assert values[0] >= self.committed
        assert not values[0] & self.aborted
        assert values[0] <= self.committed | self.unsure


async def kill_again_and_again(directory: Path, kills: int, seed: int) -> Account:
    chance, account = random.Random(seed), Account()
    broker = await Broker.embedded(directory)
    with Raw(broker.address) as raw:
        create(raw, "killed", 2)
    for kill in range(kills):
        working = asyncio.create_task(
            asyncio.to_thread(account.work, broker.address, kill % 2 == 1, 10**9)
        )
        begun, wanted = account.number, chance.randrange(1, 60)
        while account.number < begun + wanted and not working.done():
            await asyncio.sleep(0.001)
        await asyncio.sleep(chance.random() * 0.01)
        await broker.kill()
        with pytest.raises((TypeError, OSError)):  # the connection is closed in its face
            await working
        broker = await Broker.embedded(directory)
        await asyncio.to_thread(account.check, broker.address)
    await broker.stop()
    return account


@pytest.mark.slow
async def test_a_killed_broker_keeps_transactions_whole(tmp_path: Path) -> None:
    """Items 41, 45, 50, 52, 59: kill -9 at any point, V1 and V2 in turn."""
    account = await kill_again_and_again(tmp_path, 6, seed=11)
    assert len(account.committed) > 20


@pytest.mark.torture
@pytest.mark.timeout(3600)
async def test_a_broker_killed_a_hundred_times_keeps_transactions_whole(tmp_path: Path) -> None:
    await kill_again_and_again(tmp_path, 100, seed=12)


@asynccontextmanager
async def running(directory: Path, **limits: Any) -> AsyncIterator[Node]:
    """In this process, with files that fail their rounds when a test says so."""
    quick = Limits(
        storage_retry_ms=20, tick_ms=10, round_journal_bytes=0, round_direct_files_max=10_000,
        marker_retry_ms=5, **limits,
    )  # fmt: skip
    node = Node(Settings(data_dir=directory, port=0), quick)
    await node.start()
    try:
        yield node
    finally:
        await node.stop()


async def begin(node: Node, txn_id: str, *partitions: tuple[str, int]) -> tuple[int, int]:
    """An open transaction with data in the partitions."""
    init = await node.transactions.decide(
        txn_id, lambda machine, new: machine.decide_init(txn_id, 60_000, 0, new_id=new)
    )
    for name, index in partitions:
        await node.transactions.admit(txn_id, *init[1:3], [(name, index)], implicit=True)
        replica = node.replicas.named(name, index)
        assert replica is not None
        data = batch(
            1, producer_id=init[1], producer_epoch=init[2], base_sequence=0,
            attributes=batches.TRANSACTIONAL,
        )  # fmt: skip
        header = batches.parse_header(data)
        guard = replica.partition.begin_verification(header)
        replica.partition.append(data, header, 0, guard)
        await replica.wait_durable(replica.partition.next_offset)
    return init[1], init[2]


def end(node: Node, txn_id: str, who: tuple[int, int]) -> Any:
    return node.transactions.decide(
        txn_id,
        lambda machine, new: machine.decide_end(
            txn_id, *who, 0, committed=True, version=V2, new_id=new
        ),
    )


async def state_of(node: Node, txn_id: str) -> TxnState:
    shard = await node.transactions.shards.find(txn_id)
    assert not isinstance(shard, ErrorCode)
    return shard.machine.txns[txn_id].state


async def test_a_marker_is_tried_until_its_partition_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items 69, 71: complete only when all partitions have it; held requests hear it in time."""
    real, full = Disk.open, True

    def opened(disk: Disk, handle: Any) -> Any:
        if full and "/slow-1/" in handle.path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(disk, handle)

    async with running(tmp_path) as node:
        await node.create_topic("slow", 2)
        who = await begin(node, "t", ("slow", 0), ("slow", 1))
        monkeypatch.setattr(Disk, "open", opened)
        ended = await end(node, "t", who)
        assert ended[:3] == (ErrorCode.none, who[0], who[1] + 1)
        waiting = await node.transactions.decide(
            "t", lambda machine, _: machine.decide_add("t", *ended[1:3], [("slow", 0)], 0, V2)
        )
        assert waiting is ErrorCode.concurrent_transactions  # after the hold
        assert await state_of(node, "t") is TxnState.PREPARE_COMMIT
        full = False
        async with asyncio.timeout(20):
            while await state_of(node, "t") is not TxnState.COMPLETE_COMMIT:
                await asyncio.sleep(0.005)
        for index in (0, 1):
            replica = node.replicas.named("slow", index)
            assert replica is not None
            partition = replica.partition
            assert partition.last_stable_offset == partition.high_watermark >= 2


async def test_what_was_decided_is_carried_out_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Item 59: markers that a crash kept from being written."""
    async with running(tmp_path) as node:
        await node.create_topic("later", 1)
        who = await begin(node, "t", ("later", 0))

        async def never(*_: Any, **__: Any) -> bool:
            await asyncio.Event().wait()
            return False

        monkeypatch.setattr(node.markers, "write", never)
        assert (await end(node, "t", who)).error is ErrorCode.none
        assert await state_of(node, "t") is TxnState.PREPARE_COMMIT
    async with running(tmp_path) as node:
        async with asyncio.timeout(20):
            while await state_of(node, "t") is not TxnState.COMPLETE_COMMIT:
                await asyncio.sleep(0.005)
        replica = node.replicas.named("later", 0)
        assert replica is not None
        assert replica.partition.last_stable_offset == 2


async def test_timeouts_and_expiry_come_with_the_clock(tmp_path: Path) -> None:
    """Items 56, 58, through the node's own tick."""
    now = 1_000_000
    quick = Limits(tick_ms=5, transaction_timeout_check_ms=1, transactional_id_expiry_check_ms=1)
    node = Node(Settings(data_dir=tmp_path, port=0), quick, now_ms=lambda: now)
    await node.start()
    await node.create_topic("timed", 1)
    who = await begin(node, "t", ("timed", 0))
    now += 61_000
    async with asyncio.timeout(20):
        while await state_of(node, "t") is not TxnState.COMPLETE_ABORT:
            await asyncio.sleep(0.005)
        shard = await node.transactions.shards.find("t")
        assert not isinstance(shard, ErrorCode)
        assert shard.machine.txns["t"].producer_epoch == who[1] + 1
        now += quick.transactional_id_expiry_ms
        while "t" in shard.machine.txns:
            await asyncio.sleep(0.005)
    await node.stop()


async def test_timeouts_are_kept_by_a_clock_that_was_ahead_for_a_while(tmp_path: Path) -> None:
    """Item 56: when they are looked at again does not depend on it."""
    now = 1_000_000
    quick = Limits(tick_ms=5, transaction_timeout_check_ms=1, transactional_id_expiry_check_ms=1)
    node = Node(Settings(data_dir=tmp_path, port=0), quick, now_ms=lambda: now)
    await node.start()
    await node.create_topic("timed", 1)
    for ahead in (3_600_000, -3_600_000, 0):
        now += ahead
        await asyncio.sleep(0.05)  # many ticks
    await begin(node, "t", ("timed", 0))
    now += 61_000
    async with asyncio.timeout(5):
        while await state_of(node, "t") is not TxnState.COMPLETE_ABORT:
            await asyncio.sleep(0.005)
    await node.stop()


async def test_a_producer_id_is_never_given_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items 28, 42: across restarts; and where none can be had, the client asks again."""
    given = []
    for _ in range(3):
        async with running(tmp_path) as node:
            given += [(await begin(node, f"id-{len(given)}-{n}"))[0] for n in range(5)]

            async def none() -> int:
                raise StorageError("no block can be had")

            monkeypatch.setattr(node.producer_ids, "take", none)
            refused = await node.transactions.decide(
                "new", lambda machine, new: machine.decide_init("new", 1_000, 0, new_id=new)
            )
            assert refused is ErrorCode.coordinator_load_in_progress
    assert len(set(given)) == len(given)


async def test_a_fence_that_was_not_written_bumps_no_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items 40, 45, 46; bug 4: however often it is tried."""
    real, full = Disk.open, False

    def opened(disk: Disk, handle: Any) -> Any:
        if full and "__transaction_state" in handle.path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(disk, handle)

    monkeypatch.setattr(Disk, "open", opened)
    async with running(tmp_path) as node:
        await node.create_topic("fenced", 1)
        who = await begin(node, "t", ("fenced", 0))

        def init() -> Any:
            return node.transactions.decide(
                "t", lambda machine, new: machine.decide_init("t", 60_000, 0, new_id=new)
            )

        full = True
        for _ in range(5):
            assert await init() is ErrorCode.not_coordinator
        full = False
        async with asyncio.timeout(20):
            while isinstance(reply := await init(), ErrorCode):
                await asyncio.sleep(0.005)
        assert reply[:3] == (ErrorCode.none, who[0], who[1] + 2)


def test_a_fetch_that_waits_at_the_stable_offset_wakes_when_it_moves(
    our_broker: Broker, topic: str
) -> None:
    """Item 80: with what was aborted."""
    with Raw(our_broker.address) as raw, Raw(our_broker.address) as reader:
        create(raw, topic)
        producer = Producer(raw, topic)
        producer.init()
        producer.add((topic, 0))
        producer.send(topic)
        place = {
            "partition": 0, "current_leader_epoch": -1, "fetch_offset": 0, "last_fetched_epoch": -1,
            "log_start_offset": -1, "partition_max_bytes": 2**20,
        }  # fmt: skip
        began = time.monotonic()
        reader.send(
            Api.FETCH, 11, replica_id=-1, max_wait=15_000, min_bytes=1, max_bytes=2**20,
            isolation_level=1, session_id=0, session_epoch=-1,
            topics=[{"topic": topic, "partitions": [place]}], forgotten_topics_data=[], rack_id="",
        )  # fmt: skip
        assert producer.end(False) == "none"
        part = reader.reply(Api.FETCH, 11)["responses"][0]["partitions"][0]
        assert time.monotonic() - began < 10
        assert (part["last_stable_offset"], part["high_watermark"]) == (2, 2)
        assert [each["first_offset"] for each in part["aborted_transactions"]] == [0]


async def test_metrics_tell_of_transactions_and_of_those_that_hang(tmp_path: Path) -> None:
    """Items 64, 83, 119."""
    now = 1_000_000
    quick = Limits(tick_ms=5, transaction_timeout_check_ms=1)
    node = Node(Settings(data_dir=tmp_path, port=0), quick, now_ms=lambda: now)
    await node.start()
    await node.create_topic("held", 1)
    await begin(node, "t", ("held", 0))
    shard = await node.transactions.shards.find("t")
    assert not isinstance(shard, ErrorCode)
    prepared = shard.machine.txns["t"]._replace(timeout_ms=2**31 - 1)  # in two phases
    shard.act(Decision((prepared,), None))

    def told(name: str) -> dict[tuple[str, ...], float]:
        return {
            tuple(sample.labels.values()): sample.value
            for metric in NodeCollector(node).collect()
            if metric.name == name
            for sample in metric.samples
        }

    assert told("ledgerstream_transactions") == {("Ongoing",): 1}
    assert told("ledgerstream_coordinator_load_seconds_max")[()] >= 0
    async with asyncio.timeout(20):
        while node.transactions.late == {}:
            now += quick.transaction_timeout_ms_max
            await asyncio.sleep(0.01)
    assert told("ledgerstream_partition_late_transactions") == {("held", "0"): 1}
    await node.stop()
