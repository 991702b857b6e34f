"""Real clients on our broker, under faults, and a checker that finds nothing.

Our client has transactions of V2, and of V1 where it is told to; confluent-kafka has V1. Under V1
an EndTxn that comes after its client has given it up may end a later transaction half-way
(KAFKA-17754): the epoch is the same, and no broker can tell. Our client takes a new epoch after
anything uncertain, so there it must not happen; librdkafka does not, so it is tried without such
delays, and with them each anomaly must be of a transactional id whose EndTxn came late.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.checker.runs import Plan, Seen, perform

GENTLE = (
    "kill_broker", "stop_broker", "kill_client", "stop_client", "cut", "delay", "lose_answer",
    "hold_produce", "hold_produce",
)  # fmt: skip
ALL = (*GENTLE, "hold_end", "hold_end")
OURS = {"queue": 2, "money": 2, "orders": 1}
CONFLUENT = {"queue": 1, "group": 2, "money": 2, "orders": 1}
SHORT_S, LONG_S = 7.0, 150.0


def plan(client: str, *, late_ends: bool, seconds: float) -> Plan:
    workloads = CONFLUENT if client == "confluent" else OURS
    seed = random.randrange(10**6)
    return Plan(client, workloads, ALL if late_ends else GENTLE, seconds, seed)


async def run(plan: Plan, directory: Path) -> Seen:
    seen = await perform(plan, directory)
    print(seen.told())
    assert seen.counts["broker killed"], seen.told()
    return seen


def assert_nothing(seen: Seen) -> None:
    wrong = seen.errors()
    assert not wrong, "\n".join([seen.told(), *map(str, wrong)])


@pytest.mark.slow
async def test_v2_under_faults(tmp_path: Path) -> None:
    assert_nothing(await run(plan("ours", late_ends=True, seconds=SHORT_S), tmp_path))


@pytest.mark.slow
async def test_v1_under_faults(tmp_path: Path) -> None:
    assert_nothing(await run(plan("confluent", late_ends=False, seconds=SHORT_S), tmp_path))


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("client", ["ours", "ours-v1", "confluent"])
async def test_long_under_faults(client: str, tmp_path: Path) -> None:
    late_ends = client != "confluent"
    assert_nothing(await run(plan(client, late_ends=late_ends, seconds=LONG_S), tmp_path))


@pytest.mark.torture
@pytest.mark.timeout(900)
async def test_what_late_ends_do_to_v1_is_explained(tmp_path: Path) -> None:
    seen = await run(plan("confluent", late_ends=True, seconds=LONG_S), tmp_path)
    print(*seen.errors(), sep="\n")
    for anomaly in seen.errors():
        assert any(txn_id in str(anomaly) for txn_id in seen.late_ends), anomaly
