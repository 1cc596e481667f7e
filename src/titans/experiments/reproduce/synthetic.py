"""MAD, recall of pairs and state tracking: what can each system learn, and beyond its training length?"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.baselines.systems import SYSTEMS, parse_parameters, system_config
from titans.data.mad import TASKS as MAD
from titans.data.mad import MadTask
from titans.data.recall import IGNORED, NUM_VALUES, associative_recall
from titans.data.state_tracking import STATE_TRACKING
from titans.experiments.reproduce.claims import Claim, paper
from titans.experiments.reproduce.recipe import Recipe, variants
from titans.experiments.reproduce.table import Column, PaperTable, Trial, comparisons
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Progress, Request
from titans.train.optimizer import make_optimizer, make_schedule

PAIRS = 64
# Compression has a decoder of its own, which not every class of transformers can be given.
_MAD = {name: task for name, task in MAD.items() if name != "compression"}
TASKS: dict[str, MadTask] = {
    **_MAD,
    "pairs": MadTask(
        partial(associative_recall, num_pairs=PAIRS, num_queries=PAIRS, num_keys=2 * PAIRS),
        2 * PAIRS + NUM_VALUES,
    ),
    **STATE_TRACKING,
}
# A state is tracked over rows so many times as long as those of the training.
LONGER = 4
TESTS = 256


class Learned(NamedTuple):
    """What a cell measures: a system and a task."""

    trial: Trial
    task: str


class Synthetic(PaperTable):
    """A cell for each task, system and seed."""

    name = "paper-synthetic"
    title = "Synthetic tasks: MAD, pairs, state tracking"
    heading = (
        "Table 10 of the camera-ready (MAD), pairs (MQAR), and state tracking, which theorem 4.1 is about"
    )
    systems = variants(
        "lmm", "transformer", "gated-deltanet", "mamba2", "mac", "deltanet", "ttt-mlp", "lmm-linear", "lstm",
        "rwkv7",
    )  # fmt: skip
    quick_systems = variants("lmm", "transformer", "gated-deltanet")
    full = Recipe("", ("250k",), steps=1200, search_steps=300, batch_size=32, length=128)
    quick = Recipe("", ("100k",), steps=10, search_steps=4, batch_size=8, length=128)
    columns = (
        *(Column(task, task, 1) for task in TASKS),
        Column("mean of MAD", "mean", 1),
        *(Column(f"{task}, {LONGER} times as long", f"{task} longer", 1) for task in STATE_TRACKING),
    )

    def cells(self, request: Request) -> list[Cell]:
        return [
            replace(cell, name=f"{task}; {cell.name}", settings=Learned(cell.settings, task))
            for cell in super().cells(request)
            for task in TASKS
        ]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        learned: Learned = cell.settings
        recipe, task = self.recipe(request), TASKS[learned.task]
        began, found = time.process_time(), {}
        for rate in recipe.rates:
            _, right = learn(learned, recipe, rate, recipe.search_steps, cell.seed)
            if right is not None:
                found[rate] = right
        if not found:
            return {"diverged": True}
        best = max(found, key=found.__getitem__)
        model, right = learn(learned, recipe, best, recipe.steps, cell.seed)
        if right is None:
            return {"diverged": True}
        numbers: Numbers = {
            "rate": best,
            "parameters": sum(p.numel() for p in model.parameters()),
            learned.task: 100 * right,
        }
        if learned.task in STATE_TRACKING:
            generator = np.random.default_rng([cell.seed, 2])
            length = LONGER * task.make(generator, 1)[0].shape[1]
            make: Any = task.make
            share = accuracy(model, *make(generator, TESTS // LONGER, length=length))
            numbers[f"{learned.task} longer"] = 100 * share
        return numbers | {"training_seconds": time.process_time() - began}

    def table(self, results: Results) -> str:
        return super().table(joined(results))

    def verdicts(self, results: Results) -> list[Any]:
        return super().verdicts(joined(results))

    def about(self, results: Results) -> str:
        recipe = self.given or (self.quick if results.budget == "quick" else self.full)
        return (
            f"{self.heading}. Every system has the same parameters to 2 %, and learned each task from "
            f"{recipe.steps:,} × {recipe.batch_size} fresh examples at a learning rate of "
            f"{', '.join(f'{rate:g}' for rate in recipe.rates)}, chosen after {recipe.search_steps:,} steps; "
            "% of fresh labels that are right. Compression is left out: its decoder reads one state, which "
            "not every class has."
        )

    def claims(self) -> list[Claim]:
        better = {"lmm": ["gated-deltanet", "transformer"]}
        what = "learns more of MAD"
        columns = [name for name in paper("synthetic")["columns"] if name in TASKS]
        tracking = [
            Claim(
                f"Titans (LMM) tracks {task} further than {SYSTEMS[than].title}",
                "arXiv 2501.00663, theorem 4.1", "lmm", than, f"{task} longer",
            )
            for task in STATE_TRACKING
            for than in ("transformer", "mamba2")
        ]  # fmt: skip
        mad = [
            claim
            for name in columns
            for claim in comparisons("synthetic", "MAD", better, f"{what}, {name},", name, column=name)
        ]
        reason = "its decoder reads one state, which not every class has"
        return [
            # For the other pairs the paper's figures are equal, or the other way round.
            *(claim for claim in mad if claim.figures and claim.figures[0] > claim.figures[1]),
            *tracking,
            Claim(
                "Titans (LMM) learns more of compression", paper("synthetic")["source"], unavailable=reason
            ),
        ]


def joined(results: Results) -> Results:
    """The cells of all tasks of a system and seed as one."""
    together = Results(results.path.with_suffix(".none"), results.budget)
    for name, cell in results.cells.items():
        whole = together.cells.setdefault(name.partition("; ")[2] or name, {})
        whole |= {key: value for key, value in cell.items() if key != "diverged"}
    for cell in together.cells.values():
        mad = [cell[task] for task in _MAD if task in cell]
        if len(mad) == len(_MAD):
            cell["mean"] = sum(mad) / len(mad)
    return together


def learn(
    learned: Learned, recipe: Recipe, rate: float, steps: int, seed: int
) -> tuple[nn.Module, float | None]:
    """Train on fresh examples; the model and its share of right labels, None where it diverges."""
    task, name = TASKS[learned.task], learned.trial.variant.system
    system, count = SYSTEMS[name], parse_parameters(learned.trial.parameters)
    torch.manual_seed(seed)
    model: Any = system.build(system_config(name, count, task.vocab_size)).train()
    generator = np.random.default_rng([seed, 0])
    optimizer = make_optimizer(model, rate, 0.1, (0.9, 0.98))
    schedule = make_schedule(optimizer, steps, steps // 10, 0.05)
    for _ in range(steps):
        ids, labels = task.make(generator, recipe.batch_size)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            return model, None
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, accuracy(model, *task.make(np.random.default_rng([seed, 1]), TESTS))


@torch.no_grad()
def accuracy(model: Any, ids: Tensor, labels: Tensor) -> float:
    """The share of the labels that is predicted."""
    right = asked = 0
    model.eval()
    for some, wanted in zip(ids.split(16), labels.split(16), strict=True):
        mask = wanted != IGNORED
        found = model(input_ids=some, use_cache=False).logits.argmax(-1)
        right, asked = right + int((found == wanted)[mask].sum()), asked + int(mask.sum())
    return right / asked
