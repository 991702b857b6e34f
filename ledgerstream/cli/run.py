"""`ledgerstream run`: a processor over a topic, each event counted exactly once in Postgres."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Database, Directory, Json, Log

if TYPE_CHECKING:
    from ledgerstream.stream.worker import Progress

Until = Literal["end", "restored"]


def run(
    processor: Annotated[
        str, typer.Argument(metavar="MODULE:CLASS", help="As in processors.fraud:Fraud.")
    ],
    until_end: Annotated[
        bool, typer.Option("--until-end", help="Stop when what the log holds now is done.")
    ] = False,
    finish: Annotated[
        bool,
        typer.Option(
            "--finish", help="Bring the state back, take a snapshot, stop: before new code."
        ),
    ] = False,
    accept_new_code: Annotated[
        bool,
        typer.Option(
            "--accept-new-code",
            help="Replay with code that did not compute those events; this is recorded.",
        ),
    ] = False,
    log: Log = None,
    database: Database = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Run a processor until SIGTERM or Ctrl-C, which stop it at the end of a step.

    Example: [bold]ledgerstream run processors.fraud:Fraud --until-end[/bold]

    Results and offsets go to Postgres in one transaction: whatever is killed, and whenever, the
    next run goes on where the last commit ended.
    """
    if until_end and finish:
        raise typer.BadParameter("give --until-end or --finish, not both", param_hint="--finish")

    from ledgerstream.stream.processor import Processor

    kind = options.load(processor, Processor)

    from ledgerstream.cli.live import live, summary
    from ledgerstream.cli.session import database_url, open_log, run_async
    from ledgerstream.stream.worker import Worker

    until: Until | None = "end" if until_end else "restored" if finish else None

    async def act() -> Progress:
        with database_url(database, directory) as url:
            async with open_log(log, directory) as client:
                worker = Worker(
                    kind,
                    client,
                    url,
                    until=until,
                    accept_new_code=accept_new_code,
                    say=show.note,
                )
                worker.stop_on_signals()
                async with live(worker.progress):
                    return await worker.run()

    began = time.monotonic()
    progress = run_async(act())
    show.note(summary(progress, time.monotonic() - began))
    if as_json:
        print(json.dumps(asdict(progress)))
