"""A small byte model in float64 whose outputs are far from constant."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from titans.hf import TitansConfig, TitansForCausalLM


def small_model(variant: str = "mac", **overrides: Any) -> TitansForCausalLM:
    sizes = dict(
        variant=variant, vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, head_dim=8, memory_depth=2, memory_expansion=2, chunk_size=4, segment_length=8,
        sliding_window=8, num_persistent_tokens=2, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TitansForCausalLM(TitansConfig(**{**sizes, **overrides})).double()


def some_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
