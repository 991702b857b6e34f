"""A processor of several topics: each has progress and state of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest

import ledgerstream
from ledgerstream import Processor, Topic
from ledgerstream.errors import ConfigError
from tests.cli.conftest import PROGRAM
from tests.stream.regions import Numbered, Order, Regions
from tests.stream.spending import Payment

ROOT = Path(__file__).parents[2]


def orders(first: int, count: int) -> pd.DataFrame:
    return pd.DataFrame({
        "order": range(first, first + count),
        "at": pd.date_range("2026-01-01", periods=count, freq="1s", tz="UTC"),
        "customer": [n % 5 for n in range(count)],
    })  # fmt: skip


def test_topics_of_another_form_are_refused() -> None:
    good = Topic("orders-x", Order, key="customer")
    for given, why in (
        ([good, Topic("payments-x", Payment, key="customer")], "different event types"),
        ([good, Topic("orders-y", Order, key="order")], "different event types, keys"),
        ([good, good], "twice"),
        ([], "must be a list of topics"),
        ([good, "orders"], "must be a list of topics"),
    ):
        with pytest.raises(ConfigError, match=why):
            type("Bad", (Processor,), {"sources": given, "process": lambda *_: None})


def test_one_event_at_a_time_over_several_topics() -> None:
    class Seen(Processor):
        sources = Regions.sources

        def on_event(self, order: object, state: object) -> None:
            return None

    assert [Seen.over(topic).source.name for topic in Seen.sources] == ["orders-eu", "orders-us"]
    assert Seen.on(orders(0, 3)) is not None


def test_each_topic_counts_for_itself_and_all_tools_know_of_it(tmp_path: Path) -> None:
    with ledgerstream.local(tmp_path / "data") as ls:
        for topic, first, count in (("orders-eu", 0, 40), ("orders-us", 1000, 20)):
            ls.write(topic, orders(first, count), partitions=2)
        progress = ls.run(Regions, until="end")
        assert progress.events == 60
        assert sum(progress.position.values()) == 60
        assert {str(place).rsplit("-", 1)[0] for place in progress.position} == {
            "orders-eu", "orders-us",
        }  # fmt: skip
        table = ls.table(Numbered)
        for first, count in ((0, 40), (1000, 20)):
            mine = table[(table.order >= first) & (table.order < first + count)]
            assert (
                mine.groupby("customer").number.apply(list).tolist()
                == [list(range(1, count // 5 + 1))] * 5
            )
        assert ls.verify(Regions).events == 20
        ls.write("orders-us", orders(2000, 5))
        env = {**os.environ, "LEDGERSTREAM_LOG": ls.address, "LEDGERSTREAM_DATABASE": ls.database}

        def shell(*words: str) -> str:
            done = subprocess.run(
                [PROGRAM, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=True
            )
            return done.stdout

        place = "tests.stream.regions:Regions"
        told = json.loads(shell("run", place, "--workers", "2", "--until-end", "--json"))
        assert told["events"] == 5
        assert sum(told["position"].values()) == 65
        assert [each["topic"] for each in json.loads(shell("verify", place, "--json"))] == [
            "orders-eu", "orders-us",
        ]  # fmt: skip
        state = json.loads(shell("state", "show", place, "3", "--json"))["state"]["seen"]
        assert sorted(row["orders"] for row in state) == [5, 8]
        (explained,) = json.loads(shell("explain", "numbered", "2003", "--json"))
        assert explained["origin"]["topic"] == "orders-us"
        assert explained["row"] == explained["recomputed"]
        lags = json.loads(shell("status", "--json"))
        assert {(each["topic"], each["lag"]) for each in lags} == {
            ("orders-eu", 0), ("orders-us", 0),
        }  # fmt: skip
