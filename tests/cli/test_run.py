"""`run` until the end, what it leaves, and the demo, small."""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from ledgerstream.cli.demo import MARK
from tests.cli.conftest import PROGRAM, Shell

pytestmark = pytest.mark.slow  # each starts a broker, and most of them a Postgres

WORLD = ("--customers", "60", "--terminals", "2000", "--days", "20")
FRAUD = "processors.fraud:Fraud"


def payments_in(said: str) -> int:
    return int(said.replace(",", "").split()[0])


def test_run_goes_on_where_it_ended_and_past_what_is_no_payment(shell: Shell) -> None:
    written = payments_in(shell("generate", "payments", *WORLD).stderr)
    first = json.loads(shell("run", FRAUD, "--until-end", "--json").stdout)
    assert first["events"] == first["rows"]["scored_payment"] == written
    assert first["position"] == {"0": written}

    shell("produce", "payments", input="not a payment\n")
    second = json.loads(shell("run", FRAUD, "--until-end", "--json").stdout)
    assert (second["events"], second["dead"]) == (0, 1)
    assert second["position"] == {"0": written + 1}

    (letter,) = json.loads(shell("dead-letters", "list", "--json").stdout)
    assert (letter["processor"], letter["payload"]) == ("Fraud", "not a payment")
    assert "Payment" in letter["error"]
    assert "not a payment" in shell("dead-letters", "list").stdout

    record = f"payments-0:{written}"
    assert "not a payment" in shell("dead-letters", "show", record).stdout
    (again,) = json.loads(shell("dead-letters", "retry", record, "--json").stdout)
    assert again == {"record": record, "new_offset": written + 1, "found": False}
    assert shell("dead-letters", "retry").stderr == "There is nothing to retry.\n"
    assert f"as {written + 1:,}" in shell("dead-letters", "show", record).stdout
    assert "no dead letter" in shell("dead-letters", "show", "payments-0:0", code=1).stderr

    said = shell("verify", FRAUD, "--json")
    found = json.loads(said.stdout)
    assert (found["events"], found["dead"]) == (written, 1)
    assert f"verified {written:,} payments in " in said.stderr
    assert "and every state digest equal." in said.stderr
    assert shell("dead-letters", "list", "--processor", "Other").stdout == ""


def test_sigterm_stops_a_run_and_nothing_is_lost(home: Path, shell: Shell) -> None:
    written = payments_in(shell("generate", "payments", *WORLD).stderr)
    run = subprocess.Popen([PROGRAM, "run", FRAUD, "--json"], cwd=home, stdout=subprocess.PIPE)
    # Another command finds the broker of the run, and what it writes is processed too.
    address = home / "ledgerstream-data" / "log" / "address"
    while not address.exists():
        assert run.poll() is None
    shell("generate", "payments", *WORLD, "--seed", "8")
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    first = json.loads(out)["events"]
    second = json.loads(shell("run", FRAUD, "--until-end", "--json").stdout)
    assert first + second["events"] == second["position"]["0"] > written


def test_a_topic_that_is_not_there_is_a_sentence(shell: Shell) -> None:
    shell("topic", "create", "other")
    assert "payments" in shell("run", FRAUD, "--until-end", code=1).stderr


def test_the_demo_tells_its_story_twice(shell: Shell) -> None:
    for _ in range(2):
        told = shell("demo", *WORLD, "--trades", "20000").stdout
        assert "killed when" in told
        assert "The same to the last row." in told
        assert "20,000 trades in" in told
        assert ", final)" in told
        assert "\x1b[" not in told
    assert "payments" in shell("topic", "list", "--dir", "ledgerstream-data/demo").stdout


def test_the_demo_wipes_nothing_that_it_did_not_make(shell: Shell, home: Path) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "thesis.txt").write_text("years of work")
    assert "no demo made" in shell("demo", *WORLD, "--dir", "mine", code=2).stderr
    assert (home / "mine" / "thesis.txt").exists()


def test_a_demo_of_something_else_leaves_the_last_one_alone(shell: Shell, home: Path) -> None:
    kept = home / "ledgerstream-data" / "demo" / "kept"
    kept.parent.mkdir(parents=True)
    kept.touch()
    (kept.parent / MARK).touch()
    (home / "words.csv").write_text("word\nhello\n")
    assert "It has word." in shell("demo", "--data", "words.csv", code=2).stderr
    assert kept.exists()


def test_watching_a_processor(shell: Shell) -> None:
    written = payments_in(shell("generate", "payments", *WORLD).stderr)
    assert shell("status").stderr == "No processor has run here yet.\n"
    shell("run", FRAUD, "--until-end")
    (found,) = json.loads(shell("status", "--json").stdout)
    assert (found["next_offset"], found["lag"], found["place"]) == (written, 0, FRAUD)
    shown = shell("status").stdout
    assert "payments-0" in shown
    assert "at rest" in shown
    assert shell("status", "--why").stderr == "No partition has stopped.\n"

    (told,) = json.loads(shell("explain", "scored_payment", "77", "--json").stdout)
    assert told["row"] == told["recomputed"]
    assert told["event"]["payment_id"] == 77
    assert told["rules"][0].startswith("Payment 77 of ")
    for place in ("payments/0/77", "payments-0:77"):
        said = shell("explain", "scored_payment", place).stdout
        assert told["rules"][0] in said
    assert "EUR" in said
    assert "fraud_alert" in shell("explain", "nothing", "1", code=2).stderr

    customer = str(told["event"]["customer"])
    now = json.loads(shell("state", "show", FRAUD, customer, "--json").stdout)
    assert now["state"]["customers"][0]["count_30d"] > 0
    at = str(told["event"]["at"])
    then = shell("state", "show", FRAUD, customer, "--at", at, "--state", "customers").stdout
    assert re.search(r"sum_30d [0-9,.]+ EUR · ", then)
    assert "count_30d" in then
    day = shell("state", "show", FRAUD, customer, "--at", "2018-04-03", "--json").stdout
    midnight = shell("state", "show", FRAUD, customer, "--at", "2018-04-03T00:00Z", "--json").stdout
    assert json.loads(day) == json.loads(midnight)
    assert "terminals" not in then
