"""The same raw requests for our broker and for Apache Kafka: well-formed, at the edges, and wrong.

A scenario is a generator function: it yields (what, reply) for each reply that a client would see.
Topic names are given by the caller; what differs by nature (ids, times, addresses) is made equal by
`normal`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

from ledgerstream.wire import batches
from ledgerstream.wire.batches import NewRecord
from ledgerstream.wire.versions import Api
from tests.differential.raw import Raw

Seen = Iterator[tuple[str, Any]]
Scenario = Callable[[Raw, str], Seen]
SCENARIOS: dict[str, Scenario] = {}
NOWHERE = UUID(int=0xDEAD)
TIME = 1_700_000_000_000


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


# -- requests


def create(raw: Raw, name: str, partitions: int = 1, *, version: int = 7, **config: str) -> Any:
    made = raw.ask(
        Api.CREATE_TOPICS, version,
        topics=[topic_entry(name, partitions, **config)], timeout=10_000, validate_only=False,
    )  # fmt: skip
    for partition in range(partitions):  # Kafka answers before its leaders are there
        until(
            lambda p=partition: offsets(raw, name, -1, partition=p, version=7)["topics"][0][
                "partitions"
            ][0]
        )
    return made


def until(ask: Callable[[], Any]) -> Any:
    """Ask again while the broker says that it is not ready yet."""
    for _ in range(20_000):
        reply = ask()
        if reply["error_code"] not in NOT_READY:
            return reply
    raise AssertionError(f"never ready: {reply}")


NOT_READY = {
    "unknown_topic_or_partition", "not_leader_or_follower", "leader_not_available",
    "coordinator_load_in_progress", "coordinator_not_available", "not_coordinator",
}  # fmt: skip


def topic_entry(name: str, partitions: int = 1, replication: int = 1, **config: str) -> Any:
    return {
        "name": name,
        "num_partitions": partitions,
        "replication_factor": replication,
        "assignments": [],
        "configs": [{"name": k.replace("_", "."), "value": v} for k, v in config.items()],
    }


def topic_id(raw: Raw, name: str) -> UUID | None:
    reply = raw.ask(
        Api.METADATA, 12, topics=[{"topic_id": None, "name": name}],
        allow_auto_topic_creation=False, include_topic_authorized_operations=False,
    )  # fmt: skip
    found: UUID | None = reply["topics"][0]["topic_id"]
    return found


def produce(
    raw: Raw, name: str, batch: bytes | None, *, version: int = 9, acks: int = -1,
    partition: int = 0, transactional_id: str | None = None,
) -> Any:  # fmt: skip
    return raw.ask(
        Api.PRODUCE, version, transactional_id=transactional_id, acks=acks, timeout=10_000,
        topic_data=[{
            "name": name,
            "topic_id": topic_id(raw, name) if version >= 13 else None,
            "partition_data": [{"index": partition, "records": batch}],
        }],
    )  # fmt: skip


def fetch(
    raw: Raw, name: str, offset: int, *, version: int = 11, partition: int = 0,
    max_bytes: int = 2**20, part_bytes: int = 2**20, min_bytes: int = 0, wait: int = 0,
    epoch: int = -1, isolation: int = 0, session: tuple[int, int] = (0, -1), topics: Any = None,
    forgotten: Any = (), last_epoch: int = -1,
) -> Any:  # fmt: skip
    if topics is None:
        topics = [{
            "topic": name,
            "topic_id": topic_id(raw, name) if version >= 13 else None,
            "partitions": [{
                "partition": partition, "current_leader_epoch": epoch, "fetch_offset": offset,
                "last_fetched_epoch": last_epoch, "log_start_offset": -1,
                "partition_max_bytes": part_bytes,
            }],
        }]  # fmt: skip
    return raw.ask(
        Api.FETCH, version, replica_id=-1, max_wait=wait, min_bytes=min_bytes, max_bytes=max_bytes,
        isolation_level=isolation, session_id=session[0], session_epoch=session[1], topics=topics,
        forgotten_topics_data=list(forgotten), rack_id="",
    )  # fmt: skip


def offsets(raw: Raw, name: str, timestamp: int, *, version: int = 7, partition: int = 0,
            epoch: int = -1, isolation: int = 0) -> Any:  # fmt: skip
    return raw.ask(
        Api.LIST_OFFSETS, version, replica_id=-1, isolation_level=isolation, timeout=5000,
        topics=[{"name": name, "partitions": [{
            "partition_index": partition, "current_leader_epoch": epoch, "timestamp": timestamp,
        }]}],
    )  # fmt: skip


def metadata(raw: Raw, version: int, topics: Any, *, create: bool = False) -> Any:
    reply = raw.ask(
        Api.METADATA, version, topics=topics, allow_auto_topic_creation=create,
        include_cluster_authorized_operations=False, include_topic_authorized_operations=True,
    )  # fmt: skip
    return reply if isinstance(reply, str) else reply["topics"]


def producer_id(raw: Raw) -> tuple[int, int]:
    reply = until(lambda: raw.ask(
        Api.INIT_PRODUCER_ID, 4, transactional_id=None, transaction_timeout=60_000, producer_id=-1,
        producer_epoch=-1,
    ))  # fmt: skip
    return reply["producer_id"], reply["producer_epoch"]


def batch(count: int = 1, *, at: int = TIME, **how: Any) -> bytes:
    items = [NewRecord(b"k%d" % i, b"v%d" % i, at + i) for i in range(count)]
    return batches.encode_batch(items, **how)


def patched(data: bytes, at: int, form: str, *values: Any, crc: bool = True) -> bytes:
    """A batch with some of its header overwritten, its CRC made right again unless told."""
    from crc32c import crc32c

    out = bytearray(data)
    struct.pack_into(form, out, at, *values)
    if crc:
        struct.pack_into(">I", out, 17, crc32c(bytes(out[21:])))
    return bytes(out)


# -- produce


@scenario
def produce_in_every_version(raw: Raw, name: str) -> Seen:
    create(raw, name)
    for version in range(3, 14):
        yield f"v{version}", produce(raw, name, batch(3), version=version)


@scenario
def produce_with_every_acks(raw: Raw, name: str) -> Seen:
    create(raw, name)
    for acks in (-1, 1, 2, -2, 100):
        yield f"acks {acks}", produce(raw, name, batch(), acks=acks)


@scenario
def produce_where_nothing_is(raw: Raw, name: str) -> Seen:
    create(raw, name, 2)
    yield "no topic", produce(raw, name + "-none", batch())
    yield "no partition", produce(raw, name, batch(), partition=2)
    yield "negative partition", produce(raw, name, batch(), partition=-1)
    yield "no topic id", raw.ask(
        Api.PRODUCE, 13, transactional_id=None, acks=-1, timeout=1000,
        topic_data=[{"topic_id": NOWHERE, "partition_data": [{"index": 0, "records": batch()}]}],
    )  # fmt: skip


@scenario
def produce_malformed_batches(raw: Raw, name: str) -> Seen:
    create(raw, name)
    good = batch(3)
    yield "wrong crc", produce(raw, name, patched(good, 17, ">I", 1, crc=False))
    yield "magic 3", produce(raw, name, patched(good, 16, ">b", 3))
    yield "count 2 of 3", produce(raw, name, patched(good, 57, ">i", 2))
    yield "count 0", produce(raw, name, patched(good, 57, ">i", 0))
    yield "last offset delta 5", produce(raw, name, patched(good, 23, ">i", 5))
    yield "base offset 7", produce(raw, name, patched(good, 0, ">q", 7))
    yield "control", produce(raw, name, patched(good, 21, ">h", 0x20))
    yield "codec 5", produce(raw, name, patched(good, 21, ">h", 5))
    yield "two batches", produce(raw, name, good + good)
    yield "producer without sequence", produce(raw, name, batch(producer_id=5, producer_epoch=0))
    yield "afterwards", produce(raw, name, good)


@scenario
def produce_what_is_not_a_batch(raw: Raw, name: str) -> Seen:
    create(raw, name)
    yield "empty", produce(raw, name, b"")
    yield "afterwards", offsets(raw, name, -1)


@scenario
def produce_too_large(raw: Raw, name: str) -> Seen:
    create(raw, name, max_message_bytes="1000")
    yield "1 kB", produce(raw, name, batches.encode_batch([NewRecord(None, bytes(2000), TIME)]))
    yield "small", produce(raw, name, batch())


@scenario
def produce_zstd_before_version_7(raw: Raw, name: str) -> Seen:
    create(raw, name)
    for version in (3, 6, 7):
        yield f"v{version}", produce(raw, name, batch(codec=batches.ZSTD), version=version)


@scenario
def produce_to_a_compacted_topic(raw: Raw, name: str) -> Seen:
    create(raw, name, cleanup_policy="compact")
    yield "without key", produce(raw, name, batches.encode_batch([NewRecord(None, b"v", TIME)]))
    yield "with key", produce(raw, name, batch())


@scenario
def produce_with_append_time(raw: Raw, name: str) -> Seen:
    create(raw, name, message_timestamp_type="LogAppendTime")
    yield "first", produce(raw, name, batch())
    reply = fetch(raw, name, 0)
    data = reply["responses"][0]["partitions"][0]["records"]
    header = batches.parse_header(data)
    yield "attributes", header.attributes
    yield "crc", batches.crc_matches(data, 0, header)


@scenario
def produce_from_the_future(raw: Raw, name: str) -> Seen:
    create(raw, name)
    yield "in the year 2100", produce(raw, name, batch(at=4_102_444_800_000))


# -- idempotence


@scenario
def idempotent_repeats(raw: Raw, name: str) -> Seen:
    create(raw, name)
    pid, epoch = producer_id(raw)

    def send(sequence: int, count: int = 2, epoch: int = epoch) -> Any:
        data = batch(count, producer_id=pid, producer_epoch=epoch, base_sequence=sequence)
        return produce(raw, name, data)

    for sequence in (0, 2, 4, 6, 8, 10):
        yield f"first {sequence}", send(sequence)
    for sequence in (10, 8, 6, 4, 2):
        yield f"repeat {sequence}", send(sequence)
    yield "older than five", send(0)
    yield "a gap", send(14)
    yield "overlaps", send(11, 3)
    yield "part of one", send(10, 1)
    yield "next", send(12)
    yield "end", offsets(raw, name, -1)


@scenario
def idempotent_epochs(raw: Raw, name: str) -> Seen:
    create(raw, name)
    pid, _ = producer_id(raw)

    def send(epoch: int, sequence: int) -> Any:
        data = batch(1, producer_id=pid, producer_epoch=epoch, base_sequence=sequence)
        return produce(raw, name, data)

    yield "epoch 3", send(3, 0)
    yield "epoch 3 again", send(3, 0)
    yield "lower epoch", send(2, 1)
    yield "higher epoch not at 0", send(4, 1)
    yield "higher epoch at 0", send(4, 0)
    yield "the old one", send(3, 1)


@scenario
def idempotent_unknown_producers(raw: Raw, name: str) -> Seen:
    create(raw, name)
    pid, _ = producer_id(raw)
    late = batch(1, producer_id=pid, producer_epoch=0, base_sequence=77)
    yield "begins at 77", produce(raw, name, late)
    yield "its repeat", produce(raw, name, late)


@scenario
def idempotent_sequences_wrap(raw: Raw, name: str) -> Seen:
    create(raw, name)
    pid, _ = producer_id(raw)

    def send(sequence: int, count: int) -> Any:
        data = batch(count, producer_id=pid, producer_epoch=0, base_sequence=sequence)
        return produce(raw, name, data)

    top = 2**31 - 1
    yield "over the top", send(top - 1, 4)
    yield "its repeat", send(top - 1, 4)
    yield "goes on at 2", send(2, 1)
    yield "not at 5", send(5, 1)


@scenario
def init_producer_id(raw: Raw, name: str) -> Seen:
    """Items 24, 25, 26."""

    def ask(version: int, **fields: Any) -> Any:
        given = {
            "transactional_id": None, "transaction_timeout": 1000, "producer_id": -1,
            "producer_epoch": -1, **fields,
        }  # fmt: skip
        reply = until(lambda: raw.ask(Api.INIT_PRODUCER_ID, version, **given))
        return {**reply, "producer_id": reply["producer_id"] >= 0}

    for version in range(6):
        yield f"v{version}", ask(version)
    yield "empty transactional id", ask(4, transactional_id="")
    yield "id without epoch", ask(4, producer_id=5)
    yield "epoch without id", ask(4, producer_epoch=5)


# -- fetch


@scenario
def fetch_in_every_version(raw: Raw, name: str) -> Seen:
    create(raw, name)
    produce(raw, name, batch(3))
    for version in range(4, 19):
        yield f"v{version}", fetch(raw, name, 0, version=version)
        yield f"v{version} committed", fetch(raw, name, 0, version=version, isolation=1)


@scenario
def fetch_at_every_place(raw: Raw, name: str) -> Seen:
    create(raw, name)
    for _ in range(3):
        produce(raw, name, batch(10))
    for offset in (-1, 0, 5, 9, 10, 29, 30, 31, 1000):
        yield f"at {offset}", fetch(raw, name, offset)


@scenario
def fetch_limits(raw: Raw, name: str) -> Seen:
    create(raw, name)
    for _ in range(5):
        produce(raw, name, batch(50))
    for limit in (0, 1, 100, 1500, 2500, 10_000):
        yield f"part {limit}", fetch(raw, name, 0, part_bytes=limit)
        yield f"all {limit}", fetch(raw, name, 0, max_bytes=limit)


@scenario
def fetch_where_nothing_is(raw: Raw, name: str) -> Seen:
    create(raw, name)
    yield "no topic", fetch(raw, name + "-none", 0)
    yield "no partition", fetch(raw, name, 0, partition=5)
    yield "empty", fetch(raw, name, 0)
    part = {
        "partition": 0, "current_leader_epoch": -1, "fetch_offset": 0, "last_fetched_epoch": -1,
        "log_start_offset": -1, "partition_max_bytes": 1000,
    }  # fmt: skip
    yield "no id", fetch(raw, name, 0, version=13, topics=[
        {"topic_id": NOWHERE, "partitions": [part]}
    ])  # fmt: skip


@scenario
def fetch_leader_epochs(raw: Raw, name: str) -> Seen:
    create(raw, name)
    produce(raw, name, batch())
    for epoch in (-1, 0, 1, 100):
        yield f"epoch {epoch}", fetch(raw, name, 0, epoch=epoch)
        yield f"offsets {epoch}", offsets(raw, name, -1, epoch=epoch)
    yield "last epoch 0", fetch(raw, name, 0, version=12, last_epoch=0)


@scenario
def fetch_sessions(raw: Raw, name: str) -> Seen:
    create(raw, name, 2)
    produce(raw, name, batch())

    def part(index: int, offset: int) -> Any:
        return {
            "partition": index, "current_leader_epoch": -1, "fetch_offset": offset,
            "last_fetched_epoch": -1, "log_start_offset": -1, "partition_max_bytes": 1000,
        }  # fmt: skip

    both = [{"topic": name, "partitions": [part(0, 0), part(1, 0)]}]
    first = fetch(raw, name, 0, topics=both, session=(0, 0))
    session = first["session_id"]
    yield "has a session", session > 0
    yield "first", {**first, "session_id": 0}

    def go_on(epoch: int, topics: Any = (), forgotten: Any = (), number: int = session) -> Any:
        reply = fetch(
            raw, name, 0, topics=list(topics), session=(number, epoch), forgotten=forgotten
        )
        return {**reply, "session_id": reply["session_id"] == session}

    yield "again", go_on(1)
    yield "moved on", go_on(2, [{"topic": name, "partitions": [part(0, 1)]}])
    produce(raw, name, batch(), partition=1)
    yield "news of one", go_on(3)
    yield "wrong epoch", go_on(9)
    yield "forgets one", go_on(4, forgotten=[{"topic": name, "partitions": [1]}])
    yield "unknown session", go_on(1, number=session + 1_000_000)
    yield "closed", go_on(-1)
    yield "after the end", go_on(5)


# -- offsets


@scenario
def list_offsets_in_every_version(raw: Raw, name: str) -> Seen:
    create(raw, name)
    produce(raw, name, batch(10))
    for version in range(1, 12):
        for timestamp in (-1, -2, TIME + 5, TIME + 1000, 0):
            yield f"v{version} {timestamp}", offsets(raw, name, timestamp, version=version)
    for version in range(7, 12):
        yield f"v{version} max", offsets(raw, name, -3, version=version)
    for version in (8, 9, 10, 11):
        yield f"v{version} local", offsets(raw, name, -4, version=version)


@scenario
def list_offsets_wrong(raw: Raw, name: str) -> Seen:
    create(raw, name)
    yield "no topic", offsets(raw, name + "-none", -1)
    yield "no partition", offsets(raw, name, -1, partition=4)
    yield "empty, by time", offsets(raw, name, TIME)
    yield "empty, max", offsets(raw, name, -3)
    yield "max before 7", offsets(raw, name, -3, version=6)
    yield "-4 before 8", offsets(raw, name, -4, version=7)
    yield "-99", offsets(raw, name, -99, version=7)


@scenario
def offset_for_leader_epoch(raw: Raw, name: str) -> Seen:
    create(raw, name)
    produce(raw, name, batch(5))
    for version in (2, 3, 4):
        for current, epoch in ((-1, 0), (0, 0), (0, 1), (0, -1), (1, 0), (5, 5)):
            yield f"v{version} {current} {epoch}", raw.ask(
                Api.OFFSET_FOR_LEADER_EPOCH, version, replica_id=-1, topics=[
                    {"topic": name, "partitions": [
                        {"partition": 0, "current_leader_epoch": current, "leader_epoch": epoch},
                        {"partition": 7, "current_leader_epoch": current, "leader_epoch": epoch},
                    ]},
                ],
            )  # fmt: skip


# -- topics


@scenario
def metadata_in_every_version(raw: Raw, name: str) -> Seen:
    create(raw, name, 2)
    for version in range(14):
        absent = f"{name}-none-{version}"  # before version 4 asking for it creates it
        asked = [{"name": name, "topic_id": None}, {"name": absent, "topic_id": None}]
        yield f"v{version}", metadata(raw, version, asked)
    yield "none", metadata(raw, 12, [])
    yield "bad name", metadata(raw, 12, [{"name": "a b", "topic_id": None}])
    for version in (12, 13):
        yield f"no id v{version}", metadata(raw, version, [{"name": None, "topic_id": NOWHERE}])


@scenario
def create_topics_in_every_version(raw: Raw, name: str) -> Seen:
    for version in range(2, 8):
        yield f"v{version}", without_configs(create(raw, f"{name}-{version}", 2, version=version))


def without_configs(reply: Any) -> Any:
    """What a topic's settings are by default is each broker's own affair."""
    for topic in reply["topics"]:
        topic.pop("configs", None)
    return reply


@scenario
def create_topics_wrong(raw: Raw, name: str) -> Seen:
    def ask(*topics: Any, validate_only: bool = False) -> Any:
        return without_configs(
            raw.ask(
                Api.CREATE_TOPICS, 7, topics=list(topics), timeout=5000, validate_only=validate_only
            )
        )

    yield "validated", ask(topic_entry(name), validate_only=True)
    yield "made", ask(topic_entry(name))
    yield "again", ask(topic_entry(name))
    yield "no partitions", ask(topic_entry(name + "-0", 0))
    yield "negative partitions", ask(topic_entry(name + "-m", -5))
    yield "three replicas", ask(topic_entry(name + "-r", 1, 3))
    yield "no replicas", ask(topic_entry(name + "-r0", 1, 0))
    yield "bad names", ask(topic_entry(""), topic_entry("."), topic_entry("a b"))
    yield "long name", ask(topic_entry("x" * 250))
    yield "twice", ask(topic_entry(name + "-t"), topic_entry(name + "-t"))
    yield "unknown setting", ask(topic_entry(name + "-c", 1, 1, no_such_setting="1"))
    yield "bad setting", ask(topic_entry(name + "-d", 1, 1, segment_ms="soon"))
    yield "bad policy", ask(topic_entry(name + "-e", 1, 1, cleanup_policy="burn"))
    manual = {**topic_entry(name + "-a", -1, -1), "assignments": [
        {"partition_index": 0, "broker_ids": [1]}, {"partition_index": 1, "broker_ids": [1]}
    ]}  # fmt: skip
    yield "by hand", ask(manual)
    yield "by hand and number", ask({**manual, "name": name + "-b", "num_partitions": 2})
    yield "default partitions", ask(topic_entry(name + "-n", -1, -1))


@scenario
def delete_topics(raw: Raw, name: str) -> Seen:
    for version in range(1, 7):
        topic = f"{name}-{version}"
        create(raw, topic)
        asked = {"topic_names": [topic], "topics": [{"name": topic, "topic_id": None}]}
        yield f"v{version}", raw.ask(Api.DELETE_TOPICS, version, timeout=5000, **asked)
        yield f"v{version} again", raw.ask(Api.DELETE_TOPICS, version, timeout=5000, **asked)
    create(raw, name)
    by_id = [{"name": None, "topic_id": topic_id(raw, name)}]
    yield "by id", raw.ask(Api.DELETE_TOPICS, 6, timeout=5000, topics=by_id)
    nobody = [{"name": None, "topic_id": NOWHERE}]
    yield "no id", raw.ask(Api.DELETE_TOPICS, 6, timeout=5000, topics=nobody)
    yield "produce to it", produce(raw, name, batch())


@scenario
def create_partitions(raw: Raw, name: str) -> Seen:
    create(raw, name, 2)

    def ask(topic: str, count: int, version: int = 3, validate_only: bool = False) -> Any:
        return raw.ask(
            Api.CREATE_PARTITIONS, version, timeout=5000, validate_only=validate_only,
            topics=[{"name": topic, "count": count, "assignments": None}],
        )  # fmt: skip

    yield "no topic", ask(name + "-none", 3)
    yield "fewer", ask(name, 1)
    yield "the same", ask(name, 2)
    yield "validated", ask(name, 4, validate_only=True)
    for version in range(4):
        yield f"v{version}", ask(name, 3 + version, version)


@scenario
def alter_configs(raw: Raw, name: str) -> Seen:
    create(raw, name)

    def ask(
        *changes: tuple[str, int, str | None], topic: str = name, validate: bool = False
    ) -> Any:
        return raw.ask(
            Api.INCREMENTAL_ALTER_CONFIGS, 1, validate_only=validate,
            resources=[{
                "resource_type": 2, "resource_name": topic,
                "configs": [
                    {"name": n, "config_operation": o, "value": v} for n, o, v in changes
                ],
            }],
        )  # fmt: skip

    def value(setting: str) -> Any:
        reply = raw.ask(
            Api.DESCRIBE_CONFIGS, 4, include_synonyms=False, include_documentation=False,
            resources=[{
                "resource_type": 2, "resource_name": name, "configuration_keys": [setting],
            }],
        )  # fmt: skip
        (entry,) = reply["results"][0]["configs"]
        return {k: entry[k] for k in ("value", "config_source", "read_only", "config_type")}

    def heard(setting: str, wanted: str | None, source: int = 1) -> Any:
        """The setting once it is as wanted: Kafka answers before its brokers have heard."""
        for _ in range(1000):
            seen = value(setting)
            if seen["config_source"] == source and wanted in (None, seen["value"]):
                break
        return seen

    yield "set", ask(("segment.ms", 0, "70000"))
    yield "is", heard("segment.ms", "70000")
    yield "reset", ask(("segment.ms", 1, None))
    yield "source", heard("segment.ms", None, source=5)["config_source"]
    yield "append", ask(("cleanup.policy", 2, "compact"))
    yield "both", heard("cleanup.policy", "delete,compact")
    yield "subtract", ask(("cleanup.policy", 3, "delete"))
    yield "one", heard("cleanup.policy", "compact")
    yield "append to a number", ask(("segment.ms", 2, "1"))
    yield "unknown", ask(("no.such.thing", 0, "1"))
    yield "bad", ask(("segment.ms", 0, "soon"))
    yield "twice", ask(("segment.ms", 0, "1000"), ("segment.ms", 0, "2000"))
    yield "no topic", ask(("segment.ms", 0, "1000"), topic=name + "-none")
    yield "validated", ask(("segment.ms", 0, "5"), validate=True)
    yield "unchanged", value("segment.ms")["config_source"]


@scenario
def describe_configs(raw: Raw, name: str) -> Seen:
    for version in range(1, 5):
        reply = raw.ask(
            Api.DESCRIBE_CONFIGS, version, include_synonyms=False, include_documentation=False,
            resources=[
                {"resource_type": 2, "resource_name": name + "-none", "configuration_keys": None},
                {"resource_type": 4, "resource_name": "999", "configuration_keys": None},
            ],
        )  # fmt: skip
        yield f"v{version}", [result["error_code"] for result in reply["results"]]


@scenario
def describe_cluster(raw: Raw, name: str) -> Seen:
    for version in range(3):
        for kind in (1, 2, 3) if version else (1,):
            reply = raw.ask(
                Api.DESCRIBE_CLUSTER, version, include_cluster_authorized_operations=True,
                endpoint_type=kind, include_fenced_brokers=False,
            )  # fmt: skip
            yield f"v{version} {kind}", reply


@scenario
def what_is_not_spoken(raw: Raw, name: str) -> Seen:
    header = struct.pack(">hhih", 999, 0, 1, -1)
    raw.send_bytes(struct.pack(">i", len(header)) + header)
    yield "unknown api", raw.frame()


@scenario
def a_version_that_is_too_new(raw: Raw, name: str) -> Seen:
    header = struct.pack(">hhih", 3, 99, 1, -1)
    raw.send_bytes(struct.pack(">i", len(header)) + header)
    yield "metadata 99", raw.frame()


@scenario
def api_versions_too_new(raw: Raw, name: str) -> Seen:
    header = struct.pack(">hhih", 18, 99, 1, -1) + b"\x00"
    raw.send_bytes(struct.pack(">i", len(header)) + header)
    frame = raw.frame()
    assert frame is not None
    yield "error", frame[:6]
    yield "keys told", struct.unpack_from(">i", frame, 6)[0]


@scenario
def frames_that_lie(raw: Raw, name: str) -> Seen:
    raw.send_bytes(struct.pack(">i", -5))
    yield "negative length", raw.frame()


@scenario
def a_frame_without_end(raw: Raw, name: str) -> Seen:
    raw.send_bytes(struct.pack(">i", 2**31 - 1) + b"\x00\x03\x00\x00")
    yield "absurd length", raw.frame()


@scenario
def a_body_cut_short(raw: Raw, name: str) -> Seen:
    header = struct.pack(">hhih", 3, 1, 1, -1) + struct.pack(">i", 5)
    raw.send_bytes(struct.pack(">i", len(header)) + header)
    yield "metadata cut", raw.frame()
