"""Rows behind a hash index against a dict: rows come, change, go, and come back when undone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledgerstream.stream import keyed
from ledgerstream.stream.keyed import KeyRows

NUMBERS = np.arange(40) * 2**33  # in an index of few slots, most collide
WORDS = np.stack([np.arange(40) % 3, np.arange(40)], axis=1)

acts = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "remove", "seal", "undo", "forget", "reload"]),
        st.lists(st.integers(0, 39), min_size=1, max_size=12),
    ),
    max_size=40,
)


def table(wide: bool) -> KeyRows:
    return KeyRows("t", 4, 4, key_at=1, key_words=2) if wide else KeyRows("t", 2, 2)


def fresh_digest(wide: bool, content: dict[int, int], keys: np.ndarray) -> list[int]:
    """Of a table that was given this content at once."""
    rows = table(wide)
    rows.begin(len(keys))
    some = np.array(list(content), np.int64)
    rows.rows[rows.resolve(keys[some]), -1] = list(content.values())
    rows.seal()
    return rows.digest.tolist()


@pytest.mark.parametrize("wide", [False, True])
@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(acts=acts)
def test_a_table_is_a_dict_that_can_go_back(
    monkeypatch: pytest.MonkeyPatch, wide: bool, acts: list[tuple[str, list[int]]]
) -> None:
    monkeypatch.setattr(keyed, "_INDEX_SLOTS_MIN", 2)
    keys = WORDS if wide else NUMBERS
    rows, truth = table(wide), dict[int, int]()
    before: list[dict[int, int]] = []  # the truth when each open frame began
    for number, (act, some) in enumerate(acts, 1):
        if act in ("add", "remove"):
            before.append(dict(truth))
            rows.begin(len(some))
            at = rows.resolve(keys[some])
            for each, row in zip(some, at, strict=True):
                assert rows.rows[row, -1] == truth.get(each, 0)
                truth[each] = rows.rows[row, -1] = number
            if act == "remove":
                rows.remove(np.unique(at))
                for each in set(some):
                    del truth[each]
                if number % 2:  # and some come back in the same frame
                    truth[some[0]] = number
                    rows.rows[rows.resolve(keys[some[:1]]), -1] = number
            rows.seal()
        elif act == "undo" and before:
            rows.rollback()
            truth = before.pop()
        elif act == "forget" and before:
            rows.forget()
            before.pop(0)
        elif act == "reload":
            dump, rows = rows.dump(), table(wide)
            rows.load(dump)
            before.clear()
        assert rows.live == len(truth)
        assert rows.digest.tolist() == fresh_digest(wide, truth, keys)
        assert len(rows.live_rows()) == len(truth)


def test_rows_that_were_given_up_are_used_again() -> None:
    rows = table(wide=False)
    for turn in range(50):
        rows.begin(100)
        at = rows.resolve(np.arange(100) + 100 * turn)
        rows.remove(at)
        rows.seal()
        rows.forget()
    assert (rows.live, rows.count) == (0, 100)
