"""The checker finds each anomaly that is planted, and nothing else: `scenarios/anomalies.txt`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.checker.checker import ALLOWED, check, errors
from tests.checker.cycles import components
from tests.checker.history import (
    NEVER,
    Act,
    Assign,
    CommitOffsets,
    Operation,
    Outcome,
    Poll,
    Recorder,
    Send,
    read,
)
from tests.txn.play import scenarios

SCENARIOS = dict(scenarios(Path(__file__).parents[1] / "scenarios" / "anomalies.txt"))
KINDS = {
    "duplicate", "inconsistent-offsets", "lost-write", "unseen", "aborted-read",
    "precommitted-read", "int-poll-skip", "ext-poll-skip", "int-nonmonotonic-poll",
    "ext-nonmonotonic-poll", "int-nonmonotonic-send", "ext-nonmonotonic-send", "aborted-offset",
    "lost-offset", "G0", "G1c", "G1c-wr",
}  # fmt: skip


def placed(word: str) -> tuple[int, str]:
    value, _, offset = word.partition("@")
    return int(offset or -1), value


def positions(words: list[str]) -> dict[str, int]:
    return {place: int(offset) for place, offset in (word.split("=") for word in words)}


def act(text: str, at: int) -> Act:
    verb, *words = text.split()
    if verb == "send":
        offset, value = placed(words[1])
        return Send(words[0], value, offset)
    if verb == "poll":
        parts = [part.split() for part in text.removeprefix("poll").split(",")]
        return Poll({place: [placed(word) for word in rest] for place, *rest in parts}, at)
    if verb == "assign":
        group = None if "=" in words[0] else words.pop(0)
        return Assign(positions(words), group, at)
    assert verb == "commit"
    return CommitOffsets(words[0], positions(words[1:]))


def operation(line: str, began: int) -> Operation:
    process, outcome, rest = line.split(maxsplit=2)
    alone = rest.startswith("alone ")
    acts = [act(text.strip(), began + 1) for text in rest.removeprefix("alone ").split(";")]
    told = Outcome(outcome)
    asked = NEVER if told is Outcome.FAIL else began + 2
    return Operation(process, acts, told, not alone, began, began + 3, asked)


def play(lines: list[str]) -> tuple[list[Operation], list[str]]:
    *said, wanted = lines
    history = [operation(line, 10 * at) for at, line in enumerate(said)]
    expected = wanted.removeprefix("> ").split(", ")
    return history, [] if expected == ["nothing"] else sorted(expected)


@pytest.mark.parametrize("name", SCENARIOS)
def test_planted(name: str) -> None:
    history, expected = play(SCENARIOS[name])
    found = check(history)
    assert sorted({anomaly.kind for anomaly in found}) == expected, [*map(str, found)]
    assert {anomaly.kind for anomaly in errors(history)} == set(expected) - ALLOWED


def test_every_kind_is_planted_and_explained() -> None:
    assert {kind for lines in SCENARIOS.values() for kind in play(lines)[1]} == KINDS
    assert check.__doc__ is not None
    for kind in KINDS:
        assert kind.removeprefix("int-").removeprefix("ext-") in check.__doc__


def test_knots() -> None:
    """Against reachability, on random graphs."""
    for seed in range(200):
        chance = random.Random(seed)
        edges = {(chance.randrange(9), chance.randrange(9)) for _ in range(chance.randrange(20))}
        reach = {node: {node} for node in range(9)}
        for _ in range(9):
            for a, b in edges:
                reach[a] |= reach[b]
        wanted = {
            frozenset(b for b in reach[a] if a in reach[b]) for a in reach
        }  # fmt: skip
        found = list(components(edges))
        assert {frozenset(each) for each in found} == {e for e in wanted if len(e) > 1}, seed
        assert sum(map(len, found)) == len(set().union(*found)), seed


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a", "a")
    recorder.begin()
    recorder.assign({"p-0": 0}, "g", 7)
    recorder.poll({"p-0": [(0, "w")]})
    recorder.send("p-1", "x")
    recorder.acknowledged("x", 3)
    recorder.commit_offsets("g", {"p-0": 1})
    recorder.ask(committed=True)
    recorder.end(Outcome.OK)
    recorder.note("and then it is killed")
    recorder.begin()
    recorder.send("p-1", "y")
    (whole, cut) = read([tmp_path / "a"])
    assert whole.outcome is Outcome.OK and whole.began < whole.asked < whole.ended
    assert whole.acts[0] == Assign({"p-0": 0}, "g", 7)
    assert isinstance(whole.acts[1], Poll) and whole.acts[1].records == {"p-0": [(0, "w")]}
    assert whole.acts[2:] == [Send("p-1", "x", 3), CommitOffsets("g", {"p-0": 1})]
    assert (cut.outcome, cut.asked, cut.acts) == (Outcome.FAIL, NEVER, [Send("p-1", "y")])
    recorder.ask(committed=True)
    assert read([tmp_path / "a"])[1].outcome is Outcome.INFO, "nobody was told"
