"""Every array of an inspection equals what the model gives when it is asked for that alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from titans.evaluate import keep_memory_only, score
from titans.hf import TitansCache, TitansConfig, TitansForCausalLM
from titans.inspection import inspect_text
from titans.memory import MemoryState
from titans.nn import BlockContext, NeuralMemory
from titans.nn.blocks import has_memory
from titans.stream.saved import find_states

from ..variants import VARIANTS

MEMORIES = sorted(filter(has_memory, VARIANTS))


def small_model(variant: str) -> TitansForCausalLM:
    torch.manual_seed(0)
    sizes = dict(
        variant=variant, vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, head_dim=8, memory_depth=2, memory_expansion=2, chunk_size=4, segment_length=8,
        sliding_window=8, num_persistent_tokens=2, initializer_range=0.3,
    )  # fmt: skip
    return TitansForCausalLM(TitansConfig(**sizes)).double()


def some_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 31, count)


@torch.no_grad()
def after(model: TitansForCausalLM, ids: np.ndarray) -> TitansCache:
    return model(torch.from_numpy(ids)[None], use_cache=True).past_key_values


@pytest.mark.parametrize("variant", MEMORIES)
def test_it_is_what_reading_and_asking_give(variant: str) -> None:
    model, text, another = small_model(variant).eval(), some_ids(70), some_ids(40, seed=1)
    found = inspect_text(model, text, another, passage_length=24)
    assert np.isnan(found.loss[0])
    np.testing.assert_allclose(found.loss[1:], score(model, text), rtol=1e-4)
    with torch.no_grad():
        output = model(torch.from_numpy(text)[None], output_surprise=True)
    expected = torch.stack([s[0].mean(-1) for s in output.surprises], -1)
    np.testing.assert_allclose(found.surprise, expected, rtol=1e-4)

    for begin in range(0, 70, 24):
        passage = text[begin : begin + 24]
        held = after(model, text[:begin]), after(model, another[:begin]), after(model, text[:0])
        for cache, losses in zip(held, (found.own, found.other, found.none), strict=True):
            assert np.isnan(losses[begin])
            alone = score(model, passage, keep_memory_only(model, cache))
            np.testing.assert_allclose(losses[begin + 1 : begin + len(passage)], alone, rtol=1e-4)
        norms = [
            torch.stack([w[0].square().sum((-2, -1)) for w in state.weights]).sum(0).sqrt()
            for state in find_states(MemoryState, after(model, text[: begin + 24]).states)
        ]
        np.testing.assert_allclose(found.memory_norm[begin // 24], torch.stack(norms), rtol=1e-4)
    assert np.nanmax(np.abs(found.helped)) > 1e-2
    assert np.nanmax(np.abs(found.helped_over_another)) > 1e-2


def test_the_gates_are_those_of_the_update() -> None:
    model, text = small_model("lmm").eval(), some_ids(12)
    found = inspect_text(model, text, text, passage_length=5)
    block = model.model.layers[0].mixer
    memory, state = block.memory, block.initial_state(1)
    assert isinstance(memory, NeuralMemory)
    with torch.no_grad():
        x = block.norm(model.model.embed_tokens(torch.from_numpy(text[:4])[None]))
        _, _, trace = memory(x, state, context=BlockContext(trace=True))
    np.testing.assert_allclose(found.forget[:4, 0], trace.forget[0].mean(-1), rtol=1e-4)
    np.testing.assert_allclose(found.step_size[:4, 0], trace.step_size[0].mean(-1), rtol=1e-4)


def test_how_it_is_cut_changes_the_views_alone_and_a_cache_is_gone_on_from() -> None:
    model, text, another = small_model("mag").eval(), some_ids(60), some_ids(60, seed=1)
    found, other = (inspect_text(model, text, another, passage_length=n) for n in (60, 13))
    for name in ("loss", "surprise", "forget", "step_size"):
        np.testing.assert_allclose(getattr(found, name), getattr(other, name), rtol=1e-4)
    cache = after(model, text[:20])
    later = inspect_text(model, text[20:], another, cache=cache, passage_length=20)
    np.testing.assert_allclose(later.loss[1:], found.loss[21:], rtol=1e-4)
    assert cache.num_columns == 20
    assert json.loads(json.dumps(found.to_json()))["loss"][0] is None


@pytest.mark.parametrize(
    ("variant", "ids", "another", "message"),
    [
        ("transformer", [1, 2], [1, 2], "has no memory to inspect"),
        ("lmm", [1], [1, 2], r"ids holds 1 token\(s\)"),
        ("lmm", [1, 2], [], r"another holds 0 token\(s\)"),
        ("lmm", [1, 99], [1, 2], "token id 99 is outside"),
    ],
)
def test_what_cannot_be_inspected_is_refused(
    variant: str, ids: list[int], another: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_text(small_model(variant), ids, another)
