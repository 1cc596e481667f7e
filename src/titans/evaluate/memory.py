"""What a long-term memory knows when everything else is taken away."""

from __future__ import annotations

import torch

from titans.hf import TitansCache, TitansForCausalLM


@torch.no_grad()
def keep_memory_only(model: TitansForCausalLM, cache: TitansCache) -> TitansCache:
    """A copy of the cache as before the first token of a new text, but with the memory's weights and
    momentum.

    Attention windows, segments and convolution tails are empty, and the number of columns seen is 0.
    Positions are 0 again, because segments and chunks are counted by them: a chunk that was open is closed
    where it is, and the first segment recalls with the memory unchanged. Without a memory nothing is left.
    """
    kept = TitansCache(model.config)
    for layer, was, now in zip(model.model.layers, cache.layers, kept.layers, strict=True):
        now.state = None if was.state is None else layer.fresh_context(was.state)
    return kept
