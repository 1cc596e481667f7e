"""A training that evaluates on held-out text, keeps what was best there, and resumes to the bit."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
_WARMUP, _LEAST_RATE, _MOST_NORM = 10, 0.1, 1.0
_LOG_EVERY = 5
# What may change when a run continues.
_FREE = ("minutes", "save_every")


@dataclass(frozen=True)
class HeldOutText:
    """losses: for each held-out document the mean loss of its tokens in nats. base: that of the base, in its
    window, without a memory."""

    losses: dict[str, float]
    base: dict[str, float]

    @property
    def changes(self) -> dict[str, float]:
        """Of each document the change against the base, as a share of its loss."""
        return {name: loss / self.base[name] - 1 for name, loss in self.losses.items()}

    @property
    def mean(self) -> float:
        """Mean of the changes; lower is better."""
        return float(np.mean([*self.changes.values()]))

    def harms(self, untrained: HeldOutText) -> bool:
        """Whether any document is predicted worse than without training."""
        return any(loss > untrained.losses[name] for name, loss in self.losses.items())


@dataclass
class _Progress:
    """What a checkpoint holds beside weights and the optimizer's state."""

    step: int = 0
    best_step: int = 0
    since_best: int = 0


@dataclass(frozen=True)
class LoopResult:
    """step: of the end. best_step: whose weights were kept, 0 for those before the training. held_out: at
    that step; untrained: before the training. finished: whether the training ended by itself, and not by the
    time allowed or an interruption."""

    step: int
    best_step: int
    held_out: HeldOutText
    untrained: HeldOutText
    finished: bool


class TrainingLoop(ABC):
    """Trains a module in place, and leaves in it the weights that are best on held-out text.

    These are those with which no held-out document is predicted worse than before the training, and of those
    the ones with the least mean loss, relative to the base's; if there are none, the weights from before.

    Args:
        module: what is trained.
        groups: of AdamW, of those of its parameters that are trained; "lr" is the peak rate of each.
        folder: for checkpoints and metrics.jsonl.

    Raises:
        ValueError: for settings that cannot be used.
    """

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
        self.stop_requested = False

    @abstractmethod
    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step, to be minimised, and what is reported about it."""

    @abstractmethod
    def evaluate(self) -> HeldOutText:
        """Read the held-out text."""

    @abstractmethod
    def depends_on(self) -> dict[str, Any]:
        """What a checkpoint depends on beside the settings, as JSON has it."""

    @abstractmethod
    def carried(self) -> dict[str, Tensor]:
        """What goes on from step to step, such as memories."""

    @abstractmethod
    def carry_on(self, tensors: dict[str, Tensor]) -> None:
        """Continue with what `carried` gave before the interruption."""

    def run(self, on_log: Callable[[dict[str, Any]], None] = lambda _: None) -> LoopResult:
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

    def _run(self, on_log: Callable[[dict[str, Any]], None]) -> LoopResult:
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
        if found.mean < self._best_found.mean and not found.harms(self._untrained):
            progress.best_step, progress.since_best = progress.step, 0
            self._best, self._best_found = self._weights(), found
        self._log(on_log, {"kind": "held out", **asdict(found), "mean": found.mean})

    def _log(self, on_log: Callable[[dict[str, Any]], None], line: dict[str, Any]) -> None:
        line = {"step": self.progress.step, "steps": self.settings.steps} | line
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
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
            write_json(path, fixed)
        known = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(fixed.keys() | known.keys()):
            if known.get(name) != fixed.get(name):
                raise ValueError(
                    f"{self.folder} was begun with {name}={known.get(name)!r}, now it is "
                    f"{fixed.get(name)!r}: give the same, or another folder"
                )
        if not (found := checkpoints(self.folder)):
            self._best, self._untrained = self._weights(), self.evaluate()
            self._best_found = self._untrained
            self._log(on_log, {"kind": "held out", **asdict(self._untrained), "mean": self._untrained.mean})
            return
        about, weights = read_tensors(found[-1] / _WEIGHTS)
        self._load(weights)
        load_optimizer(found[-1], self.optimizer, self.module)
        self.progress = _Progress(**json.loads(about[_PROGRESS]))
        about, self._best = read_tensors(found[-1] / _BEST)
        self._best_found, self._untrained = (
            HeldOutText(**json.loads(about[name])) for name in ("held_out", "untrained")
        )
        self.carry_on(read_tensors(found[-1] / _CARRIED)[1])

    def _load(self, weights: dict[str, Tensor]) -> None:
        self.module.load_state_dict(weights, strict=False)

    def _save(self) -> None:
        target = self.folder / f"checkpoint-{self.progress.step}"
        if target.exists():
            return
        with atomic_folder(target) as folder:
            save_file(self._weights(), folder / _WEIGHTS, {_PROGRESS: json.dumps(asdict(self.progress))})
            found = {"held_out": self._best_found, "untrained": self._untrained}
            about = {name: json.dumps(asdict(one)) for name, one in found.items()}
            save_file(self._best, folder / _BEST, about)
            carried = {name: value.cpu().contiguous() for name, value in self.carried().items()}
            save_file(carried, folder / _CARRIED)
            save_optimizer(folder, self.optimizer, self.module)
        delete_old(self.folder)

    def _result(self, *, finished: bool) -> LoopResult:
        if finished:
            self._load(self._best)
        progress = self.progress
        return LoopResult(progress.step, progress.best_step, self._best_found, self._untrained, finished)
