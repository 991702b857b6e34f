"""`ledgerstream config`: every setting and every limit, as they are in force; no secret."""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import tokenize
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ledgerstream.cli import show
from ledgerstream.cli.options import Json, LogConfig

if TYPE_CHECKING:
    from pydantic import BaseModel


def config(
    file: Annotated[
        Path | None,
        typer.Option("--config", help="A TOML file, as the broker takes it.", show_default=False),
    ] = None,
    log_config: LogConfig = None,
    as_json: Json = False,
) -> None:
    """Print the settings in force, of the broker and of --log, where each comes from, and all
    limits.

    Example: [bold]LEDGERSTREAM_PORT=9093 ledgerstream config[/bold]

    Settings may be changed by flag, environment or file; limits stand in ledgerstream/limits.py.
    """
    from ledgerstream.limits import LIMITS

    settings, log = _settings(file), _log_settings(log_config)
    limits = {field.name: getattr(LIMITS, field.name) for field in fields(LIMITS)}
    if as_json:
        print(
            json.dumps({"settings": settings, "log": log, "limits": limits}, indent=2, default=str)
        )
        return
    show.table(settings)
    print()
    show.table(log)
    print()
    show.table(
        [
            {"of": room, "limit": name, "value": limits[name], "what it is": said}
            for room, name, said in _described()
        ]
    )


def _settings(file: Path | None) -> list[dict[str, Any]]:
    from ledgerstream.broker.settings import Settings, load

    return _rows(load(file), Settings().model_fields_set, "LEDGERSTREAM_", file)


def _log_settings(file: Path | None) -> list[dict[str, Any]]:
    from ledgerstream.cli.logconfig import PREFIX, load

    in_force = load(file)
    environment = {
        name for name in type(in_force).model_fields if os.environ.get(PREFIX + name.upper())
    }
    return _rows(in_force, environment, PREFIX, file)


def _rows(
    in_force: BaseModel, from_environment: set[str], prefix: str, file: Path | None
) -> list[dict[str, Any]]:
    """A setting is named as in the environment, where LEDGERSTREAM_ stands before it."""
    rows = []
    for name, field in type(in_force).model_fields.items():
        source = "default"
        if name in in_force.model_fields_set:
            source = f"{prefix}{name.upper()}" if name in from_environment else str(file)
        value = getattr(in_force, name)
        rows.append(
            {
                "setting": f"{prefix.removeprefix('LEDGERSTREAM_').lower()}{name}",
                "value": value if value is None or isinstance(value, bool) else str(value),
                "from": source,
                "what it is": field.description,
            }
        )
    return rows


def _described() -> list[tuple[str, str, str]]:
    """(room, name, what it is) of each limit: the comments of limits.py."""
    from ledgerstream.limits import Limits

    source = inspect.getsource(Limits)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    fields = [each for each in body.body if isinstance(each, ast.AnnAssign)]
    inside = {n for each in fields for n in range(each.lineno, (each.end_lineno or 0) + 1)}
    found = []
    for each in fields:
        assert isinstance(each.target, ast.Name)
        lines = range(each.lineno, (each.end_lineno or 0) + 1)
        room = next(comments[n] for n in range(each.lineno, 0, -1) if n in comments.keys() - inside)
        said = " ".join(comments[n] for n in lines if n in comments)
        found.append((room, each.target.id, said))
    return found
