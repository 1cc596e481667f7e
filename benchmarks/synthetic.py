"""What a small memory can learn to do: the six tasks of MAD, and recall of 32 to 1,024 pairs at two depths.

    python benchmarks/synthetic.py                              # what is missing, then the tables
    python benchmarks/synthetic.py --worker 0/2                 # every second run
    python benchmarks/synthetic.py --only mad --variants lmm    # these alone

MAD: two layers of width 128 (the tasks' own sizes otherwise), 32 fresh examples a step in place of MAD's 200
epochs of 12,800. Pairs: two layers, 8,192 numbers of memory a layer as two heads of one 64 × 64 matrix or two
of two layers of 32 × 64. Each finished run is kept in benchmarks/results/synthetic.json and not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kept import known
from torch import Tensor, nn

from titans.data.mad import TASKS
from titans.data.recall import IGNORED, NUM_VALUES, associative_recall
from titans.hf import TitansConfig, TitansForCausalLM
from titans.train.optimizer import make_optimizer, make_schedule

RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / "synthetic.json"
# The camera-ready's row for Titans (NeurIPS 2025, table 10); its recall is the noisy one.
PAPER = {
    "compression": 49.6,
    "noisy recall": 100.0,
    "fuzzy recall": 49.7,
    "selective copying": 99.4,
    "memorization": 83.5,
}
VARIANTS = ("lmm", "mac", "mag", "transformer")
PAIRS = (32, 128, 256, 512, 1024)
DEPTHS: dict[int, dict[str, int]] = {
    1: dict(memory_depth=1, num_attention_heads=2, head_dim=64),
    2: dict(memory_depth=2, num_attention_heads=2, head_dim=32, memory_expansion=2),
}
SEEDS = (0,)
# After 2,000 steps compression is still being learned.
STEPS = {"compression": 4000}


@dataclass(frozen=True)
class Run:
    """A model and what it learns. task: of MAD, or "pairs"."""

    task: str
    variant: str
    seed: int
    steps: int
    batch: int
    learning_rate: float
    pairs: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        what = f"{self.pairs} pairs, depth {self.config['memory_depth']}" if self.pairs else self.task
        return f"{what}, {self.variant}, seed {self.seed}"

    @property
    def vocab_size(self) -> int:
        return 2 * self.pairs + NUM_VALUES if self.pairs else TASKS[self.task].vocab_size

    def make(self, generator: np.random.Generator, batch: int) -> tuple[Tensor, Tensor]:
        if self.pairs:
            return associative_recall(generator, batch, self.pairs, self.pairs, 2 * self.pairs)
        return TASKS[self.task].make(generator, batch)


class Learner(nn.Module):
    """A model, and for compression the decoder that makes all tokens of its last output."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        config = dict(
            vocab_size=run.vocab_size,
            num_hidden_layers=2,
            initializer_range=0.1,
            memory_induction_init=run.variant != "transformer",
            memory_combination="sum" if run.variant in ("mac", "mag") else "gate",
        )
        self.model = TitansForCausalLM(
            TitansConfig.from_preset("tiny", variant=run.variant, **{**config, **run.config})
        )
        width = self.model.config.hidden_size
        self.decoder: nn.Module | None = None
        if run.task == "compression":
            self.decoder = nn.Sequential(
                nn.Linear(2 * width, 4 * width), nn.SiLU(), nn.Linear(4 * width, run.vocab_size)
            )
            rates = torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
            angles = torch.arange(1024)[:, None] * rates
            self.register_buffer("places", torch.cat([angles.sin(), angles.cos()], -1), persistent=False)

    def forward(self, ids: Tensor, count: int) -> Tensor:
        """Logits for `count` labels."""
        if self.decoder is None:
            return self.model(ids, use_cache=False).logits
        last = self.model.model(ids, use_cache=False).last_hidden_state[:, -1:]
        places: Tensor = self.get_buffer("places")[:count]
        both = [last.expand(-1, count, -1), places.expand(len(ids), -1, -1)]
        return self.decoder(torch.cat(both, -1))


def learn(run: Run) -> dict[str, Any]:
    torch.manual_seed(run.seed)
    learner, generator = Learner(run), np.random.default_rng(run.seed)
    optimizer = make_optimizer(learner, run.learning_rate, 0.1, (0.9, 0.98))
    schedule = make_schedule(optimizer, run.steps, run.steps // 10, 0.05)
    test = run.make(np.random.default_rng(10_000), 1280 if run.pairs < 256 else 64)
    curve, began = [], time.perf_counter()
    for step in range(1, run.steps + 1):
        ids, labels = run.make(generator, run.batch)
        logits = learner(ids, labels.shape[1])
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(run.steps // 8, 1) == 0 or step == run.steps:
            curve.append({"step": step, "accuracy": accuracy(learner, *test)})
            left = (run.steps - step) * (time.perf_counter() - began) / step
            print(
                f"{run.name}: step {step}/{run.steps}, {curve[-1]['accuracy']:.1%}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
    return {
        "accuracy": curve[-1]["accuracy"],
        "curve": curve,
        "tokens": run.steps * run.batch * test[0].shape[1],
        "seconds": time.perf_counter() - began,
        "parameters": sum(p.numel() for p in learner.parameters()),
    }


@torch.no_grad()
def accuracy(learner: Learner, ids: Tensor, labels: Tensor) -> float:
    right = asked = 0
    for some, wanted in zip(ids.split(64), labels.split(64), strict=True):
        told = learner(some, wanted.shape[1]).argmax(-1)
        mask = wanted != IGNORED
        right, asked = right + int((told == wanted)[mask].sum()), asked + int(mask.sum())
    return right / asked


def planned(only: str, variants: list[str]) -> list[Run]:
    runs = []
    if only != "pairs":
        for seed in SEEDS:
            for task in TASKS:
                steps = STEPS.get(task, 2000)
                runs += [Run(task, variant, seed, steps, 32, 2e-3) for variant in variants]
    if only != "mad":
        for seed in SEEDS:
            for pairs in PAIRS:
                batch = max(8192 // (4 * pairs), 2)
                for config in DEPTHS.values():
                    runs.append(Run("pairs", "lmm", seed, 400, batch, 3e-3, pairs, config))
    return runs


def report() -> None:
    with known(KEPT) as found:
        found = dict(found)

    def cell(name: str) -> str:
        values = [100 * found[n]["accuracy"] for seed in SEEDS if (n := f"{name}, seed {seed}") in found]
        return ", ".join(f"{value:.1f}" for value in values)

    lines = [
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; "
        "`python benchmarks/synthetic.py`. % of what is asked for that is right, on examples never seen; "
        f"seeds {', '.join(map(str, SEEDS))}. No learning rate was searched for.",
        "",
        "| MAD | paper's Titans | " + " | ".join(VARIANTS) + " |",
        "|---" * (len(VARIANTS) + 2) + "|",
    ]
    for task in TASKS:
        cells = [cell(f"{task}, {variant}") for variant in VARIANTS]
        lines.append(f"| {task} | {PAPER.get(task, '–')} | " + " | ".join(cells) + " |")
    lines += ["", "| pairs | depth 1 | depth 2, equal state |", "|---|---|---|"]
    for pairs in PAIRS:
        cells = [cell(f"{pairs} pairs, depth {depth}, lmm") for depth in DEPTHS]
        lines.append(f"| {pairs} | " + " | ".join(cells) + " |")
    (RESULTS / "synthetic.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", default="0/1", help="which part of the runs, such as 0/2")
    parser.add_argument("--only", default="all", choices=["all", "mad", "pairs"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    part, parts = map(int, arguments.worker.split("/"))
    torch.set_num_threads(1)
    for number, run in enumerate(planned(arguments.only, arguments.variants)):
        with known(KEPT) as found:
            done = run.name in found
        if number % parts == part and not done:
            result = learn(run)
            with known(KEPT) as found:
                found[run.name] = result
        report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
