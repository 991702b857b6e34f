"""A broker that answers as a test tells it to: node 1, one topic `t` with one partition."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any, Self
from uuid import UUID

from kio.schema.errors import ErrorCode

from ledgerstream.wire import messages
from ledgerstream.wire.hot import read_produce
from ledgerstream.wire.versions import Api

VERSIONS = {
    Api.PRODUCE: 8, Api.FETCH: 11, Api.LIST_OFFSETS: 5, Api.METADATA: 12, Api.API_VERSIONS: 3,
    Api.OFFSET_COMMIT: 8, Api.OFFSET_FETCH: 8, Api.FIND_COORDINATOR: 4, Api.CREATE_TOPICS: 7,
    Api.INIT_PRODUCER_ID: 4,
}  # fmt: skip
Answer = Callable[[Any], Any]  # a request → the reply's fields, or bytes that stand for its body


class ScriptedBroker:
    """`answers[api]` is called with each request of it; `asked` counts them."""

    def __init__(self) -> None:
        self.asked: Counter[Api] = Counter()
        self.answers: dict[Api, Answer] = {
            Api.API_VERSIONS: self._versions,
            Api.METADATA: lambda asked: self.metadata([topic.name for topic in asked.topics]),
            Api.INIT_PRODUCER_ID: lambda _: {
                "throttle_time": 0, "error_code": 0, "producer_id": 1_000, "producer_epoch": 0,
            },
            Api.FIND_COORDINATOR: lambda asked: {
                "throttle_time": 0,
                "coordinators": [
                    {"key": key, "node_id": 1, "host": "127.0.0.1", "port": self.port,
                     "error_code": 0, "error_message": None}
                    for key in asked.coordinator_keys
                ],
            },
        }  # fmt: skip
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                (size,) = struct.unpack(">i", await reader.readexactly(4))
                writer.write(self._answer(await reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    def _answer(self, frame: bytes) -> bytes:
        key, version, correlation_id = messages.peek_api(frame)
        api, flexible = Api(key), messages.request_type(key, version).__flexible__
        header = messages.read_request_header(frame, flexible)
        if api is Api.PRODUCE:
            asked: Any = read_produce(memoryview(frame), header.body_at, version)
        else:
            asked = messages.read_request(header, frame)
        self.asked[api] += 1
        said = self.answers[api](asked)
        if isinstance(said, bytes):
            return struct.pack(">ii", 4 + len(said), correlation_id) + said
        return messages.write_response(key, version, correlation_id, said)

    def _versions(self, _: Any) -> Any:
        keys = [
            {"api_key": int(api), "min_version": 0, "max_version": version}
            for api, version in VERSIONS.items()
        ]
        return {
            "error_code": ErrorCode.none, "api_keys": keys, "throttle_time": 0,
            "supported_features": [], "finalized_features_epoch": 0, "finalized_features": [],
            "zk_migration_ready": False,
        }  # fmt: skip

    def metadata(self, names: list[str]) -> dict[str, Any]:
        partition = {
            "error_code": 0, "partition_index": 0, "leader_id": 1, "leader_epoch": 0,
            "replica_nodes": [1], "isr_nodes": [1], "offline_replicas": [],
        }  # fmt: skip
        return {
            "throttle_time": 0,
            "brokers": [{"node_id": 1, "host": "127.0.0.1", "port": self.port, "rack": None}],
            "cluster_id": "scripted",
            "controller_id": 1,
            "topics": [
                {"error_code": 0, "name": name, "topic_id": UUID(int=7), "is_internal": False,
                 "partitions": [partition], "topic_authorized_operations": -1}
                for name in names
            ],
            "cluster_authorized_operations": -1,
        }  # fmt: skip


def produced(offset: int) -> dict[str, Any]:
    """A Produce reply."""
    part = {
        "index": 0, "error_code": 0, "base_offset": offset, "log_append_time": None,
        "log_start_offset": 0, "record_errors": [], "error_message": None,
    }  # fmt: skip
    return {"throttle_time": 0, "responses": [{"name": "t", "partition_responses": [part]}]}


def fetched(records: bytes) -> dict[str, Any]:
    """A Fetch reply."""
    part = {
        "partition_index": 0, "error_code": 0, "high_watermark": 9, "last_stable_offset": 9,
        "log_start_offset": 0, "aborted_transactions": [], "preferred_read_replica": -1,
        "records": records,
    }  # fmt: skip
    topics = [{"topic": "t", "partitions": [part]}]
    return {"throttle_time": 0, "error_code": 0, "session_id": 0, "responses": topics}
