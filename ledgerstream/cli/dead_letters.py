"""`ledgerstream dead-letters …`: records that could not be processed, and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Database, Directory, Json

app = typer.Typer(
    no_args_is_help=True,
    help="Records that could not be processed; the stream went on without them.\n\n"
    "Example: [bold]ledgerstream dead-letters list[/bold]",
)

PREVIEW_BYTES = 60


@app.callback()
def dead_letters() -> None:
    """Keeps `dead-letters` a group while it has one command."""


@app.command(name="list")
def list_(
    processor: Annotated[
        str | None, typer.Option(help="Of this processor only.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 100,
    database: Database = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """List dead letters, the newest first: where each record lies in the log, and why it is here.

    Example: [bold]ledgerstream dead-letters list --processor Fraud --json[/bold]
    """
    from ledgerstream.cli.session import open_database, run_async

    async def rows() -> list[dict[str, Any]]:
        async with open_database(database, directory) as connection:
            if await connection.fetchval("SELECT to_regclass('ls_dead_letters')") is None:
                return []
            found = await connection.fetch(_NEWEST, processor, limit)
            return [_row(dict(letter), as_json) for letter in found]

    show.table(run_async(rows()), as_json=as_json, empty="There are no dead letters.")


_NEWEST = """
SELECT processor, topic, partition, "offset", dead_at, error, key, payload
  FROM ls_dead_letters WHERE $1::text IS NULL OR processor = $1
 ORDER BY dead_at DESC, topic, partition, "offset" DESC LIMIT $2"""


def _row(letter: dict[str, Any], as_json: bool) -> dict[str, Any]:
    if as_json:
        blobs = {name: show.text(letter[name]) for name in ("key", "payload")}
        return letter | blobs | {"dead_at": letter["dead_at"].isoformat()}
    payload = letter["payload"]
    place = f"{letter['topic']}-{letter['partition']}:{letter['offset']}"
    return {
        "processor": letter["processor"],
        "record": place,
        "since": show.local_time(int(letter["dead_at"].timestamp()) * 1_000_000_000),
        "error": letter["error"],
        "payload": None if payload is None else _one_line(show.text(payload) or ""),
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())[:PREVIEW_BYTES]
