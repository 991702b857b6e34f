"""Our transactional producer, on our broker and on Apache Kafka: whole, or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client, Fenced, TransactionError, transactional
from ledgerstream.client.offsets import EARLIEST, LATEST
from ledgerstream.client.transaction import Phase
from ledgerstream.errors import ConfigError, KafkaError, LedgerStreamError
from ledgerstream.limits import LIMITS
from ledgerstream.wire import batches
from ledgerstream.wire.versions import Api
from tests.peers.kafka import free_port
from tests.peers.proxy import Proxy, Verdict


@pytest.fixture(params=["V2", "V1"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As with a cluster that has the feature, and with one that has it not."""
    if request.param == "V1":
        monkeypatch.setattr(transactional, "V2_LEVEL", 99)
    return str(request.param)


async def values(client: Client, topic: str) -> list[bytes | None]:
    """All that a reader of what is committed sees, by partition; nothing may be open."""
    known = await client.cluster.topic(topic)
    starts = await client.list_offsets(topic, dict.fromkeys(known.leaders, EARLIEST))
    latest = dict.fromkeys(starts, LATEST)
    while (ends := await client.list_offsets(topic, latest)) != (
        await client.list_offsets(topic, latest, committed=False)
    ):
        pass  # decided, and its markers are on their way
    found: dict[int, list[bytes | None]] = {p: [] for p in starts}
    left = {p for p in starts if starts[p] < ends[p]}
    async with client.reader(topic, {p: starts[p] for p in left}) as reader:
        while left:
            chunk = await reader.next()
            if chunk is None:
                continue
            for at, header in batches.headers(chunk.data):
                if not header.control:
                    found[chunk.partition] += [
                        r.value for r in batches.records(chunk.data, at)
                        if chunk.start <= r.offset < ends[chunk.partition]
                    ]  # fmt: skip
            if chunk.next_offset >= ends[chunk.partition]:
                left.discard(chunk.partition)
                reader.drop(chunk.partition)
    return [value for p in sorted(found) for value in found[p]]


async def test_what_is_committed_is_seen_and_what_is_aborted_is_not(
    both: Client, topic: str, kind: str
) -> None:
    await both.create_topic(topic, 2)
    producer = await both.transactional(f"t-{topic}")
    assert producer.transaction_state.v2 is (kind == "V2")
    for number in range(6):
        if number % 3 == 2:
            await producer.begin()
            await producer.send(topic, b"never", partition=number % 2)
            await producer.abort()
        else:
            async with producer.transaction():
                sends = [producer.send(topic, b"%d" % number, partition=p) for p in (0, 1)]
                await asyncio.gather(*sends)
    assert await values(both, topic) == [b"0", b"1", b"3", b"4"] * 2


async def test_an_empty_transaction_is_nothing(both: Client, topic: str) -> None:
    producer = await both.transactional(f"t-{topic}")
    before = producer.transaction_state.identity
    async with producer.transaction():
        pass
    await producer.begin()
    await producer.abort()
    assert producer.transaction_state.identity == before


async def test_the_next_of_its_name_fences_a_producer(both: Client, topic: str, kind: str) -> None:
    await both.create_topic(topic, 1)
    old = await both.transactional(f"t-{topic}")
    await old.begin()
    await old.send(topic, b"old")
    new = await both.transactional(f"t-{topic}")
    async with new.transaction():
        await new.send(topic, b"new")
    with pytest.raises(Fenced):
        await old.commit()
    with pytest.raises(Fenced):
        await old.begin()
    assert await values(both, topic) == [b"new"]


async def test_a_record_that_is_refused_dooms_its_transaction_alone(
    both: Client, topic: str, kind: str
) -> None:
    await both.create_topic(topic, 2, config={"max.message.bytes": "1000"})
    producer = await both.transactional(f"t-{topic}")

    async def raising() -> None:
        async with producer.transaction():
            await producer.send(topic, b"small", partition=0)
            await producer.send(topic, b"x" * 5000, partition=1)

    async def passing_over() -> None:
        async with producer.transaction():
            sends = [producer.send(topic, b"x" * n, partition=n % 2) for n in (5001, 2)]
            refused, _ = await asyncio.gather(*sends, return_exceptions=True)
            assert isinstance(refused, KafkaError)

    with pytest.raises(KafkaError, match="MESSAGE_TOO_LARGE"):
        await raising()
    with pytest.raises(TransactionError, match="aborted"):
        await passing_over()
    async with producer.transaction():
        await producer.send(topic, b"after", partition=1)
    assert await values(both, topic) == [b"after"]


async def test_offsets_are_committed_with_what_was_made_of_them(
    both: Client, topic: str, kind: str
) -> None:
    await both.create_topic(topic, 1)
    producer, group = await both.transactional(f"t-{topic}"), f"g-{topic}"
    async with producer.transaction():
        await producer.send(topic, b"1")
        await producer.send_offsets({(topic, 0): 7}, group)
    await producer.begin()
    await producer.send_offsets({(topic, 0): 9}, group)
    await producer.abort()
    async with producer.transaction():
        await producer.send_offsets({(topic, 0): 8}, group)
    assert await both.committed(group, [(topic, 0)]) == {(topic, 0): 8}


async def cancelled_after(steps: int, work: Coroutine[Any, Any, None]) -> bool:
    """Let the loop turn so often, then cancel; whether there was something to cancel."""
    task = asyncio.ensure_future(work)
    for _ in range(steps):
        await asyncio.sleep(0)
    cancelled = task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return cancelled


async def test_offsets_whose_sending_was_cancelled_are_not_in_the_next_transaction(
    client: Client, topic: str, kind: str
) -> None:
    """Wherever the caller gives up: their request may be on its way, or already answered."""
    await client.create_topic(topic, 1)
    producer, group, steps = await client.transactional(f"t-{topic}"), f"g-{topic}", 0
    async with producer.transaction():
        await producer.send_offsets({(topic, 0): 1}, group)
    cancelled = True
    while cancelled:
        await producer.begin()
        work = producer.send_offsets({(topic, 0): 9}, group)
        cancelled = await cancelled_after(steps, work)
        await producer.abort()
        async with producer.transaction():
            await producer.send(topic, b"other work")
        assert await client.committed(group, [(topic, 0)]) == {(topic, 0): 1}
        steps += 1
    assert steps > 5


async def test_a_commit_that_was_cancelled_is_asked_for_again(
    client: Client, topic: str, kind: str
) -> None:
    await client.create_topic(topic, 1)
    producer, steps, again, expected = await client.transactional(f"t-{topic}"), 0, 0, []
    cancelled = True
    while cancelled:
        await producer.begin()
        await producer.send(topic, b"%d" % steps)
        expected.append(b"%d" % steps)
        cancelled = await cancelled_after(steps, producer.commit())
        if producer.transaction_state.phase is Phase.ENDING:
            with pytest.raises(LedgerStreamError, match="not answered") as found:
                await producer.begin()
            assert "again" in found.value.remedy
            again += 1
        if producer.transaction_state.phase is not Phase.READY:
            await producer.commit()
        steps += 1
    assert again > 2
    assert await values(client, topic) == expected


async def test_a_producer_that_is_closed_leaves_nothing_open(both: Client, topic: str) -> None:
    await both.create_topic(topic, 1)
    producer = await both.transactional(f"t-{topic}")
    await producer.begin()
    await producer.send(topic, b"never")
    await producer.close()
    assert await values(both, topic) == []


async def test_a_producer_is_closed_once_and_its_successor_is_no_error(
    our_broker: Broker, topic: str
) -> None:
    txn_id = f"t-{topic}"
    async with await Client.connect(our_broker.address) as client:
        await client.create_topic(topic, 1)
        left = await client.transactional(txn_id)
        await left.begin()
        await left.send(topic, b"never")
        await left.close(flush=False)
        fenced = await client.transactional(txn_id)  # has aborted it
        await fenced.begin()
        await fenced.send(topic, b"never either")
        producer = await client.transactional(txn_id)
        async with producer.transaction():
            await producer.send(topic, b"done")
        await left.close()
        assert await values(client, topic) == [b"done"]


async def test_a_client_lets_go_of_what_is_closed(client: Client, topic: str) -> None:
    await client.create_topic(topic, 1)
    for number in range(3):
        producer = await client.producer()
        await producer.send(topic, b"x")
        await producer.close()
        again = await client.transactional(f"t-{topic}-{number}")
        await again.close()
    staying = await client.producer()
    assert client._producers == [staying]


async def test_a_send_that_was_not_awaited_is_in_its_transaction_or_in_none(
    client: Client, topic: str, kind: str
) -> None:
    """It has begun, and asks for the topic: a commit waits for it, an abort does not."""
    await client.create_topic(topic, 1)
    producer = await client.transactional(f"t-{topic}")
    for committed in (True, False):
        await producer.begin()
        client.cluster.forget(topic)
        late = asyncio.ensure_future(producer.send(topic, b"%d" % committed))
        await asyncio.sleep(0)
        if committed:
            await producer.commit()
            assert late.done()
            continue
        await producer.abort()
        async with producer.transaction():
            with pytest.raises(LedgerStreamError, match="has ended without it"):
                await late
            await producer.send(topic, b"next")
    assert await values(client, topic) == [b"1", b"next"]


async def test_a_send_that_fails_on_its_way_dooms_its_transaction(
    client: Client, topic: str, kind: str
) -> None:
    """Though nobody has waited for it: its commit would lack what its caller has sent."""
    await client.create_topic(topic, 1)
    producer = await client.transactional(f"t-{topic}")
    await producer.begin()
    await producer.send(topic, b"never")
    lost = asyncio.ensure_future(producer.send(topic, b"never", partition=7))
    await asyncio.sleep(0)
    with pytest.raises(TransactionError):
        await producer.commit()
    with pytest.raises(ConfigError):
        await lost
    await producer.abort()
    async with producer.transaction():
        await producer.send(topic, b"next")
    assert await values(client, topic) == [b"next"]


async def test_a_topic_that_is_not_there_is_told_of_soon(tmp_path: Path) -> None:
    async with (
        await Broker.embedded(tmp_path, auto_create_topics=False) as broker,
        await Client.connect(broker.address) as client,
    ):
        producer = await client.transactional("t")
        await producer.begin()
        async with asyncio.timeout(20):
            with pytest.raises(KafkaError, match="there is no such topic"):
                await producer.send("none", b"x")
        await producer.abort()


async def test_a_broker_without_two_phases_says_which_option_it_is(tmp_path: Path) -> None:
    async with (
        await Broker.embedded(tmp_path, two_phase_commit=False) as broker,
        await Client.connect(broker.address) as client,
    ):
        with pytest.raises(KafkaError, match="--two-phase-commit"):
            await client.transactional("t", two_phase=True)


async def test_nothing_is_sent_outside_of_a_transaction(client: Client, topic: str) -> None:
    producer = await client.transactional(f"t-{topic}")
    with pytest.raises(LedgerStreamError, match="ready, not open"):
        await producer.send(topic, b"x")
    await producer.begin()
    with pytest.raises(LedgerStreamError, match="two phases"):
        await producer.prepare()


async def test_a_prepared_transaction_is_completed_by_a_successor(
    client: Client, topic: str
) -> None:
    await client.create_topic(topic, 1)
    for stored_well in (True, False):
        first = await client.transactional(f"t-{topic}", two_phase=True)
        await first.begin()
        await first.send(topic, b"%d" % stored_well)
        stored = await first.prepare()
        with pytest.raises(LedgerStreamError):
            await first.send(topic, b"too late")
        second = await client.transactional(f"t-{topic}", two_phase=True, keep_prepared=True)
        assert second.found == stored
        with pytest.raises(ConfigError, match="identity"):
            await second.complete(["7:0"])
        kept = json.loads(json.dumps(stored)) if stored_well else None
        assert await second.complete(kept) is stored_well
        async with second.transaction():
            await second.send(topic, b"next")
        with pytest.raises(Fenced):
            await first.commit()
    assert await values(client, topic) == [b"1", b"next", b"next"]
    third = await client.transactional(f"t-{topic}", two_phase=True, keep_prepared=True)
    assert third.found is None
    assert not await third.complete(None)


class Deaf(Proxy):
    """Passes requests on and cuts the connection before their answer, `times` times an API."""

    def __init__(self, port: int) -> None:
        super().__init__(lambda: asyncio.open_connection("127.0.0.1", port))
        self.times: dict[Api, int] = {}
        self.cut = 0

    def up(self, data: bytes) -> Verdict:
        api = int.from_bytes(data[4:6], "big")
        if self.times.get(api, 0) > 0:  # type: ignore[call-overload]
            self.times[api] -= 1  # type: ignore[index]
            self.cut += 1
            return "mute"
        return "pass"


async def test_answers_that_are_lost_neither_double_nor_tear(
    tmp_path: Path, topic: str, kind: str
) -> None:
    """Each request of a transaction in turn, and all of them at once."""
    apis = [Api.PRODUCE, Api.END_TXN, Api.TXN_OFFSET_COMMIT, Api.INIT_PRODUCER_ID]
    if kind == "V1":
        apis += [Api.ADD_PARTITIONS_TO_TXN, Api.ADD_OFFSETS_TO_TXN]
    port = free_port()
    async with (
        Deaf(port) as proxy,
        await Broker.embedded(tmp_path, port=port, advertised_port=proxy.port),
        await Client.connect(f"127.0.0.1:{proxy.port}") as client,
    ):
        await client.create_topic(topic, 1)
        producer = await client.transactional(f"t-{topic}")
        expected = []
        for number, chosen in enumerate([*([api] for api in apis), apis, []]):
            proxy.times = dict.fromkeys(chosen, 1)
            for committed in (True, False):
                await producer.begin()
                await producer.send(topic, b"%d" % number)
                await producer.send_offsets({(topic, 0): 2 * number + (not committed)}, "g")
                await (producer.commit() if committed else producer.abort())
            expected.append(b"%d" % number)
            assert await values(client, topic) == expected
            assert await client.committed("g", [(topic, 0)]) == {(topic, 0): 2 * number}
        assert proxy.cut >= len(apis)


class Late(Proxy):
    """Keeps the first TxnOffsetCommit back, for `deliver`."""

    def __init__(self, port: int) -> None:
        super().__init__(lambda: asyncio.open_connection("127.0.0.1", port))
        self.held = b""
        self._above = port

    def up(self, data: bytes) -> Verdict:
        if not self.held and int.from_bytes(data[4:6]) == Api.TXN_OFFSET_COMMIT:
            self.held = data
            return "hang"
        return "pass"

    async def deliver(self) -> None:
        """Until it is answered."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._above)
        writer.write(self.held)
        await reader.readexactly(int.from_bytes(await reader.readexactly(4)))
        writer.close()
        await writer.wait_closed()


async def test_offsets_that_come_late_are_not_of_a_later_transaction(
    tmp_path: Path, topic: str, kind: str
) -> None:
    """They would take the group back: a TxnOffsetCommit has no sequence, and under V1 not even an
    epoch of its own unless its producer takes one."""
    port = free_port()
    limits = replace(LIMITS, request_ms_max=500)
    async with (
        Late(port) as proxy,
        await Broker.embedded(tmp_path, port=port, advertised_port=proxy.port),
        await Client.connect(f"127.0.0.1:{proxy.port}", limits=limits) as client,
    ):
        await client.create_topic(topic, 1)
        producer = await client.transactional(f"t-{topic}")
        async with producer.transaction():
            await producer.send_offsets({(topic, 0): 1}, "g")
        async with producer.transaction():
            await producer.send_offsets({(topic, 0): 2}, "g")
            await proxy.deliver()
        assert await client.committed("g", [(topic, 0)]) == {(topic, 0): 2}


async def test_a_broker_that_is_killed_in_the_middle_leaves_whole_transactions(
    tmp_path: Path, topic: str, kind: str
) -> None:
    """After each answer in turn the broker is killed, and comes again."""
    port = free_port()
    broker = await Broker.embedded(tmp_path, port=port)
    try:
        async with await Client.connect(f"127.0.0.1:{port}") as client:
            await client.create_topic(topic, 2)
            producer, expected = await client.transactional(f"t-{topic}"), []
            for number in range(8):
                steps = [
                    producer.begin,
                    partial(producer.send, topic, b"%d" % number, partition=0),
                    partial(producer.send, topic, b"%d" % number, partition=1),
                    producer.abort if number % 4 == 3 else producer.commit,
                ]
                for at, step in enumerate(steps):
                    await step()
                    if at == number % 4:
                        await broker.kill()
                        broker = await Broker.embedded(tmp_path, port=port)
                if number % 4 != 3:
                    expected.append(b"%d" % number)
            assert await values(client, topic) == expected * 2
    finally:
        await broker.stop()
