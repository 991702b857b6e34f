"""Settings of next-generation groups: kept, and obeyed from the next heartbeat on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from ledgerstream.broker.node import Node
from ledgerstream.broker.settings import Settings
from ledgerstream.limits import Limits
from tests.differential.consumergroups import (
    INTERVAL,
    SESSION,
    Member,
    alter,
    describe,
    settings_of,
)
from tests.differential.raw import Raw
from tests.differential.scenarios import create

LIMITS = Limits(tick_ms=10, coordinator_partitions=1)


async def with_raw(node: Node, act: Any) -> Any:
    def ask() -> Any:
        with Raw(f"127.0.0.1:{node.port}") as raw:
            return act(raw)

    return await asyncio.to_thread(ask)


async def test_they_are_known_after_a_restart(tmp_path: Path) -> None:
    for start in range(3):
        node = Node(Settings(data_dir=tmp_path, port=0), LIMITS)
        await node.start()
        if start == 0:
            changes = (SESSION, 0, "7000"), (INTERVAL, 0, "200")
            assert await with_raw(node, lambda raw, c=changes: alter(raw, "g", *c)) == [
                ("none", None)
            ]
        found = await with_raw(node, lambda raw: settings_of(raw, "g", None)[1])
        set_by_an_operator = 8
        if start < 2:
            assert found == [
                (INTERVAL, "200", set_by_an_operator, 3), (SESSION, "7000", set_by_an_operator, 3),
            ]  # fmt: skip
            assert (node.catalog.session_ms("g"), node.catalog.heartbeat_ms("g")) == (7_000, 200)
        if start == 1:
            changes = (SESSION, 1, None), (INTERVAL, 1, None)
            await with_raw(node, lambda raw, c=changes: alter(raw, "g", *c))
        if start == 2:
            assert node.catalog.group_configs == {}
        await node.stop()


async def test_a_session_is_as_short_as_it_was_set_from_the_next_heartbeat_on(
    tmp_path: Path,
) -> None:
    """Of two silent members the one that was heard of since is gone when its new time is over."""
    node = Node(Settings(data_dir=tmp_path, port=0), LIMITS)
    await node.start()

    def play(raw: Raw) -> None:
        create(raw, "t", 2)
        a, b = Member(raw, "g", "a", "t"), Member(raw, "g", "b", "t")
        assert a.join()[0] == b.join()[0] == "none"
        assert alter(raw, "g", (SESSION, 0, "6000")) == [("none", None)]
        assert b.settle()[0] == "none"
        before = node.groups.at_ms
        while len(describe(raw, "g")[5]) == 2:
            assert node.groups.at_ms - before < 20_000
        assert node.groups.at_ms - before >= 5_900
        assert [each[0] for each in describe(raw, "g")[5]] == ["a"]

    await with_raw(node, play)
    await node.stop()
