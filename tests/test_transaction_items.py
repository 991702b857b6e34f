"""The list of what a transactional broker must do, and the tests that show it, item by item.

Items 1 to 120 are those of the design's list, as are the bugs that others had; a test names the
items it shows in its docstring ("Item 5.", "Items 86, 91; bug 12"), a scenario in its title; what
no test shows stands here, with the reason. `python -m tests.test_transaction_items` prints it all.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.txn import play

HERE = Path(__file__).parent
FILES = [
    *(HERE / "cli").glob("test_transactions.py"),
    *(HERE / "log").glob("test_*.py"),
    *(HERE / "txn").glob("test_*.py"),
    *(HERE / "groups").glob("test_*.py"),
    *(HERE / "broker").glob("test_*.py"),
    *(HERE / "clients").glob("test_*.py"),
    *(HERE / "differential").glob("*.py"),
]

NODES = "there is one node"
ITEMS_ELSEWHERE: dict[int, str] = {
    62: NODES,
    77: "there are no followers to fetch",
}
BUGS_ELSEWHERE: dict[int, str] = {
    3: "producers expire by the local clock and not while a transaction is open; replay takes "
    "whatever the log says (items 17, 20)",
    4: "an epoch is in the log or it is not: the machine is rebuilt from it (items 40, 45)",
    14: "a batch whose coordinator is asked is copied before anything is awaited (broker/produce)",
    18: "a late batch has an epoch that is over under V2, and needs a guard under V1 (item 91)",
    19: "repeats are known after a restart (item 18); " + NODES,
    20: "membership is durable before it is told (item 50); " + NODES,
    21: NODES,
    22: "a repeated end is answered from the id's record, which is never evicted (item 51)",
    27: "the broker listens only when its catalogue is caught up (broker/node)",
    28: NODES,
    29: "a client's affair",
    30: "the aborted list is by offsets, and only of transactions with data there (items 67, 79)",
    31: "the aborted list is sorted (item 76); the rest is a client's affair",
    32: "no markers are forgotten: they are tried until they are durable (item 69)",
}


def numbers(text: str, word: str) -> set[int]:
    """After `word` or its plural: 5; 86, 91 and 12; 113 to 120."""
    found: set[int] = set()
    for listed in re.findall(rf"\b{word}s? ((?:\d+(?:, | and | to )?)+)", text, re.I):
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", listed):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def shown() -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """(items, bugs) → the tests and scenarios that name them."""
    items, bugs = defaultdict(list), defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                text = ast.get_docstring(node) or ""
                where = f"{path.relative_to(HERE)}::{node.name}"
                for item in numbers(text, "item"):
                    items[item].append(where)
                for bug in numbers(text, "bug"):
                    bugs[bug].append(where)
    titles = [
        title
        for name in ("transactions.txt", "groups.txt")
        for title, _ in play.scenarios(HERE / "scenarios" / name)
    ]
    for title in titles:
        told = title[title.rindex("(") :] if "(" in title else ""
        for item in numbers("items " + told.split(";")[0].strip("()"), "item"):
            items[item].append(f"scenarios: {title}")
        for bug in numbers(told, "bug"):
            bugs[bug].append(f"scenarios: {title}")
    return items, bugs


def test_every_item_is_shown_or_explained() -> None:
    items, _ = shown()
    missing = set(range(1, 121)) - items.keys() - ITEMS_ELSEWHERE.keys()
    assert sorted(missing) == []


def test_every_bug_is_shown_or_explained() -> None:
    _, bugs = shown()
    assert sorted(set(range(1, 33)) - bugs.keys() - BUGS_ELSEWHERE.keys()) == []


if __name__ == "__main__":
    for kind, found, elsewhere, last in zip(
        ("item", "bug"), shown(), (ITEMS_ELSEWHERE, BUGS_ELSEWHERE), (120, 32), strict=True
    ):
        for number in range(1, last + 1):
            for where in found.get(number, []):
                print(f"{kind} {number}: {where}")
            if number in elsewhere:
                print(f"{kind} {number}: {elsewhere[number]}")
