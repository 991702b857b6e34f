"""Segments take the place of others, whatever crash comes in between.

The new files stand beside the old ones as `.cleaned`, synced. A manifest, `<base>.swap`, says which
segments they replace: once it is there, each step may be done again until all are; without it the
`.cleaned` are nothing. A small file, `cleaned`, says below which offset a log may have gaps, which
a recovery would otherwise take for damage, and below which it has been compacted.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from ledgerstream.log.disk import Disk
from ledgerstream.log.sealed import seal, unseal
from ledgerstream.log.segment import ABORTED, INDEX, LOG, TIME_INDEX, segment_name

CLEANED_SUFFIX = ".cleaned"
SWAP_SUFFIX = ".swap"
CLEANED_NAME = "compaction"
SUFFIXES = (INDEX, TIME_INDEX, ABORTED, LOG)
_SWAP_TAG = b"lsswap\x00\x01"
_CLEANED_TAG = b"lsclea\x00\x01"


class Cleaned(NamedTuple):
    """How far a partition is compacted."""

    gaps_below: int = 0
    clean_below: int = 0


class Swap(NamedTuple):
    """One segment in the place of one or more, the first of which has the same base offset."""

    bases: list[int]
    suffixes: list[str]  # the files that it has


def begin_swap(disk: Disk, directory: str, swap: Swap) -> None:
    """From here on it will happen. OSError: it will not."""
    disk.sync_directory(directory)  # the names of the .cleaned
    disk.write_file(_path(directory, swap.bases[0], SWAP_SUFFIX), seal(_SWAP_TAG, swap), sync=True)
    disk.sync_directory(directory)


def finish_swap(disk: Disk, directory: str, swap: Swap) -> None:
    """Whatever of it has been done already. OSError: a recovery has to finish it."""
    first, *others = swap.bases
    for suffix in SUFFIXES:
        name = _path(directory, first, suffix)
        if suffix in swap.suffixes:
            with suppress(FileNotFoundError):  # renamed before a crash
                disk.rename(name + CLEANED_SUFFIX, name)
        else:
            disk.remove(name)
    for base in others:
        for suffix in SUFFIXES:
            disk.remove(_path(directory, base, suffix))
    disk.sync_directory(directory)
    disk.remove(_path(directory, first, SWAP_SUFFIX))
    disk.sync_directory(directory)  # one that came back would take the next `.cleaned` for whole


def finish_swaps(disk: Disk, directory: str) -> None:
    """After a crash: those that had begun are finished, what else was prepared goes."""
    for name in disk.names(directory):
        if name.endswith(SWAP_SUFFIX):
            data = disk.read_file(f"{directory}/{name}")
            assert data is not None
            finish_swap(disk, directory, unseal(_SWAP_TAG, data, Swap))
    for name in disk.names(directory):
        if name.endswith(CLEANED_SUFFIX):
            disk.remove(f"{directory}/{name}")


def discard(disk: Disk, directory: str, base: int) -> None:
    """What was prepared for a swap that does not happen."""
    for suffix in SUFFIXES:
        disk.remove(_path(directory, base, suffix) + CLEANED_SUFFIX)


def write_cleaned(disk: Disk, directory: str, cleaned: Cleaned) -> None:
    disk.write_file(f"{directory}/{CLEANED_NAME}", seal(_CLEANED_TAG, cleaned), sync=True)
    disk.sync_directory(directory)


def read_cleaned(disk: Disk, directory: str) -> Cleaned:
    """Raises CorruptError where it is damaged: gaps could not be told from losses."""
    data = disk.read_file(f"{directory}/{CLEANED_NAME}")
    return Cleaned() if data is None else unseal(_CLEANED_TAG, data, Cleaned)


def _path(directory: str, base: int, suffix: str) -> str:
    return f"{directory}/{segment_name(base, suffix)}"
