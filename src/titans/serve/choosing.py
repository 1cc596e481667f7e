"""How the next token is chosen, for one text, and how likely it and others were."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Chosen:
    """A token, the log of its probability, and the likeliest tokens with theirs: at temperature 1, without
    penalties."""

    id: int
    log_prob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses as transformers' `generate` does, with random numbers of its own: which other texts are
    generated at the same time changes nothing.

    Args:
        temperature: 0 for the likeliest token.
        top_p: choose among the likeliest tokens that together have this probability.
        seed: of the choices; the same one gives the same tokens.
        num_likeliest: how many of the likeliest tokens to report; None for no probabilities at all.
        presence, frequency: subtracted from the logit of each token that was chosen before, once and for
            each time (OpenAI's penalties); tokens that were read do not count.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        num_likeliest: int | None = None,
        presence: float = 0.0,
        frequency: float = 0.0,
    ) -> None:
        self.presence, self.frequency = presence, frequency
        self._chosen: Counter[int] = Counter()
        self.greedy, self.num_likeliest = temperature == 0, num_likeliest
        self.warpers = LogitsProcessorList()
        if not self.greedy and temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if not self.greedy and top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def choose(self, logits: Tensor) -> Chosen:
        """The next token, from logits (vocab_size,).

        Raises:
            FloatingPointError: for NaN, or nothing but -inf.
        """
        scores = logits.detach().to("cpu", torch.float32)[None]
        if not torch.isfinite(scores.max()):
            raise FloatingPointError(
                "the model's logits are no numbers here: load it in another precision, or check its weights"
            )
        warped: Any = self._penalised(scores)
        if self.greedy:
            token = int(warped.argmax())
        else:
            nothing: Any = torch.empty(1, 0, dtype=torch.int64)
            weights = self.warpers(nothing, warped).softmax(-1)
            token = int(torch.multinomial(weights, 1, generator=self.generator))
        self._chosen[token] += 1
        if self.num_likeliest is None:
            return Chosen(token)
        log_probs = scores[0].log_softmax(-1)
        best = log_probs.topk(min(self.num_likeliest, len(log_probs)))
        likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Chosen(token, float(log_probs[token]), likeliest)

    def _penalised(self, scores: Tensor) -> Tensor:
        if not self._chosen or not (self.presence or self.frequency):
            return scores
        ids, counts = (torch.tensor(list(each)) for each in (self._chosen.keys(), self._chosen.values()))
        return scores.index_add(1, ids, -(self.presence + self.frequency * counts)[None])
