"""One text, many ways to read it: the same logits whatever the cut, the batch and the padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from titans.hf import TitansCache, TitansForCausalLM
from titans.nn import NeuralMemory
from titans.state import map_state

from ..variants import DIFFERENT, VARIANTS
from .models import (
    CHUNK,
    LAYERS,
    MODELS,
    SEGMENT,
    VOCAB,
    WINDOW,
    assert_near,
    filled_cache,
    logits_of,
    random_ids,
    small_config,
    small_model,
)

every_variant = pytest.mark.parametrize("variant", VARIANTS)
different = pytest.mark.parametrize("variant", DIFFERENT)


def bounded(variant):
    """Whether the state has one size however much was read."""
    shapes = [
        [leaf.shape for leaf in pytree.tree_leaves(filled_cache(MODELS[variant], random_ids(1, n)).states)]
        for n in (5, 11)
    ]
    return shapes[0] == shapes[1]


@every_variant
def test_a_token_changes_nothing_before_it_and_something_from_it_on(variant):
    model, ids = MODELS[variant], random_ids(1, 30)
    before = logits_of(model, ids)
    assert len(set(before.argmax(-1).flatten().tolist())) > 5, "the outputs are all but constant"
    for t in range(ids.shape[1]):
        other = ids.clone()
        other[0, t] = (ids[0, t] + 1) % VOCAB
        after = logits_of(model, other)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@every_variant
@settings(max_examples=4)
@example([1] * 33)
@example([0, 33])
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_any_split_gives_what_one_call_gives(variant, lengths):
    model, ids = MODELS[variant], random_ids(2, 33)
    cache, parts, begin = TitansCache(model.config), [], 0
    with torch.no_grad():
        for length in [*lengths, 100]:
            stretch = ids[:, begin : begin + length]
            parts.append(model(stretch, past_key_values=cache).logits)
            begin += stretch.shape[1]
    assert cache.get_seq_length() == 33
    assert_near(torch.cat(parts, 1), logits_of(model, ids))


masks = st.integers(1, 3).flatmap(
    lambda rows: st.lists(
        st.integers(0, 9).flatmap(
            lambda width: st.lists(
                st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows
            )
        ),
        min_size=1,
        max_size=4,
    )
)
L, R = [False] * 6 + [True] * 5, [True] * 4 + [False] * 7
MIDDLE = [True] * 3 + [False] * 6 + [True] * 2


@every_variant
@settings(max_examples=4)
@example([[L, [True] * 11]], False)
@example([[R, [True] * 11], [[True], [True]], [[True] * 9, [False] * 9]], True)
@example([[MIDDLE, L, R], [R, MIDDLE, [False] * 11], [[True], [False], [True]]], True)
@given(masks, st.booleans())
def test_a_padded_row_equals_the_row_alone(variant, calls, mask_covers_all):
    """Each call has a mask of its own; the real tokens of a row, read together, are the row alone."""
    model, cache = MODELS[variant], TitansCache(MODELS[variant].config)
    rows = len(calls[0])
    got, texts, seen = [[] for _ in range(rows)], [[] for _ in range(rows)], []
    for number, call in enumerate(calls):
        real = torch.tensor(call, dtype=torch.bool).view(rows, -1)
        seen.append(real)
        ids = random_ids(*real.shape, seed=number)
        mask = torch.cat(seen, 1) if mask_covers_all else real
        with torch.no_grad():
            logits = model(ids, attention_mask=mask.long(), past_key_values=cache).logits
        for row in range(rows):
            got[row].append(logits[row, real[row]])
            texts[row].append(ids[row, real[row]])
    for logits, text in zip(got, texts, strict=True):
        assert_near(torch.cat(logits), logits_of(model, torch.cat(text)[None])[0])


@every_variant
def test_rows_do_not_see_each_other(variant):
    model, ids = MODELS[variant], random_ids(3, 20)
    together = logits_of(model, ids)
    for row in range(3):
        assert_near(together[row], logits_of(model, ids[row : row + 1])[0])
    other = torch.cat([ids[:1], random_ids(2, 20, seed=1)])
    assert torch.equal(logits_of(model, other)[0], together[0])


@different
def test_without_a_mask_the_padding_id_is_a_token_like_any_other(variant):
    model = small_model(variant, pad_token_id=0, eos_token_id=1)
    ids = random_ids(1, 12)
    ids[0, :4] = 0
    alone = logits_of(model, ids[:, 4:])
    assert (logits_of(model, ids)[:, 4:] - alone).abs().max() > 1e-3
    mask = (torch.arange(12) >= 4).long()[None]
    with torch.no_grad():
        assert_near(model(ids, attention_mask=mask).logits[:, 4:], alone)


@different
def test_embeddings_are_read_like_ids(variant):
    model, ids = MODELS[variant], random_ids(2, 13)
    with torch.no_grad():
        given_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(given_embeddings, logits_of(model, ids))


@every_variant
def test_an_early_token_matters_beyond_the_reach_of_attention(variant):
    """And only through what was learned: with writing and data-dependent gates off, nothing passes."""
    model, ids = small_model(variant), random_ids(1, 80)
    other = ids.clone()
    other[0, 3] = (ids[0, 3] + 1) % VOCAB
    # What attention and convolutions of all layers together can reach.
    reach = 3 + LAYERS * (max(WINDOW, SEGMENT) + model.config.memory.conv_kernel)
    late = slice(reach + SEGMENT, None)
    moved = (logits_of(model, other) - logits_of(model, ids)).abs()
    if variant == "window":
        assert moved[:, late].max() == 0
        return
    assert moved[:, late].max() > 1e-4
    if not bounded(variant):
        return
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    for memory in memories:
        memory.max_step_size = 0.0
        torch.nn.init.zeros_(memory.gate_weight)
    still = (logits_of(model, other) - logits_of(model, ids)).abs()
    assert memories and still[:, :reach].max() > 1e-4 and not still[:, late].any()


@every_variant
def test_scores_depend_on_distances_alone_ten_million_tokens_in(variant):
    if not bounded(variant):
        pytest.skip("what it has read would not fit into any computer")
    model, ids = small_model(variant).float(), random_ids(1, 24)
    period = math.lcm(SEGMENT, CHUNK)

    def read_from(position):
        cache = TitansCache(model.config)
        with torch.no_grad():
            fresh = tuple(layer.mixer.initial_state(1) for layer in model.model.layers)
            cache.store(map_state(lambda x: x if x.is_floating_point() else x + position, fresh), position)
            return model(ids, past_key_values=cache).logits

    near = read_from(period)
    assert_near(read_from(10**7 // period * period), near, 1e-4)
    if MODELS[variant].config.has_memory:
        assert (read_from(10**7 // period * period + 1) - near).abs().max() > 1e-3, "phases must matter"


@different
def test_shapes_alone_are_enough_and_a_batch_may_be_empty(variant):
    """On the meta device, in FakeTensorMode, and for no rows at all."""
    with torch.device("meta"):
        outputs = [small_model(variant)(torch.zeros(2, 9, dtype=torch.int64))]
    with FakeTensorMode():
        outputs.append(TitansForCausalLM(small_config(variant)).eval()(torch.zeros(2, 9, dtype=torch.int64)))
    for output in outputs:
        assert output.logits.shape == (2, 9, VOCAB) and output.past_key_values.num_columns == 9
    model, ids = MODELS[variant], random_ids(2, 9)
    output = model(ids[:0], use_cache=True)
    assert output.logits.shape == (0, 9, VOCAB)
    assert model(ids[:0, :1], past_key_values=output.past_key_values).logits.shape == (0, 1, VOCAB)
