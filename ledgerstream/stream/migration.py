"""From the state that is stored to the state that is declared: what may change, and the change.

A column of a `Keyed` table may be added, and starts as zero; columns may stand in another order;
an integer or a text may become wider, an `Enum` may get members at its end. Whatever
else differs is named by `differences`, and then nothing is loaded. Pure: declarations as their
`stored` gives them, and arrays as `dump` gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ledgerstream.stream.durations import duration_text
from ledgerstream.stream.state import Dump, KeyedSpec, Spec

Specs = Mapping[str, Spec]
Layout = Mapping[str, Sequence[Any]]  # state name → what `Spec.stored` gave

_KINDS = {"keyed": "Keyed", "sliding": "Sliding", "windows": "Tumbling or Hopping",
          "sessions": "Session"}  # fmt: skip
_FIELDS = {  # what follows the key in `Spec.stored`
    "keyed": ("columns", "expire", "time"),
    "sliding": ("time", "sum", "over", "delay", "late"),
    "windows": ("time", "over", "every", "delay", "late", "columns", "reports"),
    "sessions": ("gap", "time", "delay", "late", "on_late", "columns"),
}
_LISTED = {"keyed": 0, "sliding": 2, "windows": 1, "sessions": 0}  # which of them is the first list
_LENGTHS = {"expire", "over", "every", "delay", "late", "gap"}
_NOTHING = object()


def differences(processor: str, declared: Layout, stored: Layout) -> list[str]:
    """A sentence for each difference that cannot be migrated; none where all can be."""
    found: list[str] = []
    for name in dict.fromkeys([*stored, *declared]):
        where = f"{processor}.{name}"
        if name not in declared:
            found.append(f"{where} is stored, and not declared.")
        elif name not in stored:
            found.append(f"{where} is declared, and not stored.")
        else:
            found += _of_state(where, _read(declared[name]), _read(stored[name]))
    return found


def stored_specs(specs: Specs, stored: Layout) -> dict[str, Spec]:
    """The specs that the stored arrays follow, to load them; there must be no `differences`."""
    return {
        name: replace(spec, columns=_columns_of(stored[name]), kinds=())
        if isinstance(spec, KeyedSpec)
        else spec
        for name, spec in specs.items()
    }


def moves(before: Specs, after: Specs) -> bool:
    """Whether arrays of `before` must be migrated to be those of `after`."""
    return any(
        isinstance(spec, KeyedSpec) and spec.columns != _keyed(before, name).columns
        for name, spec in after.items()
    )


def migrated(before: Specs, after: Specs, content: Mapping[str, Dump]) -> dict[str, Dump]:
    """The content as a state of `after` would hold it: bit by bit what it would be, had its new
    columns been there from the beginning and never been written."""
    return {
        name: {**content[name], "rows": _moved(_keyed(before, name), spec, content[name]["rows"])}
        if isinstance(spec, KeyedSpec)
        else content[name]
        for name, spec in after.items()
    }


def _moved(before: KeyedSpec, after: KeyedSpec, rows: np.ndarray) -> np.ndarray:
    """int64[n, words] of one layout as int64[n, words] of the other; padding is zero."""
    moved = np.zeros((len(rows), after.row.itemsize // 8), np.int64)
    old = np.ascontiguousarray(rows).view(before.row)[:, 0]
    new = moved.view(after.row)[:, 0]
    for name in before.row.names or ():
        new[name] = old[name]
    return moved


def _keyed(specs: Specs, name: str) -> KeyedSpec:
    spec = specs[name]
    assert isinstance(spec, KeyedSpec)
    return spec


def _columns_of(stored: Sequence[Any]) -> tuple[tuple[str, np.dtype], ...]:
    return tuple((name, np.dtype(dtype)) for name, dtype, *_ in _read(stored).fields["columns"])


@dataclass(frozen=True)
class _Declared:
    kind: str
    key: list[str]  # its name, and for text its type
    fields: dict[str, Any]


def _read(stored: Sequence[Any]) -> _Declared:
    """The inverse of `Spec.stored`."""
    kind, *rest = stored
    names = _FIELDS[kind]
    # A key is one or two texts, and fields may be missing at the end.
    cut = next(n for n, each in enumerate(rest) if isinstance(each, list)) - _LISTED[kind]
    return _Declared(kind, rest[:cut], dict(zip(names, rest[cut:], strict=False)))


def _of_state(where: str, declared: _Declared, stored: _Declared) -> Iterator[str]:
    if declared.kind != stored.kind:
        new, old = _KINDS[declared.kind], _KINDS[stored.kind]
        yield f"{where} is declared as {new}, and stored as {old}."
        return
    if declared.key != stored.key:
        yield f"{where} is declared by {_key(declared.key)}, and stored by {_key(stored.key)}."
    for field in _FIELDS[declared.kind]:
        new, old = (each.fields.get(field, _NOTHING) for each in (declared, stored))
        if new == old:
            continue
        if field == "columns":
            yield from (_of_columns if declared.kind == "keyed" else _of_windows)(where, new, old)
        else:
            yield (
                f"{where}: {field!r} is declared as {_value(field, new)}, and stored as "
                f"{_value(field, old)}."
            )


def _of_columns(where: str, declared: list[list[str]], stored: list[list[str]]) -> Iterator[str]:
    there = {name: rest for name, *rest in declared}
    for name, dtype, *kind in stored:
        old = _type(dtype, *kind)
        if name not in there:
            yield f"{where}: column {name!r} is stored as {old}, and not declared."
        elif not _fits(there[name], [dtype, *kind]):
            yield (
                f"{where}: column {name!r} is declared as {_type(*there[name])}, and stored as "
                f"{old}."
            )


def _of_windows(where: str, declared: list[list[Any]], stored: list[list[Any]]) -> Iterator[str]:
    """A column of windows cannot be added: it would know nothing of the windows that are open."""
    new, old = ({name: rest for name, *rest in each} for each in (declared, stored))
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            yield f"{where}: column {name!r} is stored, and not declared."
        elif name not in old:
            yield f"{where}: column {name!r} is declared, and not stored."
        elif new[name] != old[name]:
            yield f"{where}: column {name!r} is declared with another aggregate than is stored."
    if list(new) != list(old) and sorted(new) == sorted(old):
        yield (
            f"{where}: columns are declared in the order {', '.join(new)}, and stored in the order "
            f"{', '.join(old)}."
        )


def _fits(declared: list[str], stored: list[str]) -> bool:
    """Whether each value of the stored column is the same value in the declared one."""
    new, old = np.dtype(declared[0]), np.dtype(stored[0])
    if len(stored) > 1 and not declared[1].startswith(stored[1]):
        return False
    if new == old:
        return True
    return new.kind == old.kind and new.kind in "iuS" and new.itemsize > old.itemsize


def _type(dtype: str, kind: str = "") -> str:
    found = np.dtype(dtype)
    if kind.startswith("money:"):
        return kind.removeprefix("money:")
    if kind.startswith("enum"):
        return f"an enum ({', '.join(kind.split('|')[1:-1])})" if "|" in kind else "an IntEnum"
    if found.kind == "S":
        return f"Text[{found.itemsize}]"
    return "Timestamp" if kind == "timestamp" else found.name


def _key(key: list[str]) -> str:
    return " ".join([repr(key[0]), *(f"({_type(each)})" for each in key[1:])])


def _value(field: str, value: Any) -> str:
    if value is _NOTHING or value is None:
        return "none"
    if field not in _LENGTHS:
        return repr(value)
    return ", ".join(map(duration_text, value if isinstance(value, list) else [value]))
