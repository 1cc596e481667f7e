"""A memory that may not write, and a memory from which everything else is taken."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from titans.evaluate import bits_per_byte, keep_memory_only, score
from titans.hf import TitansCache, TitansForCausalLM
from titans.memory import MemoryState
from titans.nn import NeuralMemory
from titans.nn.blocks import has_memory

from ..variants import VARIANTS
from .models import small_model, some_ids

MEMORIES = sorted(filter(has_memory, VARIANTS))


def memories(cache: TitansCache) -> list[MemoryState]:
    def is_memory(x: object) -> bool:
        return isinstance(x, MemoryState)

    return [x for x in pytree.tree_leaves(cache.states, is_leaf=is_memory) if is_memory(x)]


@torch.no_grad()
def after_reading(model: TitansForCausalLM, count: int = 32, seed: int = 0, **options: bool) -> TitansCache:
    cache = TitansCache(model.config)
    model(torch.from_numpy(some_ids(count, seed))[None].long(), past_key_values=cache, **options)
    return cache


@pytest.mark.parametrize("variant", MEMORIES)
def test_a_frozen_memory_learns_nothing(variant: str) -> None:
    model = small_model(variant)
    for module in model.modules():
        if isinstance(module, NeuralMemory):
            module.gate_weight.data.zero_()  # forgetting, which goes on, must not depend on the text

    def difference(freeze_memory: bool) -> float:
        read = (after_reading(model, seed=seed, freeze_memory=freeze_memory) for seed in (1, 2))
        one, other = (memories(cache)[0].weights[0] for cache in read)
        return float((one - other).abs().max())

    assert difference(True) < 1e-12 < 1e-3 < difference(False)


def test_a_frozen_evaluation_keeps_what_persistent_tokens_wrote() -> None:
    model, documents = small_model("lmm"), [(some_ids(40), 40)]
    frozen = bits_per_byte(model, documents, freeze_memory=True)
    usual = bits_per_byte(model, documents)
    for block in (layer.mixer for layer in model.model.layers):
        block.memory.max_step_size = 0.0
    nothing_written = bits_per_byte(model, documents)
    assert len({x.nats_per_token for x in (frozen, nothing_written, usual)}) == 3
    with pytest.raises(ValueError, match="no memory"):
        bits_per_byte(small_model("transformer"), documents, freeze_memory=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [32, 30])
def test_only_the_memory_is_kept(variant: str, count: int) -> None:
    model = small_model(variant, memory={"form": {"row_limit": 0.5}})
    cache = after_reading(model, count)
    before = [leaf.clone() for leaf in pytree.tree_leaves(cache.states)]
    kept = keep_memory_only(model, cache)
    fresh = TitansCache(model.config)
    fresh.store(tuple(layer.mixer.initial_state(1) for layer in model.model.layers), 0)

    learned = set()
    for was, now in zip(memories(cache), memories(kept), strict=True):
        for layer, (weight, anchor) in enumerate(zip(now.weights, now.anchor, strict=True)):
            expected = was.weights[layer]
            if count % model.config.chunk_size:
                length = expected.norm(dim=-1, keepdim=True)
                expected = expected * (0.5 / length.clamp_min(0.5))
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)
            assert torch.equal(anchor, weight) and torch.equal(now.momentum[layer], was.momentum[layer])
        learned |= {id(leaf) for leaf in (*now.weights, *now.momentum)}
    if variant == "mac":
        for state in kept.states:
            assert all(map(torch.equal, state.snapshot, state.memory.memory.weights))
    for now, initial in zip(*(pytree.tree_leaves(c.states) for c in (kept, fresh)), strict=True):
        assert id(now) in learned or torch.equal(now, initial)
    for leaf, copy in zip(pytree.tree_leaves(cache.states), before, strict=True):
        assert torch.equal(leaf, copy), "the cache itself is left alone"

    second = some_ids(20, seed=9)
    moved = (score(model, second, kept) - score(model, second)).abs().max()
    assert moved > 1e-3 if has_memory(variant) else moved == 0


def test_nothing_read_leaves_nothing() -> None:
    model = small_model()
    assert keep_memory_only(model, TitansCache(model.config)).states is None
