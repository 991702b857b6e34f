"""A Kafka client on asyncio: columnar where it matters, and never waiting for ever.

`security.py` how a broker is known and who we are, `access.py` and `sasl.py` how that is said;
`connection.py` one broker; `cluster.py` metadata, connections and retries; then, on it,
`producer.py` (idempotent; `lane.py` keeps a partition's order, `sender.py` sends),
`transactional.py` (`transaction.py` says what may be done next, `coordinator.py` finds who
decides), `reader.py` (by assignment) and `membership.py` of groups (`member.py` and
`classicmember.py` say what comes next, `grouptalk.py` speaks), on which `groupreader.py` is a plain
consumer. `Client` has it all, with columns and administration. It speaks to a LedgerStream broker
and to Apache Kafka alike.
"""

from ledgerstream.client.client import Client, TopicInfo
from ledgerstream.client.groupoffsets import GroupMetadata
from ledgerstream.client.groupreader import GroupReader
from ledgerstream.client.membership import Group, Listener, NotAssigned
from ledgerstream.client.offsets import EARLIEST, LATEST
from ledgerstream.client.producer import Producer
from ledgerstream.client.reader import Chunk, Reader
from ledgerstream.client.security import Security
from ledgerstream.client.transaction import Fenced, Identity, TransactionError
from ledgerstream.client.transactional import TransactionalProducer

__all__ = [
    "EARLIEST", "LATEST", "Chunk", "Client", "Fenced", "Group", "GroupMetadata", "GroupReader",
    "Identity", "Listener", "NotAssigned", "Producer", "Reader", "Security", "TopicInfo",
    "TransactionError", "TransactionalProducer",
]  # fmt: skip
