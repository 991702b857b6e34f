"""Apache Kafka's own tools on our broker, where Java is present."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ledgerstream.broker.embedded import Broker
from tests.peers import kafka

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(kafka.why_absent() is not None, reason=str(kafka.why_absent())),
]
TOOLS = "org.apache.kafka.tools."


def test_producer_performance(our_broker: Broker, topic: str) -> None:
    said = kafka.tool(
        TOOLS + "ProducerPerformance", "--topic", topic, "--num-records", 200_000,
        "--record-size", 100, "--throughput", -1, "--command-property",
        f"bootstrap.servers={our_broker.address}", "acks=all", "enable.idempotence=true",
    )  # fmt: skip
    assert "200000 records sent" in said
    ends = kafka.tool(
        TOOLS + "GetOffsetShell", "--bootstrap-server", our_broker.address, "--topic", topic
    )
    assert ends.strip() == f"{topic}:0:200000"


def test_verifiable_producer(our_broker: Broker, topic: str) -> None:
    said = kafka.tool(
        TOOLS + "VerifiableProducer", "--bootstrap-server", our_broker.address, "--topic", topic,
        "--max-messages", 1000, "--acks", -1,
    )  # fmt: skip
    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    offsets = [e["offset"] for e in events if e["name"] == "producer_send_success"]
    assert offsets == list(range(1000))


def test_topic_command(our_broker: Broker, topic: str) -> None:
    def command(*arguments: object) -> str:
        return kafka.tool(
            TOOLS + "TopicCommand", "--bootstrap-server", our_broker.address, *arguments
        )

    command("--create", "--topic", topic, "--partitions", 3, "--config", "segment.ms=60000")
    described = command("--describe", "--topic", topic)
    assert re.search(
        r"PartitionCount: 3\s+ReplicationFactor: 1\s+Configs: .*segment.ms=60000", described
    )
    assert len(re.findall(r"Leader: 1\s+Replicas: 1\s+Isr: 1", described)) == 3
    command("--alter", "--topic", topic, "--partitions", 5)
    assert "PartitionCount: 5" in command("--describe", "--topic", topic)
    assert topic in command("--list").split()
    command("--delete", "--topic", topic)
    assert topic not in command("--list").split()


def test_config_command_and_log_dirs(our_broker: Broker, topic: str) -> None:
    kafka.tool(
        TOOLS + "TopicCommand", "--bootstrap-server", our_broker.address, "--create",
        "--topic", topic,
    )  # fmt: skip
    changed = kafka.tool(
        "kafka.admin.ConfigCommand", "--bootstrap-server", our_broker.address, "--alter",
        "--entity-type", "topics", "--entity-name", topic, "--add-config", "max.message.bytes=5000",
    )  # fmt: skip
    assert "Completed updating config" in changed
    shown = kafka.tool(
        "kafka.admin.ConfigCommand", "--bootstrap-server", our_broker.address, "--describe",
        "--entity-type", "topics", "--entity-name", topic,
    )  # fmt: skip
    assert "max.message.bytes=5000" in shown
    dirs = kafka.tool(
        TOOLS + "LogDirsCommand", "--bootstrap-server", our_broker.address, "--describe",
        "--topic-list", topic,
    )  # fmt: skip
    assert f'"partition":"{topic}-0"' in dirs


def test_delete_records_command(our_broker: Broker, topic: str, tmp_path: Path) -> None:
    """Item 21."""
    kafka.tool(
        TOOLS + "TopicCommand", "--bootstrap-server", our_broker.address, "--create",
        "--topic", topic,
    )  # fmt: skip
    kafka.tool(
        TOOLS + "VerifiableProducer", "--bootstrap-server", our_broker.address, "--topic", topic,
        "--max-messages", "50",
    )  # fmt: skip
    wanted = tmp_path / "wanted.json"
    for offset, start in ((20, 20), (-1, 50)):
        partition = {"topic": topic, "partition": 0, "offset": offset}
        wanted.write_text(json.dumps({"version": 1, "partitions": [partition]}))
        told = kafka.tool(
            TOOLS + "DeleteRecordsCommand", "--bootstrap-server", our_broker.address,
            "--offset-json-file", str(wanted),
        )  # fmt: skip
        assert f"low_watermark: {start}" in told
