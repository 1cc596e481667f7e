"""Effective dimensions predict the crosstalk of pairs, and are of the vectors that a memory reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from titans.evaluate import effective_dimensions, key_dimensions
from titans.hf import TitansCache
from titans.nn import NeuralMemory

from .models import small_model, some_ids

DOCUMENTS = [some_ids(18, seed=1), some_ids(13, seed=2)]
EXACT: dict[str, Any] = dict(rtol=1e-9, atol=0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_orthonormal_keys_have_the_width_and_one_key_has_one() -> None:
    basis = torch.linalg.qr(normal(24, 24)).Q
    lengths = torch.rand(24, 1) + 0.1
    heads = torch.stack([basis, basis[:1].expand(24, 24), lengths * basis, -lengths * basis[:1]], 1)
    expected = torch.tensor([24.0, 1, 24, 1]).double()
    torch.testing.assert_close(effective_dimensions(heads), expected, **EXACT)
    # Many random directions nearly have the width, however many of them there are.
    assert effective_dimensions(normal(4096, 24)).item() == pytest.approx(24, rel=0.01)
    # Half of the pairs are alike, or a constant part is added.
    assert effective_dimensions(basis[torch.arange(4000) % 2]).item() == pytest.approx(2, rel=0.001)
    assert effective_dimensions(normal(4096, 24) + 2).item() < 2
    assert effective_dimensions(torch.zeros(3, 24)).item() == 24
    with pytest.raises(ValueError, match=r"vectors of 1 token\(s\): give at least two"):
        effective_dimensions(normal(1, 24))


def test_they_predict_the_error_of_a_matrix_that_holds_all_pairs() -> None:
    keys = F.normalize(normal(40, 16) + 0.5, dim=-1)
    values = torch.eye(40, dtype=torch.float64)
    matrix = values.mT @ keys
    error = (keys @ matrix.mT - values).square().sum(-1).mean()
    torch.testing.assert_close(error, 39 / effective_dimensions(keys), **EXACT)


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        ("lmm", dict(memory_depth=1)),
        ("mac", dict(memory_depth=2)),
        ("mag", dict(memory_depth=3, memory={"form": {"activation": "sin"}})),
        ("lmm", dict(memory={"local_chunk_sizes": [2], "shard_length": 4})),
    ],
)
@torch.no_grad()
def test_they_are_of_what_the_last_matrix_reads(variant: str, form: dict[str, Any]) -> None:
    model = small_model(variant, **form)
    found = key_dimensions(model.train(), DOCUMENTS)
    assert model.training and len(found) == 2
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    taken: list[list[torch.Tensor]] = [[], []]
    for ids in DOCUMENTS:
        # A token at a time, the cache carried on.
        cache = TitansCache(model.config)
        for token in torch.from_numpy(ids).long():
            output = model.model(token.view(1, 1), past_key_values=cache, output_trace=True)
            for trace, keys in zip(output.traces, taken, strict=True):
                keys.append(trace.keys[0, 0])
    for layer, memory, keys in zip(found, memories, map(torch.stack, taken), strict=True):
        torch.testing.assert_close(layer.keys, effective_dimensions(keys), rtol=1e-6, atol=0)
        if memory.network.depth == 1:
            assert layer.hidden is None and layer.read is layer.keys and layer.read_width == 8
            continue
        hidden = keys.unsqueeze(-2)
        for weight in [*memory.initial_weights][:-1]:
            before = hidden @ weight.mT
            hidden = torch.sin(before) if memory.network.activation == "sin" else F.silu(before)
        torch.testing.assert_close(layer.read, effective_dimensions(hidden[:, :, 0]), rtol=1e-6, atol=0)
        assert layer.read_width == layer.hidden_width == 16


def test_nothing_to_measure() -> None:
    assert key_dimensions(small_model("transformer"), DOCUMENTS) == []
    with pytest.raises(ValueError, match=r"documents hold 1 token\(s\): give at least two"):
        key_dimensions(small_model(), [[65]])
