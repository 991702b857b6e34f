"""What the data directory itself holds: recovery points, the marker of a clean stop, names.

`checkpoint` says up to which offset each partition is indexed, which a crash need not scan, and up
to which it has to be whole. `clean-stop` says all that is needed to open partitions without looking
at them, and is removed before the first write.
"""

from __future__ import annotations

import base64
import uuid
from pathlib import Path
from typing import NamedTuple, TypeVar

from ledgerstream.errors import CorruptError
from ledgerstream.log.config import PartitionKey
from ledgerstream.log.disk import Disk
from ledgerstream.log.epochs import EpochStart
from ledgerstream.log.sealed import seal, unseal
from ledgerstream.log.segment import SegmentSummary
from ledgerstream.log.swap import Cleaned

T = TypeVar("T")
CHECKPOINT_NAME = "checkpoint"
CLEAN_NAME = "clean-stop"
METADATA_NAME = "partition.metadata"
DELETED_SUFFIX = ".delete"
_CHECKPOINT_TAG = b"lscheck\x01"
_CLEAN_TAG = b"lsclean\x01"


class Point(NamedTuple):
    """A partition in the checkpoint file."""

    identity: bytes
    recovery_point: int  # synced and indexed below: a crash need not look there
    durable_offset: int  # acknowledged below: must be found again, in a segment or in the journal
    log_start_offset: int


class PartitionSummary(NamedTuple):
    """A partition in the marker of a clean stop."""

    topic: str
    topic_id: bytes
    partition: int
    log_start_offset: int
    next_offset: int
    segments: list[SegmentSummary]
    epochs: list[EpochStart]
    snapshot_offsets: list[int]
    cleaned: Cleaned = Cleaned()

    @property
    def key(self) -> PartitionKey:
        return PartitionKey(self.topic, uuid.UUID(bytes=self.topic_id), self.partition)


def write_checkpoint(disk: Disk, root: Path, points: list[Point]) -> None:
    """On the disk when it returns, under its name too."""
    disk.write_file(str(root / CHECKPOINT_NAME), seal(_CHECKPOINT_TAG, points), sync=True)
    disk.sync_directory(str(root))


def read_checkpoint(disk: Disk, root: Path) -> dict[bytes, Point]:
    """By identity; empty if there is none or it is damaged, and everything will be scanned."""
    points = _read(disk, root / CHECKPOINT_NAME, _CHECKPOINT_TAG, list[Point])
    return {point.identity: point for point in points}


def write_clean(disk: Disk, root: Path, partitions: list[PartitionSummary]) -> None:
    disk.write_file(str(root / CLEAN_NAME), seal(_CLEAN_TAG, partitions), sync=True)
    disk.sync_directory(str(root))


def read_clean(disk: Disk, root: Path) -> list[PartitionSummary]:
    """Empty if the last stop was not clean."""
    return _read(disk, root / CLEAN_NAME, _CLEAN_TAG, list[PartitionSummary])


def remove_clean(disk: Disk, root: Path) -> None:
    disk.remove(str(root / CLEAN_NAME))
    disk.sync_directory(str(root))


def _read(disk: Disk, path: Path, tag: bytes, content: type[list[T]]) -> list[T]:
    data = disk.read_file(str(path))
    if data is None:
        return []
    try:
        return unseal(tag, data, content)
    except CorruptError:
        return []


def write_metadata(disk: Disk, directory: str, key: PartitionKey) -> None:
    """Kafka's own file, so that its tools find the topic id."""
    topic_id = base64.urlsafe_b64encode(key.topic_id.bytes).decode().rstrip("=")
    content = f"version: 0\ntopic_id: {topic_id}".encode()
    disk.write_file(f"{directory}/{METADATA_NAME}", content, sync=False)


def read_key(disk: Disk, root: Path, name: str) -> PartitionKey | None:
    """The partition whose directory is `name`; None if it is not a whole one."""
    data = disk.read_file(str(root / name / METADATA_NAME))
    topic, dash, index = name.rpartition("-")
    if data is None or not dash or not index.isdecimal():
        return None
    try:
        fields = dict(line.split(": ", 1) for line in data.decode().splitlines())
        topic_id = uuid.UUID(bytes=base64.urlsafe_b64decode(fields["topic_id"] + "=="))
    except (KeyError, ValueError):
        return None
    return PartitionKey(topic, topic_id, int(index))
