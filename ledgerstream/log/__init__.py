"""The log: partitions as files, written in rounds, durable before anyone is told.

The loop decides (`partition`, `producers`: where a batch goes, whether it is a repeat), one disk
thread writes and syncs (`store`, `journal`), a second one syncs lazily behind it. The loop never
opens or syncs a file, and only `disk` knows the operating system's calls. Nothing here knows of
sockets, asyncio or the wall clock: `now_ms` comes in as an argument.

Read `verdicts`, `config`, `producers`, `partition`; then `segment` and `index` (Kafka's file
formats), `store` (the write round) and `journal`; then `recovery`. `validate` is what a client's
batch has to pass before it gets here.
"""

from ledgerstream.log.config import LogConfig, PartitionKey
from ledgerstream.log.partition import Partition, Read
from ledgerstream.log.store import Store
from ledgerstream.log.validate import check_client_batch, check_request
from ledgerstream.log.verdicts import Appended, Refused, Repeat

__all__ = [
    "Appended",
    "LogConfig",
    "Partition",
    "PartitionKey",
    "Read",
    "Refused",
    "Repeat",
    "Store",
    "check_client_batch",
    "check_request",
]
