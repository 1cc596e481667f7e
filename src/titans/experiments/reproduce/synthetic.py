"""MAD, recall of pairs and state tracking: what can each system learn, and beyond its training length?"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.baselines.systems import SYSTEMS, parse_parameters, system_config
from titans.data.mad import TASKS as MAD
from titans.data.mad import MadTask
from titans.data.recall import IGNORED, NUM_VALUES, associative_recall
from titans.data.state_tracking import STATE_TRACKING
from titans.experiments.reproduce.claims import Claim, paper
from titans.experiments.reproduce.recipe import Recipe, variants
from titans.experiments.reproduce.table import Column, comparisons
from titans.experiments.reproduce.tasks import Descent, Learned, TaskTable
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Request

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
# % that a guess gets right, and some more.
CHANCE = {"parity": 55.0, "permutations of five": 2.0}


class Synthetic(TaskTable):
    """A cell for each task, system and seed."""

    name = "paper-synthetic"
    title = "Synthetic tasks: MAD, pairs, state tracking"
    heading = (
        "Table 10 of the camera-ready (MAD), pairs (MQAR), and state tracking, which theorem 4.1 is about"
    )
    elsewhere = ("synthetic", "memory-forms")
    systems = variants(
        "lmm", "transformer", "gated-deltanet", "mamba2", "mac", "deltanet", "ttt-mlp", "lmm-linear", "lstm",
        "rwkv7",
    )  # fmt: skip
    full = Recipe("", ("250k",), steps=1200, search_steps=300, batch_size=32, length=128)
    medium = Recipe("", ("250k",), steps=400, search_steps=60, batch_size=32, length=128)
    quick = Recipe("", ("100k",), steps=10, search_steps=4, batch_size=8, length=128)
    tasks = tuple(TASKS)
    columns = (
        *(Column(task, task, 1) for task in TASKS),
        Column("mean of MAD", "mean", 1),
        *(Column(f"{task}, {LONGER} times as long", f"{task} longer", 1) for task in STATE_TRACKING),
    )

    def tokens(self, request: Request, task: str) -> float:
        recipe = self.recipe(request)
        return recipe.tokens + TESTS * recipe.length

    def task_of(self, claim: Claim) -> str:
        return claim.key.removesuffix(" longer")

    def learn(
        self, learned: Learned, recipe: Recipe, rate: float, steps: int, seed: int
    ) -> tuple[Any, float | None]:
        """Train on fresh examples; the score is the share of right labels."""
        task, count = TASKS[learned.task], parse_parameters(learned.trial.parameters)
        torch.manual_seed(seed)
        config = system_config(learned.system, count, task.vocab_size)
        model: Any = SYSTEMS[learned.system].build(config).train()
        generator, descent = np.random.default_rng([seed, 0]), Descent(model, rate, steps)
        for _ in range(steps):
            ids, labels = task.make(generator, recipe.batch_size)
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            if not descent.step(loss):
                return model, None
        return model, accuracy(model, *task.make(np.random.default_rng([seed, 1]), TESTS))

    def test(self, learned: Learned, request: Request, model: Any, score: float, seed: int) -> Numbers:
        numbers: Numbers = {learned.task: 100 * score}
        if learned.task in STATE_TRACKING:
            generator, make = np.random.default_rng([seed, 2]), STATE_TRACKING[learned.task].make
            length = LONGER * make(generator, 1)[0].shape[1]
            longer: Any = make
            share = accuracy(model, *longer(generator, TESTS // LONGER, length=length))
            numbers[f"{learned.task} longer"] = 100 * share
        return numbers

    def joined(self, results: Results) -> Results:
        together = super().joined(results)
        for cell in together.cells.values():
            mad = [cell[task] for task in _MAD if task in cell]
            if len(mad) == len(_MAD):
                cell["mean"] = sum(mad) / len(mad)
        return together

    def about(self, results: Results) -> str:
        recipe = self.recipe_of(results.budget)
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
                floor=CHANCE[task],
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
