"""A thousand members of a group in one process, speaking the protocol themselves.

They do what clients do, without a client's own pauses: a member that is told to let go or to join
again does so at once, and otherwise comes back when it is due. `python -m bench.members JSON`
prints the seconds from the first join until each partition has its member.
"""

from __future__ import annotations

import asyncio
import json
import resource
import struct
import sys
import time
from itertools import pairwise
from typing import Any
from uuid import uuid4

from kio.schema.errors import ErrorCode

from ledgerstream.client.connection import Connection
from ledgerstream.limits import LIMITS
from ledgerstream.wire import messages
from ledgerstream.wire.versions import Api

PATIENCE_MS = 120_000
SESSION_MS = 45_000
REBALANCE_MS = 60_000
JOIN, SYNC, BEAT, LEAVE, MODERN = 9, 5, 4, 5, 1  # versions


class Group:
    """What is known of all its members together."""

    def __init__(self, address: str, topic: str, name: str, count: int, beat_ms: int) -> None:
        host, port = address.split(":")
        self.host, self.port = host, int(port)
        self.topic, self.name, self.count, self.beat_ms = topic, name, count, beat_ms
        self.holders: dict[int, Any] = {}  # partition → who says that it has it
        self.settled = asyncio.Event()
        self.closing = False

    def took(self, member: Member, parts: list[int]) -> None:
        """A member has these partitions now."""
        for part in member.parts:
            if self.holders.get(part) is member:
                del self.holders[part]
        member.parts = parts
        for part in parts:
            self.holders[part] = member
        if len(self.holders) == self.count and len(set(self.holders.values())) == self.count:
            self.settled.set()


class Member:
    """One member, with a connection of its own: a join waits, and holds up what is behind it."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.parts: list[int] = []
        self.member_id = ""
        self._connection: Connection

    async def connect(self) -> None:
        group = self.group
        self._connection = await Connection.open(group.host, group.port, "bench", LIMITS)

    async def ask(self, api: Api, version: int, **fields: Any) -> Any:
        connection = self._connection
        correlation_id = connection.take_id()
        frame = messages.write_request(api, version, correlation_id, "bench", fields)
        reply = await connection.exchange(correlation_id, [frame], PATIENCE_MS)
        return messages.read_response(api, version, reply)

    def close(self) -> None:
        self._connection.close()


class Classic(Member):
    generation, leads = -1, False

    async def live(self) -> None:
        while not self.group.closing:
            if await self._join():
                await self._beat()

    async def _join(self) -> bool:
        group = self.group
        group.took(self, [])
        reply = await self.ask(
            Api.JOIN_GROUP, JOIN, group_id=group.name, session_timeout=SESSION_MS,
            rebalance_timeout=REBALANCE_MS, member_id=self.member_id, group_instance_id=None,
            protocol_type="consumer", protocols=[
                {"name": "range", "metadata": subscription(group.topic)},
            ], reason=None,
        )  # fmt: skip
        if reply.member_id:
            self.member_id = reply.member_id
        if reply.error_code is ErrorCode.member_id_required:
            return False
        assert reply.error_code is ErrorCode.none, reply.error_code
        self.generation, self.leads = reply.generation_id, reply.leader == reply.member_id
        plan = []
        if self.leads and not reply.skip_assignment:
            ids = sorted(each.member_id for each in reply.members)
            plan = [
                {"member_id": each, "assignment": assignment(group.topic, parts)}
                for each, parts in zip(ids, shares(group.count, len(ids)), strict=True)
            ]
        reply = await self.ask(
            Api.SYNC_GROUP, SYNC, group_id=group.name, generation_id=self.generation,
            member_id=self.member_id, group_instance_id=None, protocol_type="consumer",
            protocol_name="range", assignments=plan,
        )  # fmt: skip
        if reply.error_code is ErrorCode.rebalance_in_progress:
            return False
        assert reply.error_code is ErrorCode.none, reply.error_code
        group.took(self, assigned(reply.assignment, len(group.topic)))
        return True

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.group.beat_ms / 1000)
            if self.group.closing:
                return
            reply = await self.ask(
                Api.HEARTBEAT, BEAT, group_id=self.group.name, generation_id=self.generation,
                member_id=self.member_id, group_instance_id=None,
            )  # fmt: skip
            if reply.error_code is ErrorCode.rebalance_in_progress:
                return
            assert reply.error_code is ErrorCode.none, reply.error_code

    async def leave(self) -> None:
        await self.ask(
            Api.LEAVE_GROUP, LEAVE, group_id=self.group.name,
            members=[{"member_id": self.member_id, "group_instance_id": None, "reason": None}],
        )  # fmt: skip


class Modern(Member):
    """KIP-848: what it has to let go it lets go, and says at once what it has."""

    epoch = 0

    async def live(self) -> None:
        group = self.group
        self.member_id = str(uuid4())
        say: dict[str, Any] = {
            "rebalance_timeout": REBALANCE_MS, "subscribed_topic_names": [group.topic],
            "topic_partitions": [],
        }  # fmt: skip
        while not group.closing:
            reply = await self._ask(self.epoch, **say)
            assert reply.error_code is ErrorCode.none, reply
            self.epoch = reply.member_epoch
            say = {}
            if reply.assignment is not None:
                told = reply.assignment.topic_partitions
                parts = [part for each in told for part in each.partitions]
                if sorted(parts) != sorted(self.parts):
                    group.took(self, parts)
                    say = {"topic_partitions": [
                        {"topic_id": each.topic_id, "partitions": list(each.partitions)}
                        for each in told
                    ]}  # fmt: skip
                    continue
            await asyncio.sleep(messages.ms(reply.heartbeat_interval) / 1000)

    async def leave(self) -> None:
        await self._ask(-1)

    async def _ask(self, epoch: int, **say: Any) -> Any:
        return await self.ask(
            Api.CONSUMER_GROUP_HEARTBEAT, MODERN, group_id=self.group.name,
            member_id=self.member_id, member_epoch=epoch,
            **{"topic_partitions": None, "rebalance_timeout": -1, **say},
        )  # fmt: skip


def shares(partitions: int, members: int) -> list[range]:
    """As Java's range assignor: the first have one more."""
    each, more = divmod(partitions, members)
    starts = [number * each + min(number, more) for number in range(members + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def subscription(topic: str) -> bytes:
    name = topic.encode()
    return struct.pack(f">hih{len(name)}si", 0, 1, len(name), name, -1)


def assignment(topic: str, parts: range) -> bytes:
    name = topic.encode()
    return struct.pack(
        f">hih{len(name)}si{len(parts)}ii", 0, 1, len(name), name, len(parts), *parts, -1
    )


def assigned(content: bytes, name_size: int) -> list[int]:
    """The partitions of the one topic."""
    (count,) = struct.unpack_from(">i", content, 8 + name_size)
    return list(struct.unpack_from(f">{count}i", content, 12 + name_size))


async def measure(
    address: str, topic: str, group: str, protocol: str, count: int, beat_ms: int, hold: bool
) -> None:
    """`hold`: the group stays, and beats, until standard input ends."""
    known = Group(address, topic, group, count, beat_ms)
    kind = Classic if protocol == "classic" else Modern
    members = [kind(known) for _ in range(count)]
    for member in members:
        await member.connect()
    await _wait_coordinator(members[0], group)
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        lives = [tasks.create_task(member.live()) for member in members]
        async with asyncio.timeout(PATIENCE_MS / 1000):
            await known.settled.wait()
        print(time.perf_counter() - began, flush=True)
        if hold:
            await asyncio.to_thread(sys.stdin.read)
        known.closing = True
        for life in lives:
            life.cancel()
    for member in members:  # a request may still be under way: on a connection of its own
        member.close()
        await member.connect()
    for member in members:
        await member.leave()
        member.close()


async def _wait_coordinator(member: Member, group: str) -> None:
    """Apache Kafka names a coordinator before it has loaded; one that has knows of no members."""
    while True:
        await member.ask(Api.FIND_COORDINATOR, 4, key_type=0, coordinator_keys=[group])
        reply = await member.ask(
            Api.HEARTBEAT, BEAT, group_id=group, generation_id=0, member_id="nobody",
            group_instance_id=None,
        )  # fmt: skip
        if reply.error_code is ErrorCode.unknown_member_id:
            return
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    import uvloop

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(measure(**json.loads(sys.argv[1])))
