"""Scenarios of the group coordinator as text: verbs in, `> ` wishes out.

    join G M [id=ID] [static=I] [session=MS] [rebalance=MS] [old] [topics=T,T] [can=P,P] [type=T]
    sync G M [gen=N] [static=I] [A=WORD|HUGE …]       beat G M [gen=N] [static=I]
    leave G M [static=I] …                         at MS            the time it is; deadlines pass
    commit G T-P=OFFSET … [as=M] [gen=N] [static=I] [txn=N] [meta=LENGTH] [keep=MS] [v=N]
    fetch G [T-P …] [stable]                       end N commit|abort     a transaction's marker
    forget G T-P …       OffsetDelete              expire           the clock's work on old offsets
    drop T               a topic was deleted       delete G
    state G              show G                    crash            go on with what the log says

M names a client. Its requests carry the member id and the generation that it was last told; `id=`
and `gen=` say otherwise, and `id=-` is none. A request that is parked says "waits"; who is told
something later says it when it is: "a: JOINED 1 leader(a,b)". Member ids are M1, M2, … by client.
After every line what is replayed from the records' bytes must be what the live machine remembers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kio.schema.errors import ErrorCode

from ledgerstream.groups import (
    ClassicGroup,
    Committing,
    GroupCodec,
    GroupCoordinator,
    Join,
    Joined,
    Rules,
    Sync,
    Synced,
    Wish,
)
from ledgerstream.machine import Decision
from ledgerstream.wire.markers import Marker
from tests.groups.members import FakeTopics
from tests.txn.play import scenarios

__all__ = ["Play", "remembered", "run", "scenarios"]

RULES = Rules(initial_delay_ms=0, new_member_ms=300_000, members_max=4, metadata_bytes_max=2_000)
CHARS_MAX = 100
RETENTION_MS = 1_000_000


class Origin(NamedTuple):
    offset: int
    producer_id: int = -1


class Log:
    """The records of one partition, compacted by key as a cleaner would, with their offsets."""

    def __init__(self) -> None:
        self.codec = GroupCodec()
        self.entries: list[tuple[Origin, bytes, bytes | None] | tuple[Origin, bool]] = []

    def append(self, record: Any, producer_id: int) -> Origin:
        key, value = self.codec.encode(record)
        assert self.codec.decode(key, value) == record
        origin = Origin(len(self.entries), producer_id)
        self.entries.append((origin, key, value))
        return origin

    def mark(self, producer_id: int, committed: bool) -> Origin:
        origin = Origin(len(self.entries), producer_id)
        self.entries.append((origin, committed))
        return origin

    def compacted(self) -> Log:
        """As a cleaner leaves it, which never passes the last stable offset: below that what was
        aborted is gone, and of each key the last record is there; markers stay."""
        fates: dict[int, bool | None] = {}  # offset → whether its transaction was committed
        opened: dict[int, list[int]] = {}
        for entry in self.entries:
            offset, producer_id = entry[0]
            if len(entry) == 2:
                fates.update(dict.fromkeys(opened.pop(producer_id, ()), entry[1]))
            elif producer_id >= 0:
                opened.setdefault(producer_id, []).append(offset)
                fates[offset] = None
            else:
                fates[offset] = True
        stable = min((at for at, fate in fates.items() if fate is None), default=len(self.entries))
        last = {
            entry[1]: entry[0].offset
            for entry in self.entries[:stable]
            if len(entry) == 3 and fates[entry[0].offset]
        }
        kept = Log()
        kept.entries = [
            entry for entry in self.entries
            if len(entry) == 2
            or entry[0].offset >= stable
            or last.get(entry[1]) == entry[0].offset
        ]  # fmt: skip
        return kept

    def replayed(self, rules: Rules = RULES) -> GroupCoordinator:
        machine = GroupCoordinator(FakeTopics(), rules, metadata_chars_max=CHARS_MAX)
        for entry in self.entries:
            origin = entry[0]
            if len(entry) == 2:
                machine.end(Marker(origin.producer_id, 0, 0, entry[1]), origin.offset)
                continue
            record = self.codec.decode(entry[1], entry[2])
            assert record is not None
            machine.replay(record, origin)
        return machine


def remembered(machine: GroupCoordinator) -> Any:
    """All that must be there after a restart; what is soft is left out."""
    groups = {
        name: group.recorded
        for name, group in machine.groups.items()
        if isinstance(group, ClassicGroup) and group.recorded is not None
    }
    offsets = machine.offsets
    kept = {name: offsets.of(name) for name in offsets.groups()}
    staged = {name: places for name in machine.groups if (places := offsets.staged(name))}
    return groups, kept, staged


class Play:
    def __init__(self, rules: Rules = RULES) -> None:
        self.rules = rules
        self.log = Log()
        self.machine = GroupCoordinator(FakeTopics(), rules, metadata_chars_max=CHARS_MAX)
        self.now_ms = 0
        self.ids: dict[tuple[str, str], str] = {}  # (group, client) → member id
        self.generations: dict[tuple[str, str], int] = {}
        self.made: dict[str, int] = {}
        self.phases: list[tuple[Any, Any]] = []

    def do(self, line: str) -> str:
        verb, *words = line.split()
        said: str = getattr(self, f"do_{verb}")(*words)
        assert remembered(self.log.replayed(self.rules)) == remembered(self.machine)
        return said

    def perform(self, decision: Decision[Any, Any], producer_id: int = -1) -> Any:
        for record in decision.records:
            self.machine.replay(record, self.log.append(record, producer_id))
        return decision.reply

    def told(self, decision: Decision[Any, Any], asker: str = "") -> str:
        """What everyone is told, the asker first and without its name."""
        said = []
        for (group, client, _), reply in self.perform(decision):
            text = self.hear(group, client, reply)
            said.append(text if client == asker else f"{client}: {text}")
        said.sort(key=lambda text: (": " in text, text))
        if asker and not any(": " not in text for text in said):
            said.insert(0, "waits")
        return ", ".join(said)

    def hear(self, group: str, client: str, reply: Joined | Synced) -> str:
        error = _name(reply.error)
        if isinstance(reply, Joined):
            if reply.member_id and reply.error in (ErrorCode.none, ErrorCode.member_id_required):
                self.ids[group, client] = reply.member_id
            if reply.error is not ErrorCode.none:
                return error
            self.generations[group, client] = reply.generation
            names = ",".join(self.client_of(group, one) for one, _, _ in reply.members)
            leader = f" leader({names})" if names else ""
            skip = " skip" if reply.skip_assignment else ""
            return f"JOINED {reply.generation} {reply.protocol}{leader}{skip}"
        return f"SYNCED {reply.assignment.decode()}".strip() if error == "NONE" else error

    def client_of(self, group: str, member_id: str) -> str:
        return member_id.rstrip("0123456789")

    # members

    def do_join(self, group: str, client: str, *words: str) -> str:
        given = _given(words)
        member_id = self.member_id(group, client, given)
        self.made[client] = self.made.get(client, 0) + 1
        subscription = _subscription(given.get("topics", "t").split(","))
        asked = Join(
            member_id, f"{client}{self.made[client]}", given.get("static"), client, "/host",
            int(given.get("session", 10_000)), int(given.get("rebalance", 60_000)),
            given.get("type", "consumer"),
            tuple((name, subscription) for name in given.get("can", "range").split(",") if name),
            "old" not in words, "old" not in words,
        )  # fmt: skip
        ticket = (group, client, self.made[client])
        decision = self.machine.decide_join(group, asked, ticket, self.now_ms, self.now_ms)
        return self.told(decision, client)

    def do_sync(self, group: str, client: str, *words: str) -> str:
        given = _given(words)
        plan = {k: v for k, v in given.items() if k not in ("gen", "static", "id", "protocol")}
        asked = Sync(
            self.member_id(group, client, given), self.generation(group, client, given),
            given.get("static"), "consumer", given.get("protocol"),
            tuple(
                (self.ids.get((group, k), k), b"x" * 3_000 if v == "HUGE" else v.encode())
                for k, v in plan.items()
            ),
        )  # fmt: skip
        ticket = (group, client, -1)
        decision = self.machine.decide_sync(group, asked, ticket, self.now_ms, self.now_ms)
        return self.told(decision, client)

    def do_beat(self, group: str, client: str, *words: str) -> str:
        given = _given(words)
        return _name(
            self.machine.heartbeat(
                group, self.member_id(group, client, given), given.get("static"),
                self.generation(group, client, given), self.now_ms,
            )
        )  # fmt: skip

    def do_leave(self, group: str, *words: str) -> str:
        given = _given(words)
        clients = [word for word in words if "=" not in word]
        instance = given.get("static")
        leaving = [(self.member_id(group, client, given), instance) for client in clients]
        decision = self.machine.decide_leave(
            group, leaving or [("", instance)], self.now_ms, self.now_ms
        )
        errors, told = decision.reply
        said = self.told(Decision(decision.records, told))
        return " ".join(map(_name, errors)) + (f", {said}" if said else "")

    def member_id(self, group: str, client: str, given: dict[str, str]) -> str:
        word = given.get("id", self.ids.get((group, client), ""))
        return "" if word == "-" else word

    def generation(self, group: str, client: str, given: dict[str, str]) -> int:
        return int(given.get("gen", self.generations.get((group, client), -1)))

    # time

    def do_at(self, now: str) -> str:
        said = []
        while (next_ms := self.machine.next_ms) is not None and next_ms <= int(now):
            self.now_ms = max(next_ms, self.now_ms)
            said.append(self.told(self.machine.decide_tick(self.now_ms, self.now_ms)))
        self.now_ms = int(now)
        return ", ".join(filter(None, said))

    def do_crash(self) -> str:
        self.machine = self.log.replayed(self.rules)
        self.machine.start(self.now_ms)
        return ""

    def do_expire(self) -> str:
        decision = self.machine.decide_expire(self.now_ms, RETENTION_MS)
        self.perform(decision)
        gone = [
            f"{r.group}:{r.topic}-{r.partition}" if hasattr(r, "topic") else r.group
            for r in decision.records
        ]
        return " ".join(sorted(gone)) or "nothing"

    # offsets

    def do_commit(self, group: str, *words: str) -> str:
        given = _given(words)
        places = [word for word in words if "=" in word and "-" in word.partition("=")[0]]
        metadata = "m" * int(given["meta"]) if "meta" in given else None
        wishes = [
            Wish(*_partition(where), int(offset), 0, metadata)
            for where, _, offset in (word.partition("=") for word in places)
        ]
        client = given.get("as", "")
        who = Committing(
            self.member_id(group, client, given) if client else "", given.get("static"),
            self.generation(group, client, given),
        )  # fmt: skip
        decision = self.machine.decide_commit(
            group, who, wishes, self.now_ms, self.now_ms, in_transaction="txn" in given,
            version=int(given.get("v", 9)), retention_ms=int(given.get("keep", -1)),
        )  # fmt: skip
        found = self.perform(decision, int(given.get("txn", -1)))
        return _name(found) if isinstance(found, ErrorCode) else " ".join(map(_name, found))

    def do_fetch(self, group: str, *words: str) -> str:
        places = [_partition(word) for word in words if word != "stable"]
        found = self.machine.fetch(group, places or None, stable="stable" in words)
        assert not isinstance(found, ErrorCode)
        parts = []
        for one in sorted(found):
            well = one.error is ErrorCode.none
            value = ("none" if one.offset < 0 else str(one.offset)) if well else _name(one.error)
            parts.append(f"{one.topic}-{one.partition}={value}")
        return " ".join(parts) or "nothing"

    def do_end(self, producer_id: str, how: str) -> str:
        origin = self.log.mark(int(producer_id), how == "commit")
        self.machine.end(Marker(origin.producer_id, 0, 0, how == "commit"), origin.offset)
        return ""

    def do_forget(self, group: str, *words: str) -> str:
        places = [_partition(word) for word in words]
        found = self.perform(self.machine.decide_forget_offsets(group, places))
        return _name(found) if isinstance(found, ErrorCode) else " ".join(map(_name, found))

    def do_drop(self, topic: str) -> str:
        decision = self.machine.decide_forget_partitions(topic, range(10))
        self.perform(decision)
        return str(len(decision.records))

    def do_delete(self, group: str) -> str:
        return _name(self.perform(self.machine.decide_delete(group)))

    def do_state(self, name: str) -> str:
        group = self.machine.classic(name)
        return "nothing" if group is None else f"{group.state} {group.generation}"

    def do_show(self, name: str) -> str:
        group = self.machine.classic(name)
        if group is None:
            return "nothing"
        members = " ".join(
            f"{one.member_id}={one.assignment.decode()}" for one in group.members.values()
        )
        return f"{group.state} {group.generation} {group.protocol} {members}".strip()


def run(lines: list[str]) -> None:
    play, said = Play(), ""
    for number, line in enumerate(lines):
        if line.startswith(">"):
            wished = line[1:].strip()
            assert said == wished, f"line {number}: {lines[number - 1]}\n{said} is not {wished}"
        else:
            said = play.do(line)


def _given(words: Any) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words if "=" in word)


def _partition(word: str) -> tuple[str, int]:
    topic, _, index = word.rpartition("-")
    return topic, int(index)


def _subscription(topics: list[str]) -> bytes:
    names = b"".join(struct.pack(">h", len(name)) + name.encode() for name in topics)
    return struct.pack(">hi", 0, len(topics)) + names + struct.pack(">i", -1)


def _name(error: Any) -> str:
    return str(error.name).upper()


def texts(path: Path) -> Iterator[tuple[str, list[str]]]:
    return scenarios(path)
