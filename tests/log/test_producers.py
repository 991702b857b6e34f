"""Part A of transactions.md: what holds on a single node, by the number of its item."""

from __future__ import annotations

from collections.abc import Callable
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

from ledgerstream.limits import LIMITS
from ledgerstream.log import Appended, LogConfig, Refused, Repeat, check_client_batch, check_request
from ledgerstream.log.producers import SEQUENCES, Producers
from ledgerstream.log.verdicts import New
from ledgerstream.wire.batches import CONTROL, TRANSACTIONAL, ZSTD, Header, parse_header
from tests.log.harness import Running, batch_of

CONFIG = LogConfig()
NOW = 10_000


def header_of(
    sequence: int, count: int = 1, *, pid: int = 9, epoch: int = 0, attributes: int = 0
) -> Header:
    return parse_header(
        batch_of(count, pid=pid, epoch=epoch, sequence=sequence, attributes=attributes)
    )


class Log:
    """Producers with offsets: what a partition does with them, without the partition."""

    def __init__(self, producers: Producers | None = None, next_offset: int = 0) -> None:
        self.producers = producers or Producers()
        self.next_offset = next_offset

    def append(self, header: Header, timestamp: int = 0) -> Any:
        verdict = self.producers.check(header)
        if isinstance(verdict, New):
            self.producers.replay(header, self.next_offset, timestamp)
            self.next_offset += header.record_count
            return self.next_offset - header.record_count
        return verdict.code if isinstance(verdict, Refused) else verdict


def check(data: bytes, version: int = 9) -> Any:
    verdict = check_client_batch(data, CONFIG, now_ms=NOW, version=version)
    return verdict.code if isinstance(verdict, Refused) else verdict


def test_a_partition_takes_exactly_one_batch_of_format_2() -> None:
    """Item 1."""
    batch = batch_of(2)
    assert check(batch) == parse_header(batch)
    assert check(batch + batch) == ErrorCode.invalid_record
    assert check(b"") == ErrorCode.invalid_record
    assert check(batch[:16] + b"\x01" + batch[17:]) == ErrorCode.corrupt_message


def test_zstd_needs_produce_version_7() -> None:
    """Item 1."""
    batch = batch_of(2, codec=ZSTD)
    assert check(batch, version=6) == ErrorCode.unsupported_compression_type
    assert check(batch, version=7) == parse_header(batch)


def test_a_batch_whose_crc_or_length_is_wrong_is_corrupt() -> None:
    """Item 2."""
    batch = batch_of(2)
    assert check(batch[:-1] + b"?") == ErrorCode.corrupt_message
    assert check(batch[:-1]) == ErrorCode.corrupt_message
    assert check(batch[:8] + b"\x00\x00\x00\x00" + batch[12:]) == ErrorCode.corrupt_message


def test_a_clients_batch_starts_at_0_and_counts_its_records() -> None:
    """Item 2."""
    batch = batch_of(2)
    assert check((5).to_bytes(8, "big") + batch[8:]) == ErrorCode.invalid_record
    assert check(_sealed(batch, 23, (7).to_bytes(4, "big"))) == ErrorCode.invalid_record
    assert check(_sealed(batch, 57, (0).to_bytes(4, "big"))) == ErrorCode.invalid_record


def test_a_client_writes_no_control_batch() -> None:
    """Item 2."""
    assert check(batch_of(1, attributes=CONTROL)) == ErrorCode.invalid_record


def test_a_producer_id_needs_a_sequence() -> None:
    """Item 2."""
    assert check(batch_of(1, pid=9, sequence=-1)) == ErrorCode.invalid_record


def test_a_batch_larger_than_the_topic_allows_is_too_large() -> None:
    batch = batch_of(10)
    config = LogConfig(max_message_bytes=len(batch) - 1)
    verdict = check_client_batch(batch, config, now_ms=NOW)
    assert isinstance(verdict, Refused)
    assert verdict.code == ErrorCode.message_too_large


def test_a_time_too_far_away_is_invalid() -> None:
    """Item 23: it leaves no trace, for it never gets to the log."""
    assert check(batch_of(1, time=NOW + 3_600_001)) == ErrorCode.invalid_timestamp
    config = LogConfig(message_timestamp_before_max_ms=1_000)
    verdict = check_client_batch(batch_of(1, time=NOW - 1_001), config, now_ms=NOW)
    assert isinstance(verdict, Refused)
    assert verdict.code == ErrorCode.invalid_timestamp


def test_a_transactional_batch_needs_a_transactional_id() -> None:
    """Item 3."""
    headers = [header_of(0, attributes=TRANSACTIONAL)]
    verdict = check_request(headers, None)
    assert verdict is not None
    assert verdict.code == ErrorCode.transactional_id_authorization_failed
    assert check_request(headers, "t") is None
    assert check_request([header_of(0)], None) is None


def test_one_request_has_one_transactional_producer() -> None:
    """Item 4."""
    mine = header_of(0, attributes=TRANSACTIONAL)
    for other in (
        header_of(0, pid=10, attributes=TRANSACTIONAL),
        header_of(0, epoch=1, attributes=TRANSACTIONAL),
    ):
        verdict = check_request([mine, other], "t")
        assert verdict is not None
        assert verdict.code == ErrorCode.invalid_producer_id_mapping
    assert check_request([mine, mine, header_of(0, pid=11)], "t") is None


def test_each_of_the_last_five_batches_is_known_as_a_repeat() -> None:
    """Item 5."""
    log = Log()
    for i in range(8):
        assert log.append(header_of(i * 2, 2), timestamp=100 + i) == i * 2
    for i in range(3, 8):
        assert log.append(header_of(i * 2, 2)) == Repeat(i * 2, i * 2 + 1, 100 + i)
    assert log.next_offset == 16


def test_a_repeat_is_answered_with_the_originals_time() -> None:
    """Item 5, where the log stamps."""
    log = Log()
    log.append(header_of(0), timestamp=4_711)
    assert log.append(header_of(0), timestamp=9_999) == Repeat(0, 0, 4_711)


def test_a_repeat_can_be_acknowledged_only_with_its_original(
    open_store: Callable[..., Running],
) -> None:
    """Item 6: the repeat names the original's last offset, which the high watermark must pass."""
    running = open_store()
    partition = running.create()
    batch = batch_of(3, pid=9, sequence=0)
    first = running.append(partition, batch)
    again = running.append(partition, batch)
    assert isinstance(first, Appended)
    assert again == Repeat(0, 2, 1_002)
    assert partition.high_watermark == 0
    running.settle()
    assert partition.high_watermark == 3


def test_a_retry_older_than_the_window_or_overlapping_is_out_of_order() -> None:
    """Item 7."""
    log = Log()
    for i in range(8):
        log.append(header_of(i * 2, 2))
    out_of_order = ErrorCode.out_of_order_sequence_number
    assert log.append(header_of(4, 2)) == out_of_order
    assert log.append(header_of(13, 2)) == out_of_order
    assert log.append(header_of(14, 1)) == out_of_order
    assert log.append(header_of(14, 4)) == out_of_order


def test_the_next_sequence_follows_the_last_and_wraps_to_0() -> None:
    """Item 8."""
    log = Log()
    log.append(header_of(SEQUENCES - 3, 2))
    assert log.append(header_of(SEQUENCES - 1, 3)) == 2  # the batch itself wraps
    assert log.append(header_of(2)) == 5
    assert log.append(header_of(SEQUENCES - 1, 3)) == Repeat(2, 4, 0)
    wrapped = Log()
    wrapped.append(header_of(SEQUENCES - 2, 2))
    assert wrapped.append(header_of(0)) == 2


def test_a_higher_epoch_starts_at_0_with_an_empty_window() -> None:
    """Item 9."""
    log = Log()
    log.append(header_of(0))
    assert log.append(header_of(1, epoch=1)) == ErrorCode.out_of_order_sequence_number
    assert log.append(header_of(0, epoch=1)) == 1
    assert log.append(header_of(0, epoch=1)) == Repeat(1, 1, 0)
    assert len(log.producers.records()[0].kept) == 1


def test_a_lower_epoch_is_invalid() -> None:
    """Item 10: 47, not 90, even for what would be a repeat."""
    log = Log()
    log.append(header_of(0))
    log.append(header_of(0, epoch=1))
    assert log.append(header_of(0)) == ErrorCode.invalid_producer_epoch


def test_an_unknown_producer_may_start_anywhere() -> None:
    """Item 11."""
    log = Log()
    assert log.append(header_of(4_711)) == 0
    assert log.append(header_of(4_712)) == 1


def test_after_a_marker_with_a_new_epoch_data_starts_at_0() -> None:
    """Item 12, and a control batch is no data."""
    log = Log()
    log.append(header_of(0))
    marker = header_of(-1, epoch=1, attributes=CONTROL | TRANSACTIONAL)
    log.producers.replay(marker, 1, 0)
    log.next_offset = 2
    assert log.append(header_of(1)) == ErrorCode.invalid_producer_epoch
    assert log.append(header_of(1, epoch=1)) == ErrorCode.out_of_order_sequence_number
    assert log.append(header_of(0, epoch=1)) == 2


def test_idempotent_batches_do_not_hold_the_last_stable_offset(
    open_store: Callable[..., Running],
) -> None:
    """Item 14."""
    running = open_store()
    partition = running.create()
    running.write(partition, 1, pid=9, sequence=0)
    assert partition.last_stable_offset == partition.high_watermark == 3


def test_what_follows_a_failed_batch_is_refused_until_it_is_retried() -> None:
    """Item 15."""
    log = Log()
    log.append(header_of(0))
    for sequence in (2, 3, 4, 5):
        assert log.append(header_of(sequence)) == ErrorCode.out_of_order_sequence_number
    assert log.next_offset == 1
    assert [log.append(header_of(s)) for s in (1, 2, 3, 4, 5)] == [1, 2, 3, 4, 5]


def test_a_refused_batch_leaves_no_trace_and_no_gap(open_store: Callable[..., Running]) -> None:
    """Item 16."""
    running = open_store()
    partition = running.create()
    running.append(partition, count=2, pid=9, sequence=0)
    before = partition.producers.records()
    assert isinstance(running.append(partition, pid=9, sequence=7), Refused)
    assert partition.producers.records() == before
    assert running.append(partition, count=1, pid=9, sequence=2) == Appended(2, 2, -1)


def test_replay_takes_whatever_the_log_says() -> None:
    """Item 17: a lower epoch or a jump in a log that is read is history, not an error."""
    producers = Producers()
    producers.replay(header_of(0, epoch=5), 0, 0)
    producers.replay(header_of(100, epoch=3), 1, 0)
    producers.replay(header_of(7, epoch=3), 2, 0)
    (record,) = producers.records()
    assert record.producer_epoch == 3
    assert [kept.first_sequence for kept in record.kept] == [100, 7]


@pytest.mark.parametrize("clean", [True, False])
def test_all_five_batches_are_known_after_a_restart(
    open_store: Callable[..., Running], clean: bool
) -> None:
    """Item 18: where Kafka keeps the last one only."""
    running = open_store()
    partition = running.create()
    for sequence in range(0, 60, 3):
        running.append(partition, pid=9, sequence=sequence)
    running.settle()
    state = partition.producers.records()
    running.close() if clean else running.abandon()
    partition = open_store().partition()
    assert partition.producers.records() == state
    for sequence in range(45, 60, 3):
        assert running.append(partition, pid=9, sequence=sequence) == Repeat(
            sequence, sequence + 2, 1_002
        )


def test_a_producer_expires_when_idle_by_the_local_clock() -> None:
    """Item 20: its batches' own times may lie years back, as in a replayed history."""
    log = Log()
    log.append(header_of(0), timestamp=1)
    day = LIMITS.producer_id_expiry_ms
    assert log.producers.expire(NOW) == 0
    assert log.producers.expire(NOW + day - 1) == 0
    log.append(header_of(1), timestamp=2)
    assert log.producers.expire(NOW + day) == 0
    assert log.producers.expire(NOW + 2 * day - 1) == 0
    assert log.producers.expire(NOW + 2 * day) == 1
    assert log.append(header_of(99)) == 2  # item 11


def test_a_marker_counts_as_life() -> None:
    """Item 20."""
    log = Log()
    log.append(header_of(0))
    log.producers.expire(NOW)
    log.producers.replay(header_of(-1, attributes=CONTROL | TRANSACTIONAL), 1, 0)
    assert log.producers.expire(NOW + LIMITS.producer_id_expiry_ms) == 0


def test_moving_the_log_start_keeps_producers(open_store: Callable[..., Running]) -> None:
    """Item 21."""
    running = open_store()
    partition = running.create()
    running.write(partition, 1, pid=9, sequence=0)
    assert running.trim(partition, 3)
    assert running.append(partition, pid=9, sequence=0) == Repeat(0, 2, 1_002)


def test_dedup_does_not_ask_how_the_batch_is_acknowledged(
    open_store: Callable[..., Running],
) -> None:
    """Item 22: acks is the broker's; the log has one way in, and it deduplicates."""
    running = open_store()
    partition = running.create()
    batch = batch_of(1, pid=9, sequence=0)
    running.append(partition, batch)
    assert isinstance(running.append(partition, batch), Repeat)
    assert partition.next_offset == 1


class ProducersEqualTheirModel(RuleBasedStateMachine):
    """Whatever is sent, lost, repeated or crashed: the log holds each sequence once, in order.

    The model is the list of all batches that a producer's epoch has in the log.
    """

    @initialize(first=st.sampled_from([0, SEQUENCES - 7]))
    def start(self, first: int) -> None:
        self.log = Log()
        self.entries: list[tuple[Header, int]] = []  # what the log holds
        self.model: dict[int, tuple[int, list[tuple[int, int, int]]]] = {}
        self.first = first

    @rule(
        pid=st.integers(1, 2),
        epoch=st.sampled_from([0, 0, 0, 1, 2]),
        step=st.integers(-9, 3),
        count=st.integers(1, 4),
    )
    def send(self, pid: int, epoch: int, step: int, count: int) -> None:
        known, batches = self.model.get(pid, (-1, []))
        base = self.first if not batches else (batches[-1][0] + batches[-1][1])
        sequence = (base + step) % SEQUENCES if epoch == known else max(step, 0)
        header = header_of(sequence, count, pid=pid, epoch=epoch)
        wanted = self._expected(pid, epoch, sequence, count)
        offset = self.log.next_offset
        answer = self.log.append(header, timestamp=offset)
        assert answer == (offset if wanted is None else wanted)
        if wanted is None:
            self.entries.append((header, offset))
            history = batches if epoch == known else []
            self.model[pid] = epoch, [*history, (sequence, count, offset)]

    def _expected(self, pid: int, epoch: int, sequence: int, count: int) -> Any:
        if pid not in self.model:
            return None
        known, batches = self.model[pid]
        if epoch < known:
            return ErrorCode.invalid_producer_epoch
        if epoch > known:
            return None if sequence == 0 else ErrorCode.out_of_order_sequence_number
        for first, size, offset in batches[-5:]:
            if (first, size) == (sequence, count):
                return Repeat(offset, offset + size - 1, offset)
        following = (batches[-1][0] + batches[-1][1]) % SEQUENCES
        return None if sequence == following else ErrorCode.out_of_order_sequence_number

    @rule(at=st.integers(0, 50))
    def crash(self, at: int) -> None:
        """A snapshot somewhere, then the log from there on."""
        at = min(at, len(self.entries))
        before = Producers()
        for header, offset in self.entries[:at]:
            before.replay(header, offset, offset)
        after = Producers(before.records())
        for header, offset in self.entries[at:]:
            after.replay(header, offset, offset)
        self.log = Log(after, self.log.next_offset)

    @invariant()
    def live_state_is_replayed_state(self) -> None:
        replayed = Producers()
        for header, offset in self.entries:
            replayed.replay(header, offset, offset)
        assert sorted(replayed.records()) == sorted(self.log.producers.records())


TestProducersEqualTheirModel = ProducersEqualTheirModel.TestCase
TestProducersEqualTheirModel.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)


@pytest.mark.torture
@pytest.mark.timeout(3_600)
def test_five_thousand_histories() -> None:
    run_state_machine_as_test(
        ProducersEqualTheirModel,
        settings=settings(
            max_examples=5_000, stateful_step_count=40, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def _sealed(batch: bytes, at: int, content: bytes) -> bytes:
    """The batch with some bytes changed and its CRC made right."""
    from crc32c import crc32c

    changed = batch[:at] + content + batch[at + len(content) :]
    return changed[:17] + crc32c(changed[21:]).to_bytes(4, "big") + changed[21:]
