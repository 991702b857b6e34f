"""Scenarios of the transaction coordinator as text: verbs in, `> ` wishes out.

    init ID [timeout=MS] [as=P:E] [2pc] [keep]     add ID P:E PARTITION… [v2]
    verify ID P:E PARTITION…                       end ID P:E commit|abort [v2]
    markers ID          its markers are durable    late ID P:E   those of an earlier one are
    timeouts | expire   the clock's work           at MS         the time it is
    state ID | list [STATE…] [open=MS]             crash         go on with what the log says

Producer ids are p0, p1, … in the order in which they are drawn. After every line the state that is
replayed from the records' bytes must be the live one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ledgerstream.machine import Decision
from ledgerstream.txn import Coordinator, Forgotten, TxnCodec
from ledgerstream.txn.coordinator import V1, V2

FIRST_ID = 4_000
EXPIRY_MS = 1_000_000


class Play:
    def __init__(self) -> None:
        self.machine = Coordinator()
        self.codec = TxnCodec()
        self.log: dict[bytes, bytes | None] = {}  # compacted: the last record of each key
        self.now_ms = 0
        self.next_id = FIRST_ID

    def do(self, line: str) -> str:
        verb, *words = line.split()
        said: str = getattr(self, f"do_{verb}")(*words)
        assert self.replayed().txns == self.machine.txns
        return said

    def perform(self, ask: Callable[[int | None], Decision[Any, Any]]) -> Any:
        decision = ask(None)
        if getattr(decision.reply, "needs_id", False):
            assert decision.records == ()
            decision = ask(self.next_id)
            self.next_id += 1
        for record in decision.records:
            key, value = self.codec.encode(record)
            assert self.codec.decode(key, value) == record
            self.log[key] = value
            self.machine.replay(record)
        return decision.reply

    def replayed(self) -> Coordinator:
        return replayed(self.log)

    # verbs

    def do_at(self, now: str) -> str:
        self.now_ms = int(now)
        return ""

    def do_crash(self) -> str:
        self.machine = self.replayed()
        return ""

    def do_init(self, txn_id: str, *how: str) -> str:
        given = dict(word.split("=") for word in how if "=" in word)
        timeout = int(given.get("timeout", 60_000))
        expected = _identity(given["as"]) if "as" in given else None
        reply = self.perform(
            lambda new_id: self.machine.decide_init(
                txn_id, timeout, self.now_ms, expected=expected, two_phase="2pc" in how,
                keep_prepared="keep" in how, new_id=new_id,
            )
        )  # fmt: skip
        said = _name(reply.error)
        if said == "NONE":
            said += f" {_who(reply.producer_id, reply.producer_epoch)}"
        if "keep" in how and reply.ongoing_id >= 0:
            said += f" found {_who(reply.ongoing_id, reply.ongoing_epoch)}"
        return said

    def do_add(self, txn_id: str, who: str, *words: str) -> str:
        parts = [_partition(word) for word in words if word != "v2"]
        version = V2 if "v2" in words else V1
        return _name(
            self.perform(
                lambda _: self.machine.decide_add(
                    txn_id, *_identity(who), parts, self.now_ms, version
                )
            )
        )

    def do_verify(self, txn_id: str, who: str, *words: str) -> str:
        parts = [_partition(word) for word in words]
        found = self.machine.verify(txn_id, *_identity(who), parts)
        return ", ".join(f"{t}-{i} {_name(code)}" for (t, i), code in found.items())

    def do_end(self, txn_id: str, who: str, *words: str) -> str:
        version = V2 if "v2" in words else V1
        reply = self.perform(
            lambda new_id: self.machine.decide_end(
                txn_id, *_identity(who), self.now_ms, committed="commit" in words, version=version,
                new_id=new_id,
            )
        )  # fmt: skip
        said = _name(reply.error)
        if said == "NONE" and version == V2:
            said += f" {_who(reply.producer_id, reply.producer_epoch)}"
        return said

    def do_markers(self, txn_id: str) -> str:
        txn = next(txn for txn in self.machine.ending() if txn.txn_id == txn_id)
        kind = "commit" if txn.state.label == "PrepareCommit" else "abort"
        where = " ".join(f"{t}-{i}" for t, i in sorted(txn.partitions))
        news = self.perform(
            lambda _: self.machine.decide_complete(
                txn_id, txn.producer_id, txn.producer_epoch, self.now_ms
            )
        )
        assert news
        return f"{kind} {_who(txn.producer_id, txn.producer_epoch)} {where}".strip()

    def do_late(self, txn_id: str, who: str) -> str:
        news = self.perform(
            lambda _: self.machine.decide_complete(txn_id, *_identity(who), self.now_ms)
        )
        return "complete" if news else "nothing"

    def do_timeouts(self) -> str:
        ids = sorted(self.machine.overdue(self.now_ms))
        for txn_id in ids:
            self.perform(
                lambda new_id, one=txn_id: self.machine.decide_timeout(one, self.now_ms, new_id)
            )
        return " ".join(ids) or "nothing"

    def do_expire(self) -> str:
        decision = self.machine.decide_expire(self.now_ms, EXPIRY_MS)
        assert all(isinstance(record, Forgotten) for record in decision.records)
        self.perform(lambda _: decision)
        return " ".join(sorted(record.txn_id for record in decision.records)) or "nothing"

    def do_state(self, txn_id: str) -> str:
        txn = self.machine.txns.get(txn_id)
        if txn is None:
            return "nothing"
        where = "".join(f" {t}-{i}" for t, i in sorted(txn.partitions))
        since = f" since {txn.started_ms}" if txn.started_ms >= 0 else ""
        who = _who(txn.producer_id, txn.producer_epoch)
        return f"{txn.state.label} {who}{where}{since}"

    def do_list(self, *words: str) -> str:
        open_ms = next((int(w.split("=")[1]) for w in words if w.startswith("open=")), -1)
        states = [word for word in words if "=" not in word]
        found = self.machine.list(self.now_ms, states=states, open_ms=open_ms)
        return " ".join(sorted(txn.txn_id for txn in found)) or "nothing"


def replayed(log: Mapping[bytes, bytes | None]) -> Coordinator:
    """What a restart makes of a compacted log: the last record of each key."""
    codec, fresh = TxnCodec(), Coordinator()
    for key, value in log.items():
        record = codec.decode(key, value)
        assert record is not None
        fresh.replay(record)
    return fresh


def scenarios(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of each; a title is a line that begins with `== `."""
    title, lines = "", []
    for line in [*path.read_text().splitlines(), "== "]:
        if line.startswith("== "):
            if lines:
                yield title, lines
            title, lines = line[3:].strip(), []
        elif line.strip() and not line.startswith("#"):
            lines.append(line.strip())


def run(lines: list[str]) -> None:
    play, said = Play(), ""
    for number, line in enumerate(lines):
        if line.startswith(">"):
            assert said == line[1:].strip(), f"line {number}: {lines[number - 1]}"
        else:
            said = play.do(line)


def _identity(word: str) -> tuple[int, int]:
    name, epoch = word.split(":")
    return FIRST_ID + int(name[1:]), int(epoch)


def _who(producer_id: int, producer_epoch: int) -> str:
    return f"p{producer_id - FIRST_ID}:{producer_epoch}"


def _partition(word: str) -> tuple[str, int]:
    topic, _, index = word.rpartition("-")
    return topic, int(index)


def _name(error: Any) -> str:
    return str(error.name).upper()
