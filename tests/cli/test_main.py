"""Help that teaches, exit codes, and what is not loaded."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ledgerstream import __version__
from ledgerstream.broker.settings import Settings
from ledgerstream.cli import show
from ledgerstream.cli.config import _described
from ledgerstream.cli.options import load
from ledgerstream.errors import ConfigError
from ledgerstream.stream.processor import Processor
from tests.cli.conftest import PROGRAM, Shell

COMMANDS = [
    "broker",
    "config",
    "consume",
    "dead-letters list",
    "dead-letters retry",
    "dead-letters show",
    "demo",
    "explain",
    "generate payments",
    "generate trades",
    "import",
    "produce",
    "run",
    "state show",
    "status",
    "topic create",
    "topic delete",
    "topic describe",
    "topic list",
    "transactions abort",
    "transactions describe",
    "transactions find-hanging",
    "transactions list",
    "verify",
]


def test_help_names_every_command(shell: Shell) -> None:
    text = shell("--help").stdout
    assert "ledgerstream demo" in text
    for command in COMMANDS:
        assert f" {command.split()[0]} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(shell: Shell, command: str) -> None:
    text = shell(*command.split(), "--help").stdout
    assert "Example: " in text
    assert f"ledgerstream {command}" in " ".join(text.replace("│", " ").split())


def test_broker_has_an_option_for_each_setting(shell: Shell) -> None:
    text = shell("broker", "--help").stdout
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize("module", ["ledgerstream.cli.main", "ledgerstream.broker.run"])
def test_the_command_line_and_the_broker_load_neither_numba_nor_pandas(module: str) -> None:
    heavy = "'numba', 'pandas', 'pyarrow', 'sqlalchemy', 'asyncpg'"
    code = f"import sys, {module}; print([m for m in [{heavy}] if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_command_prints_the_help(shell: Shell) -> None:
    assert "Commands" in shell(code=2).stdout


def test_version(shell: Shell) -> None:
    assert shell("--version").stdout == f"ledgerstream {__version__}\n"


def test_wrong_usage_is_code_2(shell: Shell) -> None:
    assert "No such command" in shell("fly", code=2).stderr
    for count in ("0", str(2**31)):  # the second fits no request
        said = shell("topic", "create", "t", "--partitions", count, code=2).stderr
        assert "Invalid value for '--partitions'" in said


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("processors.fraud", "does not name a class"),
        ("nowhere:Fraud", "no module 'nowhere'"),
        ("processors.fraud:Frod", "has no 'Frod'"),
        ("processors.payments:Payment", "is not a subclass of Processor"),
    ],
)
def test_what_names_no_processor_is_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(name, Processor)


def test_an_error_is_its_sentence_and_its_exit_code(shell: Shell) -> None:
    said = shell("run", "nowhere:Fraud", code=2).stderr
    assert said == (
        "ledgerstream: There is no module 'nowhere' here.\n"
        "  Run this in the directory of nowhere.py, or install its package.\n"
    )


def test_config_says_where_a_setting_comes_from(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGERSTREAM_PORT", "9393")
    shown = json.loads(shell("config", "--json").stdout)
    settings = {row["setting"]: row for row in shown["settings"]}
    assert (settings["port"]["value"], settings["port"]["from"]) == ("9393", "LEDGERSTREAM_PORT")
    assert settings["host"]["from"] == "default"
    assert shown["limits"]["batch_bytes_max"] == 1_048_588
    assert "1,048,588" in shell("config").stdout
    assert all(said for _, _, said in _described())


def test_a_pipe_that_closes_is_no_error(shell: Shell) -> None:
    done = subprocess.run(
        f"{PROGRAM} config | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("option", ["--port", "--metrics-port"])
def test_a_port_in_use_is_a_sentence(shell: Shell, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = shell("broker", "--port", "0", option, port, code=1).stderr
    assert said.count("\n  Stop what has that port, or choose another; 0 takes a free one.\n") == 1
    assert "ledgerstream: The broker cannot start: " in said
    assert port in said


def test_a_directory_that_cannot_be_made_is_a_sentence(shell: Shell, home: Path) -> None:
    (home / "file").touch()
    for command in (("broker", "--data-dir", "file/log"), ("topic", "list", "--dir", "file")):
        assert "file/log: Not a directory.\n" in shell(*command, code=1).stderr


def test_a_module_of_a_package_is_looked_for_in_its_directory() -> None:
    with pytest.raises(ConfigError, match=r"directory of processors/frod\.py"):
        load("processors.frod:Fraud", Processor)


def test_what_would_steer_a_terminal_is_shown_as_base64() -> None:
    assert show.text(b"a\tb\n") == "a\tb\n"
    assert show.text("é".encode()) == "é"
    assert show.text(b"\x1b[2J") == "base64:G1sySg=="
    assert show.text(b"\xff") == "base64:/w=="


def test_sessions_and_totals_of_values_are_shown_as_people_write_them() -> None:
    from ledgerstream import Distinct, Ewm, Processor, Session, Sum, Topic, TopK, Tumbling
    from processors.payments import Payment

    class Habits(Processor):
        source = Topic("payments", Payment, key="customer")
        visits = Session(
            by="customer", gap="1h", spent=Sum("amount"), n=Ewm("amount", halflife="1h")
        )
        days = Tumbling(
            by="customer", over="1d", n=Distinct("amount"),
            top=TopK("terminal", k=2, by=Sum("amount")),
        )  # fmt: skip

        def process(self, batch: object, state: object) -> None: ...

    common = {"start": "time", "newest": "time", "width": "duration"}
    assert show.state_kinds(Habits, "visits") == common | {"end": "time", "spent": "EUR"}
    assert show.state_kinds(Habits, "days") == common | {"top_1_total": "EUR", "top_2_total": "EUR"}


def test_prices_money_and_times_are_shown_as_people_write_them() -> None:
    from processors.fraud import Fraud, FraudAlert
    from processors.market import Bar, MarketData
    from processors.trades import Trade

    assert show.event_kinds(Trade) == {"at": "time", "price": "9", "size": "8"}
    bar = {"open": "9", "high": "9", "low": "9", "close": "9", "volume": "8", "vwap": "9"}
    assert show.table_kinds(Bar) == bar | {"start": "time"}
    assert show.state_kinds(MarketData, "bars") == bar | {
        "start": "time", "newest": "time", "width": "duration",
    }  # fmt: skip

    assert show.state_kinds(Fraud, "customers")["sum_30d"] == "EUR"
    assert "EUR" in show.table_kinds(FraudAlert).values()
    row = {"open": 4_799_250_000_000, "vwap": 4.5e12, "start": None, "trades": 3}
    assert show.row_values(row, show.table_kinds(Bar)) == {
        "open": "4,799.25", "vwap": "4,500", "start": show.cell(None), "trades": show.cell(3),
    }  # fmt: skip


def test_a_database_that_is_not_there_is_named_without_its_password(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"postgresql://me:secret@127.0.0.1:{port}/x"
    said = shell("dead-letters", "list", "--database", url, code=1).stderr
    assert f"Postgres at 127.0.0.1:{port}/x does not answer" in said
    assert "secret" not in said
    assert (
        "postgresql://user@host" in shell("dead-letters", "list", "--database", "x", code=2).stderr
    )
