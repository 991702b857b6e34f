"""The group coordinators of this node: what they decide is performed, and their clock is kept.

Requests that a group parks (a Join until all have joined, a Sync until the leader has assigned) are
known to it by their tickets, which are answered here once what the answer rests on is durable. Each
coordinator has one timer, for its earliest deadline. Deadlines are of the loop's clock, which does
not jump; times in records are the wall's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from kio.schema.errors import ErrorCode

from ledgerstream.broker.server import Exchange
from ledgerstream.broker.shards import Shard, Shards, Unavailable
from ledgerstream.groups import (
    ConsumerRules,
    GroupCodec,
    GroupCoordinator,
    GroupRecord,
    Joined,
    Rules,
    Synced,
)
from ledgerstream.groups import Told as GroupTold
from ledgerstream.machine import Decision

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node

log = structlog.get_logger("broker")

TOPIC = "__consumer_offsets"
GroupShard = Shard[GroupCoordinator, GroupRecord]
Answer = Joined | Synced | ErrorCode
HOUR_MS = 3_600_000


class Parked:
    """The ticket of a request: answered once, whoever comes first."""

    __slots__ = ("_answer", "_exchange", "_node")

    def __init__(
        self, node: Node, exchange: Exchange, answer: Callable[[Exchange, Answer], None]
    ) -> None:
        self._node, self._exchange = node, exchange
        self._answer: Callable[[Exchange, Answer], None] | None = answer

    def tell(self, reply: Answer) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            exchange = self._exchange
            self._node.dispatch.go_on(exchange, partial(answer, exchange, reply))


class Groups:
    """`with_shard` finds who decides; `perform` makes it durable and tells."""

    def __init__(self, node: Node) -> None:
        limits, settings = node.limits, node.settings
        rules = Rules(
            settings.group_delay_ms, limits.group_new_member_ms,
            limits.group_members_max, limits.group_metadata_bytes_max,
        )  # fmt: skip
        modern = ConsumerRules(limits.consumer_session_ms, limits.group_members_max)
        self.shards: Shards[GroupCoordinator, GroupRecord] = Shards(
            node,
            TOPIC,
            partial(
                GroupCoordinator,
                node.catalog,
                rules,
                modern,
                metadata_chars_max=limits.offset_metadata_chars_max,
            ),
            GroupCodec(),
            self._loaded,
            self._lost,
        )
        self._node = node
        self._bells: dict[int, tuple[int, asyncio.Handle]] = {}  # by partition: when, and what
        self._expiry_at_ms: dict[int, int] = {}

    @property
    def at_ms(self) -> int:
        """The clock of sessions and rebalances: it never jumps."""
        return round(self._node.loop.time() * 1000)

    def with_shard(
        self,
        name: str,
        act: Callable[[GroupShard], None],
        refuse: Callable[[ErrorCode], None],
        *,
        create: bool = False,
    ) -> Awaitable[None] | None:
        """Act at once where the group's coordinator is ready, as it mostly is; or after a wait."""
        shard = self.shards.of(self.shards.partition_of(name))
        if shard is not None and shard.ready:
            act(shard)
            return None
        return self._with_shard(name, act, refuse, create)

    async def _with_shard(
        self,
        name: str,
        act: Callable[[GroupShard], None],
        refuse: Callable[[ErrorCode], None],
        create: bool,
    ) -> None:
        found = await self.shards.find(name, create=create)
        if isinstance(found, ErrorCode):
            refuse(found)
        else:
            act(found)

    def perform(
        self,
        shard: GroupShard,
        decision: Decision[GroupRecord, Any],
        done: Callable[[ErrorCode], None],
        told: Iterable[GroupTold] = (),
    ) -> None:
        """Append and replay; once it is durable, or cannot be, call `done` and answer `told`."""

        def tell(error: ErrorCode) -> None:
            done(error)
            well = error is ErrorCode.none
            for ticket, reply in told:
                ticket.tell(reply if well else error)

        try:
            offset = shard.act(decision)
        except Unavailable as failed:
            tell(as_group_error(failed.code))
            return
        self.schedule(shard)
        shard.replica.when_durable(
            offset, lambda well: tell(ErrorCode.none if well else ErrorCode.not_coordinator)
        )

    # -- the clock

    def schedule(self, shard: GroupShard) -> None:
        """See to it that the coordinator's earliest deadline is kept."""
        next_ms = shard.machine.next_ms if shard.ready else None
        bell = self._bells.get(shard.index)
        if next_ms is None or (bell is not None and bell[0] <= next_ms):
            return
        if bell is not None:
            bell[1].cancel()
        handle = self._node.loop.call_at(next_ms / 1000, self._ring, shard)
        self._bells[shard.index] = next_ms, handle

    def _ring(self, shard: GroupShard) -> None:
        self._bells.pop(shard.index, None)
        at_ms = self.at_ms
        while shard.ready:
            next_ms = shard.machine.next_ms
            if next_ms is None or next_ms > at_ms:
                break
            try:
                decision = shard.machine.decide_tick(at_ms, self._node.now_ms())
                if decision.records or decision.reply:
                    self.perform(shard, decision, _nothing, decision.reply)
            except Exception:
                log.exception("coordinator failed", partition=str(shard.replica.partition.key))
                shard.begin_again()
                return
        self.schedule(shard)

    def tick(self, now_ms: int, at_ms: int) -> None:
        """Forget old offsets and groups: each coordinator in its turn, not all at once."""
        limits = self._node.limits
        every_ms = limits.offsets_expiry_check_ms
        retention_ms = self._node.settings.offsets_kept_hours * HOUR_MS
        for shard in self.shards:
            apart_ms = every_ms * (shard.index + 1) // limits.coordinator_partitions
            due_ms = self._expiry_at_ms.setdefault(shard.index, at_ms + apart_ms)
            if at_ms >= due_ms and shard.ready:
                self._expiry_at_ms[shard.index] = at_ms + every_ms
                self._act(shard, shard.machine.decide_expire(now_ms, retention_ms))

    def forget_topic(self, name: str, partitions: int) -> None:
        """It was deleted: one of the same name begins without offsets."""
        for shard in self.shards:
            if shard.ready:
                self._act(shard, shard.machine.decide_forget_partitions(name, range(partitions)))

    def _act(self, shard: GroupShard, decision: Decision[GroupRecord, None]) -> None:
        """Of the broker's own accord: it will be tried again, or done after the next load."""
        if not decision.records:
            return
        try:
            shard.act(decision)
        except Unavailable as error:
            log.warning("offsets not forgotten", partition=shard.index, why=str(error))

    # -- the machines come and go

    def _loaded(self, shard: GroupShard) -> None:
        machine = shard.machine
        machine.start(self.at_ms)
        topics = self._node.catalog.topics
        for name in sorted(machine.offsets.topics()):
            if name not in topics:  # deleted while nobody was here to forget them
                most = self._node.limits.topic_partitions_max
                self._act(shard, machine.decide_forget_partitions(name, range(most)))
                if not shard.ready:
                    return
        self.schedule(shard)

    def _lost(self, shard: GroupShard, machine: GroupCoordinator) -> None:
        """Whoever waits for its answer looks for another coordinator, and joins again."""
        for ticket in list(machine.parked()):
            ticket.tell(ErrorCode.not_coordinator)

    def stop(self) -> None:
        """Answer whatever is parked: the broker goes."""
        for shard in self.shards:
            bell = self._bells.pop(shard.index, None)
            if bell is not None:
                bell[1].cancel()
            if shard.ready:
                self._lost(shard, shard.machine)


def _nothing(_: ErrorCode) -> None:
    """Nobody asked."""


_TOO_LARGE = frozenset({ErrorCode.record_list_too_large, ErrorCode.message_too_large})


def as_group_error(code: ErrorCode) -> ErrorCode:
    """Why the log did not take it, in words that group members know."""
    return ErrorCode.unknown_server_error if code in _TOO_LARGE else code
