"""Whether `MACBlock` may read whole segments as one step (`titans.nn.kernels.segments`), and how."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.memory import MemoryState
from titans.memory.backends.known import refuses_inner
from titans.memory.backends.native import WIDEST_CHUNK, operator_sizes
from titans.memory.backends.native import missing as scan_missing
from titans.nn import kernels
from titans.nn.attention.segment import SegmentAttention, SegmentState, SegmentTokens
from titans.nn.context import BlockContext
from titans.nn.kernels import native, segments, token
from titans.nn.memory.features import Identity
from titans.nn.memory.half_lives import DecayRate, spaced_half_lives
from titans.nn.memory.layer import Found, NeuralMemory, NeuralMemoryState
from titans.nn.norm import ReadNorm, RMSNorm


class Parts(Protocol):
    """What of a `MACBlock` takes part in its loop over segments."""

    segment_length: int
    persistent: nn.Parameter
    recall_output: nn.Linear
    recall_norm: ReadNorm
    attention: SegmentAttention
    memory_norm: RMSNorm
    memory: NeuralMemory


class Whole(NamedTuple):
    """What whole segments, one after another, leave: as `MACBlock.forward` collects it of each."""

    attended: Tensor
    found: Found
    memory: NeuralMemoryState
    snapshot: tuple[Tensor, ...]
    segment: SegmentState


def sizes_of(
    block: Parts, x: Tensor, state: NeuralMemoryState, context: BlockContext
) -> segments.Sizes | None:
    """What `read_whole` needs besides tensors, or None where segments are to be read one by one.

    x: (batch, time, hidden_size). state: of the memory, at a segment's start.
    """
    memory, attention = block.memory, block.attention
    net, form, learned = memory.network, memory.form, state.memory
    forget = memory.forget_gate
    if not (
        type(x) is Tensor
        and not context.trace
        and type(memory) is NeuralMemory
        and type(memory.feature_map) is Identity
        and kernels.allows(memory.backend, "native")
        and not torch.is_autocast_enabled(x.device.type)
        and form.decay_to_initial
        and not (net.norm or net.residual or form.forget_by_row or memory.read_anchor)
        and refuses_inner(memory.inner) is None
        and 1 < memory.chunk_size <= WIDEST_CHUNK
        and block.segment_length % memory.chunk_size == 0
        and block.segment_length >= memory.conv.kernel_size
        and type(forget) is DecayRate
        and type(memory.step_size_gate) is nn.Sigmoid
        and block.recall_norm.prior is not None
    ):
        return None
    modules: list[nn.Module] = [block.recall_output, attention.key_value, attention.output, block.memory_norm]
    modules += [memory.input, memory.conv, block.recall_norm.taught, block.recall_norm.prior]
    plain = [forget, memory.step_size_gate, memory.feature_map, block.recall_norm]
    if token.weights_of(x, *modules) is None or not all(map(token.is_plain, plain)):
        return None
    gates = memory.gate_weight, memory.gate_bias, memory.gate_key_weight, memory.gate_up_weight
    if not token.alike(x, *gates, memory.gate_down_weight, *memory.initial_weights, block.persistent):
        return None
    carried = [state.tail, *learned.weights, *learned.momentum]
    if not learned.is_shared or any(part.dtype != x.dtype for part in carried):
        return None
    if scan_missing() or native.refuses(net.head_dim, x, *carried):
        return None
    narrow = memory.backend == "native_bfloat16"
    if narrow and not torch.ops.titans_native.has_tiles():
        return None
    least = None
    if forget.bounds is not None:
        least = math.log(2) / spaced_half_lives(memory.num_heads, *forget.bounds)[:, None]
    return segments.Sizes(
        operator_sizes(memory.inner, narrow),
        net.activation,
        memory.num_heads,
        memory.chunk_size,
        (form.max_momentum, memory.max_step_size),
        least,
        (block.recall_norm.taught.eps, block.memory_norm.eps),
        context.frozen,
    )


def read_whole(
    block: Parts,
    sizes: segments.Sizes,
    asked: Tensor,
    prior: Tensor | None,
    tokens: SegmentTokens,
    fixed: tuple[Tensor, Tensor],
    state: NeuralMemoryState,
) -> Whole:
    """Read whole segments, one after another.

    asked, prior: (batch, time, heads, head_dim), see `MACBlock._asked`. tokens: of the same time; fixed: keys
    and values of the persistent tokens. state: of the memory, at a segment's start.
    """
    batch, time, heads, head_dim = asked.shape
    length, memory, width = block.segment_length, block.memory, heads * head_dim
    count, rows = time // length, batch * heads

    def by_segment(x: Tensor) -> Tensor:
        x = x.reshape(batch, count, length, heads, head_dim).permute(1, 0, 3, 2, 4)
        return x.reshape(count, rows, length, head_dim)

    def by_row(x: Tensor) -> Tensor:
        """(heads, …) to (rows, …)."""
        return x.expand(batch, *x.shape).reshape(rows, *x.shape[1:])

    # `sizes_of` has seen that there is one.
    assert block.recall_norm.prior is not None and prior is not None
    known = block.recall_norm.prior(prior)
    given = (asked, prior, known, tokens.plain, tokens.rotated, tokens.keys, tokens.values)
    fixed_keys, fixed_values = (by_row(x.transpose(0, 1)) for x in fixed)
    to_write, to_gate = memory.input.weight.split([3 * width, width])
    slow = segments.Slow(
        fixed_keys,
        fixed_values,
        torch.complex(tokens.cos[0, :length], tokens.sin[0, :length]),
        block.attention.key_value.weight @ block.recall_output.weight,
        by_row(block.recall_norm.taught.weight.unsqueeze(1)),
        block.attention.output.weight,
        block.memory_norm.weight,
        to_write,
        memory.conv.weight,
        memory.gate_weight,
        memory.gate_bias,
        memory.gate_key_weight,
        memory.gate_up_weight,
        memory.gate_down_weight,
    )
    before = [x.reshape(rows, *x.shape[2:]) for x in (*state.memory.weights, *state.memory.momentum)]
    base = [by_row(w) for w in memory.initial_weights]
    found = segments.read_segments(
        sizes, segments.Tokens(*map(by_segment, given)), slow, base, state.tail, before
    )

    def by_time(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(batch, time, *x.shape[3:])

    def state_of(x: Tensor) -> Tensor:
        return x.view(batch, heads, *x.shape[1:])

    def context_of(x: Tensor) -> Tensor:
        return state_of(x).transpose(1, 2).contiguous()

    attended = by_time(found.attended.view(count, batch, length, -1))
    gate = F.linear(block.memory_norm(attended), to_gate)
    depth = memory.network.depth
    weights, momentum = (tuple(map(state_of, part)) for part in (found.state[:depth], found.state[depth:]))
    learned = MemoryState(weights, momentum, None, state.memory.position + time)
    segment = SegmentState(
        context_of(found.context_keys),
        context_of(found.context_values),
        *(x[:, -length:].clone() for x in (tokens.keys, tokens.values)),
    )
    read = Found(by_time(found.reads), by_time(found.queries), gate)
    snapshot = tuple(map(state_of, found.snapshot))
    return Whole(attended, read, NeuralMemoryState(found.tail, learned), snapshot, segment)
