"""A training that evaluates on what was held out, keeps what was best there, and resumes to the bit."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from titans.train.checkpoint import (
    alone_in,
    atomic_folder,
    checkpoints,
    delete_old,
    delete_unfinished,
    load_optimizer,
    read_tensors,
    save_optimizer,
    write_json,
    writing,
)
from titans.train.graft.settings import SETTINGS_FILE, LoopSettings
from titans.train.interrupt import stops_on_interrupt
from titans.train.optimizer import rate_factor

_WEIGHTS, _BEST, _CARRIED, _PROGRESS = (
    "weights.safetensors",
    "best.safetensors",
    "carried.safetensors",
    "progress",
)
# Evaluations by name: the best one, and the one before the training where there is one.
HELD_OUT, UNTRAINED = "held_out", "untrained"
_WARMUP, _LEAST_RATE, _MOST_NORM = 10, 0.1, 1.0
_LOG_EVERY = 5
# What may change when a run continues.
_FREE = ("minutes", "save_every")
# What an evaluation finds: a dataclass of numbers, and of dicts of numbers.
Found = TypeVar("Found")


@dataclass
class _Progress:
    """What a checkpoint holds in addition to weights and the optimizer's state."""

    step: int = 0
    best_step: int = 0
    since_best: int = 0


@dataclass(frozen=True)
class LoopResult(Generic[Found]):
    """step: of the end. best_step: whose weights were kept, 0 for those before the training. held_out: the
    evaluation at that step, None before the first. untrained: that before the training, if there was one.
    finished: whether the training ended by itself, and not by the time allowed or an interruption."""

    step: int
    best_step: int
    held_out: Found | None
    untrained: Found | None
    finished: bool


class TrainingLoop(ABC, Generic[Found]):
    """Trains a module in place, and leaves in it the weights that are best on what was held out.

    Args:
        module: what is trained.
        groups: of AdamW, of those of its parameters that are trained; "lr" is the peak rate of each.
        folder: for checkpoints and metrics.jsonl.

    Raises:
        ValueError: for settings that cannot be used.
    """

    found_class: ClassVar[type[Any]]

    def __init__(
        self, module: nn.Module, groups: Sequence[dict[str, Any]], folder: Path, settings: LoopSettings
    ) -> None:
        settings.check()
        self.module, self.folder, self.settings = module, folder, settings
        self._groups = [{**group, "peak": group["lr"]} for group in groups]
        self.optimizer = torch.optim.AdamW(self._groups, betas=(0.9, 0.95))
        trained = {id(parameter) for group in self._groups for parameter in group["params"]}
        self._parameters = {name: p for name, p in module.named_parameters() if id(p) in trained}
        self.progress = _Progress()
        self.found: dict[str, Found] = {}
        self.stop_requested = False

    @abstractmethod
    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step, to be minimised, and what is reported about it."""

    @abstractmethod
    def evaluate(self) -> Found:
        """Measure what was held out."""

    @abstractmethod
    def score(self, found: Found) -> float:
        """Of an evaluation; lower is better."""

    def is_better(self, found: Found) -> bool:
        """Whether the weights of this evaluation are to be kept instead of the best so far."""
        best = self.found.get(HELD_OUT)
        return best is None or self.score(found) < self.score(best)

    def before_the_first_step(self, on_log: Callable[[dict[str, Any]], None]) -> None:
        """Called where no checkpoint is found."""

    @abstractmethod
    def depends_on(self) -> dict[str, Any]:
        """What a checkpoint depends on in addition to the settings, as JSON has it."""

    @abstractmethod
    def carried(self) -> dict[str, Tensor]:
        """What goes on from step to step, such as memories."""

    @abstractmethod
    def carry_on(self, tensors: dict[str, Tensor]) -> None:
        """Continue with what `carried` gave before the interruption."""

    def run(self, on_log: Callable[[dict[str, Any]], None] = lambda _: None) -> LoopResult[Found]:
        """Train until the steps, the patience or the minutes are over, or Ctrl-C; then save.

        Raises:
            ValueError: for a folder of another training, or one that another process trains in.
            FloatingPointError: if the loss or a gradient is not finite; the last checkpoint is still there.
            OSError: if the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone_in(self.folder), stops_on_interrupt(self):
            self._begin(on_log)
            return self._run(on_log)

    def _run(self, on_log: Callable[[dict[str, Any]], None]) -> LoopResult[Found]:
        settings, progress, began = self.settings, self.progress, time.perf_counter()
        while progress.step < settings.steps and progress.since_best < settings.patience:
            loss, about = self._step()
            progress.step += 1
            if progress.step % _LOG_EVERY == 0 or progress.step == settings.steps:
                self._log(on_log, {"kind": "train", "loss": loss, **about})
            if progress.step % settings.evaluate_every == 0 or progress.step == settings.steps:
                self._evaluate(on_log)
            late = settings.minutes is not None and time.perf_counter() - began > 60 * settings.minutes
            if self.stop_requested or late:
                self._save()
                return self._result(finished=False)
            if progress.step % settings.save_every == 0:
                self._save()
        self._save()
        return self._result(finished=True)

    def _step(self) -> tuple[float, dict[str, float]]:
        step = self.progress.step
        factor = rate_factor(step, self.settings.steps, min(_WARMUP, self.settings.steps // 10), _LEAST_RATE)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad()
        loss, about = self.loss(step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*self._parameters.values()], _MOST_NORM)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise FloatingPointError(
                f"step {step}: the loss is {float(loss.detach())} and the gradient {float(norm)}: give a "
                "smaller learning rate, and another folder"
            )
        self.optimizer.step()
        return float(loss.detach()), about

    def _evaluate(self, on_log: Callable[[dict[str, Any]], None]) -> None:
        progress, found = self.progress, self.evaluate()
        progress.since_best += 1
        if self.is_better(found):
            progress.best_step, progress.since_best = progress.step, 0
            self._best, self.found[HELD_OUT] = self._weights(), found
        self.report(on_log, found)

    def report(self, on_log: Callable[[dict[str, Any]], None], found: Found) -> None:
        """Log an evaluation."""
        numbers: Any = found
        self._log(on_log, {"kind": "held out", **asdict(numbers), "score": self.score(found)})

    def _log(self, on_log: Callable[[dict[str, Any]], None], line: dict[str, Any]) -> None:
        line = {"step": self.progress.step, "steps": self.settings.steps} | line
        path = self.folder / "metrics.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        on_log(line)

    def _weights(self) -> dict[str, Tensor]:
        """A copy of what training changes."""
        return {name: value.detach().cpu().clone() for name, value in self._parameters.items()}

    def _begin(self, on_log: Callable[[dict[str, Any]], None]) -> None:
        """Continue from the newest checkpoint, or start."""
        delete_unfinished(self.folder)
        fixed = {name: value for name, value in asdict(self.settings).items() if name not in _FREE}
        fixed = json.loads(json.dumps({**fixed, **self.depends_on()}))
        path = self.folder / SETTINGS_FILE
        if not path.exists():
            with writing(path):
                write_json(path, fixed)
        known = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(fixed.keys() | known.keys()):
            if known.get(name) != fixed.get(name):
                raise ValueError(
                    f"{self.folder} was begun with {name}={known.get(name)!r}, now it is "
                    f"{fixed.get(name)!r}: give the same, or another folder"
                )
        if not (found := checkpoints(self.folder)):
            self._best = self._weights()
            self.before_the_first_step(on_log)
            return
        about, weights = read_tensors(found[-1] / _WEIGHTS)
        self._load(weights)
        load_optimizer(found[-1], self.optimizer, self.module)
        self.progress = _Progress(**json.loads(about[_PROGRESS]))
        about, self._best = read_tensors(found[-1] / _BEST)
        self.found = {
            name: self.found_class(**json.loads(about[name]))
            for name in (HELD_OUT, UNTRAINED)
            if name in about
        }
        self.carry_on(read_tensors(found[-1] / _CARRIED)[1])

    def _load(self, weights: dict[str, Tensor]) -> None:
        self.module.load_state_dict(weights, strict=False)

    def _save(self) -> None:
        target = self.folder / f"checkpoint-{self.progress.step}"
        if target.exists():
            return
        with atomic_folder(target) as folder:
            save_file(self._weights(), folder / _WEIGHTS, {_PROGRESS: json.dumps(asdict(self.progress))})
            found: dict[str, Any] = {**self.found}
            save_file(
                self._best, folder / _BEST, {name: json.dumps(asdict(one)) for name, one in found.items()}
            )
            carried = {name: value.cpu().contiguous() for name, value in self.carried().items()}
            save_file(carried, folder / _CARRIED)
            save_optimizer(folder, self.optimizer, self.module)
        delete_old(self.folder)

    def _result(self, *, finished: bool) -> LoopResult[Found]:
        if finished:
            self._load(self._best)
        progress, found = self.progress, self.found
        return LoopResult(
            progress.step, progress.best_step, found.get(HELD_OUT), found.get(UNTRAINED), finished
        )
