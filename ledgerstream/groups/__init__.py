"""The group coordinator: members of consumer groups, and how far they have come. Pure.

Which members a group has, in which generation, what each is assigned, and the offsets that are
committed, in transactions too. Records are Kafka's own. Read `records` (the bytes), `offsets`,
`members` and `classic` (one group and its moves), then `coordinator` (all groups of one partition).
It answers no requests and has no clock: it is told the time, names the requests that wait by
tickets, and `broker/groups.py` does the rest.
"""

from ledgerstream.groups.classic import MOVES, ClassicGroup, Rules
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
    "MOVES", "ClassicGroup", "Committing", "Found", "Group", "GroupCodec", "GroupCoordinator",
    "GroupForgotten", "GroupMetadata", "GroupRecord", "Join", "Joined", "MemberMetadata",
    "OffsetCommitted", "OffsetForgotten", "Phase", "Rules", "Sync", "Synced", "Ticket", "Told",
    "Wish",
]  # fmt: skip
