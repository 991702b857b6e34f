"""The content of a state, frozen at an offset, as bytes that another process can load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from ledgerstream.stream import migration
from ledgerstream.stream.pages import Pages, cut
from ledgerstream.stream.state import Dump, Spec, State

Specs = Mapping[str, Spec]
FORMAT = 1  # of the arrays that states dump; another one is refused


@dataclass(frozen=True)
class Snapshot:
    """A state's content at `state_offset`: arrays by state name, copies that nobody changes.

    specs: the declaration that the arrays follow, which may be an older one.
    """

    partition: int
    state_offset: int
    digest: bytes
    code_version: str
    specs: Specs
    content: Mapping[str, Dump]


def freeze(
    state: State, specs: Specs, partition: int, state_offset: int, code_version: str
) -> Callable[[], Snapshot]:
    """Copy a state as it stands, in the compute thread; what is returned arranges the copy as a
    snapshot, in any thread, while the stream goes on."""
    digest, content = state.digest(), state.freeze()
    return lambda: Snapshot(partition, state_offset, digest, code_version, specs, content())


def layout_of(specs: Specs, content: Mapping[str, Dump]) -> str:
    """JSON: what is declared, and the arrays in the order of their bytes."""
    arrays = [
        [name, part, array.dtype.str, list(array.shape)]
        for name, dump in content.items()
        for part, array in dump.items()
    ]
    layout = {"format": FORMAT, "states": declared(specs), "arrays": arrays}
    return json.dumps(layout, separators=(",", ":"))


def declared(specs: Specs) -> migration.Layout:
    """The declarations as far as stored bytes depend on them, as they come back from JSON."""
    states = {name: spec.stored() for name, spec in specs.items()}
    return cast(migration.Layout, json.loads(json.dumps(states)))


def unlike(processor: str, specs: Specs, layout: str) -> list[str]:
    """Sentences on what keeps a stored layout from being loaded, or migrated, into `specs`."""
    stored = json.loads(layout)
    if stored.get("format", 1) != FORMAT:
        return [
            f"It is of format {stored['format']}, and this version of ledgerstream has {FORMAT}."
        ]
    return migration.differences(processor, declared(specs), stored["states"])


def specs_of(specs: Specs, layout: str) -> Specs:
    """The declaration that stored arrays follow, where nothing is `unlike`."""
    return migration.stored_specs(specs, json.loads(layout)["states"])


def paged(content: Mapping[str, Dump]) -> Pages:
    """The arrays' bytes one after the other, in pages."""
    return cut([array for dump in content.values() for array in dump.values()])


def unpaged(layout: str, data: bytes) -> dict[str, Dump]:
    """The inverse of `layout_of` and `paged`, the pages joined."""
    content: dict[str, Dump] = {}
    at = 0
    for name, part, dtype, shape in json.loads(layout)["arrays"]:
        count = int(np.prod(shape))
        array = np.frombuffer(data, dtype, count, at).reshape(shape)
        at += array.nbytes
        content.setdefault(name, {})[part] = array
    assert at == len(data)
    return content
