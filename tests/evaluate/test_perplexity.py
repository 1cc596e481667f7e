"""Streaming evaluation equals one call for each document, however it is batched and cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.evaluate import bits_per_byte, perplexity, score
from titans.hf import TitansCache, TitansForCausalLM

from ..variants import VARIANTS
from .models import small_model, some_ids

LENGTHS = [33, 1, 50, 2, 17]


def losses_in_one_call(model: TitansForCausalLM, ids: np.ndarray) -> Tensor:
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model.eval()(tokens, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch_size", "piece_length"), [(1, 2048), (3, 7), (8, 16)])
def test_total_and_ranges(
    variant: str, batch_size: int, piece_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "POSITION_BOUNDS", (4, 20, 100))
    model = small_model(variant)
    documents = [some_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    seen: list[tuple[int, int]] = []
    result = bits_per_byte(
        model,
        [(ids, 3 * len(ids)) for ids in documents],  # as if every token were three bytes
        batch_size=batch_size,
        piece_length=piece_length,
        progress=lambda done, total: seen.append((done, total)),
    )
    losses = [losses_in_one_call(model, ids) for ids in documents if len(ids) > 1]
    everything = torch.cat(losses)
    assert result.tokens == len(everything) == 98
    assert result.nats_per_token == pytest.approx(everything.mean().item(), abs=1e-9)
    assert result.bits_per_byte == pytest.approx(everything.mean().item() / math.log(2) / 3, abs=1e-9)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    ranges = [(0, 4), (4, 20), (20, 100)]
    assert [(part.begin, part.end) for part in result.by_position] == ranges
    for part, (begin, end) in zip(result.by_position, ranges, strict=True):
        expected = torch.cat([each[max(begin - 1, 0) : end - 1] for each in losses])
        assert part.tokens == len(expected)
        assert part.nats_per_token == pytest.approx(expected.mean().item(), abs=1e-9)
    assert seen == sorted(seen) and seen[-1] == (98, 98)


def test_a_context_length_starts_afresh() -> None:
    model, ids = small_model(), some_ids(50)
    result = bits_per_byte(model, [(ids, 50)], context_length=16)
    parts = [losses_in_one_call(model, ids[begin : begin + 17]) for begin in range(0, 49, 16)]
    assert result.tokens == 49
    assert result.nats_per_token == pytest.approx(torch.cat(parts).mean().item(), abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_score_goes_on_where_the_cache_stands(variant: str) -> None:
    model, ids = small_model(variant).train(), some_ids(60)
    cache = TitansCache(model.config)
    pieces = [score(model, ids[begin:end], cache, piece_length=5) for begin, end in [(0, 31), (30, 60)]]
    torch.testing.assert_close(torch.cat(pieces), score(model, ids), rtol=0, atol=1e-8)
    assert cache.num_columns == 59 and model.training
    torch.testing.assert_close(score(model, ids), losses_in_one_call(model, ids), rtol=0, atol=1e-8)


def test_bad_arguments_are_named() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="no token to predict"):
        bits_per_byte(model, [([1], 1), ([], 0)])
    with pytest.raises(ValueError, match="300 is outside"):
        bits_per_byte(model, [([1, 300], 2)])
    with pytest.raises(ValueError, match="context_length=0"):
        bits_per_byte(model, [([1, 2], 2)], context_length=0)
    with pytest.raises(ValueError, match="two or more"):
        score(model, [1])
