"""`ledgerstream dead-letters …`: records that could not be processed, and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Database, Directory, Json, Log, LogConfig

app = typer.Typer(
    no_args_is_help=True,
    help="Records that could not be processed; the stream went on without them.\n\n"
    "Example: [bold]ledgerstream dead-letters list[/bold]",
)

PREVIEW_BYTES = 60


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
            if await connection.fetchval("SELECT to_regclass('ls_dead')") is None:
                return []
            found = await connection.fetch(_NEWEST, processor, limit)
            return [_row(dict(letter), as_json) for letter in found]

    show.table(run_async(rows()), as_json=as_json, empty="There are no dead letters.")


_NEWEST = """
SELECT processor, topic, partition, "offset", dead_at, error, key, payload, retried_at,
       retried_offset
  FROM ls_dead_letters WHERE $1::text IS NULL OR processor = $1
 ORDER BY dead_at DESC, topic, partition, "offset" DESC LIMIT $2"""


@app.command(name="show")
def show_(
    record: Annotated[
        str, typer.Argument(metavar="RECORD", help="As the list names it: payments-0:88213.")
    ],
    database: Database = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Show one dead letter whole: key, payload, error, and what became of it.

    Example: [bold]ledgerstream dead-letters show payments-0:88213[/bold]
    """
    from ledgerstream.cli.session import open_database, run_async
    from ledgerstream.errors import LedgerStreamError
    from ledgerstream.stream.retry import Place

    place = Place.parse(record)

    async def letters() -> list[dict[str, Any]]:
        async with open_database(database, directory) as connection:
            if await connection.fetchval("SELECT to_regclass('ls_dead')") is None:
                return []
            return [dict(row) for row in await connection.fetch(
                _ONE, place.topic, place.partition, place.offset)]  # fmt: skip

    found = run_async(letters())
    if not found:
        raise LedgerStreamError(
            f"There is no dead letter {place}.", "`ledgerstream dead-letters list` names them."
        )
    if as_json:
        show.table([_row(letter, as_json) for letter in found], as_json=True)
        return
    for letter in found:
        shown = _row(letter, as_json)
        for name in ("record", "processor", "since", "retried", "error"):
            print(f"{name:>10}  {show.cell(shown[name])}")
        for name in ("key", "payload"):
            print(f"{name:>10}  {show.cell(show.text(letter[name]))}")


@app.command()
def retry(
    records: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECORD]…", help="As the list names them; without any, all."),
    ] = None,
    processor: Annotated[
        str | None, typer.Option(help="Of this processor only.", show_default=False)
    ] = None,
    even_if_counted: Annotated[
        bool,
        typer.Option(
            "--even-if-counted", help="Though another processor of the topic has counted them."
        ),
    ] = False,
    log: Log = None,
    log_config: LogConfig = None,
    database: Database = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Append dead letters to the log again: each once, in order, with its origin in headers.

    Example: [bold]ledgerstream dead-letters retry --processor Fraud[/bold]

    Do it when the processor, or the event type, can take them now. A letter that has been retried
    is left alone; a retry that was killed is made whole by the next one, which waits for half a
    minute first.
    """
    from ledgerstream.cli.session import open_database, open_log, run_async
    from ledgerstream.stream import retry as again

    places = [again.Place.parse(each) for each in records or []]

    async def act() -> list[again.Retried]:
        async with open_database(database, directory) as connection:
            if await connection.fetchval("SELECT to_regclass('ls_dead')") is None:
                return []
            async with open_log(log, directory, log_config) as client:
                return await again.retry(
                    connection, client, processor=processor, places=places,
                    even_if_counted=even_if_counted,
                )  # fmt: skip

    rows = [
        {"record": str(each.origin), "new_offset": each.offset, "found": each.found}
        for each in run_async(act())
    ]
    show.table(rows, as_json=as_json, empty="There is nothing to retry.")


_ONE = """
SELECT processor, topic, partition, "offset", dead_at, error, key, payload, retried_at,
       retried_offset
  FROM ls_dead_letters WHERE topic = $1 AND partition = $2 AND "offset" = $3 ORDER BY processor"""


def _row(letter: dict[str, Any], as_json: bool) -> dict[str, Any]:
    if as_json:
        blobs = {name: show.text(letter[name]) for name in ("key", "payload")}
        times = {
            name: None if letter[name] is None else letter[name].isoformat()
            for name in ("dead_at", "retried_at")
        }
        return letter | blobs | times
    payload = letter["payload"]
    place = f"{letter['topic']}-{letter['partition']}:{letter['offset']}"
    return {
        "processor": letter["processor"],
        "record": place,
        "since": show.local_time(int(letter["dead_at"].timestamp()) * 1_000_000_000),
        "retried": None if letter["retried_at"] is None else f"as {letter['retried_offset']:,}",
        "error": letter["error"],
        "payload": None if payload is None else _one_line(show.text(payload) or ""),
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())[:PREVIEW_BYTES]
