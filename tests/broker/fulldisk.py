"""A disk that is full for one topic, until it is not."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from ledgerstream.log.disk import Disk


def full_for(monkeypatch: pytest.MonkeyPatch, topic: str) -> Callable[[bool], None]:
    """`switch(True)`: no file of the topic can be opened for writing, until `switch(False)`."""
    real = Disk.open
    full = False

    def opened(disk: Disk, handle: Any) -> Any:
        if full and topic in handle.path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(disk, handle)

    def switch(on: bool) -> None:
        nonlocal full
        full = on

    monkeypatch.setattr(Disk, "open", opened)
    return switch
