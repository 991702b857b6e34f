"""State of one partition, as `process` sees it and as the runtime keeps it.

    state.spent.add(batch)          a Sliding window: exact totals, one an event
    state.accounts.at(batch.account)   a Keyed table: rows found or added, columns to write

Both follow the frames of `KeyRows`: what a call of `process` changes is undone to the bit by
`rollback`, or settled by `forget`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ledgerstream.errors import ConfigError, LedgerStreamError
from ledgerstream.stream.arena import OVERFLOW, Arena
from ledgerstream.stream.batch import Batch
from ledgerstream.stream.digest import total
from ledgerstream.stream.keyed import KeyRows

Dump = dict[str, np.ndarray]


class BadEvents(LedgerStreamError):
    """Events that cannot be processed, by their offsets; each becomes a dead letter."""

    def __init__(self, offsets: list[int], sentence: str) -> None:
        super().__init__(sentence)
        self.offsets = offsets


@dataclass(frozen=True)
class KeyedSpec:
    """A checked `Keyed`: the key column and the state columns with their types."""

    by: str
    columns: tuple[tuple[str, np.dtype], ...]

    def open(self, name: str) -> KeyedState:
        return KeyedState(name, self)


@dataclass(frozen=True)
class ArenaSpec:
    """A checked `Sliding`: columns by name, lengths in ns."""

    by: str
    time: str
    value: str | None
    windows_ns: tuple[int, ...]
    delay_ns: int
    late_ns: int
    sums: bool
    counts: bool
    single: bool

    def open(self, name: str) -> SlidingState:
        return SlidingState(name, self)


class Held:
    """Rows of a keyed table for one call of `process`.

    row:       int64[n], the row of each key that was asked for.
    <column>:  the table's column, indexed by `row`, writable: `held.balance[held.row]`.

    The views hold until `process` returns, and only rows in `row` may be changed.
    """

    def __init__(self, row: np.ndarray, table: np.ndarray) -> None:
        self.row = row
        self._table = table

    def __getattr__(self, name: str) -> np.ndarray:
        names = self._table.dtype.names or ()
        if name.startswith("_") or name not in names:
            raise AttributeError(f"no state column {name!r}; there are {', '.join(names[1:])}")
        column: np.ndarray = self._table[name]
        return column


class KeyedState:
    """A `Keyed` table of one partition."""

    def __init__(self, name: str, spec: KeyedSpec) -> None:
        self._spec = spec
        layout = [("key", np.dtype(np.int64)), *spec.columns]
        packed = np.dtype(layout, align=True)
        words = -(-packed.itemsize // 8)
        assert packed.fields is not None
        self._dtype = np.dtype(
            {
                "names": [field for field, _ in layout],
                "formats": [dtype for _, dtype in layout],
                "offsets": [packed.fields[field][1] for field, _ in layout],
                "itemsize": 8 * words,
            }
        )
        self._rows = KeyRows(name, words, content=words)

    def __len__(self) -> int:
        """Keys that have a row."""
        return self._rows.count

    def at(self, keys: np.ndarray) -> Held:
        """Find or add the rows of integer keys [n]; a new row is zero."""
        keys = np.ascontiguousarray(keys)
        if not np.issubdtype(keys.dtype, np.integer):
            raise ConfigError(f"at(): keys are integers, not {keys.dtype}.")
        row = self._rows.resolve(keys.astype(np.int64))
        return Held(row, self._rows.rows.view(self._dtype)[:, 0])

    def digests(self) -> list[np.ndarray]:
        return [self._rows.digest]

    def begin(self, events: int) -> None:
        self._rows.begin(events)

    def seal(self) -> None:
        self._rows.seal()

    def forget(self) -> None:
        self._rows.forget()

    def rollback(self) -> None:
        self._rows.rollback()

    def dump(self) -> Dump:
        return {"rows": self._rows.rows[: self._rows.count].copy()}

    def load(self, dump: Dump) -> None:
        self._rows.load(dump["rows"])


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


class SlidingState:
    """A `Sliding` window, or several, of one partition."""

    def __init__(self, name: str, spec: ArenaSpec) -> None:
        self._spec = spec
        windows = np.array(spec.windows_ns, np.int64)
        self._arena = Arena(name, windows, spec.delay_ns, spec.late_ns)

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
        keys = batch[spec.by].astype(np.int64)
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
        rows, lives, pairs = self._arena.dump()
        return {"rows": rows, "lives": lives, "pairs": pairs}

    def load(self, dump: Dump) -> None:
        self._arena.load(dump["rows"], dump["lives"], dump["pairs"])


class State:
    """All state of one partition; each declared name is an attribute."""

    def __init__(self, specs: Mapping[str, KeyedSpec | ArenaSpec]) -> None:
        self._parts = {name: spec.open(name) for name, spec in specs.items()}
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

    def dump(self) -> dict[str, Dump]:
        """Copies of all content, by state name, for a snapshot."""
        return {name: part.dump() for name, part in self._parts.items()}

    def load(self, dumps: Mapping[str, Dump]) -> None:
        """Take over what `dump` gave; this state must be new."""
        for name, dump in dumps.items():
            self._parts[name].load(dump)
