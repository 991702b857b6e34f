"""Deadlines that are put off cost nothing until they would have been due."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ledgerstream.groups.timers import Timer, Timers


def test_a_deadline_that_is_put_off_stays_one_entry() -> None:
    timers, timer = Timers(), Timer(lambda _: None)
    timers.set(timer, 10)
    for at_ms in range(11, 1_000):
        timers.set(timer, at_ms)
    assert timers.next_ms == 10
    assert list(timers.due(998)) == []
    assert timers.next_ms == 999
    assert list(timers.due(999)) == [timer]
    assert timers.next_ms is None


ACTS = st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 30)), max_size=40)


@given(ACTS)
def test_timers_are_due_once_and_in_time(acts: list[tuple[int, int]]) -> None:
    """Against the plain list of deadlines: set, cancel (-1), and a clock that moves on."""
    timers = Timers()
    made = [Timer(lambda _: None) for _ in range(3)]
    wanted: dict[int, int] = {}
    now_ms = 0
    for which, number in acts:
        if which == 3:
            now_ms += max(number, 0)
            due = [made.index(timer) for timer in timers.due(now_ms)]
            assert sorted(due) == sorted(i for i, at_ms in wanted.items() if at_ms <= now_ms)
            for each in due:
                del wanted[each]
        elif number < 0:
            timers.cancel(made[which])
            wanted.pop(which, None)
        else:
            timers.set(made[which], now_ms + number)
            wanted[which] = now_ms + number
        assert not wanted or (timers.next_ms is not None and timers.next_ms <= min(wanted.values()))
