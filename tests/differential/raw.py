"""Raw requests over a socket: any API and version, well-formed or not; replies as plain data."""

from __future__ import annotations

import dataclasses
import datetime as dt
import socket
import struct
from collections.abc import Mapping
from typing import Any, Self

from kio.schema.errors import ErrorCode

from ledgerstream.wire import messages


class Raw:
    """One connection; every reply is waited for at most a few seconds."""

    def __init__(self, address: str, timeout: float = 20) -> None:
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout)
        self.correlation_id = 0
        self.client_id = "raw"

    def ask(self, api: int, version: int, **fields: Any) -> Any:
        """The reply as dicts, lists and numbers; "closed" if the connection was closed instead."""
        self.send(api, version, **fields)
        return self.reply(api, version)

    def send(self, api: int, version: int, **fields: Any) -> None:
        self.correlation_id += 1
        self.send_bytes(
            messages.write_request(api, version, self.correlation_id, self.client_id, fields)
        )

    def send_bytes(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except ConnectionError:
            pass  # the reply will say so

    def reply(self, api: int, version: int) -> Any:
        frame = self.frame()
        if frame is None:
            return "closed"
        return plain(messages.read_response(api, version, frame))

    def frame(self) -> bytes | None:
        """The next frame without its length; None if the connection was closed."""
        head = self._exactly(4)
        if head is None:
            return None
        return self._exactly(struct.unpack(">i", head)[0])

    def _exactly(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            try:
                part = self.socket.recv(size - len(data))
            except ConnectionError:
                return None
            if not part:
                return None
            data += part
        return data

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def plain(value: Any) -> Any:
    """kio's entities as dicts, so that replies can be compared and printed."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, ErrorCode):
        return value.name
    if isinstance(value, dt.timedelta):
        return messages.ms(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value
