"""The generator does what the handbook's does, and the same each time."""

import numpy as np
import pytest

from ledgerstream.events import parse_timestamp
from processors.payments import DAY_S, SECOND_NS, Payment, Simulation

DAY_NS = DAY_S * SECOND_NS
SMALL = Simulation(customers=400, terminals=800, days=60, reach=15.0)


@pytest.fixture(scope="module")
def days() -> list[np.ndarray]:
    return list(SMALL.payments())


@pytest.fixture(scope="module")
def payments(days: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(days)


def test_the_same_seed_gives_the_same_bytes(payments: np.ndarray) -> None:
    assert np.concatenate(list(SMALL.payments())).tobytes() == payments.tobytes()
    other = Simulation(customers=400, terminals=800, days=60, reach=15.0, seed=8)
    assert np.concatenate(list(other.payments())).tobytes() != payments.tobytes()


def test_fewer_days_are_the_first_days(days: list[np.ndarray]) -> None:
    short = Simulation(customers=400, terminals=800, days=5, reach=15.0)
    assert [day.tobytes() for day in short.payments()] == [day.tobytes() for day in days[:5]]


def test_payments_are_in_time_order_with_ids_in_order(days: list[np.ndarray]) -> None:
    start = parse_timestamp(SMALL.start)
    for number, day in enumerate(days):
        assert day.dtype == Payment.dtype()
        assert ((day["at"] - start) // DAY_NS == number).all()
        assert (np.diff(day["at"]) >= 0).all()
    ids = np.concatenate([day["payment_id"] for day in days])
    assert ids.tolist() == list(range(len(ids)))


def test_amounts_and_rates_are_the_handbooks(payments: np.ndarray) -> None:
    assert len(payments) == pytest.approx(400 * 2 * 60, rel=0.1)
    genuine = payments[~payments["is_fraud"]]
    assert genuine["amount"].min() > 0 and genuine["amount"].max() <= 22_000
    assert genuine["amount"].mean() / 100 == pytest.approx(52.5, rel=0.1)
    second = (payments["at"] // SECOND_NS) % DAY_S
    assert second.mean() == pytest.approx(DAY_S / 2, rel=0.02)
    assert second.std() == pytest.approx(19_000, rel=0.1)  # 20,000 cut off at midnight


def test_each_scenario_is_what_it_says(payments: np.ndarray) -> None:
    scenario, amount = payments["scenario"], payments["amount"]
    assert (payments["is_fraud"] == (scenario > 0)).all()
    assert set(np.unique(scenario)) == {0, 1, 2, 3}
    assert (amount[scenario == 1] > 22_000).all()
    assert amount[scenario == 3].mean() > 3 * amount[scenario == 0].mean()


def test_a_compromised_terminal_takes_nothing_but_fraud_for_28_days() -> None:
    bad = Simulation(
        customers=400,
        terminals=800,
        days=28,
        reach=15.0,
        large_amount=10**9,
        terminals_compromised_daily=800,
        cards_leaked_daily=0,
    )
    assert all(day["scenario"].tolist() == [2] * len(day) for day in bad.payments())


def test_a_third_of_a_leaked_cards_payments_is_fraud() -> None:
    leaked = Simulation(
        customers=400,
        terminals=800,
        days=28,
        reach=15.0,
        large_amount=10**9,
        terminals_compromised_daily=0,
        cards_leaked_daily=400,
    )
    scenario = np.concatenate([day["scenario"] for day in leaked.payments()])
    assert set(np.unique(scenario)) == {0, 3}
    assert (scenario == 3).mean() == pytest.approx(1 / 3, abs=0.01)


def test_customers_pay_near_home_only(payments: np.ndarray) -> None:
    seen = [
        len(np.unique(payments["terminal"][payments["customer"] == customer]))
        for customer in range(100)
    ]
    reachable = 800 * np.pi * 15**2 / 100**2
    assert 5 < np.mean(seen) < 2 * reachable
    assert len(np.unique(payments["terminal"])) > 600
