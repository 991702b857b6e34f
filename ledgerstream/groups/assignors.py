"""Which member of a group gets which partitions, decided on the server (KIP-848). Pure.

An assignor is a function of what each member subscribes to (topic ids), what it was to have until
now, and how many partitions the topics have. The result is a function of these alone: members are
taken in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple
from uuid import UUID

from ledgerstream.groups.consumerrecords import NOTHING, Assignment

Partition = tuple[UUID, int]


class Subscriber(NamedTuple):
    topics: frozenset[UUID]
    instance_id: str | None = None
    target: Assignment = NOTHING  # what it was to have until now


Subscribers = Mapping[str, Subscriber]  # by member id
Targets = dict[str, Assignment]
Assignor = Callable[[Subscribers, Mapping[UUID, int]], Targets]


def range_assignor(members: Subscribers, partitions: Mapping[UUID, int]) -> Targets:
    """Each topic's partitions in contiguous ranges, as equal as can be, members by their names.

    So the same member gets the same ranges of topics with equally many partitions and the same
    subscribers (joins of such topics stay local), and static members keep theirs.
    """
    by_topic: dict[UUID, list[str]] = {}
    ordered = sorted(members, key=lambda m: (members[m].instance_id or m, m))
    for member_id in ordered:
        for topic in members[member_id].topics:
            by_topic.setdefault(topic, []).append(member_id)
    targets: dict[str, dict[UUID, frozenset[int]]] = {member_id: {} for member_id in members}
    for topic, subscribers in by_topic.items():
        share, more = divmod(partitions.get(topic, 0), len(subscribers))
        first = 0
        for number, member_id in enumerate(subscribers):
            end = first + share + (number < more)
            if first < end:
                targets[member_id][topic] = frozenset(range(first, end))
            first = end
    return dict(targets)


def uniform_assignor(members: Subscribers, partitions: Mapping[UUID, int]) -> Targets:
    """As many partitions a member as can be, give or take one, and as few moves as can be."""
    if not members:
        return {}
    subscribed = {member.topics for member in members.values()}
    if len(subscribed) == 1:
        return _all_alike(members, partitions, next(iter(subscribed)))
    return _by_need(members, partitions)


def _all_alike(
    members: Subscribers, partitions: Mapping[UUID, int], topics: frozenset[UUID]
) -> Targets:
    """Everyone subscribes to the same: all keep what they have, up to their share."""
    counts = {topic: partitions.get(topic, 0) for topic in topics}
    share, more = divmod(sum(counts.values()), len(members))
    free = {(topic, index) for topic, count in counts.items() for index in range(count)}
    kept: dict[str, list[Partition]] = {}
    wanting: list[str] = []
    for member_id in sorted(members):
        had = [each for each in _listed(members[member_id].target) if each in free]
        limit = share
        if len(had) > share and more:
            limit, more = share + 1, more - 1
        kept[member_id] = had[:limit]
        free.difference_update(kept[member_id])
        if len(kept[member_id]) <= share:
            wanting.append(member_id)
    rest = sorted(free, key=_order)
    for member_id in wanting:
        limit = share
        if more:
            limit, more = share + 1, more - 1
        take = limit - len(kept[member_id])
        kept[member_id] += rest[:take]
        del rest[:take]
    assert not rest, "every partition has a member"
    return {
        member_id: _unchanged_or(members[member_id].target, mine)
        for member_id, mine in kept.items()
    }


def _by_need(members: Subscribers, partitions: Mapping[UUID, int]) -> Targets:
    """Subscriptions differ: those with least choice first, then from the full to the less full."""
    subscribers: dict[UUID, list[str]] = {}
    for member_id in sorted(members):
        for topic in members[member_id].topics:
            if partitions.get(topic, 0):
                subscribers.setdefault(topic, []).append(member_id)
    owner: dict[Partition, str] = {}
    load = dict.fromkeys(members, 0)
    for member_id in sorted(members):
        for topic, index in _listed(members[member_id].target):
            if (
                topic in members[member_id].topics
                and index < partitions.get(topic, 0)
                and (topic, index) not in owner
            ):
                owner[topic, index] = member_id
                load[member_id] += 1
    for topic in sorted(subscribers, key=lambda t: (len(subscribers[t]), t.bytes)):
        for index in range(partitions[topic]):
            if (topic, index) not in owner:
                least = min(subscribers[topic], key=load.__getitem__)
                owner[topic, index] = least
                load[least] += 1
    _balance(owner, load, subscribers, partitions)
    mine: dict[str, list[Partition]] = {member_id: [] for member_id in members}
    for partition, member_id in owner.items():
        mine[member_id].append(partition)
    return {
        member_id: _unchanged_or(members[member_id].target, found)
        for member_id, found in mine.items()
    }


def _balance(
    owner: dict[Partition, str],
    load: dict[str, int],
    subscribers: Mapping[UUID, list[str]],
    partitions: Mapping[UUID, int],
) -> None:
    """Move a partition wherever its owner has two more than another subscriber of its topic.

    Each move makes the sum of the squared loads smaller, so it ends.
    """
    moved = True
    while moved:
        moved = False
        for topic in sorted(subscribers, key=lambda t: t.bytes):
            for index in range(partitions[topic]):
                have = owner[topic, index]
                least = min(subscribers[topic], key=load.__getitem__)
                if load[have] - load[least] >= 2:
                    owner[topic, index] = least
                    load[have] -= 1
                    load[least] += 1
                    moved = True


def _listed(assignment: Assignment) -> list[Partition]:
    return [
        (topic, index)
        for topic in sorted(assignment, key=lambda t: t.bytes)
        for index in sorted(assignment[topic])
    ]


def _order(partition: Partition) -> tuple[int, bytes]:
    return partition[1], partition[0].bytes


def _unchanged_or(before: Assignment, partitions: list[Partition]) -> Assignment:
    """The same object where nothing has changed: its comparison is then free."""
    found: dict[UUID, set[int]] = {}
    for topic, index in partitions:
        found.setdefault(topic, set()).add(index)
    after = {topic: frozenset(indexes) for topic, indexes in found.items()}
    return before if before == after else after


ASSIGNORS: dict[str, Assignor] = {"uniform": uniform_assignor, "range": range_assignor}
DEFAULT_ASSIGNOR = "uniform"
