"""What an experiment has measured, kept in one small JSON file."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from titans.train.checkpoint import write_bytes

LIMIT = 100_000
# Significant digits, and fewer where a file would be larger than the limit.
DIGITS = (7, 6, 5, 4, 3)
# Stands in a file for a list of names that its head has.
_LIST = "list"

Numbers = dict[str, Any]


def rounded(value: Any, digits: int) -> Any:
    """The same with every float to so many significant digits.

    Raises:
        ValueError: for a float that is not finite, which JSON does not have.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a result: record that it is not finite in another way")
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {str(key): rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value


def encoded(head: Mapping[str, Any], entries: Mapping[str, Any] | list[Any], name: str) -> bytes:
    """JSON with a line for each entry, in at most 100 kB.

    Args:
        head: other fields. entries: the field `name`, which comes last.

    Raises:
        ValueError: if three significant digits are still too many.
    """
    size = 0
    for digits in DIGITS:
        fields = [f"{_json(key)}:{_json(value)}" for key, value in head.items()]
        small = rounded(entries, digits)
        if isinstance(small, dict):
            lines = [f"{_json(key)}:{_json(value)}" for key, value in small.items()]
            body = "{\n" + ",\n".join(lines) + "\n}"
        else:
            body = "[\n" + ",\n".join(map(_json, small)) + "\n]"
        content = ("{" + ",\n".join([*fields, f"{_json(name)}:{body}"]) + "}\n").encode()
        size = len(content)
        if size <= LIMIT:
            return content
    raise ValueError(f"the results take {size:,} bytes and at most {LIMIT:,} are kept: record fewer numbers")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class Results:
    """The measured cells of one experiment, by name. Several processes may add to one file.

    Attributes:
        cells: the numbers of each cell. made: date and machine of each, by the cell's name.

    Raises:
        ValueError: if the file holds results of another budget.
    """

    def __init__(self, path: Path, budget: str = "full") -> None:
        self.path, self.budget = path, budget
        self.cells: dict[str, Numbers] = {}
        self.made: dict[str, tuple[str, str]] = {}
        self._read()

    def add(self, name: str, numbers: Numbers, date: str, machine: str) -> None:
        """Keep a cell: afterwards the file holds it, or is unchanged.

        Raises:
            ValueError: if the file would exceed 100 kB, or a number is not finite.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            self._read()
            self._write({**self.cells, name: numbers}, {**self.made, name: (date, machine)})

    def drop(self, names: Sequence[str]) -> None:
        """Forget cells."""
        with _locked(self.path.parent):
            self._read()
            left = {name: cell for name, cell in self.cells.items() if name not in names}
            self._write(left, self.made)

    def _write(self, cells: Mapping[str, Numbers], made: Mapping[str, tuple[str, str]]) -> None:
        places = sorted({made[name] for name in cells})
        head: dict[str, Any] = {"experiment": self.path.stem, "budget": self.budget, "made": places}
        # Names that several cells list, such as those of their texts, are written once.
        counts = Counter(tuple(v) for cell in cells.values() for v in cell.values() if _are_names(v))
        lists = [list(names) for names, count in counts.items() if count > 1]
        if lists:
            head["lists"] = lists
        entries = {
            name: {"made": places.index(made[name])}
            | {key: {_LIST: lists.index(v)} if v in lists else v for key, v in cell.items()}
            for name, cell in cells.items()
        }
        write_bytes(self.path, encoded(head, entries, "cells"))
        self._read()

    def about(self) -> str:
        """When and where the cells were measured."""
        return "; ".join(" and ".join(sorted(set(part))) for part in zip(*self.made.values(), strict=True))

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = json.loads(self.path.read_text(encoding="utf-8"))
        if content["budget"] != self.budget:
            raise ValueError(
                f"{self.path} holds results of budget {content['budget']!r}, not {self.budget!r}: "
                "give another folder"
            )
        cells: dict[str, Numbers] = content["cells"]
        self.made = {name: tuple(content["made"][cell.pop("made")]) for name, cell in cells.items()}
        lists = content.get("lists", [])
        self.cells = {
            name: {
                key: list(lists[v[_LIST]]) if isinstance(v, dict) and _LIST in v else v
                for key, v in cell.items()
            }
            for name, cell in cells.items()
        }


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
