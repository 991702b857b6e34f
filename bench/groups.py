"""Figures of groups and coordinators.

Apache Kafka's `group.consumer.*` are its defaults: members of KIP-848 are asked for a heartbeat
every 5 s, the assignor runs at most once a second, and a member is given up after 45 s, here too.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import coordinators, librdkafka
from bench.rows import Row, in_turn, row
from bench.sides import Side, both, directory, ours, ours_in
from tests.peers import kafka

KAFKA = f"Apache Kafka {kafka.VERSION}"
PROTOCOLS = {"classic": "classic", "consumer": "KIP-848"}
JAVA_RECORDS = 2_000_000
SETTLE_ROUNDS, SETTLE_KILLS = 3, 3
LARGE = 1_000  # members, and partitions
LARGE_BEAT_MS = 500  # of classic members: they learn of each other by it
SCALE_PRODUCED = 500_000
IDLE_SECONDS = 10
_names = itertools.count()


@row("consume_java")
def consume_java() -> Iterator[Row]:
    if kafka.why_absent():
        return
    with both() as (us, peer):
        assert peer is not None
        topics = {}
        for side in (us, peer):
            topics[side.name] = librdkafka.new_topic(side.address)
            librdkafka.run("produce", address=side.address, topic=topics[side.name],
                           count=JAVA_RECORDS, size=100)  # fmt: skip

        def run(side: Side) -> float:
            said = kafka.tool(
                "org.apache.kafka.tools.ConsumerPerformance", "--bootstrap-server", side.address,
                "--topic", topics[side.name], "--num-records", JAVA_RECORDS, "--group",
                f"java-{next(_names)}", "--timeout", 60_000, heap="512m",
            )  # fmt: skip
            columns = said.strip().splitlines()[-1].split(",")
            assert int(columns[4]) >= JAVA_RECORDS, said
            return float(columns[5])

        mine, theirs = in_turn(lambda: run(us), lambda: run(peer), pairs=3)
    yield Row("consume_java", "ConsumerPerformance, 100 B, in a group, from its joining on",
              "records/s", mine, theirs, KAFKA, "higher", 1.0, 1.2)  # fmt: skip


# -- a group of twenty


@row("group_settle")
def group_settle() -> Iterator[Row]:
    """Classic members beat every 0.5 s and have sessions of 6 s; KIP-848's are given up after 45 s,
    so that is awaited once, on both sides at the same time."""
    with both() as (us, peer):
        sides = [side for side in (us, peer) if side]
        topics = {side.name: librdkafka.new_topic(side.address, 40) for side in sides}
        for protocol, name in PROTOCOLS.items():
            found: dict[str, dict[str, list[float]]] = {}
            together = protocol == "consumer"
            for side in sides:
                started = _consumers(side, topics, protocol, SETTLE_ROUNDS,
                                     0 if together else SETTLE_KILLS)  # fmt: skip
                found[side.name] = _said(started)
            if together:
                running = [_consumers(side, topics, protocol, 0, 1) for side in sides]
                for side, process in zip(sides, running, strict=True):
                    found[side.name]["is killed"] = _said(process)["is killed"]
            for event, seconds in found[us.name].items():
                theirs = found.get(KAFKA, {}).get(event)
                yield Row(f"group_settle.{protocol}.{event.split()[-1]}",
                          f"20 consumers of confluent-kafka, {name}: settled after one {event}",
                          "s", statistics.median(seconds),
                          statistics.median(theirs) if theirs else None, KAFKA, "lower",
                          1.0, 0.5)  # fmt: skip


def _consumers(
    side: Side, topics: dict[str, str], protocol: str, rounds: int, kills: int
) -> subprocess.Popen[bytes]:
    return _start("bench.consumers", address=side.address, topic=topics[side.name],
                  group=f"settle-{next(_names)}", protocol=protocol, rounds=rounds,
                  kills=kills)  # fmt: skip


# -- a group of a thousand


@row("group_large")
def group_large() -> Iterator[Row]:
    with both() as (us, peer):
        topics = {
            side.name: librdkafka.new_topic(side.address, LARGE) for side in (us, peer) if side
        }
        for protocol, name in PROTOCOLS.items():

            def run(side: Side, protocol: str = protocol) -> float:
                started = _members(side, topics[side.name], protocol, LARGE_BEAT_MS)
                return float(_said(started))

            mine, theirs = in_turn(
                lambda r=run: r(us),  # type: ignore[misc]
                (lambda r=run, p=peer: r(p)) if peer else None,  # type: ignore[misc]
                pairs=2,
            )
            yield Row(f"group_large.{protocol}",
                      f"1,000 members, 1,000 partitions, {name}: first join → all assigned",
                      "s", mine, theirs, KAFKA, "lower", 1.0, 0.5)  # fmt: skip


def _members(
    side: Side, topic: str, protocol: str, beat_ms: int, *, hold: bool = False
) -> subprocess.Popen[bytes]:
    return _start("bench.members", address=side.address, topic=topic, protocol=protocol,
                  group=f"large-{next(_names)}", count=LARGE, beat_ms=beat_ms,
                  hold=hold)  # fmt: skip


def _start(module: str, **arguments: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def _said(process: subprocess.Popen[bytes]) -> Any:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, process.args
    return json.loads(out)


# -- many of all


@row("coordinator_scale")
def coordinator_scale() -> Iterator[Row]:
    with both() as (us, peer):
        idle = {}
        sides = [side for side in (us, peer) if side]
        for side in sides:
            asyncio.run(coordinators.fill(side.address, librdkafka.new_topic(side.address)))
        time.sleep(5)  # what was written is behind them
        before = {side.name: side.cpu_seconds() for side in sides}
        time.sleep(IDLE_SECONDS)
        for side in sides:
            idle[side.name] = (side.cpu_seconds() - before[side.name]) / IDLE_SECONDS * 100
        yield Row("coordinator_scale.idle",
                  "CPU while idle, with 10,000 transactional ids and 1,000 groups", "% of a core",
                  idle[us.name], idle.get(KAFKA), KAFKA, "lower")  # fmt: skip
    with directory("scale") as where:
        with ours_in(where) as side:
            asyncio.run(coordinators.fill(side.address, librdkafka.new_topic(side.address)))
        for how in ("a clean stop", "SIGKILL"):
            took = statistics.median(_restart(where, kill=how == "SIGKILL") for _ in range(3))
            yield Row(f"coordinator_scale.{how.split()[-1]}",
                      f"start after {how} → all of them are listed", "s", took, None, "",
                      "lower", 2)  # fmt: skip
    yield from _beside_members()


def _restart(where: Path, *, kill: bool) -> float:
    """Seconds of a start after the end of a broker that was ended so."""
    with ours_in(where) as side:
        asyncio.run(coordinators.wait_listed(side.address))
        if kill:
            side.send_signal(signal.SIGKILL)
    began = time.perf_counter()
    with ours_in(where) as side:
        asyncio.run(coordinators.wait_listed(side.address))
        return time.perf_counter() - began


def _beside_members() -> Iterator[Row]:
    with ours() as us:
        many = librdkafka.new_topic(us.address, LARGE)

        def produce() -> float:
            rate: float = librdkafka.run(
                "produce", address=us.address, topic=librdkafka.new_topic(us.address),
                count=SCALE_PRODUCED, size=100,
            )  # fmt: skip
            return rate

        for _ in range(3):  # the first on a new broker are slower
            produce()
        for protocol, name in PROTOCOLS.items():
            rates: dict[bool, list[float]] = {False: [], True: []}
            rates[False] += produce(), produce()
            group = _members(us, many, protocol, 3_000, hold=True)
            assert group.stdout is not None
            group.stdout.readline()  # all have their partition
            rates[True] += produce(), produce(), produce()
            group.communicate(timeout=120)
            rates[False] += produce(), produce()
            beside, alone = statistics.median(rates[True]), statistics.median(rates[False])
            yield Row(f"coordinator_scale.produce.{protocol}",
                      f"produce 100 B while 1,000 members of a group beat, {name}", "records/s",
                      beside, alone, "without members", "higher")  # fmt: skip
