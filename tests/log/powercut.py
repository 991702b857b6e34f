"""A disk that loses its power: what was not synced is there afterwards, or not, in any mixture.

A file's content is safe once it was `fdatasync`ed, its name once its directory was `fsync`ed, and
neither implies the other. Of what was written since, a cut keeps any subset of the writes, each
whole or in part; of what was named, renamed and removed, any subset too, in whatever order. That is
more than any file system really loses. Directories themselves are taken to be there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from ledgerstream.log.disk import LOCK_NAME, Disk, File, Handle
from ledgerstream.wire.batches import Buffer

Names = Mapping[str, "Inode | None"]  # None: it is no name any more
Choose = Callable[[], bool]


class Write(NamedTuple):
    position: int
    data: bytes | None  # None: the file ends here


class Inode:
    """A file, whatever its names are."""

    __slots__ = ("durable", "since")

    def __init__(self, durable: bytes = b"") -> None:
        self.durable = durable
        self.since: list[Write] = []  # the last sync


class Moment(NamedTuple):
    """What is known of the disk just before something is done to it."""

    what: str
    names: dict[str, Inode]  # those that are safe
    renames: list[Names]  # each of them one act
    contents: dict[Inode, tuple[bytes, list[Write]]]


class NeverSyncs(Disk):
    """For what is thrown away soon."""

    def sync(self, file: File) -> None:
        """Nobody will miss it."""

    def sync_directory(self, path: str) -> None:
        """Nor its name."""


class PowerCutDisk(Disk):
    """Works as any other, and remembers the moments at which the power may go."""

    def __init__(self, directory: Path) -> None:
        """What there is in the directory is safe."""
        super().__init__()
        self.armed = False
        self.moments: list[Moment] = []
        self._root = str(directory)
        self._lock = threading.RLock()
        self._names = {str(p): Inode(p.read_bytes()) for p in directory.rglob("*") if p.is_file()}
        self._safe = dict(self._names)
        self._since: dict[str, list[Names]] = {}  # by directory: since its last sync
        self._files: dict[int, Inode] = {}  # by descriptor

    def moment(self, what: str) -> Moment:
        with self._lock:
            renames = [act for acts in self._since.values() for act in acts]
            inodes = {*self._safe.values(), *(each for act in renames for each in act.values())}
            contents = {each: (each.durable, list(each.since)) for each in inodes if each}
            return Moment(what.replace(self._root, ""), dict(self._safe), renames, contents)

    def _before(self, what: str) -> None:
        if self.armed:
            self.moments.append(self.moment(what))

    def _rename(self, names: Names) -> None:
        directory = os.path.dirname(next(iter(names)))
        self._since.setdefault(directory, []).append(names)
        for name, inode in names.items():
            if inode is None:
                self._names.pop(name, None)
            else:
                self._names[name] = inode

    # files

    def open_fd(self, path: str, flags: int) -> int:
        with self._lock:
            fresh = path not in self._names
            if flags & os.O_CREAT and fresh:
                self._before(f"create {path}")
            fd = super().open_fd(path, flags)
            if flags & os.O_DIRECTORY:
                return fd
            if fresh:
                self._rename({path: Inode()})
            inode = self._files[fd] = self._names[path]
            if flags & os.O_TRUNC and not fresh:
                inode.since.append(Write(0, None))
            return fd

    def write(self, file: File, buffers: Sequence[Buffer], position: int) -> None:
        with self._lock:
            self._before("write")
            super().write(file, buffers, position)
            self._files[file.fd].since.append(Write(position, b"".join(buffers)))

    def truncate(self, handle: Handle, size: int) -> None:
        with self._lock:
            self._before(f"truncate {handle.path}")
            super().truncate(handle, size)
            self._files[self.open(handle).fd].since.append(Write(size, None))

    def sync(self, file: File) -> None:
        with self._lock:
            self._before("sync")
            inode = self._files[file.fd]
            inode.durable, inode.since = written(inode.durable, inode.since), []

    # names

    def rename(self, old: str, new: str) -> None:
        with self._lock:
            self._before(f"rename {new}")
            super().rename(old, new)
            self._rename({old: None, new: self._names[old]})

    def remove(self, path: str) -> None:
        assert not os.path.isdir(path)
        with self._lock:
            self._before(f"remove {path}")
            super().remove(path)
            if path in self._names:
                self._rename({path: None})

    def sync_directory(self, path: str) -> None:
        with self._lock:
            self._before(f"sync directory {path}")
            for names in self._since.pop(path, ()):
                apply(self._safe, names)


def written(durable: bytes, writes: Sequence[Write]) -> bytes:
    content = bytearray(durable)
    for position, data in writes:
        content += bytes(max(position - len(content), 0))  # what was never written reads as zeros
        if data is None:
            del content[position:]
        else:
            content[position : position + len(data)] = data
    return bytes(content)


def apply(names: dict[str, Inode], change: Names) -> None:
    for name, inode in change.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


Image = dict[str, bytes]  # content by path


def image_of(moment: Moment, names: Choose, contents: Callable[[Write], Write | None]) -> Image:
    """What is found when the power is back."""
    kept = dict(moment.names)
    for change in moment.renames:
        if names():
            apply(kept, change)
    out: Image = {}
    for path, inode in kept.items():
        if not path.endswith(LOCK_NAME):
            durable, writes = moment.contents[inode]
            some = [left for write in writes if (left := contents(write)) is not None]
            out[path] = written(durable, some)
    return out


def images(moment: Moment, chance: Random, count: int) -> Iterator[Image]:
    """The extremes, each rename alone and each one missing, and `count` more by chance."""

    def whole(write: Write) -> Write:
        return write

    def nothing(_: Write) -> None:
        return None

    def torn(write: Write) -> Write | None:
        if write.data is None:
            return write if chance.random() < 0.5 else None
        size = chance.choice((0, chance.randrange(len(write.data) + 1), len(write.data)))
        return write._replace(data=write.data[:size]) if size else None

    for contents in (whole, nothing):
        yield image_of(moment, lambda: True, contents)
        yield image_of(moment, lambda: False, contents)
    for at in range(len(moment.renames)):
        for alone in (True, False):
            turns = iter(range(len(moment.renames)))
            yield image_of(moment, lambda a=at, o=alone, t=turns: (next(t) == a) is o, nothing)
    for _ in range(count):
        share = chance.choice((0.2, 0.5, 0.8))
        yield image_of(moment, lambda share=share: chance.random() < share, torn)


def all_images(moments: Sequence[Moment], seed: int, count: int) -> Iterator[tuple[Moment, Image]]:
    """Each that differs, once."""
    chance, seen = Random(seed), set()
    for moment in moments:
        for image in images(moment, chance, count):
            known = frozenset(image.items())
            if known not in seen:
                seen.add(known)
                yield moment, image


def put_back(image: Image, directory: Path, root: Path) -> None:
    """The image of what was in `root`, in an empty directory."""
    for path, content in image.items():
        place = directory / Path(path).relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
