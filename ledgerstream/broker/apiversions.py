"""ApiVersions: what is spoken here. Clients switch features on by what they see in it."""

from __future__ import annotations

import struct
from functools import cache
from typing import TYPE_CHECKING, Any

from kio.schema.errors import ErrorCode

from ledgerstream.broker.server import Connection, Exchange
from ledgerstream.wire import messages
from ledgerstream.wire.messages import RequestHeader
from ledgerstream.wire.versions import BROKER_VERSIONS, Api

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

_HEAD, _SIZE_BYTES = struct.Struct(">ii"), 4  # a reply's length, of what follows it, and its id
# features by their level, and what each takes: clients switch over by the feature alone
TRANSACTION_VERSION, GROUP_VERSION = "transaction.version", "group.version"
_NEEDS: dict[tuple[str, int], dict[Api, int]] = {
    # each transaction with an epoch of its own
    (TRANSACTION_VERSION, 2): {Api.PRODUCE: 12, Api.END_TXN: 5, Api.TXN_OFFSET_COMMIT: 5},
    # next-generation groups
    (GROUP_VERSION, 1): {
        Api.CONSUMER_GROUP_HEARTBEAT: 1,
        Api.CONSUMER_GROUP_DESCRIBE: 1,
        Api.OFFSET_COMMIT: 9,
        Api.OFFSET_FETCH: 9,
    },
}
_FEATURES = [
    feature
    for feature, needs in _NEEDS.items()
    if all(BROKER_VERSIONS[api][1] >= version for api, version in needs.items())
]
_FINALIZED = [
    {"name": name, "max_version_level": level, "min_version_level": level}
    for name, level in _FEATURES
]
_SUPPORTED = [{"name": name, "min_version": 0, "max_version": level} for name, level in _FEATURES]
_KEYS = [
    {"api_key": int(api), "min_version": low, "max_version": high}
    for api, (low, high) in sorted(BROKER_VERSIONS.items())
]


def handle(node: Node, exchange: Exchange) -> None:
    header, error = exchange.header, ErrorCode.none
    if header.version >= 3 and not _plausible(exchange.message):
        error = ErrorCode.invalid_request
    content = _content(header.version, error)
    head = _HEAD.pack(_HEAD.size - _SIZE_BYTES + len(content), header.correlation_id)
    exchange.send((head, content))


@cache
def _content(version: int, error: ErrorCode) -> bytes:
    """All of the reply but its length and correlation id. It is the same for every client, and
    each asks for it first: a thousand that come at once wait for nothing else."""
    return messages.write_response(Api.API_VERSIONS, version, 0, _fields(error))[_HEAD.size :]


def answer_unsupported(connection: Connection, correlation_id: int, size: int) -> None:
    """A version that is not spoken here is answered in version 0 (KIP-511)."""
    header = RequestHeader(Api.API_VERSIONS, 0, correlation_id, None, 0)
    exchange = Exchange(connection, header, None, size)
    connection.push(exchange)
    exchange.answer(**_fields(ErrorCode.unsupported_version))


def _plausible(request: Any) -> bool:
    """KIP-511: a client's software name and version are letters, digits, '.' and '-'."""
    return all(
        text and text[0].isalnum() and text[-1].isalnum()
        and all(c.isascii() and (c.isalnum() or c in ".-") for c in text)
        for text in (request.client_software_name, request.client_software_version)
    )  # fmt: skip


def _fields(error: ErrorCode) -> dict[str, Any]:
    keys = _KEYS if error is not ErrorCode.invalid_request else []
    if error is ErrorCode.unsupported_version:
        keys = [key for key in _KEYS if key["api_key"] == Api.API_VERSIONS]
    return {
        "error_code": error,
        "api_keys": keys,
        "throttle_time": 0,
        "supported_features": _SUPPORTED,
        "finalized_features_epoch": 0,
        "finalized_features": _FINALIZED,
    }
