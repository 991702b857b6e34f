"""The offsets of the groups of one partition: committed ones, and those staged in a transaction.

What a transaction stages is nobody's offset until its marker commits (KIP-98), and then only where
no plain commit stands behind it in the log. All state comes by `replay`-like methods: `put`,
`stage`, `forget` and `end`, live and after a restart alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ledgerstream.groups.records import OffsetCommitted, OffsetForgotten

TopicPartition = tuple[str, int]
NONE: dict[TopicPartition, Kept] = {}  # of a group without offsets


class Kept(NamedTuple):
    """An offset, and where its record stands in the log."""

    record: OffsetCommitted
    at: int


class Offsets:
    """By group and partition; staged ones by producer."""

    def __init__(self) -> None:
        self._committed: dict[str, dict[TopicPartition, Kept]] = {}
        self._staged: dict[int, dict[str, dict[TopicPartition, Kept]]] = {}  # by producer id
        self._open: dict[str, set[int]] = {}  # group → producers that have staged something of it

    def __len__(self) -> int:
        return sum(map(len, self._committed.values()))

    # what is there

    def of(self, group: str) -> dict[TopicPartition, Kept]:
        """The committed offsets of a group; not to be changed."""
        return self._committed.get(group, NONE)

    def groups(self) -> Iterator[str]:
        """Those that have committed offsets."""
        return iter(self._committed)

    def is_staged(self, group: str, place: TopicPartition) -> bool:
        """Whether an open transaction has an offset of this partition."""
        return any(place in self._staged[pid][group] for pid in self._open.get(group, ()))

    def in_transactions(self, group: str) -> bool:
        """Whether an open transaction has staged anything of this group."""
        return group in self._open

    def staged(self, group: str) -> set[TopicPartition]:
        return {place for pid in self._open.get(group, ()) for place in self._staged[pid][group]}

    def tombstones(self, group: str) -> tuple[OffsetForgotten, ...]:
        """What removes all offsets of a group, staged ones too."""
        places = self.of(group).keys() | self.staged(group)
        return tuple(OffsetForgotten(group, *place) for place in sorted(places))

    def tombstones_of(self, topic: str, indexes: range) -> Iterator[OffsetForgotten]:
        """What removes all offsets of a topic's partitions."""
        for group in sorted(self._committed.keys() | self._open.keys()):
            for name, index in sorted(self.of(group).keys() | self.staged(group)):
                if name == topic and index in indexes:
                    yield OffsetForgotten(group, name, index)

    def topics(self) -> set[str]:
        """All that an offset is kept of."""
        stores = [
            *self._committed.values(),
            *(s for one in self._staged.values() for s in one.values()),
        ]
        return {topic for store in stores for topic, _ in store}

    # what changes it

    def put(self, record: OffsetCommitted, at: int) -> None:
        place = record.topic, record.partition
        self._committed.setdefault(record.group, {})[place] = Kept(record, at)

    def stage(self, record: OffsetCommitted, at: int, producer_id: int) -> None:
        place = record.topic, record.partition
        groups = self._staged.setdefault(producer_id, {})
        groups.setdefault(record.group, {})[place] = Kept(record, at)
        self._open.setdefault(record.group, set()).add(producer_id)

    def forget(self, record: OffsetForgotten) -> None:
        """Staged ones of this partition too: a later marker does not bring them back."""
        place = record.topic, record.partition
        kept = self._committed.get(record.group)
        if kept is not None and kept.pop(place, None) is not None and not kept:
            del self._committed[record.group]
        for producer_id in self._open.get(record.group, ()):
            self._staged[producer_id][record.group].pop(place, None)

    def end(self, producer_id: int, *, committed: bool) -> None:
        """The marker of a producer's transaction."""
        for group, staged in self._staged.pop(producer_id, {}).items():
            producers = self._open[group]
            producers.discard(producer_id)
            if not producers:
                del self._open[group]
            if not committed or not staged:
                continue
            kept = self._committed.setdefault(group, {})
            for place, one in staged.items():
                before = kept.get(place)
                if before is None or one.at > before.at:
                    kept[place] = one
