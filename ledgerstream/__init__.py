"""LedgerStream: financial event streams with exactly-once processing.

The public names are resolved when first used (PEP 562), so that a broker and the command line start
without numba and pandas.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Event": "ledgerstream.events",
    "Text": "ledgerstream.events",
    "Timestamp": "ledgerstream.events",
    "Keyed": "ledgerstream.stream.processor",
    "Processor": "ledgerstream.stream.processor",
    "Rows": "ledgerstream.stream.tables",
    "Count": "ledgerstream.stream.windows",
    "Distinct": "ledgerstream.stream.windows",
    "Ewm": "ledgerstream.stream.windows",
    "First": "ledgerstream.stream.windows",
    "Hopping": "ledgerstream.stream.windows",
    "Last": "ledgerstream.stream.windows",
    "Max": "ledgerstream.stream.windows",
    "Mean": "ledgerstream.stream.windows",
    "Min": "ledgerstream.stream.windows",
    "Sum": "ledgerstream.stream.windows",
    "TopK": "ledgerstream.stream.windows",
    "Tumbling": "ledgerstream.stream.windows",
    "WindowTable": "ledgerstream.stream.windows",
    "Session": "ledgerstream.stream.sessions",
    "ReportKind": "ledgerstream.stream.reports",
    "Reports": "ledgerstream.stream.reports",
    "Sliding": "ledgerstream.stream.processor",
    "State": "ledgerstream.stream.processor",
    "Table": "ledgerstream.stream.tables",
    "Topic": "ledgerstream.stream.processor",
    "kernel": "ledgerstream.stream.kernels",
    "Broker": "ledgerstream.broker.embedded",
    "Client": "ledgerstream.client",
    "Security": "ledgerstream.client",
    "local": "ledgerstream.sandbox",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ledgerstream' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
