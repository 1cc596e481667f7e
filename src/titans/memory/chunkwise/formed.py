"""Chunks whose rows forget at their own pace, whose rule maps what it carries to weights or has a window of
tokens (`windows.py`), or whose network is gated.

All keep the sums of `rules.ChunkCoefficients`, and none has the products of `chunk.py`. Where rows forget
differently, a token counts differently in each row of a read, so its sum over tokens is one for each row.
Where a rule maps what it carries, as with softmax, a read is no sum at all: what is carried after each token
is formed and mapped, (width, out, in) numbers for each row of a chunk.

Plain torch, which autograd differentiates; training keeps one state for each group of chunks, as `groups.py`
does. Shapes: rows = batch · heads; tokens (rows, width, features); weights (rows, out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from titans.memory.chunkwise.chunk import key_pass
from titans.memory.chunkwise.groups import Marks, Slow, Tokens, begin_chunk, end_chunk
from titans.memory.chunkwise.windows import multiplied, over_windows, seen_by_chunk, step_sizes
from titans.memory.inner import InnerProblem
from titans.memory.rules import ChunkCoefficients
from titans.memory.rules.window import Window
from titans.memory.state import MemoryState

Run = Callable[[InnerProblem, Tokens, Marks, Slow, MemoryState], tuple[Tensor, Tensor, MemoryState]]


def layer_gates(inner: InnerProblem, tokens: Tokens) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Forget, momentum and step size of each layer: the first (chunks, out or 1, rows, width), the others
    (chunks, 1, rows, width)."""
    shapes = inner.network.weight_shapes
    by_row = tokens.forget.shape[1] != len(shapes)
    forget = tokens.forget.split([out if by_row else 1 for out, _ in shapes], 1)
    steps = step_sizes(inner.rule, tokens.step_size)
    return list(zip(forget, tokens.momentum.split(1, 1), steps.split(1, 1), strict=True))


def rows_last(coefficient: Tensor) -> Tensor:
    """(chunks, out or 1, rows, i, j) to (chunks, rows, i, j, out or 1)."""
    return coefficient.movedim(1, -1)


def scan_formed_chunks(
    inner: InnerProblem, tokens: Tokens, marks: Marks, slow: Slow, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    """Reads (chunks, rows, width, head_dim), surprise (chunks, rows, width), and the state after them."""
    return in_groups(_scan_group, inner, tokens, marks, slow, state)


def in_groups(
    run: Run, inner: InnerProblem, tokens: Tokens, marks: Marks, slow: Slow, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    """What `run` makes of all chunks. Where autograd follows, √chunks of them at a time: it keeps the states
    between these groups, and the backward runs each again."""
    leaves = pytree.tree_leaves((tokens, slow, state))
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    num_chunks = tokens.keys.shape[0]
    size = math.isqrt(num_chunks - 1) + 1
    reads, surprises = [], []
    for start in range(0, num_chunks, size):
        group = slice(start, start + size)
        arguments = inner, Tokens(*(x[group] for x in tokens)), marks.at(group), slow, state
        if needs_grad:
            read, surprise, state = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            read, surprise, state = run(*arguments)
        reads.append(read)
        surprises.append(surprise)
    return torch.cat(reads), torch.cat(surprises).detach(), state


def _scan_group(
    inner: InnerProblem, tokens: Tokens, marks: Marks, slow: Slow, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    written = None if marks.filled is None else marks.filled.unsqueeze(1)
    layers = [
        ChunkCoefficients(*map(rows_last, over_windows(inner.rule, inner.rule.coefficients(*gates, written))))
        for gates in layer_gates(inner, tokens)
    ]
    reads, surprises = [], []
    for n in range(tokens.keys.shape[0]):
        here = marks.at(n)
        state = begin_chunk(here, slow, state)
        coefficients = [ChunkCoefficients(*(x[n] for x in layer)) for layer in layers]
        new = Window(tokens.keys[n], tokens.values[n], tokens.step_size[n].movedim(0, -1))
        read, surprise, written_state = _run_chunk(
            inner, tokens.queries[n], new, here.filled, coefficients, slow, state
        )
        state = end_chunk(inner, here, written_state)
        reads.append(read)
        surprises.append(surprise)
    return torch.stack(reads), torch.stack(surprises), state


def _run_chunk(
    inner: InnerProblem,
    queries: Tensor,
    new: Window,
    filled: Tensor | None,
    coefficients: Sequence[ChunkCoefficients],
    slow: Slow,
    state: MemoryState,
) -> tuple[Tensor, Tensor, MemoryState]:
    """Reads, surprise, and the state after the chunk's last token, before the rule ends the chunk."""
    net = inner.network
    anchor = inner.network_weights(state.anchor, slow.base or None)
    seen, state = seen_by_chunk(inner.rule, state, new, filled)
    found = key_pass(inner, seen.keys, seen.values, slow.gain, slow.bias, anchor)
    found = multiplied(inner.rule, found, seen, queries.shape[-2])
    outputs: list[Tensor] = []
    weights, momentum = [], []
    for layer, (c, h, d) in enumerate(zip(coefficients, found.inputs, found.scaled, strict=True)):
        weight, moment = state.weights[layer], state.momentum[layer]
        base = slow.base[layer] if slow.base else None
        form = _read_formed if inner.rule.maps_weights else _read_summed
        hidden = net.layer_input(queries, outputs)
        outputs.append(form(inner, c, hidden, h, d, weight, moment, base))
        # (rows, out or 1, 1) and, for tokens, (rows, width, out or 1).
        end_weights, end_momentum, carried = (
            x[:, 0].mT for x in (c.end_weights, c.end_momentum, c.momentum_momentum)
        )
        end_steps, momentum_steps = c.end_steps[:, :, 0], c.momentum_steps[:, :, 0]
        moved = weight + (weight * end_weights + moment * end_momentum)
        weights.append(moved.baddbmm((d * end_steps).mT, h, alpha=-1))
        momentum.append((moment * carried).baddbmm((d * momentum_steps).mT, h, alpha=-1))
    reads = net.finish(outputs[-1], queries, slow.gain, slow.bias)
    return (
        reads,
        found.surprise,
        MemoryState(tuple(weights), tuple(momentum), state.anchor, None, state.extra),
    )


def _read_summed(
    inner: InnerProblem,
    c: ChunkCoefficients,
    hidden: Tensor,
    h: Tensor,
    d: Tensor,
    weight: Tensor,
    moment: Tensor,
    base: Tensor | None,
) -> Tensor:
    """One layer's answer to every token with the weights after it, (rows, width, out); it forms none."""
    read_weights, read_momentum = c.read_weights[:, :, 0], c.read_momentum[:, :, 0]
    out = torch.bmm(hidden, weight.mT) * read_weights + torch.bmm(hidden, moment.mT) * read_momentum
    if base is not None:
        out = out.baddbmm(hidden, base.mT)
    if c.read_steps.shape[-1] == 1:
        return out - torch.bmm(torch.bmm(hidden, h.mT) * c.read_steps.squeeze(-1), d)
    # (rows, width, tokens, out): each row's table times what every token counts in it.
    counted = c.read_steps * d.unsqueeze(1)
    return out - torch.einsum("rtj,rtjo->rto", torch.bmm(hidden, h.mT), counted)


def _read_formed(
    inner: InnerProblem,
    c: ChunkCoefficients,
    hidden: Tensor,
    h: Tensor,
    d: Tensor,
    weight: Tensor,
    moment: Tensor,
    base: Tensor | None,
) -> Tensor:
    """`_read_summed` for a rule that maps weights: every token's are formed, (rows, width, out, in)."""
    counted = c.read_steps * d.unsqueeze(1)
    moved = torch.einsum("rtjo,rji->rtoi", counted, h)
    carried = weight.unsqueeze(1) * c.read_weights.mT + moment.unsqueeze(1) * c.read_momentum.mT - moved
    if base is not None:
        carried = carried + base.unsqueeze(1)
    return (inner.rule.network_weight(carried) @ hidden.unsqueeze(-1)).squeeze(-1)
