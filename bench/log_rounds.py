"""What a write round costs with 1, 6, 50 and 1,000 dirty partitions: `python -m bench.log_rounds`.

Each round, every partition gets one batch and the loop waits until all of them are durable: one
file is synced itself, several small ones go to the journal, and `no` is Kafka's page-cache way. The
last column is the whole round's time a partition, deciding and writing together. The garbage
collector is set as a broker should set it: as it comes, its pauses are most of the p99 at 1,000.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ledgerstream.log import LogConfig, Partition, PartitionKey, Store
from ledgerstream.wire.batches import NewRecord, encode_batch, parse_header

PARTITIONS = (1, 6, 50, 1_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--bytes", type=int, default=200, help="of each batch's only record")
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")
    args = parser.parse_args()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1_000)
    print(f"{'partitions':>10} {'sync':>8} {'p50 ms':>8} {'p99 ms':>8} {'µs/partition':>13}")
    for sync in (True, False):
        for partitions in PARTITIONS:
            with tempfile.TemporaryDirectory(dir=args.directory) as directory:
                times = measure(Path(directory), partitions, args.rounds, args.bytes, sync=sync)
            p50 = statistics.median(times)
            p99 = statistics.quantiles(times, n=100)[98]
            how = "no" if not sync else "direct" if partitions == 1 else "journal"
            each = p50 * 1e3 / partitions
            print(f"{partitions:>10} {how:>8} {p50:>8.2f} {p99:>8.2f} {each:>13.1f}")


def measure(
    directory: Path, partitions: int, rounds: int, batch_bytes: int, *, sync: bool
) -> list[float]:
    """Milliseconds of each round, from the first append until the last partition is durable."""
    store = Store.open(directory, sync=sync)
    calls: SimpleQueue[Any] = SimpleQueue()
    store.start(calls.put, lambda moved: None)
    topic_id = uuid.uuid4()
    logs = [
        store.create(PartitionKey("rounds", topic_id, i), LogConfig(), 0) for i in range(partitions)
    ]
    batch = encode_batch([NewRecord(None, bytes(batch_bytes), 0)])
    times = [_round(logs, batch, calls) for _ in range(rounds + 20)]
    store.close()
    return times[20:]  # the first rounds also sync the names of new directories


def _round(logs: list[Partition], batch: bytes, calls: SimpleQueue[Any]) -> float:
    header = parse_header(batch)
    began = time.perf_counter()
    for log in logs:
        log.append(batch, header, 0)
    while any(log.high_watermark < log.next_offset for log in logs):
        calls.get()()
    return (time.perf_counter() - began) * 1e3


if __name__ == "__main__":
    main()
