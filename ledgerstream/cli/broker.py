"""`ledgerstream broker`: serve a log to Kafka clients until told to stop."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated

import typer

from ledgerstream.errors import LedgerStreamError

REMEDIES = {
    errno.EADDRINUSE: "Stop what has that port, or choose another; 0 takes a free one.",
    errno.EADDRNOTAVAIL: "--host is an address of this machine; 0.0.0.0 is all of them.",
    errno.EACCES: "Choose a directory that may be written, and a port from 1024 on.",
}


def broker(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where the log's files are. \\[ledgerstream-data/log]"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. \\[127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one. \\[9092]")
    ] = None,
    advertised_host: Annotated[
        str | None, typer.Option(help="The address that clients are told. \\[--host]")
    ] = None,
    advertised_port: Annotated[
        int | None, typer.Option(help="The port that clients are told. \\[--port]")
    ] = None,
    node_id: Annotated[int | None, typer.Option(help="This broker's id. \\[1]")] = None,
    durability: Annotated[
        str | None,
        typer.Option(
            help="sync: on disk before it is acknowledged. page-cache: as Kafka's default, a power "
            "cut loses what the system had not written. \\[sync]"
        ),
    ] = None,
    auto_create_topics: Annotated[
        bool | None,
        typer.Option(
            "--auto-create-topics/--no-auto-create-topics",
            help="Make a topic when a client first asks for it. \\[no]",
        ),
    ] = None,
    default_partitions: Annotated[
        int | None, typer.Option(help="Partitions of a topic made without saying how many. \\[1]")
    ] = None,
    two_phase_commit: Annotated[
        bool | None,
        typer.Option(
            "--two-phase-commit/--no-two-phase-commit",
            help="Allow transactions without timeout, which clients prepare (KIP-939). \\[no]",
        ),
    ] = None,
    group_delay_ms: Annotated[
        int | None,
        typer.Option(help="An empty group waits so long for more members. \\[3000]"),
    ] = None,
    offsets_kept_hours: Annotated[
        int | None,
        typer.Option(
            help="A group's offsets are kept so long after its last member has gone. \\[168]"
        ),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Prometheus metrics and /healthz; 0 takes a free port.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json. \\[text]")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file of these settings, with _ for -.")
    ] = None,
) -> None:
    """Serve a log to Kafka clients until SIGTERM or Ctrl-C.

    Example: [bold]ledgerstream broker --port 9092 --metrics-port 9100[/bold]

    A flag wins over the environment (LEDGERSTREAM_PORT=…), the environment over --config.
    [bold]ledgerstream config[/bold] shows what is in force.
    """
    flags = {name: value for name, value in locals().items() if name != "config"}
    from ledgerstream.broker.run import run_blocking
    from ledgerstream.broker.settings import load

    settings = load(config, **flags)
    try:
        run_blocking(settings)
    except OSError as error:
        why = error.strerror or str(error)
        if error.filename is not None:
            why = f"{error.filename}: {why}"
        raise LedgerStreamError(
            f"The broker cannot start: {why}.", REMEDIES.get(error.errno or 0, "")
        ) from error
