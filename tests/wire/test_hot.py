"""The hand-encoded replies are kio's, byte for byte, in every version."""

from __future__ import annotations

from uuid import UUID

import pytest

from ledgerstream.wire import hot, messages
from ledgerstream.wire.versions import Api

TOPIC_ID = UUID(int=0x1234567890ABCDEF1234567890ABCDEF)


@pytest.mark.parametrize("version", range(3, 14))
def test_produce_reply_is_the_schemas(version: int) -> None:
    parts = [hot.Produced(0, 0, 7, -1, 3), hot.Produced(200, 45, -1, -1, -1, "out of order")]
    ours = hot.produce_reply(version, 77, [hot.ProducedTopic("payments", TOPIC_ID, parts)], 5)
    plain = {
        "responses": [
            {
                "name": "payments",
                "topic_id": TOPIC_ID,
                "partition_responses": [
                    {
                        "index": p.partition,
                        "error_code": p.error,
                        "base_offset": p.base_offset,
                        "log_append_time": None,
                        "log_start_offset": p.log_start,
                        "record_errors": [],
                        "error_message": p.message,
                    }
                    for p in parts
                ],
            }
        ],
        "throttle_time": 5,
    }
    assert ours == messages.write_response(Api.PRODUCE, version, 77, plain)


@pytest.mark.parametrize("aborted", [None, [], [(4, 9), (5, 11)]])
@pytest.mark.parametrize("version", range(4, 19))
def test_fetch_reply_is_the_schemas(version: int, aborted: list[tuple[int, int]] | None) -> None:
    parts = [
        hot.Fetched(0, 0, 10, 9, 1, aborted, [b"abc" * 100, b"de"]),
        hot.Fetched(1, 1, -1, -1, -1, aborted, []),
        hot.Fetched(2, 0, 5, 5, 0, aborted, [], diverging=(3, 44) if version >= 12 else None),
    ]
    ours = b"".join(
        hot.fetch_reply(
            version, 9, [hot.FetchedTopic("trades", TOPIC_ID, parts)], session_id=6, throttle_ms=2
        )
    )
    plain = {
        "throttle_time": 2,
        "error_code": 0,
        "session_id": 6,
        "responses": [
            {
                "topic": "trades",
                "topic_id": TOPIC_ID,
                "partitions": [
                    {
                        "partition_index": p.partition,
                        "error_code": p.error,
                        "high_watermark": p.high_watermark,
                        "last_stable_offset": p.last_stable,
                        "log_start_offset": p.log_start,
                        "aborted_transactions": None
                        if aborted is None
                        else [{"producer_id": a, "first_offset": b} for a, b in aborted],
                        "preferred_read_replica": -1,
                        "records": b"".join(p.records),
                    }
                    | ({"diverging_epoch": {"epoch": 3, "end_offset": 44}} if p.diverging else {})
                    for p in parts
                ],
            }
        ],
    }
    assert ours == messages.write_response(Api.FETCH, version, 9, plain)
