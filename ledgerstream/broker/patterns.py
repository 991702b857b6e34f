"""Regular expressions that clients send, by RE2: its time is linear, whatever the pattern."""

from __future__ import annotations

from collections.abc import Sequence


def matching(pattern: str, names: Sequence[str]) -> list[bool]:
    """Which names the pattern matches as a whole.

    Blocks while Arrow is imported. Raises ValueError for what is no pattern.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    found: list[bool] = pc.match_substring_regex(
        pa.array(names, pa.string()), f"^(?:{pattern})$"
    ).to_pylist()
    return found
