"""Transactional requests for our broker and for Apache Kafka: parts B to E of transactions.md.

Producer ids differ by nature, so a scenario shows them as names: p0 is the first that it saw.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ledgerstream.wire import batches
from ledgerstream.wire.batches import TRANSACTIONAL
from ledgerstream.wire.described import read_described
from ledgerstream.wire.markers import read_marker
from ledgerstream.wire.versions import Api
from tests.differential.raw import Raw
from tests.differential.scenarios import (
    Seen,
    create,
    fetch,
    offsets,
    produce,
    scenario,
    until,
)
from tests.differential.scenarios import (
    batch as any_batch,
)

NOW = int(time.time() * 1000)  # markers carry the time: a week between would roll segments


def batch(count: int = 1, **how: Any) -> bytes:
    return any_batch(count, at=NOW, **how)


class Producer:
    """One transactional id, by hand. What it was last told is its identity."""

    def __init__(self, raw: Raw, txn_id: str, *, v2: bool = False, timeout: int = 60_000) -> None:
        self.raw, self.txn_id, self.v2, self.timeout = raw, txn_id, v2, timeout
        self.pid = self.epoch = -1
        self.names: dict[int, str] = {-1: "none"}
        self.sequence: dict[int, int] = {}
        until(lambda: raw.ask(Api.FIND_COORDINATOR, 2, key=txn_id, key_type=1))

    def name(self, pid: int) -> str:
        return self.names.setdefault(pid, f"p{len(self.names) - 1}")

    def init(self, version: int = 5, *, given: tuple[int, int] = (-1, -1), **more: Any) -> Any:
        """(error, id by name, epoch). Asks again while a transaction ends, as clients do."""
        reply = settled(lambda: self.raw.ask(
            Api.INIT_PRODUCER_ID, version, transactional_id=self.txn_id,
            transaction_timeout=self.timeout, producer_id=given[0], producer_epoch=given[1],
            **{"enable2_pc": False, "keep_prepared_txn": False, **more},
        ))  # fmt: skip
        if reply["error_code"] == "none":
            self.pid, self.epoch = reply["producer_id"], reply["producer_epoch"]
            self.sequence = {}
        return reply["error_code"], self.name(reply["producer_id"]), reply["producer_epoch"]

    def add(self, *partitions: tuple[str, int], version: int = 3, **identity: int) -> Any:
        pid, epoch = identity.get("pid", self.pid), identity.get("epoch", self.epoch)
        topics = [{"name": name, "partitions": [index]} for name, index in partitions]
        reply = settled(lambda: self.raw.ask(
            Api.ADD_PARTITIONS_TO_TXN, version, v3_and_below_transactional_id=self.txn_id,
            v3_and_below_producer_id=pid, v3_and_below_producer_epoch=epoch,
            v3_and_below_topics=topics,
        ))  # fmt: skip
        return sorted(codes(reply))

    def verify(self, *partitions: tuple[str, int], **identity: int) -> Any:
        pid, epoch = identity.get("pid", self.pid), identity.get("epoch", self.epoch)
        topics = [{"name": name, "partitions": [index]} for name, index in partitions]
        reply = self.raw.ask(
            Api.ADD_PARTITIONS_TO_TXN, 4, transactions=[{
                "transactional_id": self.txn_id, "producer_id": pid, "producer_epoch": epoch,
                "verify_only": True, "topics": topics,
            }],
        )  # fmt: skip
        return sorted(codes(reply))

    def send(
        self, topic: str, *, partition: int = 0, version: int = 0, sequence: int | None = None,
        epoch: int | None = None, pid: int | None = None, count: int = 1,
    ) -> Any:  # fmt: skip
        """(error, base offset) of a batch that goes on where the last ended."""
        given = self.sequence.get(partition, 0) if sequence is None else sequence
        data = batch(
            count, producer_id=self.pid if pid is None else pid,
            producer_epoch=self.epoch if epoch is None else epoch, base_sequence=given,
            attributes=TRANSACTIONAL,
        )  # fmt: skip
        part = settled(lambda: produce(
            self.raw, topic, data, version=version or (12 if self.v2 else 9), partition=partition,
            transactional_id=self.txn_id,
        )["responses"][0]["partition_responses"][0])  # fmt: skip
        if part["error_code"] == "none" and sequence is None:
            self.sequence[partition] = given + count
        return part["error_code"], part["base_offset"]

    def end(
        self, committed: bool, *, version: int = 0, pid: int | None = None, epoch: int | None = None
    ) -> Any:
        """(error, id by name, epoch); V2 goes on as what it is told."""
        version = version or (5 if self.v2 else 3)
        reply = settled(lambda: self.raw.ask(
            Api.END_TXN, version, transactional_id=self.txn_id,
            producer_id=self.pid if pid is None else pid,
            producer_epoch=self.epoch if epoch is None else epoch, committed=committed,
        ))  # fmt: skip
        if version < 5:
            return reply["error_code"]
        if reply["error_code"] == "none" and pid is None and epoch is None:
            self.pid, self.epoch = reply["producer_id"], reply["producer_epoch"]
            self.sequence = {}
        return reply["error_code"], self.name(reply["producer_id"]), reply["producer_epoch"]

    def describe(self) -> Any:
        """(error, state, epoch) once no markers are on their way."""
        while True:
            self.raw.send(Api.DESCRIBE_TRANSACTIONS, 0, transactional_ids=[self.txn_id])
            frame = self.raw.frame()
            assert frame is not None
            (state,) = read_described(frame)
            if not state.state.startswith("Prepare"):
                return state.error, state.state, state.producer_epoch


def settled(ask: Any) -> Any:
    """Ask again while the transaction before this one ends: how long that takes is not compared."""
    for _ in range(20_000):
        reply = ask()
        if reply == "closed":
            raise ConnectionError("the broker has closed the connection")
        code = reply.get("error_code")
        if code not in NOT_YET and not NOT_YET & set(codes(reply)):
            return reply
    raise AssertionError(f"never settled: {reply}")


NOT_YET = {
    "concurrent_transactions", "coordinator_load_in_progress", "coordinator_not_available",
    "not_coordinator", "not_enough_replicas",
}  # fmt: skip


def codes(value: Any) -> Iterator[str]:
    """Every partition's error in a reply."""
    if isinstance(value, dict):
        if "partition_error_code" in value:
            yield value["partition_error_code"]
        for item in value.values():
            yield from codes(item)
    elif isinstance(value, list):
        for item in value:
            yield from codes(item)


def seen(raw: Raw, topic: str, name: Any, *, isolation: int, offset: int = 0) -> Any:
    """What a fetch shows: batches, markers by kind, aborted transactions, ends."""
    part = fetch(raw, topic, offset, isolation=isolation)["responses"][0]["partitions"][0]
    shown = []
    data = part["records"] or b""
    for at, header in batches.headers(data):
        marker = read_marker(data, at) if header.control else None
        kind = "data" if marker is None else "commit" if marker.committed else "abort"
        shown.append((header.base_offset, kind, name(header.producer_id), header.producer_epoch))
    aborted = part["aborted_transactions"]
    if aborted is not None:
        aborted = [(name(each["producer_id"]), each["first_offset"]) for each in aborted]
    return shown, aborted, part["high_watermark"], part["last_stable_offset"]


def stable(raw: Raw, topic: str, wanted: int) -> int:
    """The last stable offset once it is as wanted: markers follow the answer."""
    found = -1
    for _ in range(2_000):
        reply = offsets(raw, topic, -1, isolation=1)
        found = reply["topics"][0]["partitions"][0]["offset"]
        if found == wanted:
            break
    return found


@scenario
def find_coordinators(raw: Raw, name: str) -> Seen:
    """Item 61."""
    for version in range(1, 7):
        for kind in (1, 9):
            reply = until(lambda v=version, k=kind: _first(raw.ask(
                Api.FIND_COORDINATOR, v, key=name, key_type=k, coordinator_keys=[name, name + "2"],
            )))  # fmt: skip
            yield f"v{version} {kind}", (reply["error_code"], reply.get("key", name))


def _first(reply: Any) -> Any:
    if reply == "closed":
        return {"error_code": "closed"}
    return reply["coordinators"][0] if "coordinators" in reply else reply


@scenario
def init_of_a_transactional_id(raw: Raw, name: str) -> Seen:
    """Items 27, 29, 30 and 33 to 36, 39."""
    producer = Producer(raw, name)
    for version in range(6):
        yield f"v{version}", producer.init(version)
    pid, epoch = producer.pid, producer.epoch
    yield "as it is", producer.init(given=(pid, epoch))
    yield "repeated", producer.init(given=(pid, epoch))
    yield "older", producer.init(given=(pid, epoch - 2))
    yield "older, v3", producer.init(3, given=(pid, epoch - 2))
    yield "another id", producer.init(given=(pid + 10_000, 0))
    yield "of nobody, with an id", Producer(raw, name + "-n").init(given=(77, 3))
    for timeout in (0, -5, 900_001, 900_000):
        producer.timeout = timeout
        yield f"timeout {timeout}", producer.init()


@scenario
def init_wrong(raw: Raw, name: str) -> Seen:
    """Items 25, 26."""
    producer = Producer(raw, name)
    yield "id alone", producer.init(given=(5, -1))
    yield "epoch alone", producer.init(given=(-1, 5))
    producer.txn_id = ""
    yield "empty", producer.init()


def life(raw: Raw, name: str, v2: bool) -> Seen:
    create(raw, name, 2)
    producer = Producer(raw, name, v2=v2)
    yield "init", producer.init()
    for step, committed in enumerate((True, False, True)):
        if not v2:
            yield f"{step} add", producer.add((name, 0))
        yield f"{step} send", producer.send(name, count=2)
        yield f"{step} send again", producer.send(name)
        yield f"{step} describe", producer.describe()
        yield f"{step} end", producer.end(committed)
    yield "stable", stable(raw, name, 12)
    for isolation in (0, 1):
        yield f"isolation {isolation}", seen(raw, name, producer.name, isolation=isolation)
        yield (
            f"from 5, isolation {isolation}",
            seen(raw, name, producer.name, isolation=isolation, offset=5),
        )
    yield (
        "latest",
        [
            offsets(raw, name, -1, isolation=i)["topics"][0]["partitions"][0]["offset"]
            for i in (0, 1)
        ],
    )


@scenario
def transactions_v1(raw: Raw, name: str) -> Seen:
    """Items 51, 65, 76, 78, 82."""
    yield from life(raw, name, False)


@scenario
def transactions_v2(raw: Raw, name: str) -> Seen:
    """Items 53, 65, 76, 78, 82, 92."""
    yield from life(raw, name, True)


@scenario
def what_is_open_is_not_read(raw: Raw, name: str) -> Seen:
    """Items 73, 78."""
    create(raw, name)
    one, two = Producer(raw, name + "1"), Producer(raw, name + "2", v2=True)
    one.init(), two.init()
    two.names = one.names
    produce(raw, name, batch(2))
    one.add((name, 0))
    one.send(name), two.send(name)
    produce(raw, name, batch(1))
    yield "both open", seen(raw, name, one.name, isolation=1)
    yield "uncommitted", seen(raw, name, one.name, isolation=0)
    one.end(True)
    yield "one ended", (stable(raw, name, 3), seen(raw, name, one.name, isolation=1))
    two.end(False)
    yield "both ended", (stable(raw, name, 7), seen(raw, name, one.name, isolation=1))


@scenario
def add_partitions_in_every_version(raw: Raw, name: str) -> Seen:
    """Items 47, 48."""
    create(raw, name, 3)
    producer = Producer(raw, name)
    for version in range(4):
        producer.init()
        yield f"v{version}", producer.add((name, 0), (name, 1), version=version)
        yield f"v{version} unknown", producer.add((name, 2), (name, 9), version=version)
        yield f"v{version} of no topic", producer.add((name + "-no", 0), version=version)
        yield f"v{version} wrong epoch", producer.add((name, 0), version=version, epoch=99)
        yield f"v{version} wrong id", producer.add((name, 0), version=version, pid=producer.pid + 7)
        yield f"v{version} end", producer.end(version % 2 == 0, version=version)
    nobody = Producer(raw, name + "-nobody")
    nobody.pid = nobody.epoch = 1
    yield "nobody", nobody.add((name, 0))


@scenario
def verification_of_partitions(raw: Raw, name: str) -> Seen:
    """Items 85, 87."""
    create(raw, name, 2)
    producer = Producer(raw, name)
    producer.init()
    yield "nothing open", producer.verify((name, 0))
    producer.add((name, 0))
    yield "one of two", producer.verify((name, 0), (name, 1))
    yield "wrong epoch", producer.verify((name, 0), epoch=7)
    yield "wrong id", producer.verify((name, 0), pid=producer.pid + 7)
    producer.end(True)
    yield "not its", Producer(raw, name + "-nobody").verify((name, 0), pid=1, epoch=1)


@scenario
def produce_outside_of_a_transaction(raw: Raw, name: str) -> Seen:
    """Items 5, 85, 87."""
    create(raw, name, 2)
    producer = Producer(raw, name)
    producer.init()
    for version in (3, 9, 10, 11):
        yield f"not added, v{version}", producer.send(name, version=version, sequence=0)
    producer.add((name, 0))
    yield "another partition", producer.send(name, partition=1, version=11, sequence=0)
    yield "its own", producer.send(name)
    yield "ended", producer.end(True)
    stable(raw, name, 2)
    yield "late", producer.send(name, version=11)
    yield "late, older client", producer.send(name)
    yield "a repeat", producer.send(name, sequence=0)
    yield (
        "no id",
        produce(
            raw,
            name,
            batch(
                1,
                producer_id=producer.pid,
                producer_epoch=0,
                base_sequence=5,
                attributes=TRANSACTIONAL,
            ),
        ),
    )
    yield "wrong epoch", producer.send(name, epoch=5, sequence=0)
    yield "wrong id", producer.send(name, pid=producer.pid + 99, sequence=0)
    yield "end", offsets(raw, name, -1)


@scenario
def plain_data_in_an_open_transaction(raw: Raw, name: str) -> Seen:
    """Item 13."""
    create(raw, name)
    producer = Producer(raw, name)
    producer.init()
    producer.add((name, 0))
    producer.send(name)
    plain = batch(1, producer_id=producer.pid, producer_epoch=producer.epoch, base_sequence=1)
    yield "plain", produce(raw, name, plain)
    yield "end", producer.end(False)


@scenario
def a_new_producer_fences_v1(raw: Raw, name: str) -> Seen:
    yield from fencing(raw, name, False)


@scenario
def a_new_producer_fences_v2(raw: Raw, name: str) -> Seen:
    yield from fencing(raw, name, True)


def fencing(raw: Raw, name: str, v2: bool) -> Seen:
    """Items 31, 36, 39, 66."""
    create(raw, name, 2)
    old, new = Producer(raw, name, v2=v2), Producer(raw, name, v2=v2)
    new.names = old.names
    old.init()
    if not v2:
        old.add((name, 0))
    old.send(name)
    yield "new", new.init()
    yield "stable", stable(raw, name, 2)
    yield "old sends", old.send(name)
    yield "old adds", [old.add((name, 1), version=version) for version in (0, 1, 2, 3)]
    yield "old ends", [old.end(True), old.end(False), old.end(True, version=1)]
    yield "old begins again", old.init(given=(old.pid, old.epoch))
    if not v2:
        new.add((name, 0))
    yield "new sends", new.send(name)
    yield "new ends", new.end(True)
    yield "stable again", stable(raw, name, 4)
    yield "read", seen(raw, name, old.name, isolation=1)


@scenario
def end_in_every_state_v1(raw: Raw, name: str) -> Seen:
    """Item 51."""
    create(raw, name)
    nobody = Producer(raw, name + "-nobody")
    nobody.pid = nobody.epoch = 1
    yield "unknown", nobody.end(True)
    for committed in (True, False):
        for then in (True, False):
            producer = Producer(raw, f"{name}{committed}{then}")
            producer.init()
            yield f"{committed} {then} empty", producer.end(committed)
            producer.add((name, 0))
            yield f"{committed} {then} wrong epoch", producer.end(committed, epoch=9)
            yield f"{committed} {then} older epoch", producer.end(committed, epoch=-1)
            yield f"{committed} {then} wrong id", producer.end(committed, pid=producer.pid + 5)
            yield f"{committed} {then} ends", producer.end(committed)
            yield f"{committed} {then} after", producer.end(then)
            yield f"{committed} {then} state", producer.describe()


@scenario
def end_in_every_state_v2(raw: Raw, name: str) -> Seen:
    """Items 53, 55."""
    create(raw, name)
    nobody = Producer(raw, name + "-nobody", v2=True)
    nobody.pid = nobody.epoch = 1
    yield "unknown", nobody.end(True)
    for committed in (True, False):
        for then in (True, False):
            for retry in (True, False):
                step = f"{committed} {then} {retry}"
                producer = Producer(raw, name + step.replace(" ", ""), v2=True)
                producer.init()
                pid, epoch = producer.pid, producer.epoch
                yield f"{step} empty, retry", producer.end(then, pid=pid, epoch=epoch - 1)
                producer.send(name)
                yield f"{step} higher", producer.end(committed, pid=pid, epoch=epoch + 1)
                yield f"{step} ends", producer.end(committed)
                at = epoch if retry else producer.epoch
                yield f"{step} after", producer.end(then, pid=pid, epoch=at)
                yield f"{step} twice before", producer.end(then, pid=pid, epoch=epoch - 1)
    for committed in (True, False):
        producer = Producer(raw, f"{name}-empty{committed}", v2=True)
        producer.init()
        yield f"empty {committed}", producer.end(committed)
        yield f"empty {committed} again", producer.end(committed)
        yield f"empty {committed} state", producer.describe()[:2]


@scenario
def v2_repeats_and_late_requests(raw: Raw, name: str) -> Seen:
    """Items 5, 11, 53, 91; bug 1."""
    create(raw, name)
    producer = Producer(raw, name, v2=True)
    producer.init()
    pid, epoch = producer.pid, producer.epoch
    producer.send(name)
    yield "end", producer.end(True)
    yield "stable before", stable(raw, name, 2)
    yield "late data of the one before", producer.send(name, epoch=epoch, sequence=1)
    yield "its repeat", producer.send(name, epoch=epoch, sequence=0)
    yield "a first batch not at 0", producer.send(name, sequence=4)
    yield "next", producer.send(name)
    yield "delayed end of the one before", producer.end(True, pid=pid, epoch=epoch)
    yield "delayed abort of the one before", producer.end(False, pid=pid, epoch=epoch)
    yield "end of it", producer.end(False)
    yield "stable", stable(raw, name, 4)
    yield "read", seen(raw, name, producer.name, isolation=1)


@scenario
def a_client_that_switches_to_v2(raw: Raw, name: str) -> Seen:
    """Item 92; bug 11."""
    create(raw, name, 2)
    producer = Producer(raw, name)
    producer.init()
    producer.add((name, 0))
    producer.send(name)
    yield "v1", producer.end(True)
    producer.v2 = True
    stable(raw, name, 2)
    yield "v2 goes on", producer.send(name)
    yield "v2 ends", producer.end(True)
    yield "v2 again", producer.send(name)
    yield "v2 aborts", producer.end(False)
    yield "stable", stable(raw, name, 6)
    yield "read", seen(raw, name, producer.name, isolation=0)


@scenario
def init_while_a_transaction_is_open(raw: Raw, name: str) -> Seen:
    """Items 31, 33."""
    create(raw, name)
    for v2 in (False, True):
        producer = Producer(raw, f"{name}{v2}", v2=v2)
        producer.init()
        pid, epoch = producer.pid, producer.epoch
        producer.add((name, 0)) if not v2 else None
        producer.send(name)
        yield f"{v2} as itself", producer.init(given=(pid, epoch))
        yield f"{v2} state", producer.describe()
        yield f"{v2} the old end", producer.end(True, pid=pid, epoch=epoch)
        yield f"{v2} the old init", producer.init(given=(pid, epoch))


@scenario
def transactions_time_out(raw: Raw, name: str) -> Seen:
    """Items 56, 57."""
    create(raw, name)
    for v2 in (False, True):
        for committed in (True, False):
            producer = Producer(raw, f"{name}{v2}{committed}", v2=v2, timeout=1)
            producer.init()
            start = offsets(raw, name, -1)["topics"][0]["partitions"][0]["offset"]
            producer.add((name, 0)) if not v2 else None
            producer.send(name)
            yield f"{v2} {committed} stable", stable_slowly(raw, name, start + 2) - start
            yield f"{v2} {committed} state", producer.describe()
            yield f"{v2} {committed} send", producer.send(name)
            yield f"{v2} {committed} end", producer.end(committed)
            yield f"{v2} {committed} init", producer.init(given=(producer.pid, producer.epoch))


def stable_slowly(raw: Raw, topic: str, wanted: int) -> int:
    """Brokers look for transactions that are open too long now and then."""
    deadline = time.monotonic() + 30
    while (found := stable(raw, topic, wanted)) != wanted and time.monotonic() < deadline:
        pass
    return found


@scenario
def epochs_run_out_v2(raw: Raw, name: str) -> Seen:
    """Items 37, 38, 54: an abort of nothing bumps the epoch, so the last one can be reached."""
    create(raw, name)
    producer = Producer(raw, name, v2=True)
    producer.init()
    pid = producer.pid
    while producer.epoch < 32_766 and producer.pid == pid:
        code, *_ = producer.end(False)
        assert code == "none"
    yield "the last", (producer.name(producer.pid), producer.epoch)
    yield "send", producer.send(name)
    yield "end", producer.end(True)
    yield "its repeat", producer.end(True, pid=pid, epoch=32_766)
    yield "the opposite", producer.end(False, pid=pid, epoch=32_766)
    yield "init as before", producer.init(given=(pid, 32_766))
    yield "send on", producer.send(name)
    yield "end again", producer.end(False)
    yield "stable", stable(raw, name, 4)
    yield "read", seen(raw, name, producer.name, isolation=0)


@scenario
def who_is_listed(raw: Raw, name: str) -> Seen:
    """Item 63."""
    create(raw, name)
    open_one, done, empty = (Producer(raw, f"{name}-{kind}") for kind in ("open", "done", "empty"))
    for producer in (open_one, done, empty):
        producer.init()
    for producer in (open_one, done):
        producer.add((name, 0))
    done.end(True)
    until_state(done, "CompleteCommit")

    def ask(version: int, **filters: Any) -> Any:
        given = {
            "state_filters": [], "producer_id_filters": [], "duration_filter": -1,
            "transactional_id_pattern": None, **filters,
        }  # fmt: skip
        reply = raw.ask(Api.LIST_TRANSACTIONS, version, **given)
        found = sorted(
            (each["transactional_id"], each["transaction_state"])
            for each in reply["transaction_states"]
            if each["transactional_id"].startswith(name + "-")
        )
        return reply["error_code"], reply["unknown_state_filters"], found

    for version in range(3):
        yield f"v{version}", ask(version)
        yield f"v{version} open", ask(version, state_filters=["Ongoing"])
        yield f"v{version} unknown", ask(version, state_filters=["Asleep", "Empty"])
        yield f"v{version} by id", ask(version, producer_id_filters=[done.pid])
    yield "long open", ask(1, duration_filter=3_600_000)
    yield "open at all", ask(1, duration_filter=0, state_filters=["Ongoing"])
    yield "by pattern", ask(2, transactional_id_pattern=f"{name}-(open|empty)")
    yield "by a part", ask(2, transactional_id_pattern="open")
    yield "by no pattern", ask(2, transactional_id_pattern="(")
    yield "described", [producer.describe() for producer in (open_one, done)]
    yield "nobody", Producer(raw, name + "-nobody").describe()[0]
    yield "end", open_one.end(False)


def until_state(producer: Producer, wanted: str) -> None:
    for _ in range(2_000):
        if producer.describe()[1] == wanted:
            return
    raise AssertionError(producer.describe())


@scenario
def an_operator_aborts(raw: Raw, name: str) -> Seen:
    """Items 66, 67, 68, 84."""
    create(raw, name)
    producer = Producer(raw, name)
    producer.init()
    producer.add((name, 0))
    producer.send(name)

    def active() -> Any:
        reply = raw.ask(
            Api.DESCRIBE_PRODUCERS, 0,
            topics=[{"name": name, "partition_indexes": [0, 7]}],
        )  # fmt: skip
        return [
            (part["error_code"], [
                {k: v for k, v in each.items() if k not in ("producer_id", "last_timestamp")}
                for each in part["active_producers"]
            ])
            for part in reply["topics"][0]["partitions"]
        ]  # fmt: skip

    def mark(version: int, epoch: int, coordinator: int, **more: Any) -> Any:
        reply = raw.ask(
            Api.WRITE_TXN_MARKERS, version,
            markers=[{
                "producer_id": producer.pid, "producer_epoch": epoch, "transaction_result": False,
                "topics": [{"name": name, "partition_indexes": [0]}],
                "coordinator_epoch": coordinator, "transaction_version": 0, **more,
            }],
        )  # fmt: skip
        return reply["markers"][0]["topics"][0]["partitions"]

    yield "open", active()
    yield "strict at its epoch", mark(2, producer.epoch, 5, transaction_version=2)
    yield "marker", mark(1, producer.epoch, 5)
    yield "ended", active()
    yield "stable", stable(raw, name, 2)
    yield "again", mark(1, producer.epoch, 5)
    yield "older coordinator", mark(1, producer.epoch, 4)
    yield "strict, repeated", mark(2, producer.epoch, 5, transaction_version=2)
    yield "strict, next epoch", mark(2, producer.epoch + 1, 5, transaction_version=2)
    yield "older epoch", mark(2, producer.epoch, 6)
    yield "sends on", producer.send(name)
