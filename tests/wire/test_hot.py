"""What is read and written by hand is kio's, byte for byte, in every version."""

from __future__ import annotations

from uuid import UUID

import pytest

from ledgerstream.errors import ProtocolError
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


def produce_frames(version: int) -> list[bytes]:
    """Produce requests as kio writes them: several topics and partitions, null and empty."""
    parts = [{"index": 0, "records": b"\x01" * 300}, {"index": 7, "records": None}]
    topics = [
        {"name": "payments", "topic_id": TOPIC_ID, "partition_data": parts},
        {"name": "trades", "topic_id": None, "partition_data": [{"index": 1, "records": b""}]},
    ]
    several = {"acks": -1, "timeout": 30_000, "topic_data": topics, "transactional_id": "slot-é"}
    none = {"acks": 0, "timeout": 0, "topic_data": [], "transactional_id": None}
    return [
        messages.write_request(Api.PRODUCE, version, 9, "us", fields)[4:]
        for fields in (several, none)
    ]


@pytest.mark.parametrize("version", range(3, 14))
def test_produce_request_is_read_as_the_schema_has_it(version: int) -> None:
    for frame in produce_frames(version):
        header = messages.read_request_header(frame, version >= hot.PRODUCE_FLEXIBLE)
        wanted = messages.read_request(header, frame)
        ours = hot.read_produce(memoryview(frame), header.body_at, version)
        assert ours.transactional_id == wanted.transactional_id
        assert (ours.acks, ours.timeout_ms) == (wanted.acks, messages.ms(wanted.timeout))
        assert [
            (topic.name, topic.topic_id, [(p.partition, p.records) for p in topic.partitions])
            for topic in ours.topics
        ] == [
            (
                getattr(topic, "name", ""),
                getattr(topic, "topic_id", None),
                [(p.index, p.records) for p in topic.partition_data],
            )
            for topic in wanted.topic_data
        ]


@pytest.mark.parametrize("version", [3, 9, 13])
def test_produce_request_cut_anywhere_is_malformed(version: int) -> None:
    frame = produce_frames(version)[0]
    header = messages.read_request_header(frame, version >= hot.PRODUCE_FLEXIBLE)
    for end in range(header.body_at, len(frame)):
        with pytest.raises(ProtocolError):
            hot.read_produce(memoryview(frame)[:end], header.body_at, version)


@pytest.mark.parametrize("version", [3, 9, 13])
def test_produce_request_with_any_byte_changed_is_read_as_kio_does(version: int) -> None:
    """Or refused by both, but for tagged fields that kio does not know: those are skipped."""
    frame = produce_frames(version)[0]
    header = messages.read_request_header(frame, version >= hot.PRODUCE_FLEXIBLE)
    for at in range(header.body_at, len(frame)):
        for value in (0x00, 0x7F, 0x80, 0xFF):
            changed = bytearray(frame)
            changed[at] = value
            try:
                wanted = messages.read_request(header, bytes(changed))
            except ProtocolError as error:
                if "Unknown tagged field" in str(error):
                    continue
                with pytest.raises(ProtocolError):
                    hot.read_produce(memoryview(changed), header.body_at, version)
                continue
            ours = hot.read_produce(memoryview(changed), header.body_at, version)
            assert [
                [(p.partition, p.records) for p in topic.partitions] for topic in ours.topics
            ] == [
                [(p.index, p.records) for p in topic.partition_data] for topic in wanted.topic_data
            ]
