"""Whole models with checkpoints of a memory, and Hope: cut, padded, saved, together, in beams, restarted."""

from __future__ import annotations

import pytest
import torch

from titans.evaluate.gates import gate_statistics
from titans.hf import TitansCache, TitansConfig, TitansForCausalLM
from titans.inspection import inspect_text
from titans.stream import Session, describe_memory, feed_together

from .models import CHUNK, LAYERS, assert_near, filled_cache, logits_of, random_ids, small_config, small_model

CACHING = {"every": 2 * CHUNK, "keep": "log"}
# Of Hope the periods are what caching is of the others.
MEMORIES = {
    "lmm": {"caching": CACHING},
    "mag": {"caching": {**CACHING, "keep": "linear"}},
    "mal": {"caching": CACHING},
    "mac": {"caching": {**CACHING, "keep": "linear"}},
    "hope": {"periods": [CHUNK, 7]},
}
MODELS = {variant: small_model(variant, memory=memory) for variant, memory in MEMORIES.items()}
every_variant = pytest.mark.parametrize("variant", MODELS)
most_different = pytest.mark.parametrize("variant", ["mac", "hope"])


def test_checkpoints_matter():
    ids = random_ids(1, 30)
    plain = small_model("lmm")
    plain.load_state_dict({k: v for k, v in MODELS["lmm"].state_dict().items() if "connector" not in k})
    off = (logits_of(MODELS["lmm"], ids) - logits_of(plain, ids)).abs().amax(-1)[0]
    assert not off[: CACHING["every"]].any() and (off[CACHING["every"] :] > 1e-6).all()


@every_variant
def test_token_by_token_is_one_call_and_pieces_too(variant):
    model, ids = MODELS[variant], random_ids(2, 33)
    cache, parts = TitansCache(model.config), []
    with torch.no_grad():
        for piece in ids.split([1] * 8 + [5, 11, 9], 1):
            parts.append(model(piece, past_key_values=cache).logits)
    assert_near(torch.cat(parts, 1), logits_of(model, ids))


@most_different
def test_a_padded_row_is_the_row_alone(variant):
    model, ids = MODELS[variant], random_ids(3, 30)
    mask = torch.rand(3, 30, generator=torch.Generator().manual_seed(0)) < torch.tensor([[1.0], [0.7], [0.2]])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask.long()).logits
    for row in range(3):
        assert_near(logits[row, mask[row]], logits_of(model, ids[row, mask[row]][None])[0])


@most_different
def test_a_cache_is_saved_copied_and_reordered(variant, tmp_path):
    model, ids = MODELS[variant], random_ids(2, 21)
    cache = filled_cache(model, ids)
    cache.save(tmp_path / "memory")
    loaded, fork = TitansCache.load(tmp_path / "memory", model.config), cache.clone()
    assert loaded.nbytes() == cache.nbytes()
    fork.reorder_cache(torch.tensor([1, 0]))
    following = random_ids(2, 12, seed=1)
    with torch.no_grad():
        expected = model(following, past_key_values=cache).logits
        assert torch.equal(model(following, past_key_values=loaded).logits, expected)
        assert torch.equal(model(following.flip(0), past_key_values=fork).logits, expected.flip(0))
    (name,) = MEMORIES[variant]
    with pytest.raises(ValueError, match=rf"was written with memory\.{name}="):
        TitansCache.load(tmp_path / "memory", small_config(variant))


@most_different
def test_sessions_fed_together_equal_each_alone(variant, tmp_path):
    """And what each holds is what it holds alone, also in bytes and from a file."""
    model, texts = MODELS[variant], [random_ids(n, seed=n) for n in (4, 6, 19)]
    together, alone = [Session(model) for _ in texts], [Session(model) for _ in texts]
    feed_together(together, texts)
    for a, b, text in zip(together, alone, texts, strict=True):
        b.feed(text)
        # Hope's weights at a chunk's start are written out where rows were read in columns.
        assert variant == "hope" or a.cache.nbytes() == b.cache.nbytes()
        a.save(tmp_path / "one")
        again = Session.load(tmp_path / "one", model)
        following = random_ids(1, 7, seed=3)
        with torch.no_grad():
            first, *others = [model(following, past_key_values=s.cache.clone()).logits for s in (b, a, again)]
        for logits in others:
            assert_near(logits, first)
    levels = len(MEMORIES[variant].get("periods", [0]))
    assert len(describe_memory(tmp_path / "one").stats.layers) == LAYERS * levels


def test_instruments_look_at_memories_with_checkpoints_and_at_hope():
    passages = random_ids(24), random_ids(24, seed=1)
    for variant in ("mag", "hope"):
        found = inspect_text(MODELS[variant], *passages, passage_length=10)
        assert found.memory_norm.shape == (3, LAYERS, 2)
    assert len(gate_statistics(MODELS["mag"], passages)) == LAYERS
    with pytest.raises(ValueError, match="'hope' has several memories"):
        gate_statistics(MODELS["hope"], passages)


@most_different
def test_beams_and_restarted_rows(variant):
    model, ids = MODELS[variant], random_ids(2, 15)
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


@pytest.mark.parametrize(("variant", "part"), [("mag", "connector"), ("hope", "mixer.memory")])
def test_gradients_reach_what_is_new_and_a_model_is_saved(variant, part, tmp_path):
    torch.manual_seed(0)
    model = TitansForCausalLM(small_config(variant, memory=MEMORIES[variant])).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(random_ids(2, 19), labels=random_ids(2, 19)).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert_near(a, b, 1e-6)
    new = [p for name, p in model.named_parameters() if part in name]
    assert len(new) >= LAYERS and all(p.grad.any() for p in new)
    model.eval().save_pretrained(tmp_path)
    again = TitansForCausalLM.from_pretrained(tmp_path)
    assert MEMORIES[variant].items() <= again.config.memory.to_dict().items()
    assert torch.equal(logits_of(again, random_ids(1, 20)), logits_of(model, random_ids(1, 20)))


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
