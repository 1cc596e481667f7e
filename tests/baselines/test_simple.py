"""Baselines of forecasting and of classification that a few lines describe."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from titans.baselines.classification import KmerLogistic, SmallCnn, kmer_shares
from titans.baselines.forecasting import DLinear, SeasonalNaive


def test_the_past_is_repeated_and_a_linear_map_begins_with_its_mean() -> None:
    values = torch.arange(12.0).reshape(1, 6, 2)
    assert SeasonalNaive(5, 3)(values)[0, :, 0].tolist() == [6, 8, 10, 6, 8]
    assert SeasonalNaive(2)(values)[0].tolist() == [[10, 11], [10, 11]]
    with pytest.raises(ValueError, match="period=7"):
        SeasonalNaive(2, 7)(values)
    model = DLinear(6, 4, kernel=3)
    torch.nn.init.zeros_(model.trend.bias)
    torch.nn.init.zeros_(model.rest.bias)
    # The trend and the rest have the same weights at first, and are the history in sum.
    assert torch.allclose(model(values), values.mean(1, keepdim=True).expand(1, 4, 2))


def test_kmers_are_counted_and_separate_what_differs_in_them() -> None:
    shares = kmer_shares([np.array([1, 2, 1, 2, 5, 1], np.uint8), np.array([3], np.uint8)], 2, 4)
    assert shares.shape == (2, 16) and shares[1].sum() == 0
    # Two of "1 2" (0 + 4 · 1) and one of "2 1"; those with a 5 are not counted.
    assert shares[0, 4] == pytest.approx(2 / 3) and shares[0, 1] == pytest.approx(1 / 3)
    generator = np.random.default_rng(0)
    plain = [generator.integers(1, 5, 60).astype(np.uint8) for _ in range(60)]
    marked = [np.concatenate([ids, np.array([1, 2, 3, 1, 2, 3] * 2, np.uint8)]) for ids in plain[:30]]
    sequences, labels = marked + plain[30:], [1] * 30 + [0] * 30
    model = KmerLogistic(2, k=3).fit(sequences[::2], labels[::2])
    assert (model.predict(sequences[1::2]) == torch.tensor(labels[1::2])).float().mean() > 0.9
    assert SmallCnn(3, 6)(torch.randint(1, 6, (2, 50))).shape == (2, 3)
