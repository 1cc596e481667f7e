"""`titans reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
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
    "language-bpe",
    "needles",
    "ablation",
    "depth",
    "throughput",
    "synthetic",
    "babi-long",
    "series",
    "dna",
    "commonsense",
    "claims",
    "questions",
]


@dataclass(frozen=True)
class Reproduce:
    """Test what the paper claims in one of its tables: train every system, measure, and give verdicts.

    Example: titans reproduce language --budget quick

    Prints the plan with its estimated time first, and the page of the table at the end. Finished cells are
    kept in the output folder: --resume goes on from them. `titans reproduce claims` draws the page of all
    claims from the results in --output, and the pages of the tables anew.
    """

    table: Annotated[Table, tyro.conf.Positional]
    """Which table; claims for the page of all, questions for what else its results answer."""
    budget: Literal["quick", "medium", "full"] = "quick"
    """quick: see in minutes that it runs, which decides nothing. medium: some hours, for a verdict on every
    claim, with models trained short. full: many hours, see the plan."""
    seeds: int | None = None
    """How many seeds, from 0 on; by default 1 of a quick run, else 3."""
    resume: bool = False
    """Go on with the results in the output folder."""
    output: Path = Path("runs/reproduce")
    """Folder of pages, JSON files and, below models, of trained systems."""
    only: tuple[str, ...] = ("*",)
    """Patterns of the cells to plan and measure: 'lmm, *' 'transformer, *' for the claims about these two."""
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
        if self.table in ("claims", "questions"):
            if not self.output.is_dir():
                raise UsageError(
                    f"output={str(self.output)!r} does not exist: measure a table first, or give --output "
                    "docs/results"
                )
            from titans.experiments.reproduce.page import write_claims
            from titans.experiments.reproduce.questions import write_questions

            write = {"claims": write_claims, "questions": write_questions}[self.table]
            print(write(self.output))
            return 0
        import torch

        from titans.experiments.reproduce.catalog import TABLES
        from titans.experiments.runner import Request, run

        table = TABLES[self.table]
        request = Request(self.budget, self.seeds, work=self.output / self.budget)
        report(planned(table, request, self.only))
        if self.plan:
            return 0
        torch.set_num_threads(self.threads)
        print(run(table, request, self.output, resume=self.resume, only=self.only))
        return 0


def planned(table: PaperTable, request: Request, only: Sequence[str] = ("*",)) -> str:
    """The measurements that patterns choose in their order, the processor's time that they are estimated to
    take, after how much of it how many claims are measured, and whether that may decide them."""
    from titans.experiments.reproduce.claims import FEWEST_SEEDS
    from titans.experiments.reproduce.order import decided_after
    from titans.experiments.reproduce.table import SEEDS, START_SECONDS
    from titans.experiments.runner import named

    costs: dict[str, list[float]] = {}
    for cell in named(table.cells(request), only):
        costs.setdefault(cell.name.rpartition(", seed")[0], []).append(cell.cost)
    claims = table.decided_by(request)
    lines, minutes = [], START_SECONDS / 60
    for (name, seconds), count in zip(costs.items(), decided_after([*costs], claims), strict=True):
        minutes += sum(seconds) / 60
        lines.append(
            f"  {name:46} {len(seconds):2} × {seconds[0]:6,.0f} s  after {minutes:6,.0f} min "
            f"{count:2} of {len(claims)} claims measured"
        )
    if request.quick:
        decides = "a quick run decides no claim"
    elif (request.seeds or SEEDS) < FEWEST_SEEDS:
        decides = f"fewer than {FEWEST_SEEDS} seeds decide no claim"
    else:
        decides = "a claim is decided where the interval of its difference leaves out 0"
    return "\n".join(
        [
            "plan: measurements in order, seeds × processor seconds",
            *lines,
            f"  in all {minutes:,.0f} processor minutes, start included; the first run on a machine also "
            "compiles kernels (about 2 minutes)",
            "  estimates by speeds of training: measurements of quick runs took 0.3 to 1.9 times theirs",
            f"  measured is not decided: {decides}",
        ]
    )
