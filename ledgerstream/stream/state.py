"""State of one partition, as `process` sees it and as the runtime keeps it.

    state.spent.add(batch)          a Sliding window: exact totals, one an event
    state.accounts.at(batch.account)   a Keyed table: rows found or added, columns to write
    state.bars.add(batch)           Tumbling, Hopping or Session: what became final (`windows`)

All follow the frames of `KeyRows`: what a call of `process` changes is undone to the bit by
`rollback`, or settled by `forget`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ledgerstream.errors import ConfigError, LedgerStreamError
from ledgerstream.stream.arena import Arena
from ledgerstream.stream.arenakernels import OVERFLOW, TIME_LIMIT
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.digest import total
from ledgerstream.stream.durations import duration_text
from ledgerstream.stream.keyed import KeyRows, text_words

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Topic

Dump = dict[str, np.ndarray]
EXPIRE_QUANTA = 16  # a key lives for its time and at most a sixteenth of it longer


class BadEvents(LedgerStreamError):
    """Events that cannot be processed, by their offsets; each becomes a dead letter."""

    def __init__(self, offsets: list[int], sentence: str) -> None:
        super().__init__(sentence)
        self.offsets = offsets


@dataclass(frozen=True)
class Key:
    """What state is kept by: an integer, or text of at most so many bytes.

    words: of a key in the rows of `KeyRows`; 0 for an integer, which is word 0 itself.
    """

    name: str
    dtype: np.dtype

    @property
    def words(self) -> int:
        return 0 if self.dtype.kind != "S" else -(-self.dtype.itemsize // 8)

    @property
    def stored(self) -> list[object]:
        """As far as stored bytes depend on it."""
        return [self.name] if self.words == 0 else [self.name, self.dtype.str]

    def of(self, values: np.ndarray) -> np.ndarray:
        """Values [n] as `KeyRows.resolve` takes them. Raises ConfigError for others."""
        values = np.ascontiguousarray(values)
        if self.words == 0:
            if not np.issubdtype(values.dtype, np.integer):
                raise ConfigError(f"{self.name!r}: keys are integers, not {values.dtype}.")
            return values.astype(np.int64, copy=False)
        if values.dtype.kind == "U":
            values = np.char.encode(values, "utf-8")
        if values.dtype.kind != "S":
            raise ConfigError(f"{self.name!r}: keys are text, not {values.dtype}.")
        size = self.dtype.itemsize
        if values.dtype.itemsize > size and (np.char.str_len(values) > size).any():
            raise ConfigError(f"{self.name!r}: keys are text of at most {size} bytes.")
        return text_words(values, size)

    def read(self, rows: np.ndarray, at: int) -> np.ndarray:
        """The keys of rows [n, words] whose text, if it is text, lies at word `at`. A copy."""
        if self.words == 0:
            return rows[:, 0].copy()
        words = np.ascontiguousarray(rows[:, at : at + self.words])
        return words.view(f"S{8 * self.words}")[:, 0].astype(self.dtype)


class Part(Protocol):
    """One declared state of one partition. Frames as in `KeyRows`; what `dump` gives is for `load`
    of a new part, and `columns` is the content for people."""

    def __len__(self) -> int: ...
    def digests(self) -> list[np.ndarray]: ...
    def begin(self, events: int) -> None: ...
    def seal(self) -> None: ...
    def forget(self) -> None: ...
    def rollback(self) -> None: ...
    def dump(self) -> Dump: ...
    def freeze(self) -> Callable[[], Dump]: ...
    def load(self, dump: Dump) -> None: ...
    def columns(self) -> dict[str, np.ndarray]: ...


class Spec(Protocol):
    """A checked declaration. `stored`: as far as stored bytes depend on it, for JSON."""

    @property
    def by(self) -> str: ...
    def open(self, name: str) -> Part: ...
    def stored(self) -> list[object]: ...


class Declaration:
    """Base of what declares state in the body of a processor."""

    def resolve(self, where: str, source: Topic) -> Spec:
        """The checked declaration. Raises ConfigError, which names `where`."""
        raise NotImplementedError


@dataclass(frozen=True)
class KeyedSpec:
    """A checked `Keyed`: the key column and the state columns with their types; with `expire_ns`,
    the time column by which keys expire.

    kinds: what each column means, as `Column.meaning` says it.
    """

    key: Key
    columns: tuple[tuple[str, np.dtype], ...]
    expire_ns: int = 0
    time: str = ""
    kinds: tuple[str, ...] = ()

    @property
    def by(self) -> str:
        return self.key.name

    @property
    def row(self) -> np.dtype:
        """A row, in whole words: word 0, then a text key in whole words, then when it was last
        asked for, if keys expire, then the columns as they align."""
        text = [("key text", np.dtype(f"S{8 * self.key.words}"))] if self.key.words else []
        used = [("key quantum", np.dtype(np.int64))] if self.expire_ns else []
        layout = [("key", np.dtype(np.int64)), *text, *used, *self.columns]
        packed = np.dtype(layout, align=True)
        assert packed.fields is not None
        return np.dtype(
            {
                "names": [field for field, _ in layout],
                "formats": [dtype for _, dtype in layout],
                "offsets": [packed.fields[field][1] for field, _ in layout],
                "itemsize": 8 * -(-packed.itemsize // 8),
            }
        )

    def open(self, name: str) -> KeyedState:
        return KeyedState(name, self)

    def stored(self) -> list[object]:
        """The declaration as far as stored bytes depend on it."""
        columns = [
            [column, dtype.str, kind]
            for (column, dtype), kind in zip(self.columns, self.kinds, strict=True)
        ]
        expire = [self.expire_ns, self.time] if self.expire_ns else []
        return ["keyed", *self.key.stored, columns, *expire]


@dataclass(frozen=True)
class ArenaSpec:
    """A checked `Sliding`: columns by name, lengths in ns."""

    key: Key
    time: str
    value: str | None
    windows_ns: tuple[int, ...]
    delay_ns: int
    late_ns: int
    sums: bool
    counts: bool
    single: bool

    @property
    def by(self) -> str:
        return self.key.name

    def open(self, name: str) -> SlidingState:
        return SlidingState(name, self)

    def stored(self) -> list[object]:
        """The declaration as far as stored bytes depend on it."""
        return [
            "sliding", *self.key.stored, self.time, self.value, list(self.windows_ns),
            self.delay_ns, self.late_ns,
        ]  # fmt: skip


class Held:
    """Rows of a keyed table for one call of `process`.

    row:       int64[n], the row of each key that was asked for.
    <column>:  the table's column, indexed by `row`, writable: `held.balance[held.row]`.

    The views hold until `process` returns, and only rows in `row` may be changed.
    """

    def __init__(self, row: np.ndarray, table: np.ndarray, columns: frozenset[str]) -> None:
        self.row = row
        self._table = table
        self._columns = columns

    def __getattr__(self, name: str) -> np.ndarray:
        if name.startswith("_") or name not in self._columns:
            known = ", ".join(sorted(self._columns))
            raise AttributeError(f"no state column {name!r}; there are {known}")
        column: np.ndarray = self._table[name]
        return column


_KEYED_PARTS = ("rows", "clock")  # the second only where keys expire


class KeyedState:
    """A `Keyed` table of one partition.

    Where keys expire, time is counted in quanta of a sixteenth of that, by the partition's greatest
    event time. A row carries the quantum in which it was last asked for, and goes when the time
    enters the seventeenth after it: `cuts` says at which events that may be, `advance` does it.
    """

    def __init__(self, name: str, spec: KeyedSpec) -> None:
        self._key = spec.key
        self._spec = spec
        self._dtype = spec.row
        words = spec.row.itemsize // 8
        self._columns = frozenset(field for field, _ in spec.columns)
        self._rows = KeyRows(name, words, words, key_at=1, key_words=spec.key.words)
        self._quantum_ns = -(-spec.expire_ns // EXPIRE_QUANTA)
        # One row, where keys expire: 0 · whether there was an event · the quantum.
        self._clock = KeyRows(f"{name} clock", 3, 3) if spec.expire_ns else None

    def __len__(self) -> int:
        """Keys that have a row."""
        return self._rows.live

    def at(self, keys: np.ndarray) -> Held:
        """Find or add the rows of keys [n], integers or text as declared; a new row is zero."""
        row = self._rows.resolve(self._key.of(keys))
        if self._clock is not None:
            table = self._rows.rows.view(self._dtype)[:, 0]
            table["key quantum"][row] = self._clock.rows[0, 2]
        return Held(row, self._rows.rows.view(self._dtype)[:, 0], self._columns)

    @property
    def expires(self) -> bool:
        return self._clock is not None

    def cuts(self, batch: Batch) -> np.ndarray:
        """The events before which `advance` must be called, besides the first."""
        quantum = np.maximum.accumulate(batch[self._spec.time]) // self._quantum_ns
        if self._clock is not None and self._clock.live:
            quantum = np.maximum(quantum, self._clock.rows[0, 2])
        return np.flatnonzero(np.diff(quantum)) + 1

    def advance(self, batch: Batch) -> None:
        """Time is that of these events, which lie between two cuts: drop what has expired.

        Raises BadEvents for a time that is beyond the year 2116.
        """
        assert self._clock is not None
        times = batch[self._spec.time]
        if (far := np.abs(times) >= TIME_LIMIT).any():
            at = int(np.argmax(far))
            raise BadEvents([int(batch.offset[at])], f"{self._spec.time!r} is out of range.")
        clock = self._clock.rows[self._clock.resolve(np.zeros(1, np.int64))[0]]
        quantum = int(times.max()) // self._quantum_ns
        if clock[1] and quantum <= clock[2]:
            return
        clock[1], clock[2] = 1, quantum
        live = self._rows.live_rows()
        used = self._rows.rows.view(self._dtype)[:, 0]["key quantum"][live]
        self._rows.remove(live[used < quantum - EXPIRE_QUANTA])

    def find(self, keys: np.ndarray) -> Held:
        """The rows of keys [n], to be read only: -1 where a key has none, and none is added."""
        row = self._rows.find(self._key.of(keys))
        return Held(row, self._rows.rows.view(self._dtype)[:, 0], self._columns)

    def columns(self) -> dict[str, np.ndarray]:
        """The content for people: the key and each column, a row a key. Copies."""
        rows = self._rows.dump()
        table = rows.view(self._dtype)[:, 0]
        return {
            self._key.name: self._key.read(rows, at=1),
            **{name: table[name] for name in self._dtype.names or () if name in self._columns},
        }

    def digests(self) -> list[np.ndarray]:
        return [table.digest for table in self._tables]

    def begin(self, events: int) -> None:
        for table in self._tables:
            table.begin(events)

    def seal(self) -> None:
        for table in self._tables:
            table.seal()

    def forget(self) -> None:
        for table in self._tables:
            table.forget()

    def rollback(self) -> None:
        for table in self._tables:
            table.rollback()

    def dump(self) -> Dump:
        return {name: table.dump() for name, table in zip(_KEYED_PARTS, self._tables, strict=False)}

    def freeze(self) -> Callable[[], Dump]:
        parts = {
            name: table.freeze() for name, table in zip(_KEYED_PARTS, self._tables, strict=False)
        }
        return lambda: {name: part() for name, part in parts.items()}

    def load(self, dump: Dump) -> None:
        self._rows.load(dump["rows"])
        if self._clock is not None:
            self._clock.load(dump["clock"])

    @property
    def _tables(self) -> list[KeyRows]:
        return [self._rows] if self._clock is None else [self._rows, self._clock]


class Windows:
    """Several totals an event: `sum` and `count`, int64[n, windows] in the declared order."""

    def __init__(self, sums: np.ndarray | None, counts: np.ndarray | None) -> None:
        self._sums = sums
        self._counts = counts

    @property
    def sum(self) -> np.ndarray:
        if self._sums is None:
            raise ConfigError("this Sliding was declared without sum=….")
        return self._sums

    @property
    def count(self) -> np.ndarray:
        if self._counts is None:
            raise ConfigError("this Sliding was declared without count=True.")
        return self._counts


_ARENA_PARTS = ("rows", "lives", "pairs")


class SlidingState:
    """A `Sliding` window, or several, of one partition."""

    def __init__(self, name: str, spec: ArenaSpec) -> None:
        self._spec = spec
        windows = np.array(spec.windows_ns, np.int64)
        self._arena = Arena(name, windows, spec.delay_ns, spec.late_ns, spec.key.words)

    def __len__(self) -> int:
        """Events that are kept."""
        return self._arena.live

    def add(self, batch: Batch) -> Any:
        """Apply the events of a batch in order.

        One window with a sum or a count: int64[n], the total that each event sees. Otherwise
        `Windows` with `sum` and `count`, int64[n, windows]. Raises BadEvents for the event whose
        total does not fit 64 bits or whose time is beyond the year 2116.
        """
        spec = self._spec
        keys = spec.key.of(batch[spec.by])
        values = np.zeros(len(keys), np.int64)
        if spec.value is not None:
            values = batch[spec.value].astype(np.int64)
        sums, counts, status, at = self._arena.add(keys, batch[spec.time], values)
        if status == OVERFLOW:
            raise BadEvents(
                [int(batch.offset[at])], f"a sum of {spec.value!r} no longer fits 64 bits."
            )
        if status:
            raise BadEvents([int(batch.offset[at])], f"{spec.time!r} is out of range for a window.")
        if not spec.single or (spec.sums and spec.counts):
            return Windows(sums if spec.sums else None, counts if spec.counts else None)
        return np.ascontiguousarray((sums if spec.sums else counts)[:, 0])

    def columns(self) -> dict[str, np.ndarray]:
        """The content for people: a row a key, its newest time, and what its newest event saw as
        `sum_1d`, `count_1d` and so on. Copies."""
        rows = self._arena.dump()[0]
        key, width = self._spec.key, len(self._spec.windows_ns)
        keys = rows[:, 0]
        if key.words:
            at = self._arena.keys.key_at
            keys = np.ascontiguousarray(rows[:, at : at + key.words]).view(f"S{8 * key.words}")
            keys = keys[:, 0].astype(key.dtype)
        found = {key.name: keys, "newest": rows[:, 1]}
        for at, window in enumerate(self._spec.windows_ns):
            if self._spec.sums:
                found[f"sum_{duration_text(window)}"] = rows[:, 2 + at]
            if self._spec.counts:
                found[f"count_{duration_text(window)}"] = rows[:, 2 + width + at]
        return found

    def digests(self) -> list[np.ndarray]:
        return self._arena.digests

    def begin(self, events: int) -> None:
        self._arena.begin(events)

    def seal(self) -> None:
        self._arena.seal()

    def forget(self) -> None:
        self._arena.forget()

    def rollback(self) -> None:
        self._arena.rollback()

    def dump(self) -> Dump:
        return dict(zip(_ARENA_PARTS, self._arena.dump(), strict=True))

    def freeze(self) -> Callable[[], Dump]:
        parts = self._arena.freeze()
        return lambda: dict(zip(_ARENA_PARTS, parts(), strict=True))

    def load(self, dump: Dump) -> None:
        self._arena.load(dump["rows"], dump["lives"], dump["pairs"])


class State:
    """All state of one partition; each declared name is an attribute."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self._parts: dict[str, Part] = {name: spec.open(name) for name, spec in specs.items()}
        self._expiring = [
            part for part in self._parts.values() if isinstance(part, KeyedState) and part.expires
        ]
        self.frames = 0  # calls of `process` that are not settled

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__.get("_parts", {})
        if name not in parts:
            raise AttributeError(f"no state {name!r} is declared; there are {', '.join(parts)}")
        return parts[name]

    def begin(self, events: int) -> None:
        """Open a frame: one call of `process` over so many events."""
        for part in self._parts.values():
            part.begin(events)
        self.frames += 1

    def segments(self, batch: Batch) -> Iterator[Batch]:
        """The batch in the pieces that `process` must be called with, one after the other: before
        each, keys that have expired by then are dropped. Raises BadEvents."""
        cuts = [part.cuts(batch) for part in self._expiring]
        bounds = np.unique(np.concatenate([[0, len(batch)], *cuts])).astype(np.int64)
        for start, stop in pairwise(bounds.tolist()):
            segment = batch if len(bounds) == 2 else batch.take(slice(start, stop))
            for part in self._expiring:
                part.advance(segment)
            yield segment

    def seal(self) -> None:
        """Close the newest frame; the digest covers it now."""
        for part in self._parts.values():
            part.seal()

    def forget(self) -> None:
        """The oldest frame is committed."""
        for part in self._parts.values():
            part.forget()
        self.frames -= 1

    def rollback(self) -> None:
        """Undo the newest frame, to the bit."""
        for part in self._parts.values():
            part.rollback()
        self.frames -= 1

    def digest(self) -> bytes:
        """16 bytes over all live content, as of the last `seal`."""
        return total([each for part in self._parts.values() for each in part.digests()])

    def watermark(self) -> int | None:
        """The least of the event-time windows, ns: what ends before it is final. None without
        windows, or before their first event."""
        marks = [getattr(part, "watermark", None) for part in self._parts.values()]
        return min((mark for mark in marks if mark is not None), default=None)

    def columns(self) -> dict[str, dict[str, np.ndarray]]:
        """All content by state name, for people: columns of rows, one a key. Copies."""
        return {name: part.columns() for name, part in self._parts.items()}

    def dump(self) -> dict[str, Dump]:
        """Copies of all content, by state name, for a snapshot."""
        return {name: part.dump() for name, part in self._parts.items()}

    def freeze(self) -> Callable[[], dict[str, Dump]]:
        """What makes the `dump` of this moment, later and in any thread; only copying is done now,
        so the stream goes on soon."""
        parts = {name: part.freeze() for name, part in self._parts.items()}
        return lambda: {name: part() for name, part in parts.items()}

    def load(self, dumps: Mapping[str, Dump]) -> None:
        """Take over what `dump` gave; this state must be new."""
        for name, dump in dumps.items():
            self._parts[name].load(dump)
