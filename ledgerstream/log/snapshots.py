"""Producer snapshots: what a partition remembers of its producers at an offset.

Files beside the segments, named by the offset in twenty digits. One is taken when a segment rolls,
at checkpoints and at a clean stop; a damaged one is passed over for the one before, and the replay
is longer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress

from ledgerstream.errors import CorruptError
from ledgerstream.log.disk import Disk
from ledgerstream.log.producers import ProducerRecord, Producers
from ledgerstream.log.sealed import seal, unseal

SUFFIX = ".producers"
KEPT = 2  # the newest, and one to fall back on
_TAG = b"lsprodu\x02"
_OLDER_TAG = b"lsprodu\x01"  # without transactions


def write_snapshot(
    disk: Disk, directory: str, offset: int, producers: Iterable[ProducerRecord]
) -> None:
    disk.write_file(_path(directory, offset), seal(_TAG, list(producers)), sync=False)


def sync_snapshot(disk: Disk, directory: str, offset: int) -> None:
    """It survives a power cut, name and all; it is fine if a later one has taken its place."""
    with suppress(FileNotFoundError):
        disk.sync_path(_path(directory, offset))
    disk.sync_directory(directory)


def read_snapshot(disk: Disk, directory: str, offset: int) -> Producers | None:
    """None if it is absent or damaged."""
    data = disk.read_file(_path(directory, offset))
    if data is None:
        return None
    for tag in (_TAG, _OLDER_TAG):
        if data.startswith(tag):
            try:
                return Producers(unseal(tag, data, list[ProducerRecord]))
            except CorruptError:
                return None
    return None


def remove_snapshots(disk: Disk, directory: str, offsets: Iterable[int]) -> None:
    for offset in offsets:
        disk.remove(_path(directory, offset))


def outdated_of(offsets: Sequence[int], reached: Iterable[int]) -> tuple[int, ...]:
    """The superfluous ones of `offsets` (ascending).

    A recovery goes by the newest at or below its checkpoint file's recovery point, which may be
    well behind the log. `reached`: the recovery points of the file, and of the one being written.
    """
    kept = {*offsets[-KEPT:]}
    for point in reached:
        kept.add(offsets[max(bisect_right(offsets, point) - 1, 0)])
    return tuple(offset for offset in offsets if offset not in kept)


def snapshot_offsets(names: Iterable[str]) -> list[int]:
    """Of the snapshots among a directory's names, oldest first."""
    return sorted(int(name.removesuffix(SUFFIX)) for name in names if name.endswith(SUFFIX))


def _path(directory: str, offset: int) -> str:
    return f"{directory}/{offset:020d}{SUFFIX}"
