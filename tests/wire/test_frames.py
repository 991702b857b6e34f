"""Frames come out whole and in order, however the bytes come in."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledgerstream.errors import ProtocolError
from ledgerstream.wire.frames import BUFFER_BYTES, Frames

sizes = st.lists(st.integers(0, 300) | st.integers(BUFFER_BYTES - 10, 3 * BUFFER_BYTES), max_size=8)


def feed(frames: Frames, data: bytes, pieces: list[int]) -> list[bytes]:
    found, at, turn = [], 0, 0
    while at < len(data):
        room = frames.buffer()
        size = min(len(room), pieces[turn % len(pieces)], len(data) - at)
        room[:size] = data[at : at + size]
        at += size
        turn += 1
        found += [bytes(frame) for frame in frames.take(size)]
    return found


@given(sizes, st.lists(st.integers(1, 100_000), min_size=1, max_size=5))
def test_whatever_the_pieces(lengths: list[int], pieces: list[int]) -> None:
    if min(pieces) < 50:
        lengths = [length % 300 for length in lengths]
    wanted = [bytes([i % 251]) * length for i, length in enumerate(lengths)]
    data = b"".join(struct.pack(">i", len(frame)) + frame for frame in wanted)
    frames = Frames(10 * BUFFER_BYTES)
    assert feed(frames, data, pieces) == wanted
    assert not frames.started


@pytest.mark.parametrize("length", [-1, -(2**31), 1001, 2**31 - 1])
def test_an_absurd_length_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match="was announced"):
        feed(Frames(1000), struct.pack(">i", length), [4])


def test_a_large_frame_is_charged_when_it_is_announced() -> None:
    frames = Frames(10**8)
    feed(frames, struct.pack(">i", 10**8) + b"x", [5])
    assert frames.large_bytes == 10**8
    assert frames.started
