"""Kafka's error codes as typed errors: retriable or not, as Kafka classes them."""

from __future__ import annotations

from kio.schema.errors import ErrorCode

from ledgerstream.errors import KafkaError

RETRIABLE = frozenset({
    ErrorCode.corrupt_message, ErrorCode.unknown_topic_or_partition,
    ErrorCode.leader_not_available, ErrorCode.not_leader_or_follower,
    ErrorCode.request_timed_out, ErrorCode.replica_not_available, ErrorCode.network_exception,
    ErrorCode.coordinator_load_in_progress, ErrorCode.coordinator_not_available,
    ErrorCode.not_coordinator, ErrorCode.not_enough_replicas,
    ErrorCode.not_enough_replicas_after_append, ErrorCode.not_controller,
    ErrorCode.kafka_storage_error, ErrorCode.fetch_session_id_not_found,
    ErrorCode.invalid_fetch_session_epoch, ErrorCode.fetch_session_topic_id_error,
    ErrorCode.fenced_leader_epoch, ErrorCode.unknown_leader_epoch,
    ErrorCode.offset_not_available, ErrorCode.preferred_leader_not_available,
    ErrorCode.unstable_offset_commit, ErrorCode.throttling_quota_exceeded,
    ErrorCode.unknown_topic_id, ErrorCode.inconsistent_topic_id, ErrorCode.concurrent_transactions,
    ErrorCode.broker_not_available,
})  # fmt: skip

_SENTENCES = {
    ErrorCode.unknown_topic_or_partition: "there is no such topic or partition",
    ErrorCode.topic_already_exists: "the topic exists already",
    ErrorCode.offset_out_of_range: "the offset is not in the log (any more)",
    ErrorCode.message_too_large: "the batch is larger than the topic's max.message.bytes",
    ErrorCode.kafka_storage_error: "the broker cannot write or read the partition's files",
    ErrorCode.out_of_order_sequence_number: "a batch of this producer is missing in between",
    ErrorCode.invalid_producer_epoch: "a newer instance of this producer has taken over",
    ErrorCode.producer_fenced: "a newer instance of this producer has taken over",
}
_REMEDIES = {
    ErrorCode.unknown_topic_or_partition: "`ledgerstream topic list` names the topics that there "
    "are, `ledgerstream topic create` makes one.",
}


def kafka_error(code: int | ErrorCode, what: str, message: str | None = None) -> KafkaError:
    """The error for a broker's code; `what` was asked."""
    try:
        known = ErrorCode(code)
    except ValueError:
        return KafkaError(int(code), f"ERROR_{code}", f"{what}: error {code}.", retriable=False)
    name = known.name.upper()
    text = message or _SENTENCES.get(known) or name.replace("_", " ").lower()
    return KafkaError(
        int(known.value),
        name,
        f"{what}: {text.rstrip('.')} ({name}).",
        retriable=known in RETRIABLE,
        remedy=_REMEDIES.get(known, ""),
    )


def check(code: ErrorCode, what: str, message: str | None = None) -> None:
    """Raise unless the code says that it went well."""
    if code is not ErrorCode.none:
        raise kafka_error(code, what, message)
