"""What do the memories of the family recall and predict, in the same block, with the same training?

Each system of docs/how/family.md is a setting of this library's memory, of about 4,096 fast weights a head.
The tasks, the budget and the learning rates are those of `memory-forms`, where they were chosen for Titans'
memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from titans.baselines.systems import SYSTEMS
from titans.baselines.systems.system import Sizes
from titans.experiments import memory_tasks
from titans.experiments.memory_arms import CHUNK_SIZE, HEADS
from titans.experiments.memory_tasks import CURRICULUM, PAIRS, TEXT_STEPS
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import interval, markdown

SEEDS = 3
# Approximate processor seconds of a cell of the fastest; rows that run in torch take several times as long.
COSTS = {"pairs": 35, "text": 20}
_SLOW = 200
_DEEP: dict[str, Any] = {"head_dim": 32, "memory_depth": 2, "memory_expansion": 2}
_NO_MOMENTUM: dict[str, Any] = {"max_momentum": 0.0}
_STABLE = "with the default form's bounds on step sizes and lengths"


@dataclass(frozen=True)
class Row:
    """A system of the family.

    memory: `memory` of `TitansConfig`. fields: others that differ from a linear memory of 64 × 64. changed:
    what is not as in the system's paper. times: approximate cost, relative to a linear memory's.
    """

    memory: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    changed: str = ""
    times: float = 1.0

    def config(self, start: str) -> dict[str, Any]:
        """Fields of `TitansConfig`."""
        usual = dict(
            num_attention_heads=HEADS,
            head_dim=64,
            chunk_size=CHUNK_SIZE,
            memory_depth=1,
            memory_expansion=1,
        )
        # The memories of Hope make their own keys.
        begins = {} if self.fields.get("variant") == "hope" else {"start": start}
        return {**usual, **self.fields, "memory": {**self.memory, **begins}}


def _system(name: str) -> Row:
    """A system of `titans train --model NAME`."""
    config = SYSTEMS[name].config(Sizes(256, 64, 128, 1))
    fields = {f: getattr(config, f) for f in ("chunk_size", "memory_depth", "memory_expansion")}
    return Row(config.to_dict()["memory"], {**(_DEEP if config.memory_depth == 2 else {}), **fields})


def _forgetting(row: Row, changed: str) -> Row:
    """The same memory with the usual half-lives."""
    memory = {name: value for name, value in row.memory.items() if name != "half_lives"}
    return replace(row, memory=memory, changed=changed)


ROWS: dict[str, Row] = {
    "Titans, linear": Row(),
    "Titans, deep": Row({}, _DEEP),
    "Titans, channel-wise forgetting": Row({"form": {"forget_by_row": True}}, times=12),
    "DeltaNet": _system("deltanet"),
    "Gated DeltaNet": _forgetting(_system("deltanet"), "the gradient is taken before forgetting"),
    "Momentum DeltaNet": replace(
        _system("momentum-deltanet"), changed="the gradient is taken before forgetting"
    ),
    "TTT-Linear": _system("ttt-linear"),
    "TTT-MLP": replace(
        _system("ttt-mlp"), changed="the hidden layer is twice as wide as the head, not four times"
    ),
    "Yaad": Row({"form": _NO_MOMENTUM, "objective": "yaad"}, _DEEP, _STABLE, times=3),
    "Moneta": Row(
        {"form": _NO_MOMENTUM, "objective": {"name": "lp", "p": 3.0}, "rule": "moneta"},
        _DEEP,
        _STABLE,
        times=16,
    ),
    "Memora": Row({"form": _NO_MOMENTUM, "rule": "memora"}, _DEEP, _STABLE, times=11),
    "OmegaNet": Row({"form": _NO_MOMENTUM, "rule": {"name": "omega", "window": 16}}, {}, _STABLE, times=3),
    "Atlas": Row(
        {"rule": {"name": "atlas", "window": 16}, "features": "polynomial", "feature_size": 128},
        {"head_dim": 32},
        _STABLE,
        times=5,
    ),
    "LaCT": Row(
        {
            "form": {"name": "paper", "norm": False, "residual": False, "gated": True},
            "objective": "dot_product",
            "rule": "lact",
        },
        {"head_dim": 32, "memory_depth": 3, "memory_expansion": 1, "chunk_size": 64},
        "chunks of 64 tokens, not of thousands",
        times=2,
    ),
    "Memory Caching": Row(
        {"caching": {"every": 128, "keep": "log"}}, {}, "every 128 tokens, log-spaced", times=1.5
    ),
    "Hope": Row(
        {"periods": [64, 256]}, {"variant": "hope", "head_dim": 32}, "memories are matrices", times=5
    ),
}


class Measured(NamedTuple):
    """What a cell measures: a task, and a name in `ROWS`."""

    task: str
    row: str


class Family(Experiment):
    """A cell for each system, task and seed."""

    name = "family"
    title = "The memories of the family"
    unit = 1.0

    def cells(self, request: Request) -> list[Cell]:
        seeds = request.seeds or (1 if request.quick else SEEDS)
        cells = [
            Cell(f"{task}, {name}, seed {seed}", Measured(task, name), seed, COSTS[task] * row.times)
            for seed in range(seeds)
            for task in COSTS
            for name, row in ROWS.items()
        ]
        # All seeds of the fast systems first.
        return sorted(cells, key=lambda cell: cell.cost > _SLOW)

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        """The numbers of a cell; `diverged` if a gradient was not finite."""
        measured: Measured = cell.settings
        row, quick = ROWS[measured.row], request.quick
        try:
            if measured.task == "pairs":
                return memory_tasks.pairs(row, cell.seed, quick, progress)
            return memory_tasks.text(row, "sharp", cell.seed, quick, progress)
        except (RuntimeError, ArithmeticError) as error:
            if "finite" not in str(error):
                raise
            return {"diverged": True}

    def table(self, results: Results) -> str:
        head, rows = ["system", "seeds (pairs / text)"], []
        for name in ROWS:
            found = {task: _cells(results, task, name) for task in COSTS}
            good = {task: [c for c in cells if "diverged" not in c] for task, cells in found.items()}
            lost = sum(len(found[task]) - len(good[task]) for task in COSTS)
            shown = [interval([100 * c[str(n)] for c in good["pairs"]], 1) for n in PAIRS]
            shown += [interval([c[key] for c in good["text"]], 3) for key in ("windows", "stream")]
            seeds = " / ".join(str(len(cells)) for cells in good.values())
            rows.append([name, seeds + (f", {lost} diverged" if lost else ""), *shown])
        changed = [f"- {name}: {row.changed}." for name, row in ROWS.items() if row.changed]
        stages = ", ".join(f"{n} pairs for {steps} steps" for n, steps in CURRICULUM.items())
        parts = [
            "Each system of [the table of the family](../how/family.md) as the memory of one LMM block of "
            "width 64 with two heads, of about 4,096 fast weights a head, trained as in "
            "[memory forms](memory-forms.md), where budget and learning rates were chosen for Titans' "
            'memory: a system that needs others is worse off. `start="sharp"`. Mean over seeds ± 95 % '
            "interval (Student's t).",
            f"Pairs: associative recall in % of queries, trained with {stages} of 4,096 tokens, one after "
            f"the other. Text: held-out bits per byte after {TEXT_STEPS} steps of 4,096 bytes at equal "
            "parameters, of windows of 256 bytes and of one stream of 16 KiB.",
            markdown([*head, *(f"{n} pairs" for n in PAIRS), "text, windows", "text, one stream"], rows),
            "What is not as in the paper of a system:\n\n" + "\n".join(changed),
        ]
        return "\n\n".join(parts)


def _cells(results: Results, task: str, name: str) -> list[Numbers]:
    start = f"{task}, {name}, seed "
    return [cell for key, cell in results.cells.items() if key.startswith(start)]
