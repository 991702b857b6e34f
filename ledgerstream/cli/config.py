"""`ledgerstream config`: every setting and every limit, as they are in force."""

from __future__ import annotations

import json
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
    show.table([{"limit": name, "value": value} for name, value in limits.items()])


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
