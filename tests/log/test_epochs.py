from __future__ import annotations

import pytest

from ledgerstream.log.epochs import Epochs, EpochStart


def test_an_epoch_begins_once() -> None:
    epochs = Epochs()
    assert epochs.latest == -1
    assert epochs.begin(0, 0)
    assert not epochs.begin(0, 10)
    assert epochs.begin(2, 10)
    assert not epochs.begin(1, 20)
    assert epochs.starts() == [EpochStart(0, 0), EpochStart(2, 10)]


def test_an_epoch_without_records_leaves_no_start() -> None:
    epochs = Epochs()
    for epoch in (0, 1, 2):
        epochs.begin(epoch, 7)
    assert epochs.starts() == [EpochStart(2, 7)]


def test_the_end_of_an_epoch_is_the_start_of_the_next() -> None:
    epochs = Epochs([EpochStart(2, 5), EpochStart(4, 9)])
    assert [epochs.end_of(epoch, 20) for epoch in range(-1, 6)] == [
        (-1, -1), (0, 5), (1, 5), (2, 9), (2, 9), (4, 20), (-1, -1),
    ]  # fmt: skip
    assert Epochs().end_of(0, 20) == (-1, -1)


def test_epochs_below_the_start_of_the_log_go() -> None:
    """The one that the start lies in begins there; who asks for an older one hears of the start."""
    starts = [EpochStart(0, 0), EpochStart(2, 5), EpochStart(4, 9)]
    for start, left in [
        (0, starts), (3, [EpochStart(0, 3), *starts[1:]]), (5, starts[1:]),
        (7, [EpochStart(2, 7), EpochStart(4, 9)]), (9, starts[2:]), (30, [EpochStart(4, 30)]),
    ]:  # fmt: skip
        epochs = Epochs(starts)
        assert epochs.trim(start) is (left != starts)
        assert epochs.starts() == left
        assert not epochs.trim(start)
        assert epochs.latest == 4
    assert [Epochs(left).end_of(epoch, 40) for epoch in (0, 2, 4)] == [(0, 30), (2, 30), (4, 40)]
    assert not Epochs().trim(7)


def test_the_file_is_kafkas() -> None:
    epochs = Epochs([EpochStart(0, 0), EpochStart(3, 42)])
    assert epochs.encode() == b"0\n2\n0 0\n3 42\n"
    assert Epochs.decode(epochs.encode(), 42).starts() == epochs.starts()
    assert Epochs.decode(epochs.encode(), 41).starts() == [EpochStart(0, 0)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1\n0\n",
        b"0\n2\n0 0\n",
        b"0\nx\n",
        b"\xff",
        b"0\n1\n0",
        b"0\n1\n0 4",
        b"0\n1\n0\n",
        b"0",
    ],
)
def test_a_malformed_file_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        Epochs.decode(content, 10)
