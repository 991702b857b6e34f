"""`ledgerstream explain`: why a result row is there."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Database, Directory, Json, Log, LogConfig
from ledgerstream.errors import ConfigError, LedgerStreamError

if TYPE_CHECKING:
    import asyncpg

    from ledgerstream.stream.explain import Explained
    from ledgerstream.stream.processor import Processor
    from ledgerstream.stream.tables import Table


def explain(
    table: Annotated[str, typer.Argument(help="The result table, as in fraud_alert.")],
    key: Annotated[
        list[str],
        typer.Argument(
            help="The value of its first column, or of its first columns in order; or "
            "topic-partition:offset of the event, as in payments-0:88141."
        ),
    ],
    log: Log = None,
    log_config: LogConfig = None,
    database: Database = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Explain a result row: its event, step and rules, and the state of its keys just before.

    Example: [bold]ledgerstream explain fraud_alert 88141[/bold]

    The state is replayed from the log up to the event, and the event is processed once more: what
    is shown is what the rules saw.
    """
    from ledgerstream.cli.session import open_database, open_log, run_async
    from ledgerstream.stream.explain import by_topic, explain, find_rows
    from ledgerstream.stream.replay import Past

    async def look() -> list[tuple[Explained, type[Table], type[Processor]]]:
        async with open_database(database, directory) as connection:
            found = []
            for processor, model in await _processors(connection, table):
                rows = await find_rows(connection, model, key)
                if not rows:
                    continue
                async with open_log(log, directory, log_config) as client:
                    for topic, mine in (await by_topic(connection, processor, rows)).items():
                        past = await Past.open(processor.over(topic), client, connection)
                        for row in mine:
                            told = await explain(past, model, row)
                            found.append((told, model, processor))
                        for text in past.notes.values():
                            show.note(text)
            return found

    found = run_async(look())
    if not found:
        raise LedgerStreamError(
            f"Table {table!r} has no row of {' '.join(key)}.",
            "Give the value of its first column, or the event: topic-partition:offset.",
        )
    if as_json:
        print(json.dumps([asdict(told) for told, _, _ in found], indent=2, default=str))
        return
    for told, model, processor in found:
        _print(told, processor, model)


async def _processors(
    connection: asyncpg.Connection, table: str
) -> list[tuple[type[Processor], type[Table]]]:
    """Those that write into the table. Raises ConfigError, which names the tables there are."""
    from ledgerstream.stream.explain import tables_of
    from ledgerstream.stream.processor import Processor

    known = []
    if await connection.fetchval("SELECT to_regclass('ls_processors')") is not None:
        known = await connection.fetch("SELECT class, tables FROM ls_processors ORDER BY processor")
    places = [row["class"] for row in known if table in row["tables"]]
    if not places:
        tables = sorted({name for row in known for name in row["tables"]})
        raise ConfigError(
            f"No processor that ran here writes a table {table!r}.",
            f"There are {', '.join(tables)}." if tables else "Run one first, or check --database.",
        )
    kinds = [options.load(place, Processor) for place in places]
    return [(kind, tables_of(kind)[table]) for kind in kinds]


def _print(told: Explained, processor: type[Processor], model: type[Table]) -> None:
    origin = told.origin
    place = f"{origin['topic']}-{origin['partition']}:{origin['offset']:,}"
    print(show.bold(f"{told.table}") + f"  row {origin['n']} of {told.processor} for {place}")
    _block("row", show.row_values(told.row, show.table_kinds(model)))
    if told.recomputed != told.row:
        _block("recomputed now, it differs", show.row_values(
            told.recomputed or {}, show.table_kinds(model)))  # fmt: skip
    _block("event", show.row_values(told.event, show.event_kinds(processor.source.event)))
    for name, rows in told.state.items():
        for shown in show.state_rows(rows, show.state_kinds(processor, name)):
            _block(f"state {name}, just before", shown)
    if told.step:
        step = told.step
        print(
            f"  step: offsets [{step['first_offset']:,}, {step['next_offset']:,}), rules version "
            f"{step['rule_version']}, code {step['code_version']}, committed "
            f"{show.local_time(int(step['committed_at'].timestamp()) * 10**9)}"
        )
    for sentence in told.rules:
        print(f"  {sentence}")


def _block(title: str, values: dict[str, Any]) -> None:
    print(f"  {title}: " + " · ".join(f"{name} {value}".strip() for name, value in values.items()))
