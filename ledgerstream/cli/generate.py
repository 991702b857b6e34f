"""`ledgerstream generate …`: seeded events into a topic, at any rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Directory, Encoding, Log, LogConfig, Partitions
from ledgerstream.cli.records import check_encoding

if TYPE_CHECKING:
    import numpy as np

    from ledgerstream.events import Event

SLICE_MS = 50  # at a set rate, what falls due within this is written at once

app = typer.Typer(
    no_args_is_help=True,
    help="Seeded events, the same each time.\n\n"
    "Example: [bold]ledgerstream generate payments --rate 10000[/bold]",
)

Rate = Annotated[
    float | None,
    typer.Option(min=0.001, help="Events a second; without it, as fast as they are taken."),
]


@app.command()
def payments(
    topic: Annotated[str, typer.Option(help="The topic; made if it is not there.")] = "payments",
    rate: Rate = None,
    days: Annotated[int, typer.Option(min=1, help="Days of event time from 2018-04-01.")] = 183,
    customers: Annotated[int, typer.Option(min=1, help="Customers.")] = 5_000,
    terminals: Annotated[int, typer.Option(min=1, help="Terminals.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another world.")] = 7,
    encoding: Encoding = "fixed",
    partitions: Partitions = 1,
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
) -> None:
    """Card payments with three kinds of fraud, keyed by customer, after the handbook's simulator.

    Example: [bold]ledgerstream generate payments --days 30 --rate 5000[/bold]
    """
    from processors.payments import Payment, Simulation

    simulation = Simulation(customers=customers, terminals=terminals, days=days, seed=seed)
    pieces = with_share(simulation.payments(), days)
    target = Target(topic, Payment, "customer", encoding, partitions)
    _write(target, pieces, rate, "payment", log, log_config, directory)


@app.command()
def trades(
    topic: Annotated[str, typer.Option(help="The topic; made if it is not there.")] = "trades",
    rate: Rate = None,
    count: Annotated[int, typer.Option(min=1, help="Trades and corrections.")] = 1_000_000,
    symbols: Annotated[int, typer.Option(min=1, max=26**4, help="Symbols.")] = 100,
    busy: Annotated[
        float, typer.Option(min=0.001, help="Trades a second of event time, over all symbols.")
    ] = 1_000.0,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another market.")] = 7,
    encoding: Encoding = "fixed",
    partitions: Partitions = 1,
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
) -> None:
    """Trades of a market, some of them late, corrected or cancelled, keyed by symbol.

    Example: [bold]ledgerstream generate trades --symbols 500 --rate 20000[/bold]
    """
    from processors.trades import PIECE_TRADES, Market, Trade

    market = Market(symbols=symbols, trades_count=count, rate=busy, seed=seed)
    pieces = with_share(market.trades(), -(-count // PIECE_TRADES))
    target = Target(topic, Trade, "symbol", encoding, partitions)
    _write(target, pieces, rate, "trade", log, log_config, directory)


@dataclass(frozen=True)
class Target:
    """Where events go, and how they are written there."""

    topic: str
    event: type[Event]
    key: str
    encoding: str
    partitions: int


def _write(
    target: Target,
    pieces: Iterator[tuple[np.ndarray, float]],
    rate: float | None,
    noun: str,
    log: str | None,
    log_config: Path | None,
    directory: Path,
) -> None:
    from ledgerstream.cli.session import fill, open_log, run_async

    check_encoding(target.encoding)
    if rate is not None:
        pieces = at_rate(pieces, rate)

    async def act() -> int:
        async with open_log(log, directory, log_config) as client:
            with show.bar("generating", f"{noun}s") as advance:
                return await fill(
                    client, target.topic, target.event, target.key, target.encoding,
                    target.partitions, pieces, advance,
                )  # fmt: skip

    show.note(f"{show.count(run_async(act()), noun)} went to topic {target.topic!r}.")


def with_share(pieces: Iterator[np.ndarray], total: int) -> Iterator[tuple[np.ndarray, float]]:
    """Each piece with the share of all pieces that it completes."""
    for number, rows in enumerate(pieces, 1):
        yield rows, number / total


def at_rate(
    pieces: Iterator[tuple[np.ndarray, float]], rate: float
) -> Iterator[tuple[np.ndarray, float]]:
    """The same rows, none before its time; a reader that falls behind catches up."""
    began, sent = time.monotonic(), 0
    slice_rows = max(int(rate * SLICE_MS / 1000), 1)
    for rows, share in pieces:
        for first in range(0, len(rows), slice_rows):
            part = rows[first : first + slice_rows]
            time.sleep(max(began + sent / rate - time.monotonic(), 0))
            yield part, share
            sent += len(part)
