"""What can go wrong with Postgres, in the classes of exactly-once part 3.

*Data*: the rows themselves; bisect, and dead-letter the record at fault. *Transient*: not now; wait
and try again, and if the connection is gone, claim again first. Anything else is not known to be
harmless: the partition stops.
"""

from __future__ import annotations

import asyncio

import asyncpg

from ledgerstream.errors import ConfigError, LedgerStreamError, Overtaken


class DataError(LedgerStreamError):
    """Postgres refuses the rows themselves: bisect, and dead-letter the one at fault."""


class TransientError(LedgerStreamError):
    """Not now. `lost`: the connection is gone, so claim again before anything else."""

    def __init__(self, sentence: str, *, lost: bool) -> None:
        super().__init__(sentence)
        self.lost = lost


class Reload(LedgerStreamError):
    """What is in memory may not be what Postgres has: forget it, claim and restore."""


_TRANSIENT_CLASSES = ("08", "40", "53", "57")
_TRANSIENT_STATES = frozenset(
    {
        "25006",  # read-only: a standby, or a primary that is going down
        "25P02",  # in a failed transaction: what failed it came before
        "25P03",  # idle in transaction for too long
        "25P04",  # transaction timeout
        "55P03",  # lock not available in time
        "55006",  # object in use
        "58030",  # I/O error
    }
)


def classified(error: BaseException) -> BaseException:
    """Data, transient, or what it was: classes of exactly-once part 3."""
    if isinstance(error, (LedgerStreamError, asyncio.CancelledError)):
        return error
    if isinstance(error, asyncpg.PostgresError):
        state = str(error.sqlstate or "")
        if state[:2] in ("28", "3D"):
            return ConfigError(f"Postgres lets us not in: {error}", "Check the database's URL.")
        if state[:2] in ("22", "23"):
            return DataError(f"{error} ({state})")
        if state[:2] in _TRANSIENT_CLASSES or state in _TRANSIENT_STATES:
            lost = state[:2] == "08" or state[:3] == "57P" or state in ("25P03", "25P04")
            return TransientError(f"{error} ({state})", lost=lost)
        unknown: BaseException = error
        return unknown
    if isinstance(error, (OSError, TimeoutError, asyncpg.InterfaceError, EOFError)):
        return TransientError(
            f"the connection to Postgres broke: {error or type(error).__name__}", lost=True
        )
    return error


def overtaken(processor: str, topic: str, partitions: set[int]) -> Overtaken:
    """The error that names the partitions another worker now has."""
    names = ", ".join(f"{topic}-{each}" for each in sorted(partitions))
    error = Overtaken(
        f"another worker of {processor} has taken over {names}; nothing of this step was committed."
    )
    error.partitions = frozenset(partitions)
    return error
