"""Chunks whose tokens are answered by the weights their chunk began with: for chunks of hundreds of tokens.

What is written is the same as ever, and so is the state. But no token reads what its own chunk has written,
so nothing here grows with the square of the chunk: a chunk is one pass of all its keys and one of all its
queries at the anchor, and one product for each weight that moves. Derivation: docs/how/schedules.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans.memory.chunkwise.chunk import key_pass
from titans.memory.chunkwise.formed import in_groups, layer_gates, rows_last
from titans.memory.chunkwise.groups import Marks, Slow, Tokens, begin_chunk, end_chunk
from titans.memory.chunkwise.windows import multiplied, over_windows, seen_by_chunk, step_sizes
from titans.memory.inner import InnerProblem
from titans.memory.rules import EndCoefficients, end_coefficients
from titans.memory.rules.window import Window
from titans.memory.state import MemoryState


def scan_anchored_chunks(
    inner: InnerProblem, tokens: Tokens, marks: Marks, slow: Slow, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    """Reads (chunks, rows, width, head_dim), surprise (chunks, rows, width), and the state after them.

    Plain torch throughout: a scan of large chunks has few of them, so autograd may keep all it likes. But a
    rule that reads its anchor can have any chunks, and its steps at their ends take much to keep.
    """
    if inner.rule.reads_anchor:
        return in_groups(_scan, inner, tokens, marks, slow, state)
    return _scan(inner, tokens, marks, slow, state)


def _scan(
    inner: InnerProblem, tokens: Tokens, marks: Marks, slow: Slow, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    net = inner.network
    written = None if marks.filled is None else marks.filled.unsqueeze(1)
    if tokens.forget.shape[1] == net.depth:
        steps = step_sizes(inner.rule, tokens.step_size)
        found = end_coefficients(inner.rule, tokens.forget, tokens.momentum, steps, written)
        found = over_windows(inner.rule, found)
        layers = [EndCoefficients(*(x[:, layer] for x in found)) for layer in range(net.depth)]
    else:
        # For each row of the weights: (chunks, rows, out, 1), and for tokens (chunks, rows, width, out).
        layers = []
        for gates in layer_gates(inner, tokens):
            found = over_windows(inner.rule, end_coefficients(inner.rule, *gates, written))
            found = EndCoefficients(*map(rows_last, found))
            a, b, steps, e, moved = (x.squeeze(-2) for x in found)
            layers.append(EndCoefficients(a.mT, b.mT, steps, e.mT, moved))
    reads, surprises = [], []
    for n in range(tokens.keys.shape[0]):
        here = marks.at(n)
        state = begin_chunk(here, slow, state)
        anchor = inner.network_weights(state.anchor, slow.base or None)
        reads.append(net(anchor, tokens.queries[n], slow.gain, slow.bias))
        new = Window(tokens.keys[n], tokens.values[n], tokens.step_size[n].movedim(0, -1))
        seen, state = seen_by_chunk(inner.rule, state, new, here.filled)
        keys = key_pass(inner, seen.keys, seen.values, slow.gain, slow.bias, anchor)
        keys = multiplied(inner.rule, keys, seen, new.keys.shape[-2])
        surprises.append(keys.surprise)
        weights, momentum = [], []
        for layer, (h, d) in enumerate(zip(keys.inputs, keys.scaled, strict=True)):
            c = EndCoefficients(*(x[n] for x in layers[layer]))
            weight, moment = state.weights[layer], state.momentum[layer]
            moved = weight + (weight * c.end_weights + moment * c.end_momentum)
            weights.append(moved.baddbmm((d * c.end_steps).mT, h, alpha=-1))
            momentum.append((moment * c.momentum_momentum).baddbmm((d * c.momentum_steps).mT, h, alpha=-1))
        written = MemoryState(tuple(weights), tuple(momentum), state.anchor, None, state.extra)
        state = end_chunk(inner, here, written)
    return torch.stack(reads), torch.stack(surprises).detach(), state
