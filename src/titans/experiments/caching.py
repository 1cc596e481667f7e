"""Do checkpoints of a memory help it recall? Associative recall with and without Memory Caching.

What was expected, and what decides, was written first: docs/notebook/2026-11-30-memory-caching.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from titans.experiments import memory_tasks
from titans.experiments.memory_arms import Arm
from titans.experiments.memory_tasks import CURRICULUM, PAIRS
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import interval, markdown
from titans.nn import Caching

SEEDS, COST = 3, 60


@dataclass(frozen=True)
class CachedArm(Arm):
    """An arm whose memory keeps checkpoints."""

    caching: Caching | None = None

    def config(self, start: str, form: str = "stable") -> dict[str, Any]:
        config = super().config(start, form)
        if self.caching is not None:
            config["memory"] |= {"caching": self.caching.describe()}
        return config


ARMS: dict[str, Arm] = {
    "no checkpoints": Arm(32),
    "every 64, log": CachedArm(32, caching=Caching(64, "log")),
    "every 64, linear": CachedArm(32, caching=Caching(64, "linear")),
    "no checkpoints, four times the state": Arm(64),
}


class MemoryCaching(Experiment):
    """A cell for each arm and seed."""

    name = "caching"
    title = "Do checkpoints of a memory help it recall"
    unit = 1.0

    def cells(self, request: Request) -> list[Cell]:
        seeds = request.seeds or (1 if request.quick else SEEDS)
        return [Cell(f"{arm}, seed {seed}", ARMS[arm], seed, COST) for seed in range(seeds) for arm in ARMS]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        return memory_tasks.pairs(cell.settings, cell.seed, request.quick, progress)

    def table(self, results: Results) -> str:
        rows = []
        for arm, made in ARMS.items():
            cells = [cell for key, cell in results.cells.items() if key.rpartition(", seed")[0] == arm]
            shown = [interval([100 * c[str(n)] for c in cells], 1) for n in PAIRS]
            rows.append([arm, *(str(kept_numbers(made, n)) for n in (PAIRS[0], PAIRS[-1])), *shown])
        head = ["memory", f"numbers a head, {PAIRS[0]} pairs", f"{PAIRS[-1]} pairs", *map(str, PAIRS)]
        return (
            "% of queries right. One linear memory layer of two heads and width 64, trained with "
            + ", ".join(f"{n} pairs for {steps} steps" for n, steps in CURRICULUM.items())
            + " of 4,096 tokens, one after the other, then tested with all of them; 512 keys, 64 values; "
            'chunks of 16 tokens, `start="sharp"`. Numbers a head: fast weights, and those of the '
            "checkpoints with their mean keys, after a text of so many pairs. Mean over seeds ± 95 % "
            f"interval (Student's t).\n\n{markdown(head, rows)}"
        )


def kept_numbers(arm: Arm, pairs: int) -> int:
    """Fast weights of a head and those of its checkpoints, after a text of so many pairs."""
    caching = arm.caching if isinstance(arm, CachedArm) else None
    kept = 0 if caching is None else caching.num_slots(4 * pairs // caching.every)
    return arm.numbers + kept * (arm.numbers + arm.head_dim)
