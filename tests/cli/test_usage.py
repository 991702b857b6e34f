"""What a newcomer types, and what the command line answers."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from ledgerstream.cli import options
from tests.cli.conftest import PROGRAM, Shell

EVENT = ("--event", "processors.payments:Payment", "--topic", "payments")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", b' [{"payment_id": 1}]', "holds JSON, and CSV or Parquet is read here"),
        ("b.csv", b"", "b.csv is empty"),
        ("c.csv", b"\n\n", "has no line with the names of its columns"),
        ("d.csv", b"\x7fELF\0\0\0\1", "is no text in UTF-8"),
        ("e.csv", b"a,b\n\xff\xfe,1\n", "is no text in UTF-8"),
        ("f.csv", b"PAR1....", "is a Parquet file"),
    ],
)
def test_a_file_that_is_no_csv_is_a_sentence(
    shell: Shell, home: Path, on_broker: str, name: str, content: bytes, sentence: str
) -> None:
    (home / name).write_bytes(content)
    assert sentence in shell("import", name, *EVENT, code=2).stderr


def test_an_error_in_a_csv_names_column_and_line(shell: Shell, home: Path, on_broker: str) -> None:
    (home / "two.py").write_text(
        "from ledgerstream import Event, Timestamp\n"
        "class Two(Event):\n    at: Timestamp\n    count: int\n"
    )
    (home / "t.csv").write_text("\ufeffnote,at,count\nx,1,5\ny,2,6\nz,3,seven\n")
    said = shell(
        "import", "t.csv", "--event", "two:Two", "--topic", "two", "--key", "count", code=1
    ).stderr
    assert "t.csv, line 4: column 'count': " in said
    assert "'seven'" in said
    assert "#2" not in said


def test_deleting_a_topic_asks_and_without_a_terminal_refuses(shell: Shell, on_broker: str) -> None:
    shell("topic", "create", "old")
    said = shell("topic", "delete", "old", code=2).stderr
    assert said == (
        "ledgerstream: There is no terminal to ask at, and nothing is deleted.\n  Give --yes.\n"
    )
    for answer, there in (("no", True), ("yes", False)):
        terminal, inside = pty.openpty()
        with subprocess.Popen(
            [PROGRAM, "topic", "delete", "old"], stdin=inside, stderr=subprocess.PIPE, text=True
        ) as run:
            os.write(terminal, f"{answer}\n".encode())
            _, said = run.communicate(timeout=60)
        os.close(terminal)
        os.close(inside)
        assert "Delete topic 'old' and its 0 offsets? Type yes: " in said
        assert ("old" in shell("topic", "list").stdout) is there
    shell("topic", "create", "old")
    assert shell("topic", "delete", "old", "--yes").stderr == "Topic 'old' is deleted.\n"


def test_waiting_for_a_log_is_told_in_a_pipe_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, answers nothing
        address = f"127.0.0.1:{server.getsockname()[1]}"
        run = subprocess.Popen(
            [PROGRAM, "topic", "list", "--log", address], stderr=subprocess.PIPE, text=True
        )
        assert run.stderr is not None
        with run, run.stderr:
            assert run.stderr.readline() == f"Waiting for the log at {address}, up to 10 s …\n"
            run.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_command_that_is_printed_finds_the_same_log_and_database(shell: Shell) -> None:
    where = ("--dir", "some where")
    for command in (("topic", "create", "payments"), ("produce", "payments")):
        shell(*command, *where, input="")
    said = shell("run", "processors.fraud:Fraud", "--workers", "4", "--until-end", *where).stderr
    assert "has 1 partition, and each has one worker: 3 of 4 will not be started." in said
    shell("topic", "delete", "payments", "--yes", *where)
    shell("topic", "create", "payments", *where)
    shell("run", "processors.fraud:Fraud", "--until-end", *where, code=4)
    assert "`ledgerstream status --why --dir 'some where'`" in shell("status", *where).stderr
    said = shell("status", "--why", *where).stdout
    assert "Then: ledgerstream run processors.fraud:Fraud --dir 'some where'\n" in said


def test_a_password_is_not_printed() -> None:
    assert options._without_password("postgresql://me:se@cret@host/x") == "postgresql://me@host/x"
    assert options._without_password("postgresql://me@host/x?a=:@") == "postgresql://me@host/x?a=:@"


def test_a_setting_that_is_not_there_is_named_with_the_nearest(shell: Shell, home: Path) -> None:
    (home / "b.toml").write_text("prot = 9\n")
    said = shell("config", "--config", "b.toml", code=2).stderr
    assert said.startswith("ledgerstream: There is no setting 'prot': is it 'port'?\n")
    (home / "b.toml").write_text("zzz = 9\n")
    said = shell("config", "--config", "b.toml", code=2).stderr
    assert said.startswith("ledgerstream: There is no setting 'zzz'.\n")


def test_a_broker_says_where_its_metrics_are(home: Path) -> None:
    with subprocess.Popen(
        [PROGRAM, "broker", "--port", "0", "--metrics-port", "0", "--log-format", "json"],
        cwd=home, stderr=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        assert run.stderr is not None
        line = run.stderr.readline()
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=30)
    found = re.search(r'"metrics": "127\.0\.0\.1:(\d+)"', line)
    assert found is not None and int(found[1]) > 0
