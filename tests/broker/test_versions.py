"""What is advertised is answered: every API in every version, with the least that it takes."""

from __future__ import annotations

import pytest

from ledgerstream.broker.embedded import Broker
from ledgerstream.wire.versions import BROKER_VERSIONS, PRODUCE_VERSION_MIN, Api
from tests.differential.raw import Raw

LEAST: dict[Api, dict[str, object]] = {
    Api.PRODUCE: {"transactional_id": None, "acks": -1, "timeout": 1000, "topic_data": []},
    Api.FETCH: {
        "replica_id": -1, "max_wait": 0, "min_bytes": 0, "max_bytes": 1000, "isolation_level": 0,
        "session_id": 0, "session_epoch": -1, "topics": [], "forgotten_topics_data": [],
        "rack_id": "",
    },
    Api.LIST_OFFSETS: {"replica_id": -1, "isolation_level": 0, "topics": [], "timeout": 1000},
    Api.METADATA: {
        "topics": [], "allow_auto_topic_creation": False,
        "include_cluster_authorized_operations": True,
        "include_topic_authorized_operations": True,
    },
    Api.OFFSET_COMMIT: {
        "group_id": "g", "generation_id_or_member_epoch": -1, "member_id": "",
        "group_instance_id": None, "retention_time": -1, "topics": [],
    },
    Api.OFFSET_FETCH: {"group_id": "g", "groups": [], "topics": [], "require_stable": True},
    Api.FIND_COORDINATOR: {"key": "g", "key_type": 0, "coordinator_keys": []},
    Api.JOIN_GROUP: {
        "group_id": "", "session_timeout": 10_000, "rebalance_timeout": 10_000, "member_id": "",
        "group_instance_id": None, "protocol_type": "consumer", "protocols": [], "reason": None,
    },
    Api.HEARTBEAT: {
        "group_id": "", "generation_id": 0, "member_id": "", "group_instance_id": None,
    },
    Api.LEAVE_GROUP: {"group_id": "", "member_id": "", "members": []},
    Api.SYNC_GROUP: {
        "group_id": "", "generation_id": 0, "member_id": "", "group_instance_id": None,
        "protocol_type": "consumer", "protocol_name": "range", "assignments": [],
    },
    Api.DESCRIBE_GROUPS: {"groups": [], "include_authorized_operations": True},
    Api.LIST_GROUPS: {"states_filter": [], "types_filter": []},
    Api.API_VERSIONS: {"client_software_name": "t", "client_software_version": "1"},
    Api.CREATE_TOPICS: {"topics": [], "timeout": 1000, "validate_only": False},
    Api.DELETE_TOPICS: {"topics": [], "topic_names": [], "timeout": 1000},
    Api.DELETE_RECORDS: {"topics": [], "timeout": 1000},
    Api.INIT_PRODUCER_ID: {
        "transactional_id": None, "transaction_timeout": 1000, "producer_id": -1,
        "producer_epoch": -1, "enable2_pc": False, "keep_prepared_txn": False,
    },
    Api.OFFSET_FOR_LEADER_EPOCH: {"replica_id": -1, "topics": []},
    Api.ADD_PARTITIONS_TO_TXN: {
        "v3_and_below_transactional_id": "", "v3_and_below_producer_id": 0,
        "v3_and_below_producer_epoch": 0, "v3_and_below_topics": [], "transactions": [],
    },
    Api.ADD_OFFSETS_TO_TXN: {
        "transactional_id": "", "producer_id": 0, "producer_epoch": 0, "group_id": "g",
    },
    Api.END_TXN: {
        "transactional_id": "", "producer_id": 0, "producer_epoch": 0, "committed": True,
    },
    Api.WRITE_TXN_MARKERS: {"markers": []},
    Api.DESCRIBE_PRODUCERS: {"topics": []},
    Api.DESCRIBE_TRANSACTIONS: {"transactional_ids": []},
    Api.LIST_TRANSACTIONS: {
        "state_filters": [], "producer_id_filters": [], "duration_filter": -1,
        "transactional_id_pattern": None,
    },
    Api.CONSUMER_GROUP_HEARTBEAT: {
        "group_id": "g", "member_id": "", "member_epoch": 1, "rebalance_timeout": -1,
        "topic_partitions": None,
    },
    Api.CONSUMER_GROUP_DESCRIBE: {"group_ids": ["g"], "include_authorized_operations": True},
    Api.TXN_OFFSET_COMMIT: {
        "transactional_id": "", "group_id": "", "producer_id": 0, "producer_epoch": 0,
        "generation_id": -1, "member_id": "", "group_instance_id": None, "topics": [],
    },
    Api.DESCRIBE_CONFIGS: {
        "resources": [
            {"resource_type": 4, "resource_name": "1", "configuration_keys": None}
        ],
        "include_synonyms": True, "include_documentation": True,
    },
    Api.DESCRIBE_LOG_DIRS: {"topics": None},
    Api.CREATE_PARTITIONS: {"topics": [], "timeout": 1000, "validate_only": False},
    Api.DELETE_GROUPS: {"groups_names": []},
    Api.OFFSET_DELETE: {"group_id": "", "topics": []},
    Api.INCREMENTAL_ALTER_CONFIGS: {"resources": [], "validate_only": False},
    Api.DESCRIBE_CLUSTER: {
        "include_cluster_authorized_operations": True, "endpoint_type": 1,
        "include_fenced_brokers": False,
    },
}  # fmt: skip

# with the least that they take
REFUSED = {
    **dict.fromkeys(
        (Api.JOIN_GROUP, Api.HEARTBEAT, Api.LEAVE_GROUP, Api.SYNC_GROUP, Api.OFFSET_DELETE),
        "invalid_group_id",
    ),
    Api.ADD_OFFSETS_TO_TXN: "invalid_request",  # no transactional id
    Api.END_TXN: "invalid_request",
    Api.CONSUMER_GROUP_HEARTBEAT: "invalid_request",  # no member id
}

EVERY = [
    (api, version)
    for api, (low, high) in BROKER_VERSIONS.items()
    for version in range(low, high + 1)
]


@pytest.mark.parametrize(("api", "version"), EVERY)
def test_every_advertised_version_is_answered(our_broker: Broker, api: Api, version: int) -> None:
    if api is Api.PRODUCE and version < PRODUCE_VERSION_MIN:
        pytest.skip("advertised and refused, as Apache Kafka does")
    with Raw(our_broker.address) as raw:
        reply = raw.ask(api, version, **LEAST[api])
    assert reply != "closed", our_broker.log_lines[-2:]
    assert reply.get("error_code", "none") in ("none", REFUSED.get(api))


@pytest.mark.parametrize("version", [0, 1, 2])
def test_produce_without_batches_of_format_2_is_refused(our_broker: Broker, version: int) -> None:
    with Raw(our_broker.address) as raw:
        header = b"\x00\x00" + version.to_bytes(2, "big") + b"\x00\x00\x00\x01\xff\xff"
        body = b"\xff\xff\x00\x00\x03\xe8\x00\x00\x00\x00"
        raw.send_bytes((len(header) + len(body)).to_bytes(4, "big") + header + body)
        assert raw.frame() is None


def test_unknown_version_of_api_versions_is_answered_in_version_0(our_broker: Broker) -> None:
    with Raw(our_broker.address) as raw:
        header = b"\x00\x12\x00\x63\x00\x00\x00\x07\xff\xff"
        raw.send_bytes(len(header).to_bytes(4, "big") + header)
        frame = raw.frame()
    assert frame is not None
    assert frame[:6] == b"\x00\x00\x00\x07\x00\x23"  # UNSUPPORTED_VERSION
