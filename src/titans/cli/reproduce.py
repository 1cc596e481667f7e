"""`titans reproduce`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from titans.cli.errors import UsageError
from titans.cli.terminal import report

if TYPE_CHECKING:
    from titans.experiments.reproduce.table import PaperTable
    from titans.experiments.runner import Request

Table = Literal[
    "language",
    "needles",
    "ablation",
    "depth",
    "throughput",
    "synthetic",
    "babi-long",
    "commonsense",
    "claims",
]


@dataclass(frozen=True)
class Reproduce:
    """Test what the paper claims in one of its tables: train every system, measure, and give verdicts.

    Example: titans reproduce language --budget quick

    Prints the plan with its estimated time first, and the page of the table at the end. Finished cells are
    kept in the output folder: --resume goes on from them. `titans reproduce claims` draws the page of all
    claims from the results in --output.
    """

    table: Annotated[Table, tyro.conf.Positional]
    """Which table; claims for the page of all."""
    budget: Literal["quick", "full"] = "quick"
    """quick: see in minutes that it runs, which decides nothing. full: many hours, see the plan."""
    seeds: int | None = None
    """How many seeds, from 0 on; by default 1 of a quick run and 3 of a full one."""
    resume: bool = False
    """Go on with the results in the output folder."""
    output: Path = Path("runs/reproduce")
    """Folder of pages, JSON files and, below models, of trained systems."""
    only: tuple[str, ...] = ("*",)
    """Patterns of the cells to measure, such as 'lmm, *'."""
    plan: bool = False
    """Print the plan and stop."""
    threads: int = 1
    """CPU threads."""

    def run(self) -> int:
        """Measure what is missing, reporting to stderr."""
        for name in ("seeds", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name}={value}: give a whole number of at least 1")
        if self.output.exists() and not self.output.is_dir():
            raise UsageError(f"output={str(self.output)!r} is a file: give a folder")
        if self.table == "claims":
            from titans.experiments.reproduce.page import write_claims

            print(write_claims(self.output))
            return 0
        import torch

        from titans.experiments.reproduce.catalog import TABLES
        from titans.experiments.runner import Request, run

        table = TABLES[self.table]
        request = Request(self.budget, self.seeds, work=self.output / self.budget)
        report(planned(table, request))
        if self.plan:
            return 0
        torch.set_num_threads(self.threads)
        print(run(table, request, self.output, resume=self.resume, only=self.only))
        return 0


def planned(table: PaperTable, request: Request) -> str:
    """The cells of a table by system, and the processor's time that they are estimated to take."""
    from titans.experiments.reproduce.table import parts

    seconds: dict[str, list[float]] = {}
    for cell in table.cells(request):
        label, size, _ = parts(cell.name.partition("; ")[2] or cell.name)
        seconds.setdefault(f"{label}, {size}", []).append(cell.cost)
    lines = [
        f"  {name:42} {len(costs):4} × {sum(costs) / len(costs):8,.0f} s" for name, costs in seconds.items()
    ]
    total = sum(sum(costs) for costs in seconds.values())
    return "\n".join(
        ["plan: cells × processor seconds", *lines, f"  in all {total / 60:,.0f} processor minutes"]
    )
