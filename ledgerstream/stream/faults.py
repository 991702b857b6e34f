"""What can go wrong with Postgres, in the classes of exactly-once part 3.

*Data*: the rows themselves; bisect, and dead-letter the record at fault. *Transient*: not now; wait
and try again, and if the connection is gone, claim again first. Anything else is not known to be
harmless: the partition stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg

from ledgerstream.errors import ConfigError, LedgerStreamError, Overtaken


class DataError(LedgerStreamError):
    """Postgres refuses the rows themselves: bisect, and dead-letter the one at fault."""


class TransientError(LedgerStreamError):
    """Not now. `lost`: the connection is gone, so claim again before anything else."""

    def __init__(self, sentence: str, *, lost: bool, remedy: str = "") -> None:
        super().__init__(sentence, remedy)
        self.lost = lost


class Reload(LedgerStreamError):
    """What is in memory may not be what Postgres has: forget it, claim and restore."""


# What we copy does not fit the table at all: no row of it is at fault.
_OTHER_TABLE = frozenset(
    {
        "22P03",  # a column has another type
        "22P04",
        "428C9",  # a column is generated
        "42703",  # a column is gone
        "42P01",  # the table is gone
    }
)
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
            return ConfigError(
                f"Postgres does not let us in: {error}.", "Check the database's URL."
            )
        if state == "42501":
            return ConfigError(
                f"Postgres refuses: {error}.",
                "This role must be able to create tables in its schema, and to read and write "
                "those of the processor: GRANT that, or give the URL of another role.",
            )
        if state[:2] in ("22", "23") and state not in _OTHER_TABLE:
            return DataError(f"{error} ({state})")
        if state[:2] in _TRANSIENT_CLASSES or state in _TRANSIENT_STATES:
            lost = state[:2] == "08" or state[:3] == "57P" or state in ("25P03", "25P04")
            return TransientError(f"{error} ({state})", lost=lost)
        unknown: BaseException = error
        return unknown
    if isinstance(error, ValueError):  # of asyncpg: an argument that has no form on the wire
        return error
    if isinstance(error, _BROKEN):
        return TransientError(
            f"the connection to Postgres broke: {error or type(error).__name__}", lost=True
        )
    return error


def of_table(
    name: str, columns: Sequence[str], error: asyncpg.PostgresError
) -> LedgerStreamError | None:
    """What COPY says of the table as a whole; None where it is something else, as of a row."""
    state = str(error.sqlstate or "")
    if state == "55P03":
        return TransientError(f"another session keeps table {name!r} locked ({state}).", lost=False)
    lacking = state == "23502" and error.column_name not in columns
    if lacking or state in _OTHER_TABLE:
        return ConfigError(
            f"Table {name!r} in Postgres is no longer as it is declared: {error}.",
            "Put it right, as by ALTER TABLE, and start again.",
        )
    return None


_BROKEN = (OSError, TimeoutError, EOFError, asyncpg.InterfaceError, asyncpg.InternalClientError)


def overtaken(processor: str, topic: str, partitions: set[int]) -> Overtaken:
    """The error that names the partitions another worker now has."""
    names = ", ".join(f"{topic}-{each}" for each in sorted(partitions))
    error = Overtaken(
        f"another worker of {processor} has taken over {names}: what was not committed yet of that "
        "is dropped here."
    )
    error.partitions = frozenset(partitions)
    return error
