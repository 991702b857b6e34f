"""Logs that begin later: DeleteRecords, and what readers are told afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ledgerstream.wire.versions import Api
from tests.differential.raw import Raw
from tests.differential.scenarios import (
    TIME,
    Seen,
    batch,
    create,
    fetch,
    offsets,
    produce,
    producer_id,
    scenario,
)
from tests.differential.transactions import Producer


def delete_records(raw: Raw, before: Mapping[tuple[str, int], int], version: int = 2) -> Any:
    """Everything below the offsets, by (topic, partition); -1: below the high watermark."""
    topics: dict[str, list[dict[str, int]]] = {}
    for (name, index), offset in before.items():
        topics.setdefault(name, []).append({"partition_index": index, "offset": offset})
    return raw.ask(
        Api.DELETE_RECORDS, version, timeout=10_000,
        topics=[{"name": name, "partitions": parts} for name, parts in topics.items()],
    )  # fmt: skip


@scenario
def delete_records_in_every_version(raw: Raw, name: str) -> Seen:
    """Item 21."""
    create(raw, name)
    produce(raw, name, batch(10))
    for version in range(3):
        yield f"v{version}", delete_records(raw, {(name, 0): 2 + version}, version)


@scenario
def delete_records_at_the_edges(raw: Raw, name: str) -> Seen:
    """Item 21."""
    create(raw, name, 2)
    produce(raw, name, batch(5))
    produce(raw, name, batch(5))
    for what, offset in {
        "nothing": 0, "inside a batch": 3, "less than before": 1, "below zero": -2,
        "beyond the end": 11, "the end": 10, "the end again": -1,
    }.items():  # fmt: skip
        yield what, delete_records(raw, {(name, 0): offset})
        yield f"{what}: earliest", offsets(raw, name, -2)
    yield "an empty partition", delete_records(raw, {(name, 1): -1})
    yield "no such partition", delete_records(raw, {(name, 7): 0})
    yield "no such topic", delete_records(raw, {(f"{name}-none", 0): 0})
    several = delete_records(raw, {(name, 0): 99, (name, 1): 0})
    parts = several["topics"][0]["partitions"]
    yield "one of two", sorted(parts, key=lambda part: part["partition_index"])
    yield "none", delete_records(raw, {})


@scenario
def what_is_deleted_is_out_of_range(raw: Raw, name: str) -> Seen:
    create(raw, name)
    for at in range(3):
        produce(raw, name, batch(4, at=TIME + 10 * at))
    delete_records(raw, {(name, 0): 6})
    for offset in (0, 3, 5, 6, 8, 12, 13):
        yield f"fetch {offset}", fetch(raw, name, offset)
    yield "earliest", offsets(raw, name, -2)
    yield "latest", offsets(raw, name, -1)
    yield "the newest", offsets(raw, name, -3)
    for time in (0, TIME, TIME + 10, TIME + 12, TIME + 20, TIME + 99):
        yield f"at {time - TIME}", offsets(raw, name, time)
    produce(raw, name, batch(1))
    delete_records(raw, {(name, 0): -1})
    yield "all gone: the newest", offsets(raw, name, -3)
    yield "all gone: at 0", offsets(raw, name, 0)
    yield "all gone: fetch", fetch(raw, name, 13)


@scenario
def deleted_records_leave_their_producer(raw: Raw, name: str) -> Seen:
    """Item 21; bug 15."""
    create(raw, name)
    pid, epoch = producer_id(raw)
    for sequence in (0, 2):
        produce(raw, name, batch(2, producer_id=pid, producer_epoch=epoch, base_sequence=sequence))
    delete_records(raw, {(name, 0): -1})
    for what, sequence in {"a repeat": 2, "a gap": 5, "the next": 4}.items():
        data = batch(2, producer_id=pid, producer_epoch=epoch, base_sequence=sequence)
        yield what, produce(raw, name, data)


@scenario
def a_deleted_part_of_an_open_transaction(raw: Raw, name: str) -> Seen:
    """Items 73, 110: the last stable offset is never below the log's start."""
    create(raw, name)
    one = Producer(raw, f"{name}-id")
    one.init()
    one.add((name, 0))
    one.send(name, count=4)
    produce(raw, name, batch(4))
    for offset in (2, 6, -1):
        yield f"below {offset}", delete_records(raw, {(name, 0): offset})
        for isolation in (0, 1):
            yield f"below {offset}: {isolation}", offsets(raw, name, -1, isolation=isolation)
    one.end(True)


@scenario
def delete_records_of_what_may_not_be_deleted(raw: Raw, name: str) -> Seen:
    create(raw, name, cleanup_policy="compact")
    produce(raw, name, batch(3))
    yield "compacted", delete_records(raw, {(name, 0): 1})
    create(raw, f"{name}-both", cleanup_policy="compact,delete")
    produce(raw, f"{name}-both", batch(3))
    yield "both", delete_records(raw, {(f"{name}-both", 0): 1})
    Producer(raw, f"{name}-id").init()
    yield "internal", delete_records(raw, {("__transaction_state", 0): -1})
