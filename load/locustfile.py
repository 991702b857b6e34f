"""Card payments at a set rate, as locust users, through LedgerStream's client.

    locust -f load/locustfile.py --host 127.0.0.1:9092 --headless -u 10 -t 1m

Each user sends `LEDGERSTREAM_RATE` payments a second (100 by default) to `LEDGERSTREAM_TOPIC`
(payments). A payment has an intended time; its latency counts from there until it is durable, also
where the sender was late for it: a broker that hangs for a second shows in every payment that was
due in that second (no coordinated omission).

locust runs on gevent, which takes the place of threads and sockets. So the client has a native
thread with a uvloop of its own; payments go over to it, and results come back in a queue.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Any

import gevent
import uvloop
from gevent.threadpool import ThreadPool
from locust import User, events, task

from ledgerstream.client import Client
from ledgerstream.errors import KafkaError, LedgerStreamError
from processors.payments import Payment, Simulation

RATE = float(os.environ.get("LEDGERSTREAM_RATE", "100"))
TOPIC = os.environ.get("LEDGERSTREAM_TOPIC", "payments")
DRAIN_S = 0.05  # between two looks at what has come back
LAST_S_MAX = 30.0  # for what is under way when the test ends
EXISTS = "TOPIC_ALREADY_EXISTS"


class Sender:
    """The client in its native thread. `results`: (latency in s, bytes, error or None)."""

    def __init__(self, servers: str) -> None:
        self.results: deque[tuple[float, int, Exception | None]] = deque()
        self.sent = self.answered = 0
        self._loop = uvloop.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        pool = ThreadPool(1)
        pool.spawn(self._loop.run_forever)
        self._call(self._open(servers))

    def send(self, key: bytes, value: bytes, intended: float) -> None:
        """Send now what was due at `intended` (time.perf_counter)."""
        self.sent += 1
        self._loop.call_soon_threadsafe(self._start, key, value, intended)

    def close(self) -> None:
        """Wait for what is under way, then end the client and its thread."""
        deadline = time.monotonic() + LAST_S_MAX
        while self.answered < self.sent and time.monotonic() < deadline:
            gevent.sleep(DRAIN_S)
            self.report()
        self._call(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def report(self) -> None:
        """Tell locust what has come back."""
        while self.results:
            latency, size, error = self.results.popleft()
            self.answered += 1
            events.request.fire(
                request_type="produce", name=TOPIC, response_time=latency * 1_000,
                response_length=size, exception=error, context={},
            )  # fmt: skip

    async def _open(self, servers: str) -> None:
        self._client = await Client.connect(servers)
        try:
            await self._client.create_topic(TOPIC)
        except KafkaError as error:
            if error.name != EXISTS:
                raise
        self._producer = await self._client.producer()

    def _start(self, key: bytes, value: bytes, intended: float) -> None:
        sending = self._loop.create_task(self._send(key, value, intended))
        self._tasks.add(sending)
        sending.add_done_callback(self._tasks.discard)

    async def _send(self, key: bytes, value: bytes, intended: float) -> None:
        error = None
        try:
            await self._producer.send(TOPIC, value, key=key)
        except LedgerStreamError as failed:
            error = failed
        self.results.append((time.perf_counter() - intended, len(value), error))

    def _call(self, work: Any) -> None:
        """Run a coroutine in the client's thread; other greenlets go on meanwhile."""
        done = asyncio.run_coroutine_threadsafe(work, self._loop)
        while not done.done():
            gevent.sleep(0.01)
        done.result()


class Payments(User):
    """A terminal that sends payments at its rate, whatever becomes of them."""

    sender: Sender | None = None
    numbers = count()  # users take different days of the simulation

    def on_start(self) -> None:
        if Payments.sender is None:
            Payments.sender = Sender(self.host or "127.0.0.1:9092")
            gevent.spawn(_report_always, Payments.sender)
        self._payments = encoded(seed=next(Payments.numbers))
        self._due = time.perf_counter()

    @task
    def pay(self) -> None:
        assert Payments.sender is not None
        self._due += 1 / RATE
        gevent.sleep(max(self._due - time.perf_counter(), 0))
        key, value = next(self._payments)
        Payments.sender.send(key, value, self._due)


@events.test_stop.add_listener
def _close(**_: Any) -> None:
    if Payments.sender is not None:
        Payments.sender.close()
        Payments.sender = None


def _report_always(sender: Sender) -> None:
    while Payments.sender is sender:
        sender.report()
        gevent.sleep(DRAIN_S)


def encoded(seed: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of simulated payments, without end."""
    prefix = Payment.layouts()[-1].prefix
    for year in count():
        world = Simulation(customers=200, terminals=1_000, days=365, seed=seed + 1_000 * year)
        for rows in world.payments():
            for row in rows:
                yield struct.pack(">q", int(row["customer"])), prefix + row.tobytes()
