"""A member of a classic group: it joins, learns what it gets, and is heard of. Pure.

Eager: whatever changes, everybody gives up everything and joins again; then the one that the
coordinator chose as leader assigns (`ranges`), each generation anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from ledgerstream.client.member import Holding

TopicPartition = tuple[str, int]


class Phase(StrEnum):
    """What it asks next."""

    JOIN = "join"
    SYNC = "sync"
    BEAT = "beat"


MOVES = frozenset({
    (Phase.JOIN, Phase.SYNC), (Phase.SYNC, Phase.BEAT), (Phase.SYNC, Phase.JOIN),
    (Phase.BEAT, Phase.JOIN),
})  # fmt: skip


class Peer(NamedTuple):
    """A member as the leader sees it."""

    member_id: str
    instance_id: str | None
    topics: frozenset[str]


class ClassicMember(Holding[TopicPartition]):
    """A caller reads `phase`, `member_id`, `generation` and, as leader, `peers`."""

    def __init__(self, topics: frozenset[str], *, instance_id: str | None = None) -> None:
        super().__init__()
        self.topics, self.instance_id = topics, instance_id
        self.phase = Phase.JOIN
        self.member_id = ""  # until the coordinator gives one
        self.generation = -1
        self.peers: tuple[Peer, ...] = ()  # not empty: it is the leader
        self._said = topics  # when it joined

    def _move(self, after: Phase) -> None:
        assert (self.phase, after) in MOVES, (self.phase, after)
        self.phase = after

    def subscribe(self, topics: frozenset[str]) -> None:
        """By joining again, as those that it has to tell hear of it only so."""
        if topics != self.topics:
            self.topics = topics
            self.rejoin()

    def ask(self) -> Phase | None:
        """What is asked next; None while it has to let go of everything before it may join, and
        cannot be heard of."""
        if self.phase is not Phase.JOIN:
            return self.phase
        if self.free and not self.leaving:
            return Phase.JOIN
        return None if self.is_lost or self.generation < 0 else Phase.BEAT

    @property
    def urgent(self) -> bool:
        return self.phase is Phase.SYNC or self.ask() is Phase.JOIN

    def told_id(self, member_id: str) -> None:
        """It may join under this id (KIP-394)."""
        self.member_id = member_id

    def told_joined(
        self, generation: int, member_id: str, peers: tuple[Peer, ...], said: frozenset[str]
    ) -> None:
        """`peers`: of the leader alone; `said`: the topics with which it joined."""
        assert self.free
        self._said = said
        self.generation, self.member_id, self.peers = generation, member_id, peers
        self._move(Phase.SYNC)

    def told_synced(self, assignment: frozenset[TopicPartition]) -> None:
        if self.phase is not Phase.SYNC:
            return  # subscribed otherwise meanwhile: it joins again
        self._move(Phase.BEAT)
        if self.topics != self._said:
            self.rejoin()
        elif not self.leaving:
            self.target = assignment

    def rejoin(self) -> None:
        """The group is in another generation soon: give everything up, then join."""
        self.target = frozenset()
        if self.phase is not Phase.JOIN:
            self._move(Phase.JOIN)

    def lost(self, *, forgotten: bool) -> None:
        """It is no member any more; `forgotten`: its id says nothing to the coordinator."""
        self.rejoin()
        self.lose()
        if forgotten:
            self.member_id = ""


def ranges(
    peers: tuple[Peer, ...], partitions: Mapping[str, int]
) -> dict[str, dict[str, frozenset[int]]]:
    """Member id → topic → partitions, as Kafka's RangeAssignor without racks: each topic in
    consecutive ranges, the first members one longer where it does not divide; static members
    first, by instance id."""
    order = sorted(peers, key=lambda p: (p.instance_id is None, p.instance_id or p.member_id))
    found: dict[str, dict[str, frozenset[int]]] = {peer.member_id: {} for peer in peers}
    for topic, total in partitions.items():
        readers = [peer for peer in order if topic in peer.topics]
        base = 0
        for at, reader in enumerate(readers):
            size = total // len(readers) + (at < total % len(readers))
            if size:
                found[reader.member_id][topic] = frozenset(range(base, base + size))
            base += size
    return found
