"""Real clients on our broker, under faults, and a checker that finds nothing.

Our client has transactions of V2 and is a member by KIP-848, or has V1 and the classic protocol
where it is told to; confluent-kafka has V1 and the classic one. Queues are read by assignment and
by subscription, money moves by read-process-write, a tenth of the transactions is aborted.

The broker's clock jumps by minutes and hours, forward and back, over restarts too. Which clock what
goes by: records' times, the start of a transaction (its timeout is an hour's jump away), the age of
offsets and of ids that nobody uses go by the wall's, as in Kafka; sessions, rebalances, waits, and
when anything is looked at again by the monotonic one. So it must hold: a jump is no anomaly, loses
nothing that was acknowledged and ends no session; it may time out transactions that are open, whose
producers are fenced then. (Ages are days; none of the jumps is that far.) Clients stay on time, and
go by the monotonic clock alone.

Under V1 an EndTxn that comes after its client has given it up may end a later transaction half-way
(KAFKA-17754), and a TxnOffsetCommit may take its group back: the epoch is the same, and no broker
can tell. Our client takes a new epoch after anything uncertain, so there it must not happen;
librdkafka does not, so it is tried without such delays, and with them each anomaly must be of a
transactional id, or of a group with one, of which something came late. That it uses sequences of
what it has aborted again is told of apart (`Seen.reused`).
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.checker.checker import Anomaly
from tests.checker.runs import Plan, Seen, perform

GENTLE = (
    "kill_broker", "stop_broker", "kill_client", "stop_client", "cut", "delay", "lose_answer",
    "hold_produce", "hold_produce", "overtake_produce", "jump", "jump", "jump_over",
)  # fmt: skip
LATE = ("hold_end", "hold_end", "overtake_end", "hold_offsets", "hold_answer")
WORKLOADS = {"queue": 2, "group": 2, "money": 2, "orders": 1}
SHORT_S, LONG_S = 12.0, 150.0
AT_ONCE = {  # fault → how it is counted, when it has been in effect
    "kill_broker": "broker killed", "stop_broker": "broker stopped for a while",
    "kill_client": "client killed", "stop_client": "client stopped for a while",
    "delay": "delayed for a while", "jump": "clock ", "outlive_session": "client stopped past",
    "jump_over": "clock forward over sleeping clients",
}  # fmt: skip
IN_TIME = (  # a long run has had the time for
    "connection cut", "lost answer", "held PRODUCE", "late PRODUCE", "PRODUCE overtaken by PRODUCE",
    "clock forward", "clock back", "transaction timed out",
)  # fmt: skip
LATE_IN_TIME = (
    "held END_TXN", "late END_TXN", "END_TXN overtaken by", "held TXN_OFFSET_COMMIT",
    "late TXN_OFFSET_COMMIT", "late answer",
)  # fmt: skip


def plan(client: str, *, late: bool, seconds: float) -> Plan:
    faults = GENTLE + (LATE if late else ()) + (("outlive_session",) if seconds >= LONG_S else ())
    return Plan(client, WORKLOADS, faults, seconds, random.randrange(10**6))


async def run(plan: Plan, directory: Path) -> Seen:
    """It must have been what it says that it was."""
    seen = await perform(plan, directory)
    print(seen.told())
    due = [AT_ONCE[kind] for kind in AT_ONCE if seen.drawn[kind]]
    if plan.seconds >= LONG_S:
        due += [*AT_ONCE.values(), *IN_TIME, *(LATE_IN_TIME if "hold_end" in plan.faults else ())]
    for fault in due:
        assert any(n for what, n in seen.counts.items() if what.startswith(fault)), fault
    for workload, counts in seen.by_workload().items():
        assert counts["ok"], workload
    return seen


def assert_nothing(seen: Seen) -> None:
    wrong = seen.errors()
    assert not wrong, "\n".join([seen.told(), *map(str, wrong)])


@pytest.mark.slow
async def test_v2_under_faults(tmp_path: Path) -> None:
    assert_nothing(await run(plan("ours", late=True, seconds=SHORT_S), tmp_path))


@pytest.mark.slow
async def test_v1_under_faults(tmp_path: Path) -> None:
    assert_nothing(await run(plan("confluent", late=False, seconds=SHORT_S), tmp_path))


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("client", ["ours", "ours-v1", "confluent"])
async def test_long_under_faults(client: str, tmp_path: Path) -> None:
    late = client != "confluent"
    assert_nothing(await run(plan(client, late=late, seconds=LONG_S), tmp_path))


@pytest.mark.torture
@pytest.mark.timeout(900)
async def test_what_comes_late_under_v1_is_explained(tmp_path: Path) -> None:
    seen = await run(plan("confluent", late=True, seconds=LONG_S), tmp_path)
    for anomaly in seen.errors():
        why = explanation(anomaly, seen.late_ids)
        print(f"  {anomaly}; {why}")
        assert why is not None, anomaly


def explanation(anomaly: Anomaly, late_ids: set[str]) -> str | None:
    """What came late for it: of an id that it names, or, where it is about what a group has done
    together, of one of its members."""
    named = {txn_id for txn_id in late_ids if txn_id in str(anomaly)}
    if not named:
        workload = {"lost-offset": "group" if "of-shared" in anomaly.what else "money"}.get(
            anomaly.kind, "money" if anomaly.kind in ("transfer", "sum") else None
        )
        named = {txn_id for txn_id in late_ids if workload and txn_id.startswith(workload)}
    return f"late: {', '.join(sorted(named))}" if named else None
