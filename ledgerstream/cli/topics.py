"""`ledgerstream topic …`: make, list, describe and delete topics."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Directory, Json, Log, LogConfig
from ledgerstream.errors import ConfigError
from ledgerstream.topicconfig import INT_MAX

app = typer.Typer(
    no_args_is_help=True,
    help="Topics of the log.\n\nExample: [bold]ledgerstream topic create payments[/bold]",
)

Name = Annotated[str, typer.Argument(help="The topic's name.")]


@app.command()
def create(
    name: Name,
    partitions: Annotated[int, typer.Option(min=1, max=INT_MAX, help="How many partitions.")] = 1,
    config: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A topic setting, under Kafka's name. Repeatable."),
    ] = None,
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
) -> None:
    """Make a topic.

    Example: [bold]ledgerstream topic create payments --partitions 6 --config
    cleanup.policy=compact[/bold]
    """
    from ledgerstream.cli.session import open_log, run_async

    settings = dict(_setting(each) for each in config or ())

    async def act() -> None:
        async with open_log(log, directory, log_config) as client:
            await client.create_topic(name, partitions=partitions, config=settings)

    run_async(act())
    show.note(f"Topic {name!r} has {show.count(partitions, 'partition')}.")


@app.command(name="list")
def list_(
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """List the topics with the number of their records.

    Example: [bold]ledgerstream topic list --log 127.0.0.1:9092[/bold]
    """
    from ledgerstream.cli.session import open_log, run_async

    async def rows() -> list[dict[str, Any]]:
        async with open_log(log, directory, log_config) as client:
            found = []
            for name in (topic.name for topic in await client.topics()):
                partitions = await _partitions(client, name)
                offsets = sum(row["next_offset"] - row["first_offset"] for row in partitions)
                found.append({"topic": name, "partitions": len(partitions), "offsets": offsets})
            return found

    show.table(run_async(rows()), as_json=as_json, empty="There are no topics yet.")


@app.command()
def describe(
    name: Name,
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Show a topic's partitions: the offsets that can be read, [first, next).

    Example: [bold]ledgerstream topic describe payments --json[/bold]
    """
    from ledgerstream.cli.session import open_log, run_async

    async def rows() -> tuple[Any, list[dict[str, Any]]]:
        async with open_log(log, directory, log_config) as client:
            return await client.topic(name), await _partitions(client, name)

    info, partitions = run_async(rows())
    if as_json:
        about = {"topic": name, "topic_id": str(info.topic_id), "partitions": partitions}
        print(json.dumps(about, indent=2))
        return
    print(f"{name}, topic id {info.topic_id}")
    show.table(partitions)


@app.command()
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
) -> None:
    """Delete a topic and its records. This cannot be undone, so it asks first.

    Example: [bold]ledgerstream topic delete payments --yes[/bold]
    """
    from ledgerstream.cli.session import open_log, run_async

    async def act() -> bool:
        async with open_log(log, directory, log_config) as client:
            partitions = await _partitions(client, name)
            records = sum(row["next_offset"] - row["first_offset"] for row in partitions)
            if not yes and not _agreed(f"Delete topic {name!r} and its {records:,} offsets?"):
                return False
            await client.delete_topic(name)
            return True

    show.note(f"Topic {name!r} is {'deleted' if run_async(act()) else 'left as it is'}.")


def _agreed(question: str) -> bool:
    """Whether somebody at the terminal types yes. Raises ConfigError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise ConfigError("There is no terminal to ask at, and nothing is deleted.", "Give --yes.")
    print(f"{question} Type yes: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() == "yes"


async def _partitions(client: Any, name: str) -> list[dict[str, Any]]:
    from ledgerstream.client import EARLIEST, LATEST

    indexes = range((await client.topic(name)).partitions)
    first = await client.list_offsets(name, dict.fromkeys(indexes, EARLIEST))
    end = await client.list_offsets(name, dict.fromkeys(indexes, LATEST))
    return [{"partition": i, "first_offset": first[i], "next_offset": end[i]} for i in indexes]


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--config")
    return name, value
