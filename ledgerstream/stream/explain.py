"""One result row explained: the event that led to it, the step, the state before it, the rules.

The state is found by replay, from the newest snapshot below the event or from the beginning, so
what is shown is what the rules saw; the event is then processed once more, and its rows must be
those that stand in Postgres.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import numpy as np

from ledgerstream.errors import ConfigError, LedgerStreamError
from ledgerstream.events import Column, parse_timestamp
from ledgerstream.stream.compare import plain
from ledgerstream.stream.machine import Input, Machine
from ledgerstream.stream.processor import Processor, Topic
from ledgerstream.stream.replay import Past
from ledgerstream.stream.state import State
from ledgerstream.stream.tables import ORIGIN, Table, timestamps
from ledgerstream.stream.trial import results

_PLACE = re.compile(r"(?P<topic>.+)[/-](?P<partition>\d+)[/:](?P<offset>\d[\d,]*)")


@dataclass
class Explained:
    """Why a row is there. Money and times are integers, as they are kept.

    row:         as it stands in Postgres; `origin` says from which event.
    event:       its columns; enums by name.
    step:        rule_version, code_version, owner_epoch, committed_at, first and next offset.
    state:       by state name, the rows of the event's key just before it: one, several of
                 windows, or none yet.
    recomputed:  the row when the event is processed again; it is `row`, unless rules or data were
                 changed.
    rules:       the processor's own sentences.
    """

    processor: str
    table: str
    row: dict[str, Any]
    origin: dict[str, Any]
    event: dict[str, Any]
    step: dict[str, Any]
    state: dict[str, list[dict[str, Any]]]
    recomputed: dict[str, Any] | None
    rules: list[str] = field(default_factory=list)


async def find_rows(
    connection: asyncpg.Connection, table: type[Table], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """The newest rows, ten at most, whose first columns have these values; or of the event
    `topic-partition:offset` or `topic/partition/offset`. Raises ConfigError for a value that a
    column cannot have."""
    place = _PLACE.fullmatch(keys[0]) if len(keys) == 1 else None
    if place is not None:
        topic, partition, offset = place["topic"], place["partition"], place["offset"]
        found = await connection.fetch(
            f"""SELECT r.* FROM "{table.relation().name}" r JOIN ls_topics t ON t.id = ls_topic_id
                 WHERE t.name = $1 AND ls_partition = $2 AND ls_offset = $3
                 ORDER BY ls_n LIMIT 10""",
            topic, int(partition), int(offset.replace(",", "")),
        )  # fmt: skip
        return [dict(row) for row in found]
    names = table.result_columns()
    if len(keys) > len(names):
        raise ConfigError(f"{table.__name__} has {len(names)} columns, not {len(keys)}.")
    values = [_value(table, name, text) for name, text in zip(names, keys, strict=False)]
    where = " AND ".join(f'"{name}" = ${at + 1}' for at, name in enumerate(names[: len(keys)]))
    try:
        found = await connection.fetch(
            f"""SELECT * FROM "{table.relation().name}" WHERE {where}
                 ORDER BY ls_offset DESC, ls_n LIMIT 10""",
            *values,
        )
    except asyncpg.DataError as error:  # a number that no column holds
        raise ConfigError(f"{' '.join(keys)!r} is no key of {table.__name__}: {error}.") from error
    return [dict(row) for row in found]


async def by_topic(
    connection: asyncpg.Connection, processor: type[Processor], rows: Sequence[dict[str, Any]]
) -> dict[Topic, list[dict[str, Any]]]:
    """Rows by the topic of the processor that they came from; the first, of those from none."""
    named = {topic.name: topic for topic in processor.sources}
    names = dict(await connection.fetch("SELECT id, name FROM ls_topics"))
    found: dict[Topic, list[dict[str, Any]]] = {}
    for row in rows:
        topic = named.get(names.get(row["ls_topic_id"], ""), processor.source)
        found.setdefault(topic, []).append(row)
    return found


async def explain(past: Past, table: type[Table], row: Mapping[str, Any]) -> Explained:
    """Explain one row of `find_rows`. Raises LedgerStreamError where the log lacks its event."""
    partition, offset = row["ls_partition"], row["ls_offset"]
    at = past.partitions.get(partition)
    if at is None or at.topic_number != row["ls_topic_id"] or offset >= at.next_offset:
        raise _no_event(past, partition, offset)
    machine = await past.machine(partition, below=offset)
    await past.replay(machine, offset)
    event = await _event(past, partition, offset)
    source = past.processor.source
    before = {
        name: key_rows(machine.state, name, plain(event.batch[spec.by][0]))
        for name, spec in past.processor.states.items()
    }
    every = results(past.processor, [machine.step(event)])
    recomputed = _row_of(table, every, row["ls_n"])
    told = Explained(
        past.processor.name,
        str(table.relation().name),
        {name: row[name] for name in table.result_columns()},
        {"topic": source.name} | {name.removeprefix("ls_"): row[name] for name in ORIGIN},
        _shown(source, event),
        await _step(past, partition, offset),
        before,
        recomputed,
    )
    offered = getattr(machine.processor, "explain", None)
    if offered is not None:
        merged: dict[str, Any] = {}
        for other, columns in every.items():
            if len(columns["ls_n"]):
                merged |= {name: plain(columns[name][0]) for name in other.result_columns()}
        told.rules = list(offered(merged | told.row))
    return told


def key_rows(state: State, name: str, key: Any) -> list[dict[str, Any]]:
    """The rows of a key in a declared state, as people see them: several only of windows, by start,
    then width."""
    columns = state.columns()[name]
    keys = next(iter(columns.values()))
    wanted = key.encode() if isinstance(key, str) else key
    at = np.flatnonzero(keys == wanted)
    order = [columns[column][at] for column in ("width", "start") if column in columns]
    at = at[np.lexsort(order)] if order else at
    return [{column: plain(values[each]) for column, values in columns.items()} for each in at]


async def _event(past: Past, partition: int, offset: int) -> Input:
    async for given in past.inputs(partition, offset, offset + 1):
        if len(given.batch):
            return given
    raise _no_event(past, partition, offset)


def _no_event(past: Past, partition: int, offset: int) -> LedgerStreamError:
    return LedgerStreamError(
        f"{past.processor.source.name}-{partition} has no event at offset {offset:,} that led to a "
        "row.",
        "The row was written by hand, or the log is another one: check --log.",
    )


async def _step(past: Past, partition: int, offset: int) -> dict[str, Any]:
    found = await past.connection.fetchrow(
        """SELECT rule_version, code_version, owner_epoch, committed_at, first_offset, next_offset,
                  steps FROM ls_steps
            WHERE processor = $1 AND topic = $2 AND partition = $3
              AND first_offset <= $4 AND next_offset > $4""",
        past.processor.name, past.processor.source.name, partition, offset,
    )  # fmt: skip
    return {} if found is None else dict(found)


def _row_of(
    table: type[Table], every: Mapping[type[Table], Mapping[str, np.ndarray]], n: int
) -> dict[str, Any] | None:
    columns = every.get(table)
    if columns is None:
        return None
    at = np.flatnonzero(columns["ls_n"] == n)
    if len(at) == 0:
        return None
    return {name: plain(columns[name][at[0]]) for name in table.result_columns()}


def _shown(source: Topic, event: Input) -> dict[str, Any]:
    def shown(column: Column) -> Any:
        value = column.load(event.batch.rows[column.name][0])
        return value.name if column.kind == "enum" else value

    return {name: shown(column) for name, column in source.event.columns().items()}


def _value(table: type[Table], name: str, text: str) -> Any:
    kind = table.relation().columns[name].type.python_type
    try:
        if name in timestamps(table) and not text.lstrip("-").isdigit():
            return parse_timestamp(text)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError, LedgerStreamError) as error:
        raise ConfigError(f"{text!r} is no value of {table.__name__}.{name}.") from error


async def state_at(past: Past, partition: int, time_ns: int | None) -> tuple[Machine, int]:
    """The state as committed, or before the first event, in the log's order, whose time is after
    `time_ns`; and the offset that it is the state at."""
    stop = past.partitions[partition].next_offset
    if time_ns is None:
        machine = await past.machine(partition, below=stop)
        await past.replay(machine, stop)
        return machine, stop
    name = past.processor.source.time_column
    if name is None:
        raise ConfigError(f"{past.processor.source.event.__name__} has no event time.")
    machine = await past.machine(partition)
    async for given in past.inputs(partition, machine.position, stop):
        late = np.flatnonzero(given.batch[name] > time_ns)
        if len(late):
            stop = int(given.batch.offset[late[0]])
            batch = given.batch.take(slice(0, int(late[0])))
            given = Input(partition, given.start, stop, batch)
        for _ in machine.step(given, outputs=False).inputs:
            machine.forget()
        if len(late):
            break
    return machine, stop


def tables_of(processor: type[Processor]) -> dict[str, type[Table]]:
    """The result tables that a processor shows, by their name in Postgres."""
    from ledgerstream.stream.warm import run_sample

    return {str(table.relation().name): table for table in run_sample(processor)}
