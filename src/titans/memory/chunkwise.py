"""The fast path in plain torch: a chunk is a handful of batched matrix products, and no per-token weights exist.

Inside a chunk every gradient is taken at the chunk-start weights, so each is an outer product δ_j h_jᵀ known before
any weight moves, and W_t is a weighted sum of them (`rule.ChunkCoefficients`). Reading with W_t is then, per layer,
two products with the chunk-start matrices and one attention-like pair: (coefficients ⊙ q hᵀ) δ. Only the step from
chunk to chunk is sequential. Derivation: docs/maths.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans.memory.layout import Columns, cut_columns
from titans.memory.network import ACTIVATION_BACKWARDS, ACTIVATIONS, NORM_EPS, MemoryNetwork
from titans.memory.objective import OBJECTIVES
from titans.memory.problem import ScanProblem
from titans.memory.rule import UPDATE_RULES, ChunkCoefficients
from titans.memory.state import MemoryState

Weights = tuple[Tensor, ...]


class _Tokens(NamedTuple):
    """Tokens by chunk. `rows` = batch · heads, `width` ≤ chunk_size tokens a chunk."""

    queries: Tensor  # (chunks, rows, width, head_dim), and so on
    keys: Tensor
    values: Tensor
    forget: Tensor  # (chunks, depth, rows, width), and so on
    momentum: Tensor
    step_size: Tensor


class _Slow(NamedTuple):
    """What every chunk shares: gain and bias (rows, 1, head_dim), and the weights (rows, out, in) of a fresh row."""

    gain: Tensor | None
    bias: Tensor | None
    initial: Weights
    initial_momentum: Weights


class _Marks(NamedTuple):
    """What is known of the chunks before looking at a value; None where the usual case holds everywhere.

    filled: (chunks, rows, width), every slot. fresh: (chunks, rows), no row starts afresh.
    complete: (chunks, rows) or one bool for all.
    """

    filled: Tensor | None
    fresh: Tensor | None
    complete: Tensor | bool


def _output_errors(
    net: MemoryNetwork,
    features: Tensor,
    keys: Tensor,
    values: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradient of the inner objective with respect to f(k), and the objective, per token."""
    objective = OBJECTIVES[net.objective]
    if not net.norm:
        answer = features + keys if net.residual else features
        return objective.gradient(answer, values), objective.value(answer, values)
    centred = features - features.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + NORM_EPS)
    normed = centred * scale
    answer = normed if gain is None else normed * gain
    answer = answer if bias is None else answer + bias
    answer = answer + keys if net.residual else answer
    error = objective.gradient(answer, values)
    error = error if gain is None else error * gain
    along = (error * normed).mean(-1, keepdim=True)
    return (error - error.mean(-1, keepdim=True) - normed * along) * scale, objective.value(answer, values)


def _write_and_read(
    net: MemoryNetwork,
    tokens: _Tokens,
    coefficients: list[ChunkCoefficients],
    slow: _Slow,
    weights: Weights,
    momentum: Weights,
    anchor: Weights,
) -> tuple[Tensor, Weights, Weights, Tensor]:
    """One chunk: its reads, the weights and momentum after it, and the surprise of its tokens."""
    layer_inputs, layer_outputs = net.features(anchor, tokens.keys)
    delta, surprise = _output_errors(net, layer_outputs[-1], tokens.keys, tokens.values, slow.gain, slow.bias)
    deltas = [delta]
    for weight, output in zip(reversed(anchor[1:]), reversed(layer_outputs[:-1]), strict=True):
        delta = ACTIVATION_BACKWARDS[net.activation](torch.bmm(delta, weight), output)
        deltas.append(delta)
    deltas.reverse()
    if net.normalize_step:
        normalizers = net.step_normalizers(anchor, layer_inputs, layer_outputs[-1], slow.gain)
        deltas = [d / n.unsqueeze(-1) for d, n in zip(deltas, normalizers, strict=True)]

    hidden, new_weights, new_momentum = tokens.queries, [], []
    for layer, (c, delta, inputs) in enumerate(zip(coefficients, deltas, layer_inputs, strict=True)):
        weight, moment = weights[layer], momentum[layer]
        out = torch.bmm(hidden * c.read_weights, weight.mT)
        out = torch.baddbmm(out, hidden * c.read_momentum, moment.mT)
        out = torch.baddbmm(out, torch.bmm(hidden, inputs.mT) * c.read_steps, delta, alpha=-1)
        if layer + 1 < net.depth:
            hidden = (
                torch.nn.functional.gelu(out) if net.activation == "gelu" else torch.nn.functional.silu(out)
            )
        moved = torch.addcmul(torch.addcmul(weight, weight, c.end_weights), moment, c.end_momentum)
        new_weights.append(torch.baddbmm(moved, (delta * c.end_steps).mT, inputs, alpha=-1))
        carried = moment * c.momentum_momentum
        new_momentum.append(torch.baddbmm(carried, (delta * c.momentum_steps).mT, inputs, alpha=-1))
    reads = net.finish(out, tokens.queries, slow.gain, slow.bias)
    return reads, tuple(new_weights), tuple(new_momentum), surprise


def _where(rows: Tensor, chosen: Weights, otherwise: Weights) -> Weights:
    return tuple(torch.where(rows[:, None, None], a, b) for a, b in zip(chosen, otherwise, strict=True))


def _scan_group(
    net: MemoryNetwork,
    tokens: _Tokens,
    marks: _Marks,
    slow: _Slow,
    weights: Weights,
    momentum: Weights,
    anchor: Weights,
) -> tuple[Tensor, Tensor, Weights, Weights, Weights]:
    """A few chunks in sequence: reads, surprise, and the state after them."""
    written = None if marks.filled is None else marks.filled.unsqueeze(1)
    together = UPDATE_RULES[net.update_rule].coefficients(
        tokens.forget, tokens.momentum, tokens.step_size, written
    )
    # unbind, never an index in a loop: the backward of x[i] writes a full-size zero tensor each time.
    by_chunk = zip(*(part.unbind(0) for part in together), strict=True)
    by_token = zip(*(part.unbind(0) for part in tokens[:3]), strict=True)
    reads, surprises = [], []
    for n, (parts, (queries, keys, values)) in enumerate(zip(by_chunk, by_token, strict=True)):
        coefficients = [
            ChunkCoefficients(*layer) for layer in zip(*(p.unbind(0) for p in parts), strict=True)
        ]
        if marks.fresh is not None:
            weights = _where(marks.fresh[n], slow.initial, weights)
            momentum = _where(marks.fresh[n], slow.initial_momentum, momentum)
            anchor = _where(marks.fresh[n], slow.initial, anchor)
        chunk = tokens._replace(queries=queries, keys=keys, values=values)
        read, weights, momentum, surprise = _write_and_read(
            net, chunk, coefficients, slow, weights, momentum, anchor
        )
        if isinstance(marks.complete, Tensor):
            settled = net.settle(weights)
            anchor = _where(marks.complete[n], settled, anchor)
            weights = _where(marks.complete[n], settled, weights) if net.unit_rows else weights
        elif marks.complete:
            anchor = weights = net.settle(weights)
        reads.append(read)
        surprises.append(surprise)
    return torch.stack(reads), torch.stack(surprises), weights, momentum, anchor


class _Arguments:
    """The tensors of a group, flattened for autograd and put back together; optional ones keep their place."""

    def __init__(self, net: MemoryNetwork, marks: _Marks) -> None:
        self.net, self.marks = net, marks

    def flatten(self, tokens: _Tokens, slow: _Slow, *state: Weights) -> list[Tensor | None]:
        return [
            *tokens,
            slow.gain,
            slow.bias,
            *slow.initial,
            *slow.initial_momentum,
            *(w for part in state for w in part),
        ]

    def run(self, flat: Any, chunks: slice) -> tuple[Tensor, Tensor, Weights, Weights, Weights]:
        depth = self.net.depth
        layered = [tuple(flat[i : i + depth]) for i in range(8, len(flat), depth)]
        # Without resets there are no initial weights to put back.
        initial, initial_momentum = layered[:2] if self.marks.fresh is not None else ((), ())
        marks = _Marks(*(m[chunks] if isinstance(m, Tensor) else m for m in self.marks))
        slow = _Slow(flat[6], flat[7], initial, initial_momentum)
        return _scan_group(self.net, _Tokens(*flat[:6]), marks, slow, *layered[-3:])


class _GroupedScan(torch.autograd.Function):
    """A scan that keeps the state once per group of chunks and recomputes the inside of a group going backward.

    With √chunks groups, training memory grows with the square root of the length (inputs aside).
    """

    @staticmethod
    def forward(ctx: Any, arguments: _Arguments, *flat: Tensor | None) -> tuple[Tensor, ...]:
        depth = arguments.net.depth
        num_chunks = flat[0].shape[0]  # type: ignore[union-attr]
        size = math.isqrt(num_chunks - 1) + 1
        ctx.arguments, ctx.groups = arguments, [slice(i, i + size) for i in range(0, num_chunks, size)]
        slow, state = flat[6 : -3 * depth], flat[-3 * depth :]
        starts, reads, surprises = [], [], []
        for group in ctx.groups:
            starts.extend(state)
            inputs = [x[group] for x in flat[:6]]  # type: ignore[index]
            read, surprise, weights, momentum, anchor = arguments.run([*inputs, *slow, *state], group)
            reads.append(read)
            surprises.append(surprise)
            state = (*weights, *momentum, *anchor)
        ctx.num_inputs = len(flat)
        ctx.save_for_backward(*flat, *starts)
        surprise = torch.cat(surprises)
        ctx.mark_non_differentiable(surprise)
        # Autograd must see distinct outputs: after a whole chunk the anchor is the weights themselves.
        outputs = (torch.cat(reads), surprise, *state)
        return (*outputs[: -depth], *(x.clone() for x in state[-depth:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Second derivatives through a recomputation would silently lose terms.
            raise RuntimeError(
                "backend='chunkwise' is differentiable once, create_graph=True asks for more: use 'reference'"
            )
        with torch.autocast(grads[0].device.type, enabled=False):
            # Whoever goes backward under autocast must still get the gradient of what went forward.
            return _GroupedScan._recompute(ctx, *grads)

    @staticmethod
    def _recompute(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments: _Arguments = ctx.arguments
        depth = arguments.net.depth
        saved = ctx.saved_tensors
        flat, starts = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
        read_grads, state_grads = grads[0], grads[2:]
        token_grads = [torch.empty_like(x) for x in flat[:6]]
        slow_grads: list[Tensor | None] = [None] * (len(flat) - 6 - 3 * depth)
        for g in reversed(range(len(ctx.groups))):
            group = ctx.groups[g]
            state = starts[g * 3 * depth : (g + 1) * 3 * depth]
            inputs = [*(x[group] for x in flat[:6]), *flat[6 : -3 * depth], *state]
            leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
            wanted = [x for x in leaves if x is not None]
            with torch.enable_grad():
                read, _, weights, momentum, anchor = arguments.run(leaves, group)
            # A partial chunk hands its anchor through untouched; the leaf itself is a valid output.
            outputs, cotangents = (read, *weights, *momentum, *anchor), (read_grads[group], *state_grads)
            found = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
            grad = [None if x is None else next(found) for x in leaves]
            for into, part in zip(token_grads, grad[:6], strict=True):
                into[group] = 0 if part is None else part
            for i, part in enumerate(grad[6 : -3 * depth]):
                if part is not None:
                    slow_grads[i] = part if slow_grads[i] is None else slow_grads[i] + part
            state_grads = tuple(
                torch.zeros_like(x) if part is None else part
                for x, part in zip(state, grad[-3 * depth :], strict=True)
            )
        return (None, *token_grads, *slow_grads, *state_grads)


def _scan_columns(
    problem: ScanProblem, tokens: _Tokens, marks: _Marks, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    """Run laid-out chunks; returns reads (chunks, rows, width, head_dim), surprise, and the state (no position)."""
    net, (batch, _, heads, _) = problem.net, problem.keys.shape
    rows = batch * heads

    def shared(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(batch, *x.shape).reshape(rows, *x.shape[1:])

    def flat(weights: Weights) -> Weights:
        return tuple(w.reshape(rows, *w.shape[2:]) for w in weights)

    initial: Weights = ()
    initial_momentum: Weights = ()
    if marks.fresh is not None:
        fresh = problem.fresh_state()
        initial, initial_momentum = flat(fresh.weights), flat(fresh.momentum)
    slow = _Slow(shared(problem.gain), shared(problem.bias), initial, initial_momentum)
    arguments = _Arguments(net, marks)
    inputs = arguments.flatten(tokens, slow, flat(state.weights), flat(state.momentum), flat(state.anchor))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        reads, surprise, *leaves = _GroupedScan.apply(arguments, *inputs)
        parts = [tuple(leaves[i : i + net.depth]) for i in range(0, 3 * net.depth, net.depth)]
    else:
        reads, surprise, *parts = arguments.run(inputs, slice(None))
    shaped = [tuple(w.view(batch, heads, *w.shape[1:]) for w in part) for part in parts]
    return reads, surprise, MemoryState(shaped[0], shaped[1], shaped[2], state.position)


def _by_chunk(x: Tensor, num_chunks: int) -> Tensor:
    """(batch, chunks · width, heads, features) to (chunks, batch · heads, width, features)."""
    batch, time, heads, features = x.shape
    x = x.view(batch, num_chunks, time // num_chunks, heads, features)
    return x.permute(1, 0, 3, 2, 4).reshape(num_chunks, batch * heads, time // num_chunks, features)


def _by_time(x: Tensor, batch: int) -> Tensor:
    """The inverse of `_by_chunk`."""
    num_chunks, rows, width, features = x.shape
    x = x.view(num_chunks, batch, rows // batch, width, features)
    return x.permute(1, 0, 3, 2, 4).reshape(batch, num_chunks * width, rows // batch, features)


def _tokens(problem: ScanProblem, select: Any, num_chunks: int) -> _Tokens:
    vectors = (problem.queries, problem.keys, problem.values)
    gates = (problem.forget, problem.momentum, problem.step_size)
    return _Tokens(
        *(_by_chunk(select(x), num_chunks) for x in vectors),
        *(_by_chunk(select(x), num_chunks).permute(0, 3, 1, 2).contiguous() for x in gates),
    )


def _scan_aligned(problem: ScanProblem, phase: int) -> tuple[Tensor, MemoryState, Tensor]:
    """Every token real and every row at the same phase of its chunk: finish the open chunk, whole ones, the rest."""
    batch, time, heads, _ = problem.keys.shape
    size, state = problem.chunk_size, problem.state
    head = min((size - phase) % size, time)
    body = (time - head) // size * size
    reads, surprises = [], []
    for begin, end, chunks in ((0, head, 1), (head, head + body, body // size), (head + body, time, 1)):
        if begin == end:
            continue
        complete = (phase + end) % size == 0
        tokens = _tokens(problem, lambda x, b=begin, e=end: x[:, b:e].contiguous(), chunks)
        read, surprise, state = _scan_columns(problem, tokens, _Marks(None, None, complete), state)
        reads.append(_by_time(read, batch))
        surprises.append(_by_time(surprise.unsqueeze(-1), batch).squeeze(-1))
    position = problem.state.position + time
    state = MemoryState(state.weights, state.momentum, state.anchor, position)
    return torch.cat(reads, 1), state, torch.cat(surprises, 1)


def _scan_ragged(problem: ScanProblem, columns: Columns) -> tuple[Tensor, MemoryState, Tensor]:
    """Rows at different phases, masked tokens, resets: gather into columns, scan, put back."""
    batch, time, heads, head_dim = problem.keys.shape
    _, num_chunks, width = columns.filled.shape
    state = problem.state
    reads, surprises = torch.zeros_like(problem.queries), problem.keys.new_zeros(batch, time, heads)
    if num_chunks:
        source, filled = columns.source.flatten(1), columns.filled.flatten(1)

        def gather(x: Tensor) -> Tensor:
            index = source[..., None, None].expand(-1, -1, *x.shape[2:])
            # Masked inputs may hold NaN, and an empty slot points at some token: neither may get through.
            return torch.where(filled[..., None, None], x.gather(1, index), 0)

        def per_row(x: Tensor) -> Tensor:
            return x.transpose(0, 1).repeat_interleave(heads, 1)

        marks = _Marks(
            per_row(columns.filled),
            per_row(columns.fresh) if problem.reset is not None else None,
            per_row(columns.complete),
        )
        read, surprise, state = _scan_columns(problem, _tokens(problem, gather, num_chunks), marks, state)
        real = problem.mask if problem.mask is not None else torch.ones_like(columns.place, dtype=torch.bool)

        def back(x: Tensor) -> Tensor:
            x = _by_time(x, batch)
            index = columns.place[..., None, None].expand(-1, -1, *x.shape[2:])
            return torch.where(real[..., None, None], x.gather(1, index), 0)

        reads, surprises = back(read), back(surprise.unsqueeze(-1)).squeeze(-1)
    if problem.reset is not None:
        fresh, after = problem.fresh_state(), columns.fresh_after[:, None, None, None]

        def restart(new: Weights, old: Weights) -> Weights:
            return tuple(torch.where(after, a, b) for a, b in zip(new, old, strict=True))

        state = MemoryState(
            restart(fresh.weights, state.weights),
            restart(fresh.momentum, state.momentum),
            restart(fresh.anchor, state.anchor),
            columns.position,
        )
    return reads, MemoryState(state.weights, state.momentum, state.anchor, columns.position), surprises


def chunkwise_scan(problem: ScanProblem) -> tuple[Tensor, MemoryState, Tensor]:
    """Reads (batch, time, heads, head_dim), new state, and surprise (batch, time, heads) of every token."""
    batch, time, heads, _ = problem.keys.shape
    if time == 0:
        return torch.zeros_like(problem.queries), problem.state, problem.keys.new_zeros(batch, 0, heads)
    if problem.mask is None and problem.reset is None:
        phases = set((problem.state.position % problem.chunk_size).tolist())
        if len(phases) == 1:
            return _scan_aligned(problem, phases.pop())
    real = problem.mask
    if real is None:
        real = torch.ones(batch, time, dtype=torch.bool, device=problem.keys.device)
    columns = cut_columns(problem.state.position, real, problem.chunk_size, problem.reset)
    return _scan_ragged(problem, columns)
