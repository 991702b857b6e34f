"""`ledgerstream run`: a processor over a topic, each event counted exactly once in Postgres."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Database, Directory, Json, Log, LogConfig

if TYPE_CHECKING:
    from ledgerstream.stream.processor import Processor
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
    workers: Annotated[
        int,
        typer.Option(
            "--workers", min=1, help="Processes that share the partitions: partition mod N."
        ),
    ] = 1,
    log: Log = None,
    log_config: LogConfig = None,
    database: Database = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Run a processor until SIGTERM or Ctrl-C, which stop it at the end of a step.

    Example: [bold]ledgerstream run processors.fraud:Fraud --until-end[/bold]

    Results and offsets go to Postgres in one transaction: whatever is killed, and whenever, the
    next run goes on where the last commit ended. With several workers one that dies is started
    again, and the exit code is the worst of theirs.
    """
    if until_end and finish:
        raise typer.BadParameter("give --until-end or --finish, not both", param_hint="--finish")

    from ledgerstream.stream.processor import Processor

    kind = options.load(processor, Processor)

    from ledgerstream.cli.live import live, summary
    from ledgerstream.cli.session import database_url, open_log, run_async
    from ledgerstream.stream.several import Workers

    until: Until | None = "end" if until_end else "restored" if finish else None

    async def act() -> tuple[Progress, int]:
        with database_url(database, directory) as url:
            if workers > 1:
                return await _fleet(kind, processor, workers, log, log_config, directory, url,
                                    until, accept_new_code)  # fmt: skip
            async with open_log(log, directory, log_config) as client:
                worker = Workers(
                    kind,
                    client,
                    url,
                    until=until,
                    accept_new_code=accept_new_code,
                    say=show.note,
                )
                worker.stop_on_signals()
                async with live(worker.progress):
                    return await worker.run(), 0

    began = time.monotonic()
    progress, code = run_async(act())
    show.note(summary(progress, time.monotonic() - began))
    if as_json:
        print(json.dumps(asdict(progress)))
    if code:
        raise typer.Exit(code)


async def _fleet(
    kind: type[Processor],
    place: str,
    workers: int,
    log: str | None,
    log_config: Path | None,
    directory: Path,
    database: str,
    until: Until | None,
    accept_new_code: bool,
) -> tuple[Progress, int]:
    """Several worker processes; kernels are compiled here, before the first of them starts."""
    from ledgerstream.cli.fleet import Fleet, Task, shares
    from ledgerstream.cli.live import live
    from ledgerstream.cli.session import connect, log_address, security_of
    from ledgerstream.stream.warm import warm

    security = security_of(log, log_config)
    async with log_address(log, directory) as address:
        async with await connect(address, security) as client:
            partitions = {
                topic.name: (await client.topic(topic.name)).partitions for topic in kind.sources
            }
        for topic in kind.sources:
            kind.over(topic).check_partitions(partitions[topic.name])
        places = sum(partitions.values())
        if places < workers:
            names = ", ".join(map(repr, partitions))
            show.note(
                f"Topic {names} has {show.count(places, 'partition')}, and each has one worker: "
                f"{workers - places} of {workers} will not be started."
            )
        await asyncio.to_thread(warm, kind, show.note)
        tasks = [
            Task(
                place,
                address,
                database,
                share,
                until,
                accept_new_code,
                secured=security is not None,
                log_config=None if log_config is None else str(log_config),
            )
            for share in shares(partitions, workers)
        ]
        fleet = Fleet(kind.name, tasks, say=show.note)
        fleet.stop_on_signals()
        async with live(fleet.progress):
            code = await fleet.run()
    return fleet.progress, code
