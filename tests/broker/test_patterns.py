"""Regular expressions of clients, by RE2; `tests/differential` compares them with Kafka's."""

from __future__ import annotations

import pytest

from ledgerstream.broker.patterns import matching

NAMES = ["foo", "bar", "foobar"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("foo", ["foo"]),
        ("foo|bar", ["foo", "bar"]),
        ("^foo$", ["foo"]),
        (r"\Qfoo\E", ["foo"]),
        (r"\Qfoo", ["foo"]),
        (r"f.\Qo", ["foo"]),
        (r"\Qfoo)|(?:bar", []),
        ("", []),
    ],
)
def test_a_pattern_matches_whole_names(pattern: str, found: list[str]) -> None:
    assert [n for n, well in zip(NAMES, matching(pattern, NAMES), strict=True) if well] == found


@pytest.mark.parametrize("pattern", ["foo)|(?:bar", "foo)", "(foo", "[", "*", "foo\\", r"foo\E"])
@pytest.mark.parametrize("names", [NAMES, []])
def test_what_is_no_pattern_by_itself_is_none(pattern: str, names: list[str]) -> None:
    with pytest.raises(ValueError, match="Invalid regular expression"):
        matching(pattern, names)
