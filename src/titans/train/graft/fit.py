"""Training of a graft's association on cached features, resumable to the bit."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.data.facts_blocks import ANSWER, STATED
from titans.hf.graft.feature_cache import FeatureCache
from titans.nn.adaptation import LinearHead
from titans.nn.association import Association, AssociationRead, AssociationState
from titans.state import flatten_alike, map_state
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
from titans.train.graft.held_out import HeldOut, changes_at, measure
from titans.train.graft.rows import Stretch, TrainingRows
from titans.train.graft.settings import SETTINGS_FILE, GraftTraining
from titans.train.graft.vocabulary import SampledWords
from titans.train.interrupt import stops_on_interrupt
from titans.train.optimizer import rate_factor

_WEIGHTS, _BEST, _MEMORIES = "association.safetensors", "best.safetensors", "memories.safetensors"
_PROGRESS = "progress.json"
_OTHER_WORDS, _TEXT_POSITIONS = 1024, 1024
_WHITENED_TOKENS = 2048
_WARMUP, _LEAST_RATE, _WEIGHT_DECAY, _MOST_NORM = 10, 0.1, 0.01, 1.0
# Steps after which writing has its full price; at once, it would shut the gates. A logit of the write gate
# from which on it costs something, of β = 0.02.
_PRICED_FROM, _PRICED_LOGIT = 40, 4.0
_LOG_EVERY = 5
# What may change when a run continues.
_FREE = ("minutes", "save_every")


@dataclass
class _Progress:
    """What a checkpoint holds beside weights and the optimizer's state."""

    step: int = 0
    used: int = 0
    best_step: int = 0
    best_score: float = float("inf")
    since_best: int = 0


@dataclass(frozen=True)
class GraftResult:
    """step: of the end. best_step: whose weights were kept. held_out: at that step. finished: whether the
    training ended by itself, and not by the time allowed or an interruption."""

    step: int
    best_step: int
    held_out: HeldOut
    finished: bool


class AssociationTraining:
    """Trains an association in place, and leaves in it the best weights by held-out facts and text.

    Args:
        head: of the base.
        cache: groups "facts" and "text", and for evaluation "facts-…" and "text-held-out".
        folder: for checkpoints and metrics.jsonl.

    Raises:
        ValueError: for settings or a cache that cannot be used, or a folder of another training.
    """

    def __init__(
        self,
        association: Association,
        head: LinearHead,
        cache: FeatureCache,
        folder: Path,
        settings: GraftTraining | None = None,
    ) -> None:
        settings = settings or GraftTraining()
        settings.check()
        cache = FeatureCache(cache.folder, association.layers)
        self.association, self.head, self.cache, self.settings = association, head, cache, settings
        self.folder = folder
        self.rows = TrainingRows(cache, settings.tokens_per_step, settings.distance, settings.seed)
        self.device = association.trained.device
        self.optimizer = torch.optim.AdamW(_parameter_groups(association, settings), betas=(0.9, 0.95))
        self.progress = _Progress()
        self._memories: AssociationState | None = None
        self.stop_requested = False

    def run(self, on_log: Callable[[dict[str, Any]], None] = lambda _: None) -> GraftResult:
        """Train until the steps, the patience or the minutes are over, or Ctrl-C; then save.

        Raises:
            ValueError: for a folder of another training, or one that another process trains in.
            FloatingPointError: if the loss or a gradient is not finite; the last checkpoint is still there.
            OSError: if the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone_in(self.folder), stops_on_interrupt(self):
            self._begin()
            return self._run(on_log)

    def _run(self, on_log: Callable[[dict[str, Any]], None]) -> GraftResult:
        settings, progress = self.settings, self.progress
        began, read = time.perf_counter(), 0
        while progress.step < settings.steps and progress.since_best < settings.patience:
            loss, text, tokens = self._step()
            progress.step += 1
            read += tokens
            seconds = time.perf_counter() - began
            if progress.step % _LOG_EVERY == 0 or progress.step == settings.steps:
                self._log(
                    on_log, {"kind": "train", "loss": loss, "text": text, "tokens_per_second": read / seconds}
                )
            if progress.step % settings.evaluate_every == 0 or progress.step == settings.steps:
                self._evaluate(on_log)
            late = settings.minutes is not None and seconds > 60 * settings.minutes
            if self.stop_requested or late:
                self._save()
                return self._result(finished=False)
            if progress.step % settings.save_every == 0:
                self._save()
        self._save()
        return self._result(finished=True)

    def _step(self) -> tuple[float, float, int]:
        """One step; the loss, the mean change of the text's loss in nats, and tokens learned from."""
        settings, step = self.settings, self.progress.step
        if self._memories is None or self.rows.first_of(step):
            self._memories = self._read_before(step)
        example = self.rows.draw(step, self.progress.used)
        self.progress.used += example.episodes
        generator = np.random.default_rng([settings.seed, 3, step])
        before = example.before.to(self.device)
        state = map_state(lambda x: x[before], self._memories)
        main = example.main.to(self.device)
        found = self.association.read(main.states, main.hidden, main.ids, self.head.weight, state)
        loss, text = self._loss(main, found, generator)
        loss = loss + self._price(main, found)
        factor = rate_factor(step, settings.steps, min(_WARMUP, settings.steps // 10), _LEAST_RATE)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.association.parameters(), _MOST_NORM)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise FloatingPointError(
                f"step {step}: the loss is {float(loss.detach())} and the gradient {float(norm)}: give "
                "smaller learning rates, and another folder"
            )
        self.optimizer.step()
        return float(loss.detach()), text, main.ids.numel()

    @torch.no_grad()
    def _read_before(self, step: int) -> AssociationState:
        """An empty memory, and those that have read the texts before this step's facts, as rows."""
        states = [self.association.initial_state(1)]
        for text in self.rows.before(step):
            text = text.to(self.device)
            found = self.association.read(text.states, text.hidden, text.ids, self.head.weight)
            states.append(found.state)
        leaves, structure = flatten_alike(states)
        return pytree.tree_unflatten([torch.cat(parts) for parts in zip(*leaves, strict=True)], structure)

    def _price(self, main: Stretch, found: AssociationRead) -> Tensor:
        """What writing costs: it has to be rare, or a long text drives out what was learned before it."""
        assert found.write_logit is not None
        others = (main.flags != STATED).to(found.write_logit.dtype)
        price = self.settings.write_price * min(self.progress.step / _PRICED_FROM, 1.0)
        return price * (F.softplus(found.write_logit + _PRICED_LOGIT) * others).mean()

    def _loss(
        self, main: Stretch, found: AssociationRead, generator: np.random.Generator
    ) -> tuple[Tensor, float]:
        """The weighted mean of how −log p changes, over all answers and a sample of the other tokens."""
        weight = self.settings.answer_weight
        follows = main.follows[:, :-1]
        answers = (main.flags[:, 1:] >= ANSWER) & follows
        others = torch.nonzero((~answers & follows).flatten())[:, 0]
        count = len(others)
        if count > _TEXT_POSITIONS:
            chosen = generator.choice(count, _TEXT_POSITIONS, replace=False)
            others = others[torch.from_numpy(np.sort(chosen)).to(others.device)]
        asked = torch.nonzero(answers.flatten())[:, 0]
        at = torch.cat([asked, others])
        sample = SampledWords(main.ids, len(self.head.weight), _OTHER_WORDS, generator)
        changes = changes_at(self.association, self.head, main, found, at, sample)
        text = changes[len(asked) :].mean()
        total = weight * changes[: len(asked)].sum() + count * text
        return total / (weight * len(asked) + count), float(text.detach())

    def _evaluate(self, on_log: Callable[[dict[str, Any]], None]) -> None:
        progress = self.progress
        found = measure(self.association, self.head, self.cache)
        progress.since_best += 1
        if found.score < progress.best_score:
            progress.best_score, progress.best_step, progress.since_best = found.score, progress.step, 0
            self._best = self._weights()
            self._best_found = found
        self._log(on_log, {"kind": "held out", **asdict(found), "score": found.score})

    def _log(self, on_log: Callable[[dict[str, Any]], None], line: dict[str, Any]) -> None:
        line = {"step": self.progress.step, "steps": self.settings.steps} | line
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        on_log(line)

    def _weights(self) -> dict[str, Tensor]:
        """A copy of what training changes."""
        return {name: value.detach().cpu().clone() for name, value in self.association.named_parameters()}

    def _begin(self) -> None:
        """Continue from the newest checkpoint, or start."""
        delete_unfinished(self.folder)
        if not self.association.state_mean.any():
            self.association.whiten(_some_states(self.cache))
        self._best, self._best_found = self._weights(), HeldOut({}, 0.0, {})
        fixed = self._fixed()
        path = self.folder / SETTINGS_FILE
        if not path.exists():
            write_json(path, fixed)
        known = json.loads(path.read_text(encoding="utf-8"))
        for name, value in fixed.items():
            if known.get(name) != json.loads(json.dumps(value)):
                raise ValueError(
                    f"{self.folder} was begun with {name}={known.get(name)!r}, now it is {value!r}: give the "
                    "same, or another folder"
                )
        if not (found := checkpoints(self.folder)):
            return
        about, weights = read_tensors(found[-1] / _WEIGHTS)
        self.association.load_state_dict(weights, strict=False)
        load_optimizer(found[-1], self.optimizer, self.association)
        self.progress = _Progress(**json.loads(about[_PROGRESS]))
        about, self._best = read_tensors(found[-1] / _BEST)
        self._best_found = HeldOut(**json.loads(about["held_out"]))
        _, memories = read_tensors(found[-1] / _MEMORIES)
        self._memories = AssociationState(**{name: value.to(self.device) for name, value in memories.items()})

    def _fixed(self) -> dict[str, Any]:
        """What a checkpoint depends on."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in _FREE}
        files = [path.name for group in ("facts", "text") for path in self.cache.files(group)]
        return settings | {"base": self.cache.key["base"], "features": files}

    def _save(self) -> None:
        target = self.folder / f"checkpoint-{self.progress.step}"
        if target.exists():
            return
        with atomic_folder(target) as folder:
            about = {_PROGRESS: json.dumps(dataclasses.asdict(self.progress))}
            save_file(self._weights(), folder / _WEIGHTS, about)
            save_file(self._best, folder / _BEST, {"held_out": json.dumps(asdict(self._best_found))})
            if self._memories is not None:
                parts = {part.name: getattr(self._memories, part.name) for part in fields(self._memories)}
                save_file(parts, folder / _MEMORIES)
            save_optimizer(folder, self.optimizer, self.association)
        delete_old(self.folder)

    def _result(self, *, finished: bool) -> GraftResult:
        if finished:
            self.association.load_state_dict(self._best, strict=False)
            self.association.trained.fill_(1.0)
        progress = self.progress
        return GraftResult(progress.step, progress.best_step, self._best_found, finished)


def _some_states(cache: FeatureCache) -> list[Tensor]:
    """For each layer states (n, hidden) of text and statements.

    The first token of a text is left out: many models give it states that are a hundred times as long, which
    would be all that the covariance sees.
    """
    found = [cache.load(path, tokens=slice(0, _WHITENED_TOKENS))["text"] for path in cache.files("text")[:8]]
    found += [cache.load(path)["statements"] for path in cache.files("facts")[:8]]
    return [
        torch.cat([features.states[layer][:, 1:].flatten(0, 1).float() for features in found])
        for layer in range(len(found[0].states))
    ]


def _parameter_groups(association: Association, settings: GraftTraining) -> list[dict[str, Any]]:
    """The keys' projection; gates, which decay; the sharpness; and other numbers."""

    def rate(name: str) -> float:
        if name == "log_sharpness":
            return settings.sharpness_rate
        if "_gate." in name:
            return settings.gate_rate
        return settings.projection_rate if name == "key_map.weight" else settings.number_rate

    return [
        {"params": [parameter], "lr": rate(name), "peak": rate(name),
         "weight_decay": _WEIGHT_DECAY if "_gate." in name else 0.0}
        for name, parameter in association.named_parameters()
        if parameter.requires_grad
    ]  # fmt: skip
