"""Events that are reports on something, and may be corrected or cancelled by later ones.

    class Trade(Event):
        trade_id: int
        at: Timestamp
        …
        kind: ReportKind = ReportKind.NEW
        original: int = 0            # the trade_id of the report that is corrected or cancelled

    bars = Tumbling(…, reports=Reports(id="trade_id", of="original", kind="kind"))

A trade keeps the id of its first report for life: a second correction names that one too. As FIX's
trade capture reports do it (TradeReportTransType 487, TradeReportRefID 572).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ledgerstream.errors import ConfigError

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Topic


class ReportKind(enum.IntEnum):
    """What a report does: it tells of something new, corrects that, or takes it back."""

    NEW = 0
    CORRECT = 1
    CANCEL = 2


@dataclass(frozen=True)
class Reports:
    """Windows keep their events one by one, so that reports can correct and cancel them.

    id:       an integer column: what a NEW report calls its subject, unique for each key as long
              as it is kept.
    of:       an integer column: the id that a CORRECT or CANCEL names.
    kind:     a `ReportKind` column.
    unknown:  what becomes of a report that names nothing that is kept under its key (too late, or
              never seen), and of a NEW one whose id is there already. "count": left out and counted
              (`Changes.unmatched`); "dead": it becomes a dead letter.

    A CORRECT report replaces time and values and keeps the place of the original among events of
    the same time; the event's time is that of the subject as it stands now, not of the report.
    """

    id: str
    of: str
    kind: str
    unknown: Literal["count", "dead"] = "count"

    def check(self, where: str, source: Topic) -> None:
        """Raises ConfigError, which names `where`, for columns that are not there or unfit."""
        for role in ("id", "of"):
            name = getattr(self, role)
            column = source.column(name, role)
            if column.kind != "int" or not np.issubdtype(column.dtype, np.integer):
                raise ConfigError(
                    f"{where}: {role}={name!r} is {column.kind}; reports have integers as ids."
                )
        if source.column(self.kind, "kind").choices != tuple(ReportKind):
            raise ConfigError(
                f"{where}: kind={self.kind!r} is no ReportKind.",
                f"Declare {self.kind}: ReportKind = ReportKind.NEW.",
            )
        if self.unknown not in ("count", "dead"):
            raise ConfigError(f"{where}: unknown is 'count' or 'dead', not {self.unknown!r}.")

    def stored(self) -> list[object]:
        """The declaration as far as stored bytes depend on it."""
        return [self.id, self.of, self.kind, self.unknown]
