"""`ledgerstream verify`: committed results are computed again and compared."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Database, Directory, Json, Log, LogConfig

if TYPE_CHECKING:
    from ledgerstream.stream.verify import Verified


def verify(
    processor: Annotated[
        str, typer.Argument(metavar="MODULE:CLASS", help="As in processors.fraud:Fraud.")
    ],
    splits: Annotated[
        int, typer.Option("--splits", min=1, help="Under how many random splits into batches.")
    ] = 2,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Of the splits; without it, another each time."),
    ] = None,
    log: Log = None,
    log_config: LogConfig = None,
    database: Database = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Compute what a processor has committed again, from the log, and compare.

    Example: [bold]ledgerstream verify processors.fraud:Fraud --splits 3[/bold]

    Every row of append-only tables, the last content of tables with a key and the final rows of
    windows must come out again to the bit, with every recorded digest of the state, under random
    batches and restarts. The first difference is named, and the exit code is 5.
    """
    from ledgerstream.stream.processor import Processor

    kind = options.load(processor, Processor)

    from ledgerstream.cli.session import database_url, open_log, run_async
    from ledgerstream.stream.verify import verify

    chosen = secrets.randbelow(2**32) if seed is None else seed

    async def act() -> list[Verified]:
        with database_url(database, directory) as url, show.bar("verifying", "events") as advance:
            async with open_log(log, directory, log_config) as client:
                return [
                    await verify(
                        kind.over(topic), client, url, splits=splits, seed=chosen, advance=advance
                    )
                    for topic in kind.sources
                ]

    every = run_async(act())
    for found in every:
        show.note(str(found))
    if as_json:
        told = [asdict(found) for found in every]
        print(json.dumps(told[0] if len(told) == 1 else told))
