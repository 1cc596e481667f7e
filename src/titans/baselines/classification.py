"""Classifiers of letter sequences to compare with: counts of k-mers, and a small convolutional network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kmer_shares(sequences: Sequence[np.ndarray], k: int, letters: int) -> Tensor:
    """(sequences, letters ** k): which share of a sequence's k-mers is each.

    Args:
        sequences: ids from 1 to `letters`; k-mers with other ids are not counted.
    """
    powers = letters ** np.arange(k)
    found = np.zeros((len(sequences), letters**k), np.float32)
    for row, ids in zip(found, sequences, strict=True):
        if len(ids) < k:
            continue
        kmers = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64) - 1, k)
        known = kmers[((kmers >= 0) & (kmers < letters)).all(1)]
        if len(known):
            row[:] = np.bincount(known @ powers, minlength=letters**k) / len(known)
    return torch.from_numpy(found)


class KmerLogistic:
    """Logistic regression on standardised shares of k-mers of all lengths up to `k`, with ridge."""

    def __init__(self, classes: int, k: int = 4, letters: int = 4, ridge: float = 1e-3) -> None:
        self.classes, self.lengths, self.letters, self.ridge = classes, range(1, k + 1), letters, ridge

    def _features(self, sequences: Sequence[np.ndarray]) -> Tensor:
        return torch.cat([kmer_shares(sequences, k, self.letters) for k in self.lengths], 1)

    def fit(self, sequences: Sequence[np.ndarray], labels: Sequence[int]) -> KmerLogistic:
        """Minimise cross-entropy and ridge, which have one minimum, by L-BFGS."""
        x, y = self._features(sequences), torch.tensor([*labels])
        self.mean, self.std = x.mean(0), x.std(0).clamp_min(1e-6)
        x = (x - self.mean) / self.std
        self.layer = nn.Linear(x.shape[1], self.classes)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        optimizer = torch.optim.LBFGS(
            self.layer.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-7
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(self.layer(x), y) + self.ridge * self.layer.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return self

    @torch.no_grad()
    def predict(self, sequences: Sequence[np.ndarray]) -> Tensor:
        """(sequences,) classes."""
        return self.layer((self._features(sequences) - self.mean) / self.std).argmax(1)


class SmallCnn(nn.Module):
    """Three convolutions with pooling and the maximum over what they find, as in genomic-benchmarks."""

    def __init__(self, classes: int, vocab_size: int, channels: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, channels, padding_idx=0)
        self.layers = nn.Sequential(
            *itertools.chain.from_iterable(
                (nn.Conv1d(channels, channels, 9, padding=4), nn.GELU(), nn.MaxPool1d(4, ceil_mode=True))
                for _ in range(3)
            )
        )
        self.score = nn.Linear(channels, classes)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, classes) of ids (batch, time), 0 for padding."""
        return self.score(self.layers(self.embed(input_ids).transpose(1, 2)).amax(2))
