"""The settings of a topic, under Kafka's names: type, default, what is allowed, and what it does.

A setting stands here only if it has an effect on this broker, or if tools set it as a matter of
course and it is satisfied or kept as it is (`min.insync.replicas`, …); the text says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ledgerstream.limits import LIMITS

Type = Literal["boolean", "string", "int", "long", "double", "list"]
# ConfigDef.Type as DescribeConfigs numbers it
TYPE_NUMBERS = {"boolean": 1, "string": 2, "int": 3, "long": 5, "double": 6, "list": 7}
INT_MAX, LONG_MAX = 2**31 - 1, 2**63 - 1


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `low` and `high` bound numbers; `choices` the values of text and of lists."""

    name: str
    type: Type
    default: str
    text: str
    low: float = 0
    high: float = LONG_MAX
    choices: tuple[str, ...] = ()

    def why_bad(self, value: str) -> str | None:
        """Why the value is not allowed, or None."""
        start = f"Invalid value {value} for configuration {self.name}: "
        match self.type:
            case "boolean":
                good = value.lower() in ("true", "false")
                return None if good else start + "Expected value to be either true or false"
            case "string":
                if self.choices and value not in self.choices:
                    return start + f"String must be one of: {', '.join(self.choices)}"
                return None
            case "list":
                odd = [part for part in split(value) if part not in self.choices]
                if odd or not split(value):
                    return start + f"entries must be one of: {', '.join(self.choices)}"
                return None
        try:
            number = float(value) if self.type == "double" else int(value)
        except ValueError:
            return start + f"Not a number of type {self.type.upper()}"
        if self.type == "int" and not -INT_MAX - 1 <= number <= INT_MAX:
            return start + "Not a number of type INT"
        if not number >= self.low:
            return start + f"Value must be at least {self.low}"
        if number > self.high:
            return start + f"Value must be no more than {self.high}"
        return None


_ALL = (
    Setting("cleanup.policy", "list", "delete", "delete old segments, compact by key, or both",
            choices=("delete", "compact")),
    Setting("compression.type", "string", "producer", "batches are stored as producers send them",
            choices=("producer",)),
    Setting("delete.retention.ms", "long", "86400000",
            "how long compaction keeps a record without a value, and a transaction's marker"),
    Setting("index.interval.bytes", "int", str(LIMITS.index_interval_bytes),
            "bytes between two entries of the offset index"),
    Setting("max.compaction.lag.ms", "long", str(LONG_MAX),
            "what is older is compacted however little it is", 1),
    Setting("max.message.bytes", "int", str(LIMITS.batch_bytes_max),
            "the largest record batch, as it stands on the wire"),
    Setting("message.timestamp.type", "string", "CreateTime",
            "the producer's time, or the time of the append",
            choices=("CreateTime", "LogAppendTime")),
    Setting("message.timestamp.after.max.ms", "long", "3600000",
            "how far a producer's time may lie in the future"),
    Setting("message.timestamp.before.max.ms", "long", str(LONG_MAX),
            "how far a producer's time may lie in the past"),
    Setting("min.cleanable.dirty.ratio", "double", "0.5",
            "compaction begins when so much of the log was never compacted", 0, 1),
    Setting("min.compaction.lag.ms", "long", "0", "what is younger is not compacted"),
    Setting("min.insync.replicas", "int", "1", "there is one replica: always satisfied", 1, 1),
    Setting("retention.ms", "long", "-1",
            "segments whose newest record is older are deleted; -1: events are kept for ever", -1),
    Setting("retention.bytes", "long", "-1",
            "the oldest segments are deleted while this much remains; -1: no bound", -1),
    Setting("segment.bytes", "int", str(LIMITS.segment_bytes), "a segment rolls at this size",
            1024 * 1024),
    Setting("segment.ms", "long", str(LIMITS.segment_ms), "a segment rolls at this age", 1),
)  # fmt: skip
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _ALL}


def split(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def why_bad(config: Mapping[str, str]) -> str | None:
    """Why these overrides are not allowed, or None."""
    for name, value in config.items():
        setting = SETTINGS.get(name)
        if setting is None:
            return f"Unknown topic config name: {name}"
        if value is None:
            return f"Null value not supported for topic configs: {name}"
        if bad := setting.why_bad(value):
            return bad
    return None


def change(config: dict[str, str], name: str, operation: int, value: str | None) -> str | None:
    """Perform one incremental change (KIP-339) on the overrides; why not, or None."""
    setting = SETTINGS.get(name)
    if setting is None:
        return f"Unknown topic config name: {name}"
    if operation == 1:
        config.pop(name, None)
        return None
    if value is None:
        return f"Null value not supported for: {name}"
    if operation == 0:  # 0 set, 1 delete, 2 append, 3 subtract
        config[name] = value
        return None
    if operation not in (2, 3):
        return f"Unknown operation {operation} on {name}"
    if setting.type != "list":
        return f"Can't APPEND or SUBTRACT: {name} is not a list"
    have, given = split(config.get(name, setting.default)), split(value)
    kept = [p for p in have if p not in given] if operation == 3 else have + [
        p for p in given if p not in have
    ]  # fmt: skip
    config[name] = ",".join(kept)
    return None


def effective(config: Mapping[str, str], name: str) -> str:
    """The override, or the default."""
    return config.get(name, SETTINGS[name].default)
