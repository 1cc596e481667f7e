"""Two interventions that show what the long-term memory does: stop its writing, or take everything else
away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from titans.hf import TitansCache, TitansForCausalLM
from titans.nn.memory.learner import Learner


@contextmanager
def frozen_memory(model: TitansForCausalLM) -> Iterator[None]:
    """Within this block no memory of the model learns: every step size is 0, forgetting and momentum remain.

    States created within are not written by the persistent tokens either: create them before.

    Raises:
        ValueError: for a model without a memory.
    """
    memories = [module for module in model.modules() if isinstance(module, Learner)]
    if not memories:
        raise ValueError(f"variant={model.config.variant!r} has no memory that could be frozen")
    step_sizes = [memory.max_step_size for memory in memories]
    try:
        for memory in memories:
            memory.max_step_size = 0.0
        yield
    finally:
        for memory, step_size in zip(memories, step_sizes, strict=True):
            memory.max_step_size = step_size


@torch.no_grad()
def keep_memory_only(model: TitansForCausalLM, cache: TitansCache) -> TitansCache:
    """A copy of the cache as before the first token of a new text, but with the memory's weights and
    momentum.

    Attention windows, segments and convolution tails are empty, and the number of columns seen is 0.
    Positions are 0 again, because segments and chunks are counted by them: a chunk that was open is closed
    where it stands, and the first segment recalls with the memory as it is. Without a memory nothing is left.
    """
    kept = TitansCache(model.config)
    for layer, was, now in zip(model.model.layers, cache.layers, kept.layers, strict=True):
        now.state = None if was.state is None else layer.mixer.fresh_context(was.state)
    return kept
