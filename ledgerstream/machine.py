"""The one shape of every core: decide purely, write durably, then tell.

A machine's `decide_…` looks at its state and answers with records to append and a reply; `replay`
is the only method that changes state, live and after a restart alike. The host appends the records,
replays them at once, and lets the reply go when they are durable (`broker/host.py`). `become` is
for the case that they never are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

Record = TypeVar("Record")
Reply = TypeVar("Reply")
Replayed = TypeVar("Replayed", contravariant=True)


@dataclass(frozen=True, slots=True)
class Decision(Generic[Record, Reply]):
    """Records to append, in order, and the reply once they are durable."""

    records: tuple[Record, ...]
    reply: Reply


class Machine(Protocol[Replayed]):
    """What a host performs: state that changes by `replay` alone."""

    def replay(self, record: Replayed) -> None: ...

    def become(self, other: Any) -> None:
        """Take the state of another machine of this kind."""
