"""What a partition is called, and the topic settings that its log obeys."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Literal

from ledgerstream.limits import LIMITS


@dataclass(frozen=True, slots=True)
class PartitionKey:
    """A partition of one incarnation of a topic."""

    topic: str
    topic_id: uuid.UUID
    index: int

    @property
    def directory(self) -> str:
        return f"{self.topic}-{self.index}"

    @property
    def identity(self) -> bytes:
        """Twenty bytes that no other partition ever has."""
        return self.topic_id.bytes + self.index.to_bytes(4, "big")

    def __str__(self) -> str:
        return self.directory


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Kafka's topic settings by their own names, dots as underscores."""

    segment_bytes: int = LIMITS.segment_bytes
    segment_ms: int = LIMITS.segment_ms
    index_interval_bytes: int = LIMITS.index_interval_bytes
    segment_index_bytes: int = LIMITS.segment_index_bytes
    max_message_bytes: int = LIMITS.batch_bytes_max
    message_timestamp_type: Literal["CreateTime", "LogAppendTime"] = "CreateTime"
    message_timestamp_before_max_ms: int = 2**63 - 1
    message_timestamp_after_max_ms: int = 3_600_000  # Kafka 4's default
    retention_ms: int = -1
    retention_bytes: int = -1
    cleanup_policy: str = "delete"
    min_cleanable_dirty_ratio: float = 0.5
    min_compaction_lag_ms: int = 0
    max_compaction_lag_ms: int = 2**63 - 1
    delete_retention_ms: int = 86_400_000
    compression_type: str = "producer"  # batches are stored as they came, whatever this says

    @property
    def deletes(self) -> bool:
        """Old segments go, by `retention_ms` and `retention_bytes`."""
        return "delete" in self.cleanup_policy

    @property
    def compacts(self) -> bool:
        """Of each key the newest record stays."""
        return "compact" in self.cleanup_policy

    @property
    def log_append_time(self) -> bool:
        return self.message_timestamp_type == "LogAppendTime"
