"""How things look: tables, numbers, times and bars.

Results go to stdout, everything else to stderr. On a terminal a bar shows rate and time left; in a
pipe there is none. Nothing here is printed in a width of its own choosing: a piped table has whole
lines.
"""

from __future__ import annotations

import base64
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab and line ends


def note(text: str) -> None:
    """A line for the reader, beside the results."""
    print(text, file=sys.stderr)


def bold(text: str) -> str:
    """Bold on a terminal."""
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else text


def table(rows: Sequence[Mapping[str, Any]], *, as_json: bool = False, empty: str = "") -> None:
    """Rows with the same keys, as aligned columns or as one JSON array."""
    if as_json:
        print(json.dumps([dict(row) for row in rows], indent=2, default=str))
        return
    if not rows:
        note(empty)
        return
    heads = list(rows[0])
    cells = [[cell(row[head]) for head in heads] for row in rows]
    right = [isinstance(rows[0][head], (int, float)) for head in heads]
    heads = [head.replace("_", " ") for head in heads]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for line in [heads, *cells]:
        padded = [
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(line, widths, right, strict=True)
        ]
        print("  ".join(padded).rstrip())


def count(number: int, noun: str) -> str:
    """`count(1, "row") == "1 row"`, `count(1204, "row") == "1,204 rows"`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def cell(value: Any) -> str:
    """A value as people write it."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}"
        case _:
            return str(value)


def text(data: bytes | None) -> str | None:
    """UTF-8, or base64 where it is none or would steer a terminal."""
    if data is None:
        return None
    try:
        decoded = data.decode()
    except UnicodeDecodeError:
        decoded = None
    if decoded is None or _CONTROLS.search(decoded):
        return f"base64:{base64.b64encode(data).decode()}"
    return decoded


def duration(seconds: float) -> str:
    """`duration(0.0123) == "12 ms"`, `duration(75) == "1 min 15 s"`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:,.0f} min {seconds % 60:.0f} s"


def local_time(ns: int) -> str:
    """In the reader's zone with the UTC beside it; once where they are the same."""
    from ledgerstream.events import format_timestamp

    here = time.localtime(ns // 1_000_000_000)
    utc = format_timestamp(ns // 1_000_000_000 * 1_000_000_000)
    if here.tm_gmtoff == 0:
        return utc
    return f"{time.strftime('%Y-%m-%d %H:%M:%S %Z', here)} ({utc})"


def table_kinds(table: Any) -> dict[str, str]:
    """Of a result table: column → "time", the currency of money, or a scale such as "9"."""
    from typing import get_type_hints

    from ledgerstream.stream.tables import timestamps

    kinds = dict.fromkeys(timestamps(table), "time")
    for name, hint in get_type_hints(table, include_extras=True).items():
        for inner in getattr(hint, "__args__", ()):
            kinds |= _marked(name, getattr(inner, "__metadata__", ()))
    return kinds


def _marked(name: str, marks: Iterable[object]) -> dict[str, str]:
    from ledgerstream.money import Money, Scaled

    for mark in marks:
        if isinstance(mark, Money):
            return {name: mark.currency}
        if isinstance(mark, Scaled):
            return {name: str(mark.digits)}
    return {}


def event_kinds(event: Any) -> dict[str, str]:
    """Of an event type: column → "time", the currency of money, or a scale such as "9"."""
    kinds = {column.name: "time" for column in event.columns().values()
             if column.kind == "timestamp"}  # fmt: skip
    for name, field in event.model_fields.items():
        kinds |= _marked(name, field.metadata)
    return kinds


def row_values(row: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, str]:
    """A row's values as people write them: times in the reader's zone, money with its currency,
    what is scaled with its decimals."""
    from ledgerstream.money import format_minor, format_scaled
    from ledgerstream.stream.durations import duration_text

    def shown(name: str, value: Any) -> str:
        kind = kinds.get(name)
        if kind is not None and kind.isdigit() and isinstance(value, (int, float)):
            return format_scaled(value, int(kind)) if math.isfinite(value) else cell(value)
        if kind is None or not isinstance(value, int):
            return cell(value)
        if kind == "duration":
            return duration_text(value)
        return local_time(value) if kind == "time" else format_minor(value, kind)

    return {name: shown(name, value) for name, value in row.items()}


def state_rows(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> list[dict[str, str]]:
    """Rows of state as people write them; `nothing yet` where there is none."""
    return [row_values(row, kinds) for row in rows] or [{"": "nothing yet"}]


def state_kinds(processor: Any, name: str) -> dict[str, str]:
    """Of a declared state: column → "time", "duration", or the currency of money and its sums."""
    from ledgerstream.stream.durations import duration_text
    from ledgerstream.stream.sessionstate import SessionSpec
    from ledgerstream.stream.state import ArenaSpec, KeyedSpec
    from ledgerstream.stream.windowstate import WindowSpec

    spec, event = processor.states[name], event_kinds(processor.source.event)
    found = {"newest": "time", "start": "time"}
    if isinstance(spec, KeyedSpec):
        means = {column: kind for (column, _), kind in zip(spec.columns, spec.kinds, strict=True)}
        money = {n: kind.partition(":")[2] for n, kind in means.items() if kind.startswith("money")}
        return money | {n: "time" for n, kind in means.items() if kind == "timestamp"}
    if isinstance(spec, ArenaSpec) and spec.value in event:
        sums = [f"sum_{duration_text(window)}" for window in spec.windows_ns]
        return found | dict.fromkeys(sums, event[spec.value])
    if isinstance(spec, SessionSpec):
        found["end"] = "time"
    if isinstance(spec, (WindowSpec, SessionSpec)):
        found["width"] = "duration"
        for each in spec.columns:
            for column, unit in each.units.items():
                kind = event.get(unit)
                if kind is not None and (not each.is_mean or kind.isdigit()):  # a mean is no int
                    found[column] = kind
    return found


class Advance(Protocol):
    """Called with how much more has been done and, where known, the share of all."""

    def __call__(self, more: int, share: float | None = None) -> None: ...


@contextmanager
def bar(what: str, unit: str) -> Iterator[Advance]:
    """A progress bar on stderr with rate and time left; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda more, share=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]:,} {task.fields[unit]}"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),
        transient=True,
    ) as progress:
        task = progress.add_task(what, total=None, done=0, unit=unit, rate=0.0)
        done, began = 0, time.monotonic()

        def advance(more: int, share: float | None = None) -> None:
            nonlocal done
            done += more
            rate = done / max(time.monotonic() - began, 1e-3)
            progress.update(
                task,
                total=None if share is None else 1.0,
                completed=share or 0,
                done=done,
                rate=rate,
            )

        yield advance
