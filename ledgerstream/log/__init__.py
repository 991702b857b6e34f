"""The log: partitions as files, written in rounds, durable before anyone is told.

The loop decides (`partition`, `producers`: where a batch goes, whether it is a repeat), the disk
thread (`writer`) makes it durable, a second thread (`background`) syncs lazily behind it. The loop
never opens or syncs a file, and only `disk` knows the operating system's calls. Nothing here knows
of sockets, asyncio or the wall clock: `now_ms` is an argument, `Store.tick` the passing of time.

Where a log begins, and which files go: `retention` decides, `trims` carries it out. Compaction:
`cleanable` (where), `compaction` (what stays), `cleaner` (a thread that rewrites), `swap` (the
exchange of files), `cleanings` (who is next).

Read `verdicts`, `config`, `producers`, `tail`, `partition`; then `segment` and `index` (Kafka's
file formats); then `store`, `writer`, `journal`, `background`; then `loading` and `recovery` with
the small files that they go by: `markers`, `snapshots`, `epochs`, `sealed`. `validate` is what a
client's batch has to pass before it gets here.
"""

from ledgerstream.log.config import LogConfig, PartitionKey
from ledgerstream.log.partition import Partition, Read
from ledgerstream.log.store import Store
from ledgerstream.log.validate import check_client_batch, check_request
from ledgerstream.log.verdicts import Appended, Guard, Refused, Repeat

__all__ = [
    "Appended",
    "Guard",
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
