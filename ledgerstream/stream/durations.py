"""Lengths of time as people write them: `24h`, `7d`, `15m` or `15min`, `90s`, `250ms`."""

from __future__ import annotations

import datetime as dt
import re

from ledgerstream.errors import ConfigError

NS = {
    "ns": 1,
    "us": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60 * 1_000_000_000,
    "min": 60 * 1_000_000_000,
    "h": 3_600 * 1_000_000_000,
    "d": 86_400 * 1_000_000_000,
    "w": 7 * 86_400 * 1_000_000_000,
}

_DURATION = re.compile(rf"(\d+)\s*({'|'.join(NS)})")


def duration_ns(text: str | dt.timedelta) -> int:
    """Nanoseconds of a duration; raises ConfigError for what is none, or does not fit 63 bits."""
    if isinstance(text, dt.timedelta):
        ns = (text.days * 86_400 + text.seconds) * NS["s"] + text.microseconds * NS["us"]
    else:
        match = _DURATION.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(
                f"{text!r} is not a length of time.",
                f"Write a whole number and a unit, as in '24h'; units are {', '.join(NS)}.",
            )
        ns = int(match[1]) * NS[match[2]]
    if not 0 <= ns < 2**62:
        raise ConfigError(f"{text!r} is out of range: lengths of time are 0 to 146 years.")
    return ns


def duration_text(ns: int) -> str:
    """The shortest way to write it, in days at most: `duration_text(86_400 * 10**9) == "1d"`."""
    name = next(name for name in ("d", "h", "m", "s", "ms", "us", "ns") if ns % NS[name] == 0)
    return f"{ns // NS[name]}{name}"
