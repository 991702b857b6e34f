"""kio's messages by API and version: read a request or reply, write one from plain values.

Writing takes nested dicts and lists with the field names of the newest version. Fields that a
version does not have are left out, those that are absent get the schema's default, and times are
plain milliseconds, so that one handler serves every version.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import io
import struct
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from kio.index import load_request_schema, load_response_schema
from kio.schema.errors import ErrorCode
from kio.serial import entity_reader, entity_writer
from kio.serial.errors import SerialError

from ledgerstream.errors import DecodeError, ProtocolError
from ledgerstream.wire.batches import Buffer, read_unsigned_varint
from ledgerstream.wire.skim import check_lengths
from ledgerstream.wire.versions import Api

# what kio's native parser raises for bytes that are not the message
BAD_BYTES = (
    SerialError, ValueError, LookupError, OverflowError, EOFError, TypeError, MemoryError,
    DecodeError,
)  # fmt: skip

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_HEADER = struct.Struct(">hhih")
_I32 = struct.Struct(">i")


class RequestHeader(NamedTuple):
    api_key: int
    version: int
    correlation_id: int
    client_id: str | None
    body_at: int  # where the message begins in the frame


@cache
def request_type(api: int, version: int) -> Any:
    return load_request_schema(api, version)


@cache
def response_type(api: int, version: int) -> Any:
    return load_response_schema(api, version)


@cache
def _reader(schema: Any) -> Any:
    return entity_reader(schema)


@cache
def _writer(schema: Any) -> Any:
    return entity_writer(schema)


def peek_api(frame: Buffer) -> tuple[int, int, int]:
    """(api key, version, correlation id) of a request. Raises ProtocolError."""
    if len(frame) < _HEADER.size:
        raise ProtocolError(f"A request of {len(frame)} bytes is shorter than its header.")
    key, version, correlation_id, _ = _HEADER.unpack_from(frame)
    return key, version, correlation_id


def read_request_header(frame: Buffer, flexible: bool) -> RequestHeader:
    """The header v1 or v2 (flexible) of a request. Raises ProtocolError."""
    key, version, correlation_id = peek_api(frame)
    (size,) = struct.unpack_from(">h", frame, 8)
    at = _HEADER.size + max(size, 0)
    if at > len(frame):
        raise ProtocolError("A request ends inside its client id.")
    try:
        client_id = bytes(frame[_HEADER.size : at]).decode() if size >= 0 else None
        if flexible:
            at = skip_tags(frame, at)
    except BAD_BYTES as error:
        raise ProtocolError(f"A request's header is malformed: {error}") from error
    return RequestHeader(key, version, correlation_id, client_id, at)


def skip_tags(frame: Buffer, at: int) -> int:
    """The position behind the tagged fields at `at` (KIP-482), whatever they are."""
    count, at = read_unsigned_varint(frame, at)
    for _ in range(count):
        _, at = read_unsigned_varint(frame, at)
        size, at = read_unsigned_varint(frame, at)
        at += size
        if at > len(frame):
            raise ProtocolError("A message ends inside its tagged fields.")
    return at


def read_request(header: RequestHeader, frame: Buffer) -> Any:
    """kio's message. Raises ProtocolError for bytes that are not it."""
    return _read(request_type(header.api_key, header.version), frame, header.body_at)


def read_response(api: int, version: int, frame: Buffer) -> Any:
    """kio's message from a reply's frame (after its correlation id was seen).

    Raises ProtocolError for bytes that are not it.
    """
    schema = response_type(api, version)
    at = _I32.size
    if schema.__header_schema__.__flexible__:
        at = skip_tags(frame, at)
    return _read(schema, frame, at)


def _read(schema: Any, frame: Buffer, at: int) -> Any:
    try:
        check_lengths(schema, frame, at)
        message = _reader(schema)(frame, at)[0]
    except BAD_BYTES as error:
        raise ProtocolError(
            f"A {schema.__name__} v{schema.__version__} is malformed: {error!r}"
        ) from error
    _check_arrays(message)
    return message


def _check_arrays(entity: Any) -> None:
    """kio lets null pass for any array; only where the schema allows it is it meant."""
    schema: Any = type(entity)
    for name, nullable, nested, single in _arrays(schema):
        items = getattr(entity, name)
        if items is None:
            if not nullable:
                raise ProtocolError(f"{schema.__name__} has no {name}.")
        elif nested:
            for item in (items,) if single else items:
                _check_arrays(item)


@cache
def _arrays(schema: Any) -> tuple[tuple[str, bool, bool, bool], ...]:
    """(field, may it be null, have its elements arrays, is it no array but such an element) of each
    array of an entity, and of each entity in it that has arrays."""
    found = []
    for name, hint in typing.get_type_hints(schema).items():
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        nullable = type(None) in parts
        for part in parts:
            if typing.get_origin(part) is tuple:
                element: Any = typing.get_args(part)[0]
                nested = hasattr(element, "__type__") and bool(_arrays(element))
                found.append((name, nullable, nested, False))
            elif hasattr(part, "__type__") and _arrays(part):
                found.append((name, nullable, True, True))
    return tuple(found)


class _Bounded(io.BytesIO):
    """Takes so many bytes. Raises ProtocolError for more, before there is memory for them."""

    def __init__(self, bytes_max: int) -> None:
        super().__init__()
        self._bytes_max = self._left = bytes_max

    def write(self, data: Any) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise ProtocolError(f"A reply has more than {self._bytes_max:,} bytes.")
        return super().write(data)


def write_response(
    api: int,
    version: int,
    correlation_id: int,
    fields: Mapping[str, Any],
    bytes_max: int | None = None,
) -> bytes:
    """A whole frame, length in front. Raises ProtocolError where it has more than `bytes_max`."""
    schema = response_type(api, version)
    out = io.BytesIO() if bytes_max is None else _Bounded(bytes_max)
    out.write(b"\x00\x00\x00\x00" + _I32.pack(correlation_id))
    if schema.__header_schema__.__flexible__:
        out.write(b"\x00")
    return _finish(out, schema, fields)


def write_request(
    api: int, version: int, correlation_id: int, client_id: str, fields: Mapping[str, Any]
) -> bytes:
    """A whole frame, length in front."""
    schema = request_type(api, version)
    name = client_id.encode()
    out = io.BytesIO()
    out.write(b"\x00\x00\x00\x00" + _HEADER.pack(api, version, correlation_id, len(name)) + name)
    if schema.__flexible__:
        out.write(b"\x00")
    return _finish(out, schema, fields)


def _finish(out: io.BytesIO, schema: Any, fields: Mapping[str, Any]) -> bytes:
    _writer(schema)(out, build(schema, fields))
    size = out.tell() - 4
    out.seek(0)
    out.write(_I32.pack(size))
    return out.getvalue()


def build(schema: Any, fields: Mapping[str, Any]) -> Any:
    """An entity of `schema` from plain values."""
    return schema(**{
        name: convert(fields[name]) if convert else fields[name]
        for name, convert in _shape(schema)
        if name in fields
    })  # fmt: skip


@cache
def _shape(schema: Any) -> tuple[tuple[str, Any], ...]:
    """(field, conversion or None) of each field of an entity."""
    hints = typing.get_type_hints(schema)
    return tuple((f.name, _conversion(hints[f.name], f)) for f in dataclasses.fields(schema))


def _conversion(hint: Any, field: dataclasses.Field[Any]) -> Any:
    if field.metadata.get("kafka_type") in ("timedelta_i32", "timedelta_i64"):
        return lambda ms: dt.timedelta(milliseconds=ms)
    if field.metadata.get("kafka_type") == "datetime_i64":
        return _optional(lambda ms: _EPOCH + dt.timedelta(milliseconds=ms))
    if field.metadata.get("kafka_type") == "error_code":
        return ErrorCode
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return _optional(_conversion(inner[0], field))
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(element):
            return lambda items: tuple(build(element, item) for item in items)
        return tuple
    if dataclasses.is_dataclass(hint):
        return lambda item: build(hint, item)
    return None


def _optional(convert: Any) -> Any:
    if convert is None:
        return None
    return lambda value: None if value is None else convert(value)


def ms(duration: dt.timedelta) -> int:
    """Whole milliseconds of a duration as kio reads it."""
    return duration // dt.timedelta(milliseconds=1)


def api_name(key: int) -> str:
    return Api(key).name if key in Api._value2member_map_ else f"API {key}"
