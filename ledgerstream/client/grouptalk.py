"""A member's conversation with its group's coordinator: one request at a time, and its answer.

`ModernTalk` is that of a next-generation group (KIP-848), `ClassicTalk` of a classic one. What is
to be said and what an answer means is decided in `member.py` and `classicmember.py`.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar
from uuid import UUID

from kio.schema.errors import ErrorCode

from ledgerstream.client.classicmember import ClassicMember, Peer, Phase, TopicPartition, ranges
from ledgerstream.client.cluster import TRANSPORT_ERRORS, Cluster
from ledgerstream.client.connection import Connection
from ledgerstream.client.coordinator import Coordinator, Kind
from ledgerstream.client.groupoffsets import GroupMetadata
from ledgerstream.client.member import Holding, Member, Place
from ledgerstream.errors import KafkaError
from ledgerstream.wire.consumerprotocol import (
    Subscription,
    read_assignment,
    read_subscription,
    write_assignment,
    write_subscription,
)
from ledgerstream.wire.messages import ms
from ledgerstream.wire.versions import Api

CONSUMER, RANGE = "consumer", "range"  # the kind of protocol, and the assignor that we know
PROTOCOL_VERSION = 1  # of what classic members say to each other
P = TypeVar("P", Place, TopicPartition)

# it is not, or no longer, the member that it takes itself for
_FENCED = frozenset({
    code.value for code in (
        ErrorCode.fenced_member_epoch, ErrorCode.unknown_member_id, ErrorCode.group_id_not_found,
    )
})  # fmt: skip


class OwnConnection(Coordinator):
    """A group's coordinator, over a connection where nothing else waits: a JoinGroup is answered
    late, and what is asked behind it later still."""

    def __init__(self, cluster: Cluster, group: str) -> None:
        super().__init__(cluster, Kind.GROUP, group)
        self._own: tuple[int, Connection] | None = None

    async def connection(self) -> Connection:
        broker = await self.broker()
        if self._own is not None and self._own[0] == broker and self._own[1].is_open:
            return self._own[1]
        self.close()
        try:
            opened = await self.cluster.dedicated(broker)
        except TRANSPORT_ERRORS:
            self._broker = None
            raise
        self._own = broker, opened
        return opened

    def close(self) -> None:
        if self._own is not None:
            self._own[1].close()
            self._own = None


class Talk(ABC, Generic[P]):
    """`turn` says what is due; `who` is in whose name offsets are committed, once it has joined."""

    def __init__(self, cluster: Cluster, group: str, session_ms: int, rebalance_ms: int) -> None:
        self.cluster, self.group = cluster, group
        self.session_ms, self.rebalance_ms = session_ms, rebalance_ms
        self.coordinator = OwnConnection(cluster, group)
        self.who: GroupMetadata | None = None
        self.heard_at = (
            -1.0
        )  # when the last request was sent that was answered, on the loop's clock

    member: Holding[P]

    @property
    @abstractmethod
    def urgent(self) -> bool:
        """Whether there is something to say before the next heartbeat is due."""

    @abstractmethod
    async def turn(self) -> int | None:
        """Ask what is due, and hear the answer: how long it has time then, in ms; None: until it
        is `urgent`. Raises as `Coordinator.ask` does."""

    @abstractmethod
    def missed(self) -> None:
        """A turn has failed."""

    @abstractmethod
    def expire(self) -> None:
        """It is no member any more, whoever has decided that."""

    @abstractmethod
    def subscribe(self, topics: frozenset[str], regex: str | None) -> None:
        """To others from now on."""

    @abstractmethod
    async def named(self, places: Iterable[P]) -> dict[P, TopicPartition]:
        """Those whose names are known."""

    @abstractmethod
    async def leave(self) -> None:
        """Say goodbye, once."""

    async def _ask(self, api: Api, fields: Mapping[str, Any], timeout_ms: int | None = None) -> Any:
        """One request that is part of the session, and is not waited for beyond its end."""
        asked_at = asyncio.get_running_loop().time()
        within_ms = timeout_ms or min(self.cluster.limits.request_ms_max, self.session_ms // 3)
        left_ms = self.session_ms - int((asked_at - self.heard_at) * 1000)
        if 0 < left_ms < within_ms:
            within_ms = left_ms
        reply = await self.coordinator.ask(api, fields, _error_code, timeout_ms=within_ms)
        self.heard_at = asked_at
        return reply


class ModernTalk(Talk[Place]):
    def __init__(
        self, cluster: Cluster, group: str, member: Member, session_ms: int, rebalance_ms: int
    ) -> None:
        super().__init__(cluster, group, session_ms, rebalance_ms)
        self.member: Member = member
        self._names: dict[UUID, str] = {}
        self._kept_out_since: float | None = None  # by whoever had our instance id before

    @property
    def urgent(self) -> bool:
        return self.member.urgent

    async def turn(self) -> int | None:
        member = self.member
        beat = member.beat()
        if beat is None:
            return None
        fields = {
            "group_id": self.group,
            "member_id": beat.member_id,
            "member_epoch": beat.epoch,
            "instance_id": member.instance_id,
            "rebalance_timeout": beat.rebalance_ms,
            "subscribed_topic_names": None if beat.topics is None else sorted(beat.topics),
            "subscribed_topic_regex": beat.regex,
            "topic_partitions": None if beat.owned is None else _by_topic(beat.owned),
        }
        try:
            reply = await self._ask(Api.CONSUMER_GROUP_HEARTBEAT, fields)
        except KafkaError as error:
            if error.code in _FENCED:
                member.fenced()
                return 0
            if error.code == ErrorCode.unreleased_instance_id.value:
                error.retriable = self._may_wait()
            raise
        self._kept_out_since = None
        given = reply.assignment
        member.told(
            beat,
            reply.member_epoch,
            None if given is None else frozenset(
                (topic.topic_id, index)
                for topic in given.topic_partitions for index in topic.partitions
            ),
        )  # fmt: skip
        self.who = GroupMetadata(self.group, member.member_id, member.epoch, member.instance_id)
        return 0 if member.urgent else ms(reply.heartbeat_interval)

    def _may_wait(self) -> bool:
        """A static member that was killed keeps its place until its session has passed."""
        now = asyncio.get_running_loop().time()
        if self._kept_out_since is None:
            self._kept_out_since = now
        return (now - self._kept_out_since) * 1000 < 2 * self.session_ms

    def missed(self) -> None:
        self.member.missed()

    def expire(self) -> None:
        self.member.fenced()

    def subscribe(self, topics: frozenset[str], regex: str | None) -> None:
        self.member.subscribe(topics, regex)

    async def named(self, places: Iterable[Place]) -> dict[Place, TopicPartition]:
        places = list(places)
        unknown = {topic for topic, _ in places} - self._names.keys()
        if unknown:
            for known in await self.cluster.all_topics():
                if known.topic_id in unknown:
                    self._names[known.topic_id] = known.name
        return {(t, i): (self._names[t], i) for t, i in places if t in self._names}

    async def leave(self) -> None:
        fields = {
            "group_id": self.group,
            "member_id": self.member.member_id,
            "member_epoch": self.member.leave_epoch,
            "instance_id": self.member.instance_id,
            "topic_partitions": None,
        }
        await self._ask(
            Api.CONSUMER_GROUP_HEARTBEAT, fields, self.cluster.limits.member_leave_ms_max
        )


class ClassicTalk(Talk[TopicPartition]):
    def __init__(
        self,
        cluster: Cluster,
        group: str,
        member: ClassicMember,
        session_ms: int,
        rebalance_ms: int,
        regex: str | None = None,
    ) -> None:
        super().__init__(cluster, group, session_ms, rebalance_ms)
        self.member: ClassicMember = member
        self.regex = regex
        self._counts: dict[str, int] = {}  # partitions of each topic, when the leader assigned
        self._looked_at = -1.0

    @property
    def urgent(self) -> bool:
        return self.member.urgent

    async def turn(self) -> int | None:
        wish = self.member.ask()
        if wish is None:
            return None
        try:
            match wish:
                case Phase.JOIN:
                    await self._join()
                case Phase.SYNC:
                    await self._sync()
                case Phase.BEAT:
                    await self._beat()
        except KafkaError as error:
            match ErrorCode(error.code):
                case ErrorCode.rebalance_in_progress:
                    self.member.rejoin()
                    self.heard_at = asyncio.get_running_loop().time()
                case ErrorCode.unknown_member_id:
                    self.member.lost(forgotten=True)
                case ErrorCode.illegal_generation:
                    self.member.lost(forgotten=False)
                case _:
                    raise
        return 0 if self.member.urgent else self._heartbeat_ms

    @property
    def _heartbeat_ms(self) -> int:
        return min(self.cluster.limits.member_heartbeat_ms, self.session_ms // 3)

    async def _join(self) -> None:
        member = self.member
        if self.regex is not None:
            member.topics = await self._matched(self.regex)
        said = member.topics
        metadata = write_subscription(Subscription(said), PROTOCOL_VERSION)
        fields = {
            "group_id": self.group,
            "session_timeout": self.session_ms,
            "rebalance_timeout": self.rebalance_ms,
            "member_id": member.member_id,
            "group_instance_id": member.instance_id,
            "protocol_type": CONSUMER,
            "protocols": [{"name": RANGE, "metadata": metadata}],
            "reason": None,
        }
        # answered when all members have come, or have had their time
        within_ms = self.rebalance_ms + self.cluster.limits.member_leave_ms_max
        reply = await self.coordinator.ask(
            Api.JOIN_GROUP, fields, _error_but_for_id, timeout_ms=within_ms
        )
        self.heard_at = asyncio.get_running_loop().time()
        if reply.error_code is ErrorCode.member_id_required:
            member.told_id(reply.member_id)
            return
        peers = tuple(
            Peer(each.member_id, each.group_instance_id, read_subscription(each.metadata).topics)
            for each in reply.members
        )
        if reply.leader != reply.member_id or getattr(reply, "skip_assignment", False):
            peers = ()
        member.told_joined(reply.generation_id, reply.member_id, peers, said)

    async def _sync(self) -> None:
        member = self.member
        assignments: dict[str, dict[str, frozenset[int]]] = {}
        if member.peers:
            self._counts = await self._partitions()
            assignments = ranges(member.peers, self._counts)
        fields = {
            **self._as_member(),
            "protocol_type": CONSUMER,
            "protocol_name": RANGE,
            "assignments": [
                {"member_id": name, "assignment": write_assignment(named, PROTOCOL_VERSION)}
                for name, named in assignments.items()
            ],
        }
        reply = await self._ask(Api.SYNC_GROUP, fields, self.rebalance_ms)
        self.heard_at = self._looked_at = asyncio.get_running_loop().time()
        named = read_assignment(bytes(reply.assignment))
        self.who = GroupMetadata(
            self.group, member.member_id, member.generation, member.instance_id
        )  # fmt: skip
        member.told_synced(frozenset((topic, i) for topic, found in named.items() for i in found))

    async def _beat(self) -> None:
        await self._ask(Api.HEARTBEAT, self._as_member())
        now = asyncio.get_running_loop().time()
        if (now - self._looked_at) * 1000 >= self.cluster.limits.metadata_age_ms_max:
            self._looked_at = now
            async with asyncio.timeout(self.session_ms / 3000):
                await self._look()

    async def _look(self) -> None:
        """In a classic group it is for members to see that topics have changed."""
        if self.regex is not None:
            self.member.subscribe(await self._matched(self.regex))
        if self.member.peers and await self._partitions() != self._counts:
            self.member.rejoin()

    async def _partitions(self) -> dict[str, int]:
        """Of every topic that a member subscribes to and that is there."""
        wanted = frozenset().union(*(peer.topics for peer in self.member.peers))
        known = await self.cluster.all_topics()
        return {topic.name: topic.partitions for topic in known if topic.name in wanted}

    async def _matched(self, regex: str) -> frozenset[str]:
        known = await self.cluster.all_topics()
        names = (topic.name for topic in known if not topic.name.startswith("__"))
        return frozenset(name for name in names if re.fullmatch(regex, name))

    def _as_member(self) -> dict[str, Any]:
        return {
            "group_id": self.group,
            "generation_id": self.member.generation,
            "member_id": self.member.member_id,
            "group_instance_id": self.member.instance_id,
        }

    def missed(self) -> None:
        """The same is asked again; a coordinator knows it."""

    def expire(self) -> None:
        self.member.lost(forgotten=False)

    def subscribe(self, topics: frozenset[str], regex: str | None) -> None:
        if regex is not None and regex != self.regex:
            self.member.rejoin()  # what it matches is looked for when it joins
        self.regex = regex
        if regex is None:
            self.member.subscribe(topics)

    async def named(self, places: Iterable[TopicPartition]) -> dict[TopicPartition, TopicPartition]:
        return {place: place for place in places}

    async def leave(self) -> None:
        """A static member says nothing: it will be back, or its session ends."""
        member = self.member
        if not member.member_id or member.instance_id is not None:
            return
        fields = {
            "group_id": self.group,
            "members": [
                {"member_id": member.member_id, "group_instance_id": None, "reason": None}
            ],
        }  # fmt: skip
        await self._ask(Api.LEAVE_GROUP, fields, self.cluster.limits.member_leave_ms_max)


def _by_topic(places: Iterable[Place]) -> list[dict[str, Any]]:
    found: dict[UUID, list[int]] = {}
    for topic, index in sorted(places):
        found.setdefault(topic, []).append(index)
    return [{"topic_id": topic, "partitions": indexes} for topic, indexes in found.items()]


def _error_code(reply: Any) -> ErrorCode:
    code: ErrorCode = reply.error_code
    return code


def _error_but_for_id(reply: Any) -> ErrorCode:
    """MEMBER_ID_REQUIRED brings what is required."""
    code = _error_code(reply)
    return ErrorCode.none if code is ErrorCode.member_id_required else code
