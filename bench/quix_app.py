"""The peer, run by its own interpreter: ADDRESS TOPIC COUNT HOST PORT DATABASE USER PASSWORD DIR.

Quix Streams as its handbook has it: JSON in, a keyed count and mean in RocksDB, rows to Postgres by
its own sink, at least once. Prints the seconds for COUNT events, from the first one processed.
"""

from __future__ import annotations

import logging
import sys
import time
import uuid

from quixstreams import Application
from quixstreams.sinks.community.postgresql import PostgreSQLSink

address, topic, count, host, port, database, user, password, state_dir = sys.argv[1:]
began = 0.0


def with_mean(payment: dict, state) -> dict:  # type: ignore[no-untyped-def]
    global began
    if not began:
        began = time.perf_counter()
    number = state.get("count", 0) + 1
    total = state.get("total", 0.0) + float(payment["amount"])
    state.set("count", number)
    state.set("total", total)
    return {
        "payment_id": payment["payment_id"],
        "customer": payment["customer"],
        "count": number,
        "mean": total / number,
    }


app = Application(
    broker_address=address,
    consumer_group=uuid.uuid4().hex,
    auto_offset_reset="earliest",
    state_dir=state_dir,
    loglevel=logging.ERROR,
)
sink = PostgreSQLSink(
    host=host, port=int(port), dbname=database, user=user, password=password,
    table_name="quix_" + uuid.uuid4().hex[:8],
)  # fmt: skip
frame = app.dataframe(app.topic(topic, value_deserializer="json", key_deserializer="bytes"))
frame = frame.apply(with_mean, stateful=True)
frame.sink(sink)
app.run(count=int(count), collect=False)
print(time.perf_counter() - began, flush=True)
