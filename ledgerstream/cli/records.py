"""`ledgerstream import`, `produce` and `consume`: records into the log and out of it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Directory, Encoding, EventName, Key, Log, LogConfig, Partitions
from ledgerstream.errors import DecodeError

if TYPE_CHECKING:
    import numpy as np

LINES_AT_ONCE = 10_000
BAD_TOLD = 5  # records that are no events are told of one by one up to this

Topic = Annotated[str, typer.Argument(help="The topic.")]
SomeEvent = Annotated[
    str | None,
    typer.Option(
        "--event",
        metavar="MODULE:CLASS",
        help="The event type, as in processors.payments:Payment: lines are JSON objects of it.",
        show_default=False,
    ),
]


def import_(
    file: Annotated[
        Path,
        typer.Argument(help="A CSV (also .gz, .zst) or Parquet file.", exists=True, dir_okay=False),
    ],
    event: EventName,
    topic: Annotated[str, typer.Option(help="The topic to write to; made if it is not there.")],
    key: Key = None,
    encoding: Encoding = "fixed",
    partitions: Partitions = 1,
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
) -> None:
    """Write a file's rows to a topic, in the file's order.

    Example: [bold]ledgerstream import payments.csv.gz --topic payments --event
    processors.payments:Payment --key customer[/bold]

    A field takes the column of its name or alias. Money is read from its digits, exactly.
    """
    from ledgerstream.cli.session import fill, open_log, run_async
    from ledgerstream.client.tabular import read
    from ledgerstream.events import Event

    kind = options.load(event, Event)
    check_encoding(encoding)

    async def act() -> int:
        async with open_log(log, directory, log_config) as client:
            with show.bar(f"importing {file.name}", "rows") as advance:
                return await fill(
                    client, topic, kind, key, encoding, partitions, read(file, kind), advance
                )

    keyless = "" if key else " They have no key: a processor wants the one that it names (--key)."
    show.note(
        f"{show.count(run_async(act()), 'row')} of {file.name} went to topic {topic!r}.{keyless}"
    )


def produce(
    topic: Topic,
    event: SomeEvent = None,
    key: Key = None,
    separator: Annotated[
        str | None,
        typer.Option(
            "--separator", help="Text before it is the key. For lines that are no events."
        ),
    ] = None,
    encoding: Encoding = "fixed",
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
) -> None:
    """Write each line of standard input as a record; done when all are durable.

    Example: [bold]echo 'paris:42' | ledgerstream produce readings --separator :[/bold]

    With --event, a line is a JSON object, as `ledgerstream consume --event` prints it.
    """
    from ledgerstream.cli.session import find_topic, open_log, run_async, send_lines, write_rows
    from ledgerstream.events import Event

    check_encoding(encoding)

    async def act() -> int:
        async with open_log(log, directory, log_config) as client:
            await find_topic(client, topic)
            if event is None:
                return await send_lines(client, topic, _lines(), separator)
            kind = options.load(event, Event)
            written = 0
            for lines in _lines():
                rows = _parse(kind, lines, written)
                await write_rows(client, topic, rows, kind, key, encoding)
                written += len(rows)
            return written

    show.note(f"{show.count(run_async(act()), 'record')} went to topic {topic!r}.")


def consume(
    topic: Topic,
    event: SomeEvent = None,
    encoding: Encoding = "fixed",
    begin: Annotated[
        str,
        typer.Option("--from", help="earliest, latest, a day (UTC), or a time: 2018-04-01T12:00Z."),
    ] = "earliest",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many.", show_default=False)
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for more at the end.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Each record with partition, offset, time and key.")
    ] = False,
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
) -> None:
    """Print a topic's records, one a line.

    Example: [bold]ledgerstream consume payments --event processors.payments:Payment --limit
    3[/bold]

    Without --event: key, a tab, and value, as text. With it: JSON objects, which
    `ledgerstream produce --event` reads back.
    """
    from ledgerstream.cli.session import chunks, open_log, run_async
    from ledgerstream.events import Event, parse_timestamp

    check_encoding(encoding)
    start: str | int = begin
    if begin not in ("earliest", "latest"):
        day = re.fullmatch(r"\d{4}-\d\d-\d\d", begin)
        start = parse_timestamp(f"{begin}T00:00Z" if day else begin) // 1_000_000
    kind = options.load(event, Event) if event else None

    bad = BadRecords(event)

    async def act() -> None:
        left = limit if limit is not None else sys.maxsize
        async with open_log(log, directory, log_config) as client:
            async for chunk in chunks(client, topic, start, follow=follow):
                if kind is None:
                    lines = _raw_lines(chunk, as_json)
                else:
                    lines = _event_lines(chunk, kind, encoding, as_json, left, bad)
                try:
                    for line in islice(lines, left):
                        print(line)
                        left -= 1
                    sys.stdout.flush()
                except BrokenPipeError:  # `ledgerstream consume … | head` is done when head is
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    return
                if left <= 0:
                    return

    run_async(act())
    bad.tell()


class BadRecords:
    """Records that are no events of the type that was given: the first few are told of."""

    def __init__(self, event: str | None) -> None:
        self._event = event
        self.good = 0
        self._bad = 0

    def found(self, partition: int, bad: Sequence[Any]) -> None:
        for each in bad[: max(BAD_TOLD - self._bad, 0)]:
            show.note(f"{partition}:{each.offset}: {each.reason}")
        self._bad += len(bad)

    def tell(self) -> None:
        """DecodeError where there was nothing else."""
        more = f"{show.count(self._bad, 'record')} could not be read as {self._event}."
        if self._bad and not self.good:
            raise DecodeError(more, "Is --event right, and --encoding?")
        if self._bad > BAD_TOLD:
            show.note(more)


def check_encoding(encoding: str) -> Literal["fixed", "json"]:
    if encoding not in ("fixed", "json"):
        raise typer.BadParameter(f"{encoding!r} is neither fixed nor json", param_hint="--encoding")
    return cast(Literal["fixed", "json"], encoding)


def _lines() -> Iterator[list[bytes]]:
    """Standard input by the thousand, or line by line where a person types."""
    at_once = 1 if sys.stdin.isatty() else LINES_AT_ONCE
    while lines := [line.rstrip(b"\r\n") for line in islice(sys.stdin.buffer, at_once)]:
        yield lines


def _parse(event: Any, lines: list[bytes], before: int) -> np.ndarray:
    from ledgerstream.wire.jsonrows import JsonRows

    rows, reasons = JsonRows(event).decode(list(lines))
    for number, reason in enumerate(reasons, before + 1):
        if reason is not None:
            raise DecodeError(
                f"Line {number:,}: {reason}", f"The {before:,} lines before are written."
            )
    return rows


def _raw_lines(chunk: Any, as_json: bool) -> Iterator[str]:
    for record in _records(chunk):
        key, value = show.text(record.key), show.text(record.value)
        if as_json:
            yield json.dumps(_place(chunk, record.offset, record.timestamp, key) | {"value": value})
        else:
            yield f"{key}\t{value}" if key is not None else f"{value}"


def _records(chunk: Any) -> Iterator[Any]:
    from ledgerstream.wire import batches

    for at, header in batches.headers(chunk.data):
        if not header.control:
            yield from (r for r in batches.records(chunk.data, at) if r.offset >= chunk.start)


def _event_lines(
    chunk: Any, event: Any, encoding: str, as_json: bool, at_most: int, bad: BadRecords
) -> Iterator[str]:
    from ledgerstream.wire.columns import RowCodec
    from ledgerstream.wire.jsonrows import JsonRows

    codec = RowCodec(event, None, check_encoding(encoding))
    decoded = codec.decode(chunk.data, start=chunk.start)
    bad.found(chunk.partition, decoded.bad)
    bad.good += len(decoded.rows)
    objects = JsonRows(event).encode(decoded.rows[:at_most])
    for i, text in enumerate(objects):
        if as_json:
            place = _place(chunk, int(decoded.offset[i]), int(decoded.timestamp[i]))
            yield json.dumps(place | {"value": json.loads(text)})
        else:
            yield text.decode()


def _place(chunk: Any, offset: int, timestamp_ms: int, key: str | None = None) -> dict[str, Any]:
    place = {"partition": chunk.partition, "offset": offset, "timestamp_ms": timestamp_ms}
    return place | ({} if key is None else {"key": key})
