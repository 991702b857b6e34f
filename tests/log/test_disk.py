from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ledgerstream.log.disk import _IOV_MAX, Disk, Handle, NotCached


def handle_of(directory: Path, name: str, content: bytes = b"") -> Handle:
    path = directory / name
    path.write_bytes(content)
    return Handle(str(path))


def test_the_least_recently_used_file_is_closed(tmp_path: Path) -> None:
    disk = Disk(open_files_max=2)
    a, b, c = (handle_of(tmp_path, name) for name in "abc")
    for handle in (a, b, a, c):
        disk.open(handle)
    assert a.file is not None
    assert b.file is None
    assert c.file is not None


def test_a_file_in_use_stays_open_when_it_is_evicted(tmp_path: Path) -> None:
    disk = Disk(open_files_max=1)
    a, b = handle_of(tmp_path, "a", b"content"), handle_of(tmp_path, "b")
    file = disk.open(a)
    fd = file.fd
    disk.open(b)
    assert a.file is None
    assert os.pread(fd, 7, 0) == b"content"
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_cached_read_never_opens_a_file(tmp_path: Path) -> None:
    disk = Disk()
    handle = handle_of(tmp_path, "a", b"content")
    with pytest.raises(NotCached):
        disk.read_cached(handle, 0, 7)
    disk.open(handle)
    assert disk.read_cached(handle, 2, 100) == b"ntent"


def test_the_cached_read_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    disk = Disk()
    handle = handle_of(tmp_path, "a", os.urandom(1 << 20))
    file = disk.open(handle)
    disk.sync(file)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        disk.read_cached(handle, 0, 4_096)
    except NotCached:
        pass
    else:
        pytest.skip("this file system keeps its pages whatever it is told")
    assert len(disk.read(handle, 0, 4_096)) == 4_096
    assert len(disk.read_cached(handle, 0, 4_096)) == 4_096


def test_more_buffers_than_one_call_takes_are_all_written(tmp_path: Path) -> None:
    disk = Disk()
    handle = handle_of(tmp_path, "a")
    pieces = [i.to_bytes(4, "big") for i in range(_IOV_MAX * 2 + 5)]
    disk.write(disk.open(handle), pieces, 3)
    assert disk.read(handle, 3, 1 << 20) == b"".join(pieces)


def test_a_small_file_is_replaced_as_one_act(tmp_path: Path) -> None:
    disk = Disk()
    path = str(tmp_path / "small")
    assert disk.read_file(path) is None
    for content in (b"long content", b"short"):
        disk.write_file(path, content, sync=True)
        assert disk.read_file(path) == content
    assert disk.names(str(tmp_path)) == ["small"]


def test_what_is_not_there_is_removed_without_complaint(tmp_path: Path) -> None:
    Disk().remove(str(tmp_path / "nothing"))
    assert Disk().size(str(tmp_path / "nothing")) == 0


def test_where_no_read_can_be_had_at_once_the_patient_one_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tmpfs, NFS and others do not know the flag that asks for it."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "preadv", refuse)
    disk = Disk()
    handle = handle_of(tmp_path, "a", b"content")
    disk.open(handle)
    with pytest.raises(NotCached):
        disk.read_cached(handle, 0, 7)
    assert disk.read(handle, 0, 7) == b"content"
