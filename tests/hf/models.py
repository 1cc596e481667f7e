"""Small models whose sizes do not divide each other and whose outputs are far from constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titans.hf import TitansCache, TitansConfig, TitansForCausalLM

from ..variants import SCHEDULES

VOCAB, WINDOW, SEGMENT, CHUNK, LAYERS = 23, 5, 7, 3, 2
# Two ways of cutting a text, in float64: rounding, amplified by some dozens of inner updates in every layer.
SAME = 1e-8


def small_config(variant: str, **overrides: Any) -> TitansConfig:
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        head_dim=4,
        memory_depth=2,
        memory_expansion=2,
        chunk_size=CHUNK,
        segment_length=SEGMENT,
        sliding_window=WINDOW,
        num_persistent_tokens=3,
        tie_word_embeddings=False,
    )
    return TitansConfig(variant=variant, **{**sizes, **overrides})


def small_model(variant: str, seed: int = 1, **overrides: Any) -> TitansForCausalLM:
    """In float64 and in evaluation mode."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = TitansForCausalLM(small_config(variant, **overrides)).double().eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.2)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=1.5 * module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_()
        # Against a token following itself, which greedy decoding of random weights would end in.
        if not model.config.tie_word_embeddings:
            model.lm_head.weight.sub_(model.get_input_embeddings().weight)
    return model


class _Models(dict[str, TitansForCausalLM]):
    def __missing__(self, name: str) -> TitansForCausalLM:
        variant, changes = SCHEDULES.get(name, (name, {}))
        model = self[name] = small_model(variant, **changes)
        return model


# One of each variant and of each of `SCHEDULES`, made when a test first asks for it. No test changes them.
MODELS = _Models()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: TitansForCausalLM, ids: Tensor) -> Tensor:
    """The whole text in one call, without cache or mask: what every other way is compared with."""
    return model(ids, use_cache=False).logits


@torch.no_grad()
def filled_cache(model: TitansForCausalLM, ids: Tensor) -> TitansCache:
    cache = model(ids, use_cache=True).past_key_values
    assert isinstance(cache, TitansCache)
    return cache


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = SAME) -> None:
    assert actual.shape == expected.shape and expected.isfinite().all()
    off = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert off <= tolerance, f"off by {off:.3g}, allowed {tolerance:.3g}"
