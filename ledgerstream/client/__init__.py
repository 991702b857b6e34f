"""A Kafka client on asyncio: columnar where it matters, and never waiting for ever.

`connection.py` one broker; `cluster.py` metadata, connections and retries; then, on it,
`producer.py` (idempotent; `lane.py` keeps a partition's order, `sender.py` sends),
`transactional.py` (`transaction.py` says what may be done next, `coordinator.py` finds who decides)
and `reader.py` (by assignment). `Client` has it all, with columns and administration. It speaks to
a LedgerStream broker and to Apache Kafka alike.
"""

from ledgerstream.client.client import EARLIEST, LATEST, Client, TopicInfo
from ledgerstream.client.groupoffsets import GroupMetadata
from ledgerstream.client.producer import Producer
from ledgerstream.client.reader import Chunk, Reader
from ledgerstream.client.transaction import Fenced, Identity, TransactionError
from ledgerstream.client.transactional import TransactionalProducer

__all__ = [
    "EARLIEST", "LATEST", "Chunk", "Client", "Fenced", "GroupMetadata", "Identity", "Producer",
    "Reader", "TopicInfo", "TransactionError", "TransactionalProducer",
]  # fmt: skip
