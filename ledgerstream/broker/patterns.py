"""Regular expressions that clients send, by RE2: its time is linear, whatever the pattern."""

from __future__ import annotations

from collections.abc import Sequence


def matching(pattern: str, names: Sequence[str]) -> list[bool]:
    """Which names the pattern matches as a whole.

    Blocks while Arrow is imported. Raises ValueError for what is no pattern.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    def search(regex: str, texts: Sequence[str]) -> list[bool]:
        found: list[bool] = pc.match_substring_regex(
            pa.array(texts, pa.string()), regex
        ).to_pylist()
        return found

    search(pattern, [""])  # by itself first: what closes our parenthesis is no pattern
    try:
        return search(f"^(?:{pattern})$", names)
    except ValueError:
        return search(f"^(?:{pattern}\\E)$", names)  # what it quotes (\Q) goes to its end
