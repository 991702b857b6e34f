"""One embedded Postgres for all tests of the stream; each test has a database of its own."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from ledgerstream.stream.postgres import EmbeddedPostgres

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedPostgres]:
    # Not below pytest's own directory: under root the server is another user, and each pytest that
    # starts closes that directory to others.
    with tempfile.TemporaryDirectory(prefix="ledgerstream-") as directory:
        with EmbeddedPostgres.start(Path(directory)) as server:
            yield server


@pytest.fixture
async def database(server: EmbeddedPostgres) -> AsyncIterator[str]:
    """The URL of an empty database."""
    name = f"test_{next(_numbers)}"
    admin = await asyncpg.connect(server.url)
    await admin.execute(f"CREATE DATABASE {name}")
    try:
        yield server.url.replace("/ledgerstream?", f"/{name}?")
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()
