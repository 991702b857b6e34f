"""A Kafka client on asyncio: columnar where it matters, and never waiting for ever.

`connection.py` one broker; `cluster.py` metadata, connections and retries; then, on it,
`producer.py` (idempotent; `lane.py` keeps a partition's order, `sender.py` sends) and `reader.py`
(by assignment). `Client` has it all, with columns and administration. It speaks to a LedgerStream
broker and to Apache Kafka alike.
"""

from ledgerstream.client.client import EARLIEST, LATEST, Client, TopicInfo
from ledgerstream.client.producer import Producer
from ledgerstream.client.reader import Chunk, Reader

__all__ = ["EARLIEST", "LATEST", "Chunk", "Client", "Producer", "Reader", "TopicInfo"]
