"""Runs an experiment: its cells are measured and kept one by one, then table and pictures are drawn."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from titans.experiments.results import Numbers, Results
from titans.train.checkpoint import write_bytes

Progress = Callable[[int, int], None]
Budget = Literal["quick", "medium", "full"]


@dataclass(frozen=True)
class Cell:
    """One measurement.

    name: its key among the results, unlike any other's. settings: what `measure` needs to know. seed: of all
    random numbers. cost: the time it takes, in any unit, for the estimate of the time left. conditions: what
    else its numbers depend on, such as the hash of a trained model; they are kept with the numbers, and a
    cell that was measured under others is measured again.
    """

    name: str
    settings: Any = None
    seed: int = 0
    cost: float = 1.0
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What is to be measured, and with what.

    budget: "quick" shows in minutes that an experiment works; its numbers are no results. "medium" is for
    experiments that have a smaller form of their own, and the full one for others. seeds: how many; None for
    the experiment's own number. models: label → name in the zoo or folder, for experiments with
    trained models; None for all in the zoo. device: "cpu" or "cuda". work: a folder for what takes long to
    make and is not a result, such as trained models.
    """

    budget: Budget = "full"
    seeds: int | None = None
    models: Mapping[str, str] | None = None
    device: str = "cpu"
    work: Path = Path("runs")

    @property
    def quick(self) -> bool:
        return self.budget == "quick"


class Experiment(ABC):
    """A question, as cells that are measured independently, and a table of what they found."""

    name: ClassVar[str]
    title: ClassVar[str]
    # Processor seconds for a unit of the cells' costs, where that is known.
    unit: ClassVar[float | None] = None

    @property
    def command(self) -> str:
        """What measures it, as its page says."""
        return f"python -m titans.experiments {self.name}"

    @abstractmethod
    def cells(self, request: Request) -> list[Cell]:
        """All cells that the request asks for, in the order in which they are to be measured."""

    @abstractmethod
    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        """The numbers of one cell: finite ones that JSON can hold, and few of them.

        Args:
            progress: may be called with what is done and what there is to do.
        """

    @abstractmethod
    def table(self, results: Results) -> str:
        """What was found, as Markdown: the conditions in a sentence, then the table."""

    def draw(self, results: Results, folder: Path) -> dict[str, str]:
        """Write pictures to the folder; returns file name → what it shows."""
        return {}


class Ticker:
    """Progress on stderr: a line in every few seconds, with the time left."""

    def __init__(self, what: str, seconds: float = 10.0) -> None:
        self.what, self.seconds = what, seconds
        self._began = self._last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if done and now - self._last >= self.seconds:
            self._last, rate = now, done / (now - self._began)
            pace = f"{rate:,.0f}/s" if rate >= 1 else f"{duration(1 / rate)} each"
            say(f"  {done:,}/{total:,} {self.what} · {pace} · {duration((total - done) / rate)} left")


def duration(seconds: float) -> str:
    """In seconds, minutes or hours, with about two digits."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(
    experiment: Experiment,
    request: Request,
    output: Path,
    *,
    resume: bool = False,
    only: Sequence[str] = ("*",),
    part: tuple[int, int] = (0, 1),
) -> str:
    """Measure the cells that are missing; returns the page, which is also written to output/NAME.md.

    Each finished cell is kept at once in output/NAME.json. An interruption loses the running cell; the page
    is written at the end, and where the run is interrupted.

    Args:
        resume: go on with the results in `output`, if there are any.
        only: patterns (`fnmatch`) of the cells to measure. part: (k, n) for every n-th of them from the k-th
            on, so that n processes can share the work.

    Raises:
        ValueError: if there are results and `resume` is not set, or they are of another budget.
    """
    results = Results(output / f"{experiment.name}.json", request.budget)
    if results.cells and not resume:
        raise ValueError(
            f"{results.path} holds {len(results.cells)} cells already: add --resume to go on from them, or "
            "give another --output"
        )
    planned = experiment.cells(request)
    names = [cell.name for cell in planned]
    old = [cell.name for cell in planned if not _holds(cell, results.cells.get(cell.name))]
    if old:
        say(f"{len(old)} cells were measured under other conditions and are dropped, the first is {old[0]!r}")
        results.drop(old)
    if len(set(names)) < len(names):
        raise ValueError(f"{experiment.name}: two cells have one name among {names}")
    chosen = named(planned, only)
    missing = [cell for cell in chosen[part[0] :: part[1]] if cell.name not in results.cells]
    if experiment.unit is not None:
        seconds = experiment.unit * sum(cell.cost for cell in missing)
        say(f"{len(missing)} of {len(planned)} cells, about {duration(seconds)} of one core")
    try:
        _measure(experiment, request, missing, results)
    finally:
        page = write_page(experiment, results)
    return page


def named(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that one of the patterns (`fnmatch`) fits.

    Raises:
        ValueError: if there are cells and no pattern fits any.
    """
    chosen = [cell for cell in cells if any(fnmatchcase(cell.name, pattern) for pattern in only)]
    if cells and not chosen:
        raise ValueError(f"--only {' '.join(only)}: no cell has such a name; the first is {cells[0].name!r}")
    return chosen


def _measure(experiment: Experiment, request: Request, missing: Sequence[Cell], results: Results) -> None:
    """Measure cells and keep each at once."""
    began, spent = time.perf_counter(), 0.0
    for number, cell in enumerate(missing):
        seconds = time.perf_counter() - began
        left = sum(c.cost for c in missing[number:]) * seconds / spent if spent else None
        say(
            f"{number + 1}/{len(missing)} {cell.name}"
            + (f" · about {duration(left)} left" if left is not None else "")
        )
        torch.manual_seed(cell.seed)
        numbers = experiment.measure(cell, request, Ticker(cell.name))
        about = str(datetime.date.today()), machine(request.device)
        results.add(cell.name, {**cell.conditions, **numbers}, *about)
        spent += cell.cost


def _holds(cell: Cell, kept: Numbers | None) -> bool:
    """Whether what is kept of a cell, if anything, was measured under its conditions."""
    return kept is None or all(kept.get(name) == value for name, value in cell.conditions.items())


def machine(device: str = "cpu") -> str:
    """Processor and version, in a few words."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def write_page(experiment: Experiment, results: Results) -> str:
    """The page of what is known so far, written with its pictures to the folder of the results."""
    folder = results.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    budget = "" if results.budget == "full" else f" --budget {results.budget}"
    command = f"`{experiment.command}{budget}`"
    if results.budget == "quick":
        command = f"**A quick run, not a result**: {command}"
    about = f"{command}{', ' + results.about() if results.cells else ''}."
    pictures = experiment.draw(results, folder)
    table = experiment.table(results)
    parts = [f"# {experiment.title}", about, table]
    # A table may place pictures itself.
    parts += [f"![{shown}]({file})" for file, shown in pictures.items() if f"]({file})" not in table]
    page = "\n\n".join(part.strip() for part in parts) + "\n"
    write_bytes(folder / f"{experiment.name}.md", page.encode())
    return page
