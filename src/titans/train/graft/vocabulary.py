"""The loss of a prediction that a memory is mixed into, from a part of the vocabulary."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.nn.adaptation import LinearHead


class SampledWords:
    """Words that stand for a whole vocabulary in Σ_j exp(m_j).

    The sum over the core, words that matter here, is exact. That over all others is estimated from words
    drawn evenly among them.

    Args:
        core: int64, which ids the core has; every label must be among them. Ids may repeat.
        vocab_size: how many words there are.
        others: how many words are drawn; some may be in the core, or twice, and are left out.
    """

    def __init__(self, core: Tensor, vocab_size: int, others: int, generator: np.random.Generator) -> None:
        self.core = core.unique()
        drawn = torch.from_numpy(generator.integers(vocab_size, size=others)).to(core.device)
        drawn = drawn[~torch.isin(drawn, self.core)].unique()
        self.ids = torch.cat([self.core, drawn])
        left = vocab_size - len(self.core)
        weight = math.log(left / len(drawn)) if len(drawn) else 0.0
        self.log_weights = torch.zeros(len(self.ids), device=core.device)
        self.log_weights[len(self.core) :] = weight

    def log_sum(self, logits: Tensor) -> Tensor:
        """log Σ_j exp(m_j) of m (…, words), those of `ids`."""
        return (logits + self.log_weights.to(logits.dtype)).logsumexp(-1)

    def place(self, labels: Tensor) -> Tensor:
        """Where ids of the core stand in `ids`."""
        return torch.searchsorted(self.core, labels)


def mixture_changes(
    log_probs: Tensor, mixing: Tensor, words: Tensor, labels: Tensor, sample: SampledWords
) -> Tensor:
    """How −log p of each label changes if a memory is mixed into the prediction, in nats.

    p = (1 − λ) p_base + λ softmax(m), with λ = sigmoid(mixing). Never more than −log(1 − λ).

    Args:
        log_probs: (n,), of the labels under the base. mixing: (n,). words: (n, words), m of `sample.ids`.
        labels: (n,) int64, ids in the core.
    """
    recalled = words.gather(1, sample.place(labels)[:, None])[:, 0] - sample.log_sum(words)
    return log_probs - torch.logaddexp(F.logsigmoid(-mixing) + log_probs, F.logsigmoid(mixing) + recalled)


def label_log_probs(head: LinearHead, hidden: Tensor, normaliser: Tensor, labels: Tensor) -> Tensor:
    """log p of each label under the base's prediction, in nats.

    Args:
        hidden: (n, hidden), the head's input. normaliser: (n,), cached. labels: (n,) int64.
    """
    logits = (hidden * head.weight[labels].to(hidden.dtype)).sum(-1)
    if head.bias is not None:
        logits = logits + head.bias[labels].to(hidden.dtype)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits - normaliser
