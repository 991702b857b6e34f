"""Knots of a directed graph. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import TypeVar

N = TypeVar("N")


def components(edges: Collection[tuple[N, N]]) -> Iterator[set[N]]:
    """The strongly connected components of more than one node (Kosaraju)."""
    ahead: dict[N, list[N]] = defaultdict(list)
    back: dict[N, list[N]] = defaultdict(list)
    for a, b in edges:
        ahead[a].append(b)
        back[b].append(a)
    finished: list[N] = []
    seen: set[N] = set()
    for node in list(ahead):
        finished += _walk(node, ahead, seen)
    seen = set()
    for node in reversed(finished):
        found = set(_walk(node, back, seen))
        if len(found) > 1:
            yield found


def _walk(start: N, edges: dict[N, list[N]], seen: set[N]) -> list[N]:
    """What is reached and was not seen, each after all that is reached from it."""
    if start in seen:
        return []
    seen.add(start)
    after: list[N] = []
    path = [(start, iter(edges.get(start, ())))]
    while path:
        node, rest = path[-1]
        for other in rest:
            if other not in seen:
                seen.add(other)
                path.append((other, iter(edges.get(other, ()))))
                break
        else:
            after.append(node)
            path.pop()
    return after
