"""A table of several tasks: every system is trained anew for each."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from titans.baselines.systems import SYSTEMS
from titans.experiments.reproduce.claims import Claim, Verdict
from titans.experiments.reproduce.recipe import Recipe, speed
from titans.experiments.reproduce.table import PaperTable, Planned, Trial, at_the_edge
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Progress, Request
from titans.train.optimizer import make_optimizer, make_schedule


class Learned(NamedTuple):
    """What a cell measures: a system and a task."""

    trial: Trial
    task: str

    @property
    def system(self) -> str:
        return self.trial.variant.system


class TaskTable(PaperTable):
    """A cell for each task, system and seed.

    tasks: their names. untrained: labels of systems without a learning rate. factors: by which the rates of a
    system are multiplied, where its best is not among those of the others.
    """

    counted = "parameters, of the task with most"
    tasks: ClassVar[Sequence[str]]
    untrained: ClassVar[Sequence[str]] = ()
    factors: ClassVar[Mapping[str, float]] = {}

    @abstractmethod
    def learn(
        self, learned: Learned, recipe: Recipe, rate: float, steps: int, seed: int
    ) -> tuple[Any, float | None]:
        """Train for so many steps: the model and its score on validation examples, where more is better.

        The score is None where it diverges.
        """

    @abstractmethod
    def test(self, learned: Learned, request: Request, model: Any, score: float, seed: int) -> Numbers:
        """What is measured of a trained model."""

    def tokens(self, request: Request, task: str) -> float:
        """That a system reads in a cell, as if all of them were read in training, for the plan."""
        return self.recipe(request).tokens

    def planned(self, request: Request) -> list[Planned]:
        return [
            Planned(f"{task}; {one.name}", Learned(one.settings, task), self._seconds(request, one, task))
            for one in super().planned(request)
            for task in self.tasks
        ]

    def _seconds(self, request: Request, one: Planned, task: str) -> float:
        trial: Trial = one.settings
        # What is no system is fitted in a moment.
        if trial.variant.system not in SYSTEMS:
            return 2.0
        return 1.0 + self.tokens(request, task) / speed(trial.variant.system, trial.parameters)

    def needed(self, claim: Claim, size: str) -> set[str]:
        return {f"{self.task_of(claim)}; {name}" for name in super().needed(claim, size)}

    def task_of(self, claim: Claim) -> str:
        """The task that a claim is about."""
        return claim.key

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        learned: Learned = cell.settings
        recipe, began = self.recipe(request), time.process_time()
        searches = learned.trial.variant.label not in self.untrained
        found: dict[float, float] = {}
        factor = self.factors.get(learned.trial.variant.label, 1.0)
        for rate in [factor * rate for rate in recipe.rates] if searches else ():
            score = self.learn(learned, recipe, rate, recipe.search_steps, cell.seed)[1]
            if score is not None:
                found[rate] = score
        if searches and not found:
            return {"diverged": True}
        best = max(found, key=found.__getitem__) if searches else 0.0
        model, score = self.learn(learned, recipe, best, recipe.steps, cell.seed)
        if score is None:
            return {"diverged": True}
        numbers: Numbers = {"rate": best, "tried": [[rate, value] for rate, value in found.items()]}
        if isinstance(model, nn.Module):
            numbers["parameters"] = sum(p.numel() for p in model.parameters())
        numbers |= self.test(learned, request, model, score, cell.seed)
        return numbers | {"training_seconds": time.process_time() - began}

    def table(self, results: Results) -> str:
        return self.drawn(self.joined(results), at_the_edge(results))

    def verdicts(self, results: Results) -> list[Verdict]:
        return super().verdicts(self.joined(results))

    def joined(self, results: Results) -> Results:
        """The cells of all tasks of a system and seed as one."""
        together = Results(results.path.with_suffix(".none"), results.budget)
        for name, cell in results.cells.items():
            whole = together.cells.setdefault(name.partition("; ")[2] or name, {})
            most = max(whole.get("parameters", 0), cell.get("parameters", 0))
            whole |= {key: value for key, value in cell.items() if key != "diverged"}
            whole |= {"parameters": most} if most else {}
        return together


class Descent:
    """AdamW with warm-up and a cosine, as every system of a task has it."""

    def __init__(self, model: nn.Module, rate: float, steps: int) -> None:
        self.model = model
        self.optimizer = make_optimizer(model, rate, 0.1, (0.9, 0.98))
        self.schedule = make_schedule(self.optimizer, steps, steps // 10, 0.05)

    def step(self, loss: Tensor) -> bool:
        """A step; False, without one, where the gradient is not finite."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(norm):
            return False
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return True
