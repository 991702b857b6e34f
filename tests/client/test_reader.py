"""What the network or a disk has changed is asked for again, never handed out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kio.schema.errors import ErrorCode

from ledgerstream.client import Client
from ledgerstream.client.cluster import Cluster
from ledgerstream.client.reader import Reader
from ledgerstream.errors import DeliveryTimeout
from ledgerstream.limits import Limits
from ledgerstream.wire import batches
from ledgerstream.wire.batches import NewRecord
from ledgerstream.wire.versions import Api
from tests.client import scripted
from tests.client.scripted import ScriptedBroker

BATCH = batches.encode_batch([NewRecord(b"key", b"100.00 EUR", 5)])


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


@pytest.mark.parametrize(
    ("answer", "trouble"),
    [
        (scripted.fetched(BATCH[:-3]), "no whole batch"),
        (scripted.fetched(b"\0" * 100), "no whole batch"),
        (scripted.fetched(BATCH) | {"responses": []}, "left it out"),
    ],
    ids=["cut", "garbage", "nothing"],
)
async def test_answers_that_lead_nowhere_end_within_the_time_limit(
    answer: dict[str, Any], trouble: str
) -> None:
    limits = Limits(request_ms_max=300, delivery_ms_max=500, retry_first_ms=20, retry_ms_max=50)
    async with ScriptedBroker() as broker:
        broker.answers[Api.FETCH] = lambda _: answer
        async with await Client.connect(broker.address, limits=limits) as client:
            reader = client.reader("t", {0: 0})
            with pytest.raises(DeliveryTimeout, match=trouble):
                await reader.next(5_000)
            assert broker.asked[Api.FETCH] < 40
            broker.answers[Api.FETCH] = lambda _: scripted.fetched(BATCH)
            chunk = await reader.next(5_000)
            assert chunk is not None
            assert chunk.next_offset == 1
