"""What a client's batch must satisfy before the log decides on it.

Items 1 to 4 of transactions.md, part A. Header, size, CRC and count only: records are not walked.
"""

from __future__ import annotations

from collections.abc import Iterable

from kio.schema.errors import ErrorCode

from ledgerstream.log.config import LogConfig
from ledgerstream.log.verdicts import Refused
from ledgerstream.wire.batches import (
    CODEC_MASK,
    CODECS,
    HEADER_BYTES,
    LOG_OVERHEAD_BYTES,
    ZSTD,
    Buffer,
    Header,
    crc_matches,
    parse_header,
)

ZSTD_SINCE = 7  # Produce version (KIP-110)


def check_client_batch(
    data: Buffer, config: LogConfig, *, now_ms: int, version: int = ZSTD_SINCE
) -> Header | Refused:
    """The header of the one batch that `data` must be. `version` is the Produce request's."""
    if len(data) < HEADER_BYTES:
        return _invalid("A partition's data must be exactly one record batch; this is none.")
    header = parse_header(data)
    if header.magic != 2:
        return _corrupt(f"Record batches are of format 2; this one says {header.magic}.")
    if header.length < HEADER_BYTES - LOG_OVERHEAD_BYTES or header.size > len(data):
        return _corrupt("The batch's length is not that of its bytes.")
    if header.size < len(data):
        return _invalid("A partition's data must be exactly one record batch; this is more.")
    if header.size > config.max_message_bytes:
        return Refused(
            ErrorCode.message_too_large,
            f"The batch has {header.size:,} bytes; max.message.bytes is "
            f"{config.max_message_bytes:,}.",
        )
    if not crc_matches(data, 0, header):
        return _corrupt("The batch's CRC is not that of its bytes.")
    return _check_header(header, config, now_ms, version) or header


def check_request(headers: Iterable[Header], transactional_id: str | None) -> Refused | None:
    """What holds for all the batches of one Produce request together."""
    identities = {(h.producer_id, h.producer_epoch) for h in headers if h.transactional}
    if identities and transactional_id is None:
        return Refused(
            ErrorCode.transactional_id_authorization_failed,
            "A transactional batch came in a request without a transactional id.",
        )
    if len(identities) > 1:
        return Refused(
            ErrorCode.invalid_producer_id_mapping,
            "A request's transactional batches must be of one producer id and epoch.",
        )
    return None


def _check_header(header: Header, config: LogConfig, now_ms: int, version: int) -> Refused | None:
    codec = header.attributes & CODEC_MASK
    if codec >= len(CODECS) or (codec == ZSTD and version < ZSTD_SINCE):
        return Refused(
            ErrorCode.unsupported_compression_type,
            f"Compression codec {codec} is not allowed in Produce version {version}.",
        )
    if header.base_offset != 0:
        return _invalid(f"A client's batch starts at offset 0, not at {header.base_offset}.")
    if header.record_count <= 0 or header.last_offset_delta + 1 != header.record_count:
        return _invalid(
            f"The batch says {header.record_count} records, and offsets for "
            f"{header.last_offset_delta + 1}."
        )
    if header.control:
        return _invalid("Clients do not write control batches.")
    if header.producer_id >= 0 and header.base_sequence < 0:
        return _invalid(f"The batch of producer {header.producer_id} has no sequence number.")
    if not config.log_append_time and not (
        now_ms - config.message_timestamp_before_max_ms
        <= header.max_timestamp
        <= now_ms + config.message_timestamp_after_max_ms
    ):
        return Refused(
            ErrorCode.invalid_timestamp,
            f"Timestamp {header.max_timestamp} is too far from the broker's time {now_ms}.",
        )
    return None


def _invalid(message: str) -> Refused:
    return Refused(ErrorCode.invalid_record, message)


def _corrupt(message: str) -> Refused:
    return Refused(ErrorCode.corrupt_message, message)
