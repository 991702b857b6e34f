"""A log and a Postgres of your own, here, for a script, a test or a notebook.

    with ledgerstream.local() as ls:             # or local("data"), to keep what is written
        ls.write("payments", frame)
        ls.run(LargeSpenders, until="end")
        ls.table(Alert)                          # a data frame
        ls.verify(LargeSpenders)                 # computed again from the log, and compared
        ls.read("payments", last="1h")           # the log as a data frame

Calls block; the asyncio loop runs in a thread of its own, so this works inside a notebook too.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import LATEST, Client
from ledgerstream.errors import ConfigError, KafkaError
from ledgerstream.events import Event
from ledgerstream.stream import schema
from ledgerstream.stream.connect import connect
from ledgerstream.stream.durations import duration_ns
from ledgerstream.stream.frames import event_frame, table_frame
from ledgerstream.stream.postgres import EmbeddedPostgres
from ledgerstream.stream.processor import Processor, Topic, check_processor
from ledgerstream.stream.several import Workers
from ledgerstream.stream.tables import ORIGIN, Table
from ledgerstream.stream.verify import Verified, verify
from ledgerstream.stream.worker import Progress

T = TypeVar("T")

UNKNOWN_TOPIC = 3


class Local:
    """What `local()` gives. `address` is the broker's, `database` the URL of the Postgres."""

    def __init__(self, path: str | Path | None = None) -> None:
        self._temporary = path is None
        self.path = Path(tempfile.mkdtemp(prefix="ledgerstream-") if path is None else path)
        self._thread: threading.Thread | None = None  # while it is open

    def __enter__(self) -> Local:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="ledgerstream-local", daemon=True
        )
        self._thread.start()
        self._postgres = EmbeddedPostgres.start(self.path)
        try:
            self._call(self._open())
        except BaseException:
            self._shut()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._call(self._stack.aclose())
        finally:
            self._shut()

    @property
    def address(self) -> str:
        return self._broker.address

    @property
    def database(self) -> str:
        return self._postgres.url

    def write(
        self,
        topic: str | Topic,
        frame: pd.DataFrame | np.ndarray,
        event: type[Event] | None = None,
        key: str | None = None,
        *,
        partitions: int = 1,
    ) -> int:
        """Append rows of an event type; how many. The topic is made if it is not there.

        Event type, key and encoding are those of the `Topic` that a processor declared under this
        name, unless given.
        """
        declared = _declared(topic, event, key)
        return self._call(self._write(declared, frame, partitions))

    def run(
        self,
        processor: type[Processor],
        until: Literal["end"] | None = "end",
        *,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> Progress:
        """Run a processor until what the log holds is done; with `until=None`, until Ctrl-C."""
        check_processor(processor, "ls.run")
        if until not in ("end", None):
            raise ConfigError(f"ls.run(until={until!r}): it is 'end' or None.")
        worker = self._call(self._workers(processor, until, on_progress))
        done = asyncio.run_coroutine_threadsafe(worker.run(), self._loop)
        try:
            return done.result()
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(worker.stop)
            return done.result()

    def verify(self, processor: type[Processor], *, splits: int = 2, seed: int = 0) -> Verified:
        """Compute what a processor has committed again, under random batches, and compare.

        Of several topics what is given is of the last. Raises NotReproduced with the first
        difference.
        """
        check_processor(processor, "ls.verify")
        for topic in processor.sources:
            found = self._call(self._verify(processor.over(topic), splits, seed))
        return found

    def table(self, table: type[Table], *, origin: bool = False) -> pd.DataFrame:
        """A result table in the order of its events; `origin` adds the columns that say whence.

        Money stays integer minor units; Timestamps become datetime64[ns, UTC].
        """
        if not (isinstance(table, type) and issubclass(table, Table)):
            raise ConfigError(
                f"ls.table takes a result table, a class such as Alert, not {table!r}."
            )
        return self._call(self._table(table, origin))

    def read(
        self,
        topic: str | Topic,
        last: str | None = None,
        event: type[Event] | None = None,
        key: str | None = None,
    ) -> pd.DataFrame:
        """The log as a data frame, partition by partition, with `partition` and `offset` first.

        last: only so much time before the newest record, as in "1h".
        """
        declared = _declared(topic, event, key)
        return self._call(self._read(declared, last))

    # -- on the loop

    async def _open(self) -> None:
        self._stack = AsyncExitStack()
        self._broker = await self._stack.enter_async_context(
            await Broker.embedded(self.path / "log")
        )
        self._client = await self._stack.enter_async_context(
            await Client.connect(self._broker.address)
        )

    async def _workers(
        self,
        processor: type[Processor],
        until: Literal["end"] | None,
        on_progress: Callable[[Progress], None],
    ) -> Workers:
        for output in processor.outputs:  # as many partitions as what they are made from
            await self._have(
                output.name, (await self._client.topic(processor.source.name)).partitions
            )
        return Workers(processor, self._client, self.database, until=until, on_progress=on_progress)

    async def _verify(self, processor: type[Processor], splits: int, seed: int) -> Verified:
        return await verify(processor, self._client, self.database, splits=splits, seed=seed)

    async def _write(self, topic: Topic, frame: pd.DataFrame | np.ndarray, partitions: int) -> int:
        await self._have(topic.name, partitions)
        return await self._client.write(
            topic.name, frame, event=topic.event, key=topic.key, encoding=topic.encoding
        )

    async def _have(self, topic: str, partitions: int) -> None:
        """Make a topic that is not there."""
        try:
            await self._client.topic(topic)
        except KafkaError as error:
            if error.code != UNKNOWN_TOPIC:
                raise
            await self._client.create_topic(topic, partitions=partitions)

    async def _table(self, table: type[Table], origin: bool) -> pd.DataFrame:
        names = [*table.result_columns(), *(ORIGIN if origin else ())]
        connection = await connect(self.database, "sandbox", patient=True)
        try:
            await schema.create(connection)
            await schema.create_table(connection, table)
            rows = await connection.fetch(
                f"""SELECT {", ".join(f'"{name}"' for name in names)}
                      FROM "{table.relation().name}"
                     ORDER BY ls_topic_id, ls_partition, ls_offset, ls_n"""
            )
        finally:
            await connection.close()
        return table_frame(table, rows, origin=origin)

    async def _read(self, topic: Topic, last: str | None) -> pd.DataFrame:
        starts = None if last is None else await self._since(topic, duration_ns(last))
        found = await self._client.read(
            topic.name, topic.event, key=topic.key, encoding=topic.encoding, starts=starts
        )
        frames = []
        for partition, decoded in sorted(found.items()):
            frame = event_frame(topic.event, decoded.rows)
            frame.insert(0, "partition", partition)
            frame.insert(1, "offset", decoded.offset)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    async def _since(self, topic: Topic, ns: int) -> dict[int, int]:
        """Where the last `ns` before the newest record begin."""
        info = await self._client.topic(topic.name)
        every = range(info.partitions)
        ends = await self._client.list_offsets(topic.name, dict.fromkeys(every, LATEST))
        lasts = {number: end - 1 for number, end in ends.items() if end > 0}
        if not lasts:
            return dict(ends)
        found = await self._client.read(
            topic.name, topic.event, key=topic.key, encoding=topic.encoding, starts=lasts
        )
        newest = max((int(each.timestamp.max()) for each in found.values() if len(each)), default=0)
        since = newest - ns // 1_000_000
        return await self._client.list_offsets(topic.name, dict.fromkeys(every, since))

    # -- the loop's thread

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._thread is None:
            work.close()
            raise ConfigError(
                "This log and its Postgres run within `with ledgerstream.local() as ls:`, and are "
                "not open here.",
                "Do it inside the block; to come back to the data, give it a directory: "
                'ledgerstream.local("data").',
            )
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _shut(self) -> None:
        self._postgres.close(wait=self._temporary)
        self._loop.call_soon_threadsafe(self._loop.stop)
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        self._loop.close()
        if self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)


def local(path: str | Path | None = None) -> Local:
    """A log and a Postgres here: in a temporary directory that goes away, or kept in `path`."""
    return Local(path)


def _declared(topic: str | Topic, event: type[Event] | None, key: str | None) -> Topic:
    if isinstance(topic, Topic):
        return topic
    known = Topic.declared.get(topic)
    if event is not None:
        key = key or (known.key if known is not None else next(iter(event.columns())))
        return Topic(topic, event, key)
    if known is None:
        raise ConfigError(
            f"No processor that is imported here has declared the topic {topic!r}.",
            f"Import one, or give the event type: ls.read({topic!r}, event=Payment), or "
            f'ls.write({topic!r}, frame, Payment, key="customer").',
        )
    return known
