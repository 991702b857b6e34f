"""For the tests of your own processors: drive one over a data frame, with splits and crashes.

    def test_large_spenders() -> None:
        found = drive(LargeSpenders, frame, splits=[3], crashes=[5])
        assert found.tables[Alert]["payment_id"].tolist() == [4]

    def test_batches_do_not_matter() -> None:
        assert_splits_do_not_matter(LargeSpenders, frame, seed=1, rounds=50)

Neither broker nor database is started; `drive` goes through the same step, encoding of rows and
bytes of snapshots as a worker does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ledgerstream.stream.compare import first_difference, settled
from ledgerstream.stream.pgread import joined
from ledgerstream.stream.processor import Processor
from ledgerstream.stream.trial import Driven, drive

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Driven", "assert_splits_do_not_matter", "drive"]

CUTS_MAX = 8  # splits, and crashes, of a round


def assert_splits_do_not_matter(
    processor: type[Processor],
    frame: pd.DataFrame | np.ndarray,
    *,
    seed: int = 0,
    rounds: int = 20,
) -> None:
    """Run a processor over the frame as one batch, then in random batches with random crashes.

    Raises AssertionError that names the first difference in rows, refused events or state, with
    the splits and crashes that show it. Of windows only what is final counts.
    """
    whole = drive(processor, frame)
    chance = np.random.default_rng(seed)
    for _ in range(rounds):
        splits, crashes = (_rows(chance, len(frame)) for _ in range(2))
        why = _difference(whole, drive(processor, frame, splits=splits, crashes=crashes))
        if why is not None:
            raise AssertionError(
                f"{processor.name} depends on where batches end or the process dies: with "
                f"splits={splits}, crashes={crashes} (seed {seed}) {why}"
            )


def _rows(chance: np.random.Generator, count: int) -> list[int]:
    return sorted({int(each) for each in chance.integers(0, count + 1, chance.integers(CUTS_MAX))})


def _difference(whole: Driven, split: Driven) -> str | None:
    for table in dict.fromkeys([*whole.columns, *split.columns]):
        one, other = (side.columns.get(table, joined(table, [])) for side in (whole, split))
        found = first_difference(table, settled(table, one), settled(table, other))
        if found is not None:
            return found.sentence(wanted="in one batch", there="so")
    if not whole.dead.equals(split.dead):
        offsets = set(whole.dead["offset"]) ^ set(split.dead["offset"])
        return f"other events are refused: {sorted(offsets)[:3]}."
    if whole.digest == split.digest:
        return None
    for name, frame in whole.state.items():
        if not frame.equals(split.state[name]):
            return f"the rows are equal, and state {name!r} is not."
    return "the rows are equal, and what the windows keep is not."
