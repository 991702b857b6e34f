"""A broker as a process: settings in, logs out, until it is told to stop.

    python -m ledgerstream.broker.run --data-dir DIR --port 0 --report

`--report` is for a parent process: one JSON line on standard output when ready, and a clean stop
when standard input ends, so that a broker never outlives the program that embedded it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from ledgerstream.broker.metrics import MetricsServer
from ledgerstream.broker.node import Node, serve
from ledgerstream.broker.settings import ADDRESS_FILE, Settings, load
from ledgerstream.broker.slices import ask_for_short_slices
from ledgerstream.errors import LedgerStreamError

SWITCH_SECONDS = 0.0005
SLICE_US = 100  # the shortest that Linux gives
GC_THRESHOLDS = (50_000, 50, 1_000)


def configure_logging(log_format: str) -> None:
    """One line an event on standard error, as text or JSON."""
    renderer: Any = structlog.processors.JSONRenderer()
    if log_format == "text":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=28)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info
            if log_format == "json"
            else structlog.processors.StackInfoRenderer(),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


async def run(settings: Settings, *, report: bool = False) -> None:
    """Serve until stopped."""
    stop = asyncio.Event()
    metrics: list[MetricsServer] = []
    address = settings.data_dir / ADDRESS_FILE

    def ready(node: Node) -> dict[str, Any]:
        address.write_text("{}:{} {}\n".format(*node.advertised, os.getpid()))
        if settings.metrics_port is not None:
            metrics.append(_metrics(node, settings.host, settings.metrics_port))
        if report:
            host, port = node.advertised
            line = {
                "host": host,
                "port": port,
                "metrics_port": metrics[0].port if metrics else None,
            }
            print(json.dumps(line), flush=True)
            node.loop.add_reader(sys.stdin.fileno(), parent_spoke)
        return {"metrics": f"{settings.host}:{metrics[0].port}"} if metrics else {}

    def parent_spoke() -> None:
        if not sys.stdin.buffer.raw.read(1):  # type: ignore[union-attr]  # its end is gone
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            stop.set()

    try:
        await serve(settings, ready=ready, stop=stop)
        address.unlink(missing_ok=True)
    finally:
        for server in metrics:
            server.close()


def _metrics(node: Node, host: str, port: int) -> MetricsServer:
    try:
        return MetricsServer(node, host, port)
    except OSError as error:  # which says neither host nor port
        raise OSError(error.errno, f"metrics on {host}:{port}: {error.strerror}") from error


def run_blocking(settings: Settings, *, report: bool = False) -> None:
    """Serve on uvloop where there is one."""
    configure_logging(settings.log_format)
    # a busy loop gives the lock to the disk thread at once: a round of six files waits 1.4 ms for
    # it, not 10.5; and the collector need not look at what start-up made (60 ms pauses otherwise)
    sys.setswitchinterval(SWITCH_SECONDS)
    ask_for_short_slices(SLICE_US)
    _raise_file_limit()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(run(settings, report=report))


def _raise_file_limit() -> None:
    """As many descriptors as the system allows: each connection is one, each segment up to three,
    and the usual 1,024 are meant for programs that call select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # "unlimited" is not to be had everywhere
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not on this platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a LedgerStream broker.")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--report", action="store_true")
    for name, field in Settings.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=field.description)
    given = vars(parser.parse_args())
    report, file = given.pop("report"), given.pop("config")
    try:
        run_blocking(load(file, **given), report=report)
    except LedgerStreamError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        print(f"error: the broker cannot start: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
