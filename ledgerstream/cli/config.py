"""`ledgerstream config`: every setting and every limit, as they are in force."""

from __future__ import annotations

import ast
import inspect
import io
import json
import tokenize
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ledgerstream.cli import show
from ledgerstream.cli.options import Json


def config(
    file: Annotated[
        Path | None,
        typer.Option("--config", help="A TOML file, as the broker takes it.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the broker's settings in force, where each comes from, and all limits.

    Example: [bold]LEDGERSTREAM_PORT=9093 ledgerstream config[/bold]

    Settings may be changed by flag, environment or file; limits stand in ledgerstream/limits.py.
    """
    from ledgerstream.limits import LIMITS

    settings = _settings(file)
    limits = {field.name: getattr(LIMITS, field.name) for field in fields(LIMITS)}
    if as_json:
        print(json.dumps({"settings": settings, "limits": limits}, indent=2, default=str))
        return
    show.table(settings)
    print()
    show.table(
        [
            {"of": room, "limit": name, "value": limits[name], "what it is": said}
            for room, name, said in _described()
        ]
    )


def _settings(file: Path | None) -> list[dict[str, Any]]:
    from ledgerstream.broker.settings import Settings, load

    in_force, from_environment = load(file), Settings().model_fields_set
    rows = []
    for name, field in Settings.model_fields.items():
        source = "default"
        if name in in_force.model_fields_set:
            source = f"LEDGERSTREAM_{name.upper()}" if name in from_environment else str(file)
        value = getattr(in_force, name)
        rows.append(
            {
                "setting": name,
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
