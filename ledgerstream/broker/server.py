"""Connections: frames in, replies out in the order of the requests, bounded in every direction.

A request becomes an `Exchange`, which is answered at once or later; replies leave in order. Reading
stops while a connection (or all together) holds more than its share of bytes or requests, or while
its peer does not read. A reply is made, and one that reads data (Fetch) begun, only when it is its
turn and the peer reads, so that a slow reader holds one at the most; none is larger than a frame.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import structlog

from ledgerstream.errors import ProtocolError
from ledgerstream.limits import Limits
from ledgerstream.wire import messages
from ledgerstream.wire.batches import Buffer
from ledgerstream.wire.frames import Frames
from ledgerstream.wire.messages import RequestHeader
from ledgerstream.wire.versions import Api

if TYPE_CHECKING:
    from ledgerstream.broker.dispatch import Dispatch

log = structlog.get_logger("broker")

# as long as their requests, or one member's assignment: what is asked all the time is not counted
SHORT = frozenset({
    Api.HEARTBEAT, Api.CONSUMER_GROUP_HEARTBEAT, Api.SYNC_GROUP, Api.OFFSET_COMMIT,
    Api.INIT_PRODUCER_ID, Api.ADD_PARTITIONS_TO_TXN, Api.ADD_OFFSETS_TO_TXN,
    Api.TXN_OFFSET_COMMIT, Api.END_TXN, Api.WRITE_TXN_MARKERS,
})  # fmt: skip


class Exchange:
    """One request and, when it has been decided, its reply."""

    __slots__ = ("begin", "buffers", "bytes", "connection", "header", "message")

    def __init__(
        self, connection: Connection, header: RequestHeader, message: Any, size: int
    ) -> None:
        self.connection = connection
        self.header = header
        self.message = message
        self.bytes = size  # what the request holds in memory until it is answered
        self.buffers: Sequence[Buffer] | None = None
        self.begin: Callable[[], None] | None = None  # work put off until it is this one's turn

    def answer(self, **fields: Any) -> None:
        """Reply with the message of the request's API and version.

        It is made of the fields when it is its turn: until then they are no more than what the
        broker has in memory in any case.
        """
        if self.connection.closing:
            return
        if self.begin is None and not self.connection.is_turn(self):
            self.message = None
            self.begin = partial(self._write, fields)
        else:
            self._write(fields)

    def _write(self, fields: dict[str, Any]) -> None:
        header, limits = self.header, self.connection.limits
        try:
            frame = messages.write_response(
                header.api_key, header.version, header.correlation_id, fields,
                None if header.api_key in SHORT else limits.frame_bytes_max,
            )  # fmt: skip
        except ProtocolError as error:
            self.connection.close(f"{messages.api_name(header.api_key)}: {error}")
            return
        unsent = self.connection.server.unsent_bytes
        if len(frame) > limits.fetch_bytes_low and len(frame) + unsent > limits.replies_bytes_max:
            self.connection.close("peers have not taken their replies, and there is no room")
            return
        self.send((frame,))

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Reply with these bytes: a whole frame, or nothing for a request that wants none."""
        if self.connection.closing:
            return
        assert self.buffers is None, "a request is answered once"
        self.buffers = buffers
        self.message = None
        self.connection.flush()


class Connection(asyncio.BufferedProtocol):
    """One client's connection."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.limits = server.limits
        self.frames = Frames(server.limits.frame_bytes_max)
        self.queue: deque[Exchange] = deque()
        self.peer = "?"
        self.transport: asyncio.Transport | None = None
        self.held_bytes = 0  # of requests not yet answered, and of a frame coming in
        self.frame_bytes = 0
        self.read_paused = self.write_paused = self._flushing = self.closing = False
        self.last_active = self.frame_since = server.loop.time()
        self.unsent = 0  # what stood in the write buffer at the last look
        self.unsent_counted = 0  # of it, what the server knows of
        self.state: dict[str, Any] = {}  # what a conversation keeps for its connection

    # -- asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        name = transport.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if name else "?"
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self.server.stopping:
            self.close("")
        elif len(self.server.connections) >= self.limits.connections_max:
            self.server.refused += 1
            self.closing = True
            self.transport.abort()
        else:
            self.server.connections.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.frames.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        started, now = self.frames.started, self.server.loop.time()
        self.last_active = now
        try:
            for frame in self.frames.take(nbytes):
                started = False
                if self.closing:
                    return
                self.server.dispatch.receive(self, frame)
        except ProtocolError as error:
            self.close(str(error))
            return
        if self.frames.started and not started:
            self.frame_since = now
        self._charge_frame(self.frames.large_bytes)
        self.throttle()

    def eof_received(self) -> bool:
        return False  # half-open connections are closed

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        self._count_unsent()
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        self.server.forget(self)

    # -- replies

    def push(self, exchange: Exchange) -> None:
        """A request came in; its reply leaves after those before it."""
        self.queue.append(exchange)
        self.held_bytes += exchange.bytes
        self.server.held_bytes += exchange.bytes

    def is_turn(self, exchange: Exchange) -> bool:
        """Whether its reply would leave now."""
        return not self.write_paused and bool(self.queue) and self.queue[0] is exchange

    def flush(self) -> None:
        """Send what is ready, in order; begin what was put off until its turn."""
        if self._flushing:
            return
        self._flushing = True
        try:
            while self.queue and not self.write_paused and not self.closing:
                first = self.queue[0]
                if first.begin is not None:
                    begin, first.begin = first.begin, None
                    self.server.dispatch.go_on(first, begin)
                if first.buffers is None:
                    break
                self.queue.popleft()
                self._release(first.bytes)
                if first.buffers and self.transport is not None:
                    self.transport.writelines(first.buffers)
                    self._count_unsent()
        finally:
            self._flushing = False
        if self.read_paused:
            self.throttle()
        if self.server.stopping and not self.queue:
            self.close("")

    # -- limits

    def throttle(self) -> None:
        """Read on, or not, as what is held allows."""
        full = (
            self.held_bytes > self.limits.connection_bytes_max
            or len(self.queue) >= self.limits.connection_requests_max
            or self.server.held_bytes > self.limits.requests_bytes_max
            or self.write_paused
            or self.server.stopping
        )
        if full == self.read_paused or self.transport is None or self.closing:
            return
        self.read_paused = full
        if full:
            self.server.paused.add(self)
            self.transport.pause_reading()
        else:
            self.server.paused.discard(self)
            self.transport.resume_reading()

    def look(self, now: float) -> None:
        """The server's clock ticks: close what has stood still too long."""
        if self.transport is None or self.closing:
            return
        unsent = self.transport.get_write_buffer_size()
        if unsent != self.unsent or not unsent:
            self.unsent = unsent
            if unsent:
                self.last_active = now
        self._count_unsent()
        still_ms = (now - self.last_active) * 1000
        if unsent and still_ms > self.limits.connection_stalled_ms:
            self.close(f"it has read nothing for {still_ms / 1000:.0f} s")
        elif self.frames.started and not self.read_paused:
            if (now - self.frame_since) * 1000 > self.limits.frame_started_ms_max:
                self.close("a frame was begun and never finished")
        elif not self.queue and still_ms > self.limits.connection_idle_ms:
            self.close("")

    def close(self, why: str) -> None:
        """Close at once; `why` is logged in one line unless it is ordinary."""
        if self.closing:
            return
        self.closing = True
        if why:
            log.warning("connection closed", peer=self.peer, why=why)
            self.server.closed_for_cause += 1
        if self.transport is not None:
            if why:
                self.transport.abort()
            else:
                self.transport.close()

    def _count_unsent(self) -> None:
        assert self.transport is not None
        unsent = self.transport.get_write_buffer_size()
        self.server.unsent_bytes += unsent - self.unsent_counted
        self.unsent_counted = unsent

    def _charge_frame(self, size: int) -> None:
        self.held_bytes += size - self.frame_bytes
        self.server.held_bytes += size - self.frame_bytes
        self.frame_bytes = size

    def _release(self, size: int) -> None:
        self.held_bytes -= size
        self.server.held_bytes -= size
        if self.server.paused and self.server.held_bytes <= self.limits.requests_bytes_max:
            self.server.resume_paused()


class Server:
    """All connections, and what they hold together."""

    def __init__(self, dispatch: Dispatch, limits: Limits) -> None:
        self.loop = asyncio.get_running_loop()
        self.dispatch = dispatch
        self.limits = limits
        self.connections: set[Connection] = set()
        self.paused: set[Connection] = set()
        self.held_bytes = 0  # requests that are not answered yet
        self.unsent_bytes = 0  # replies that their peers have not taken yet
        self.closed_for_cause = 0
        self.refused = 0  # connections that were too many, since the last tick
        self.stopping = False
        self._listener: asyncio.Server | None = None
        self._ticking: asyncio.TimerHandle | None = None
        self._resuming = False

    async def listen(self, host: str, port: int) -> int:
        """Accept connections; the port."""
        self._listener = await self.loop.create_server(
            lambda: Connection(self), host, port, backlog=1024
        )
        self._tick()
        return int(self._listener.sockets[0].getsockname()[1])

    def _tick(self) -> None:
        self._ticking = self.loop.call_later(self.limits.tick_ms / 1000, self._tick)
        now = self.loop.time()
        for connection in tuple(self.connections):
            connection.look(now)
        if self.refused:  # a flood of them is one line a tick, or it would fill the disk
            why = f"there are already {self.limits.connections_max:,}"
            log.warning("connections refused", count=self.refused, why=why)
            self.closed_for_cause += self.refused
            self.refused = 0

    def resume_paused(self) -> None:
        """Soon, so that a flush that frees memory is not entered again from within."""
        if not self._resuming:
            self._resuming = True
            self.loop.call_soon(self._resume_paused)

    def _resume_paused(self) -> None:
        self._resuming = False
        for connection in tuple(self.paused):
            connection.throttle()

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.paused.discard(connection)
        self.held_bytes -= connection.held_bytes
        self.unsent_bytes -= connection.unsent_counted
        connection.unsent_counted = 0
        connection.held_bytes = connection.frame_bytes = 0
        connection.queue.clear()
        if self.paused:
            self.resume_paused()

    async def stop(self) -> None:
        """Accept nothing new, answer what was accepted, close."""
        self.stopping = True
        if self._ticking is not None:
            self._ticking.cancel()
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self.connections):
            connection.throttle()
            connection.flush()
            if not connection.queue:
                connection.close("")
        deadline = self.loop.time() + self.limits.shutdown_ms_max / 1000
        while self.connections and self.loop.time() < deadline:
            await asyncio.sleep(0.005)
        for connection in tuple(self.connections):
            unanswered = connection.queue and connection.queue[0].buffers is None
            connection.close(
                "the broker stops and could not answer it in time"
                if unanswered
                else "the broker stops and its peer did not take its replies"
            )
