"""What stands in output topics, to be compared with what comes out again: for `verify`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ledgerstream.client import LATEST
from ledgerstream.errors import NotReproduced
from ledgerstream.limits import LIMITS
from ledgerstream.stream.compare import plain
from ledgerstream.stream.outputs import ORIGIN, Sends, origins
from ledgerstream.stream.processor import Topic
from ledgerstream.stream.replay import Committed
from ledgerstream.wire.columns import RowCodec

if TYPE_CHECKING:
    from ledgerstream.client import Client

REMEDY = (
    "Look for clocks, chance, attributes of the processor and changed rules; or for who else has "
    "written into the topic."
)


@dataclass
class _Lane:
    """Events in one partition of the topic, in order. `at`: so many are compared."""

    rows: np.ndarray
    origin: np.ndarray
    offset: np.ndarray
    at: int = 0


class Emitted:
    """The events in one topic that came from one partition of the source, at [start, stop) there.

    In memory whole: a row and 26 bytes an event.
    """

    def __init__(self, topic: Topic, source: Committed, lanes: dict[int, _Lane], stop: int) -> None:
        self._topic = topic
        self._source = source
        self._lanes = lanes
        self._stop = stop
        self._codec = RowCodec(topic.event, key=topic.key, encoding=topic.encoding)

    @classmethod
    async def read(
        cls, client: Client, topic: Topic, source: Committed, start: int, stop: int
    ) -> Emitted:
        """What a read_committed reader sees, once what is written now is decided."""
        codec = RowCodec(topic.event, key=topic.key, encoding=topic.encoding)
        ends = await _decided_ends(client, topic.name)
        parts: dict[int, list[_Lane]] = {number: [] for number in ends}
        left = {number for number, end in ends.items() if end > 0}
        async with client.reader(topic.name, dict.fromkeys(left, 0)) as reader:
            while left:
                chunk = await reader.next()
                if chunk is None:
                    continue
                decoded = codec.decode(chunk.data, chunk.start)
                offsets, origin = origins(chunk.data, chunk.start)
                ours = (
                    (origin["topic"] == source.topic_number)
                    & (origin["partition"] == source.partition)
                    & (origin["offset"] >= start)
                    & (origin["offset"] < stop)
                )
                ours &= np.isin(offsets, decoded.offset)
                rows = decoded.rows[np.searchsorted(decoded.offset, offsets[ours])]
                parts[chunk.partition].append(_Lane(rows, origin[ours], offsets[ours]))
                if chunk.next_offset >= ends[chunk.partition]:
                    left.discard(chunk.partition)
                    reader.drop(chunk.partition)
        nothing = _Lane(np.empty(0, codec.dtype), np.empty(0, ORIGIN), np.empty(0, np.int64))
        lanes = {
            number: _Lane(
                np.concatenate([nothing.rows, *(each.rows for each in some)]),
                np.concatenate([nothing.origin, *(each.origin for each in some)]),
                np.concatenate([nothing.offset, *(each.offset for each in some)]),
            )
            for number, some in parts.items()
        }
        return cls(topic, source, lanes, stop)

    def compare(self, sends: Sends | None) -> int:
        """The next events, as recomputed; how many are equal. Raises NotReproduced."""
        if sends is None:
            return 0
        counts = sends.origin["offset"] < self._stop
        chosen = self._codec.hashes(sends.rows) % len(self._lanes)
        for number, lane in self._lanes.items():
            mine = counts & (chosen == number)
            rows, origin = sends.rows[mine], sends.origin[mine]
            stop = lane.at + len(rows)
            self._check(number, lane, rows, origin, lane.rows[lane.at : stop])
            lane.at = stop
        return int(counts.sum())

    def compare_end(self) -> None:
        """There is nothing more. Raises NotReproduced."""
        for number, lane in self._lanes.items():
            if lane.at < len(lane.rows):
                raise self._differs(number, lane, lane.at, "should not be there.")

    def _check(
        self, number: int, lane: _Lane, rows: np.ndarray, origin: np.ndarray, found: np.ndarray
    ) -> None:
        both = len(found)
        there = lane.origin[lane.at : lane.at + both]
        wrong = (rows[:both] != found) | (origin[:both] != there)
        if not wrong.any():
            if both < len(rows):
                raise self._missing(number, origin[both])
            return
        at = int(np.argmax(wrong))
        wanted, seen = _place(origin[at]), _place(there[at])
        if wanted < seen:
            raise self._missing(number, origin[at])
        if wanted > seen:
            raise self._differs(number, lane, lane.at + at, "should not be there.")
        names = rows.dtype.names or ()
        name = next(name for name in names if rows[name][at] != found[name][at])
        raise self._differs(
            number, lane, lane.at + at,
            f"has {name} {plain(found[name][at])!r}, and {plain(rows[name][at])!r} recomputed.",
        )  # fmt: skip

    def _missing(self, number: int, origin: np.ndarray) -> NotReproduced:
        return NotReproduced(
            f"{self._topic.name}-{number}: the event {int(origin['n'])} of {self._source.topic}-"
            f"{self._source.partition}:{int(origin['offset']):,} is missing.",
            REMEDY,
        )

    def _differs(self, number: int, lane: _Lane, at: int, what: str) -> NotReproduced:
        origin = lane.origin[at]
        return NotReproduced(
            f"{self._topic.name}-{number}: the event at offset {int(lane.offset[at]):,}, from "
            f"{self._source.topic}-{self._source.partition}:{int(origin['offset']):,}, {what}",
            REMEDY,
        )


async def _decided_ends(client: Client, topic: str) -> dict[int, int]:
    """Where each partition ended when this was asked, nothing open before it. Markers come a moment
    behind the decision, and a living worker's step may be under way: it is waited for, a while."""
    info = await client.topic(topic)
    latest = dict.fromkeys(range(info.partitions), LATEST)
    wanted = await client.list_offsets(topic, latest, committed=False)
    ends = await client.list_offsets(topic, latest)
    deadline = time.monotonic() + LIMITS.witness_wait_ms / 1_000
    while any(ends[p] < end for p, end in wanted.items()) and time.monotonic() < deadline:
        await asyncio.sleep(LIMITS.retry_first_ms / 1_000)
        ends = await client.list_offsets(topic, latest)
    return {p: min(ends[p], end) for p, end in wanted.items()}


def _place(origin: np.ndarray) -> tuple[int, int]:
    return int(origin["offset"]), int(origin["n"])
