"""The loss of a changed prediction from a part of the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from titans.nn.adaptation import LinearHead


class SampledVocabulary:
    """A few rows of a head, by which −log p of a label changes when the head's input changes.

    With the base's logits l_j, its log-normaliser Z (known, from the cache), p_j = exp(l_j − Z), and the
    changed logits l_j + δ_j, the change of −log p of label y is

        log Σ_j p_j exp(δ_j) − δ_y.

    The sum over the core, tokens that matter here, is exact. The others have the probability 1 − Σ_core p
    together, and their mean of exp(δ), weighted by p, is estimated from tokens drawn among them. Without a
    change the result is 0, whatever is drawn.

    Args:
        head: of the base.
        core: (n,) int64, which ids the core has; every label must be among them. Ids may repeat.
        negatives: how many others are drawn.
    """

    def __init__(
        self, head: LinearHead, core: Tensor, negatives: int, generator: np.random.Generator
    ) -> None:
        self.core = core.unique()
        vocab = len(head.weight)
        drawn = torch.from_numpy(generator.integers(vocab, size=negatives)).to(core.device)
        others = drawn[~torch.isin(drawn, self.core)].unique()
        chosen = torch.cat([self.core, others])
        wide = torch.promote_types(head.weight.dtype, torch.float32)
        bias = None if head.bias is None else head.bias[chosen].to(wide)
        self._head = replace(head, weight=head.weight[chosen].to(wide), bias=bias)

    def changes(self, hidden: Tensor, changed: Tensor, normaliser: Tensor, labels: Tensor) -> Tensor:
        """The change of −log p of each label, in nats; negative where the change helps.

        Args:
            hidden: (n, hidden), the head's input that the base gives. changed: (n, hidden), with gradients.
            normaliser: (n,), the base's. labels: (n,) int64.
        """
        with torch.no_grad():
            before = self._head.logits(hidden)
            log_probs = before - normaliser[:, None]
            count = len(self.core)
            inside = log_probs[:, :count].logsumexp(1)
            # Rounding of the cached normaliser may take the core's share above 1.
            outside = torch.log1p(-inside.exp().clamp_max(1 - 1e-6))
            if log_probs.shape[1] > count:
                others = log_probs[:, count:].log_softmax(1) + outside[:, None]
                log_probs = torch.cat([log_probs[:, :count], others], 1)
            log_probs = log_probs.log_softmax(1)
        delta = self._head.logits(changed) - before
        place = torch.searchsorted(self.core, labels)
        return (log_probs + delta).logsumexp(1) - delta.gather(1, place[:, None])[:, 0]

    @torch.no_grad()
    def losses(self, hidden: Tensor, normaliser: Tensor, labels: Tensor) -> Tensor:
        """−log p of each label under the base's prediction, in nats; arguments as in `changes`."""
        place = torch.searchsorted(self.core, labels)
        return normaliser - self._head.logits(hidden).gather(1, place[:, None])[:, 0]
