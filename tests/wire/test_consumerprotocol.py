"""What members of a classic group say to each other, in each version."""

from __future__ import annotations

import struct

import pytest

from ledgerstream.errors import DecodeError
from ledgerstream.wire.consumerprotocol import (
    Subscription,
    read_assignment,
    read_subscription,
    version_of,
    write_assignment,
    write_subscription,
)

OWNED = {"a": frozenset({0, 2}), "b": frozenset({1})}
WHOLE = Subscription(frozenset({"a", "b"}), OWNED, 7, "rack")
IN_VERSION = {
    0: WHOLE._replace(owned=None, generation=-1, rack_id=None),
    1: WHOLE._replace(generation=-1, rack_id=None),
    2: WHOLE._replace(rack_id=None),
    3: WHOLE,
}


@pytest.mark.parametrize("version", IN_VERSION)
def test_a_subscription_is_read_as_it_was_written(version: int) -> None:
    data = write_subscription(WHOLE, version)
    assert version_of(data) == version
    assert read_subscription(data) == IN_VERSION[version]
    for cut in range(len(data)):
        with pytest.raises(DecodeError):
            read_subscription(data[:cut])


def test_a_subscription_has_these_bytes() -> None:
    """Version 1 by hand, after Kafka's ConsumerProtocolSubscription.json."""
    data = write_subscription(Subscription(frozenset({"t"}), {"t": frozenset({5})}), 1)
    assert data == (
        struct.pack(">h", 1)
        + struct.pack(">ih1s", 1, 1, b"t")
        + struct.pack(">i", -1)
        + struct.pack(">ih1sii", 1, 1, b"t", 1, 5)
    )


def test_an_assignment_is_read_as_it_was_written() -> None:
    for version in IN_VERSION:
        assert read_assignment(write_assignment(OWNED, version)) == OWNED
    assert read_assignment(b"") == {}
