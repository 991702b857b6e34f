"""What the commands do with a log: find it, open it, write to it, read it.

Without an address the log is the one in the data directory: of a broker that serves it already, or
else of one that is started for as long as the command lasts.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import structlog
import uvloop

from ledgerstream.cli import show
from ledgerstream.cli.show import Advance
from ledgerstream.client import EARLIEST, LATEST, Client, Security
from ledgerstream.errors import ConfigError, DirectoryInUse, KafkaError, LedgerStreamError
from ledgerstream.events import Event
from ledgerstream.limits import LIMITS

if TYPE_CHECKING:
    import asyncpg

T = TypeVar("T")

UNKNOWN_TOPIC = "UNKNOWN_TOPIC_OR_PARTITION"
SILENT_S = 1.0  # a wait that takes longer is told of


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine to its end; what the rooms below have to say goes to stderr.

    SIGTERM ends it as Ctrl-C does: what it started is stopped.
    """
    signal.signal(signal.SIGTERM, _as_interrupt)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def _as_interrupt(*_: object) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's job in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


@asynccontextmanager
async def open_log(
    log: str | None, directory: Path, log_config: Path | None
) -> AsyncIterator[Client]:
    """A client of the log."""
    security = security_of(log, log_config)
    async with log_address(log, directory) as address:
        async with await connect(address, security) as client:
            yield client


def security_of(log: str | None, file: Path | None) -> Security | None:
    """How to be let in at the log that --log names; the one in --dir asks for nothing."""
    if log is not None:
        from ledgerstream.cli.logconfig import load

        return load(file)
    if file is not None:
        raise ConfigError(
            f"--log-config {file} says how to be let in, and --log does not say where.",
            "Give --log (or LEDGERSTREAM_LOG) too.",
        )
    return None


async def connect(address: str, security: Security | None) -> Client:
    """A client of the log at an address; whoever has to wait for it is told."""

    async def tell() -> None:
        await asyncio.sleep(SILENT_S)
        seconds = LIMITS.connect_ms_max // 1_000
        show.note(f"Waiting for the log at {address}, up to {seconds} s …")

    telling = asyncio.create_task(tell())
    try:
        return await Client.connect(address, security=security)
    finally:
        telling.cancel()


@asynccontextmanager
async def log_address(log: str | None, directory: Path) -> AsyncIterator[str]:
    """Where the log answers: host:port."""
    if log is not None:
        yield log.removeprefix("kafka://")
        return
    from ledgerstream.broker.embedded import Broker

    log_dir = directory / "log"
    deadline = time.monotonic() + LIMITS.connect_ms_max / 1_000
    while True:
        if served := _served_at(log_dir):
            yield served
            return
        try:
            broker = await Broker.embedded(log_dir)
            break
        except DirectoryInUse:  # by another command, whose broker is just starting
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)
    async with broker:
        yield broker.address


def _served_at(log_dir: Path) -> str | None:
    """The address of the broker that has this directory, if one has, and has said it."""
    from ledgerstream.broker.settings import ADDRESS_FILE

    try:
        with (log_dir / ".lock").open("r+b") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # somebody has it, and says where
                address, who = (log_dir / ADDRESS_FILE).read_text().split()
                return address if lock.read().split() == [who.encode()] else None
    except (OSError, ValueError):  # there is no log yet, or its broker is just starting
        pass
    return None


@asynccontextmanager
async def open_database(database: str | None, directory: Path) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the Postgres of that URL, or to the embedded one."""
    from ledgerstream.stream.connect import connect
    from ledgerstream.stream.faults import TransientError

    with database_url(database, directory) as url:
        try:
            connection = await connect(url, "command", patient=True)
        except TransientError as error:
            raise LedgerStreamError(
                str(error.args[0]), "Check --database; without it, an embedded Postgres is used."
            ) from error
        try:
            yield connection
        finally:
            await connection.close()


@contextmanager
def database_url(database: str | None, directory: Path) -> Iterator[str]:
    if database is not None:
        if not database.startswith(("postgresql://", "postgres://")):
            raise ConfigError(
                "--database (or LEDGERSTREAM_DATABASE) is not the URL of a Postgres.",
                "Write it as postgresql://user@host:5432/name.",
            )
        yield database
        return
    from ledgerstream.stream.postgres import EmbeddedPostgres

    with EmbeddedPostgres.start(directory) as postgres:
        yield postgres.url


async def ensure_topic(client: Client, topic: str, partitions: int) -> None:
    try:
        await client.topic(topic)
    except KafkaError as error:
        if error.name != UNKNOWN_TOPIC:
            raise
        # Apache Kafka would forget a past that is older than a week
        await client.create_topic(topic, partitions=partitions, config={"retention.ms": "-1"})


async def fill(
    client: Client,
    topic: str,
    event: type[Event],
    key: str | None,
    encoding: str,
    partitions: int,
    pieces: Iterator[tuple[np.ndarray, float | None]],
    advance: Advance,
) -> int:
    """Write all pieces in order, reading the next while one is being written. Rows written."""
    await ensure_topic(client, topic, partitions)
    written = 0
    reading = asyncio.create_task(asyncio.to_thread(next, pieces, None))
    while (piece := await reading) is not None:
        rows, share = piece
        reading = asyncio.create_task(asyncio.to_thread(next, pieces, None))
        await write_rows(client, topic, rows, event, key, encoding)
        written += len(rows)
        advance(len(rows), share)
    return written


async def write_rows(
    client: Client, topic: str, rows: np.ndarray, event: type[Event], key: str | None, encoding: str
) -> None:
    await client.write(topic, rows, event=event, key=key, encoding=cast(Any, encoding))


async def find_topic(client: Client, topic: str) -> None:
    """The topic is there, or the broker creates topics by itself. KafkaError otherwise, soon: a
    producer would wait for it as long as for a delivery."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LIMITS.topic_created_ms_max / 1000):
            await client.cluster.topic(topic, create=True)
            return
    await client.topic(topic)


async def send_lines(
    client: Client, topic: str, lines: Iterable[list[bytes]], separator: str | None
) -> int:
    """One record a line; each group of lines is durable before the next is read."""
    sent = 0
    producer = await client.producer()
    for group in lines:
        records = []
        for line in group:
            key, found, value = line.partition(separator.encode()) if separator else (b"", b"", b"")
            records.append((key, value) if found else (None, line))
        async with asyncio.TaskGroup() as tasks:
            for key_or_none, value in records:
                tasks.create_task(producer.send(topic, value, key=key_or_none))
        sent += len(records)
    return sent


async def chunks(
    client: Client, topic: str, start: str | int, *, follow: bool
) -> AsyncIterator[Any]:
    """What the topic holds from `start` (earliest, latest or ms): to the end as of now, or on."""
    indexes = range((await client.topic(topic)).partitions)
    names = {"earliest": EARLIEST, "latest": LATEST}
    at = start if isinstance(start, int) else names[start]
    begin = await client.list_offsets(topic, dict.fromkeys(indexes, at))
    end = await client.list_offsets(topic, dict.fromkeys(indexes, LATEST))
    unread = {i for i in indexes if begin[i] < end[i]}
    reader = client.reader(topic, {i: begin[i] for i in (indexes if follow else unread)})
    while unread or follow:
        chunk = await reader.next()
        if chunk is None:
            continue
        yield chunk
        if chunk.next_offset >= end[chunk.partition]:
            unread.discard(chunk.partition)
