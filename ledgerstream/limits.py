"""Every limit, timeout and size of LedgerStream, named once.

A setting that users may change is a field of `broker.settings.Settings` or an argument, and takes
its default from here; everything else is changed here. Units stand last in each name.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


@dataclass(frozen=True, slots=True)
class Limits:
    """One frozen set of limits; relations between them are asserted when it is made."""

    # wire
    frame_bytes_max: int = 100 * MIB  # Kafka's socket.request.max.bytes
    batch_bytes_max: int = 1 * MIB + 12  # Kafka's message.max.bytes, with the log overhead
    batch_inflated_bytes_max: int = 256 * MIB  # a compressed batch may grow to this and no further
    array_entries_max: int = 1_000_000  # entries of any one array in a request

    # broker
    connections_max: int = 10_000  # further ones are closed at once
    connection_bytes_max: int = (
        128 * MIB
    )  # requests read and not yet answered, and replies not yet sent
    requests_bytes_max: int = 512 * MIB  # the same over all connections
    connection_requests_max: int = 64  # requests of one connection under way
    connection_idle_ms: int = 600_000  # Kafka's connections.max.idle.ms
    frame_started_ms_max: int = 60_000  # a frame once begun must be whole within this
    connection_stalled_ms: int = 60_000  # a peer that takes nothing of its replies for so long
    tick_ms: int = 1_000  # how often connections and waiting requests are looked at
    fetch_bytes_max: int = 55 * MIB  # Kafka's fetch.max.bytes on the broker
    fetch_wait_ms_max: int = 60_000  # a long poll waits no longer, whatever it asks for
    fetch_bytes_low: int = 64 * KIB  # what a fetch may take even while replies fill the memory
    replies_bytes_max: int = 512 * MIB  # replies that peers have not taken yet, all together
    cold_read_threads: int = 2  # read what is no longer in memory
    topic_partitions_max: int = 10_000  # of one topic
    coordinator_partitions: int = 50  # of each internal topic; never changed: keys hash to them
    coordinator_segment_bytes: int = (
        24 * MIB  # Kafka's is 100; what is not compacted yet is read at every start
    )
    transaction_timeout_ms_max: int = 900_000  # Kafka's transaction.max.timeout.ms
    transaction_timeout_check_ms: int = 1_000  # how often open transactions are looked at
    transaction_hold_ms: int = (
        50  # a request waits so long for the markers of the transaction before it
    )
    transaction_late_ms: int = (
        300_000  # open longer than any timeout by so much: no coordinator knows of it
    )
    transactional_id_expiry_ms: int = 604_800_000  # Kafka's transactional.id.expiration.ms
    transactional_id_expiry_check_ms: int = 3_600_000  # how often unused ids are looked for
    marker_retry_ms: int = 100  # a partition that could not take a marker is tried again
    coordinator_load_wait_ms: int = 2_000  # a request waits so long for its coordinator to load
    group_session_ms_min: int = 6_000  # Kafka's group.min.session.timeout.ms
    group_session_ms_max: int = 1_800_000  # Kafka's group.max.session.timeout.ms
    group_delay_ms: int = 3_000  # Kafka's group.initial.rebalance.delay.ms
    group_new_member_ms: int = 300_000  # a member that joins anew, and may be gone, is kept so long
    group_members_max: int = 10_000  # of one group, and ids given to those that are about to join
    group_client_id_bytes_max: int = 255  # of a member's client's name, what is kept
    consumer_session_ms: int = 45_000  # Kafka's group.consumer.session.timeout.ms
    consumer_session_ms_min: int = 6_000  # a group may be set to; Kafka's 45 s serve nobody
    consumer_session_ms_max: int = 60_000  # Kafka's group.consumer.max.session.timeout.ms
    consumer_heartbeat_ms: int = 5_000  # Kafka's group.consumer.heartbeat.interval.ms: if large
    consumer_heartbeat_ms_max: int = 15_000  # Kafka's group.consumer.max.heartbeat.interval.ms
    consumer_heartbeat_ms_min: int = 500  # of a small group; each member adds 5 ms
    consumer_hurry_ms: int = 100  # of a member that is on its way to what it is to have
    group_metadata_bytes_max: int = 16 * MIB  # subscriptions and assignments of one group
    offset_metadata_chars_max: int = 4_096  # Kafka's offset.metadata.max.bytes, which counts chars
    offsets_kept_hours: int = 168  # Kafka's offsets.retention.minutes, 10,080
    offsets_expiry_check_ms: int = 600_000  # Kafka's offsets.retention.check.interval.ms
    fetch_sessions_max: int = 1_000  # Kafka's max.incremental.fetch.session.cache.slots
    shutdown_ms_max: int = 30_000  # a clean stop takes no longer

    # log
    segment_bytes: int = 1 * GIB  # Kafka's segment.bytes
    segment_ms: int = 7 * 24 * 3_600_000  # Kafka's segment.ms
    index_interval_bytes: int = 4 * KIB  # Kafka's index.interval.bytes
    segment_index_bytes: int = 10 * MIB  # Kafka's segment.index.bytes
    round_bytes_max: int = 64 * MIB  # what one write round takes at the most
    round_direct_files_max: int = (
        8  # up to so many dirty files each is synced; beyond, the journal is
    )
    round_journal_bytes: int = (
        256 * KIB  # a round with no more than this goes to the journal: one sync, of few bytes
    )
    hand_over_batches: int = (
        64  # of one turn of the loop; so many start the disk thread while the loop goes on
    )
    journal_bytes: int = 64 * MIB  # each of the two journal files
    tail_cache_bytes: int = (
        64 * MIB
    )  # newest batches kept in memory for readers at the end, all partitions
    producer_batches_kept: int = 5  # KIP-98: what a producer may have in flight
    producer_id_expiry_ms: int = 86_400_000  # Kafka's producer.id.expiration.ms
    producer_id_expiry_check_ms: int = 600_000  # how often expired producers are looked for
    producer_id_block: int = 1_000  # ids that are reserved on disk at a time
    open_files_max: int = 4_000  # of the log; those not used for longest are closed
    storage_retry_ms: int = 5_000  # a partition stopped by a full disk is tried again after this
    retention_check_ms: int = 300_000  # Kafka's log.retention.check.interval.ms
    file_delete_delay_ms: int = (
        60_000  # Kafka's file.delete.delay.ms: what has left the log stays readable for so long
    )
    cleaner_check_ms: int = 15_000  # Kafka's log.cleaner.backoff.ms
    cleaner_bytes_s: int = 16 * MIB  # what compaction reads, both of its passes together
    cleaner_keys_max: int = 1_000_000  # different keys of one compaction, about 150 bytes each
    checkpoint_ms: int = 5_000  # how often it is noted how far segments are synced
    checkpoint_bytes: int = (
        8 * MIB
    )  # of a partition, between checkpoints: what a crash makes us scan

    # client
    request_ms_max: int = 30_000  # Kafka's request.timeout.ms
    connect_ms_max: int = 10_000  # for a connection, its handshake included
    delivery_ms_max: int = 120_000  # Kafka's delivery.timeout.ms
    retry_first_ms: int = 20  # before the second try; then twice as long each time, with jitter
    retry_ms_max: int = 1_000  # between two tries
    topic_created_ms_max: int = 3_000  # by a broker that creates topics when they are asked for
    metadata_age_ms_max: int = 300_000  # Kafka's metadata.max.age.ms
    transaction_timeout_ms: int = 60_000  # Kafka's transaction.timeout.ms
    member_session_ms: int = 45_000  # Kafka's session.timeout.ms
    member_heartbeat_ms: int = 3_000  # Kafka's heartbeat.interval.ms, of classic groups
    member_rebalance_ms: int = 300_000  # to let go of partitions; Kafka's max.poll.interval.ms
    member_leave_ms_max: int = 5_000  # a goodbye that is not heard: the session's end says it
    producer_batch_bytes: int = 1 * MIB  # Kafka's batch.size
    producer_inflight_max: int = 5  # Kafka's max.in.flight.requests.per.connection
    producer_buffer_bytes: int = 64 * MIB  # records that wait; then `send` waits too
    linger_ms: int = 5  # Kafka's linger.ms
    reader_partition_bytes: int = 4 * MIB  # of one partition in one fetch
    reader_fetch_bytes: int = 32 * MIB  # of one fetch; a group reader's topics share it
    reader_fetch_bytes_low: int = 64 * KIB  # of one fetch, however many topics share
    reader_wait_ms: int = 500  # a fetch waits so long at the log's end

    # stream
    step_rows_max: int = 250_000  # of several chunks; one that brings more is cut
    step_bytes_max: int = 32 * MIB  # of rows that one step copies
    compute_ms_max: int = 120_000  # for the events of one chunk: what takes longer never ends
    state_keys_per_event_max: int = 4  # new rows a state table makes room for, an event of a batch
    window_slots_max: int = 1_000_000  # windows of one key and length that may be live at once
    window_values: int = 100_000  # of a column that keeps them, in one window, unless it says so
    window_values_max: int = 10_000_000  # what it may say: some 800 MB
    window_top_max: int = 100  # places of one TopK
    replay_ms_target: int = (
        2_000  # a snapshot is due when replaying since the last would take longer
    )
    snapshot_share_max: float = 0.1  # of the time, all snapshots together
    snapshot_page_bytes_max: int = 1_984  # four rows of ls_snapshot_pages to a block of Postgres
    snapshot_txn_bytes: int = 4 * MIB  # of pages, in one transaction
    snapshot_drop_pages: int = 10_000  # in one statement
    audit_rows_kept: int = 1_000  # newest ls_steps rows kept a partition; older ones are merged
    postgres_connect_ms_max: int = 30_000  # for a connection
    postgres_wait_ms_max: int = 10_000  # at the start of a run, for a server that is not there
    postgres_command_ms_max: int = 120_000  # for one statement, on both sides
    postgres_lock_ms_max: int = 30_000  # a claim waits so long for a backend that still commits
    postgres_idle_ms_max: int = 30_000  # in a transaction whose client is gone
    copy_chunk_bytes: int = 512 * KIB  # of one message of a COPY
    worker_deaths_max: int = 10  # in a row, each without a commit, before a worker is given up
    witness_wait_ms: int = 5_000  # for what is open in the witness's way; then it is aborted
    witness_age_ms_max: int = 43_200_000  # it is written anew: a log forgets it after a week
    claim_look_ms: int = 1_000  # between two looks whether another worker has our claims
    watch_ms: int = 1_000  # what a worker sees is written down at most so often
    audit_merge_steps: int = 256  # the audit is merged every so many steps
    postgres_start_ms_max: int = 60_000  # an embedded server recovers from a crash first
    postgres_stop_ms_max: int = 30_000  # an embedded server stops within this, or is killed
    postgres_retry_first_ms: int = 50  # before a step is tried again; then twice as long each time
    postgres_retry_ms_max: int = 5_000  # between two tries
    dead_letter_bytes_max: int = 1 * MIB  # of a payload kept in ls_dead_letters

    def __post_init__(self) -> None:
        assert self.batch_bytes_max < self.frame_bytes_max <= self.connection_bytes_max
        assert self.connection_bytes_max <= self.requests_bytes_max
        assert self.producer_inflight_max <= self.producer_batches_kept
        assert self.transaction_timeout_ms <= self.transaction_timeout_ms_max
        assert self.producer_batch_bytes <= self.batch_bytes_max
        assert self.request_ms_max <= self.delivery_ms_max
        assert 0 < self.group_session_ms_min <= self.group_session_ms_max
        assert self.consumer_hurry_ms <= self.consumer_heartbeat_ms_min
        assert self.consumer_heartbeat_ms_min < self.consumer_heartbeat_ms
        assert self.consumer_heartbeat_ms * 3 <= self.consumer_session_ms
        assert self.consumer_heartbeat_ms < self.consumer_session_ms_min
        assert self.consumer_session_ms_min <= self.consumer_session_ms
        assert self.consumer_session_ms <= self.consumer_session_ms_max
        assert self.consumer_heartbeat_ms <= self.consumer_heartbeat_ms_max
        assert self.member_heartbeat_ms * 3 <= self.member_session_ms <= self.member_rebalance_ms
        assert self.group_metadata_bytes_max < self.coordinator_segment_bytes
        assert self.retry_first_ms <= self.retry_ms_max < self.delivery_ms_max
        assert self.round_journal_bytes <= self.round_bytes_max <= self.journal_bytes
        assert self.index_interval_bytes < self.segment_bytes < 2**31
        assert self.reader_partition_bytes >= self.batch_bytes_max
        assert self.reader_fetch_bytes_low <= self.reader_fetch_bytes
        assert 0 < self.window_values <= self.window_values_max
        assert 0 < self.snapshot_share_max < 1


LIMITS = Limits()
