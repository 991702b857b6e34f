"""The different values of windows, a row each, for the columns that must know them:

    hash · key · start · width · column · value | total | next

`total` is what the value adds up to in its window (how often it came, or a sum), `next` chains the
values of a window (row + 1, −1 at the end) from a link of the window's row. Frames as in `KeyRows`.
"""

from __future__ import annotations

import numpy as np

from ledgerstream.limits import LIMITS
from ledgerstream.stream import valuekernels as kernels
from ledgerstream.stream import windowplan as plan
from ledgerstream.stream.keyed import KeyRows
from ledgerstream.stream.windowcolumns import Layout


class WindowValues:
    """Values of all windows of one partition. `key_words`: of a window's key in its row."""

    def __init__(self, name: str, layout: Layout, key_words: int) -> None:
        self._layout = layout
        self._window_words = key_words
        value_words = int(layout.sets[:, plan.WORDS].max(initial=0))
        self.value_at = 1 + key_words + 1
        self._key_words = key_words + 1 + value_words
        content = 1 + self._key_words + 1
        self.table = KeyRows(f"{name} values", content + 1, content, 1, self._key_words)

    def begin(self, pairs: int) -> None:
        room = LIMITS.state_keys_per_event_max
        self.table.begin(-(-max(pairs, 1) * len(self._layout.sets) // room))

    def resolve(self, events: np.ndarray, windows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """int64[pairs · sets]: the row of each pair's value in each column, pair by pair."""
        sets = self._layout.sets
        if len(sets) == 0:
            return np.empty(0, np.int64)
        keys = np.zeros((len(events), len(sets), self._key_words), np.int64)
        keys[:, :, : self._window_words] = windows[:, None, :]
        keys[:, :, self._window_words] = np.arange(len(sets))
        for at, (first, words) in enumerate(sets[:, [plan.COLUMN, plan.WORDS]]):
            into = self._window_words + 1
            keys[:, at, into : into + words] = values[first : first + words, events].T
        return self.table.resolve(keys.reshape(-1, self._key_words))

    def remove_of(self, windows: np.ndarray, rows: np.ndarray, at: int, link: int) -> None:
        """Windows, by their rows, are gone: their values go."""
        places = at + self._layout.sets[:, plan.PLACE]
        which = np.empty(int(rows[np.ix_(windows, places)].sum()), np.int64)
        kernels.listed(windows, rows, link, self.table.rows, self.table.content, which)
        self.table.remove(which)

    def relink(self, windows: KeyRows, link: int) -> None:
        """Chain all values anew, after a load."""
        which = self.table.live_rows()
        keys = np.ascontiguousarray(self.table.rows[which, 1 : 1 + self._window_words])
        row = windows.find(keys)
        kernels.hang(which, row, windows.rows, link, self.table.rows, self.table.content)
