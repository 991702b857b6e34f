"""Producer snapshots: what a partition remembers of its producers at an offset.

Files beside the segments, named by the offset in twenty digits. One is taken when a segment rolls,
at checkpoints and at a clean stop; a damaged one is passed over for the one before, and the replay
is longer.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def snapshot_offsets(names: Iterable[str]) -> list[int]:
    """Of the snapshots among a directory's names, oldest first."""
    return sorted(int(name.removesuffix(SUFFIX)) for name in names if name.endswith(SUFFIX))


def _path(directory: str, offset: int) -> str:
    return f"{directory}/{offset:020d}{SUFFIX}"
