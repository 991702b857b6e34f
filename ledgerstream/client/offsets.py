"""Offsets of partitions by time, and where their logs begin and end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ledgerstream.client.cluster import Cluster
from ledgerstream.client.connection import only
from ledgerstream.client.errors import check
from ledgerstream.errors import ProtocolError
from ledgerstream.wire.versions import Api

EARLIEST = -2
LATEST = -1


async def list_offsets(
    cluster: Cluster, topic: str, times: Mapping[int, int], *, committed: bool = True
) -> dict[int, int]:
    """Offset of each partition at EARLIEST, LATEST, or the first record at or after a time.

    Times in ms. A time after the last record gives the end.
    """
    found: dict[int, int] = {}

    async def ask(broker: int, wanted: Mapping[int, int]) -> None:
        fields = {
            "replica_id": -1,
            "isolation_level": 1 if committed else 0,
            "topics": [{
                "name": topic,
                "partitions": [
                    {"partition_index": p, "current_leader_epoch": -1, "timestamp": t}
                    for p, t in wanted.items()
                ],
            }],
        }  # fmt: skip

        def take(reply: Any) -> Any:
            parts = only(reply.topics, "A topic").partitions
            if {part.partition_index for part in parts} != wanted.keys():
                raise ProtocolError("Offsets of other partitions came than were asked for.")
            return parts

        for part in await cluster.call(Api.LIST_OFFSETS, fields, broker=broker, take=take):
            check(part.error_code, f"{topic}-{part.partition_index}")
            found[part.partition_index] = part.offset

    async def ask_all() -> None:
        by_broker: dict[int, dict[int, int]] = {}
        for partition, when in times.items():
            broker = await cluster.leader(topic, partition)
            by_broker.setdefault(broker, {})[partition] = when
        for broker, wanted in by_broker.items():
            await ask(broker, wanted)

    await cluster.retrying(f"offsets of {topic!r}", ask_all, refresh=topic)
    late = {p: LATEST for p, offset in found.items() if offset < 0 and times[p] != LATEST}
    if late:
        found.update(await list_offsets(cluster, topic, late, committed=committed))
    return found
