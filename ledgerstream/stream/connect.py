"""The one way to Postgres: a connection whose time limits the server itself keeps.

A worker that is stopped, cut off or gone must not hold its locks for ever, whatever became of its
own timers: the server ends its statement, its wait for a lock, and its idle transaction.
"""

from __future__ import annotations

import socket
from urllib.parse import parse_qs, urlsplit

import asyncpg

from ledgerstream.errors import ConfigError
from ledgerstream.limits import LIMITS
from ledgerstream.stream.faults import TransientError, classified


async def connect(url: str, name: str, *, patient: bool = False) -> asyncpg.Connection:
    """Connect as `ledgerstream {name}`.

    patient: without the limits on statements and transactions, for what only reads, or waits for a
             person.

    Raises ConfigError for a URL that cannot be right, TransientError while nobody answers.
    """
    settings = {
        "application_name": f"ledgerstream {name}"[:63],
        "tcp_keepalives_idle": "10",
        "tcp_keepalives_interval": "5",
        "tcp_keepalives_count": "3",
    }
    if not patient:
        settings |= {
            "statement_timeout": str(LIMITS.postgres_command_ms_max),
            "idle_in_transaction_session_timeout": str(LIMITS.postgres_idle_ms_max),
            "lock_timeout": str(LIMITS.postgres_lock_ms_max),
        }
    wait_ms = LIMITS.postgres_wait_ms_max if patient else LIMITS.postgres_connect_ms_max
    try:
        return await asyncpg.connect(
            url,
            timeout=wait_ms / 1_000,
            command_timeout=None if patient else LIMITS.postgres_command_ms_max / 1_000,
            server_settings=settings,
        )
    except ValueError as error:
        raise ConfigError(
            f"The URL of the database cannot be read: {error}.",
            "Write it as postgresql://user@host:5432/name.",
        ) from error
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:
            raise classified(error) from error
        raise ConfigError(
            f"Postgres at {place(url)}: there is no such host.", "Correct the database's URL."
        ) from error
    except (OSError, TimeoutError) as error:
        why = str(error) or "no reply in time"
        raise TransientError(
            f"Postgres at {place(url)} does not answer: {why}.", lost=True
        ) from error
    except Exception as error:
        raise classified(error) from error


def place(url: str) -> str:
    """Where a URL leads, for people: `host:port/name`, nothing of user and password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2] or parse_qs(parts.query).get("host", ["localhost"])[0]
    return f"{host}{parts.path}"
