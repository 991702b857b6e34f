"""`ledgerstream status`: how far each partition is, and why one stopped."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Database, Directory, Json, Log, LogConfig

if TYPE_CHECKING:
    from ledgerstream.stream.status import Status

KIB = 1024


def status(
    why: Annotated[
        bool, typer.Option("--why", help="Why partitions stopped, and what to type.")
    ] = False,
    log: Log = None,
    log_config: LogConfig = None,
    database: Database = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Show each processor's partitions: committed offset, lag, watermark, last step, state, owner.

    Example: [bold]ledgerstream status --why[/bold]

    The lag counts events that stand in the log behind what is committed. Event-time windows that
    end before the watermark are final. Of the last step are shown its events, how long they took
    to decode and compute, and how long the commit; of the state, the size of the newest snapshot.

    For people who have only psql there are the views ls_lag, ls_dead and ls_explain.
    """
    from ledgerstream.cli.session import open_database, run_async
    from ledgerstream.stream.status import statuses

    async def look() -> list[Status]:
        async with open_database(database, directory) as connection:
            found = await statuses(connection)
        ends = await _log_ends(log, log_config, directory, {each.topic for each in found})
        return [
            replace(each, log_end=ends.get((each.topic, each.partition), each.log_end))
            for each in found
        ]

    found = run_async(look())
    where = options.where_given(log, database, directory, log_config)
    if as_json:
        print(json.dumps([{**asdict(each), "lag": each.lag} for each in found], indent=2))
        return
    stopped = [each for each in found if each.why is not None]
    if why:
        _tell(stopped, where)
        return
    show.table([_row(each) for each in found], empty="No processor has run here yet.")
    if stopped:
        count = show.count(len(stopped), "partition")
        command = f"ledgerstream status --why{where}"
        show.note(f"{count} stopped: `{command}` says why.")


async def _log_ends(
    log: str | None, log_config: Path | None, directory: Path, topics: set[str]
) -> dict[tuple[str, int], int]:
    """(topic, partition) → where the log ends now; nothing of a log that is not there."""
    from ledgerstream.cli.session import open_log
    from ledgerstream.client import LATEST
    from ledgerstream.errors import KafkaError

    ends: dict[tuple[str, int], int] = {}
    if not topics or (log is None and not (directory / "log").exists()):
        return ends
    async with open_log(log, directory, log_config) as client:
        for topic in sorted(topics):
            try:
                info = await client.topic(topic)
            except KafkaError:  # deleted: what the worker last saw must do
                continue
            every = dict.fromkeys(range(info.partitions), LATEST)
            found = await client.list_offsets(topic, every)
            ends |= {(topic, number): end for number, end in found.items()}
    return ends


def _row(each: Status) -> dict[str, Any]:
    state = "stopped" if each.why is not None else "running" if each.owner_alive else "at rest"
    return {
        "processor": each.processor,
        "partition": f"{each.topic}-{each.partition}",
        "is": state,
        "committed": each.next_offset,
        "lag": each.lag,
        "event_time": None if each.event_time is None else show.local_time(each.event_time),
        "watermark": None if each.watermark is None else show.local_time(each.watermark),
        "last_commit": _ago(each.commit_time),
        "step": _step(each),
        "state": None if each.state_bytes is None else _size(each.state_bytes),
        "dead": each.dead,
    }


def _step(each: Status) -> str | None:
    """ "2,000 events in 12 + 8 ms": computed and committed."""
    if each.step_events is None:
        return None
    took = "" if each.step_ms is None else f" in {each.step_ms:,.0f} + {each.commit_ms:,.0f} ms"
    return f"{show.count(each.step_events, 'event')}{took}"


def _tell(stopped: list[Status], where: str) -> None:
    """Each stopped partition, its cause, and the command to type."""
    if not stopped:
        show.note("No partition has stopped.")
    for each in stopped:
        assert each.why is not None
        print(show.bold(f"{each.processor} · {each.topic}-{each.partition}"), end="")
        print(f" · {_ago(each.stopped_time)}")
        for line in (*each.why.splitlines(), each.remedy or ""):
            if line:
                print(f"  {line.strip()}")
        if each.place is not None:
            print(f"  Then: ledgerstream run {each.place}{where}")


def _ago(ns: int | None) -> str | None:
    return None if ns is None else f"{show.duration(max(time.time() - ns / 1e9, 0))} ago"


def _size(count: int) -> str:
    if count < KIB:
        return show.count(count, "byte")
    units, size = ["KiB", "MiB", "GiB", "TiB"], count / KIB
    while size >= KIB and len(units) > 1:
        size /= KIB
        units.pop(0)
    return f"{size:,.1f} {units[0]}"
