"""Kafka Streams with exactly_once_v2 on our broker: killed five times, and every count is right."""

from __future__ import annotations

import random
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from ledgerstream.broker.embedded import Broker
from tests.peers import kafka

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(kafka.why_absent() is not None, reason=str(kafka.why_absent())),
]
PROGRAM = Path(__file__).with_name("WordCount.java")
WORDS = [f"w{n}" for n in range(20)]
KILLS, LINES_EACH, PARTITIONS, WAIT_S = 5, 400, 2, 120


class Counted:
    """What a reader of what is committed has seen of the output."""

    def __init__(self, address: str, topic: str) -> None:
        self.consumer = Consumer({
            "bootstrap.servers": address, "group.id": "unused", "enable.auto.commit": False,
            "isolation.level": "read_committed",
        })  # fmt: skip
        places = [TopicPartition(topic, p, OFFSET_BEGINNING) for p in range(PARTITIONS)]
        self.consumer.assign(places)
        self.counts: dict[str, list[int]] = defaultdict(list)
        self.total = 0

    def read_until(self, total: int, streams: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + WAIT_S
        while self.total < total:
            assert time.monotonic() < deadline, (self.total, total)
            assert streams.poll() is None, "the program has ended"
            for message in self.consumer.consume(1000, 0.1):
                assert message.error() is None, message.error()
                self.counts[message.key().decode()].append(int(message.value()))
                self.total += 1


def test_word_count_is_killed_five_times_and_is_right(
    our_broker: Broker, topic: str, tmp_path: Path
) -> None:
    """Each word's counts are 1, 2, 3, …: none twice, none left out, whatever was cut off."""
    address, output = our_broker.address, f"{topic}-counts"
    admin = AdminClient({"bootstrap.servers": address})
    for made in admin.create_topics([NewTopic(t, PARTITIONS, 1) for t in (topic, output)]).values():
        made.result(30)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*kafka._java("256m"), PROGRAM, address, f"app-{topic}", topic, output, tmp_path],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    chance, producer = random.Random(5), Producer({"bootstrap.servers": address})
    expected: dict[str, int] = defaultdict(int)
    counted, sent = Counted(address, output), 0
    streams = start()
    try:
        for _ in range(KILLS):
            for _ in range(LINES_EACH):
                line = chance.choices(WORDS, k=3)
                producer.produce(topic, " ".join(line).encode(), key=line[0].encode())
                for word in line:
                    expected[word] += 1
                sent += 3
            assert producer.flush(30) == 0
            # somewhere in the middle: what is counted is not committed yet
            counted.read_until(sent - chance.randrange(LINES_EACH), streams)
            streams.kill()
            streams.wait()
            streams = start()
        counted.read_until(sent, streams)
    finally:
        streams.kill()
        streams.wait()
        counted.consumer.close()
    assert counted.counts == {word: list(range(1, n + 1)) for word, n in expected.items()}
