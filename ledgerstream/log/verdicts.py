"""What the log says to an append. Refusals are values, never exceptions."""

from __future__ import annotations

from typing import NamedTuple

from kio.schema.errors import ErrorCode


class Guard:
    """A coordinator is being asked whether a transaction knows of a partition.

    One object a producer and partition; a marker, or the first batch of the transaction, ends it.
    """

    __slots__ = ("lowest_sequence", "new_epoch", "producer_epoch", "seen")

    def __init__(self, producer_epoch: int, lowest_sequence: int) -> None:
        self.producer_epoch = producer_epoch
        self.lowest_sequence = lowest_sequence
        self.new_epoch = False  # each transaction has its own (KIP-890): sequences start at 0
        self.seen = False  # by `Producers.expire`


class New(NamedTuple):
    """The batch is the next of its producer, or has none."""


class Appended(NamedTuple):
    """Placed at [base_offset, last_offset], and durable once the high watermark passes it."""

    base_offset: int
    last_offset: int
    log_append_time: int  # ms; -1 where the topic keeps its producers' time


class Repeat(NamedTuple):
    """A retry of a batch that is in the log: answered like it, once the original is durable."""

    base_offset: int
    last_offset: int
    timestamp: int  # ms, the original's


class Refused(NamedTuple):
    """Nothing was changed."""

    code: ErrorCode
    message: str


NEW = New()
