"""Every block of the registry alone: ragged rows and their gradients, states as values, surprise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.memory import MemoryState, memory_read
from titans.nn import BlockContext, MemoryTrace, NeuralMemory
from titans.nn.blocks import BLOCKS, BlockSettings, has_memory
from titans.nn.combine import MemoryGate, MemorySum
from titans.nn.memory.self_modifying import SelfModifyingState
from titans.nn.packing import Packed

from ..tolerances import FLOAT64, assert_close

HIDDEN, HEADS, CHUNK, SEGMENT = 6, 2, 3, 5
SETTINGS = BlockSettings(
    hidden_size=HIDDEN,
    num_heads=HEADS,
    head_dim=4,
    chunk_size=CHUNK,
    segment_length=SEGMENT,
    window=4,
    num_persistent_tokens=2,
    conv_kernel=3,
    memory_depth=2,
    memory_expansion=2,
    rope_theta=100.0,
    norm_eps=1e-6,
    periods=(CHUNK, 6),
)
every_block = pytest.mark.parametrize("variant", BLOCKS)
# Those in which the memory is one `NeuralMemory`.
with_one_memory = pytest.mark.parametrize("variant", [v for v in BLOCKS if has_memory(v) and v != "hope"])
FEATURES = dict(memory_depth=1, memory_options=dict(features="sin", feature_size=7, start="sharp"))
# Every block, and those with a memory also on features of their keys.
BLOCKS_AND_FEATURES = [(v, {}) for v in BLOCKS] + [(v, FEATURES) for v in filter(has_memory, BLOCKS)]
every_block_and_features = pytest.mark.parametrize(
    ("variant", "changes"),
    BLOCKS_AND_FEATURES,
    ids=[v + " features" * bool(c) for v, c in BLOCKS_AND_FEATURES],
)


def block_of(variant, seed=0, **changes):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        block = BLOCKS[variant](dataclasses.replace(SETTINGS, **changes)).double()
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read(block, x, state=None, lengths=None):
    y, state, trace = traced(block, x, state, lengths, trace=False)
    assert trace is None
    return y, state


def traced(block, x, state=None, lengths=None, trace=True):
    state = block.initial_state(x.shape[0]) if state is None else state
    return block(x, state, BlockContext(Packed.first(lengths, x.shape[1]), trace))


def memory_states(state):
    found = pytree.tree_leaves(state, is_leaf=lambda x: isinstance(x, MemoryState))
    return [x for x in found if isinstance(x, MemoryState)]


def assert_same_states(actual, expected):
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert_close(a.detach(), b.detach(), FLOAT64, "state")


@every_block_and_features
def test_ragged_rows_are_rows_alone_gradients_included(variant, changes):
    """Two calls that leave the rows at different phases; what stands in the padding is huge."""
    block, calls = block_of(variant, **changes), ([7, 0, 3], [6, 8, 1], [1, 1, 1])
    rows = [tokens(sum(n), HIDDEN, seed=b).requires_grad_() for b, n in enumerate(zip(*calls, strict=True))]
    outputs, state, begin = [[] for _ in rows], block.initial_state(3), [0, 0, 0]
    for lengths in calls:
        pieces = [row[b : b + n] for row, b, n in zip(rows, begin, lengths, strict=True)]
        padded = [torch.cat([p, p.new_full((9 - len(p), HIDDEN), 1e3)]) for p in pieces]
        y, state = read(block, torch.stack(padded), state, torch.tensor(lengths))
        for row, n in enumerate(lengths):
            outputs[row].append(y[row, :n])
            begin[row] += n
    leaves = [*rows, *block.parameters()]

    def gradients(ys: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((y * tokens(*y.shape, seed=9)).sum() for y in ys), leaves)

    together = [torch.cat(parts) for parts in outputs]
    alone = [read(block, row[None])[0][0] for row in rows]
    for a, b in zip(together, alone, strict=True):
        assert_close(a, b, FLOAT64, "outputs")
    for a, b in zip(gradients(together), gradients(alone), strict=True):
        assert b.any(), "a parameter is dead"
        assert_close(a, b, FLOAT64, "gradients")


@every_block
def test_a_state_is_a_value(variant):
    """Batch first in every leaf, and no call writes into what it was given."""
    block = block_of(variant)
    _, state = read(block, tokens(3, 7, HIDDEN))
    assert {leaf.shape[0] for leaf in pytree.tree_leaves(state)} == {3}
    before = pytree.tree_map(torch.Tensor.clone, state)
    first, after = read(block, tokens(3, 4, HIDDEN, seed=1), state)
    for a, b in zip(pytree.tree_leaves(state), pytree.tree_leaves(before), strict=True):
        assert torch.equal(a, b)
    second, again = read(block, tokens(3, 4, HIDDEN, seed=1), state)
    assert torch.equal(first, second)
    assert_same_states(again, after)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.position = None
    nothing, same = read(block, tokens(3, 0, HIDDEN), state)
    assert nothing.shape == (3, 0, HIDDEN)
    assert_same_states(same, state)


@with_one_memory
def test_a_trace_has_every_token_once_however_the_text_is_cut(variant):
    block, x = block_of(variant), tokens(2, 13, HIDDEN)
    _, last, whole = traced(block, x)
    assert whole.surprise.shape == (2, 13, HEADS) and (whole.surprise > 0).all()
    assert whole.forget.shape == whole.momentum.shape == whole.step_size.shape == (2, 13, HEADS, 2)
    state, parts = None, []
    for begin, end in ((0, 1), (1, 6), (6, 13)):
        _, state, trace = traced(block, x[:, begin:end], state)
        parts.append(trace)
    ragged = traced(block, x, lengths=torch.tensor([13, 8]))[2]
    for name, expected in vars(whole).items():
        assert_close(getattr(MemoryTrace.joined(parts), name), expected, FLOAT64, f"{name} of pieces")
        assert_close(getattr(ragged, name)[0], expected[0], FLOAT64, f"{name} of a full row")
        if name != "weight_norm":
            assert_close(getattr(ragged, name)[1, :8], expected[1, :8], FLOAT64, f"{name} of a padded row")
    (memory,) = (leaf for leaf in memory_states(last))
    squared = sum(w.square().sum((-2, -1)) for w in memory.weights)
    assert_close(whole.weight_norm.square(), squared, FLOAT64, "norm of the fast weights")


@with_one_memory
def test_a_memory_that_reads_the_same_again_is_less_surprised(variant):
    """With gates wide open: the second of two equal stretches is the smaller surprise."""
    block = block_of(variant, memory_options=dict(form=dict(max_step_size=1.0)))
    memory = next(module for module in block.modules() if isinstance(module, NeuralMemory))
    with torch.no_grad():
        memory.gate_weight.zero_()
        memory.gate_bias[0], memory.gate_bias[1:] = -12.0, 1.0
    _, _, trace = traced(block, tokens(4, 4 * SEGMENT, HIDDEN).repeat(1, 3, 1))
    first, _, third = (part.mean().item() for part in trace.surprise.chunk(3, 1))
    assert third < 0.9 * first


@every_block
def test_a_fresh_context_keeps_the_memory_and_nothing_else(variant):
    block, past, x = block_of(variant), tokens(2, 11, HIDDEN, seed=1), tokens(2, 9, HIDDEN)
    initial = block.initial_state(2)
    _, state = read(block, past)
    fresh = block.fresh_context(state)
    kept = {id(leaf) for s in (fresh, initial) for leaf in learned(s)}
    for a, b in zip(pytree.tree_leaves(fresh), pytree.tree_leaves(initial), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert id(a) in kept or torch.equal(a, b)
    for memory in memories(fresh):
        assert all(map(torch.equal, memory.anchor, memory.weights)), "a chunk is still open"
    from_fresh, from_initial = read(block, x, fresh)[0], read(block, x)[0]
    assert torch.equal(from_fresh, from_initial) is not has_memory(variant)
    # It is a state like any other: chunks and segments begin here.
    first, running = read(block, x[:, :4], block.fresh_context(state))
    second, _ = read(block, x[:, 4:], running)
    assert_close(torch.cat([first, second], 1), from_fresh, FLOAT64, "outputs of pieces")


def memories(state) -> list[MemoryState]:
    parts = pytree.tree_leaves(state, is_leaf=lambda part: isinstance(part, MemoryState))
    return [part for part in parts if isinstance(part, MemoryState)]


def learned(state) -> list[Tensor]:
    """What a memory knows: its weights wherever they stand, and their momentum."""
    found = list(getattr(state, "snapshot", ()))
    for memory in memories(state):
        found += [*memory.weights, *memory.momentum, *memory.anchor]
    for part in pytree.tree_leaves(state, is_leaf=lambda part: isinstance(part, SelfModifyingState)):
        found += [part.weights, part.anchor] if isinstance(part, SelfModifyingState) else []
    return found


@pytest.mark.parametrize("changes", [{}, FEATURES], ids=["", "features"])
def test_mac_follows_its_definition_segment_by_segment(changes):
    """What a segment recalls is what the memory knew after the segments before it, and nothing of itself."""
    block, x = block_of("mac", **changes), tokens(1, 3 * SEGMENT + 2, HIDDEN)
    normed, width = block.norm(x), block.memory.num_heads * block.memory.network.head_dim
    queries, _ = block.recall_conv(block.recall_query(normed))
    queries = torch.nn.functional.normalize(
        torch.nn.functional.silu(queries).unflatten(-1, (HEADS, -1)), dim=-1
    )
    queries = block.memory.feature_map(queries)
    attended: list[Tensor] = []
    for begin in range(0, x.shape[1], SEGMENT):
        known = block.memory.initial_state(1, block.persistent)
        if attended:
            _, known = block.memory(block.memory_norm(torch.cat(attended, 1)), known)
        reads = memory_read(
            block.memory.network,
            queries[:, begin : begin + SEGMENT],
            known.memory,
            norm_weight=block.memory.norm_weight,
            norm_bias=block.memory.norm_bias,
            base=block.memory.base,
        )
        prior = block.memory.prior(queries[:, begin : begin + SEGMENT])
        recalled = block.recall_output(block.recall_norm(reads, prior).flatten(-2))
        assert reads.flatten(-2).shape[-1] == width
        segment = normed[:, begin : begin + SEGMENT]
        attended.append(block.attention(segment, recalled, block.persistent)[0])
    z = torch.cat(attended, 1)
    answers, _ = block.memory(block.memory_norm(z), block.memory.initial_state(1, block.persistent))
    assert_close(read(block, x)[0], x + block.gate(z, answers), FLOAT64, "mac")


def test_the_gate_lets_pass_what_the_memory_opens():
    gate = MemoryGate(4).double()
    torch.nn.init.constant_(gate.attention_norm.weight, 0.1)
    attention, memory = tokens(1, 3, 4), tokens(1, 3, 4, seed=1)
    normed = [v / v.square().mean(-1, keepdim=True).add(1e-6).sqrt() for v in (attention, memory)]
    assert_close(gate(attention, memory), 0.1 * normed[0] / (1 + torch.exp(-normed[1])), FLOAT64, "gate")
    with torch.no_grad():
        gate.memory_norm.weight.fill_(-1e3)
    assert gate(attention, memory.abs()).abs().max() < 1e-9
    total = MemorySum(4).double()
    torch.nn.init.constant_(total.attention_norm.weight, 0.1)
    assert_close(total(attention, memory), 0.1 * normed[0] + memory, FLOAT64, "sum")


def test_recall_begins_by_asking_as_the_memory_was_written():
    agreement = {}
    for start in ("random", "induction", "sharp"):
        torch.manual_seed(0)
        block = BLOCKS["mac"](
            BlockSettings(128, 2, 64, 4, 16, 16, 2, 3, 1, 1, 1e4, 1e-6, memory_options={"start": start})
        )
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.1)
        block.memory.reset_parameters()
        block.reset_parameters()
        x = torch.nn.functional.rms_norm(torch.randn(1, 16, 128), (128,))
        own, _ = block._own(
            x,
            block.recall_conv.initial_tail(1, x.device, x.dtype),
            torch.zeros(1, dtype=torch.int64),
            Packed(),
        )
        context = torch.zeros_like(x)
        z, _ = block.attention.attend(own.tokens, context, block.attention.fixed(block.persistent), None)
        found, _, _ = block.memory.learn(block.memory_norm(z), None, BlockContext())
        agreement[start] = (own.queries * found.queries).sum(-1)[0, 4:].mean().item()
    assert min(agreement["induction"], agreement["sharp"]) > 0.7 > 0.3 > agreement["random"], agreement
