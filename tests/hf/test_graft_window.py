"""A graft without memories is its base behind a window: against the definition, in any split and place."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from titans import graft
from titans.hf.graft.cache import GraftState
from titans.hf.graft.window import Window

from .grafts import (
    BLOCK,
    FAMILIES,
    SAME,
    SINKS,
    WINDOW,
    ExactRotary,
    assert_near,
    logits_of,
    random_ids,
    read_on,
    small_base,
    small_graft,
)

BASES = {family: small_base(family) for family in FAMILIES}


def seen_by(token: int) -> tuple[list[int], list[int]]:
    """Which tokens a token sees, itself the last, and the positions that they have for it."""
    block = token // BLOCK
    if block < 2:
        return list(range(token + 1)), list(range(token + 1))
    seen = [*range(SINKS), *range((block - 1) * BLOCK, token + 1)]
    return seen, list(range(len(seen)))


@torch.no_grad()
def oracle(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (time, vocab) of a Llama with ids (time,), token by token: nothing is kept, nothing is moved."""
    rotary, config = model.model.rotary_emb, model.config
    heads, size = config.num_attention_heads, config.head_dim

    def rotated(x: Tensor, positions: list[int]) -> Tensor:
        cos, sin = (y[0] for y in rotary(x, torch.tensor([positions])))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        h, attention = layer.input_layernorm(x), layer.self_attn
        queries, keys, values = (
            project(h).unflatten(-1, (-1, size)).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys, values = (y.repeat_interleave(heads // len(y), 0) for y in (keys, values))
        found = []
        for token in range(len(ids)):
            seen, positions = seen_by(token)
            query = rotated(queries[:, [token]], positions[-1:])
            scores = query @ rotated(keys[:, seen], positions).transpose(1, 2) * size**-0.5
            found.append((scores.softmax(-1) @ values[:, seen]).transpose(0, 1).flatten(1))
        x = x + attention.o_proj(torch.cat(found))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


def test_beyond_the_window_it_is_the_definition() -> None:
    model, ids = small_base(), random_ids(5 * BLOCK + 4)
    model.model.rotary_emb = ExactRotary(model.config.head_dim)
    found = logits_of(graft(model, window=WINDOW, sinks=SINKS, adaptation=False), ids[None])[0]
    assert_near(found, oracle(model, ids))
    whole = logits_of(model, ids[None])[0]
    assert (found - whole)[WINDOW:].abs().max() > 0.1, "the window must have left something out"


@pytest.mark.parametrize("family", FAMILIES)
def test_within_the_window_it_is_the_model(family: str) -> None:
    model, ids = BASES[family], random_ids(2, WINDOW)
    expected, weights = logits_of(model, ids), copy.deepcopy(model.state_dict())
    grafted = graft(model, window=WINDOW, sinks=SINKS, adaptation=False)
    assert_near(logits_of(grafted, ids), expected)
    assert_near(read_on(grafted, ids.split([5, 1, 6], 1))[0], expected, SAME.get(family, 1e-10))
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_is_one_call(family: str) -> None:
    grafted = graft(BASES[family], window=WINDOW, sinks=SINKS, adaptation=False)
    ids = random_ids(2, 5 * BLOCK + 3)
    expected, tolerance = logits_of(grafted, ids), SAME.get(family, 1e-10)
    for sizes in ([1] * ids.shape[1], [BLOCK] * 5 + [3], [4, 0, 15, 1, 13]):
        assert_near(read_on(grafted, ids.split(sizes, 1))[0], expected, tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_at_different_places_are_read_as_alone(family: str) -> None:
    grafted = graft(BASES[family], window=WINDOW, sinks=SINKS, adaptation=False)
    ids, lengths = random_ids(3, 4 * BLOCK), torch.tensor([7, 4 * BLOCK, 2 * BLOCK])
    mask = torch.arange(4 * BLOCK) < lengths[:, None]
    cache = grafted(ids, attention_mask=mask).past_key_values
    more = random_ids(3, 2 * BLOCK + 1, seed=1)
    # One token of each, over the end of every row's block, then many.
    one_each = [1] * (BLOCK + 2)
    found = read_on(grafted, more.split([*one_each, 2 * BLOCK + 1 - len(one_each)], 1), cache)[0]
    for row, length in enumerate(lengths):
        text = torch.cat([ids[row, :length], more[row]])[None]
        expected = logits_of(grafted, text)[:, length:]
        assert_near(found[[row]], expected, SAME.get(family, 1e-10))


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_moved_are_those_of_their_new_positions(family: str) -> None:
    model, ids = BASES[family], random_ids(1, 4 * BLOCK)
    grafted = graft(model, window=WINDOW, sinks=SINKS, adaptation=False)
    _, cache = read_on(grafted, [ids])
    state = cache.state.window
    seen, positions = seen_by(4 * BLOCK)
    assert state.slots == len(seen) - 1 == SINKS + BLOCK
    fresh = DynamicCache()
    with torch.no_grad():
        model(ids[:, seen[:-1]], position_ids=torch.tensor([positions[:-1]]), past_key_values=fresh)
    # Keys of the first layer depend on nothing but the token and its position.
    assert_near(state.keys[0], fresh.layers[0].keys, 1e-5)


def test_a_far_place_is_a_near_one_at_constant_memory() -> None:
    grafted, ids = small_graft(adaptation=False), random_ids(1, 60)
    _, cache = read_on(grafted, [ids])
    far, window = cache.clone(), cache.state.window
    place = 10_000_002
    assert place % BLOCK == 60 % BLOCK
    moved = replace(window, position=torch.tensor([place]))
    far.layers[0].state = GraftState(moved)
    more = random_ids(1, 2 * WINDOW + 1, seed=1)
    near, after = read_on(grafted, [more], cache)
    found, far = read_on(grafted, [more], far)
    assert torch.equal(found, near) and int(far.state.window.position) == place + more.shape[1]
    largest = [read_on(grafted, [random_ids(1, n)])[1].nbytes() for n in (WINDOW + BLOCK - 1, 20 * BLOCK - 1)]
    assert largest[0] == largest[1] and after.num_columns == 85


def test_nothing_accumulates_however_long_a_text_is() -> None:
    grafted, begin = small_graft(adaptation=False), random_ids(1, BLOCK)
    # Two layers look back two blocks beyond what attention sees, and to the beginning.
    end = random_ids(1, 5 * BLOCK, seed=2)
    short = torch.cat([begin, random_ids(1, BLOCK, seed=3), end], 1)
    long = torch.cat([begin, random_ids(1, 200 * BLOCK, seed=4), end], 1)
    assert_near(logits_of(grafted, long)[:, -BLOCK:], logits_of(grafted, short)[:, -BLOCK:], 1e-12)


def test_where_blocks_end() -> None:
    window = Window(WINDOW, SINKS)
    for position in range(4 * WINDOW):
        seen, positions = seen_by(position)
        assert window.slots(position) == positions[-1] == len(seen) - 1
        assert position + window.room(position) in (WINDOW, *range(WINDOW, 5 * WINDOW, BLOCK))


@pytest.mark.parametrize("sizes", [dict(window=4, sinks=0), dict(window=2, sinks=1), dict(window=6, sinks=3)])
def test_windows_of_any_size(sizes: dict[str, int]) -> None:
    grafted, ids = small_graft(adaptation=False, **sizes), random_ids(1, 23)
    assert_near(read_on(grafted, ids.split([7, 1, 15], 1))[0], logits_of(grafted, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, ids = small_base().to(dtype), random_ids(2, 5 * BLOCK)
    grafted = graft(model, window=WINDOW, sinks=SINKS, adaptation=False)
    found = read_on(grafted, ids.split(BLOCK + 1, 1))[0]
    assert torch.equal(logits_of(grafted, ids[:, :WINDOW]), logits_of(model, ids[:, :WINDOW]))
    expected = logits_of(graft(BASES["llama"], window=WINDOW, sinks=SINKS, adaptation=False), ids)
    assert found.dtype == dtype and (found - expected).norm() < 0.05 * expected.norm()
