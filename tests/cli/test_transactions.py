"""`ledgerstream transactions` on a broker: what is open, and the end of it."""

from __future__ import annotations

import json
from pathlib import Path

from ledgerstream.broker.node import Node
from ledgerstream.broker.settings import Settings
from ledgerstream.client import Client
from ledgerstream.client.operator import Hanging, Transactions
from ledgerstream.wire.batches import TRANSACTIONAL, NewRecord, encode_batch, parse_header
from tests.broker.test_transactions import begin as begin_in
from tests.cli.conftest import Shell
from tests.differential.raw import Raw
from tests.differential.scenarios import create
from tests.differential.transactions import Producer, stable


def begin(raw: Raw, topic: str, **how: object) -> Producer:
    """An open transaction with one record."""
    create(raw, topic)
    producer = Producer(raw, topic)
    producer.init(6, **how)
    producer.add((topic, 0))
    assert producer.send(topic)[0] == "none"
    return producer


def test_what_is_open_is_listed_described_and_aborted(shell: Shell, on_broker: str) -> None:
    with Raw(on_broker) as raw:
        producer = begin(raw, "cli-open")
        listed = json.loads(shell("transactions", "list", "--json").stdout)
        row = {"id": "cli-open", "state": "Ongoing", "producer_id": producer.pid}
        assert row in listed
        assert shell("transactions", "list", "--state", "Empty").stdout == ""
        assert "cli-open" in shell("transactions", "list", "--state", "ongoing").stdout
        refused = shell("transactions", "list", "--state", "Foo", code=2).stderr
        assert "'Foo' is not one of" in refused
        assert "cli-open" not in shell("transactions", "list", "--open-for", "1").stdout
        (told,) = json.loads(shell("transactions", "describe", "cli-open", "--json").stdout)
        assert (told["partitions"], told["timeout_ms"]) == ("cli-open-0", 60_000)
        said = shell("transactions", "abort", "cli-open").stderr
        assert said == "Its open transaction is aborted; the producer of 'cli-open' is fenced.\n"
        assert stable(raw, "cli-open", 2) == 2
        assert producer.send("cli-open")[0] == "invalid_producer_epoch"
        assert "No transaction was open" in shell("transactions", "abort", "cli-open").stderr
    assert "nobody" in shell("transactions", "describe", "nobody", code=1).stderr
    assert "nobody" in shell("transactions", "abort", "nobody", code=1).stderr


async def test_a_transaction_of_no_coordinator_is_found_and_ended(tmp_path: Path) -> None:
    """Item 84. No client can leave one here: the data goes in behind the broker's back."""
    node = Node(Settings(data_dir=tmp_path, port=0))
    await node.start()
    await node.create_topic("hangs", 2)
    known = await begin_in(node, "known", ("hangs", 0))
    batch = encode_batch(
        [NewRecord(None, b"x", 1)], producer_id=77, producer_epoch=3, base_sequence=0,
        attributes=TRANSACTIONAL,
    )  # fmt: skip
    replica = node.replicas.named("hangs", 1)
    assert replica is not None
    partition, header = replica.partition, parse_header(batch)
    partition.append(batch, header, 0, partition.begin_verification(header))
    await replica.wait_durable(1)
    async with await Client.connect(f"127.0.0.1:{node.port}") as client:
        transactions = Transactions(client.cluster)
        (hanging,) = await transactions.find_hanging(2**60, 0)
        assert hanging == Hanging("hangs", 1, 77, 3, -1, 0, 1)
        assert await transactions.find_hanging(1_000, 1_000) == []
        await transactions.abort_hanging(hanging)
        assert partition.last_stable_offset == partition.high_watermark == 2
        assert await transactions.find_hanging(2**60, 0) == []
        assert (await transactions.describe("known")).producer_id == known[0]
        assert await transactions.abort("known")
        assert not await transactions.abort("known")
    await node.stop()


def test_nothing_hangs(shell: Shell, on_broker: str) -> None:
    assert shell("transactions", "find-hanging", "--older", "0").stderr == "Nothing hangs.\n"
