"""The options that several commands share, each worded once, and what they name."""

from __future__ import annotations

import os
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ledgerstream.errors import ConfigError
from ledgerstream.topicconfig import INT_MAX

T = TypeVar("T")

Log = Annotated[
    str | None,
    typer.Option(
        "--log",
        envvar="LEDGERSTREAM_LOG",
        metavar="ADDRESS",
        help="The log: host:port or kafka://host:port, of this broker or Apache Kafka. "
        "Without it, the one in --dir.",
        show_default=False,
    ),
]
LogConfig = Annotated[
    Path | None,
    typer.Option(
        "--log-config",
        envvar="LEDGERSTREAM_LOG_CONFIG",
        metavar="FILE",
        help="How to be let in at --log, over TLS and by SASL: Kafka's client properties. "
        "LEDGERSTREAM_LOG_… come before them; `ledgerstream config` lists these.",
        show_default=False,
    ),
]
Database = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="LEDGERSTREAM_DATABASE",
        metavar="URL",
        help="Postgres for the results: postgresql://… . Without it, one in --dir.",
        show_default=False,
    ),
]
Directory = Annotated[
    Path,
    typer.Option(
        "--dir",
        envvar="LEDGERSTREAM_DIR",
        help="Where the embedded log and Postgres keep their files.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
EventName = Annotated[
    str,
    typer.Option(
        "--event",
        metavar="MODULE:CLASS",
        help="The event type, as in processors.payments:Payment.",
    ),
]
Key = Annotated[
    str | None,
    typer.Option("--key", help="The column that is the key: it decides the partition."),
]
Encoding = Annotated[
    str, typer.Option("--encoding", help="How events stand in the log: fixed or json.")
]
Partitions = Annotated[
    int,
    typer.Option(
        "--partitions",
        min=1,
        max=INT_MAX,
        help="Partitions of the topic, if it is made now.",
    ),
]

DIRECTORY = Path("ledgerstream-data")


def where_given(
    log: str | None, database: str | None, directory: Path, log_config: Path | None = None
) -> str:
    """` --log … --dir …`: what says where log and database are, unless a next command takes it
    from the environment or by default, so that one that is printed finds the same. A password is
    left out."""
    known = [
        ("--log", log, os.environ.get("LEDGERSTREAM_LOG")),
        ("--log-config", log_config, os.environ.get("LEDGERSTREAM_LOG_CONFIG")),
        ("--database", database, os.environ.get("LEDGERSTREAM_DATABASE")),
        ("--dir", str(directory), os.environ.get("LEDGERSTREAM_DIR", str(DIRECTORY))),
    ]
    given = [
        (flag, str(value))
        for flag, value, without in known
        if value is not None and str(value) != without
    ]
    return "".join(f" {flag} {shlex.quote(_without_password(value))}" for flag, value in given)


def _without_password(text: str) -> str:
    return re.sub(r"(//[^/@:]*):[^/]*@", r"\1@", text)


def load(name: str, base: type[T]) -> type[T]:
    """The class that `module:Class` names; the working directory is searched first."""
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise ConfigError(
            f"{name!r} does not name a class.",
            f"Write module:Class, as in {EXAMPLES.get(base.__name__, 'module:Class')}.",
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = getattr(import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports something that is not
        raise ConfigError(
            f"There is no module {error.name!r} here.",
            f"Run this in the directory of {module_name.replace('.', '/')}.py, "
            "or install its package.",
        ) from error
    except AttributeError as error:
        raise ConfigError(f"Module {module_name!r} has no {class_name!r}.") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{name} is not a subclass of {base.__name__}.")
    return found


EXAMPLES = {"Event": "processors.payments:Payment", "Processor": "processors.fraud:Fraud"}
