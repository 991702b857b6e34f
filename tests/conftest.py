"""What several rooms' tests share: brokers to talk to, ours and Apache Kafka's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from ledgerstream.broker.embedded import Broker
from ledgerstream.client import Client
from tests.peers import kafka, secured

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
_numbers = itertools.count()
# how long an example takes on a busy machine says nothing
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real peers start late, so that quick failures come first; the long proofs have their time."""
    for item in items:
        if item.get_closest_marker("torture") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3_600))
    peers = {"apache_kafka", "secured_kafka"}
    items.sort(key=lambda item: bool(peers & set(getattr(item, "fixturenames", ()))))


@pytest.fixture
def topic() -> str:
    """A topic name that no other test has."""
    return f"topic-{next(_numbers)}"


@pytest.fixture(scope="session")
def apache_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kafka.ApacheKafka]:
    """One Apache Kafka for all tests that compare with it."""
    why = kafka.why_absent()
    if why is not None:
        pytest.skip(why)
    often = {
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": 1_000,
        # a next-generation group is assigned anew with each change, not once a second
        "group.consumer.min.assignment.interval.ms": 0,
        "group.consumer.assignment.interval.ms": 0,
        "group.consumer.assignor.offload.enable": "false",
        "group.consumer.min.heartbeat.interval.ms": 100,
        "group.consumer.min.session.timeout.ms": 6_000,  # as ours
        "group.consumer.heartbeat.interval.ms": 500,  # as ours of a small group
    }
    with kafka.ApacheKafka.start(tmp_path_factory.mktemp("kafka"), **often) as running:
        yield running


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> secured.Certificates:
    """Made for these tests, and trusted by nobody else."""
    return secured.Certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def secured_kafka(
    tmp_path_factory: pytest.TempPathFactory, certificates: secured.Certificates
) -> Iterator[kafka.ApacheKafka]:
    """One Apache Kafka with a listener for each way in."""
    why = kafka.why_absent()
    if why is not None:
        pytest.skip(why)
    with secured.start(tmp_path_factory.mktemp("secured"), certificates) as running:
        yield running


@pytest.fixture(scope="session")
def our_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker of ours for tests that do not stop it."""
    with asyncio.Runner() as runner:
        broker = runner.run(Broker.embedded(tmp_path_factory.mktemp("broker"), metrics_port=0))
        yield broker
        runner.run(broker.stop())


@pytest.fixture(params=["ledgerstream", "apache_kafka"])
def server(request: pytest.FixtureRequest) -> str:
    """The address of each kind of broker in turn: what holds on one holds on the other."""
    if request.param == "ledgerstream":
        return str(request.getfixturevalue("our_broker").address)
    return str(request.getfixturevalue("apache_kafka").address)


@pytest.fixture
async def client(our_broker: Broker) -> AsyncIterator[Client]:
    """Our client, connected to our broker."""
    async with await Client.connect(our_broker.address) as connected:
        yield connected
