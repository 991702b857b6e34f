"""What the network or a disk has changed is asked for again, never handed out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kio.schema.errors import ErrorCode

from ledgerstream.client.cluster import Cluster
from ledgerstream.client.reader import Reader
from ledgerstream.wire import batches
from ledgerstream.wire.batches import NewRecord


def fetched(data: bytes) -> Any:
    return SimpleNamespace(
        partition_index=0,
        error_code=ErrorCode.none,
        last_stable_offset=9,
        high_watermark=9,
        log_start_offset=0,
        aborted_transactions=None,
        records=data,
    )


@pytest.mark.parametrize("damaged", [False, True])
async def test_a_batch_whose_crc_is_wrong_is_not_handed_out(damaged: bool) -> None:
    reader = Reader(Cluster("127.0.0.1:1", "test"), "payments", {0: 0})
    data = bytearray(batches.encode_batch([NewRecord(b"key", b"100.00 EUR", 5)]))
    data[-5] ^= damaged
    trouble = reader._take(fetched(bytes(data)), {0: 0})
    if damaged:
        assert trouble is not None
        assert (trouble.name, trouble.retriable) == ("CORRUPT_MESSAGE", True)
        assert reader.positions == {0: 0}
    else:
        assert trouble is None
        assert reader.positions == {0: 1}
    await reader.close()
