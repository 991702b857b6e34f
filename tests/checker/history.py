"""What clients did and saw, as each of them wrote it down.

A process writes one JSON line a step, with the machine's monotonic time, before and after whatever
can fail; so a process that is killed leaves what is known of it. `read` makes operations of that.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

NEVER = 2**63 - 1
Partition = str  # "topic-2"
Found = Mapping[Partition, list[tuple[int, str]]]  # (offset, value)


class Outcome(StrEnum):
    """Of an operation: it happened, it did not, or nobody was told."""

    OK = "ok"
    FAIL = "fail"
    INFO = "info"


class Send(NamedTuple):
    """Values are unique in a history. `offset`: as acknowledged; -1 if it was not."""

    partition: Partition
    value: str
    offset: int = -1


class Poll(NamedTuple):
    """What one poll returned, at time `at`."""

    records: Found
    at: int = 0


class Assign(NamedTuple):
    """From here on these partitions are read, from these offsets on (None: not known).

    `group`: whose committed offsets they are, as asked for at time `at`.
    """

    positions: Mapping[Partition, int | None]
    group: str | None = None
    at: int = 0


class CommitOffsets(NamedTuple):
    """The next offsets that a group is to read, committed with the operation."""

    group: str
    offsets: Mapping[Partition, int]


Act = Send | Poll | Assign | CommitOffsets


@dataclass(slots=True, eq=False)
class Operation:
    """A transaction, or acts that each stand for themselves. `asked`: when its commit was."""

    process: str
    acts: list[Act]
    outcome: Outcome = Outcome.OK
    transactional: bool = True
    began: int = 0
    ended: int = NEVER
    asked: int = NEVER

    def sends(self) -> Iterable[Send]:
        return (act for act in self.acts if isinstance(act, Send))


class Recorder:
    """Of one process. Each line is with the system before the next thing is done."""

    def __init__(self, path: Path, process: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.process = process
        self.asked = False  # whether the commit of what is open was

    def _write(self, step: str, *said: Any) -> None:
        line = json.dumps([time.monotonic_ns(), self.process, step, *said])
        os.write(self._file, line.encode() + b"\n")

    def begin(self, *, transactional: bool = True) -> None:
        self.asked = False
        self._write("begin", transactional)

    def send(self, partition: Partition, value: str) -> None:
        """It is about to be sent."""
        self._write("send", partition, value)

    def acknowledged(self, value: str, offset: int) -> None:
        self._write("acknowledged", value, offset)

    def poll(self, records: Found) -> None:
        self._write("poll", records)

    def assign(
        self, positions: Mapping[Partition, int | None], group: str | None = None, at: int = 0
    ) -> None:
        self._write("assign", positions, group, at)

    def commit_offsets(self, group: str, offsets: Mapping[Partition, int]) -> None:
        """They are about to be made part of the transaction."""
        self._write("offsets", group, offsets)

    def ask(self, *, committed: bool) -> None:
        """The end of the transaction is about to be asked for."""
        self.asked = committed
        self._write("ask", committed)

    def end(self, outcome: Outcome) -> None:
        self._write("end", outcome)

    def note(self, what: str) -> None:
        """For whoever reads the file."""
        self._write("note", what)


def read(paths: Iterable[Path]) -> list[Operation]:
    """The operations of all files, by their beginning."""
    found = [operation for path in paths for operation in parse(path.read_text())]
    return sorted(found, key=lambda operation: operation.began)


def parse(text: str) -> list[Operation]:
    """Of one process. One that was killed has not asked for what it did not write down."""
    done: list[Operation] = []
    offsets: dict[str, int] = {}
    now: Operation | None = None
    for line in text.splitlines():
        at, process, step, *said = json.loads(line)
        if step == "acknowledged":
            offsets[said[0]] = said[1]
        elif step == "begin":
            assert now is None, line
            now = Operation(process, [], Outcome.INFO, transactional=said[0], began=at)
            done.append(now)
        elif step != "note":
            assert now is not None, line
            if step == "end":
                now.outcome, now.ended, now = Outcome(said[0]), at, None
            elif step == "ask":
                now.asked = at if said[0] else NEVER
            else:
                now.acts.append(_act(step, said, at))
    if now is not None and now.transactional and now.asked == NEVER:
        now.outcome = Outcome.FAIL
    for operation in done:
        operation.acts = [
            act._replace(offset=offsets.get(act.value, -1)) if isinstance(act, Send) else act
            for act in operation.acts
        ]
    return done


def _act(step: str, said: list[Any], at: int) -> Act:
    if step == "poll":
        return Poll({p: [(o, v) for o, v in found] for p, found in said[0].items()}, at)
    return {"send": Send, "assign": Assign, "offsets": CommitOffsets}[step](*said)
