from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.log.harness import Running


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """`open_store(limits, sync=…, disk=…)`: a running store on the test's directory."""
    opened: list[Running] = []

    def open_one(*args: object, **kwargs: object) -> Running:
        opened.append(Running(tmp_path / "data", *args, **kwargs))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for running in opened:
        running.close()
