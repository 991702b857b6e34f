"""Events for other topics: what `process` emits, as columns.

    flagged = Topic("flagged", Flagged, key="customer")

    class Fraud(Processor):
        source = Topic("payments", Payment, key="customer")
        outputs = (flagged,)

        def process(self, payments, state):
            ...
            return [Alert.rows(payments, where=bad), flagged.emit(payments, where=bad, score=score)]

They are in the log once each, in the order of the events that they came from, together with the
step's rows in Postgres. Each record says where it came from, in the header `ls.from`:

    topic's number in ls_topics i32 · partition i32 · offset i64 · n i16      big-endian

n is the n-th of that event in that topic. A record's time is its event time; without one, the time
of the record that it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ledgerstream.errors import ConfigError
from ledgerstream.events import Column
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.state import BadEvents
from ledgerstream.stream.tables import ordinals, which_events
from ledgerstream.wire.batches import Buffer
from ledgerstream.wire.columns import RowHeader, header_values

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Topic

HEADER = "ls.from"
ORIGIN = np.dtype([("topic", "i4"), ("partition", "i4"), ("offset", "i8"), ("n", "i2")])
_WIRE = ORIGIN.newbyteorder(">")


@dataclass(frozen=True)
class Events:
    """Events for one topic: `rows` [n] of its event type's dtype; `event` int64[n] is the one that
    each came from, as an index into the batch, ascending."""

    topic: Topic
    rows: np.ndarray
    event: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Sends:
    """Events of one partition's steps for one topic, in order: `rows` [n] of its event type's
    dtype, `stamps` int64[n] the records' times in ms, `origin` ORIGIN[n]."""

    rows: np.ndarray
    stamps: np.ndarray
    origin: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bytes(self) -> int:
        return self.rows.nbytes + self.origin.nbytes

    @property
    def header(self) -> RowHeader:
        wire = self.origin.astype(_WIRE)
        return RowHeader(HEADER, wire.view(np.uint8).reshape(len(self), _WIRE.itemsize))


def emitted(
    topic: Topic,
    batch: Batch,
    where: np.ndarray | None,
    of: np.ndarray | None,
    columns: Mapping[str, Any],
) -> Events:
    """What `Topic.emit` gives. Raises ConfigError, and BadEvents for what a column cannot hold."""
    kind = topic.event
    call = f"{topic.name}.emit"
    unknown = columns.keys() - kind.columns().keys()
    if unknown:
        raise ConfigError(
            f"{call}: {kind.__name__} has no column {sorted(unknown)[0]!r}.",
            f"It has {', '.join(kind.columns())}.",
        )
    event = which_events(call, len(batch), where, of)
    given = len(event) if where is None else len(batch)
    rows = np.empty(len(event), kind.dtype())
    for name, column in kind.columns().items():
        if name in columns:
            value = np.asarray(columns[name])
            if value.ndim == 0:
                value = np.full(len(event), value[()])
            elif value.shape != (given,):
                raise ConfigError(f"{call}: {name} has shape {value.shape}, not ({given},).")
            elif where is not None:
                value = value[event]
        elif name in batch.source.event.columns():
            value = batch[name][event]
        elif column.optional:
            value = np.full(len(event), column.store(column.default))
        else:
            raise ConfigError(
                f"{call}: {name} is neither given nor a field of {batch.source.event.__name__}.",
                f"Give it: {call}(batch, {name}=…).",
            )
        rows[name] = _stored(f"{kind.__name__}.{name}", column, value, batch.offset[event])
    return Events(topic, rows, event)


def _stored(where: str, column: Column, value: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """As the column holds it. Raises BadEvents for all values that it cannot hold."""
    if column.kind == "text":
        return _text(where, column, value, offset)
    if column.kind == "float":
        if value.dtype.kind not in "fiu":
            raise ConfigError(f"{where} is a float, but was given {value.dtype}.")
        return value
    if (column.kind == "bool") != (value.dtype.kind == "b") or value.dtype.kind not in "iub":
        raise ConfigError(
            f"{where} is {column.kind}, but was given {value.dtype}.",
            "Round or compare in the processor, where the rule can be read.",
        )
    if column.choices:
        wrong = ~np.isin(value, [column.store(choice) for choice in column.choices])
    elif column.kind == "bool":
        return value
    else:
        limits = np.iinfo(column.dtype)
        wrong = (value < limits.min) | (value > limits.max)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise BadEvents(_distinct(offset[wrong]), f"{int(value[at])} does not fit {where}.")
    return value


def _text(where: str, column: Column, value: np.ndarray, offset: np.ndarray) -> np.ndarray:
    if value.dtype.kind in "UO":
        value = np.array([str(each).encode() for each in value], np.bytes_)
    if value.dtype.kind != "S":
        raise ConfigError(f"{where} is text, but was given {value.dtype}.")
    size = column.dtype.itemsize
    wrong = (np.char.str_len(value) > size) | (np.char.find(value, b"\0") >= 0)
    if wrong.any():
        sentence = f"text for {where} is longer than {size} bytes, or holds a NUL character."
        raise BadEvents(_distinct(offset[wrong]), sentence)
    return value


def _distinct(offsets: np.ndarray) -> list[int]:
    return [int(each) for each in np.unique(offsets)]


def sent(
    parts: Sequence[Events], batch: Batch, topic_number: int, partition: int, muted_below: int
) -> Sends:
    """One topic's events of one batch as they are to be sent, in the order of their events. Those
    of events below `muted_below` are in the log already, and left out."""
    topic = parts[0].topic
    rows = np.concatenate([part.rows for part in parts])
    event = np.concatenate([part.event for part in parts])
    origin = np.empty(len(rows), ORIGIN)
    origin["topic"] = topic_number
    origin["partition"] = partition
    origin["offset"] = batch.offset[event]
    origin["n"] = np.concatenate(ordinals([part.event for part in parts]))
    stamps = batch.timestamp[event]
    if topic.time_column is not None:
        stamps = rows[topic.time_column] // 1_000_000
    order = np.lexsort((origin["n"], event))
    order = order[origin["offset"][order] >= muted_below]
    return Sends(rows[order], np.ascontiguousarray(stamps[order], np.int64), origin[order])


def origins(data: Buffer, start: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64[n] offsets, ORIGIN[n]): whence the records of some batches came, from offset `start`
    on; of those that say so."""
    offsets, values = header_values(data, HEADER, _WIRE.itemsize, start)
    return offsets, values.reshape(-1).view(_WIRE).astype(ORIGIN)


def joined_sends(parts: Sequence[Mapping[Topic, Sends]]) -> dict[Topic, Sends]:
    """Those of steps that follow each other, as one step's."""
    found: dict[Topic, list[Sends]] = {}
    for part in parts:
        for topic, sends in part.items():
            found.setdefault(topic, []).append(sends)
    return {
        topic: some[0]
        if len(some) == 1
        else Sends(
            np.concatenate([each.rows for each in some]),
            np.concatenate([each.stamps for each in some]),
            np.concatenate([each.origin for each in some]),
        )
        for topic, some in found.items()
    }
