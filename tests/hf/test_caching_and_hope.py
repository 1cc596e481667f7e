"""Whole models with checkpoints of a memory, and Hope: looked into, in beams, restarted.

test_schedules.py cuts, pads and saves them.
"""

from __future__ import annotations

import pytest
import torch

from titans.evaluate.gates import gate_statistics
from titans.hf import TitansConfig, TitansForCausalLM
from titans.inspection import inspect_text

from ..variants import CACHING, SCHEDULES
from .models import LAYERS, MODELS, assert_near, logits_of, random_ids, small_model

different = pytest.mark.parametrize("name", ["cached mac", "hope"])


def test_checkpoints_matter():
    ids = random_ids(1, 30)
    plain, cached = small_model("lmm"), MODELS["cached lmm"]
    plain.load_state_dict({k: v for k, v in cached.state_dict().items() if "connector" not in k})
    off = (logits_of(cached, ids) - logits_of(plain, ids)).abs().amax(-1)[0]
    assert not off[: CACHING["every"]].any() and (off[CACHING["every"] :] > 1e-6).all()


def test_instruments_look_at_memories_with_checkpoints_and_at_hope():
    passages = random_ids(24), random_ids(24, seed=1)
    for name in ("cached mag", "hope"):
        found = inspect_text(MODELS[name], *passages, passage_length=10)
        assert found.memory_norm.shape == (3, LAYERS, 2)
    assert len(gate_statistics(MODELS["cached mag"], passages)) == LAYERS
    with pytest.raises(ValueError, match="'hope' has several memories"):
        gate_statistics(MODELS["hope"], passages)


@different
def test_beams_and_restarted_rows(name):
    model, ids = MODELS[name], random_ids(2, 15)
    beams = model.generate(ids, num_beams=2, max_new_tokens=4, do_sample=False)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], num_beams=2, max_new_tokens=4, do_sample=False)
        assert torch.equal(beams[row], alone[0])
    with torch.no_grad():
        states = model(ids, return_memory_states=True, use_cache=False).memory_states
        restart = torch.tensor([True, False])
        after = model(ids, memory_states=states, restart=restart, use_cache=False).logits
    assert_near(after[0], logits_of(model, ids)[0])
    assert_near(after[1], logits_of(model, ids.repeat(1, 2))[1, 15:])


@different
def test_a_model_is_saved(name, tmp_path):
    MODELS[name].save_pretrained(tmp_path)
    again = TitansForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert SCHEDULES[name][1]["memory"].items() <= again.config.memory.to_dict().items()
    assert torch.equal(logits_of(again, random_ids(1, 20)), logits_of(MODELS[name], random_ids(1, 20)))


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"caching": {"every": 10}}, "memory.caching.every=10 with chunk_size=16: .* give a multiple of 16"),
        ({"caching": {"every": -1}}, "memory.caching: caching.every=-1: give a whole number"),
        ({"caching": 512}, "memory.caching: caching=512: give {'every': 512, 'keep': 'log'}"),
        (
            {"caching": {"every": 16}, "local_chunk_sizes": [2], "shard_length": 4},
            r"memory.caching with local_chunk_sizes=\[2\]: .* give None for one of the two",
        ),
    ],
)
def test_a_wrong_field_is_named(memory, message):
    with pytest.raises(ValueError, match=message):
        TitansConfig(variant="lmm", memory=memory)
    with pytest.raises(ValueError, match=r"memory\.periods=\[0\]: give whole numbers of at least 1"):
        TitansConfig(variant="hope", memory={"periods": [0]})
    with pytest.raises(ValueError, match=r"memory\.caching=.* with variant='hope'.*give None"):
        TitansConfig(variant="hope", memory={"caching": {"every": 16}})
