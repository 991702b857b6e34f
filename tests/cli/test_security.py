"""How commands are let in: a file of Kafka's properties, the environment, and both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Shell
from tests.peers.kafka import ApacheKafka
from tests.peers.secured import SECRET, Certificates

PROCESSOR = """
from sqlalchemy.orm import Mapped
from ledgerstream import Keyed, Processor, Rows, State, Table, Topic
from processors.payments import Payment

class Seen(Table):
    payment_id: Mapped[int]

class Everything(Processor):
    source = Topic("payments", Payment, key="customer")
    customers = Keyed(by="customer", seen=int)

    def process(self, payments, state: State) -> Rows:
        state.customers.at(payments.customer)
        return Seen.rows(payments)
"""
PASSWORD = "LEDGERSTREAM_LOG_SASL_PASSWORD"


@pytest.fixture
def to_kafka(
    secured_kafka: ApacheKafka,
    certificates: Certificates,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> ApacheKafka:
    """--log and --log-config of each command are SASL_SSL's, by the environment."""
    file = home / "client.properties"
    file.write_text(
        "bootstrap.servers=elsewhere:9092\nsecurity.protocol=SASL_SSL\n"
        f"ssl.truststore.type=PEM\nssl.truststore.location={certificates.ca}\n"
        "sasl.mechanism=SCRAM-SHA-512\nsasl.jaas.config=org.apache.kafka.common.security.scram."
        f'ScramLoginModule required username="alice" password="{SECRET}";\n'
    )
    monkeypatch.setenv("LEDGERSTREAM_LOG", f"kafka://{secured_kafka.at['SASL_SSL']}")
    monkeypatch.setenv("LEDGERSTREAM_LOG_CONFIG", str(file))
    return secured_kafka


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_processor_runs_over_sasl_ssl(
    shell: Shell, home: Path, to_kafka: ApacheKafka, workers: int
) -> None:
    (home / "all_of_it.py").write_text(PROCESSOR.replace('"payments"', f'"payments-{workers}"'))
    world = ("--customers", "40", "--terminals", "200", "--days", "10", "--partitions", "2")
    shell("generate", "payments", *world, "--topic", f"payments-{workers}")
    run = shell("run", "all_of_it:Everything", "--until-end", "--workers", str(workers), "--json")
    done = json.loads(run.stdout)
    assert done["events"] == done["rows"]["seen"] > 0
    assert SECRET not in run.stderr
    assert "and every state digest equal." in shell("verify", "all_of_it:Everything").stderr
    status = json.loads(shell("status", "--json").stdout)
    assert [each["lag"] for each in status] == [0, 0]


def test_each_kind_of_command_is_let_in(shell: Shell, to_kafka: ApacheKafka) -> None:
    shell("topic", "create", "letters")
    shell("produce", "letters", input="a\nb\n")
    assert shell("consume", "letters").stdout.splitlines() == ["a", "b"]
    assert "letters" in shell("topic", "list").stdout
    shell("transactions", "list")
    shell("topic", "delete", "letters", "--yes")


def test_the_environment_comes_before_the_file(
    shell: Shell, to_kafka: ApacheKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD, "hunter2")
    said = shell("topic", "list", code=2).stderr
    assert "does not take 'alice' by SCRAM-SHA-512." in said
    assert "hunter2" not in said
    shown = shell("config").stdout
    assert PASSWORD in shown
    assert "hunter2" not in shown
    assert SECRET not in shown
    log = {each["setting"]: each for each in json.loads(shell("config", "--json").stdout)["log"]}
    assert log["log_sasl_username"]["value"] == "alice"
    assert log["log_sasl_username"]["from"].endswith("client.properties")
    assert log["log_ssl_key_location"]["from"] == "default"


def test_the_environment_alone_is_enough(
    shell: Shell,
    secured_kafka: ApacheKafka,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "SECURITY_PROTOCOL": "SASL_SSL",
        "SSL_CA_LOCATION": str(certificates.ca),
        "SASL_MECHANISM": "PLAIN",
        "SASL_USERNAME": "alice",
        "SASL_PASSWORD": SECRET,
    }.items():
        monkeypatch.setenv(f"LEDGERSTREAM_LOG_{name}", value)
    shell("topic", "list", "--log", secured_kafka.at["SASL_SSL"])
    shell("topic", "list")  # the log in --dir asks for nothing of this


def test_what_is_wrong_is_a_sentence(shell: Shell, home: Path) -> None:
    (home / "client.properties").write_text("security.protocol=SASL_SLS\n")
    config = ("--log-config", "client.properties")
    said = shell("topic", "list", *config, "--log", "127.0.0.1:1", code=2).stderr
    assert "'security_protocol' is wrong: Input should be 'PLAINTEXT', 'SSL'," in said
    said = shell("topic", "list", *config, code=2).stderr
    assert "--log does not say where" in said


def test_a_variable_that_is_none_is_no_way_to_plain_text(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGERSTREAM_LOG_SECURITY_PROTCOL", "SSL")
    done = shell("topic", "list", "--log", "127.0.0.1:1", code=2)
    assert "is it LEDGERSTREAM_LOG_SECURITY_PROTOCOL?" in done.stderr
