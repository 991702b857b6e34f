"""Our broker answers as Apache Kafka 4.3 does; what stays different is explained."""

from __future__ import annotations

import itertools
import re
from typing import Any
from uuid import UUID

import pytest

from ledgerstream.broker.embedded import Broker
from ledgerstream.groups import GroupCodec
from ledgerstream.wire import batches
from tests.differential import (  # noqa: F401 - their scenarios are among them
    consumergroups,
    groups,
    retention,
    transactions,
)
from tests.differential.raw import Raw
from tests.differential.scenarios import SCENARIOS
from tests.peers.kafka import ApacheKafka

# fields that differ by nature: ids that are drawn, addresses, free text meant for people
UNEQUAL_BY_NATURE = {
    "topic_id", "cluster_id", "host", "port", "error_message", "message", "throttle_time",
    "log_append_time", "controller_id", "broker_id", "node_endpoints", "record_errors",
}  # fmt: skip

# (scenario, step) → why ours differs
EXPLAINED: dict[tuple[str, str], str] = {
    ("produce_malformed_batches", "codec 5"): "UNSUPPORTED_COMPRESSION_TYPE says what is wrong, "
    "where Kafka fails with UNKNOWN_SERVER_ERROR",
    ("modern_group_patterns", "(?P<n>a)(?P<n>b)"): "RE2 lets two groups have one name, RE2/J does "
    "not",
    ("produce_outside_of_a_transaction", "a repeat"): "a batch that is in the log is answered with "
    "its offset, also when its transaction has ended",
    ("what_is_deleted_is_out_of_range", "all gone: the newest"): "no record that was deleted is "
    "named, where Kafka looks into the segment that is still there",
    **{
        ("a_deleted_part_of_an_open_transaction", f"below {offset}: 1"): "the last stable offset "
        "is never below the log's start, also before the next append"
        for offset in (2, 6)
    },
    **{
        ("metadata_in_every_version", f"v{version}"): "an automatically created topic is told of "
        "in the same reply: waiting beats refusing"
        for version in range(4)
    },
}

_numbers = itertools.count()


def normal(value: Any) -> Any:
    """What a client can tell apart."""
    if isinstance(value, dict):
        return {k: normal(v) for k, v in value.items() if k not in UNEQUAL_BY_NATURE}
    if isinstance(value, list):
        return [normal(item) for item in value]
    if isinstance(value, UUID):
        return "uuid"
    if isinstance(value, bytes):
        return [
            (h.base_offset, h.length, h.leader_epoch, h.attributes, h.record_count, h.crc)
            for _, h in batches.headers(value)
        ] or re.sub(rb"\x00+$", b"", value).hex()
    return value


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_as_apache_kafka(our_broker: Broker, apache_kafka: ApacheKafka, name: str) -> None:
    topic = f"{name}-{next(_numbers)}"
    seen = []
    for address in (our_broker.address, apache_kafka.address):
        with Raw(address) as raw:
            seen.append({step: normal(reply) for step, reply in SCENARIOS[name](raw, topic)})
    ours, theirs = seen
    assert ours.keys() == theirs.keys()
    different = {
        step: {"ours": ours[step], "Kafka": theirs[step]}
        for step in ours
        if ours[step] != theirs[step] and (name, step) not in EXPLAINED
    }
    assert different == {}


@pytest.mark.slow
def test_records_of_groups_are_written_as_apache_kafka_writes_them(
    apache_kafka: ApacheKafka,
) -> None:
    """Byte for byte: what it wrote is read, and written again."""
    scenarios = (
        "group_offsets_in_every_version", "group_rebalances", "group_deletion",
        "modern_group_of_two", "modern_group_with_static_members", "modern_group_by_a_pattern",
    )  # fmt: skip
    with Raw(apache_kafka.address) as raw:
        for name in scenarios:
            list(SCENARIOS[name](raw, f"{name}-{next(_numbers)}-bytes"))
    codec, seen = GroupCodec(), set()
    for file in (apache_kafka.directory / "data").glob("__consumer_offsets-*/*.log"):
        data = file.read_bytes()
        for at, header in batches.headers(data):
            for record in () if header.control else batches.records(data, at):
                assert record.key is not None
                if record.key[:2] == b"\x00\x04":
                    continue  # removes what was written before 4.1, in case it was there
                found = codec.decode(record.key, record.value)
                assert found is not None
                key, value = codec.encode(found)
                assert key == record.key
                # of several topics the order is that of a hash table there
                assert sorted(value or b"") == sorted(record.value or b"")
                assert (value is None) == (record.value is None)
                assert codec.decode(key, value) == found
                seen.add(type(found).__name__)
    classic = {"OffsetCommitted", "OffsetForgotten", "GroupMetadata", "GroupForgotten"}
    modern = {"GroupEpoch", "Member", "TargetEpoch", "Target", "Current", "Regex", "Gone"}
    assert seen == classic | modern


def test_what_is_explained_exists() -> None:
    assert {name for name, _ in EXPLAINED} <= SCENARIOS.keys()
