"""The operating system's side of the log: the only file of this room that opens files.

A test passes a `Disk` of its own to make any call fail on purpose. Descriptors are kept in an LRU;
a `File` closes when the last reference to it goes, so a reader that is at work while its file is
evicted, renamed or removed reads on undisturbed, and no lock is needed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from ledgerstream.errors import DirectoryInUse
from ledgerstream.limits import LIMITS
from ledgerstream.wire.batches import Buffer

_IOV_MAX = os.sysconf("SC_IOV_MAX")
PAGE_BYTES = 4096  # what direct writes are aligned to, in the file and in memory
_DIRECT_BYTES = 1024 * 1024  # the aligned memory that they go through
GONE_SUFFIX = ".gone"
LOCK_NAME = ".lock"  # Kafka's name for it


class NotCached(Exception):
    """The bytes are not in the page cache, or the file is not open: ask again from a thread."""


class File:
    """An open descriptor; a direct one writes whole pages past the page cache."""

    __slots__ = ("direct", "fd")

    def __init__(self, fd: int, *, direct: bool = False) -> None:
        self.fd = fd
        self.direct = direct

    def __del__(self) -> None:
        os.close(self.fd)


class Handle:
    """A file's name, and its descriptor while it has one.

    `kept`: the file has lost its name, or another has taken it; whoever holds the handle reads on.
    """

    __slots__ = ("file", "kept", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: File | None = None
        self.kept: File | None = None


class Disk:
    """Reads, writes and syncs; raises OSError as the system gives it."""

    def __init__(self, open_files_max: int = LIMITS.open_files_max) -> None:
        self._open_files_max = open_files_max
        self._open: OrderedDict[Handle, File] = OrderedDict()
        self._aligned: memoryview | None = None  # of direct writes, which one thread makes

    # descriptors

    def open(self, handle: Handle) -> File:
        """The handle's file, opened if it is not; the least recently used one may be closed."""
        return self._use(handle, os.O_RDWR)

    def create(self, handle: Handle) -> File:
        """As `open`, of a file that may not exist yet."""
        return self._use(handle, os.O_RDWR | os.O_CREAT)

    def _use(self, handle: Handle, flags: int) -> File:
        if (kept := handle.kept) is not None:
            return kept
        file = handle.file
        if file is None:
            path = handle.path
            try:
                file = File(self.open_fd(path, flags))
            except FileNotFoundError:
                if (kept := handle.kept) is None:
                    raise
                return kept
            if handle.path != path:  # it was let go meanwhile
                raise FileNotFoundError(errno.ENOENT, "the file is gone", path)
            if (kept := handle.kept) is not None:
                return kept  # meanwhile: what was opened may be another file
            self._open[handle] = handle.file = file
            while len(self._open) > self._open_files_max:
                self._open.popitem(last=False)[0].file = None
            return file
        try:
            self._open.move_to_end(handle)
        except KeyError:  # evicted by another thread a moment ago: it is in use after all
            self._open[handle] = handle.file = file
        return file

    def keep(self, handle: Handle) -> None:
        """The name is about to go: readers of this handle go on with the file that it means now."""
        handle.kept = self.open(handle)
        self.forget(handle)

    def let_go(self, handle: Handle) -> None:
        """The file is gone for whoever opens it from now on, whatever comes under its name."""
        handle.path += GONE_SUFFIX  # which is never there
        handle.kept = None
        self.forget(handle)

    def forget(self, handle: Handle) -> None:
        handle.file = None
        self._open.pop(handle, None)

    def open_fd(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)

    def create_anew(self, path: str) -> File:
        """An empty file, whatever was there."""
        return File(self.open_fd(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC))

    def open_direct(self, path: str) -> File:
        """For whole pages, past the page cache: a sync then has nothing left to write and costs
        half. An ordinary file where the system knows no such thing (tmpfs). One thread writes."""
        flags = os.O_RDWR | os.O_CREAT
        try:
            return File(self.open_fd(path, flags | getattr(os, "O_DIRECT", 0)), direct=True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return File(self.open_fd(path, flags))

    # reads

    def read_cached(self, handle: Handle, position: int, size: int) -> bytearray:
        """Up to `size` bytes without waiting for the disk. NotCached if none can be had so, which
        is always where the file system does not know of it (tmpfs, NFS)."""
        file = handle.kept or handle.file
        if file is None:
            raise NotCached
        out = bytearray(size)
        try:
            got = os.preadv(file.fd, [out], position, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            raise NotCached from None
        if got < size:
            del out[got:]
        return out

    def read(self, handle: Handle, position: int, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end of the file. Blocks: never on the loop."""
        fd = self.open(handle).fd
        out = os.pread(fd, size, position)
        while 0 < len(out) < size and (more := os.pread(fd, size - len(out), position + len(out))):
            out += more
        return out

    def read_once(self, path: str, position: int, size: int) -> bytes:
        """As `read`, of a file that is not kept open."""
        file = File(self.open_fd(path, os.O_RDONLY))
        return os.pread(file.fd, size, position)

    def size(self, path: str) -> int:
        """Bytes of a file, 0 if there is none."""
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            return 0

    # writes

    def write(self, file: File, buffers: Sequence[Buffer], position: int) -> None:
        """All of `buffers` at `position`."""
        if file.direct:
            self._write_direct(file, b"".join(buffers), position)
            return
        for at in range(0, len(buffers), _IOV_MAX):
            some = buffers[at : at + _IOV_MAX] if len(buffers) > _IOV_MAX else buffers
            size = sum(map(len, some))
            wrote = os.pwritev(file.fd, some, position)
            if wrote < size:  # a signal, or a disk that is nearly full: the rest says which
                rest = memoryview(b"".join(some))
                while wrote < size:
                    wrote += os.pwrite(file.fd, rest[wrote:], position + wrote)
            position += size

    def _write_direct(self, file: File, data: bytes, position: int) -> None:
        assert len(data) % PAGE_BYTES == position % PAGE_BYTES == 0
        if self._aligned is None:
            self._aligned = memoryview(mmap.mmap(-1, _DIRECT_BYTES))  # fresh maps begin at a page
        aligned, at = self._aligned, 0
        while at < len(data):
            size = min(len(data) - at, _DIRECT_BYTES)
            aligned[:size] = data[at : at + size] if size < len(data) else data
            wrote = os.pwrite(file.fd, aligned[:size], position + at)
            if wrote % PAGE_BYTES:
                raise OSError(errno.EIO, f"{wrote} bytes of a direct write of {size} were written")
            at += wrote

    def sync(self, file: File) -> None:
        os.fdatasync(file.fd)

    def sync_path(self, path: str) -> None:
        self.sync(File(self.open_fd(path, os.O_RDWR)))

    def truncate(self, handle: Handle, size: int) -> None:
        os.ftruncate(self.create(handle).fd, size)

    # names

    def names(self, directory: str) -> list[str]:
        return sorted(os.listdir(directory))

    def directories(self, directory: str) -> list[str]:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())

    def make_directory(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)

    def sync_directory(self, path: str) -> None:
        fd = self.open_fd(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def remove(self, path: str) -> None:
        """A file or a whole directory; it is fine if there is none."""
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    # small files, whole

    def read_file(self, path: str) -> bytes | None:
        """None if there is no such file."""
        try:
            return Path(path).read_bytes()
        except FileNotFoundError:
            return None

    def write_file(self, path: str, content: Buffer, *, sync: bool) -> None:
        """Replace the file as one act: a crash leaves the old content or the new."""
        aside = path + ".new"
        file = File(self.open_fd(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
        self.write(file, [content], 0)
        if sync:
            self.sync(file)
        self.rename(aside, path)

    # the lock

    def lock(self, directory: Path) -> File:
        """Hold the directory for as long as the File lives. DirectoryInUse names who has it."""
        file = File(self.open_fd(str(directory / LOCK_NAME), os.O_RDWR | os.O_CREAT))
        try:
            fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file.fd, 32, 0).decode(errors="replace").strip() or "unknown"
            raise DirectoryInUse(
                f"The data directory {directory} is in use by process {holder}.",
                "Stop that process, or choose another directory.",
            ) from None
        os.ftruncate(file.fd, 0)
        os.pwrite(file.fd, f"{os.getpid()}\n".encode(), 0)
        return file
