"""`ledgerstream`: the entry, and what happens to errors.

Exit codes: 0 done; 1 something went wrong, said in a sentence; 2 wrong usage or setting; 3 the data
directory is in use; 4 a partition stopped rather than guess; 5 what is committed is not what the
log gives; 130 interrupted. A traceback means a bug of ours.
"""

from __future__ import annotations

import sys
from typing import Annotated, TypeVar

import typer

from ledgerstream import __version__
from ledgerstream.cli import (
    broker,
    config,
    dead_letters,
    demo,
    explain,
    fleet,
    generate,
    records,
    run,
    state,
    status,
    topics,
    transactions,
    verify,
)
from ledgerstream.errors import LedgerStreamError

E = TypeVar("E", bound=BaseException)

app = typer.Typer(
    name="ledgerstream",
    help=(
        "Financial event streams: a Kafka-compatible log, columnar processors, and results that "
        "count each event exactly once in Postgres.\n\n"
        "Start with [bold]ledgerstream demo[/bold]. Every command shows an example with --help."
    ),
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(run.run)
app.command(hidden=True)(fleet.fleet_worker)
app.command()(verify.verify)
app.command()(status.status)
app.command()(explain.explain)
app.add_typer(state.app, name="state")
app.command()(broker.broker)
app.add_typer(topics.app, name="topic")
app.add_typer(transactions.app, name="transactions")
app.command(name="import")(records.import_)
app.command()(records.produce)
app.command()(records.consume)
app.add_typer(generate.app, name="generate")
app.add_typer(dead_letters.app, name="dead-letters")
app.command()(config.config)


@app.callback()
def ledgerstream(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"ledgerstream {__version__}")
        raise typer.Exit


def main() -> None:
    """The console script. Never returns."""
    try:
        app()
    except* LedgerStreamError as group:
        error = _first(group)
        print(f"ledgerstream: {error}", file=sys.stderr)
        code = error.exit_code
    except* KeyboardInterrupt:
        code = 130
    except* OSError as group:
        refused = _first(group)
        if refused.filename is None:
            raise
        print(f"ledgerstream: {refused.filename}: {refused.strerror}.", file=sys.stderr)
        code = 1
    sys.exit(code)


def _first(group: BaseExceptionGroup[E]) -> E:
    error: BaseExceptionGroup[E] | E = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
