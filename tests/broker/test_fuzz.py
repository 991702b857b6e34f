"""Ten thousand frames, mutated from real ones: the broker answers or closes, and lives."""

from __future__ import annotations

import socket
import struct
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledgerstream.broker.embedded import Broker
from ledgerstream.wire import messages
from ledgerstream.wire.versions import Api
from tests.broker.test_limits import fetch_frame, produce_frame
from tests.broker.test_versions import EVERY, LEAST
from tests.differential.raw import Raw

FRAMES_EACH = 12
EXAMPLES = 900  # × 12 frames
TORTURE_EXAMPLES = 20_000

TOPIC = {
    "name": "fuzz", "num_partitions": 2, "replication_factor": 1, "assignments": [],
    "configs": [{"name": "segment.ms", "value": "1000"}],
}  # fmt: skip
# ConsumerProtocolSubscription 1: one topic, no user data, one owned partition
SUBSCRIPTION = (
    b"\x00\x01\x00\x00\x00\x01\x00\x04fuzz\xff\xff\xff\xff"
    b"\x00\x00\x00\x01\x00\x04fuzz\x00\x00\x00\x01\x00\x00\x00\x00"
)
OFFSETS = [{"name": "fuzz", "partitions": [
    {"partition_index": 0, "committed_offset": 3, "committed_leader_epoch": 0,
     "committed_metadata": "here"},
]}]  # fmt: skip
REAL = [
    *(
        messages.write_request(api, version, 7, "fuzz", LEAST[api])
        for api, version in EVERY
        if api is not Api.PRODUCE or version >= 3
    ),
    messages.write_request(
        Api.CREATE_TOPICS, 7, 7, "f",
        {"topics": [TOPIC], "timeout": 1000, "validate_only": False},
    ),
    messages.write_request(
        Api.METADATA, 12, 7, "f",
        {"topics": [{"topic_id": None, "name": "fuzz"}], "allow_auto_topic_creation": True,
         "include_topic_authorized_operations": True},
    ),
    messages.write_request(
        Api.LIST_OFFSETS, 7, 7, "f",
        {"replica_id": -1, "isolation_level": 1, "topics": [
            {"name": "fuzz", "partitions": [
                {"partition_index": 0, "current_leader_epoch": 0, "timestamp": 5}
            ]}
        ]},
    ),
    messages.write_request(
        Api.INCREMENTAL_ALTER_CONFIGS, 1, 7, "f",
        {"validate_only": False, "resources": [
            {"resource_type": 2, "resource_name": "fuzz", "configs": [
                {"name": "cleanup.policy", "config_operation": 2, "value": "compact"}
            ]}
        ]},
    ),
    messages.write_request(
        Api.DELETE_TOPICS, 6, 7, "f",
        {"topics": [{"name": "fuzz", "topic_id": None}], "timeout": 1000},
    ),
    # members of both kinds in one group, and its offsets
    messages.write_request(
        Api.JOIN_GROUP, 7, 7, "f",
        {"group_id": "mixed", "session_timeout": 10_000, "rebalance_timeout": 10_000,
         "member_id": "", "group_instance_id": "i", "protocol_type": "consumer",
         "protocols": [{"name": "range", "metadata": SUBSCRIPTION}]},
    ),
    messages.write_request(
        Api.SYNC_GROUP, 5, 7, "f",
        {"group_id": "mixed", "generation_id": 1, "member_id": "m", "group_instance_id": "i",
         "protocol_type": "consumer", "protocol_name": "range",
         "assignments": [{"member_id": "m", "assignment": SUBSCRIPTION}]},
    ),
    *(
        messages.write_request(
            Api.CONSUMER_GROUP_HEARTBEAT, 1, 7, "f",
            {"group_id": "mixed", "member_id": "m", "member_epoch": epoch, "instance_id": None,
             "rack_id": None, "rebalance_timeout": 10_000, "subscribed_topic_names": names,
             "subscribed_topic_regex": regex, "server_assignor": "range",
             "topic_partitions": owned},
        )
        for epoch, names, regex, owned in (
            (0, ["fuzz"], None, []), (0, None, "f.*", []),
            (1, ["fuzz"], None, [{"topic_id": UUID(int=1), "partitions": [0, 1]}]),
            (-1, None, None, None),
        )
    ),
    messages.write_request(
        Api.OFFSET_COMMIT, 9, 7, "f",
        {"group_id": "simple", "generation_id_or_member_epoch": -1, "member_id": "",
         "group_instance_id": None, "topics": OFFSETS},
    ),
    messages.write_request(
        Api.TXN_OFFSET_COMMIT, 5, 7, "f",
        {"transactional_id": "t", "group_id": "simple", "producer_id": 1, "producer_epoch": 0,
         "generation_id": -1, "member_id": "", "group_instance_id": None, "topics": OFFSETS},
    ),
    messages.write_request(
        Api.OFFSET_FETCH, 9, 7, "f",
        {"require_stable": True, "groups": [
            {"group_id": "mixed", "member_id": "m", "member_epoch": 1,
             "topics": [{"name": "fuzz", "partition_indexes": [0, 1]}]}
        ]},
    ),
    messages.write_request(
        Api.LEAVE_GROUP, 5, 7, "f",
        {"group_id": "mixed", "members": [
            {"member_id": "m", "group_instance_id": "i", "reason": "none"}
        ]},
    ),
    produce_frame("fuzz", 300),
    produce_frame("fuzz", 300, acks=0),
    fetch_frame("fuzz", 7, wait=5, min_bytes=1),
]  # fmt: skip

change = st.one_of(
    st.tuples(st.just("byte"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("int"), st.floats(0, 1), st.sampled_from([-1, 0, 1, 2**31 - 1, -(2**31)])),
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("twice"), st.floats(0, 1), st.integers(1, 50)),
    st.tuples(st.just("length"), st.just(0.0), st.integers(-5, 5)),
)
mutated = st.tuples(st.sampled_from(REAL), st.lists(change, max_size=4))


def apply(frame: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    """The frame changed behind its length, which is made right again unless it is what changes."""
    body, slip = bytearray(frame[4:]), 0
    for kind, where, value in changes:
        at = int(where * max(len(body) - 1, 0))
        match kind:
            case "byte" if body:
                body[at] = value
            case "int" if len(body) >= at + 4:
                struct.pack_into(">i", body, at, value)
            case "cut":
                del body[at:]
            case "twice":
                body[at:at] = body[at : at + value]
            case "length":
                slip = value
    return struct.pack(">i", len(body) + slip) + bytes(body)


def throw(address: str, frames: list[bytes]) -> None:
    """Send them on one connection, then wait until the broker has closed it."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), 20) as sock:
        try:
            sock.sendall(b"".join(frames))
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
        except ConnectionError:
            pass


def assault(broker: Broker, examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.lists(mutated, min_size=FRAMES_EACH, max_size=FRAMES_EACH))
    def play(chosen: list[tuple[bytes, list[tuple[str, float, int]]]]) -> None:
        throw(broker.address, [apply(frame, changes) for frame, changes in chosen])
        assert broker.process.returncode is None
        failed = [line for line in broker.log_lines if "request failed" in line]
        assert failed == []

    play()
    with Raw(broker.address) as raw:
        assert raw.ask(Api.API_VERSIONS, 3, **LEAST[Api.API_VERSIONS])["error_code"] == "none"


@pytest.mark.slow
def test_ten_thousand_mutated_frames(our_broker: Broker) -> None:
    assert EXAMPLES * FRAMES_EACH >= 10_000
    assault(our_broker, EXAMPLES)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_a_quarter_million_mutated_frames(our_broker: Broker) -> None:
    assault(our_broker, TORTURE_EXAMPLES)
