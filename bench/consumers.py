"""Twenty of confluent-kafka's consumers in a group; how long it takes to settle again.

`python -m bench.consumers JSON` prints {event: [seconds, …]}. One that is to be killed lives in a
process of its own.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from typing import Any

PARTITIONS, CONSUMERS = 40, 20
SESSION_MS, BEAT_MS = 6_000, 500  # of classic members; those of KIP-848 are the broker's
LOOK_SECONDS = 0.003
SETTLED_SECONDS_MAX = 120


def consumer(address: str, topic: str, group: str, protocol: str) -> Any:
    from confluent_kafka import Consumer

    config = {
        "bootstrap.servers": address, "group.id": group, "group.protocol": protocol,
        "enable.auto.commit": False, "auto.offset.reset": "earliest",
    }  # fmt: skip
    if protocol == "classic":
        config |= {"session.timeout.ms": SESSION_MS, "heartbeat.interval.ms": BEAT_MS}
    made = Consumer(config)
    made.subscribe([topic])
    return made


class Victim:
    """A consumer in a process of its own, which can be killed. It tells what it has."""

    def __init__(self, *where: str) -> None:
        self.parts: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.consumers", json.dumps({"alone": where})],
            stdout=subprocess.PIPE,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.parts = json.loads(line)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def alone(*where: str) -> None:
    """What a victim does."""
    member, told = consumer(*where), None
    while True:
        member.poll(LOOK_SECONDS)
        parts = [each.partition for each in member.assignment()]
        if parts != told:
            print(json.dumps(parts), flush=True)
            told = parts


class Group:
    def __init__(self, *where: str) -> None:
        self.where = where
        self.consumers: list[Any] = []
        self.victim: Victim | None = None

    def join(self) -> None:
        self.consumers.append(consumer(*self.where))

    def settle(self) -> float:
        """Seconds until each partition has one consumer, and nobody two more than another."""
        began = time.perf_counter()
        while not self._settled():
            assert time.perf_counter() - began < SETTLED_SECONDS_MAX, "it never settles"
            time.sleep(LOOK_SECONDS)
        return time.perf_counter() - began

    def _settled(self) -> bool:
        shares = []
        for member in self.consumers:
            message = member.poll(0)
            assert message is None or message.error() is None, message.error()
            shares.append([each.partition for each in member.assignment()])
        if self.victim is not None:
            shares.append(self.victim.parts)
        sizes = [len(share) for share in shares]
        parts = {part for share in shares for part in share}
        return sum(sizes) == len(parts) == PARTITIONS and max(sizes) - min(sizes) <= 1


def measure(
    address: str, topic: str, group: str, protocol: str, rounds: int, kills: int
) -> dict[str, list[float]]:
    """Twenty are there after one has joined, nineteen after one has left or was killed."""
    members = Group(address, topic, group, protocol)
    found: dict[str, list[float]] = {"joins": [], "leaves": [], "is killed": []}
    for _ in range(CONSUMERS - 1):
        members.join()
    members.settle()
    for _ in range(rounds):
        members.join()
        found["joins"].append(members.settle())
        began = time.perf_counter()
        members.consumers.pop().close()
        members.settle()
        found["leaves"].append(time.perf_counter() - began)
    for _ in range(kills):
        members.victim = Victim(*members.where)
        members.settle()
        members.victim.kill()
        members.victim = None
        found["is killed"].append(members.settle())
    for member in members.consumers:
        member.close()
    return found


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    if "alone" in arguments:
        alone(*arguments["alone"])
    print(json.dumps(measure(**arguments)))
