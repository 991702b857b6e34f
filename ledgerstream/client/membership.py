"""Membership of a consumer group: partitions come and go, and a listener is told.

`member.py` and `classicmember.py` decide, `grouptalk.py` speaks; here two tasks keep it going: one
says what is due, the other tells the listener one thing after the other. Heartbeats go on while the
listener works. Membership is a wish of the coordinator's, not a lock: offsets are fenced by it,
nothing else is.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from kio.schema.errors import ErrorCode

from ledgerstream.client.classicmember import ClassicMember
from ledgerstream.client.cluster import TRANSPORT_ERRORS, Cluster
from ledgerstream.client.groupoffsets import GroupMetadata, GroupOffsets, TopicPartition
from ledgerstream.client.grouptalk import ClassicTalk, ModernTalk, Talk
from ledgerstream.client.member import Kind, Member
from ledgerstream.errors import ConfigError, DeliveryTimeout, KafkaError, LedgerStreamError
from ledgerstream.wire.versions import Api

FEATURE, MODERN_LEVEL = "group.version", 1
Places = frozenset[TopicPartition]

# the group no longer has the member as it was
_GONE = frozenset({
    code.value for code in (
        ErrorCode.unknown_member_id, ErrorCode.illegal_generation, ErrorCode.fenced_member_epoch,
        ErrorCode.fenced_instance_id, ErrorCode.rebalance_in_progress,
    )
})  # fmt: skip


class NotAssigned(LedgerStreamError):
    """The partitions are another member's now, or may be: what was made of them is not to count."""


class Listener:
    """Override what you need. One is called at a time, and heartbeats go on meanwhile; a group
    waits for `revoked`, up to its rebalance time."""

    async def assigned(self, places: Places) -> None:
        """These are to be read from now on."""

    async def revoked(self, places: Places) -> None:
        """These are to be let go of; offsets may still be committed until this returns."""

    async def lost(self, places: Places) -> None:
        """These are no longer ours, and may be another's already: nothing can be committed."""


class Bell:
    """Whoever waits is woken by the next `ring`. Look first, then wait, with no await between."""

    def __init__(self) -> None:
        self._rung: asyncio.Future[None] | None = None

    def ring(self) -> None:
        if self._rung is not None:
            self._rung.set_result(None)
            self._rung = None

    async def wait(self) -> None:
        if self._rung is None:
            self._rung = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._rung)


class Group:
    """One member. Use `async with client.group("g", ["topic"], listener=…) as group: …`"""

    def __init__(
        self,
        cluster: Cluster,
        group: str,
        topics: Iterable[str] | re.Pattern[str],
        listener: Listener,
        *,
        instance_id: str | None = None,
        session_ms: int | None = None,
        rebalance_ms: int | None = None,
    ) -> None:
        if not group:
            raise ConfigError("A group has a name.")
        self.cluster, self.group, self.listener = cluster, group, listener
        self.instance_id = instance_id
        self._topics, self._regex = _subscription(topics)
        self._session_ms = session_ms or cluster.limits.member_session_ms
        self._rebalance_ms = rebalance_ms or cluster.limits.member_rebalance_ms
        self._offsets = GroupOffsets(cluster, group)
        self._talk: Talk[Any] | None = None
        self._names: dict[Any, TopicPartition] = {}  # of what the member has
        self._stints: dict[TopicPartition, int] = {}  # which time it has each, that we do
        self._stint = itertools.count()
        self.bell = Bell()  # rings whenever anything may have changed
        self._failure: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.closed = False

    async def start(self) -> None:
        """Join; what is assigned is told to the listener from now on."""
        connection = await self.cluster.retrying(
            f"the brokers of {self.group!r}", lambda: self.cluster.connection(-1)
        )
        modern = connection.features.get(FEATURE, 0) >= MODERN_LEVEL
        if modern and Api.CONSUMER_GROUP_HEARTBEAT in connection.versions:
            member = Member(
                str(uuid4()), self._topics, self._regex,
                instance_id=self.instance_id, rebalance_ms=self._rebalance_ms,
            )  # fmt: skip
            self._talk = ModernTalk(
                self.cluster, self.group, member, self._session_ms, self._rebalance_ms
            )
        else:
            classic = ClassicMember(self._topics, instance_id=self.instance_id)
            self._talk = ClassicTalk(
                self.cluster, self.group, classic, self._session_ms, self._rebalance_ms, self._regex
            )
        self._tasks = [
            asyncio.create_task(self._supervised(self._beats(self._talk))),
            asyncio.create_task(self._supervised(self._steps(self._talk))),
        ]

    async def close(self, *, remain: bool = False) -> None:
        """Let go of everything (the listener is told), and leave. A static member says that it will
        be back, and has its partitions until its session has passed; so has one that is to
        `remain`, as a process that dies does."""
        if self.closed:
            return
        if asyncio.current_task() in self._tasks:
            raise LedgerStreamError("A listener cannot close its group: it is waited for.")
        self.closed = True
        talk = self._talk
        if talk is None:
            return
        talk.member.leave()
        self.bell.ring()
        try:
            while not talk.member.free and not self._tasks[-1].done():
                await self.bell.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            talk.coordinator.close()  # what is under way there is not waited for
            if not remain:
                await self._leave(talk)
            talk.coordinator.close()
            self.bell.ring()

    async def _leave(self, talk: Talk[Any]) -> None:
        """A goodbye that is not heard is no harm: the session ends by itself."""
        try:
            async with asyncio.timeout(self.cluster.limits.member_leave_ms_max / 1000):
                await talk.leave()
        except (KafkaError, *TRANSPORT_ERRORS):
            pass

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
        if error is None and self._failure is not None:
            raise self._failure

    # -- what it has

    @property
    def is_modern(self) -> bool:
        """Whether the broker assigns (KIP-848); else the members do."""
        return isinstance(self._talk, ModernTalk)

    @property
    def assignment(self) -> Places:
        """What it has, from before `assigned` is called until `revoked` or `lost` has returned."""
        self.check()
        return frozenset(self._stints)

    @property
    def metadata(self) -> GroupMetadata:
        """In whose name offsets are committed, by TransactionalProducer.send_offsets too.

        Take it anew each time: epochs and generations change, and an old one is fenced. Raises
        NotAssigned before it has joined: offsets in nobody's name would not be fenced at all.
        """
        self.check()
        if self._talk is None or self._talk.who is None:
            raise NotAssigned(f"Not a member of {self.group!r} yet.")
        return self._talk.who

    @property
    def is_lost(self) -> bool:
        """What it has may be another's already."""
        return self._talk is not None and self._talk.member.is_lost

    def check(self) -> None:
        """Raise what has ended the membership, if anything has."""
        if self._failure is not None:
            raise self._failure

    async def wait_settled(self) -> None:
        """Until it has joined and has taken up what it was given, which may be nothing."""
        await self._wait(self._is_settled)

    def _is_settled(self) -> bool:
        talk = self._talk
        if talk is None or talk.who is None:
            return False
        member = talk.member
        return not member.is_lost and member.has == member.target and member.step() is None

    async def _wait(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self.check()
            if self.closed:
                raise LedgerStreamError(f"The membership of {self.group!r} was closed.")
            await self.bell.wait()

    def subscribe(self, topics: Iterable[str] | re.Pattern[str]) -> None:
        """To these from now on: what goes is revoked, what comes is assigned."""
        self.check()
        self._topics, self._regex = _subscription(topics)
        if self._talk is not None:
            self._talk.subscribe(self._topics, self._regex)
            self.bell.ring()

    # -- offsets

    async def committed(self, places: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """The next offset to be read of each place that has one."""
        return await self._offsets.committed(places)

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """The next offset to be read of each place; only of what it has.

        An epoch that is too old meanwhile is waited for anew (KIP-848). Raises NotAssigned where
        any of the places has been another's: nothing is committed then.
        """
        if not offsets:
            return
        stints = {place: self._stints.get(place) for place in offsets}
        limit_ms = self.cluster.limits.delivery_ms_max
        try:
            async with asyncio.timeout(limit_ms / 1000):
                while not await self._try_commit(offsets, stints):
                    pass
        except TimeoutError as error:
            raise DeliveryTimeout(
                f"Offsets of {self.group!r} were not committed within {limit_ms / 1000:g} s."
            ) from error

    async def _try_commit(
        self, offsets: Mapping[TopicPartition, int], stints: Mapping[TopicPartition, int | None]
    ) -> bool:
        self._check_had(stints)
        who = self.metadata
        try:
            await self._offsets.commit(offsets, who)
            return True
        except KafkaError as error:
            if error.code in _GONE:
                raise self._not_assigned(error) from error
            if error.code != ErrorCode.stale_member_epoch.value:
                raise
        talk = self._talk
        assert talk is not None
        while talk.who == who:  # the answer that brings its epoch is on its way
            self._check_had(stints)
            await self.bell.wait()
        return False

    def _check_had(self, stints: Mapping[TopicPartition, int | None]) -> None:
        self.check()
        had = all(stint is not None and self._stints.get(p) == stint for p, stint in stints.items())
        if self._talk is None or self._talk.member.is_lost or not had:
            raise self._not_assigned()

    def _not_assigned(self, error: Exception | None = None) -> NotAssigned:
        return NotAssigned(
            f"Offsets of {self.group!r} are not committed: its partitions are another member's, or "
            f"may be{f' ({error})' if error else ''}.",
            "Drop what was made of them; whoever has them reads on from what is committed.",
        )

    # -- the two tasks

    async def _supervised(self, work: Coroutine[Any, Any, None]) -> None:
        """What nobody foresaw is raised to whoever uses the membership."""
        try:
            await work
        except Exception as error:  # noqa: BLE001 - the supervisor
            self._failure = self._failure or error
            self.bell.ring()

    async def _beats(self, talk: Talk[Any]) -> None:
        limits, loop = self.cluster.limits, asyncio.get_running_loop()
        pause_ms = limits.retry_first_ms
        while True:
            try:
                wait_ms = await talk.turn()
            except (KafkaError, *TRANSPORT_ERRORS) as error:
                if isinstance(error, KafkaError) and not error.retriable:
                    talk.expire()
                    raise
                talk.missed()
                if (loop.time() - talk.heard_at) * 1000 > self._session_ms:
                    talk.expire()
                self.bell.ring()
                await asyncio.sleep(pause_ms / 1000)
                pause_ms = min(pause_ms * 2, limits.retry_ms_max)
                continue
            pause_ms = limits.retry_first_ms
            self.bell.ring()
            if wait_ms != 0:
                await self._wait_urgent(talk, wait_ms)

    async def _wait_urgent(self, talk: Talk[Any], wait_ms: int | None) -> None:
        try:
            async with asyncio.timeout(None if wait_ms is None else wait_ms / 1000):
                while not talk.urgent:
                    await self.bell.wait()
        except TimeoutError:
            pass  # the next heartbeat is due

    async def _steps(self, talk: Talk[Any]) -> None:
        member = talk.member
        while True:
            step = member.step()
            if step is None:
                await self.bell.wait()
                continue
            if step.kind is Kind.ASSIGNED:
                named = await self._named(talk, step.places)
                if not named:
                    await asyncio.sleep(self.cluster.limits.retry_ms_max / 1000)
                again = member.step()  # meanwhile it may be to have something else
                if again is None or again.kind is not Kind.ASSIGNED:
                    continue
                step = again._replace(places=again.places & named.keys())
                if not step.places:
                    continue
                self._names |= {place: named[place] for place in step.places}
            places = frozenset(self._names[place] for place in step.places)
            member.begin(step)
            if step.kind is Kind.ASSIGNED:
                self._stints |= {place: next(self._stint) for place in places}
            tell = getattr(self.listener, step.kind)
            await tell(places)
            member.done()
            if step.kind is not Kind.ASSIGNED:
                for place in step.places:
                    del self._stints[self._names.pop(place)]
            self.bell.ring()

    async def _named(self, talk: Talk[Any], places: Iterable[Any]) -> dict[Any, TopicPartition]:
        """Those of topics that metadata tells of; a new one may not be there yet."""
        try:
            return await talk.named(places)
        except (KafkaError, DeliveryTimeout, *TRANSPORT_ERRORS):
            return {}


def _subscription(topics: Iterable[str] | re.Pattern[str]) -> tuple[frozenset[str], str | None]:
    if isinstance(topics, re.Pattern):
        return frozenset(), topics.pattern
    if isinstance(topics, str):
        raise ConfigError(f"{topics!r} is one topic.", f"Give a list: [{topics!r}].")
    found = frozenset(topics)
    if not found:
        raise ConfigError("A member subscribes to one topic at least.")
    return found, None
