"""Prometheus metrics and /healthz, read from the node when they are asked for.

Served by a thread of its own: it only looks, and what it reads are single numbers.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from ledgerstream.broker.node import Node


class NodeCollector:
    """The node's numbers at the moment of the scrape."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def collect(self) -> Iterator[Metric]:
        node, server, trims = self.node, self.node.server, self.node.store.trims
        requests = CounterMetricFamily(
            "ledgerstream_requests", "Requests received, by API", labels=["api"]
        )
        for api, count in node.dispatch.requests.items():
            requests.add_metric([api.name.lower()], count)
        yield requests
        yield CounterMetricFamily(
            "ledgerstream_connections_closed_for_cause",
            "Connections closed because their peer broke a rule",
            server.closed_for_cause,
        )
        for name, text, value in (
            ("connections", "Open connections", len(server.connections)),
            ("held_request_bytes", "Requests not answered yet", server.held_bytes),
            ("unsent_reply_bytes", "Replies not taken by their peers yet", server.unsent_bytes),
            ("parked_fetches", "Fetches that wait for data", len(node.parked)),
            ("fetch_sessions", "Fetch sessions", len(node.sessions)),
            ("topics", "Topics", len(node.catalog.topics)),
            ("partitions", "Partitions", len(node.replicas)),
        ):
            yield GaugeMetricFamily(f"ledgerstream_{name}", text, value)
        for name, stat in vars_of(node.store.stats).items():
            yield GaugeMetricFamily(f"ledgerstream_log_{name}", "The write rounds", stat)
        failed = GaugeMetricFamily(
            "ledgerstream_partition_failed",
            "1 for each partition that stopped or could not be read",
            labels=["partition"],
        )
        for partition in failures(node):
            failed.add_metric([partition], 1)
        yield failed
        yield from transactions(node)
        yield from compaction(node)
        for name, text, count in (
            ("segments", "Segments that retention and DeleteRecords removed", trims.segments),
            ("bytes", "Their bytes", trims.bytes),
        ):
            yield CounterMetricFamily(f"ledgerstream_log_removed_{name}", text, count)
        ends = GaugeMetricFamily(
            "ledgerstream_partition_high_watermark",
            "Offset up to which a partition is durable",
            labels=["topic", "partition"],
        )
        for replica in list(node.replicas):
            key = replica.partition.key
            ends.add_metric([key.topic, str(key.index)], replica.partition.high_watermark)
        yield ends


def compaction(node: Node) -> Iterator[Metric]:
    """What the cleaner did, and how much waits for it."""
    cleanings = node.store.cleanings
    for name, value in vars_of(cleanings.cleaner.stats).items():
        yield CounterMetricFamily(f"ledgerstream_cleaner_{name}", "Compaction, since start", value)
    yield GaugeMetricFamily(
        "ledgerstream_cleaner_dirty_ratio_max",
        "Of the bytes that may be compacted, those that never were: the dirtiest partition's",
        cleanings.dirtiest,
    )
    uncleanable = list(cleanings.uncleanable)
    for name, text, value in (
        ("partitions", "Partitions with damage, not compacted any more: the log says where, and "
         "what to do", len(uncleanable)),
        ("bytes", "Their bytes", sum(partition.size_bytes for partition in uncleanable)),
    ):  # fmt: skip
        yield GaugeMetricFamily(f"ledgerstream_cleaner_uncleanable_{name}", text, value)


def transactions(node: Node) -> Iterator[Metric]:
    """What the coordinators hold, how long they took to load, and what nobody seems to end."""
    counts = GaugeMetricFamily(
        "ledgerstream_transactions", "Transactional ids, by state", labels=["state"]
    )
    found = Counter(
        txn.state.label
        for shard in list(node.transactions.shards)
        if shard.ready
        for txn in list(shard.machine.txns.values())
    )
    for state, count in found.items():
        counts.add_metric([state], count)
    yield counts
    yield GaugeMetricFamily(
        "ledgerstream_coordinator_load_seconds_max",
        "The longest load of a coordinator's partition (KIP-484)",
        max(
            (shard.load_ms for each in list(node.coordinators.values()) for shard in list(each)),
            default=0.0,
        )
        / 1000,
    )
    late = GaugeMetricFamily(
        "ledgerstream_partition_late_transactions",
        "Transactions open for longer than any timeout allows: prepared and waiting for their "
        "decision, or left by nobody knows whom",
        labels=["topic", "partition"],
    )
    for key, count in node.transactions.late.items():
        late.add_metric([key.topic, str(key.index)], count)
    yield late


def vars_of(stats: Any) -> dict[str, float]:
    """The numbers of a stats object, slots or not."""
    names = getattr(type(stats), "__slots__", None) or vars(stats)
    found = {name: getattr(stats, name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def failures(node: Node) -> dict[str, str]:
    """Partition → why it stopped or could not be read."""
    stopped = {
        str(replica.partition.key): replica.partition.failure
        for replica in list(node.replicas)
        if replica.partition.failure is not None
    }
    return {**node.read_failures, **stopped}


class MetricsServer:
    """/metrics and /healthz on their own port."""

    def __init__(self, node: Node, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(NodeCollector(node))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        metrics: Any = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            if environ.get("PATH_INFO") != "/healthz":
                return list(metrics(environ, start))
            broken = failures(node)
            well = not broken and not node.stopping
            status = "200 OK" if well else "503 Service Unavailable"
            start(status, [("Content-Type", "application/json")])
            state = "ok" if well else "stopping" if node.stopping else "degraded"
            return [json.dumps({"status": state, "failed": broken}).encode()]

        self._server: WSGIServer = make_server(host, port, app, handler_class=_Quiet)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line each."""
