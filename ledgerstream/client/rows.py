"""Rows of an event type from what people have: structured arrays and data frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ledgerstream.errors import ConfigError, DecodeError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from ledgerstream.events import Column, Event


def as_rows(rows: np.ndarray | pd.DataFrame, event: type[Event]) -> np.ndarray:
    """Rows of an event type from a structured array or a data frame.

    Raises ConfigError for missing columns and for values that a column cannot hold.
    """
    import numpy as np

    if isinstance(rows, np.ndarray):
        if rows.dtype == event.dtype():
            return rows
        names = rows.dtype.names or ()
    elif hasattr(rows, "columns"):
        names = tuple(rows.columns)
    else:
        raise ConfigError(
            f"{event.__name__} events come as a data frame or a structured array, not as "
            f"{type(rows).__name__}.",
            "Make one of them: pd.DataFrame(…).",
        )
    out = np.empty(len(rows), event.dtype())
    for column in event.columns().values():
        if column.name not in names:
            if not column.optional:
                raise ConfigError(
                    f"The rows have no column {column.name!r}, which {event.__name__} needs.",
                    f"They have {', '.join(map(str, names))}.",
                )
            out[column.name] = column.store(column.default)
            continue
        out[column.name] = _as_column(rows[column.name], column)
    return out


def _as_column(values: Any, column: Column) -> Any:
    """What the column stores, from an array or a series. Raises ConfigError."""
    import numpy as np

    array = np.asarray(values)
    what = f"Column {column.name!r} ({column.kind})"
    if array.dtype.kind == "M" or str(getattr(values, "dtype", "")).startswith("datetime64"):
        if column.kind != "timestamp":
            raise ConfigError(f"{what} does not hold times.")
        return _times(values, what)
    if array.dtype.kind in "OUT" and column.kind in ("timestamp", "money", "enum"):
        array = _parsed(array, column, what)
    match column.kind:
        case "text":
            return _texts(array, column, what)
        case "float":
            if array.dtype.kind not in "fiu":
                raise ConfigError(f"{what} needs numbers, not {array.dtype}.")
        case "bool":
            if array.dtype.kind != "b":
                raise ConfigError(f"{what} needs booleans, not {array.dtype}.")
        case _:
            if column.kind == "money" and array.dtype.kind == "f":
                raise ConfigError(
                    f"{what} is given as floats, whose digits are already lost.",
                    "Give integer minor units, or the amounts as text.",
                )
            if array.dtype.kind == "f" and np.isnan(array).any():
                row = int(np.argmax(np.isnan(array)))
                raise ConfigError(
                    f"{what} has no value in row {row:,} (NaN), and such a column must have one.",
                    "Fill what is missing, or drop those rows: frame.dropna().",
                )
            if array.dtype.kind not in "iub":
                raise ConfigError(f"{what} needs integers, not {array.dtype}.")
            if not _fits(array, column):
                raise ConfigError(f"{what} holds values that do not fit {column.dtype}.")
    return array


def _times(values: Any, what: str) -> np.ndarray:
    import numpy as np
    import pandas as pd

    times = pd.to_datetime(values, utc=True)
    if bool(pd.isna(times).any()):
        raise ConfigError(f"{what} has missing times.")
    try:
        return np.asarray(pd.DatetimeIndex(times).as_unit("ns").asi8, np.int64)
    except pd.errors.OutOfBoundsDatetime as error:
        raise ConfigError(f"{what} holds times that do not fit 64 bits of ns.") from error


def _parsed(array: np.ndarray, column: Column, what: str) -> np.ndarray:
    """Times, money and enum values from their text, exactly; integers stay what they are."""
    import numpy as np

    from ledgerstream.events import parse_timestamp
    from ledgerstream.money import parse_minor

    codes = {choice.value: column.store(choice) for choice in column.choices}

    def parse(value: Any) -> int:
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            return int(value)
        if column.kind == "timestamp":
            return parse_timestamp(value)
        if column.kind == "money":
            assert column.currency is not None
            return parse_minor(value, column.currency)
        if value not in codes:
            raise DecodeError(f"{value!r} is none of {', '.join(map(str, codes))}.")
        return int(codes[value])

    out = np.empty(len(array), np.int64)
    for place, value in enumerate(array.tolist()):
        try:
            out[place] = parse(value)
        except (DecodeError, OverflowError, TypeError) as error:
            raise ConfigError(f"{what}, row {place:,}: {error}") from error
    return out


def _texts(array: np.ndarray, column: Column, what: str) -> list[bytes]:
    out = []
    for place, value in enumerate(array.tolist()):
        if not isinstance(value, (str, bytes)):
            raise ConfigError(f"{what}, row {place:,}: {value!r} is not text.")
        raw = value if isinstance(value, bytes) else value.encode()
        if len(raw) > column.dtype.itemsize or b"\0" in raw:
            raise ConfigError(
                f"{what}, row {place:,}: {value!r} is longer than {column.dtype.itemsize} bytes "
                "or holds a NUL."
            )
        out.append(raw)
    return out


def _fits(array: np.ndarray, column: Column) -> bool:
    import numpy as np

    if not len(array):
        return True
    if column.choices:
        return bool(np.isin(array, [column.store(choice) for choice in column.choices]).all())
    limits = np.iinfo(column.dtype)
    return limits.min <= int(array.min()) and int(array.max()) <= limits.max
