"""Training of a graft's adaptation by gradients through its updates, on cached features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans.hf.graft.feature_cache import FeatureCache, Features
from titans.nn.adaptation import Adaptation, LinearHead
from titans.state import where_rows
from titans.train.graft.segments import Segments
from titans.train.graft.settings import AdaptationTraining
from titans.train.graft.text import HeldOutText, TextTraining
from titans.train.graft.vocabulary import label_log_probs

# Tokens of held-out text that are read in one call.
_AT_ONCE = 512


class MetaTraining(TextTraining):
    """Trains an adaptation in place: what it has of step, ratio, momentum, half-life and starting weights.

    The loss of a step is that of the adapted predictions over a stretch of text. Gradients go through all
    updates in it; the fast weights from before the stretch are carried on without gradients.

    Args:
        head: of the base. cache: groups "text", and "text-held-out" for evaluation.

    Raises:
        ValueError: for settings or a cache that cannot be used.
    """

    settings: AdaptationTraining

    def __init__(
        self,
        adaptation: Adaptation,
        head: LinearHead,
        cache: FeatureCache,
        folder: Path,
        settings: AdaptationTraining | None = None,
    ) -> None:
        settings = settings or AdaptationTraining()
        rates = {"start_weight": settings.weight_rate, "start_bias": settings.bias_rate}
        groups = [
            {"params": [value], "lr": rates.get(name, settings.number_rate), "weight_decay": 0.0}
            for name, value in adaptation.named_parameters()
        ]
        super().__init__(adaptation, groups, folder, settings)
        self.adaptation, self.head = adaptation, head
        self.device = adaptation.mean.device
        self.cache = FeatureCache(cache.folder, ())
        self.texts, self.held_out = (self.cache.files(group) for group in ("text", "text-held-out"))
        cache.check_groups("text", "text-held-out")
        lengths = [self.cache.shape(path)[1] for path in self.texts]
        self.segments = Segments(lengths, settings.rows, settings.tokens, settings.seed)
        self._state = adaptation.initial_state(settings.rows)

    def depends_on(self) -> dict[str, Any]:
        return {
            "base": self.cache.key["base"],
            "features": [path.name for path in (*self.texts, *self.held_out)],
        }

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        segments, count = self.segments.at(step), self.settings.tokens
        parts = [
            self.cache.load(self.texts[one.text], tokens=slice(max(one.begin - 1, 0), one.begin + count))[
                "text"
            ]
            for one in segments
        ]
        ids = torch.cat([part.ids[:, -count:] for part in parts]).to(self.device)
        hidden = torch.cat([part.hidden[:, -count:] for part in parts]).float().to(self.device)
        begins = torch.tensor([one.begin == 0 for one in segments], device=self.device)
        state = where_rows(begins, self.adaptation.initial_state(len(segments)), self._state)
        _, state, losses = self.adaptation(hidden, ids, self.head, state, keep=1, surprise=True)
        assert losses is not None
        self._state = state.detach()
        # The first token of a text has no prediction before it.
        known = torch.ones_like(losses, dtype=torch.bool)
        known[:, 0] = ~begins
        loss = losses[known].mean()
        base = torch.cat([_base_losses(self.head, part)[0] for part in parts]).mean()
        return loss, {"change": float(loss.detach()) / float(base) - 1}

    @torch.no_grad()
    def evaluate(self) -> HeldOutText:
        losses, base = {}, {}
        for path in self.held_out:
            name = self.cache.about(path) or path.stem
            part = self.cache.load(path, tokens=slice(0, self.settings.held_out_tokens))["text"]
            state, found = self.adaptation.initial_state(1), []
            pairs = zip(part.hidden.split(_AT_ONCE, 1), part.ids.split(_AT_ONCE, 1), strict=True)
            for hidden, ids in pairs:
                _, state, lost = self.adaptation(
                    hidden.float().to(self.device),
                    ids.to(self.device),
                    self.head,
                    state,
                    keep=1,
                    surprise=True,
                )
                assert lost is not None
                found.append(lost[0])
            losses[name] = float(torch.cat(found)[1:].mean())
            base[name] = float(_base_losses(self.head, part).mean())
        return HeldOutText(losses, base)


def _base_losses(head: LinearHead, part: Features) -> Tensor:
    """The base's loss of each token but the first, (rows, time − 1)."""
    device = head.weight.device
    hidden, normaliser = part.hidden[:, :-1].float().to(device), part.normaliser[:, :-1].to(device)
    labels = part.ids[:, 1:].to(device)
    found = label_log_probs(head, hidden.flatten(0, 1), normaliser.flatten(), labels.flatten())
    return -found.view(labels.shape)
