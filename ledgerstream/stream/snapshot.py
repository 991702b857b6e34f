"""Snapshots: the content of a state, frozen at an offset, in pages in Postgres.

Pages are written in many small transactions under a new snapshot id; one row makes the snapshot
valid; then older ones go. A snapshot that was never made valid is swept by the next owner.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import cast

import asyncpg
import numpy as np

from ledgerstream.errors import StoppedPartition
from ledgerstream.limits import LIMITS
from ledgerstream.stream import migration
from ledgerstream.stream.connect import connect
from ledgerstream.stream.faults import classified
from ledgerstream.stream.sink import Claim, Source
from ledgerstream.stream.state import Dump, Spec, State

Specs = Mapping[str, Spec]
FORMAT = 1  # of the arrays that states dump; another one is refused


@dataclass(frozen=True)
class Snapshot:
    """A state's content at `state_offset`: arrays by state name, copies that nobody changes.

    specs: the declaration that the arrays follow, which may be an older one.
    """

    partition: int
    state_offset: int
    digest: bytes
    code_version: str
    specs: Specs
    content: Mapping[str, Dump]


def freeze(
    state: State, specs: Specs, partition: int, state_offset: int, code_version: str
) -> Callable[[], Snapshot]:
    """Copy a state as it stands, in the compute thread; what is returned arranges the copy as a
    snapshot, in any thread, while the stream goes on."""
    digest, content = state.digest(), state.freeze()
    return lambda: Snapshot(partition, state_offset, digest, code_version, specs, content())


def layout_of(specs: Specs, content: Mapping[str, Dump]) -> str:
    """JSON: what is declared, and the arrays in the order of their bytes."""
    arrays = [
        [name, part, array.dtype.str, list(array.shape)]
        for name, dump in content.items()
        for part, array in dump.items()
    ]
    layout = {"format": FORMAT, "states": declared(specs), "arrays": arrays}
    return json.dumps(layout, separators=(",", ":"))


def declared(specs: Specs) -> migration.Layout:
    """The declarations as far as stored bytes depend on them, as they come back from JSON."""
    states = {name: spec.stored() for name, spec in specs.items()}
    return cast(migration.Layout, json.loads(json.dumps(states)))


def unlike(processor: str, specs: Specs, layout: str) -> list[str]:
    """Sentences on what keeps a stored layout from being loaded, or migrated, into `specs`."""
    stored = json.loads(layout)
    if stored.get("format", 1) != FORMAT:
        return [
            f"It is of format {stored['format']}, and this version of ledgerstream has {FORMAT}."
        ]
    return migration.differences(processor, declared(specs), stored["states"])


def specs_of(specs: Specs, layout: str) -> Specs:
    """The declaration that stored arrays follow, where nothing is `unlike`."""
    return migration.stored_specs(specs, json.loads(layout)["states"])


def pages_of(content: Mapping[str, Dump], size: int) -> Iterator[bytes]:
    """The arrays' bytes one after the other, cut into pages of `size`."""
    page = bytearray()
    for dump in content.values():
        for array in dump.values():
            view = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            at = 0
            while at < len(view):
                taken = min(size - len(page), len(view) - at)
                page += view[at : at + taken].tobytes()
                at += taken
                if len(page) == size:
                    yield bytes(page)
                    page.clear()
    if page:
        yield bytes(page)


def unpaged(layout: str, data: bytes) -> dict[str, Dump]:
    """The inverse of `layout_of` and `pages_of`."""
    content: dict[str, Dump] = {}
    at = 0
    for name, part, dtype, shape in json.loads(layout)["arrays"]:
        count = int(np.prod(shape))
        array = np.frombuffer(data, dtype, count, at).reshape(shape)
        at += array.nbytes
        content.setdefault(name, {})[part] = array
    assert at == len(data)
    return content


class Snapshots:
    """Snapshots of one processor on a connection of their own."""

    def __init__(self, connection: asyncpg.Connection, processor: str, source: Source) -> None:
        self._connection = connection
        self._processor = processor
        self._source = source

    @classmethod
    async def connect(cls, url: str, processor: str, source: Source) -> Snapshots:
        return cls(await connect(url, f"{processor} snapshots"), processor, source)

    async def write(self, snapshot: Snapshot, owner_epoch: int) -> uuid.UUID:
        """Store the pages; the snapshot counts only once `validate` has said so."""
        snapshot_id = uuid.uuid4()
        size = sum(a.nbytes for dump in snapshot.content.values() for a in dump.values())
        pages = -(-size // LIMITS.snapshot_page_bytes)
        cut = enumerate(pages_of(snapshot.content, LIMITS.snapshot_page_bytes))
        try:
            await self._connection.execute(
                """INSERT INTO ls_snapshots (snapshot_id, processor, topic, partition, topic_id,
                       state_offset, owner_epoch, digest, code_version, layout, pages)
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)""",
                snapshot_id, self._processor, self._source.name, snapshot.partition,
                self._source.topic_id, snapshot.state_offset, owner_epoch, snapshot.digest,
                snapshot.code_version, layout_of(snapshot.specs, snapshot.content), pages,
            )  # fmt: skip
            while some := list(islice(cut, LIMITS.snapshot_txn_pages)):
                await self._connection.copy_records_to_table(
                    "ls_snapshot_pages",
                    records=[(snapshot_id, number, page) for number, page in some],
                    columns=["snapshot_id", "page", "data"],
                )
        except BaseException as error:
            raise classified(error) from error
        return snapshot_id

    async def validate(self, snapshot_id: uuid.UUID) -> bool:
        """Make it count, if its state is committed and its owner still is; then drop the others.

        False, and nothing of it left, where another owner has the partition.
        """
        try:
            async with self._connection.transaction():
                row = await self._connection.fetchrow(
                    """UPDATE ls_snapshots s SET valid = true FROM ls_progress p
                       WHERE s.snapshot_id = $1 AND p.processor = s.processor
                         AND p.topic = s.topic AND p.partition = s.partition
                         AND p.topic_id = s.topic_id AND p.owner_epoch = s.owner_epoch
                         AND p.next_offset >= s.state_offset
                       RETURNING s.partition, s.owner_epoch""",
                    snapshot_id,
                )
                if row is None:
                    await self._drop("snapshot_id = $1", snapshot_id)
                    return False
                await self._drop(
                    """processor = $1 AND topic = $2 AND partition = $3 AND owner_epoch <= $4
                       AND snapshot_id <> $5""",
                    self._processor, self._source.name, row["partition"], row["owner_epoch"],
                    snapshot_id,
                )  # fmt: skip
        except BaseException as error:
            raise classified(error) from error
        return True

    async def newest(self, claim: Claim, specs: Specs) -> Snapshot | None:
        """The valid snapshot to start from, after sweeping what earlier owners left unfinished.

        Its content is as stored, its `specs` with it. Raises StoppedPartition where the declared
        state is another than the stored one, and no migration leads there.
        """
        try:
            async with self._connection.transaction():
                await self._drop(
                    """processor = $1 AND topic = $2 AND partition = $3 AND NOT valid
                       AND owner_epoch < $4""",
                    self._processor, self._source.name, claim.partition, claim.owner_epoch,
                )  # fmt: skip
                row = await self._connection.fetchrow(
                    """SELECT * FROM ls_snapshots WHERE processor = $1 AND topic = $2
                          AND partition = $3 AND topic_id = $4 AND valid AND state_offset <= $5
                       ORDER BY state_offset DESC LIMIT 1""",
                    self._processor, self._source.name, claim.partition, self._source.topic_id,
                    claim.next_offset,
                )  # fmt: skip
                if row is None:
                    return None
                pages = await self._connection.fetch(
                    "SELECT data FROM ls_snapshot_pages WHERE snapshot_id = $1 ORDER BY page",
                    row["snapshot_id"],
                )
        except BaseException as error:
            raise classified(error) from error
        where = f"{self._source.name}-{claim.partition} stopped at offset {claim.next_offset:,}."
        if found := unlike(self._processor, specs, row["layout"]):
            raise StoppedPartition(
                f"{where}\n  {self._processor} declares other state than its snapshot at offset "
                f"{row['state_offset']:,} holds:\n    " + "\n    ".join(found),
                "Either run it with the old declaration, or give the processor another name, and "
                "it begins anew with the first event.",
            )
        data = b"".join(page["data"] for page in pages)
        if len(pages) != row["pages"]:
            raise StoppedPartition(
                f"{where}\n  Its snapshot at offset {row['state_offset']:,} lacks pages: "
                f"{len(pages)} of {row['pages']} are there.",
                "Restore the database, or delete the row from ls_snapshots to replay the log.",
            )
        return Snapshot(
            claim.partition, row["state_offset"], row["digest"], row["code_version"],
            specs_of(specs, row["layout"]), unpaged(row["layout"], data),
        )  # fmt: skip

    async def close(self) -> None:
        try:
            await self._connection.close(timeout=5)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
            self._connection.terminate()

    async def _drop(self, which: str, *args: object) -> None:
        await self._connection.execute(
            f"""WITH gone AS (DELETE FROM ls_snapshots WHERE {which} RETURNING snapshot_id)
                DELETE FROM ls_snapshot_pages USING gone
                 WHERE ls_snapshot_pages.snapshot_id = gone.snapshot_id""",
            *args,
        )
