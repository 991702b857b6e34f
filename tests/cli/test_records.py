"""Records into the log and out of it, as a person at a shell does it."""

import asyncio
import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from ledgerstream.broker.embedded import Broker
from tests.cli.conftest import PROGRAM, Shell

pytestmark = pytest.mark.usefixtures("on_broker")

EVENT = ("--event", "processors.payments:Payment")
HEADER = "tx_id,event_time,customer_id,terminal_id,amount,is_fraud,fraud_scenario\n"
LINES = [
    "0,2018-04-01T00:00:31Z,596,3156,57.16,0,0",
    "1,2018-04-01T00:02:10Z,4961,3412,81.51,0,0",
    "2,2018-04-01T00:07:56Z,2,1365,146.00,1,3",
]


@pytest.fixture
def csv(home: Path) -> Path:
    path = home / "payments.csv"
    path.write_text(HEADER + "\n".join(LINES) + "\n")
    return path


def events(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_what_is_produced_is_consumed(shell: Shell, topic: str) -> None:
    done = shell("produce", topic, "--separator", ":", input="paris:42\nlyon:40\nno key\n")
    assert done.stderr == f"3 records went to topic {topic!r}.\n"
    assert sorted(shell("consume", topic).stdout.splitlines()) == [
        "lyon\t40",
        "no key",
        "paris\t42",
    ]
    first, *_ = events(shell("consume", topic, "--json", "--limit", "1").stdout)
    assert (first["partition"], first["offset"]) == (0, 0)
    assert shell("consume", topic, "--from", "latest").stdout == ""


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_is_imported_and_read_back(shell: Shell, csv: Path, suffix: str, topic: str) -> None:
    path = csv.with_suffix(f".{suffix}")
    if suffix == "parquet":
        pd.read_csv(csv, parse_dates=["event_time"]).to_parquet(path)
    done = shell("import", path.name, "--topic", topic, "--key", "customer", *EVENT)
    assert done.stderr == f"3 rows of payments.{suffix} went to topic {topic!r}.\n"
    assert events(shell("consume", topic, *EVENT).stdout)[2] == {
        "payment_id": 2,
        "at": "2018-04-01T00:07:56Z",
        "customer": 2,
        "terminal": 1365,
        "amount": "146.00",
        "is_fraud": True,
        "scenario": 3,
    }


def test_consumed_events_are_produced_again(shell: Shell, csv: Path, topic: str) -> None:
    shell("import", csv.name, "--topic", topic, "--key", "customer", *EVENT)
    lines = shell("consume", topic, *EVENT).stdout
    shell(
        "produce", f"{topic}-copies", *EVENT, "--key", "customer", "--encoding", "json", input=lines
    )
    assert shell("consume", f"{topic}-copies", *EVENT, "--encoding", "json").stdout == lines


def test_a_line_that_is_no_event_names_itself(shell: Shell, topic: str) -> None:
    done = shell("produce", topic, *EVENT, input='{"payment_id": 1}\n', code=1)
    assert done.stderr.startswith("ledgerstream: Line 1: The record is not a Payment")


def test_topics_are_made_listed_described_and_deleted(shell: Shell, topic: str) -> None:
    shell("topic", "create", topic, "--partitions", "3", "--config", "retention.ms=1000")
    listed = json.loads(shell("topic", "list", "--json").stdout)
    assert {"topic": topic, "partitions": 3, "offsets": 0} in listed
    assert len(json.loads(shell("topic", "describe", topic, "--json").stdout)["partitions"]) == 3
    assert "exists" in shell("topic", "create", topic, code=1).stderr
    shell("topic", "delete", topic, "--yes")
    assert topic not in shell("topic", "list").stdout
    assert "no such topic" in shell("topic", "describe", topic, code=1).stderr


def test_generated_payments_keep_to_their_rate(shell: Shell, topic: str) -> None:
    world = ("--customers", "50", "--terminals", "500", "--days", "3")
    done = shell("generate", "payments", "--topic", topic, *world, "--rate", "1000")
    count = int(done.stderr.split()[0])
    assert len(shell("consume", topic, *EVENT).stdout.splitlines()) == count > 100


def test_generated_trades_can_be_read_again(shell: Shell, topic: str) -> None:
    done = shell("generate", "trades", "--topic", topic, "--count", "2500", "--symbols", "7")
    assert done.stderr == f"2,500 trades went to topic {topic!r}.\n"
    event = ("--event", "processors.trades:Trade", "--limit", "1")
    assert json.loads(shell("consume", topic, *event).stdout)["price"] > 0


def test_a_reader_that_has_enough_ends_consume(shell: Shell, topic: str) -> None:
    world = ("--customers", "500", "--terminals", "500", "--days", "20")
    shell("generate", "payments", "--topic", topic, *world)
    consume = subprocess.Popen(
        [PROGRAM, "consume", topic, *EVENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert consume.stdout is not None and consume.stderr is not None
    consume.stdout.readline()
    consume.stdout.close()
    assert (consume.wait(timeout=60), consume.stderr.read()) == (0, b"")
    consume.stderr.close()


def test_a_day_is_a_time_to_begin_at(shell: Shell, csv: Path, topic: str) -> None:
    shell("import", csv.name, "--topic", topic, "--key", "customer", *EVENT)
    assert len(events(shell("consume", topic, *EVENT, "--from", "2018-04-01").stdout)) == 3
    assert shell("consume", topic, *EVENT, "--from", "2018-04-02").stdout == ""
    assert "is not a time" in shell("consume", topic, "--from", "April", code=1).stderr


def test_what_is_no_event_is_told_of_a_few_times_and_fails(shell: Shell, topic: str) -> None:
    shell("topic", "create", topic)
    shell("produce", topic, input="".join(f"no event {n}\n" for n in range(40)))
    wrong = shell("consume", topic, "--event", "processors.trades:Trade", code=1)
    assert wrong.stdout == ""
    assert len(wrong.stderr.splitlines()) < 10
    assert "40 records could not be read as processors.trades:Trade" in wrong.stderr
    assert "--event" in wrong.stderr


async def test_a_topic_that_is_not_there_is_a_sentence_at_once(
    shell: Shell, topic: str, tmp_path: Path
) -> None:
    async with await Broker.embedded(tmp_path / "log", auto_create_topics=False) as strict:
        for command in ("produce", "consume"):
            to = ("--log", strict.address)
            failed = await asyncio.to_thread(shell, command, topic, *to, input="hi\n", code=1)
            assert "there is no such topic" in failed.stderr
            assert "ledgerstream topic create" in failed.stderr
