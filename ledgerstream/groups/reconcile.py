"""One step of a member from what it has to what it is to have (KIP-848). Pure.

A partition has one holder at a time: a member gives up first what is no longer its own, keeping its
epoch until it has done so, and gets what is new only when the one before has let go of it.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from uuid import UUID

from ledgerstream.groups.consumerrecords import (
    NOTHING,
    Assignment,
    Current,
    MemberState,
    Since,
)

Holder = Callable[[UUID, int], str | None]  # who has a partition in its hands


def reconcile(
    current: Current,
    epoch: int,
    target: Assignment,
    subscribed: Container[UUID],
    holder: Holder,
    owned: Assignment | None,
) -> Current:
    """What the member has next; the same object if nothing changes.

    `epoch`, `target`: of the target assignment; partitions of topics that the member is not
    `subscribed` to (any more) count as not in it. `owned`: what the member says it still has, None
    where it says nothing.
    """
    if current.state is MemberState.STABLE and current.epoch == epoch:
        foreign = [topic for topic in current.assigned if topic not in subscribed]
        if not foreign:
            return current
    if current.state is MemberState.UNREVOKED_PARTITIONS and _overlap(current.revoking, owned):
        return current
    return _next(current, epoch, target, subscribed, holder, owned)


def _next(
    current: Current,
    epoch: int,
    target: Assignment,
    subscribed: Container[UUID],
    holder: Holder,
    owned: Assignment | None,
) -> Current:
    kept: dict[UUID, frozenset[int]] = {}
    revoking: dict[UUID, frozenset[int]] = {}
    coming: dict[UUID, frozenset[int]] = {}
    unreleased = False
    for topic in {**target, **current.assigned}:
        wanted = target.get(topic, frozenset()) if topic in subscribed else frozenset()
        has = current.assigned.get(topic, frozenset())
        if keeps := has & wanted:
            kept[topic] = keeps
        if loses := has - wanted:
            revoking[topic] = loses
        new = wanted - has
        free = frozenset(
            index for index in new if holder(topic, index) in (None, current.member_id)
        )
        unreleased = unreleased or len(free) < len(new)
        if free:
            coming[topic] = free
    if revoking and _overlap(revoking, owned):
        state, at_epoch, assigned = MemberState.UNREVOKED_PARTITIONS, current.epoch, kept
    else:
        state = MemberState.UNRELEASED_PARTITIONS if unreleased else MemberState.STABLE
        at_epoch, revoking = epoch, {}
        assigned = {
            topic: kept.get(topic, frozenset()) | coming.get(topic, frozenset())
            for topic in {**kept, **coming}
        }
    before: Since = current.since
    after = current._replace(
        epoch=at_epoch,
        previous_epoch=current.epoch,
        state=state,
        assigned=assigned or NOTHING,
        revoking=revoking or NOTHING,
        since={
            topic: {
                index: before.get(topic, {}).get(index, at_epoch)
                for held in (assigned, revoking)
                for index in sorted(held.get(topic, ()))
            }
            for topic in {**assigned, **revoking}
        },
    )
    same = after._replace(previous_epoch=current.previous_epoch)
    return current if same == current else after


def _overlap(partitions: Assignment, owned: Assignment | None) -> bool:
    """Whether the member may still have one of these; it may where it does not say."""
    if owned is None:
        return True
    return any(
        not owned[topic].isdisjoint(partitions[topic]) for topic in owned if topic in partitions
    )


def is_within(owned: Assignment | None, assigned: Assignment) -> bool:
    """Whether a member says that it has nothing else than this."""
    if owned is None:
        return False
    return all(indexes <= assigned.get(topic, frozenset()) for topic, indexes in owned.items())
