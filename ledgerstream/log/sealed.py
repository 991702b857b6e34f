"""Our own small files: a tag with the format's version, a CRC, and msgpack."""

from __future__ import annotations

import struct
from typing import Any, TypeVar

import msgspec
from crc32c import crc32c

from ledgerstream.errors import CorruptError

T = TypeVar("T")
_HEADER = struct.Struct(">8sI")


def seal(tag: bytes, content: Any) -> bytes:
    """`tag` is eight bytes, the last of them the version of the content's layout."""
    payload = msgspec.msgpack.encode(content)
    return _HEADER.pack(tag, crc32c(payload)) + payload


def unseal(tag: bytes, data: bytes, content: type[T]) -> T:
    """What was sealed. CorruptError if it is torn, damaged, or of another kind or version."""
    try:
        found, crc = _HEADER.unpack_from(data)
        if found == tag and crc == crc32c(memoryview(data)[_HEADER.size :]):
            return msgspec.msgpack.decode(memoryview(data)[_HEADER.size :], type=content)
    except (struct.error, msgspec.MsgspecError) as error:
        raise CorruptError(f"A file does not hold what {tag!r} says: {error}") from error
    raise CorruptError(f"A file is not a whole {tag!r}.")
