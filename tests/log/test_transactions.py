"""Transactions in one partition: transactions.md, parts A, D and E, by the number of the item."""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from kio.schema.errors import ErrorCode

from ledgerstream.limits import KIB, LIMITS
from ledgerstream.log import Appended, LogConfig, Partition, Refused, Repeat
from ledgerstream.log.opentxns import Ended
from ledgerstream.log.producers import ProducerRecord, Producers
from ledgerstream.log.sealed import seal
from ledgerstream.log.snapshots import read_snapshot
from ledgerstream.wire.batches import TRANSACTIONAL, Header, headers, parse_header, records
from ledgerstream.wire.markers import Marker, encode_marker, read_marker
from tests.log.harness import DIRECT, FailingDisk, Running, batch_of, log_files
from tests.peers import kafka

NOW = 10_000


def data(pid: int, sequence: int, count: int = 1, epoch: int = 0, **how: Any) -> bytes:
    return batch_of(count, pid=pid, epoch=epoch, sequence=sequence, attributes=TRANSACTIONAL, **how)


def write(partition: Partition, batch: bytes, *, verified: bool = True) -> Any:
    """Append as the broker does: ask the coordinator (it says yes) where it has to be asked."""
    header = parse_header(batch)
    guard = partition.begin_verification(header) if verified and header.transactional else None
    verdict = partition.append(batch, header, NOW, guard)
    return verdict.code if isinstance(verdict, Refused) else verdict


def end(
    partition: Partition, pid: int, *, committed: bool, epoch: int = 0, coordinator: int = 0,
    strict: bool = False,
) -> Any:  # fmt: skip
    verdict = partition.append_marker(
        Marker(pid, epoch, coordinator, committed), NOW, strict=strict
    )
    return verdict.code if isinstance(verdict, Refused) else verdict


def committed_values(partition: Partition, offset: int, bytes_max: int = 1_000_000) -> list[int]:
    """What a read_committed consumer that starts at `offset` delivers: offsets of records."""
    out: list[int] = []
    stable = partition.last_stable_offset
    while offset < stable:
        read = partition.read_cold(offset, bytes_max, stable)
        aborted = partition.aborted_cold(offset, read.bound)
        assert aborted == sorted(aborted, key=lambda each: each[1])
        joined = b"".join(read.data)
        assert joined, offset
        waiting, gone = list(aborted), set()
        for at, header in headers(joined):
            while waiting and waiting[0][1] <= header.next_offset - 1:
                gone.add(waiting.pop(0)[0])
            if header.control:
                marker = read_marker(joined, at)
                if marker is not None and not marker.committed:
                    gone.discard(header.producer_id)
            elif not (header.transactional and header.producer_id in gone):
                out += [r.offset for r in records(joined, at) if r.offset >= offset]
            following = header.next_offset
        offset = following
    return out


# -- part A, where transactions begin


def test_plain_data_of_a_producer_with_an_open_transaction_is_refused(
    open_store: Callable[..., Running],
) -> None:
    """Item 13."""
    partition = open_store().create()
    write(partition, data(9, 0))
    assert write(partition, batch_of(1, pid=9, sequence=1)) is ErrorCode.invalid_txn_state
    end(partition, 9, committed=True)
    assert isinstance(write(partition, batch_of(1, pid=9, sequence=1)), Appended)


def test_after_a_marker_of_a_new_epoch_data_starts_at_0(open_store: Callable[..., Running]) -> None:
    """Item 12."""
    partition = open_store().create()
    write(partition, data(9, 0))
    end(partition, 9, epoch=1, committed=True)
    assert write(partition, data(9, 1)) is ErrorCode.invalid_producer_epoch
    assert write(partition, data(9, 1, epoch=1)) is ErrorCode.out_of_order_sequence_number
    assert isinstance(write(partition, data(9, 0, epoch=1)), Appended)


def test_a_transaction_with_an_epoch_of_its_own_starts_at_sequence_0() -> None:
    """Item 11, under Transactions V2: where the producer is not known, too."""
    producers = Producers()
    header = parse_header(data(9, 5))
    guard = producers.begin(9, 0, 5)
    guard.new_epoch = True
    verdict = producers.check(header, guard)
    assert isinstance(verdict, Refused)
    assert verdict.code is ErrorCode.out_of_order_sequence_number
    guard.new_epoch = False
    assert not isinstance(producers.check(header, guard), Refused)


def test_the_open_transaction_survives_a_restart(open_store: Callable[..., Running]) -> None:
    """Item 18."""
    for clean in (True, False):
        running = open_store()
        partition = running.store.get(next(iter(running.store._partitions), None)) or (
            running.create()
        )
        first = partition.next_offset
        pid = 20 + clean
        write(partition, data(pid, 0, 2))
        write(partition, data(pid, 2, 1))
        running.settle()
        before = partition.producers.records()
        running.close() if clean else running.abandon()
        running = open_store()
        partition = running.partition()
        assert partition.producers.records() == before
        assert partition.last_stable_offset == first
        end(partition, pid, committed=False)
        running.settle()
        assert partition.last_stable_offset == partition.high_watermark
        assert partition.aborted_cold(0, 10**9)[-1] == (pid, first)
        running.close()


def test_a_snapshot_of_the_older_layout_is_read(tmp_path: Path) -> None:
    from ledgerstream.log.disk import Disk

    kept = ((0, 1, 5, 6, 77),)
    (tmp_path / f"{7:020d}.producers").write_bytes(seal(b"lsprodu\x01", [(9, 3, kept)]))
    found = read_snapshot(Disk(), str(tmp_path), 7)
    assert found is not None
    assert found.records() == [ProducerRecord(9, 3, kept)]
    assert isinstance(found.check(parse_header(batch_of(2, pid=9, epoch=3, sequence=0))), Repeat)


def test_a_failed_write_takes_back_transactions_and_the_aborted_index(
    open_store: Callable[..., Running],
) -> None:
    """Item 19."""
    disk = FailingDisk()
    running = open_store(DIRECT, disk=disk)
    partition = running.create()
    write(partition, data(9, 0))
    write(partition, data(8, 0))
    end(partition, 8, committed=False)
    running.settle()
    before = partition.producers.records()
    disk.plant("write", OSError(errno.ENOSPC, "No space left on device"), "payments-0")
    end(partition, 9, committed=False)
    write(partition, data(7, 0))
    running.until(lambda: partition.failure)
    assert partition.next_offset == partition.high_watermark == 3
    disk.heal()
    running.store.tick(0)
    running.store.tick(10**9)
    running.until(lambda: partition.failure is None)
    assert partition.producers.records() == before
    assert partition.last_stable_offset == 0
    assert partition.aborted_cold(0, 10**9) == [(8, 1)]
    assert write(partition, data(7, 3), verified=False) is ErrorCode.invalid_txn_state
    end(partition, 9, committed=True)
    running.settle()
    assert committed_values(partition, 0) == [0]


def test_a_producer_with_an_open_transaction_does_not_expire() -> None:
    """Item 20."""
    producers = Producers()
    header = parse_header(data(9, 0))
    producers.replay(header, 0, 1)
    for now in (NOW, NOW + 2 * LIMITS.producer_id_expiry_ms):
        assert producers.expire(now) == 0
    producers.replay(
        parse_header(encode_marker(Marker(9, 0, 0, True), 1)), 1, 1, Marker(9, 0, 0, True)
    )
    producers.expire(NOW)
    assert producers.expire(NOW + LIMITS.producer_id_expiry_ms) == 1


# -- part D: markers, the last stable offset, the aborted index


def test_a_marker_is_one_control_batch_of_one_offset_as_kafka_writes_it(
    open_store: Callable[..., Running],
) -> None:
    """Item 65."""
    running = open_store()
    partition = running.create()
    write(partition, data(9, 0, 3))
    assert end(partition, 9, committed=True, coordinator=5) == Appended(3, 3, -1)
    running.settle()
    batch = b"".join(partition.read_cold(3, 1000, 4).data)
    header = parse_header(batch)
    (record,) = records(batch)
    assert (header.control, header.transactional, header.record_count) == (True, True, 1)
    assert (header.producer_id, header.producer_epoch, header.base_sequence) == (9, 0, -1)
    assert record.key == b"\x00\x00\x00\x01"
    assert record.value == b"\x00\x00\x00\x00\x00\x05"
    assert read_marker(batch) == Marker(9, 0, 5, True)


def test_a_marker_of_an_overtaken_coordinator_or_epoch_is_refused(
    open_store: Callable[..., Running],
) -> None:
    """Item 66."""
    partition = open_store().create()
    write(partition, data(9, 0, epoch=2))
    end(partition, 9, epoch=2, coordinator=7, committed=True)
    write(partition, data(9, 1, epoch=2))
    fenced = ErrorCode.transaction_coordinator_fenced
    assert end(partition, 9, epoch=2, coordinator=6, committed=True) is fenced
    assert end(partition, 9, epoch=1, coordinator=8, committed=True) is (
        ErrorCode.invalid_producer_epoch
    )
    assert isinstance(end(partition, 9, epoch=2, coordinator=8, committed=True), Appended)


def test_a_marker_without_a_transaction_fences_and_changes_nothing_else(
    open_store: Callable[..., Running],
) -> None:
    """Item 67."""
    running = open_store()
    partition = running.create()
    end(partition, 9, epoch=4, committed=False)
    running.settle()
    assert partition.aborted_cold(0, 100) == []
    assert partition.last_stable_offset == 1
    assert write(partition, data(9, 0, epoch=3)) is ErrorCode.invalid_producer_epoch


def test_a_repeated_marker_is_harmless_and_a_strict_one_wants_a_higher_epoch(
    open_store: Callable[..., Running],
) -> None:
    """Item 68, bug 7."""
    running = open_store()
    partition = running.create()
    write(partition, data(9, 0, epoch=2))
    assert end(partition, 9, epoch=2, committed=False, strict=True) is (
        ErrorCode.invalid_producer_epoch
    )
    for _ in range(3):
        assert isinstance(end(partition, 9, epoch=3, committed=False, strict=True), Appended)
    running.settle()
    assert partition.aborted_cold(0, 100) == [(9, 0)]
    assert partition.last_stable_offset == partition.high_watermark == 4


def test_the_last_stable_offset_waits_for_the_marker_to_be_durable(
    open_store: Callable[..., Running],
) -> None:
    """Items 73, 74."""
    running = open_store()
    partition = running.create()
    write(partition, batch_of(1))
    write(partition, data(9, 0))
    write(partition, data(8, 0))
    write(partition, batch_of(1))
    running.settle()
    assert (partition.last_stable_offset, partition.high_watermark) == (1, 4)
    end(partition, 9, committed=True)
    assert partition.last_stable_offset == 1  # decided, not durable
    running.settle()
    assert partition.last_stable_offset == 2  # producer 8
    end(partition, 8, committed=False)
    assert partition.last_stable_offset == 2
    running.settle()
    assert partition.last_stable_offset == partition.high_watermark == 6


def test_an_open_transaction_never_holds_the_stable_offset_below_the_log_start(
    open_store: Callable[..., Running],
) -> None:
    """Items 73, 110."""
    running = open_store()
    partition = running.create()
    write(partition, data(9, 0, 5))
    running.settle()
    assert running.trim(partition, 3)
    assert partition.last_stable_offset == 3


def test_the_index_holds_aborts_in_the_order_of_their_markers(
    open_store: Callable[..., Running],
) -> None:
    """Items 75, 76."""
    running = open_store()
    partition = running.create()
    for pid in (1, 2, 3, 4):
        write(partition, data(pid, 0))
    for pid, committed in ((3, False), (2, True), (1, False), (4, False)):
        end(partition, pid, committed=committed)
    running.settle()
    entries = list(partition.segments[0].aborted_since(running.store.disk.read, 0))
    assert entries == [(3, 2, 4, 0), (1, 0, 6, 3), (4, 3, 7, 8)]
    assert partition.aborted_cold(0, 100) == [(1, 0), (3, 2), (4, 3)]
    assert partition.aborted_cold(5, 100) == [(1, 0), (4, 3)]
    assert partition.aborted_cold(0, 3) == [(1, 0), (3, 2)]
    assert committed_values(partition, 0) == [1]


def test_every_shape_of_transaction_is_read_right_from_every_offset(
    open_store: Callable[..., Running],
) -> None:
    """Items 75, 76, 79: overlapping, several of one producer, empty ones, across segments, from
    the middle, windows of control records alone; after a crash and a clean stop as well."""
    chance = random.Random(7)
    running = open_store()
    partition = running.create(config=LogConfig(segment_bytes=4 * KIB, index_interval_bytes=500))
    sequences = dict.fromkeys(range(1, 6), 0)
    open_now: dict[int, list[int]] = {}
    wanted: list[int] = []
    for _ in range(600):
        pid = chance.choice(list(sequences))
        if chance.random() < 0.3:
            committed = chance.random() < 0.5
            end(partition, pid, committed=committed)
            wanted += open_now.pop(pid, []) if committed else []
            open_now.pop(pid, None)
        elif chance.random() < 0.1:
            verdict = write(partition, batch_of(2))
            wanted += range(verdict.base_offset, verdict.last_offset + 1)
        else:
            count = chance.randint(1, 3)
            verdict = write(partition, data(pid, sequences[pid], count))
            sequences[pid] += count
            offsets = range(verdict.base_offset, verdict.last_offset + 1)
            open_now.setdefault(pid, []).extend(offsets)
    for pid in list(open_now):
        if pid % 2:
            end(partition, pid, committed=False)
            del open_now[pid]
    running.settle()
    assert len(partition.segments) > 5
    for restart in ("no", "crash", "clean"):
        if restart != "no":
            running.abandon() if restart == "crash" else running.close()
            running = open_store()
            partition = running.partition()
        stable = partition.last_stable_offset
        assert stable == min((first[0] for first in open_now.values()), default=10**9)
        expected = sorted(offset for offset in wanted if offset < stable)
        for start in range(0, stable, 7):
            for size in (1, 700, 10**6):
                if size == 1 and start % 5:
                    continue
                assert committed_values(partition, start, size) == [
                    offset for offset in expected if offset >= start
                ]


def test_an_aborted_list_does_not_name_what_lies_behind_the_read(
    open_store: Callable[..., Running],
) -> None:
    """Item 76: a reader that is far behind is not told of every abort since."""
    running = open_store()
    partition = running.create()
    for n in range(200):
        write(partition, data(9, n))
        end(partition, 9, committed=False)
    running.settle()
    read = partition.read_cold(0, 300, partition.last_stable_offset)
    assert len(partition.aborted_cold(0, read.bound)) < 10


def test_late_transactions_are_told(open_store: Callable[..., Running]) -> None:
    """Item 83."""
    partition = open_store().create()
    write(partition, data(9, 0))
    assert list(partition.producers.late(NOW, 1_000)) == []
    assert list(partition.producers.late(NOW + 1_000, 1_000)) == []
    assert list(partition.producers.late(NOW + 1_001, 1_000)) == [(9, 0)]
    end(partition, 9, committed=True)
    assert list(partition.producers.late(NOW + 9_999, 1_000)) == []


def test_producers_are_described(open_store: Callable[..., Running]) -> None:
    """Item 84."""
    partition = open_store().create()
    write(partition, data(9, 0, 4, epoch=3))
    end(partition, 9, epoch=3, coordinator=2, committed=True)
    write(partition, data(9, 4, 2, epoch=3))
    (described,) = partition.producers.describe()
    assert described == (9, 3, 5, 1_001, 2, 5)


# -- part E: guards


def test_the_first_batch_of_a_transaction_needs_a_guard_and_later_ones_do_not(
    open_store: Callable[..., Running],
) -> None:
    """Items 85, 86."""
    partition = open_store().create()
    assert write(partition, data(9, 0), verified=False) is ErrorCode.invalid_txn_state
    assert isinstance(write(partition, data(9, 0)), Appended)
    assert partition.begin_verification(parse_header(data(9, 1))) is None
    assert isinstance(write(partition, data(9, 1), verified=False), Appended)
    end(partition, 9, committed=True)
    assert write(partition, data(9, 2), verified=False) is ErrorCode.invalid_txn_state


def test_a_marker_between_question_and_append_makes_the_answer_worthless(
    open_store: Callable[..., Running],
) -> None:
    """Items 86, 91, bugs 2 and 12."""
    partition = open_store().create()
    batch = data(9, 0)
    header = parse_header(batch)
    guard = partition.begin_verification(header)
    end(partition, 9, committed=False)
    refused = partition.append(batch, header, NOW, guard)
    assert isinstance(refused, Refused)
    assert refused.code is ErrorCode.invalid_txn_state
    newer = partition.begin_verification(header)
    assert newer is not guard
    assert isinstance(partition.append(batch, header, NOW, guard), Refused)
    assert isinstance(partition.append(batch, header, NOW, newer), Appended)


def test_a_higher_sequence_does_not_overtake_one_that_must_be_sent_again(
    open_store: Callable[..., Running],
) -> None:
    """Item 88: the verification of sequence 0 failed for a while, that of 1 did not."""
    partition = open_store().create()
    partition.begin_verification(parse_header(data(9, 0)))
    assert write(partition, data(9, 1)) is ErrorCode.out_of_order_sequence_number
    assert isinstance(write(partition, data(9, 0)), Appended)
    assert isinstance(write(partition, data(9, 1)), Appended)


def test_an_epoch_that_is_over_is_said_before_the_guard_is_missed(
    open_store: Callable[..., Running],
) -> None:
    """Item 89, bug 13."""
    partition = open_store().create()
    write(partition, data(9, 0))
    end(partition, 9, epoch=1, committed=False)
    assert write(partition, data(9, 1), verified=False) is ErrorCode.invalid_producer_epoch


def test_a_repeat_needs_no_guard(open_store: Callable[..., Running]) -> None:
    """Items 5, 85: the transaction may be over when its last produce is repeated."""
    partition = open_store().create()
    write(partition, data(9, 0, 2))
    end(partition, 9, committed=True)
    assert write(partition, data(9, 0, 2), verified=False) == Repeat(0, 1, 1_001)


def test_guards_that_nobody_came_back_for_are_forgotten() -> None:
    producers = Producers()
    producers.begin(9, 0, 0)
    producers.expire(NOW)
    assert len(producers._guards) == 1
    producers.expire(NOW + LIMITS.producer_id_expiry_check_ms)
    assert len(producers._guards) == 0


# -- Apache Kafka's own tool


@pytest.mark.skipif(kafka.why_absent() is not None, reason=kafka.why_absent() or "")
def test_dump_log_segments_reads_markers_and_the_aborted_index(
    open_store: Callable[..., Running],
) -> None:
    """Items 65, 75."""
    running = open_store()
    partition = running.create()
    for pid in (1, 2, 3):
        write(partition, data(pid, 0, 2))
    end(partition, 2, committed=False, coordinator=4)
    end(partition, 1, committed=True, coordinator=4)
    end(partition, 3, committed=False, coordinator=5)
    running.settle()
    running.close()
    files = [*log_files(running.directory), *log_files(running.directory, ".txnindex")]
    names = ",".join(map(str, files))
    out = kafka.tool("org.apache.kafka.tools.DumpLogSegments", "--files", names, "--print-data-log")
    assert re.findall(r"endTxnMarker: (\w+) coordinatorEpoch: (\d+)", out) == [
        ("ABORT", "4"), ("COMMIT", "4"), ("ABORT", "5")
    ]  # fmt: skip
    told = re.findall(
        r"producerId: (\d+) firstOffset: (\d+) lastOffset: (\d+) lastStableOffset: (\d+)", out
    )
    assert told == [("2", "2", "6", "0"), ("3", "4", "8", "9")]


# -- against a model


class TransactionsEqualTheirModel(RuleBasedStateMachine):
    """Whatever is written, ended, lost or crashed: what is stable and what is aborted follow from
    the log alone, and live state is replayed state."""

    @initialize()
    def start(self) -> None:
        self.producers = Producers()
        self.log: list[tuple[Header, int, Marker | None]] = []
        self.ended: list[Ended] = []
        self.next_offset = self.high_watermark = 0

    def put(self, batch: bytes, marker: Marker | None = None) -> None:
        header = parse_header(batch)
        self.log.append((header, self.next_offset, marker))
        ended = self.producers.replay(header, self.next_offset, self.next_offset, marker)
        if ended is not None:
            self.ended.append(ended)
        self.next_offset += header.record_count

    @rule(
        pid=st.integers(1, 3), epoch=st.integers(0, 2), count=st.integers(1, 3),
        verified=st.booleans(), transactional=st.booleans(),
    )  # fmt: skip
    def send(self, pid: int, epoch: int, count: int, verified: bool, transactional: bool) -> None:
        known = next((r for r in self.producers.records() if r.producer_id == pid), None)
        same = known is not None and known.producer_epoch == epoch
        last = known.kept[-1].last_sequence if same and known is not None and known.kept else -1
        batch = batch_of(
            count, pid=pid, epoch=epoch, sequence=last + 1,
            attributes=TRANSACTIONAL if transactional else 0,
        )  # fmt: skip
        guard = self.producers.begin(pid, epoch, last + 1) if verified and transactional else None
        refused = self.producers.check(parse_header(batch), guard)
        is_open = self._model_open().get(pid)
        if known is not None and epoch < known.producer_epoch:
            assert isinstance(refused, Refused)
        elif transactional:
            may = guard is not None or (is_open is not None and same)
            assert isinstance(refused, Refused) is not may, refused
        else:
            assert isinstance(refused, Refused) is (is_open is not None)
        if not isinstance(refused, (Refused, Repeat)):
            self.put(batch)

    @rule(pid=st.integers(1, 3), epoch=st.integers(0, 3), committed=st.booleans())
    def mark(self, pid: int, epoch: int, committed: bool) -> None:
        marker = Marker(pid, epoch, 0, committed)
        known = next((r for r in self.producers.records() if r.producer_id == pid), None)
        refused = self.producers.check_marker(marker)
        assert (refused is not None) is (known is not None and epoch < known.producer_epoch)
        if refused is None:
            self.put(encode_marker(marker, 0), marker)

    @rule(share=st.floats(0, 1))
    def become_durable(self, share: float) -> None:
        bounds = [offset for _, offset, _ in self.log if offset > self.high_watermark]
        if bounds:
            self.high_watermark = bounds[int(share * (len(bounds) - 1))]
            self.producers.open.settle(self.high_watermark)

    @rule(at=st.integers(0, 40))
    def crash(self, at: int) -> None:
        """What was not durable is gone; a snapshot somewhere, then the log from there on."""
        self.log = [entry for entry in self.log if entry[1] < self.high_watermark]
        self.ended = [each for each in self.ended if each.last_offset < self.high_watermark]
        self.next_offset = self.high_watermark
        before = Producers()
        for header, offset, marker in self.log[:at]:
            before.replay(header, offset, offset, marker)
        after = Producers(before.records())
        for header, offset, marker in self.log[at:]:
            after.replay(header, offset, offset, marker)
        after.open.settle(self.high_watermark)
        self.producers = after

    def _model_open(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for header, offset, marker in self.log:
            if marker is not None:
                found.pop(header.producer_id, None)
            elif header.transactional:
                found.setdefault(header.producer_id, offset)
        return found

    @invariant()
    def stable_is_what_no_undecided_transaction_holds_back(self) -> None:
        undecided, found = [], {}
        for header, offset, marker in self.log:
            if marker is not None:
                first = found.pop(header.producer_id, None)
                if first is not None and offset >= self.high_watermark:
                    undecided.append(first)
            elif header.transactional:
                found.setdefault(header.producer_id, offset)
        wanted = min([*undecided, *found.values()], default=None)
        held = self.producers.open.first_undecided
        end = self.high_watermark
        assert min(held if held is not None else end, end) == min(
            wanted if wanted is not None else end, end
        )

    @invariant()
    def live_state_is_replayed_state(self) -> None:
        replayed, ended = Producers(), []
        for header, offset, marker in self.log:
            if (one := replayed.replay(header, offset, offset, marker)) is not None:
                ended.append(one)
        assert sorted(replayed.records()) == sorted(self.producers.records())
        assert ended == self.ended


TestTransactionsEqualTheirModel = TransactionsEqualTheirModel.TestCase
TestTransactionsEqualTheirModel.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None
)


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_five_thousand_histories() -> None:
    run_state_machine_as_test(
        TransactionsEqualTheirModel,
        settings=settings(
            max_examples=5_000, stateful_step_count=40, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
