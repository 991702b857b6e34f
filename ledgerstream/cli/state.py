"""`ledgerstream state show`: what a processor knows of a key, now or then."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Database, Directory, Json, Log, LogConfig

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Processor

app = typer.Typer(
    no_args_is_help=True,
    help="What a processor keeps.\n\n"
    "Example: [bold]ledgerstream state show processors.fraud:Fraud 4711[/bold]",
)


@app.callback()
def state() -> None:
    """Keeps `state` a group while it has one command."""


@app.command(name="show")
def show_(
    processor: Annotated[
        str, typer.Argument(metavar="MODULE:CLASS", help="As in processors.fraud:Fraud.")
    ],
    key: Annotated[str, typer.Argument(help="Of the state: a number, or text.")],
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="TIME",
            help="Before the first event that is later than this event time: ISO 8601, a date "
            "(its midnight, UTC), or ns.",
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--state", help="Of this declared state only.")
    ] = None,
    log: Log = None,
    log_config: LogConfig = None,
    database: Database = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Show what each declared state has of a key, as committed or as of an event time.

    Example: [bold]ledgerstream state show processors.fraud:Fraud 4711 --at 2018-06-01T12:00Z[/bold]

    It is brought back from the newest snapshot and the log; with --at from the log's beginning.
    What a Sliding window shows is what the key's newest event saw.
    """
    from ledgerstream.events import parse_timestamp
    from ledgerstream.stream.processor import Processor

    kind = options.load(processor, Processor)
    if at is not None and re.fullmatch(r"\d{4}-\d\d-\d\d", at):
        at += "T00:00Z"
    time_ns = None if at is None else parse_timestamp(int(at) if at.isdigit() else at)

    from ledgerstream.cli.session import open_database, open_log, run_async
    from ledgerstream.stream.explain import key_rows, state_at
    from ledgerstream.stream.replay import Past

    async def look() -> dict[str, Any]:
        found: dict[str, list[dict[str, Any]]] = {}
        offsets: dict[str, int] = {}
        async with open_database(database, directory) as connection:
            async with open_log(log, directory, log_config) as client:
                for topic in kind.sources:
                    past = await Past.open(kind.over(topic), client, connection)
                    for partition, names in _places(kind, past, key, only).items():
                        machine, offset = await state_at(past, partition, time_ns)
                        offsets[f"{topic.name}-{partition}"] = offset
                        for name in names:
                            rows = key_rows(machine.state, name, _key(kind, name, key))
                            found.setdefault(name, []).extend(rows)
                    for text in past.notes.values():
                        show.note(text)
        return {"offset": offsets, "state": found}

    answer = run_async(look())
    if as_json:
        print(json.dumps(answer, indent=2, default=str))
        return
    for name, rows in answer["state"].items():
        for shown in show.state_rows(rows, show.state_kinds(kind, name)):
            values = " · ".join(f"{column} {value}".strip() for column, value in shown.items())
            print(f"{show.bold(name)}  {values}")
    for place, offset in answer["offset"].items():
        show.note(f"as of offset {offset:,} of {place}")


def _places(kind: type[Processor], past: Any, key: str, only: str | None) -> dict[int, list[str]]:
    """Partition → the states to look into there. Raises ConfigError for a state or a key that
    cannot be."""
    from ledgerstream.errors import ConfigError
    from ledgerstream.wire.columns import RowCodec

    names = [name for name in kind.states if only in (None, name)]
    if not names:
        raise ConfigError(
            f"{kind.__name__} declares no state {only!r}." if only else
            f"{kind.__name__} declares no state.",
            f"It has {', '.join(kind.states)}." if kind.states else "",
        )  # fmt: skip
    if past.topic_partitions == 1:
        return {0: names}
    rows = kind.source.event.default_row().reshape(1)
    value = _key(kind, names[0], key)
    rows[kind.source.key] = value.encode() if isinstance(value, str) else value
    codec = RowCodec(kind.source.event, key=kind.source.key)
    return {int(codec.hashes(rows)[0]) % past.topic_partitions: names}


def _key(kind: type[Processor], name: str, key: str) -> int | str:
    from ledgerstream.errors import ConfigError

    by = kind.states[name].by
    column = kind.source.event.columns()[by]
    if column.kind == "text":
        return key
    if column.kind == "enum":
        members = {choice.name: column.store(choice) for choice in column.choices}
        if key in members:
            return int(members[key])
    try:
        return int(key)
    except ValueError:
        raise ConfigError(
            f"{key!r} is no {by} of {kind.__name__}.{name}: it is an integer."
        ) from None
