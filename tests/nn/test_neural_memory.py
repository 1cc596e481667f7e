"""The memory as a layer: cut anywhere, masked, reset, in low precision, and trained through."""

from __future__ import annotations

import dataclasses
import itertools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from titans.memory import MemoryNetwork, memory_read
from titans.nn import FORMS, BlockContext, MemoryForm, NeuralMemory
from titans.nn.memory import learner
from titans.state import flatten_alike

from ..tolerances import FLOAT64, assert_close

HIDDEN, CHUNK = 6, 3
LAYERS = [
    dict(depth=1),
    dict(),
    dict(depth=1, form=dict(normalize_step=False, max_step_size=0.1)),
    dict(depth=3, conv_kernel=1, expansion=1),
    dict(form=dict(gates_see_keys=True, gate_hidden_size=5)),
    dict(form=dict(bounded_half_lives=True), half_lives=(20.0, 1e6)),
    dict(depth=1, features="sin", feature_size=7, start="sharp", form=dict(gates_see_keys=True)),
    dict(depth=1, features="product"),
    dict(rule="memora", objective="adaptive_huber", form=dict(forget_by_row=True)),
]
NAMES = ["default", "two layers", "plain steps", "three layers", "seen keys", "bounded", "sin", "product"]
NAMES += ["distributions"]
every_form = pytest.mark.parametrize("form", LAYERS, ids=NAMES)


def layer_of(form, seed=0):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        sizes = dict(num_heads=2, head_dim=4, depth=2, expansion=2, chunk_size=CHUNK)
        layer = NeuralMemory(HIDDEN, **{**sizes, **form}).double()
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_states(actual, expected):
    (found, wanted), _ = flatten_alike((actual, expected))
    for a, b in zip(found, wanted, strict=True):
        assert_close(a.detach(), b.detach(), FLOAT64, "state")


@every_form
@settings(max_examples=5)
@given(cuts=st.lists(st.integers(0, 14), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_split_with_masks_and_resets_is_one_call(form, cuts, seed):
    """And one call is every row's stretches between resets, alone, without their masked tokens."""
    layer, x, persistent = layer_of(form), tokens(2, 14, HIDDEN, seed=seed), tokens(2, HIDDEN, seed=5)
    drawn = torch.rand(2, 2, 14, generator=torch.Generator().manual_seed(seed))
    mask, reset = drawn[0] < 0.7, drawn[1] < 0.2
    x = x.masked_fill(~mask[..., None], torch.nan)
    whole, state = layer(x, mask=mask, reset=reset, persistent=persistent)
    assert whole.isfinite().all() and not whole[~mask].any()
    parts, running, edges = [], None, [0, *sorted(cuts), 14]
    for begin, end in pairwise(edges):
        cut = slice(begin, end)
        y, running = layer(x[:, cut], running, mask[:, cut], reset[:, cut], persistent=persistent)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, FLOAT64, "outputs")
    assert_same_states(running, state)
    for row in range(2):
        begins = [0, *reset[row].nonzero().flatten().tolist()]
        for begin, end in zip(begins, [*begins[1:], 14], strict=True):
            real = mask[row, begin:end]
            alone, last = layer(x[row, begin:end][real][None], persistent=persistent)
            assert_close(whole[row, begin:end][real], alone[0], FLOAT64, "row alone")
        assert_same_states(pytree.tree_map(lambda leaf, row=row: leaf[row : row + 1], state), last)


@pytest.mark.parametrize(("norm", "rule"), [(False, None), (True, None), (True, "memora")])
def test_the_prior_is_what_a_memory_answers_that_has_read_nothing(norm, rule):
    torch.manual_seed(0)
    layer = NeuralMemory(8, 2, 4, depth=2, form=dict(norm=norm), rule=rule).double()
    for weight in (layer.initial_weights[-1], layer.norm_weight, layer.norm_bias):
        if weight is not None:
            nn.init.normal_(weight)
    queries = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    fresh = layer.initial_state(2).memory
    slow = dict(norm_weight=layer.norm_weight, norm_bias=layer.norm_bias, base=layer.base)
    assert_close(layer.prior(queries), memory_read(layer.inner, queries, fresh, **slow), FLOAT64, "prior")
    assert NeuralMemory(8, 2, 4, depth=2, form=dict(decay_to_initial=False)).prior(queries) is None


@every_form
def test_a_reset_row_is_a_new_row_to_the_bit(form):
    layer, x, persistent = layer_of(form), tokens(1, 9, HIDDEN), tokens(3, HIDDEN, seed=1)
    fresh = layer.initial_state(1, persistent)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, 8] = True
    mask = ~reset
    # A reset at the very end, on a token that is not read: the state after it is a new one.
    _, state = layer(x, mask=mask, reset=reset, persistent=persistent)
    assert state.memory.position.tolist() == [0] and not state.tail.any()
    for part in ("weights", "momentum", "anchor"):
        for actual, expected in zip(getattr(state.memory, part), getattr(fresh.memory, part), strict=True):
            assert torch.equal(actual, expected)
    # What was read before it has no effect any more.
    reset = torch.arange(9)[None] == 4
    one, _ = layer(x, reset=reset, persistent=persistent)
    other, _ = layer(
        torch.cat([tokens(1, 4, HIDDEN, seed=7), x[:, 4:]], 1), reset=reset, persistent=persistent
    )
    assert torch.equal(one[:, 4:], other[:, 4:]) and not torch.equal(one[:, :4], other[:, :4])


@every_form
def test_persistent_tokens_are_read_first_and_then_a_chunk_begins(form):
    layer, persistent = layer_of(form), tokens(4, HIDDEN, seed=1)
    fresh, plain = layer.initial_state(2, persistent), layer.initial_state(2)
    _, read = layer(persistent[None])
    for actual, expected in zip(fresh.memory.weights, read.memory.weights, strict=True):
        assert_close(actual[:1], expected, FLOAT64, "weights")
    assert any((m != 0).any() for m in fresh.memory.momentum) and not any(
        m.any() for m in plain.memory.momentum
    )
    assert all(
        a is w or torch.equal(a, w) for a, w in zip(fresh.memory.anchor, fresh.memory.weights, strict=True)
    )
    assert fresh.memory.position.tolist() == [0, 0] and not fresh.tail.any()


@every_form
@pytest.mark.parametrize("carried", [False, True])
def test_a_gradient_reaches_every_parameter(form, carried):
    layer = layer_of(form)
    x, persistent = tokens(2, 11, HIDDEN).requires_grad_(), tokens(2, HIDDEN, seed=1).requires_grad_()
    y, state = layer(x, persistent=persistent)
    if carried:
        y, _ = layer(tokens(2, 5, HIDDEN, seed=2), state)
    (y * tokens(*y.shape, seed=3)).sum().backward()
    for name, leaf in [*layer.named_parameters(), ("x", x), ("persistent", persistent)]:
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any(), f"{name} is dead"
        if name == "gate_bias":
            assert (leaf.grad != 0).all(), "a gate is dead"


@every_form
def test_gradients_are_those_of_finite_differences(form):
    layer, persistent = layer_of(form), tokens(1, HIDDEN, seed=1)
    mask, reset = torch.tensor([[1, 1, 0, 1, 1, 1, 1]]).bool(), torch.arange(7)[None] == 4
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        y, state = torch.func.functional_call(
            layer, given, (x, None, mask, reset), dict(persistent=persistent)
        )
        return y, state.memory.weights[0]

    x = tokens(1, 7, HIDDEN).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


def test_a_masked_nan_reaches_no_gradient():
    layer, mask = layer_of({}), torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]]).bool()
    x = tokens(2, 6, HIDDEN).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    y, _ = layer(x, mask=mask)
    y.square().sum().backward()
    assert x.grad.isfinite().all() and not x.grad[~mask].any() and x.grad[mask].any()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_memory_of_a_narrow_layer_is_float32(dtype):
    layer = layer_of({}).to(dtype)
    x, persistent = tokens(2, 8, HIDDEN).to(dtype), tokens(2, HIDDEN, seed=1).to(dtype)
    y, state = layer(x, persistent=persistent)
    assert y.dtype == state.tail.dtype == dtype
    for memory in (state.memory, layer.initial_state(1).memory):
        for part in ("weights", "momentum", "anchor"):
            assert {w.dtype for w in getattr(memory, part)} == {torch.float32}


def test_gates_are_exact_under_autocast(monkeypatch):
    layer, x = layer_of({}).float(), tokens(2, 8, HIDDEN).float()
    seen, scan = [], learner.memory_scan

    def spy(network, queries, keys, values, *gates, **options):
        # Between the projections and the scan: the forget, momentum and step size of every token.
        seen.append(gates[:3])
        return scan(network, queries, keys, values, *gates, **options)

    monkeypatch.setattr(learner, "memory_scan", spy)
    expected, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, state = layer(x)
    for with_autocast, without in zip(seen[1], seen[0], strict=True):
        assert with_autocast.dtype == torch.float32 and torch.equal(with_autocast, without)
    assert narrow.dtype == torch.bfloat16 and state.memory.weights[0].dtype == torch.float32
    assert (narrow.float() - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


def test_half_lives_are_spread_over_the_heads():
    layer = NeuralMemory(8, num_heads=5, head_dim=4, depth=2, chunk_size=16, half_lives=(64.0, 1e6)).double()
    nn.init.zeros_(layer.gate_weight)
    forget, momentum, step_size, _ = layer._gates(
        *(torch.zeros(1, 1, *s, dtype=torch.float64) for s in ((8,), (5, 4)))
    )
    half_lives = (torch.log(torch.tensor(0.5)) / torch.log1p(-forget[0, 0, :, 0])).log()
    assert_close(half_lives[[0, -1]], torch.tensor([64.0, 1e6]).double().log(), 1e-6, "half-lives")
    steps = half_lives.diff()
    assert_close(steps, steps[:1].expand(4), 1e-3, "their logarithms' distances")
    assert (momentum < layer.form.max_momentum).all() and (step_size < layer.max_step_size).all()


@pytest.mark.parametrize("bounded", [False, True])
def test_a_bounded_head_forgets_at_least_as_fast_as_at_first_whatever_its_gate_says(bounded):
    bounds = torch.tensor([64.0, 64.0**0.5 * 1e3, 1e6]).double()
    form = dict(bounded_half_lives=bounded)
    layer = NeuralMemory(8, 3, 4, depth=2, half_lives=(64.0, 1e6), form=form).double()
    with torch.no_grad():
        layer.gate_bias[0] = torch.linspace(-60, 3, 2).double()
    forget, *_ = layer._gates(*(torch.zeros(1, 1, *s, dtype=torch.float64) for s in ((8,), (3, 4))))
    half_lives = -math.log(2) / torch.log1p(-forget[0, 0])
    assert (half_lives[:, 1] < 1).all(), "an open gate forgets at once"
    if bounded:
        assert_close(half_lives[:, 0].log(), bounds.log(), 1e-6, "half-lives of gates that are shut")
    else:
        assert (half_lives[:, 0] > 1e20).all()


@pytest.mark.parametrize("sees", [False, True])
def test_gates_that_see_keys_know_what_came_before_and_others_the_token_alone(sees):
    layer = layer_of(dict(form=dict(gates_see_keys=sees)))
    x = tokens(1, CHUNK + 2, HIDDEN)
    other = torch.cat([tokens(1, CHUNK + 1, HIDDEN, seed=9), x[:, -1:]], 1)
    one, another = (layer(text, context=BlockContext(trace=True))[2] for text in (x, other))
    for name in ("forget", "momentum", "step_size"):
        assert torch.equal(getattr(one, name)[:, -1], getattr(another, name)[:, -1]) is not sees


def test_the_logits_of_gates_move_by_what_each_heads_key_has_of_their_direction():
    layer, x = layer_of(dict(form=dict(gates_see_keys=True))), tokens(1, 5, HIDDEN)
    keys = nn.functional.normalize(tokens(1, 5, 2, 4), dim=-1)
    with_keys, without = (layer._gates(x, k)[2] / layer.max_step_size for k in (keys, 0 * keys))
    for head, of_layer in itertools.product(range(2), range(2)):
        moved = torch.logit(with_keys)[0, :, head, of_layer] - torch.logit(without)[0, :, head, of_layer]
        direction = layer.gate_key_weight[2, head, of_layer]
        assert_close(moved, keys[0, :, head] @ direction * 4**0.5, 1e-9, "logits")


def test_a_hidden_layer_of_the_gates_adds_to_their_logits():
    layer, x = layer_of(dict(form=dict(gates_see_keys=True, gate_hidden_size=5))), tokens(1, 5, HIDDEN)
    keys = nn.functional.normalize(tokens(1, 5, 2, 4), dim=-1)
    hidden = nn.functional.silu(torch.cat([x, 2 * keys.flatten(2)], -1) @ layer.gate_up_weight.mT)
    added = (hidden @ layer.gate_down_weight.mT).view(1, 5, 3, 2, 2)[:, :, 2]
    with_layer = torch.logit(layer._gates(x, keys)[2] / layer.max_step_size)
    with torch.no_grad():
        layer.gate_down_weight.zero_()
    without = torch.logit(layer._gates(x, keys)[2] / layer.max_step_size)
    assert_close(with_layer - without, added, 1e-9, "logits")


def test_a_frozen_layer_does_not_learn():
    layer, x = layer_of({}), tokens(1, 9, HIDDEN)
    layer.max_step_size = 0.0
    _, state = layer(x)
    assert not any(momentum.any() for momentum in state.memory.momentum)


def test_it_stays_finite_over_a_long_monotone_stream():
    """The same token ten thousand times, then another: what an unbounded step size would blow up on."""
    layer = layer_of({}).float()
    x = tokens(2, HIDDEN).float().repeat_interleave(5000, 0)[None]
    with torch.no_grad():
        y, state = layer(30 * x)
    assert y.isfinite().all()
    assert all(w.abs().max() < 100 for w in (*state.memory.weights, *state.memory.momentum))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x, state: (x[0],), r"x has shape \(5, 6\): give \(batch, time, hidden_size=6\)"),
        (lambda x, state: (x[..., :4],), r"x has shape \(2, 5, 4\)"),
        (lambda x, state: (x, state.memory), "state is a MemoryState"),
        (lambda x, state: (x[:1], state), "state holds 2 rows: give one for each of x's 1"),
        (lambda x, state: (x, None, torch.ones(2, 3, dtype=torch.bool)), r"mask has shape \(2, 3\)"),
        (lambda x, state: (x.float(), None), "x is torch.float32 and the layer torch.float64"),
        (lambda x, state: (x, None, torch.ones(2, 5)), "mask .* dtype torch.float32"),
        (lambda x, state: (x, None, None, torch.ones(1, 5, dtype=torch.bool)), r"reset has shape \(1, 5\)"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    layer, x = layer_of({}), tokens(2, 5, HIDDEN)
    with pytest.raises(ValueError, match=message):
        layer(*arguments(x, layer.initial_state(2)))


@pytest.mark.parametrize("other", [dict(conv_kernel=1), dict(conv_kernel=6), dict(num_heads=4)])
@pytest.mark.parametrize("head_dim", [4, 16])
def test_a_state_of_another_layer_is_refused(other, head_dim):
    # With heads of 16 it is compiled code that would read beyond what there is.
    sizes = dict(hidden_size=HIDDEN, num_heads=2, head_dim=head_dim, depth=2)
    x = torch.randn(2, 5, HIDDEN)
    state = NeuralMemory(**{**sizes, **other})(x)[1]
    with pytest.raises(ValueError, match="the state's convolution tail has shape"):
        NeuralMemory(**sizes)(x, state)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(num_heads=0),
        dict(chunk_size=0),
        dict(conv_kernel=0),
        dict(form="best"),
        dict(form=3),
        dict(start="middle"),
        dict(half_lives=(1e6, 1e3)),
        dict(half_lives=(0.0, 1e3)),
    ],
)
def test_a_wrong_size_is_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        NeuralMemory(HIDDEN, **{"num_heads": 2, **wrong})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_momentum", 1),
        ("max_momentum", math.nan),
        ("gate_hidden_size", -1),
        ("gate_hidden_size", 2.0),
        ("max_step_size", -1),
        ("max_step_size", math.inf),
        ("activation", "relu"),
        ("norm", "no"),
        ("row_limit", 0),
        ("length_floor", math.inf),
    ],
)
def test_a_wrong_field_of_the_form_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: (give|choose)"):
        NeuralMemory(HIDDEN, 2, form={name: value})
    with pytest.raises(ValueError, match="form has no field 'nrom': choose from"):
        NeuralMemory(HIDDEN, 2, form={"nrom": True})


def test_a_form_is_a_name_a_name_with_changes_or_an_object():
    assert MemoryForm.of("stable") == MemoryForm.of({}) == MemoryForm()
    changed = MemoryForm.of({"name": "recall", "gate_hidden_size": 3})
    assert changed == dataclasses.replace(FORMS["recall"], gate_hidden_size=3)
    layer = NeuralMemory(HIDDEN, 2, form=changed)
    assert layer.form is changed and layer.gate_up_weight.shape[0] == 3 and layer.max_step_size == 0.25
    paper = NeuralMemory(HIDDEN, 2, 4, depth=2, chunk_size=8, form="paper")
    assert paper.network == MemoryNetwork(4) and paper.max_step_size == pytest.approx(2 * (1 - 0.9) / 8)


def test_an_induction_memory_begins_with_what_followed_what():
    # Twelve symbols in an order of no pattern, twice: at its second time each symbol asks for its successor.
    found = {"induction": [], "random": []}
    for start, seed in itertools.product(found, range(5)):
        torch.manual_seed(seed)
        symbols = nn.functional.normalize(torch.randn(12, 64), dim=-1) * 8
        layer = NeuralMemory(64, 1, 64, conv_kernel=3, chunk_size=4, start=start)
        read, _, _ = layer.learn(torch.cat([symbols, symbols]).unsqueeze(0), None, BlockContext())
        values = nn.functional.silu(layer.input(symbols).chunk(4, -1)[2])
        update = (read.reads - layer.prior(read.queries))[0, 13:23, 0]
        scores = nn.functional.normalize(update, dim=-1) @ nn.functional.normalize(values, dim=-1).T
        found[start].append((scores.argmax(-1) == torch.arange(2, 12)).float().mean().item())
    assert sum(found["induction"]) / 5 > 0.6 and sum(found["random"]) / 5 < 0.25, found
    with pytest.raises(ValueError, match="give a conv_kernel of at least 2"):
        NeuralMemory(64, 1, 64, conv_kernel=1, start="induction")
