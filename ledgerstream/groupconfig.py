"""The settings of a next-generation consumer group, under Kafka's names (KIP-848, KIP-1043).

An operator sets them for a group by its name, whether it is there yet or not; members obey from
their next heartbeat on.
"""

from __future__ import annotations

from collections.abc import Mapping

from ledgerstream.limits import LIMITS
from ledgerstream.topicconfig import Setting

SESSION, HEARTBEAT = "consumer.session.timeout.ms", "consumer.heartbeat.interval.ms"
_ALL = (
    Setting(SESSION, "int", str(LIMITS.consumer_session_ms),
            "a member that was not heard of for so long is gone", 1),
    Setting(HEARTBEAT, "int", str(LIMITS.consumer_heartbeat_ms),
            "how often members are to be heard of; where it is not set, more often as long as the "
            "group is small", 1),
)  # fmt: skip
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _ALL}
# what a broker allows: (setting, at least, at most), under the names of Kafka's own settings
_BOUNDS = (
    (SESSION, LIMITS.consumer_session_ms_min, LIMITS.consumer_session_ms_max),
    (HEARTBEAT, LIMITS.consumer_hurry_ms, LIMITS.consumer_heartbeat_ms_max),
)


def why_bad(config: Mapping[str, str]) -> str | None:
    """Why these overrides are not allowed, in Kafka's words, or None."""
    for name, value in config.items():
        setting = SETTINGS.get(name)
        if setting is None:
            return f"Unknown group config name: {name}"
        if bad := setting.why_bad(value):
            return bad
    for name, low, high in _BOUNDS:
        number, rest = int(effective(config, name)), name.removeprefix("consumer.")
        if number < low:
            return f"{name} must be greater than or equal to group.consumer.min.{rest}"
        if number > high:
            return f"{name} must be less than or equal to group.consumer.max.{rest}"
    if int(effective(config, SESSION)) <= int(effective(config, HEARTBEAT)):
        return f"{SESSION} must be greater than {HEARTBEAT}"
    return None


def change(config: dict[str, str], name: str, operation: int, value: str) -> str | None:
    """Perform one incremental change (KIP-339) on the overrides; why not, or None."""
    match operation:  # 0 set, 1 delete, 2 append, 3 subtract
        case 0:
            config[name] = value
        case 1:
            config.pop(name, None)
        case 2 | 3:
            act = "APPEND" if operation == 2 else "SUBTRACT"
            return f"Can't {act} to key {name} because its type is not LIST."
        case _:
            return f"Unknown operation {operation} on {name}"
    return None


def effective(config: Mapping[str, str], name: str) -> str:
    """The override, or the default."""
    return config.get(name, SETTINGS[name].default)
