"""`ledgerstream transactions …`: who writes transactions, what is open, and how to end it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ledgerstream.cli import options, show
from ledgerstream.cli.options import Directory, Json, Log, LogConfig
from ledgerstream.limits import LIMITS

if TYPE_CHECKING:
    from ledgerstream.client.operator import Hanging

app = typer.Typer(
    no_args_is_help=True,
    help="Transactions on the log.\n\nExample: [bold]ledgerstream transactions list --state "
    "Ongoing[/bold]",
)
MINUTES = LIMITS.transaction_timeout_ms_max // 60_000


class State(StrEnum):
    """As brokers name them."""

    EMPTY = "Empty"
    ONGOING = "Ongoing"
    PREPARE_COMMIT = "PrepareCommit"
    PREPARE_ABORT = "PrepareAbort"
    COMPLETE_COMMIT = "CompleteCommit"
    COMPLETE_ABORT = "CompleteAbort"
    DEAD = "Dead"
    PREPARE_EPOCH_FENCE = "PrepareEpochFence"


OPEN = (State.ONGOING, State.PREPARE_COMMIT, State.PREPARE_ABORT, State.PREPARE_EPOCH_FENCE)
Id = Annotated[str, typer.Argument(metavar="ID", help="The transactional id.")]
Older = Annotated[
    float,
    typer.Option("--older", metavar="MINUTES", min=0, help="Without a batch for so long."),
]


@app.command(name="list")
def list_(
    state: Annotated[
        list[State] | None,
        typer.Option(case_sensitive=False, help="Only in this state. Repeatable."),
    ] = None,
    open_for: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", min=0, help="Only those begun longer ago than this."),
    ] = None,
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """List transactional ids, their states and producer ids.

    Example: [bold]ledgerstream transactions list --state Ongoing --open-for 15[/bold]
    """
    from ledgerstream.cli.session import open_log, run_async
    from ledgerstream.client.operator import Transactions

    async def rows() -> list[dict[str, Any]]:
        async with open_log(log, directory, log_config) as client:
            found = await Transactions(client.cluster).all(
                states=tuple(state or ()),
                open_ms=-1 if open_for is None else int(open_for * 60_000),
            )
        return [
            {"id": each.txn_id, "state": each.state, "producer_id": each.producer_id}
            for each in found
            if open_for is None or each.state in OPEN  # Kafka takes what never began for old
        ]

    asked = state or open_for is not None
    empty = "No transactional id is so." if asked else "There are no transactional ids."
    show.table(run_async(rows()), as_json=as_json, empty=empty)


@app.command()
def describe(
    txn_id: Id,
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Show a transactional id: its producer, state, and the partitions of an open transaction.

    Example: [bold]ledgerstream transactions describe payments-writer[/bold]
    """
    from ledgerstream.cli.session import open_log, run_async
    from ledgerstream.client.operator import Transactions

    async def row() -> dict[str, Any]:
        async with open_log(log, directory, log_config) as client:
            found = await Transactions(client.cluster).describe(txn_id)
        timeout = "none: two phases" if found.timeout_ms == 2**31 - 1 else found.timeout_ms
        return {
            "id": found.txn_id,
            "state": found.state,
            "producer_id": found.producer_id,
            "producer_epoch": found.producer_epoch,
            "timeout_ms": timeout,
            "begun": _time(found.started_ms) if found.started_ms >= 0 else None,
            "partitions": " ".join(f"{topic}-{index}" for topic, index in found.partitions),
        }

    show.table([run_async(row())], as_json=as_json)


@app.command()
def abort(
    txn_id: Id,
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
) -> None:
    """Abort what is open under an id, also what was prepared and waits for its decision.

    Example: [bold]ledgerstream transactions abort payments-writer[/bold]

    Its producer is fenced: it can write no more until it begins again.
    """
    from ledgerstream.cli.session import open_log, run_async
    from ledgerstream.client.operator import Transactions

    async def act() -> bool:
        async with open_log(log, directory, log_config) as client:
            return await Transactions(client.cluster).abort(txn_id)

    was_open = run_async(act())
    what = "Its open transaction is aborted" if was_open else "No transaction was open"
    show.note(f"{what}; the producer of {txn_id!r} is fenced.")


@app.command(name="find-hanging")
def find_hanging(
    older: Older = MINUTES,
    abort: Annotated[bool, typer.Option("--abort", help="End what is found.")] = False,
    log: Log = None,
    log_config: LogConfig = None,
    directory: Directory = options.DIRECTORY,
    as_json: Json = False,
) -> None:
    """Find transactions that hold back readers in a partition and that no coordinator has open.

    Example: [bold]ledgerstream transactions find-hanging --older 30 --abort[/bold]
    """
    from ledgerstream.cli.session import open_log, run_async
    from ledgerstream.client.operator import Transactions

    async def rows() -> list[Hanging]:
        async with open_log(log, directory, log_config) as client:
            transactions = Transactions(client.cluster)
            now_ms = time.time_ns() // 1_000_000
            found = await transactions.find_hanging(now_ms, int(older * 60_000))
            for each in found if abort else ():
                await transactions.abort_hanging(each)
        return found

    found = run_async(rows())
    show.table(
        [
            {
                "topic": each.topic,
                "partition": each.partition,
                "producer_id": each.producer_id,
                "producer_epoch": each.producer_epoch,
                "first_offset": each.first_offset,
                "last_batch": _time(each.last_ms),
            }
            for each in found
        ],
        as_json=as_json,
        empty="Nothing hangs.",
    )
    if found and abort:
        show.note(f"{show.count(len(found), 'transaction')} aborted.")


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(sep=" ", timespec="seconds")
