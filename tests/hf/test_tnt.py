"""Whole models with global and local memories: trained, looked into, and given finer chunks.

test_schedules.py cuts, pads and saves them.
"""

from __future__ import annotations

import json

import pytest
import torch

from titans.evaluate.gates import gate_statistics
from titans.hf import TitansConfig, TitansForCausalLM
from titans.inspection import inspect_text
from titans.nn.memory.learner import Learner
from titans.stream import Session, describe_memory

from ..variants import LOCAL
from .models import LAYERS, MODELS, filled_cache, logits_of, random_ids, small_config, small_model

TNT = dict(chunk_size=9, memory=LOCAL)


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


def test_another_checkpoint_goes_on_with_finer_chunks(tmp_path):
    MODELS["local mag"].save_pretrained(tmp_path)
    finer = TitansForCausalLM.from_pretrained(
        tmp_path, memory={"local_chunk_sizes": [1, 2]}, dtype=torch.float64
    ).eval()
    assert finer.config.memory.local_chunk_sizes == [1, 2]
    for (name, a), b in zip(finer.named_parameters(), MODELS["local mag"].parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = random_ids(1, 30)
    assert (logits_of(finer, ids) - logits_of(MODELS["local mag"], ids)).abs().max() > 1e-6
    learners = [module for module in finer.modules() if isinstance(module, Learner)]
    assert [m.chunk_size for m in learners] == [9, 1, 2] * LAYERS


def test_instruments_look_at_the_global_memory(tmp_path):
    model, ids = small_model("mag", **TNT).float(), random_ids(24)
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
