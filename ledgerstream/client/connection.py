"""One connection to one broker: requests out, replies matched by correlation id.

A connection that breaks fails every request that waits on it with ConnectionError; whether such a
request was performed is not known, and that is for the caller to settle.

Where a broker lets us in for a time only (KIP-368), we say anew who we are before that is over:
what was sent is answered first, and what is asked meanwhile is held, and sent behind it.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from ledgerstream.client.access import OPEN, Access, cut_in_tls, prove, refused_tls, speaks_tls
from ledgerstream.errors import DecodeError, LedgerStreamError, ProtocolError, SecurityError
from ledgerstream.limits import Limits
from ledgerstream.wire import messages
from ledgerstream.wire.batches import Buffer
from ledgerstream.wire.frames import BUFFER_BYTES, Frames
from ledgerstream.wire.versions import Api

T = TypeVar("T")
_I32 = struct.Struct(">i")
_TLS_ALERT = b"\x15\x03"  # where a frame's length would begin
FIRST_REQUEST = 2  # its id, behind that of ApiVersions
RENEWED_SHARE = 0.85, 0.95  # of a session, as Kafka's clients do: not all at one moment

# what this client can speak: the highest version that both sides know is used
CLIENT_VERSIONS: dict[Api, tuple[int, int]] = {
    Api.PRODUCE: (3, 13),
    Api.FETCH: (4, 17),
    Api.LIST_OFFSETS: (1, 8),
    Api.METADATA: (1, 12),
    Api.OFFSET_COMMIT: (8, 9),
    Api.OFFSET_FETCH: (8, 9),
    Api.FIND_COORDINATOR: (4, 6),
    Api.JOIN_GROUP: (5, 9),  # the first with static members, after that with MEMBER_ID_REQUIRED
    Api.HEARTBEAT: (3, 4),
    Api.LEAVE_GROUP: (3, 5),
    Api.SYNC_GROUP: (3, 5),
    Api.SASL_HANDSHAKE: (1, 1),  # what follows it is SaslAuthenticate, no longer bare bytes
    Api.API_VERSIONS: (0, 3),
    Api.CREATE_TOPICS: (2, 7),
    Api.DELETE_TOPICS: (1, 6),
    Api.INIT_PRODUCER_ID: (0, 6),
    Api.OFFSET_FOR_LEADER_EPOCH: (2, 4),
    Api.ADD_PARTITIONS_TO_TXN: (0, 3),  # what follows is for brokers among themselves
    Api.ADD_OFFSETS_TO_TXN: (0, 4),
    Api.END_TXN: (0, 5),
    Api.WRITE_TXN_MARKERS: (1, 1),
    Api.TXN_OFFSET_COMMIT: (3, 5),  # the first that is fenced by the group (KIP-447)
    Api.DESCRIBE_CONFIGS: (1, 4),
    Api.DESCRIBE_LOG_DIRS: (1, 4),
    Api.SASL_AUTHENTICATE: (0, 2),
    Api.CREATE_PARTITIONS: (0, 3),
    Api.INCREMENTAL_ALTER_CONFIGS: (0, 1),
    Api.DESCRIBE_CLUSTER: (0, 1),
    Api.DESCRIBE_PRODUCERS: (0, 0),
    Api.DESCRIBE_TRANSACTIONS: (0, 0),
    Api.LIST_TRANSACTIONS: (0, 1),
    Api.CONSUMER_GROUP_HEARTBEAT: (1, 1),  # the first where members choose their ids
}


class Connection(asyncio.BufferedProtocol):
    """Use `await Connection.open(...)`."""

    def __init__(self, client_id: str, limits: Limits, access: Access, place: str) -> None:
        self.client_id = client_id
        self.limits = limits
        self.access = access
        self.place = place  # host:port, for words
        self.versions: dict[Api, int] = {}
        self.features: dict[str, int] = {}  # what the cluster has switched on (KIP-584)
        self._frames = Frames(limits.frame_bytes_max)
        self._waiting: dict[int, asyncio.Future[Buffer]] = {}
        self._next_id = 0
        self._transport: asyncio.Transport | None = None
        self._lost: Exception | None = None
        self._room: memoryview | None = None  # for the next bytes, until the first have come
        self._heard = False
        self._held: list[tuple[int, Sequence[Buffer]]] | None = None  # while we say who we are
        self._renewal: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls, host: str, port: int, client_id: str, limits: Limits, access: Access = OPEN
    ) -> Connection:
        """Connect, negotiate versions, and say who we are.

        Raises OSError, TimeoutError or ProtocolError; SecurityError if it would be for ever.
        """
        loop = asyncio.get_running_loop()
        place = f"{host}:{port}"
        async with asyncio.timeout(limits.connect_ms_max / 1000):
            try:
                _, made = await loop.create_connection(
                    lambda: cls(client_id, limits, access, place), host, port, ssl=access.context
                )
            except (UnicodeError, OverflowError) as error:  # no name, or no port
                raise ConnectionError(f"{place} is no address: {error}") from error
            except ssl.SSLError as error:
                raise refused_tls(place, error) from error
            except (ConnectionResetError, ConnectionAbortedError) as error:
                if access.context is None:
                    raise
                raise cut_in_tls(place) from error
            connection = made
            try:
                await connection._negotiate()
                if access.proves:
                    await connection._enter()
            except BaseException as error:
                refusal = connection._lost
                connection.close()
                if isinstance(error, OSError) and isinstance(refusal, SecurityError):
                    raise refusal from error
                raise
        return connection

    @property
    def is_open(self) -> bool:
        return self._lost is None

    async def call(
        self,
        api: Api,
        fields: Mapping[str, Any],
        timeout_ms: int | None = None,
        *,
        version_max: int | None = None,
        take: Callable[[Any], Any] | None = None,
    ) -> Any:
        """kio's reply to a request, in the newest version that both sides speak, up to a given one.

        take: gives what is wanted of the reply; ProtocolError where it is not what was asked for.

        Raises ConnectionError or TimeoutError where it is not known what became of the request,
        ProtocolError (then the connection is closed), LedgerStreamError if the broker does not
        speak the API at all.
        """
        version = self.version(api)
        if version_max is not None:
            version = min(version, version_max)
        correlation_id = self.take_id()
        frame = messages.write_request(api, version, correlation_id, self.client_id, fields)
        raw = await self.exchange(correlation_id, [frame], timeout_ms)
        return self.read(api, version, raw, take)

    async def ask(self, api: Api, fields: Mapping[str, Any]) -> Any:
        """As `call`, and not held while we say who we are: this is how it is said."""
        version, correlation_id = self.version(api), self.take_id()
        frame = messages.write_request(api, version, correlation_id, self.client_id, fields)
        sent = self._send(correlation_id, [frame])
        return self.read(api, version, await self._answer(correlation_id, sent, None))

    def read(
        self, api: Api, version: int, frame: Buffer, take: Callable[[Any], Any] | None = None
    ) -> Any:
        """kio's reply from a frame. A peer whose reply is none loses its connection."""
        try:
            reply = messages.read_response(api, version, frame)
            return reply if take is None else take(reply)
        except (ProtocolError, DecodeError) as error:
            self._fail(error)
            raise ProtocolError(str(error)) from error

    def version(self, api: Api) -> int:
        """The version in use for an API. Raises LedgerStreamError if the broker has none."""
        version = self.versions.get(api)
        if version is None:
            raise LedgerStreamError(f"The broker does not speak {api.name} as this client does.")
        return version

    def take_id(self) -> int:
        """The correlation id of the next request."""
        self._next_id = (self._next_id + 1) & 0x7FFFFFFF
        return self._next_id

    async def exchange(
        self, correlation_id: int, frame: Sequence[Buffer], timeout_ms: int | None = None
    ) -> Buffer:
        """Send a whole frame; the reply's frame, correlation id in front."""
        return await self._answer(correlation_id, self.start(correlation_id, frame), timeout_ms)

    async def _answer(
        self, correlation_id: int, future: asyncio.Future[Buffer], timeout_ms: int | None
    ) -> Buffer:
        try:
            async with asyncio.timeout((timeout_ms or self.limits.request_ms_max) / 1000):
                return await future
        except TimeoutError as error:
            # a reply that never comes: nothing behind it on this connection can be trusted to
            self._fail(ConnectionError("A request was not answered in time."))
            raise TimeoutError("The broker did not answer in time.") from error
        finally:
            self._waiting.pop(correlation_id, None)

    def start(self, correlation_id: int, frame: Sequence[Buffer]) -> asyncio.Future[Buffer]:
        """Send a whole frame now; a future for the reply's frame."""
        if self._held is None or self._lost is not None:
            return self._send(correlation_id, frame)
        self._held.append((correlation_id, frame))
        future = self._waiting[correlation_id] = asyncio.get_running_loop().create_future()
        return future

    def _send(self, correlation_id: int, frame: Sequence[Buffer]) -> asyncio.Future[Buffer]:
        future = asyncio.get_running_loop().create_future()
        if self._lost is not None or self._transport is None:
            future.set_exception(ConnectionError(f"The connection is closed: {self._lost}"))
            return future
        self._waiting[correlation_id] = future
        self._transport.writelines(frame)
        return future

    def close(self) -> None:
        self._fail(ConnectionError("The connection was closed here."))

    async def _negotiate(self) -> None:
        api = Api.API_VERSIONS
        fields = {"client_software_name": "ledgerstream", "client_software_version": "0.1.0"}
        self.versions[api] = CLIENT_VERSIONS[api][1]
        reply = await self._ask_versions(fields)
        if reply is None:
            self.versions[api] = 0
            reply = await self._ask_versions({})
            if reply is None:
                raise ProtocolError("The peer does not answer ApiVersions as a Kafka broker does.")
        offered = {key.api_key: (key.min_version, key.max_version) for key in reply.api_keys}
        self.features = {
            feature.name: feature.max_version_level
            for feature in getattr(reply, "finalized_features", ())
        }
        for known, (low, high) in CLIENT_VERSIONS.items():
            there = offered.get(int(known))
            if there is not None and max(low, there[0]) <= min(high, there[1]):
                self.versions[known] = min(high, there[1])

    async def _ask_versions(self, fields: Mapping[str, Any]) -> Any:
        """The reply, or None if the version was refused (such a refusal comes in version 0)."""
        version = self.versions[Api.API_VERSIONS]
        correlation_id = self.take_id()
        frame = messages.write_request(
            Api.API_VERSIONS, version, correlation_id, self.client_id, fields
        )
        raw = await self.exchange(correlation_id, [frame])
        if len(raw) >= 6 and struct.unpack_from(">h", raw, 4)[0] == 35:  # UNSUPPORTED_VERSION
            return None
        return self.read(Api.API_VERSIONS, version, raw)

    # -- who we are

    async def _enter(self) -> None:
        self._renew_after(await prove(self, await self.access.conversation()))

    def _renew_after(self, session_ms: int) -> None:
        """A session that ends is renewed before; without one there is nothing to do."""
        if session_ms > 0 and self._lost is None:
            self._renewal = asyncio.ensure_future(self._renew(session_ms))

    async def _renew(self, session_ms: int) -> None:
        await asyncio.sleep(session_ms * random.uniform(*RENEWED_SHARE) / 1000)
        while True:  # if it lasts too long, the broker ends the connection
            try:
                conversation = await self.access.conversation()
                break
            except OSError:
                await asyncio.sleep(self.limits.retry_ms_max / 1000)
            except LedgerStreamError as error:
                self._fail(error)
                return
        sent, self._held = [*self._waiting.values()], []
        try:
            if sent:  # each has a time limit of its own
                await asyncio.wait(sent)
            session_ms = await prove(self, conversation)
        except (LedgerStreamError, OSError) as error:
            self._fail(error)
            return
        held, self._held = self._held, None
        for correlation_id, frame in held:
            if correlation_id in self._waiting and self._transport is not None:
                self._transport.writelines(frame)
        self._renew_after(session_ms)

    # -- asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        room = self._frames.buffer()
        if not self._heard:
            self._room = room
        return room

    def buffer_updated(self, nbytes: int) -> None:
        if self._room is not None:
            begin, self._room, self._heard = bytes(self._room[:2]), None, True
            if begin == _TLS_ALERT:
                self._fail(speaks_tls(self.place))
                return
        try:
            for frame in self._frames.take(nbytes):
                if len(frame) < 4:
                    raise ProtocolError("A reply without a correlation id.")
                future = self._waiting.pop(_I32.unpack_from(frame)[0], None)
                if future is not None and not future.done():
                    # a small frame lies in memory that is used again, a large one is its own
                    large = len(frame) > BUFFER_BYTES
                    future.set_result(frame if large else bytes(frame))
        except ProtocolError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ssl.SSLError):
            self._fail(refused_tls(self.place, exc))
            return
        closed = f"The broker closed the connection{f': {exc}' if exc else ''}"
        if not self._heard and self.access.context is None:
            closed += " and has said nothing: if it is an SSL listener, give security_protocol SSL"
        elif not self.access.proves and self._next_id == FIRST_REQUEST and self._waiting:
            closed += " at the first request: if it is a SASL listener, give security_protocol "
            closed += "SASL_PLAINTEXT" if self.access.context is None else "SASL_SSL"
        self._fail(ConnectionError(f"{closed}."))

    def _fail(self, error: Exception) -> None:
        if self._lost is None:
            self._lost = error
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(ConnectionError(str(self._lost)))
                future.exception()  # whoever waits still gets it; nobody waiting is no news


def only(entries: Sequence[T], what: str) -> T:
    """The entry of a reply to a request with one. Raises ProtocolError."""
    if len(entries) != 1:
        raise ProtocolError(f"{what} was asked for, and {len(entries)} came.")
    return entries[0]
