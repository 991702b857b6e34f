"""Length-prefixed frames out of a stream of bytes, into memory that is used again.

    frames = Frames(frame_bytes_max)
    view = frames.buffer()        # read the socket into it
    for frame in frames.take(n):  # n bytes were read
        ...                       # valid until the next `buffer()`

Small frames are handed out as views of one buffer; a large one gets a buffer of its own size, so
that a frame is never copied to be joined.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ledgerstream.errors import ProtocolError

_I32 = struct.Struct(">i")
BUFFER_BYTES = 64 * 1024


class Frames:
    """Splits what comes in; holds at most one frame and one buffer."""

    __slots__ = ("_buffer", "_filled", "_large", "_large_filled", "_start", "_view", "frame_max")

    def __init__(self, frame_bytes_max: int) -> None:
        self.frame_max = frame_bytes_max
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._filled = 0
        self._large: memoryview | None = None
        self._large_filled = 0

    @property
    def started(self) -> bool:
        """Whether a part of a frame has come in."""
        return self._large is not None or self._filled > self._start

    @property
    def large_bytes(self) -> int:
        """The size of a large frame that is coming in, or 0."""
        return 0 if self._large is None else len(self._large)

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._large is not None:
            return self._large[self._large_filled :]
        if self._start:
            rest = self._filled - self._start
            self._buffer[:rest] = self._buffer[self._start : self._filled]
            self._start, self._filled = 0, rest
        return self._view[self._filled :]

    def take(self, read: int) -> Iterator[memoryview]:
        """The frames that are whole now that `read` more bytes are there.

        Raises ProtocolError for a length that is negative or over the limit.
        """
        if self._large is not None:
            self._large_filled += read
            if self._large_filled == len(self._large):
                large, self._large = self._large, None
                yield large.toreadonly()
            return
        self._filled += read
        while self._filled - self._start >= 4:
            (size,) = _I32.unpack_from(self._buffer, self._start)
            if not 0 <= size <= self.frame_max:
                raise ProtocolError(
                    f"A frame of {size:,} bytes was announced; the most is {self.frame_max:,}."
                )
            begin, end = self._start + 4, self._start + 4 + size
            if end <= self._filled:
                self._start = end
                yield self._view[begin:end].toreadonly()
            elif size + 4 > BUFFER_BYTES:
                self._large = memoryview(bytearray(size))
                self._large_filled = self._filled - begin
                self._large[: self._large_filled] = self._view[begin : self._filled]
                self._start = self._filled = 0
                return
            else:
                return
