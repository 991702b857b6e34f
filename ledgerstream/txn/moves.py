"""Which state may follow which. The table is Apache Kafka's, as of Transactions V2."""

from __future__ import annotations

from ledgerstream.txn.records import TxnState

EMPTY, ONGOING = TxnState.EMPTY, TxnState.ONGOING
PREPARE_COMMIT, PREPARE_ABORT = TxnState.PREPARE_COMMIT, TxnState.PREPARE_ABORT
COMPLETE_COMMIT, COMPLETE_ABORT = TxnState.COMPLETE_COMMIT, TxnState.COMPLETE_ABORT

AT_REST = frozenset({EMPTY, COMPLETE_COMMIT, COMPLETE_ABORT})

# (before, after); None: the id is not known
MOVES = frozenset({
    (None, EMPTY),  # InitProducerId
    *((state, EMPTY) for state in AT_REST),
    *((state, ONGOING) for state in (*AT_REST, ONGOING)),  # a partition is added; or, while it is
    # ONGOING, somebody who means to complete it has come (KIP-939)
    (ONGOING, PREPARE_COMMIT),
    *((state, PREPARE_ABORT) for state in (*AT_REST, ONGOING)),  # V2 aborts without data, too
    (PREPARE_COMMIT, COMPLETE_COMMIT),
    (PREPARE_ABORT, COMPLETE_ABORT),
    *((state, None) for state in AT_REST),  # expired
})  # fmt: skip
