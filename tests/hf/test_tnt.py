"""Whole models with global and local memories: cut, padded, saved, trained, looked into, and given finer
chunks."""

from __future__ import annotations

import json

import pytest
import torch

from titans.evaluate.gates import gate_statistics
from titans.hf import TitansCache, TitansConfig, TitansForCausalLM
from titans.inspection import inspect_text
from titans.nn.memory.learner import Learner
from titans.stream import Session, describe_memory, feed_together

from .models import LAYERS, assert_near, filled_cache, logits_of, random_ids, small_config, small_model

LOCAL = dict(local_chunk_sizes=[2, 4], shard_length=8)
TNT = dict(chunk_size=9, memory=LOCAL)
VARIANTS = ("lmm", "mag", "mal")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
# For what the variants share.
one_variant = pytest.mark.parametrize("variant", ["mag"])
MODELS = {variant: small_model(variant, **TNT) for variant in VARIANTS}


@every_variant
def test_token_by_token_is_one_call_and_pieces_too(variant):
    model, ids, cache, parts = MODELS[variant], random_ids(2, 33), TitansCache(MODELS[variant].config), []
    with torch.no_grad():
        for piece in ids.split([1] * 10 + [5, 11, 7], 1):
            parts.append(model(piece, past_key_values=cache).logits)
    assert_near(torch.cat(parts, 1), logits_of(model, ids))


@every_variant
def test_a_padded_row_is_the_row_alone(variant):
    model, ids = MODELS[variant], random_ids(3, 30)
    mask = torch.rand(3, 30, generator=torch.Generator().manual_seed(0)) < torch.tensor([[1.0], [0.7], [0.2]])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask.long()).logits
    for row in range(3):
        assert_near(logits[row, mask[row]], logits_of(model, ids[row, mask[row]][None])[0])


@one_variant
def test_a_cache_is_saved_copied_and_reordered(variant, tmp_path):
    model, ids = MODELS[variant], random_ids(2, 21)
    cache = filled_cache(model, ids)
    cache.save(tmp_path / "memory")
    loaded, fork = TitansCache.load(tmp_path / "memory", model.config), cache.clone()
    fork.reorder_cache(torch.tensor([1, 0]))
    following = random_ids(2, 12, seed=1)
    with torch.no_grad():
        expected = model(following, past_key_values=cache).logits
        assert torch.equal(model(following, past_key_values=loaded).logits, expected)
        assert torch.equal(model(following.flip(0), past_key_values=fork).logits, expected.flip(0))
    for field, old, new in (
        ("local_chunk_sizes", [2, 4], [1, 4]),
        ("shard_length", 8, 16),
    ):
        with pytest.raises(ValueError) as refusal:
            TitansCache.load(
                tmp_path / "memory", small_config(variant, **{**TNT, "memory": {**LOCAL, field: new}})
            )
        assert f"was written with memory.{field}={old!r}, the model has {new!r}" in str(refusal.value)


def test_a_short_training_lowers_the_loss():
    torch.manual_seed(0)
    model = TitansForCausalLM(small_config("mag", num_hidden_layers=1, **TNT)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    # Nine symbols, again and again, from somewhere: what comes next stands a period back.
    begins = torch.randint(9, (20, 4, 1), generator=torch.Generator().manual_seed(0))
    losses = []
    for begin in begins:
        loss = model((begin + torch.arange(30)) % 9, labels=(begin + torch.arange(30)) % 9).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(p.grad.isfinite().all() for p in model.parameters())


@one_variant
def test_gradient_checkpointing_gives_the_same_gradients(variant):
    model, ids = small_model(variant, **TNT).train(), random_ids(2, 19)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert_near(a, b)


@one_variant
def test_another_checkpoint_goes_on_with_finer_chunks(variant, tmp_path):
    MODELS[variant].save_pretrained(tmp_path)
    finer = TitansForCausalLM.from_pretrained(
        tmp_path, memory={"local_chunk_sizes": [1, 2]}, dtype=torch.float64
    ).eval()
    assert finer.config.memory.local_chunk_sizes == [1, 2]
    for (name, a), b in zip(finer.named_parameters(), MODELS[variant].parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = random_ids(1, 30)
    assert (logits_of(finer, ids) - logits_of(MODELS[variant], ids)).abs().max() > 1e-6
    learners = [module for module in finer.modules() if isinstance(module, Learner)]
    assert [m.chunk_size for m in learners] == [9, 1, 2] * LAYERS


@one_variant
def test_sessions_fed_together_equal_each_alone(variant):
    """At lengths where a local chunk is at its end and the global one is not, and the other way round."""
    model, texts = MODELS[variant], [random_ids(n, seed=n) for n in (5, 9, 10, 17, 19)]
    together, alone = [Session(model) for _ in texts], [Session(model) for _ in texts]
    feed_together(together, texts)
    for a, b, text in zip(together, alone, texts, strict=True):
        b.feed(text)
        following = random_ids(1, 7, seed=3)
        with torch.no_grad():
            logits = [model(following, past_key_values=s.cache.clone()).logits for s in (a, b)]
        assert_near(*logits)


@one_variant
def test_instruments_look_at_the_global_memory(variant, tmp_path):
    model, ids = small_model(variant, **TNT).float(), random_ids(24)
    session = Session(model)
    session.feed(ids)
    assert len(session.stats().layers) == LAYERS and session.stats().layers[0].change > 0
    session.save(tmp_path / "memory")
    assert len(describe_memory(tmp_path / "memory").stats.layers) == LAYERS
    assert len(gate_statistics(model, [ids])) == LAYERS
    found = inspect_text(model, ids, random_ids(24, seed=1), passage_length=10)
    assert found.memory_norm.shape == (3, LAYERS, 2) and json.dumps(found.to_json())
    traces = model(ids[None], output_trace=True).traces
    assert [trace.step_logits.shape for trace in traces] == [(1, 24, 2, 2)] * LAYERS


def test_a_frozen_model_learns_in_no_memory():
    model, ids = small_model("lmm", num_persistent_tokens=0, **TNT), random_ids(1, 24)
    states = model(ids, use_cache=True, freeze_memory=True).past_key_values.states
    for state in states:
        for memory in (state.memory, *state.local.memories):
            assert not any(m.any() for m in memory.momentum)
    assert any(m.any() for m in filled_cache(model, ids).states[0].local.memories[0].momentum)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(local_chunk_sizes=[2]), r"memory.local_chunk_sizes=\[2\], memory.shard_length=None: give both"),
        (dict(shard_length=8), "memory.local_chunk_sizes=None, memory.shard_length=8: give both"),
        (dict(LOCAL, shard_length=6), r"memory.shard_length=6: give a multiple of all of \[2, 4\]"),
        (dict(LOCAL, local_chunk_sizes=[0]), r"memory.local_chunk_sizes=\[0\]: give whole numbers"),
    ],
)
def test_a_wrong_field_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        TitansConfig(variant="lmm", memory=wrong)
    with pytest.raises(ValueError, match=r"memory.local_chunk_sizes=\[2, 4\] with variant='mac'"):
        TitansConfig(variant="mac", memory=LOCAL)


def test_no_local_memories_are_those_of_before():
    assert TitansConfig(memory={"local_chunk_sizes": []}).memory.local_chunk_sizes is None
