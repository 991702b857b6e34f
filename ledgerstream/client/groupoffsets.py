"""How far a group has come: its committed offsets, read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from kio.schema.errors import ErrorCode

from ledgerstream.client.cluster import Cluster
from ledgerstream.client.connection import only
from ledgerstream.client.coordinator import Coordinator, Kind
from ledgerstream.client.errors import check
from ledgerstream.errors import ProtocolError
from ledgerstream.wire.versions import Api

TopicPartition = tuple[str, int]


class GroupMetadata(NamedTuple):
    """In whose name offsets are committed: a member of a group, or nobody in particular."""

    group: str
    member_id: str = ""
    generation: int = -1  # of a next-generation group (KIP-848): the member's epoch
    instance_id: str | None = None


def offset_topics(offsets: Mapping[TopicPartition, int]) -> list[dict[str, Any]]:
    """As OffsetCommit and TxnOffsetCommit have them."""
    topics: dict[str, list[dict[str, Any]]] = {}
    for (topic, partition), offset in offsets.items():
        topics.setdefault(topic, []).append({
            "partition_index": partition,
            "committed_offset": offset,
            "committed_leader_epoch": -1,
            "committed_metadata": "",
        })  # fmt: skip
    return [{"name": name, "partitions": partitions} for name, partitions in topics.items()]


def answers_to(offsets: Mapping[TopicPartition, int]) -> Callable[[Any], Any]:
    """A reply with an answer for each offset: none that is silently not committed."""

    def take(reply: Any) -> Any:
        told = {
            (topic.name, part.partition_index)
            for topic in reply.topics
            for part in topic.partitions
        }
        if not offsets.keys() <= told:
            raise ProtocolError("Offsets were left out of the answer to their commit.")
        return reply

    return take


def worst_of_offsets(reply: Any) -> ErrorCode:
    """The first error of any partition."""
    codes: Iterator[ErrorCode] = (
        part.error_code for topic in reply.topics for part in topic.partitions
    )
    return next((code for code in codes if code is not ErrorCode.none), ErrorCode.none)


class GroupOffsets:
    """Of one group."""

    def __init__(self, cluster: Cluster, group: str) -> None:
        self.cluster, self.group = cluster, group
        self.coordinator = Coordinator(cluster, Kind.GROUP, group)

    async def committed(
        self,
        places: Iterable[TopicPartition],
        member: GroupMetadata | None = None,
        *,
        limit_ms: int | None = None,
    ) -> dict[TopicPartition, int]:
        """The next offset to be read of each place that has one.

        What an open transaction is about to change is waited for (KIP-447); DeliveryTimeout after
        `limit_ms`, without it the delivery time limit.
        """
        topics: dict[str, list[int]] = {}
        for topic, partition in places:
            topics.setdefault(topic, []).append(partition)
        wanted: dict[str, Any] = {
            "group_id": self.group,
            "topics": [
                {"name": name, "partition_indexes": indexes} for name, indexes in topics.items()
            ],
        }
        if member is not None and member.generation >= 0:
            wanted |= {"member_id": member.member_id, "member_epoch": member.generation}

        async def ask() -> dict[TopicPartition, int]:
            group = await self.coordinator.ask(
                Api.OFFSET_FETCH,
                {"groups": [wanted], "require_stable": True},
                lambda group: group.error_code,
                take=lambda reply: only(reply.groups, "A group"),
            )
            found = {}
            for topic in group.topics:
                for part in topic.partitions:
                    check(part.error_code, f"Offset of {self.group!r} in {topic.name}")
                    if part.committed_offset >= 0:
                        found[topic.name, part.partition_index] = part.committed_offset
            return found

        what = f"offsets of {self.group!r}"
        return await self.cluster.retrying(what, ask, limit_ms=limit_ms)

    async def commit(
        self, offsets: Mapping[TopicPartition, int], member: GroupMetadata | None = None
    ) -> None:
        """Raises KafkaError where the group no longer has the member, or it has missed a change."""
        if not offsets:
            return
        who = member or GroupMetadata(self.group)
        fields = {
            "group_id": self.group,
            "generation_id_or_member_epoch": who.generation,
            "member_id": who.member_id,
            "group_instance_id": who.instance_id,
            "topics": offset_topics(offsets),
        }

        async def ask() -> None:
            await self.coordinator.ask(
                Api.OFFSET_COMMIT, fields, worst_of_offsets, take=answers_to(offsets)
            )

        await self.cluster.retrying(f"offsets of {self.group!r}", ask)
