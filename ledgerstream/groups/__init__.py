"""The group coordinator: members of consumer groups, and how far they have come. Pure.

Which members a group has, what each is assigned, and the offsets that are committed, in
transactions too. Records are Kafka's own. Read `records` (the bytes), `offsets`, `members` and
`classic` (one group and its moves); then the next generation: `consumerrecords`, `consumer` (one
group), `reconcile` (one step of a member), `assignors`; `mixed`, where members of both kinds are in
one group; then `coordinator` (all groups of one partition). It answers no requests and has no
clock: it is told the time, names the requests that wait by tickets, and `broker/grouphost.py` does
the rest.
"""

from ledgerstream.groups.classic import MOVES, ClassicGroup, Rules
from ledgerstream.groups.consumer import Beat, Beaten, ConsumerGroup, ConsumerRules
from ledgerstream.groups.consumerrecords import AWAY_EPOCH, LEFT_EPOCH, Assignment
from ledgerstream.groups.coordinator import Committing, Found, Group, GroupCoordinator, Wish
from ledgerstream.groups.members import Join, Joined, Phase, Sync, Synced, Ticket, Told
from ledgerstream.groups.records import (
    GroupCodec,
    GroupForgotten,
    GroupMetadata,
    GroupRecord,
    MemberMetadata,
    OffsetCommitted,
    OffsetForgotten,
)

__all__ = [
    "AWAY_EPOCH", "LEFT_EPOCH", "MOVES", "Assignment", "Beat", "Beaten", "ClassicGroup",
    "Committing", "ConsumerGroup", "ConsumerRules", "Found", "Group", "GroupCodec",
    "GroupCoordinator", "GroupForgotten", "GroupMetadata", "GroupRecord", "Join", "Joined",
    "MemberMetadata", "OffsetCommitted", "OffsetForgotten", "Phase", "Rules", "Sync", "Synced",
    "Ticket", "Told", "Wish",
]  # fmt: skip
