"""Whole models whose memories have schedules of their own, local memories, checkpoints and Hope: cut, padded,
saved, together, and with gradient checkpointing."""

from __future__ import annotations

import pytest
import torch

from titans.hf import TitansCache
from titans.stream import Session, describe_memory, feed_together

from ..variants import DIFFERENT_SCHEDULES, SCHEDULES
from .models import (
    LAYERS,
    MODELS,
    assert_near,
    filled_cache,
    logits_of,
    random_ids,
    small_config,
    small_model,
)

every = pytest.mark.parametrize("name", SCHEDULES)
different = pytest.mark.parametrize("name", DIFFERENT_SCHEDULES)


@every
def test_token_by_token_is_one_call_and_pieces_too(name):
    model, ids = MODELS[name], random_ids(2, 33)
    cache, parts = TitansCache(model.config), []
    with torch.no_grad():
        for piece in ids.split([1] * 10 + [5, 11, 7], 1):
            parts.append(model(piece, past_key_values=cache).logits)
    assert_near(torch.cat(parts, 1), logits_of(model, ids))


@pytest.mark.parametrize("name", ["local lmm", "local mal", *DIFFERENT_SCHEDULES])
def test_a_padded_row_is_the_row_alone(name):
    model, ids = MODELS[name], random_ids(3, 30)
    mask = torch.rand(3, 30, generator=torch.Generator().manual_seed(0)) < torch.tensor([[1.0], [0.7], [0.2]])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask.long()).logits
    for row in range(3):
        assert_near(logits[row, mask[row]], logits_of(model, ids[row, mask[row]][None])[0])


@different
def test_a_cache_is_saved_copied_and_reordered(name, tmp_path):
    model, ids = MODELS[name], random_ids(2, 21)
    cache = filled_cache(model, ids)
    cache.save(tmp_path / "memory")
    loaded, fork = TitansCache.load(tmp_path / "memory", model.config), cache.clone()
    # Local memories share the global one's positions until they are saved.
    assert name.startswith("local") or loaded.nbytes() == cache.nbytes()
    fork.reorder_cache(torch.tensor([1, 0]))
    following = random_ids(2, 12, seed=1)
    with torch.no_grad():
        expected = model(following, past_key_values=cache).logits
        assert torch.equal(model(following, past_key_values=loaded).logits, expected)
        assert torch.equal(model(following.flip(0), past_key_values=fork).logits, expected.flip(0))
    variant, changes = SCHEDULES[name]
    for field in changes["memory"]:
        other = {**changes["memory"], field: {"shard_length": 16, "local_chunk_sizes": [1, 4]}.get(field)}
        with pytest.raises(ValueError, match=rf"was written with memory\.{field}="):
            TitansCache.load(tmp_path / "memory", small_config(variant, **{**changes, "memory": other}))


@different
def test_sessions_fed_together_equal_each_alone(name, tmp_path):
    """And what each holds is what it holds alone, also from a file; at lengths where a local chunk is at its
    end and the global one is not, and the other way round."""
    model, texts = MODELS[name], [random_ids(n, seed=n) for n in (5, 7, 10, 19)]
    together, alone = [Session(model) for _ in texts], [Session(model) for _ in texts]
    feed_together(together, texts)
    for a, b, text in zip(together, alone, texts, strict=True):
        b.feed(text)
        # Hope's weights at a chunk's start, and those of local memories, are written out where rows were read
        # in columns.
        assert not name.startswith("cached") or a.cache.nbytes() == b.cache.nbytes()
        a.save(tmp_path / "one")
        again = Session.load(tmp_path / "one", model)
        following = random_ids(1, 7, seed=3)
        with torch.no_grad():
            first, *others = [model(following, past_key_values=s.cache.clone()).logits for s in (b, a, again)]
        for logits in others:
            assert_near(logits, first)
    levels = len(SCHEDULES[name][1]["memory"].get("periods", [0]))
    assert len(describe_memory(tmp_path / "one").stats.layers) == LAYERS * levels


@pytest.mark.parametrize("name", ["local mag", "cached mag", "hope"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    variant, changes = SCHEDULES[name]
    model, ids = small_model(variant, **changes).train(), random_ids(2, 19)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert_near(a, b)
    new = {"cached mag": "connector", "hope": "mixer.memory", "local mag": ".local."}[name]
    grads = [p.grad for name, p in model.named_parameters() if new in name]
    assert len(grads) >= LAYERS and all(grad.any() for grad in grads)
