"""The transaction coordinator (KIP-98, 360, 890, 939). Pure.

Who may write under a transactional id, which partitions a transaction touches, and how it ends.

A record is the whole state of one transactional id, in Kafka's own format, so a restart is the last
record of each. Read `records` (states, the record, its bytes), `moves` (which state may follow
which), then `coordinator` (the decisions). It writes no markers and knows no partitions: what is to
be done when a decision is durable, `broker/txns.py` does.
"""

from ledgerstream.txn.coordinator import Coordinator, Ended, Initialized
from ledgerstream.txn.records import Forgotten, Txn, TxnCodec, TxnRecord, TxnState

__all__ = [
    "Coordinator", "Ended", "Forgotten", "Initialized", "Txn", "TxnCodec", "TxnRecord", "TxnState",
]  # fmt: skip
