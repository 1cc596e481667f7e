"""Training of a graft's association on cached features."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.data.facts_blocks import ANSWER, STATED
from titans.hf.graft.feature_cache import FeatureCache
from titans.nn.adaptation import LinearHead
from titans.nn.association import Association, AssociationRead, AssociationState
from titans.state import map_state, stacked
from titans.train.graft.carried import from_tensors, to_tensors
from titans.train.graft.held_out import HeldOut, changes_at, measure
from titans.train.graft.loop import LoopResult, TrainingLoop
from titans.train.graft.rows import Stretch, TrainingRows
from titans.train.graft.settings import GraftTraining
from titans.train.graft.vocabulary import SampledWords

_OTHER_WORDS, _TEXT_POSITIONS = 1024, 1024
_WHITENED_TOKENS = 2048
_WEIGHT_DECAY = 0.01
# Steps after which writing has its full price; at once, it would shut the gates. A logit of the write gate
# from which on it costs something, of β = 0.02.
_PRICED_FROM, _PRICED_LOGIT = 40, 4.0


class AssociationTraining(TrainingLoop[HeldOut]):
    """Trains an association in place, and leaves in it the best weights by held-out facts and text.

    Args:
        head: of the base.
        cache: groups "facts" and "text", and for evaluation "facts-…" and "text-held-out".
        folder: for checkpoints and metrics.jsonl.

    Raises:
        ValueError: for settings or a cache that cannot be used.
    """

    found_class = HeldOut
    settings: GraftTraining

    def __init__(
        self,
        association: Association,
        head: LinearHead,
        cache: FeatureCache,
        folder: Path,
        settings: GraftTraining | None = None,
    ) -> None:
        settings = settings or GraftTraining()
        super().__init__(association, _parameter_groups(association, settings), folder, settings)
        cache = FeatureCache(cache.folder, association.layers)
        cache.check_groups("facts", "text", "facts-held-out", "text-held-out")
        if not association.state_mean.any():
            association.whiten(_some_states(cache))
        self.association, self.head, self.cache = association, head, cache
        self.rows = TrainingRows(cache, settings.tokens_per_step, settings.distance, settings.seed)
        self.device = association.trained.device
        self._memories: AssociationState | None = None
        self._used = self._read = 0
        self._began: float | None = None

    def depends_on(self) -> dict[str, Any]:
        files = [path.name for group in ("facts", "text") for path in self.cache.files(group)]
        return {"base": self.cache.key["base"], "features": files}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Reported: the mean change of the text's loss in nats, and tokens learned from in a second."""
        if self._began is None:
            self._began = time.perf_counter()
        if self._memories is None or self.rows.first_of(step):
            self._memories = self._read_before(step)
        example = self.rows.draw(step, self._used)
        self._used += example.episodes
        generator = np.random.default_rng([self.settings.seed, 3, step])
        before = example.before.to(self.device)
        state = map_state(lambda x: x[before], self._memories)
        main = example.main.to(self.device)
        found = self.association.read(main.states, main.hidden, main.ids, self.head.weight, state)
        loss, text = self._changes(main, found, generator)
        self._read += main.ids.numel()
        rate = self._read / (time.perf_counter() - self._began)
        return loss + self._price(main, found), {"text": text, "tokens_per_second": rate}

    def evaluate(self) -> HeldOut:
        return measure(self.association, self.head, self.cache)

    def score(self, found: HeldOut) -> float:
        return found.score

    def carried(self) -> dict[str, Tensor]:
        """The memories, and how many episodes were drawn."""
        memories = {} if self._memories is None else to_tensors(self._memories)
        return {"used": torch.tensor(self._used), **memories}

    def carry_on(self, tensors: dict[str, Tensor]) -> None:
        self._used = int(tensors.pop("used"))
        if tensors:
            self._memories = from_tensors(tensors, self.association.initial_state(1))

    @torch.no_grad()
    def _read_before(self, step: int) -> AssociationState:
        """An empty memory, and those that have read the texts before this step's facts, as rows."""
        states = [self.association.initial_state(1)]
        for text in self.rows.before(step):
            text = text.to(self.device)
            found = self.association.read(text.states, text.hidden, text.ids, self.head.weight)
            states.append(found.state)
        return stacked(states)

    def _price(self, main: Stretch, found: AssociationRead) -> Tensor:
        """What writing costs: it has to be rare, or a long text drives out what was learned before it."""
        assert found.write_logit is not None
        others = (main.flags != STATED).to(found.write_logit.dtype)
        price = self.settings.write_price * min(self.progress.step / _PRICED_FROM, 1.0)
        return price * (F.softplus(found.write_logit + _PRICED_LOGIT) * others).mean()

    def _changes(
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

    def _result(self, *, finished: bool) -> LoopResult[HeldOut]:
        if finished:
            self.association.trained.fill_(1.0)
        return super()._result(finished=finished)


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
        {"params": [parameter], "lr": rate(name),
         "weight_decay": _WEIGHT_DECAY if "_gate." in name else 0.0}
        for name, parameter in association.named_parameters()
        if parameter.requires_grad
    ]  # fmt: skip
