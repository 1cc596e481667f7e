"""Global and local memories against the equations, token by token, and however a text is cut and folded."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from titans.memory import MemoryState, assume_aligned
from titans.nn import BLOCKS, BlockSettings, NeuralMemory, TNTMemory
from titans.nn.memory.tnt.key_space import towards_keys

from ..tolerances import FLOAT64, assert_close
from .memory_oracle import Oracle, output, vectors

HIDDEN, HEADS, DIM = 6, 2, 4
FORMS = {
    "two layers": dict(chunk_size=4, local_chunk_sizes=[2], shard_length=4),
    "two local memories": dict(
        chunk_size=5, local_chunk_sizes=[1, 3], shard_length=6,
        form=dict(gates_see_keys=True, gate_hidden_size=3),
    ),
    "many shards in a chunk": dict(chunk_size=16, local_chunk_sizes=[3], shard_length=6, conv_kernel=1),
    "a shard of many chunks": dict(chunk_size=3, local_chunk_sizes=[4], shard_length=12, depth=3),
    "linear, plain": dict(
        chunk_size=4, local_chunk_sizes=[2], shard_length=8, depth=1,
        form=dict(normalize_step=False, row_limit=None, max_step_size=0.1),
    ),
    "the paper's form": dict(
        chunk_size=4, local_chunk_sizes=[2], shard_length=8,
        form=dict(name="paper", max_momentum=0.5, max_step_size=0.01),
    ),
    "features": dict(
        chunk_size=4, local_chunk_sizes=[2], shard_length=8, depth=1, features="sin", feature_size=7,
        form=dict(gates_see_keys=True),
    ),
}  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def layer_of(form, seed=0):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        layer = TNTMemory(HIDDEN, HEADS, DIM, **{"depth": 2, "expansion": 2, **form}).double()
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_the_equations(layer, x, reset=None, persistent=None):
    """One row (time, hidden_size): outputs, the global memory, the local ones, P and the position."""
    reset, outputs = [False] * len(x) if reset is None else reset, []

    def features(vector):
        return layer.feature_map(vector[None, None])[0, 0]

    def begin():
        memory = Oracle(layer)
        if persistent is not None:
            _, keys, values, _ = vectors(layer, persistent, [False] * len(persistent))
            for token, key, value in zip(persistent, keys, values, strict=True):
                memory.write(token, features(key), value, key)
            memory.anchor, memory.count = memory.weights, 0
        return memory, [Oracle(m) for m in layer.local], torch.zeros(HEADS, DIM, DIM, dtype=x.dtype)

    memory, local, key_sum = begin()
    for t, (query, key, value, gate) in enumerate(zip(*vectors(layer, x, reset), strict=True)):
        if reset[t]:
            memory, local, key_sum = begin()
        if memory.count % layer.shard_length == 0:
            local, key_sum = [Oracle(m) for m in layer.local], torch.zeros_like(key_sum)
        read, prior = memory.answer(memory.anchor, features(query)), memory.prior(features(query))
        memory.write(x[t], features(key), value, key)
        key_sum = key_sum + key[:, :, None] * key[:, None, :]
        asked = features(F.normalize((key_sum @ query[:, :, None])[..., 0], dim=-1))
        for each in local:
            each.write(x[t], features(key), value, key)
            read = read + each.answer(each.weights, asked)
            prior = prior + each.prior(asked)
        outputs.append(output(layer, read, prior, gate))
    return torch.stack(outputs), memory, local, key_sum


def assert_state(state, row, expected):
    _, memory, local, key_sum = expected
    found = [state.memory, *state.local.memories]
    for name in ("weights", "momentum", "anchor"):
        for known, oracle in zip(found, [memory, *local], strict=True):
            for a, b in zip(getattr(known, name), getattr(oracle, name), strict=True):
                assert_close(a[row], b, FLOAT64, name)
    assert_close(state.local.key_sum[row], key_sum, FLOAT64, "key sum")
    assert all(m.position[row] == memory.count for m in found)


def expanded(state):
    """With every anchor written out: whether one is stored depends on how the rows were read."""

    def is_memory(x):
        return isinstance(x, MemoryState)

    return pytree.tree_map(lambda x: x.expanded() if is_memory(x) else x, state, is_leaf=is_memory)


def assert_same_states(actual, expected):
    for a, b in zip(
        pytree.tree_leaves(expanded(actual)), pytree.tree_leaves(expanded(expected)), strict=True
    ):
        assert_close(a.detach(), b.detach(), FLOAT64, "state")


# Logits of forget and momentum, (2, heads), far enough out for gates of exactly 0 and 1.
GATES = {
    "open": [[1e3, 1e3], [1e3, 1e3]],
    "shut": [[-1e3, -1e3], [-1e3, -1e3]],
    "one of two": [[1e3, -1e3], [-1e3, 1e3]],
}


# What gates that are closed or open throughout do is the learner's, which is the same in every form.
@pytest.mark.parametrize(
    ("form", "gates"),
    [
        *(pytest.param(form, None, id=name) for name, form in FORMS.items()),
        *(pytest.param(FORMS["two local memories"], gates, id=name) for name, gates in GATES.items()),
        pytest.param(FORMS["linear, plain"], GATES["one of two"], id="linear, plain, one of two"),
    ],
)
def test_it_is_the_equations_token_by_token(form, gates):
    """Outputs, state and the gradient of every parameter, of whole rows and of rows with masked tokens."""
    layer, x, persistent = layer_of(form), tokens(2, 17, HIDDEN), tokens(2, HIDDEN, seed=5)
    for learner in (layer, *layer.local):
        if gates is not None:
            # A form refuses a bound of 1, with which a gate can be exactly 1.
            learner.form = dataclasses.replace(learner.form)
            object.__setattr__(learner.form, "max_momentum", 1.0)
            nn.init.zeros_(learner.gate_bias)
            learner.gate_bias.data[:2] += torch.tensor(gates).unsqueeze(-1)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def gradients(rows):
        return torch.autograd.grad(sum((y * tokens(*y.shape, seed=3)).sum() for y in rows), parameters)

    everywhere = torch.ones(2, 17, dtype=torch.bool)
    some = torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) < 0.8
    for mask in (everywhere, some) if gates is None or gates == GATES["one of two"] else (everywhere,):
        whole = mask is everywhere
        y, state = layer(
            x.masked_fill(~mask[..., None], torch.nan), mask=None if whole else mask, persistent=persistent
        )
        expected = [by_the_equations(layer, x[b, mask[b]], persistent=persistent) for b in range(2)]
        for row in range(2):
            assert_close(y[row, mask[row]], expected[row][0], FLOAT64, "outputs")
            assert_state(state, row, expected[row])
        found = gradients([y[row, mask[row]] for row in range(2)])
        for name, a, b in zip(names, found, gradients([each[0] for each in expected]), strict=True):
            assert_close(a, b, FLOAT64, f"gradient of {name}")


@every_form
@settings(max_examples=3)
@given(cuts=st.lists(st.integers(0, 17), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_any_split_with_masks_and_resets_is_one_call(form, cuts, seed):
    """And one call is every row's stretches between resets, alone, without their masked tokens."""
    layer, x, persistent = layer_of(form), tokens(2, 17, HIDDEN, seed=seed), tokens(2, HIDDEN, seed=5)
    drawn = torch.rand(2, 2, 17, generator=torch.Generator().manual_seed(seed))
    mask, reset = drawn[0] < 0.7, drawn[1] < 0.15
    x = x.masked_fill(~mask[..., None], torch.nan)
    whole, state = layer(x, mask=mask, reset=reset, persistent=persistent)
    assert whole.isfinite().all() and not whole[~mask].any()
    parts, running = [], None
    for begin, end in pairwise([0, *sorted(cuts), 17]):
        cut = slice(begin, end)
        y, running = layer(x[:, cut], running, mask[:, cut], reset[:, cut], persistent=persistent)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, FLOAT64, "outputs")
    assert_same_states(running, state)
    for row in range(2):
        begins = [0, *reset[row].nonzero().flatten().tolist()]
        for begin, end in zip(begins, [*begins[1:], 17], strict=True):
            real = mask[row, begin:end]
            alone, last = layer(x[row, begin:end][real][None], persistent=persistent)
            assert_close(whole[row, begin:end][real], alone[0], FLOAT64, "row alone")
        assert_same_states(pytree.tree_map(lambda leaf, row=row: leaf[row : row + 1], state), last)


@pytest.mark.parametrize(
    ("form", "pieces"),
    [
        *(pytest.param(form, [5, 24], id=name) for name, form in FORMS.items()),
        pytest.param(FORMS["two local memories"], [29], id="two local memories, one call"),
        pytest.param(FORMS["two local memories"], [1] * 29, id="two local memories, token by token"),
    ],
)
def test_whole_shards_side_by_side_are_shards_one_after_the_other(form, pieces):
    """Outputs, state, and the gradients of all parameters and of the input."""
    layer, x = layer_of(form), tokens(2, 29, HIDDEN).requires_grad_()
    leaves = [x, *layer.parameters()]

    def read(lengths, flags=None):
        state, parts = None, []
        for piece in x.split(lengths, 1):
            y, state = layer(piece, state, reset=None if flags is None else flags[:, : piece.shape[1]])
            parts.append(y)
        y = torch.cat(parts, 1)
        return y, state, torch.autograd.grad((y * tokens(*y.shape, seed=3)).sum(), leaves)

    folded = read(pieces)
    # With flags that say nothing every part of a shard is gathered.
    apart = read([29], torch.zeros(2, 29, dtype=torch.bool))
    assert_close(folded[0], apart[0], FLOAT64, "outputs")
    assert_same_states(folded[1], apart[1])
    for a, b in zip(folded[2], apart[2], strict=True):
        assert b.any(), "a parameter is dead"
        assert_close(a, b, FLOAT64, "gradients")


def test_shards_are_read_side_by_side():
    """Five whole shards of two rows are ten rows of one, the rest goes by itself."""
    layer, seen = layer_of(FORMS["two layers"]), []
    layer.local[0].step_size_gate.register_forward_hook(lambda _, __, gate: seen.append(gate.shape[:2]))
    _, state = layer(tokens(2, 22, HIDDEN))
    layer(tokens(2, 11, HIDDEN), state)
    assert seen == [(10, 4), (2, 2), (2, 2), (4, 4), (2, 1)]


@every_form
def test_no_token_reaches_back_and_each_reaches_on(form):
    layer, x = layer_of(form), tokens(1, 20, HIDDEN)
    before, _ = layer(x)
    for t in (0, 1, 3, 4, 7, 8, 12, 15, 19):
        other = x.clone()
        other[:, t] = tokens(HIDDEN, seed=t + 1)
        after, _ = layer(other)
        assert torch.equal(after[:, :t], before[:, :t]) and (after[:, t] - before[:, t]).abs().max() > 1e-6


def test_local_memories_forget_a_shard_and_the_global_one_does_not():
    """A token moves answers beyond its shard and its chunk, and none of them through a local memory."""
    layer = layer_of(dict(chunk_size=4, local_chunk_sizes=[2], shard_length=4, conv_kernel=1))
    x = tokens(1, 12, HIDDEN)
    other = torch.cat([tokens(1, 1, HIDDEN, seed=1), x[:, 1:]], 1)
    moved = (layer(other)[0] - layer(x)[0]).abs().amax((0, 2))
    assert (moved > 1e-6).all()
    layer.max_step_size = 0.0
    moved = (layer(other)[0] - layer(x)[0]).abs().amax((0, 2))
    assert (moved[:4] > 1e-6).all() and not moved[4:].any()


def test_a_query_turns_towards_the_keys_seen_so_far():
    queries, keys = (F.normalize(tokens(2, 150, 2, 3, seed=n), dim=-1) for n in range(2))
    start = tokens(2, 2, 3, 3, seed=2)
    start = start @ start.mT
    turned, key_sum = towards_keys(queries, keys, start)
    outer = keys.unsqueeze(-1) * keys.unsqueeze(-2)
    sums = start.unsqueeze(1) + outer.cumsum(1)
    expected = F.normalize((sums @ queries.unsqueeze(-1)).squeeze(-1), dim=-1)
    assert_close(turned, expected, FLOAT64, "queries")
    assert_close(key_sum, sums[:, -1], FLOAT64, "key sum")
    # What no key had a part in is gone: a plane of keys, and queries in it.
    flat = keys * torch.tensor([1.0, 1.0, 0.0]).double()
    assert not towards_keys(queries, flat, 0 * start)[0][..., 2].any()


def test_smaller_local_chunks_take_the_same_weights():
    form = FORMS["two layers"]
    layer = layer_of(form)
    finer = TNTMemory(HIDDEN, HEADS, DIM, 2, 2, **{**form, "local_chunk_sizes": [1]}).double()
    finer.load_state_dict(layer.state_dict())
    x = tokens(1, 9, HIDDEN)
    assert_close(finer(x)[0][0], by_the_equations(finer, x[0])[0], FLOAT64, "outputs")
    assert (finer(x)[0] - layer(x)[0]).abs().max() > 1e-6
    assert finer.local[0].max_step_size == 4 * layer.max_step_size == 2 * layer.local[0].max_step_size


@every_form
def test_a_fresh_context_keeps_what_the_global_memory_has_learned(form):
    layer, x = layer_of(form), tokens(1, 9, HIDDEN)
    _, state = layer(x)
    fresh, initial = layer.fresh_context(state), layer.initial_state(1)
    assert_same_states(fresh.local, initial.local)
    assert fresh.memory.position.tolist() == [0] and not fresh.tail.any()
    assert any(w.any() for w in fresh.memory.weights)
    assert (layer(x, fresh)[0] - layer(x)[0]).abs().max() > 1e-6


def test_narrow_layers_keep_what_they_learn_in_float32():
    layer = layer_of(FORMS["two layers"]).to(torch.bfloat16)
    x = tokens(2, 9, HIDDEN).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    assert y.dtype == state.tail.dtype == torch.bfloat16
    leaves = pytree.tree_leaves(dataclasses.replace(state, tail=None))
    assert {leaf.dtype for leaf in leaves} == {torch.float32, torch.int64}


def test_rows_said_to_be_aligned_are_not_looked_at():
    """Which a CUDA graph needs: at a position where a look would cut the stretch elsewhere."""
    layer, x = layer_of(FORMS["two layers"]), tokens(2, 8, HIDDEN)
    _, state = layer(x)
    elsewhere = pytree.tree_map(lambda leaf: leaf if leaf.is_floating_point() else leaf + 1, state)
    with assume_aligned():
        assert_close(layer(x, elsewhere)[0], layer(x, state)[0], FLOAT64, "outputs")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(local_chunk_sizes=[]), r"local_chunk_sizes=\[\]: give whole numbers"),
        (dict(local_chunk_sizes=[0]), r"local_chunk_sizes=\[0\]"),
        (dict(local_chunk_sizes=[2.0]), r"local_chunk_sizes=\[2.0\]"),
        (dict(local_chunk_sizes=[2, 3]), r"shard_length=8: give a multiple of all of \[2, 3\]"),
        (dict(shard_length=0), "shard_length=0"),
        (dict(chunk_size=0), "chunk_size=0"),
    ],
)
def test_a_wrong_size_is_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        TNTMemory(HIDDEN, HEADS, DIM, **{"local_chunk_sizes": [4], "shard_length": 8, **sizes})


def test_mac_refuses_local_memories():
    settings = BlockSettings(
        8, 1, 4, 16, 16, 16, 0, 1, 1, 1, 1e4, 1e-6, local_chunk_sizes=(4,), shard_length=8
    )
    assert isinstance(BLOCKS["mag"](settings).memory, TNTMemory)
    with pytest.raises(ValueError, match=r"local_chunk_sizes=\(4,\): what this block writes"):
        BLOCKS["mac"](settings)


def test_the_state_of_another_memory_is_refused():
    layer, plain = layer_of(FORMS["two layers"]), NeuralMemory(HIDDEN, HEADS, DIM).double()
    x = tokens(1, 3, HIDDEN)
    with pytest.raises(ValueError, match="state is a NeuralMemoryState"):
        layer(x, plain.initial_state(1))
    with pytest.raises(ValueError, match="state is a TNTMemoryState"):
        plain(x, layer.initial_state(1))
