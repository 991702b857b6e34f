"""What the README shows is run: its Python, and every command's options."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


GROUPED = ("topic", "dead-letters", "generate", "state", "transactions")  # commands with a verb


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language; every other piece between fences is one."""
    fenced = re.split(r"^```", README, flags=re.MULTILINE)[1::2]
    return [
        body for head, _, body in (block.partition("\n") for block in fenced) if head == language
    ]


@pytest.mark.slow
def test_the_python_runs_and_says_what_it_says(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    checks = (
        "\nassert alerts[['payment_id', 'spent']].values.tolist() == [[2, 1_100_000]], alerts"
        "\nassert len(events) == 3, events"
        "\nassert visits['payments'].tolist() == [1, 1, 1], visits\n"
    )
    script.write_text("\n".join(blocks("python")) + checks)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def commands() -> list[str]:
    shown = [line for block in blocks("") for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in shown if line.startswith("ledgerstream ")]


@pytest.mark.parametrize("command", commands())
def test_every_command_exists_with_its_options(command: str) -> None:
    words = command.split()[1:]
    verbs = words[: 2 if words[0] in GROUPED else 1]
    done = subprocess.run(
        [Path(sys.executable).with_name("ledgerstream"), *verbs, "--help"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in done.stdout, (command, done.stdout)


def test_what_is_pointed_to_exists() -> None:
    root = Path(__file__).parents[1]
    named = set(re.findall(r"`((?:[a-z]+/)+[a-z_]+\.py)`", README))
    assert named
    for name in named:
        assert (root / name).exists() or (root / "ledgerstream" / name).exists(), name
