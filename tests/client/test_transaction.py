"""What a transactional producer may do next, as text: `tests/scenarios/producer.txt`.

v1 | two-phase           the kind of transactions; before anything else
init ID [found ID]       the answer to InitProducerId, p7:0 being producer id 7 in epoch 0
begin, touch, doubt, send, prepare, commit, abort   the caller
fail CODE|nothing [doubtful]                        something of it could not be done
ended [ID] [repeated]    EndTxn was answered well;  refused CODE|nothing: it was not
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kio.schema.errors import ErrorCode

from ledgerstream.client.transaction import MOVES, Identity, Phase, Transaction
from ledgerstream.errors import LedgerStreamError
from tests.txn.play import scenarios

SCENARIOS = dict(scenarios(Path(__file__).parents[1] / "scenarios" / "producer.txt"))


def identity(word: str) -> Identity:
    producer_id, epoch = word.removeprefix("p").split(":")
    return Identity(int(producer_id), int(epoch))


def code(word: str) -> ErrorCode | None:
    return None if word == "nothing" else ErrorCode[word.lower()]


class Play:
    def __init__(self) -> None:
        self.txn = Transaction("t")
        self.moves: set[tuple[Phase, Phase]] = set()

    def do(self, line: str) -> str:
        verb, *words = line.split()
        before = self.txn.phase
        try:
            said = getattr(self, "do_" + verb.replace("-", "_"))(*words)
        except LedgerStreamError as error:
            return f"refused: {error}"
        if self.txn.phase is not before:
            self.moves.add((before, self.txn.phase))
        return said or self.state()

    def state(self) -> str:
        known = self.txn.identity
        return f"{self.txn.phase} p{known[0]}:{known[1]}" if known else str(self.txn.phase)

    def do_v1(self) -> None:
        self.txn = Transaction("t", v2=False)

    def do_two_phase(self) -> None:
        self.txn = Transaction("t", two_phase=True)

    def do_init(self, word: str, found: str = "", ongoing: str = "p-1:-1") -> None:
        self.txn.told_identity(identity(word), identity(ongoing))

    def do_begin(self) -> None:
        self.txn.begin()

    def do_touch(self) -> None:
        self.txn.touch()

    def do_doubt(self) -> None:
        self.txn.doubt()

    def do_send(self) -> None:
        self.txn.check("send", Phase.OPEN)

    def do_prepare(self) -> None:
        assert self.txn.prepare() == self.txn.identity

    def do_commit(self) -> str:
        return self.end(committed=True)

    def do_abort(self) -> str:
        return self.end(committed=False)

    def end(self, *, committed: bool) -> str:
        asked = self.txn.ask_end(committed=committed)
        if asked is None:
            return f"nothing, {self.state()}"
        word = "commit" if asked.committed else "abort"
        return f"END {word} p{asked.identity[0]}:{asked.identity[1]}"

    def do_fail(self, word: str, doubtful: str = "") -> None:
        error = LedgerStreamError(word)
        self.txn.fail(error, code(word), doubtful=bool(doubtful))

    def do_ended(self, *words: str) -> None:
        told = next((identity(word) for word in words if word.startswith("p")), None)
        self.txn.told_end(told, repeated="repeated" in words)

    def do_refused(self, word: str) -> None:
        self.txn.told_not_ended(code(word), LedgerStreamError("no answer"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str) -> None:
    play, said = Play(), ""
    for line in SCENARIOS[name]:
        if line.startswith("> "):
            assert said.startswith(line.removeprefix("> ")), (line, said)
        else:
            said = play.do(line)


def test_every_move_is_played() -> None:
    moves: set[tuple[Phase, Phase]] = set()
    for lines in SCENARIOS.values():
        play = Play()
        for line in lines:
            if not line.startswith("> "):
                play.do(line)
        moves |= play.moves
    silent = {(phase, Phase.OVER) for phase in Phase}  # an identity may be refused at any time
    assert MOVES - silent <= moves | {
        # nothing was touched, or it is in doubt, after `prepare`: as after `begin`
        (Phase.PREPARED, Phase.READY), (Phase.PREPARED, Phase.NEW), (Phase.PREPARED, Phase.DOOMED),
        (Phase.OPEN, Phase.NEW), (Phase.DOOMED, Phase.READY),
    }  # fmt: skip
