"""Snapshots in Postgres: each writes the pages that its predecessor lacks.

A page is stored under the snapshot that wrote it, and a snapshot's row says where each of its pages
lies (`writers`, `refs`). The row comes first, then pages in many small transactions; one statement
makes the snapshot valid, and in its transaction the predecessor goes, with the pages that nobody
needs any more. So at every instant the valid snapshot has all its pages. What was never made valid
is swept by the next owner.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import asyncpg
import numpy as np

from ledgerstream.errors import StoppedPartition
from ledgerstream.limits import LIMITS
from ledgerstream.stream.connect import connect
from ledgerstream.stream.faults import classified
from ledgerstream.stream.pages import Pages, ids_of, match
from ledgerstream.stream.sink import Claim, Source, copy_chunks
from ledgerstream.stream.snapshot import (
    Snapshot,
    Specs,
    layout_of,
    paged,
    specs_of,
    unlike,
    unpaged,
)

_REF = np.dtype("<i4")

_INSERT = """
INSERT INTO ls_snapshots (snapshot_id, processor, topic, partition, topic_id, state_offset,
       owner_epoch, digest, code_version, layout, pages, writers, refs, bytes, new_bytes)
SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15
 WHERE $16::uuid IS NULL OR EXISTS (SELECT FROM ls_snapshots WHERE snapshot_id = $16 AND valid)"""

_VALIDATE = """
UPDATE ls_snapshots s SET valid = true FROM ls_progress p
 WHERE s.snapshot_id = $1 AND p.processor = s.processor AND p.topic = s.topic
   AND p.partition = s.partition AND p.topic_id = s.topic_id AND p.owner_epoch = s.owner_epoch
   AND p.next_offset >= s.state_offset
RETURNING s.partition, s.owner_epoch"""

# The writers of pages, one look into the index each, that no snapshot names.
_SWEEP = """
WITH RECURSIVE writer(id) AS (
    (SELECT snapshot_id FROM ls_snapshot_pages ORDER BY 1 LIMIT 1)
    UNION ALL
    SELECT (SELECT p.snapshot_id FROM ls_snapshot_pages p
             WHERE p.snapshot_id > w.id ORDER BY 1 LIMIT 1)
      FROM writer w WHERE w.id IS NOT NULL)
DELETE FROM ls_snapshot_pages WHERE snapshot_id IN (
    SELECT id FROM writer w WHERE id IS NOT NULL AND NOT EXISTS (
        SELECT FROM ls_snapshots s WHERE s.snapshot_id = w.id OR w.id = ANY (s.writers)))"""


@dataclass(frozen=True)
class Stored:
    """Where the pages of one snapshot lie.

    writers:  the snapshots that wrote them.
    refs:     int32[pages, 2]: of each page, in order, which of `writers`, and its number there.
    ids:      uint64[pages, 2], as in `Pages`.
    base:     the snapshot that some of them were taken over from.
    """

    snapshot_id: uuid.UUID
    partition: int
    writers: list[uuid.UUID]
    refs: np.ndarray
    ids: np.ndarray
    base: uuid.UUID | None


class Snapshots:
    """Snapshots of one processor on a connection of their own."""

    def __init__(self, connection: asyncpg.Connection, processor: str, source: Source) -> None:
        self._connection = connection
        self._processor = processor
        self._source = source
        self._valid: dict[int, Stored] = {}  # by partition: the newest, as far as we know it

    @classmethod
    async def connect(cls, url: str, processor: str, source: Source) -> Snapshots:
        return cls(await connect(url, f"{processor} snapshots"), processor, source)

    async def write(self, snapshot: Snapshot, owner_epoch: int) -> Stored:
        """Store the pages that the valid snapshot lacks; this one counts only once `validate` has
        said so."""
        base = self._valid.get(snapshot.partition)
        pages, stored, new = await asyncio.to_thread(_compare, snapshot, base)
        try:
            if not await self._insert(snapshot, owner_epoch, pages, stored, new):
                # Somebody has removed the one that it builds on: it stands alone then.
                del self._valid[snapshot.partition]
                return await self.write(snapshot, owner_epoch)
            pieces = pages.rows(new, stored.snapshot_id.bytes, LIMITS.snapshot_txn_bytes)
            while rows := await asyncio.to_thread(next, pieces, b""):
                async with self._connection.transaction():
                    if not await self._connection.fetchval(
                        "SELECT true FROM ls_snapshots WHERE snapshot_id = $1 FOR KEY SHARE",
                        stored.snapshot_id,
                    ):
                        break  # a new owner has swept it, and would never find what came later
                    await self._connection.copy_to_table(
                        "ls_snapshot_pages", source=copy_chunks([rows]),
                        columns=["snapshot_id", "page", "data"], format="binary",
                    )  # fmt: skip
        except BaseException as error:
            raise classified(error) from error
        return stored

    async def validate(self, stored: Stored) -> bool:
        """Make it count, if its state is committed and its owner still is; then drop the others.

        False, and nothing of it left, where another owner has the partition.
        """
        self._valid.pop(stored.partition, None)  # until we know the outcome
        try:
            async with self._connection.transaction():
                row = await self._connection.fetchrow(_VALIDATE, stored.snapshot_id)
                gone = [] if row is None else await self._others(stored, row["owner_epoch"])
                whole = stored.base is None or any(o["snapshot_id"] == stored.base for o in gone)
                if row is not None and whole:
                    await self._drop_pages(stored, gone)
                    self._valid[stored.partition] = stored
                    return True
                await self._connection.execute(
                    """WITH gone AS (DELETE FROM ls_snapshots WHERE snapshot_id = $1)
                       DELETE FROM ls_snapshot_pages WHERE snapshot_id = $1""",
                    stored.snapshot_id,
                )
                return False
        except BaseException as error:
            self._valid.pop(stored.partition, None)
            raise classified(error) from error

    async def newest(self, claim: Claim, specs: Specs, below: int | None = None) -> Snapshot | None:
        """The valid snapshot to start from, at an offset ≤ `below` (the claim's, without it), after
        sweeping what earlier owners left unfinished.

        Its content is as stored, its `specs` with it. Raises StoppedPartition where the declared
        state is another than the stored one, and no migration leads there.
        """
        try:
            async with self._connection.transaction():
                await self._connection.execute(
                    """DELETE FROM ls_snapshots WHERE processor = $1 AND topic = $2
                          AND partition = $3 AND NOT valid AND owner_epoch < $4""",
                    self._processor, self._source.name, claim.partition, claim.owner_epoch,
                )  # fmt: skip
                await self._connection.execute(_SWEEP)
                row = await self._connection.fetchrow(
                    """SELECT * FROM ls_snapshots WHERE processor = $1 AND topic = $2
                          AND partition = $3 AND topic_id = $4 AND valid AND state_offset <= $5
                       ORDER BY state_offset DESC LIMIT 1""",
                    self._processor, self._source.name, claim.partition, self._source.topic_id,
                    claim.next_offset if below is None else below,
                )  # fmt: skip
                if row is None:
                    return None
                pages = await stored_pages(self._connection, row)
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
        if len(pages) != row["pages"]:
            raise StoppedPartition(
                f"{where}\n  Its snapshot at offset {row['state_offset']:,} lacks pages: "
                f"{len(pages)} of {row['pages']} are there.",
                "Restore the database, or delete the row from ls_snapshots to replay the log.",
            )
        ids = await asyncio.to_thread(ids_of, pages)
        self._valid[claim.partition] = Stored(
            row["snapshot_id"], claim.partition, *_places(row), ids, None
        )
        return Snapshot(
            claim.partition, row["state_offset"], row["digest"], row["code_version"],
            specs_of(specs, row["layout"]), unpaged(row["layout"], b"".join(pages)),
        )  # fmt: skip

    async def close(self) -> None:
        try:
            await self._connection.close(timeout=5)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
            self._connection.terminate()

    async def _insert(
        self, snapshot: Snapshot, owner_epoch: int, pages: Pages, stored: Stored, new: np.ndarray
    ) -> bool:
        done = await self._connection.execute(
            _INSERT, stored.snapshot_id, self._processor, self._source.name, snapshot.partition,
            self._source.topic_id, snapshot.state_offset, owner_epoch, snapshot.digest,
            snapshot.code_version, layout_of(snapshot.specs, snapshot.content), len(pages),
            stored.writers, stored.refs.tobytes(), int(pages.sizes.sum()),
            int(pages.sizes[new].sum()), stored.base,
        )  # fmt: skip
        return cast(str, done).endswith(" 1")

    async def _others(self, stored: Stored, owner_epoch: int) -> list[Any]:
        """Drop the rows of the partition's other snapshots, and return them."""
        gone: list[Any] = await self._connection.fetch(
            """DELETE FROM ls_snapshots WHERE processor = $1 AND topic = $2 AND partition = $3
                  AND owner_epoch <= $4 AND snapshot_id <> $5
               RETURNING snapshot_id, pages, writers, refs""",
            self._processor, self._source.name, stored.partition, owner_epoch,
            stored.snapshot_id,
        )  # fmt: skip
        return gone

    async def _drop_pages(self, kept: Stored, gone: Sequence[Any]) -> None:
        """Drop the pages of `gone` that are none of `kept`."""
        writers, unused = await asyncio.to_thread(_unused, kept, gone)
        kept_writers = len(kept.writers)
        single = unused[unused >> 32 < kept_writers]
        for at in range(0, len(single), LIMITS.snapshot_drop_pages):
            some = single[at : at + LIMITS.snapshot_drop_pages]
            await self._connection.execute(
                """DELETE FROM ls_snapshot_pages p
                    USING unnest($2::int[], $3::int[]) AS g(writer, page)
                    WHERE p.snapshot_id = ($1::uuid[])[g.writer + 1] AND p.page = g.page""",
                writers, (some >> 32).tolist(), (some & 0xFFFFFFFF).tolist(),
            )  # fmt: skip
        await self._connection.execute(
            "DELETE FROM ls_snapshot_pages WHERE snapshot_id = ANY ($1)", writers[kept_writers:]
        )


async def stored_pages(connection: asyncpg.Connection, row: Any) -> list[bytes]:
    """The pages of a row of ls_snapshots, in order; fewer where some are not there."""
    writers, refs = _places(row)
    number = {each: at for at, each in enumerate(writers)}
    found = await connection.fetch(
        "SELECT snapshot_id, page, data FROM ls_snapshot_pages WHERE snapshot_id = ANY ($1)",
        writers,
    )
    data = {(number[each], page): data for each, page, data in found}
    there = (data.get((writer, page)) for writer, page in refs.tolist())
    return [each for each in there if each is not None]


def _compare(snapshot: Snapshot, base: Stored | None) -> tuple[Pages, Stored, np.ndarray]:
    """The pages of a snapshot, where each will lie, and which of them are to be written."""
    pages = paged(snapshot.content)
    own = uuid.uuid4()
    if base is None:
        base_refs, base_ids, base_writers = np.empty((0, 2), _REF), np.empty((0, 2), "u8"), []
    else:
        base_refs, base_ids, base_writers = base.refs, base.ids, base.writers
    known = len(base_ids)
    place = match(base_ids, pages.ids)
    new = np.flatnonzero(place == known + np.arange(len(pages)))
    refs = np.empty((len(pages), 2), _REF)
    old = place < known
    refs[old] = base_refs[place[old]]
    used = np.unique(refs[old, 0])
    refs[old, 0] = np.searchsorted(used, refs[old, 0])
    refs[~old, 0] = len(used)
    refs[~old, 1] = np.searchsorted(new, place[~old] - known)
    writers = [*(base_writers[each] for each in used), own]
    stored = Stored(
        own, snapshot.partition, writers, refs, pages.ids,
        base.snapshot_id if base is not None else None,
    )  # fmt: skip
    return pages, stored, new


def _unused(kept: Stored, gone: Sequence[Any]) -> tuple[list[uuid.UUID], np.ndarray]:
    """The writers of all pages, those of `kept` first; and the pages of `gone` that `kept` does not
    need, int64 ascending: the writer's place above 32 bits of its number."""
    place = {each: at for at, each in enumerate(kept.writers)}
    theirs = [np.empty(0, np.int64)]
    for row in gone:
        writers, refs = _places(row)
        at = np.array([place.setdefault(each, len(place)) for each in writers], np.int64)
        theirs.append(at[refs[:, 0]] << 32 | refs[:, 1])
    needed = kept.refs.astype(np.int64)
    unused = np.setdiff1d(np.concatenate(theirs), needed[:, 0] << 32 | needed[:, 1])
    return list(place), unused


def _places(row: Any) -> tuple[list[uuid.UUID], np.ndarray]:
    """`writers` and `refs` of a row; those of older versions hold all their pages themselves."""
    if row["writers"] is None:
        own = np.stack([np.zeros(row["pages"], _REF), np.arange(row["pages"], dtype=_REF)], axis=1)
        return [row["snapshot_id"]], own
    return list(row["writers"]), np.frombuffer(row["refs"], _REF).reshape(-1, 2)
