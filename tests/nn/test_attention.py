"""The three attentions against plain loops: outputs, states and gradients, over any split and ragged rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from titans.nn.attention import attend
from titans.nn.attention.full import FullAttention, FullAttentionState
from titans.nn.attention.segment import SegmentAttention, SegmentState
from titans.nn.attention.window import WindowAttention, WindowState
from titans.nn.packing import Packed
from titans.nn.rotary import apply_rotary, rotary_tables

from . import naive
from .packed import gradients, plans, random_rows, run_in_calls, totals

HIDDEN, HEADS, DIM = 5, 2, 4
ABSENT = torch.zeros(HEADS, DIM, dtype=torch.float64)


def randomised(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.7)
    return layer.double()


def persistent_tokens(count, seed):
    if count is None:
        return None
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()


def weights_of(layer):
    if isinstance(layer, FullAttention):
        query, key_value = layer.qkv.weight.split([HEADS * DIM, 2 * HEADS * DIM])
        return query, key_value, layer.output.weight
    return layer.query.weight, layer.key_value.weight, layer.output.weight


def compare(layer, leaves, outputs, state, expected, expected_state):
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)
    got_leaves, want_leaves = pytree.tree_leaves(state), pytree.tree_leaves(expected_state)
    for got, want in zip(got_leaves, want_leaves, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)
    leaves = [leaf for leaf in [*leaves, *layer.parameters()] if leaf is not None]
    floats = [leaf for leaf in got_leaves if leaf.is_floating_point()]
    expected_floats = [leaf for leaf in want_leaves if leaf.is_floating_point()]
    for got, want in zip(
        gradients([*outputs, *floats], leaves), gradients([*expected, *expected_floats], leaves), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


counts = st.sampled_from([None, 0, 1, 3])


@settings(max_examples=25)
@given(plan=plans, window=st.integers(1, 6), num=counts, begin=st.booleans(), seed=st.integers(0, 999))
# The gradient of a slice that begins at an odd number.
@example(plan=[([0], 0), ([5], 0)], window=6, num=None, begin=False, seed=0)
def test_window_is_the_plain_loop(plan, window, num, begin, seed):
    layer = randomised(WindowAttention(HIDDEN, HEADS, DIM, window), seed)
    rows, persistent = random_rows(plan, HIDDEN, seed), persistent_tokens(num, seed)
    state = layer.initial_state(len(rows), dtype=torch.float64) if begin else None
    outputs, state = run_in_calls(
        lambda x, packed, positions, state: layer(x, state, persistent, packed), rows, plan, state
    )
    made = [naive.attention(row, None, persistent, weights_of(layer), HEADS, window) for row in rows]
    keys, values = (
        torch.stack([naive.stacked(lists[i], window - 1, ABSENT, right=True) for _, lists in made])
        for i in (0, 1)
    )
    expected_state = WindowState(keys, values, torch.tensor(totals(plan)))
    compare(layer, [*rows, persistent], outputs, state, [y for y, _ in made], expected_state)


@settings(max_examples=15)
@given(plan=plans, begin=st.booleans(), seed=st.integers(0, 999))
def test_full_is_the_plain_loop(plan, begin, seed):
    layer = randomised(FullAttention(HIDDEN, HEADS, DIM), seed)
    rows = random_rows(plan, HIDDEN, seed)
    state = layer.initial_state(len(rows), dtype=torch.float64) if begin else None
    outputs, state = run_in_calls(
        lambda x, packed, positions, state: layer(x, state, packed), rows, plan, state
    )
    made = [naive.attention(row, None, None, weights_of(layer), HEADS, 10**9) for row in rows]
    slots = max(totals(plan))
    keys, values = (
        torch.stack([naive.stacked(lists[i], slots, ABSENT) for _, lists in made]) for i in (0, 1)
    )
    expected_state = FullAttentionState(keys, values, torch.tensor(totals(plan)))
    compare(layer, rows, outputs, state, [y for y, _ in made], expected_state)


def with_stale_slots(state, start, begun):
    """What a segment's state may hold when its call comes: anything at all at `start` and after it."""
    stale = torch.arange(state.token_keys.shape[1]) >= start[:, None]
    # A row without new tokens hands its state on as it is, so spoil only the rows that will be written.
    stale = (stale & begun[:, None])[:, :, None, None]
    return pytree.tree_map(lambda leaf: torch.where(stale, torch.nan, leaf), state)


@settings(max_examples=30)
@given(plan=plans, length=st.integers(1, 6), num=counts, use_fresh=st.booleans(), seed=st.integers(0, 999))
def test_segment_is_the_plain_loop(plan, length, num, use_fresh, seed):
    layer = randomised(SegmentAttention(HIDDEN, HEADS, DIM, length), seed)
    persistent = persistent_tokens(num, seed)
    rows = random_rows(plan, HIDDEN, seed)
    contexts = random_rows(plan, HIDDEN, seed + 1)

    def step(both, packed, positions, state):
        lengths = packed.lengths
        x, context = both.split(HIDDEN, dim=-1)
        start = positions % length
        if x.shape[1] > length:  # wider than a segment with its padding: cut padding only
            x, context = x[:, :length], context[:, :length]
        fresh = use_fresh and not start.any() and (lengths is None or bool((lengths > 0).all()))
        begun = torch.full_like(start, x.shape[1]) if lengths is None else lengths
        state = with_stale_slots(state, start, begun > 0)
        z, state = layer(x, context, persistent, state, start, Packed.first(lengths, x.shape[1]), fresh)
        return torch.nn.functional.pad(z, (0, 0, 0, both.shape[1] - z.shape[1])), state

    joined = [torch.cat(pair, 1) for pair in zip(rows, contexts, strict=True)]
    outputs, state = run_in_calls(
        step,
        joined,
        plan,
        layer.initial_state(len(rows), dtype=torch.float64),
        room=lambda position: length - position % length,
    )
    expected, last = [], []
    for row, context in zip(rows, contexts, strict=True):
        segments = [
            naive.attention(x, h, persistent, weights_of(layer), HEADS, length)
            for x, h in zip(row.split(length), context.split(length), strict=True)
        ]
        expected.append(torch.cat([z for z, _ in segments]))
        last.append(segments[-1][1])
    leaves = [torch.stack([naive.stacked(lists[i], length, ABSENT) for lists in last]) for i in (2, 3, 0, 1)]
    compare(layer, [*rows, *contexts, persistent], outputs, state, expected, SegmentState(*leaves))


def layers():
    torch.manual_seed(0)
    return [
        (WindowAttention(HIDDEN, HEADS, DIM, 4), lambda layer, x: layer(x)[0]),
        (FullAttention(HIDDEN, HEADS, DIM), lambda layer, x: layer(x)[0]),
        (SegmentAttention(HIDDEN, HEADS, DIM, 9), lambda layer, x: layer(x, 2 * x)[0]),
    ]


@pytest.mark.parametrize("which", range(3))
def test_no_output_depends_on_a_later_token(which):
    layer, call = layers()[which]
    x = torch.randn(
        1, 9, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    (slope,) = torch.autograd.grad(call(randomised(layer, 0), x)[:, :5].square().sum(), x)
    assert (slope[:, :5] != 0).all() and (slope[:, 5:] == 0).all()


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_stay_close(which, dtype):
    layer, call = layers()[which]
    x = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = layer.to(dtype)
    y = call(layer, x)
    assert y.dtype == dtype
    expected = call(layer.double(), x.double())
    assert (y - expected).abs().max() < (1e-6 if dtype == torch.float32 else 3e-2) * expected.abs().max()


@pytest.mark.parametrize("kind", [WindowAttention, FullAttention])
def test_scores_depend_on_distances_alone_after_ten_million_tokens(kind):
    torch.manual_seed(0)
    layer = kind(32, 2, 16, 8) if kind is WindowAttention else kind(32, 2, 16)
    x, early = torch.randn(1, 24, 32), layer.initial_state(1)
    persistent = (torch.randn(3, 32),) if kind is WindowAttention else ()
    if kind is WindowAttention:
        late = dataclasses.replace(early, position=early.position + 10**7)
        y, y_late = layer(x, early, *persistent)[0], layer(x, late, *persistent)[0]
        # A window that looks full of zeros reaches seven tokens into the stretch.
        torch.testing.assert_close(y[:, 7:], y_late[:, 7:], atol=2e-6, rtol=0)
    else:
        q, k = layer.qkv(x).unflatten(-1, (3, 2, 16)).unbind(-3)[:2]
        scores = []
        for base in (0, 10**7):
            tables = rotary_tables(torch.arange(24) + base, 16, 10000.0, torch.float32)
            scores.append(torch.einsum("bthd,bshd->bhts", apply_rotary(q, *tables), apply_rotary(k, *tables)))
        torch.testing.assert_close(*scores, atol=2e-6, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize("continued", [False, True])
def test_window_memory_is_linear_in_time(continued):
    window, time, num = 8, 1000, 3
    layer = WindowAttention(HIDDEN, 1, DIM, window)
    state = layer.initial_state(1) if continued else None
    with LargestTensor() as largest:
        y, _ = layer(torch.randn(1, time, HIDDEN, requires_grad=True), state, torch.randn(num, HIDDEN))
        y.sum().backward()
    assert largest.numel <= (time + window) * (2 * window + num)


def test_a_window_does_not_keep_the_stretch_it_came_from_alive():
    layer = WindowAttention(HIDDEN, HEADS, DIM, 4)
    _, state = layer(torch.randn(1, 50, HIDDEN))
    assert state.keys.untyped_storage().nbytes() == state.keys.nbytes


@pytest.mark.parametrize("num", [None, 0, 3])
def test_the_fused_kernel_computes_the_same(num):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 3, 6)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = [draw(*shape), draw(*shape), draw(2, 7, 3, 6), draw(2, 7, 3, 6)]
    fixed = None if num is None else (draw(num, 3, 6), draw(num, 3, 6))
    visible = (torch.rand(2, 4, 7, generator=generator) < 0.5) | (torch.arange(7) == 0)
    leaves = inputs + list(fixed or ())
    made = [f(*inputs, visible, fixed) for f in (attend._attend_matmul, attend._attend_fused)]
    torch.testing.assert_close(*made)
    for a, b in zip(gradients(made[:1], leaves), gradients(made[1:], leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_that_cannot_be_are_refused():
    segment = SegmentAttention(HIDDEN, HEADS, DIM, 4)
    x = torch.randn(1, 5, HIDDEN)
    with pytest.raises(ValueError, match="time=5 exceeds segment_length=4"):
        segment(x, x)
    with pytest.raises(ValueError, match="start=None"):
        segment(x[:, :2], x[:, :2], state=segment.initial_state(1))
    with pytest.raises(ValueError, match="window=0"):
        WindowAttention(HIDDEN, HEADS, DIM, 0)
    with pytest.raises(ValueError, match="head_dim=3 must be even"):
        FullAttention(HIDDEN, HEADS, 3)(x)
