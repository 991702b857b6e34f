"""What can go wrong, in four kinds.

A *refusal* (fenced producer, unknown topic) is a value in a reply, never an exception inside a
core. A peer that broke the protocol is `ProtocolError`; its connection is closed. A disk that lies
is `CorruptError`; its partition stops. If *we* are wrong it is an `assert`, and the process dies
and replays.

Everything a user may see derives from `LedgerStreamError`: one sentence on what happened, one on
what to do.
"""

from __future__ import annotations


class LedgerStreamError(Exception):
    """A public error: `str(error)` is a plain sentence, `remedy` says what to type or change."""

    exit_code = 1

    def __init__(self, sentence: str, remedy: str = "") -> None:
        super().__init__(sentence)
        self.remedy = remedy

    def __str__(self) -> str:
        sentence: str = self.args[0]
        return f"{sentence}\n  {self.remedy}" if self.remedy else sentence


class ProtocolError(LedgerStreamError):
    """The peer sent bytes that the protocol does not allow; its connection is closed."""


class CorruptError(LedgerStreamError):
    """A file does not hold what was written to it; the partition stops."""


class StorageError(LedgerStreamError):
    """The disk refused (full, no permission, failed sync); that partition stops."""


class DirectoryInUse(LedgerStreamError):
    """Another process holds the data directory."""

    exit_code = 3


class ConfigError(LedgerStreamError):
    """A setting or a declaration is wrong; nothing has been started."""

    exit_code = 2


class EventTypeError(ConfigError):
    """An event type has no columns, or changed in a way that old records do not allow."""


class DecodeError(LedgerStreamError):
    """A record is not an event of the expected type; in a stream, a dead letter."""


class KafkaError(LedgerStreamError):
    """A broker's refusal, as a client sees it.

    `code` is Kafka's error number, `name` its name; `retriable` as Kafka classes it.
    """

    def __init__(
        self, code: int, name: str, sentence: str, *, retriable: bool, remedy: str = ""
    ) -> None:
        super().__init__(sentence, remedy)
        self.code = code
        self.name = name
        self.retriable = retriable


class SecurityError(KafkaError):
    """A broker does not let us in, or is not the one it should be: trying again would not help.

    `name` is Kafka's, or SSL where it never came to Kafka's protocol.
    """

    exit_code = 2

    def __init__(self, sentence: str, remedy: str = "", *, code: int = -1, name: str = "SSL"):
        super().__init__(code, name, sentence, retriable=False, remedy=remedy)


class DeliveryTimeout(LedgerStreamError):
    """Not acknowledged within its time limit: it may or may not have happened."""


class StoppedPartition(LedgerStreamError):
    """A processor's partition stopped rather than guess; the remedy says what to type."""

    exit_code = 4


class Overtaken(LedgerStreamError):
    """Another worker has claimed `partitions`; this one rolled back and forgot them."""

    partitions: frozenset[int] = frozenset()


class NotReproduced(LedgerStreamError):
    """What is committed is not what the log gives when it is computed again."""

    exit_code = 5
