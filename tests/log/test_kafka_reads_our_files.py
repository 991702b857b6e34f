"""Apache Kafka's own tool reads what we wrote, and finds nothing to complain of."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ledgerstream.limits import KIB
from ledgerstream.log import LogConfig
from tests.log.harness import SMALL, Running, log_files
from tests.peers import kafka

pytestmark = pytest.mark.skipif(
    kafka.why_absent() is not None, reason=kafka.why_absent() or "Apache Kafka is here"
)


def dump(*files: Path, options: tuple[str, ...] = ()) -> str:
    names = ",".join(map(str, files))
    return kafka.tool("org.apache.kafka.tools.DumpLogSegments", "--files", names, *options)


def test_dump_log_segments_reads_logs_and_indexes(open_store: Callable[..., Running]) -> None:
    chance = random.Random(1)
    running = open_store(SMALL)
    partition = running.create(
        config=LogConfig(segment_bytes=32 * KIB, index_interval_bytes=1 * KIB)
    )
    sequence = 0
    for i in range(300):
        count = chance.randint(1, 9)
        codec = chance.randrange(5)
        time = 1_700_000_000_000 + i * 10 + chance.randrange(-200, 200)
        value = chance.randbytes(chance.choice((5, 100, 900)))
        running.append(
            partition, count=count, time=time, value=value, codec=codec, pid=9, sequence=sequence,
            now_ms=1_700_000_010_000,
        )  # fmt: skip
        sequence += count
        if i == 150:
            partition.begin_epoch(2)
    running.settle()
    running.close()
    assert len(partition.segments) > 2

    out = dump(*log_files(running.directory), options=("--print-data-log", "--deep-iteration"))
    offsets = [int(found) for found in re.findall(r"^\| offset: (\d+)", out, re.M)]
    assert offsets == list(range(sequence))
    assert len(re.findall(r"isvalid: true", out)) >= 300
    assert not re.search(r"isvalid: false|invalid|corrupt|Mismatch|Non-monotonic", out, re.I)
    assert set(re.findall(r"partitionLeaderEpoch: (\d+)", out)) == {"0", "2"}

    indexes = [*log_files(running.directory, ".index"), *log_files(running.directory, ".timeindex")]
    assert any(path.stat().st_size for path in indexes)
    told = dump(*indexes)
    assert not re.search(r"mismatch|out of order|corrupt|error", told, re.I), told
    assert "timestamp: " in told
    assert "position: " in told
    sane = dump(*indexes, options=("--index-sanity-check",))
    assert sane.count("passed sanity check") == len(indexes)
