"""The fast path in plain torch: chunks in sequence, each a handful of batched matrix products (`chunk.py`).

Going backward, chunks are recomputed a group at a time: with √chunks groups, training memory grows with the square
root of the length (inputs aside).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans.memory.chunk import Chunk, ChunkGradients, ChunkTape, Weights, chunk_backward, run_chunk
from titans.memory.layout import Columns, cut_columns
from titans.memory.network import MemoryNetwork
from titans.memory.problem import ScanProblem
from titans.memory.rule import UPDATE_RULES, ChunkCoefficients
from titans.memory.state import MemoryState


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

    def at(self, chunks: slice | int) -> _Marks:
        return _Marks(*(m[chunks] if isinstance(m, Tensor) else m for m in self))


class _State(NamedTuple):
    """Weights (rows, out, in) per layer. After a whole chunk `anchor` is `weights`, the same tensors."""

    weights: Weights
    momentum: Weights
    anchor: Weights


def _where(rows: Tensor, chosen: Weights, otherwise: Weights) -> Weights:
    return tuple(torch.where(rows[:, None, None], a, b) for a, b in zip(chosen, otherwise, strict=True))


def _begin(marks: _Marks, slow: _Slow, state: _State) -> _State:
    """The state with which a chunk begins: rows that start afresh do so now."""
    if marks.fresh is None:
        return state
    return _State(
        _where(marks.fresh, slow.initial, state.weights),
        _where(marks.fresh, slow.initial_momentum, state.momentum),
        _where(marks.fresh, slow.initial, state.anchor),
    )


def _end(net: MemoryNetwork, marks: _Marks, weights: Weights, momentum: Weights, anchor: Weights) -> _State:
    """The state a chunk leaves: where it is complete its weights settle and become the anchor."""
    if isinstance(marks.complete, Tensor):
        settled = net.settle(weights)
        return _State(
            _where(marks.complete, settled, weights), momentum, _where(marks.complete, settled, anchor)
        )
    if marks.complete:
        settled = net.settle(weights)
        return _State(settled, momentum, settled)
    return _State(weights, momentum, anchor)


def _coefficients(net: MemoryNetwork, tokens: _Tokens, marks: _Marks) -> ChunkCoefficients:
    """Of all chunks and layers at once: (chunks, depth, rows, …)."""
    written = None if marks.filled is None else marks.filled.unsqueeze(1)
    rule = UPDATE_RULES[net.update_rule]
    return rule.coefficients(tokens.forget, tokens.momentum, tokens.step_size, written)


def _by_layer(coefficients: ChunkCoefficients, chunk: int) -> list[ChunkCoefficients]:
    return [ChunkCoefficients(*layer) for layer in zip(*(c[chunk].unbind(0) for c in coefficients), strict=True)]


def _scan_group(
    net: MemoryNetwork,
    tokens: _Tokens,
    coefficients: ChunkCoefficients,
    marks: _Marks,
    slow: _Slow,
    state: _State,
    tapes: list[tuple[ChunkTape, Weights]] | None = None,
) -> tuple[Tensor, Tensor, _State]:
    """A few chunks in sequence: reads, surprise, and the state after them; a list collects the tapes."""
    reads, surprises = [], []
    for n in range(tokens.keys.shape[0]):
        here = marks.at(n)
        state = _begin(here, slow, state)
        chunk = Chunk(
            tokens.queries[n], tokens.keys[n], tokens.values[n], _by_layer(coefficients, n), slow.gain, slow.bias
        )
        read, weights, momentum, tape = run_chunk(net, chunk, *state)
        state = _end(net, here, weights, momentum, state.anchor)
        reads.append(read)
        surprises.append(tape.keys.surprise)
        if tapes is not None:
            tapes.append((tape, weights))
    return torch.stack(reads), torch.stack(surprises), state


class _Arguments:
    """The tensors of a scan, flattened for autograd and put back together; optional ones keep their place."""

    def __init__(self, net: MemoryNetwork, marks: _Marks, tokens: _Tokens, slow: _Slow, state: _State) -> None:
        self.net, self.marks = net, marks
        self.flat = [*tokens, slow.gain, slow.bias, *slow.initial, *slow.initial_momentum]
        self.flat += [w for part in state for w in part]

    def unflatten(self, flat: Any) -> tuple[_Tokens, _Slow, _State]:
        depth = self.net.depth
        layered = [tuple(flat[i : i + depth]) for i in range(8, len(flat), depth)]
        # Without resets there are no initial weights to put back.
        initial, initial_momentum = layered[:2] if self.marks.fresh is not None else ((), ())
        return _Tokens(*flat[:6]), _Slow(flat[6], flat[7], initial, initial_momentum), _State(*layered[-3:])


class _GroupedScan(torch.autograd.Function):
    """A scan that keeps the state once per group of chunks and recomputes the inside of a group going backward."""

    @staticmethod
    def forward(ctx: Any, arguments: _Arguments, *flat: Tensor | None) -> tuple[Tensor, ...]:
        net = arguments.net
        tokens, slow, state = arguments.unflatten(flat)
        num_chunks = tokens.keys.shape[0]
        size = math.isqrt(num_chunks - 1) + 1
        ctx.arguments, ctx.groups = arguments, [slice(i, i + size) for i in range(0, num_chunks, size)]
        starts: list[Tensor] = []
        # Saved tensors come back as new objects: whether the anchor was the weights has to be remembered.
        ctx.shared = []
        reads, surprises = [], []
        for group in ctx.groups:
            ctx.shared.append(state.anchor[0] is state.weights[0])
            starts += [*state.weights, *state.momentum, *state.anchor]
            part, marks = _Tokens(*(x[group] for x in tokens)), arguments.marks.at(group)
            read, surprise, state = _scan_group(net, part, _coefficients(net, part, marks), marks, slow, state)
            reads.append(read)
            surprises.append(surprise)
        ctx.num_inputs = len(flat)
        ctx.save_for_backward(*flat, *starts)
        surprise = torch.cat(surprises)
        ctx.mark_non_differentiable(surprise)
        # Autograd must see distinct outputs: after a whole chunk the anchor is the weights themselves.
        anchor = (x.clone() for x in state.anchor)
        return (torch.cat(reads), surprise, *state.weights, *state.momentum, *anchor)

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
        net, marks, depth = arguments.net, arguments.marks, arguments.net.depth
        saved = ctx.saved_tensors
        tokens, slow, _ = arguments.unflatten(saved[: ctx.num_inputs])
        starts = saved[ctx.num_inputs :]
        token_grads = _Tokens(*(torch.empty_like(x) for x in tokens))
        slow_grads = _SlowGradients(slow)
        weights, momentum, anchor = (list(grads[i : i + depth]) for i in range(2, 2 + 3 * depth, depth))
        state_grads = _StateGradients(weights, momentum, anchor)
        for g in reversed(range(len(ctx.groups))):
            group = ctx.groups[g]
            flat = starts[g * 3 * depth : (g + 1) * 3 * depth]
            start = _State(*(tuple(flat[i : i + depth]) for i in range(0, 3 * depth, depth)))
            if ctx.shared[g]:
                start = start._replace(anchor=start.weights)
            part, here = _Tokens(*(x[group] for x in tokens)), marks.at(group)
            gates = [x.detach().requires_grad_() for x in part[3:]]
            with torch.enable_grad():
                attached = _coefficients(net, part._replace(forget=gates[0], momentum=gates[1], step_size=gates[2]), here)
            coefficients = ChunkCoefficients(*(c.detach() for c in attached))
            tapes: list[tuple[ChunkTape, Weights]] = []
            _scan_group(net, part, coefficients, here, slow, start, tapes)

            coefficient_grads: list[list[ChunkCoefficients]] = []
            for n in reversed(range(len(tapes))):
                tape, unsettled = tapes.pop()
                at = here.at(n)
                state_grads.through_end(net, at, unsettled)
                chunk_grads = chunk_backward(
                    net, tape, grads[0][group.start + n], state_grads.weights, state_grads.momentum
                )
                state_grads.through_chunk(chunk_grads)
                state_grads.through_begin(at, slow_grads)
                for into, grad in zip(token_grads[:3], chunk_grads[:3], strict=True):
                    into[group.start + n] = grad
                slow_grads.add_affine(chunk_grads.gain, chunk_grads.bias)
                coefficient_grads.append(chunk_grads.coefficients)
            coefficient_grads.reverse()
            stacked = [
                torch.stack([torch.stack([layer[i] for layer in layers]) for layers in coefficient_grads])
                for i in range(len(attached))
            ]
            for into, grad in zip(token_grads[3:], torch.autograd.grad(attached, gates, stacked), strict=True):
                into[group] = grad
        return (None, *token_grads, *slow_grads.flat(), *state_grads.flat(ctx.shared[0]))


class _SlowGradients:
    """Sums over chunks of the gradients of what they share."""

    def __init__(self, slow: _Slow) -> None:
        self.gain, self.bias = (None if x is None else torch.zeros_like(x) for x in (slow.gain, slow.bias))
        self.initial = [torch.zeros_like(w) for w in slow.initial]
        self.initial_momentum = [torch.zeros_like(m) for m in slow.initial_momentum]

    def add_affine(self, gain: Tensor | None, bias: Tensor | None) -> None:
        for total, part in ((self.gain, gain), (self.bias, bias)):
            if total is not None and part is not None:
                total += part

    def flat(self) -> list[Tensor | None]:
        return [self.gain, self.bias, *self.initial, *self.initial_momentum]


class _StateGradients:
    """The gradient of the state on its way back through the chunks. `anchor` is None while it is in `weights`."""

    def __init__(self, weights: list[Tensor], momentum: list[Tensor], anchor: list[Tensor] | None) -> None:
        self.weights, self.momentum, self.anchor = weights, momentum, anchor

    def through_end(self, net: MemoryNetwork, marks: _Marks, unsettled: Weights) -> None:
        """Back through `_end`."""
        if marks.complete is False:
            return
        if marks.complete is True:
            both = self.weights
            if self.anchor is not None:
                both = [w + a for w, a in zip(self.weights, self.anchor, strict=True)]
            self.weights, self.anchor = net.settle_backward(unsettled, both), None
            return
        closed = marks.complete[:, None, None]
        assert self.anchor is not None
        settled = [
            torch.where(closed, w + a, 0) for w, a in zip(self.weights, self.anchor, strict=True)
        ]
        settled = net.settle_backward(unsettled, settled)
        self.weights = [torch.where(closed, s, w) for s, w in zip(settled, self.weights, strict=True)]
        self.anchor = [torch.where(closed, 0, a) for a in self.anchor]

    def through_chunk(self, grads: ChunkGradients) -> None:
        """Back through `run_chunk`, which uses the anchor and hands it on."""
        self.weights, self.momentum = grads.weights, grads.momentum
        if grads.anchor is not None:
            passed = self.anchor
            self.anchor = grads.anchor if passed is None else [a.add_(p) for a, p in zip(grads.anchor, passed, strict=True)]
        elif self.anchor is not None:
            self.weights = [w.add_(a) for w, a in zip(self.weights, self.anchor, strict=True)]
            self.anchor = None

    def through_begin(self, marks: _Marks, slow: _SlowGradients) -> None:
        """Back through `_begin`."""
        if marks.fresh is None:
            return
        fresh = marks.fresh[:, None, None]
        assert self.anchor is not None
        for into, parts in (
            (slow.initial, self.weights),
            (slow.initial, self.anchor),
            (slow.initial_momentum, self.momentum),
        ):
            for total, part in zip(into, parts, strict=True):
                total += torch.where(fresh, part, 0)
        self.weights, self.momentum, self.anchor = (
            [torch.where(fresh, 0, x) for x in part] for part in (self.weights, self.momentum, self.anchor)
        )

    def flat(self, shared: bool) -> list[Tensor | None]:
        """Per input; an anchor that is the weights themselves has its gradient in theirs."""
        anchor: list[Tensor | None] = [None] * len(self.weights)
        if self.anchor is not None:
            anchor = list(self.anchor)
        elif not shared:
            anchor = [torch.zeros_like(w) for w in self.weights]
        return [*self.weights, *self.momentum, *anchor]


def _scan_columns(
    problem: ScanProblem, tokens: _Tokens, marks: _Marks, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    """Run laid-out chunks; returns reads (chunks, rows, width, head_dim), surprise, and the state (no position)."""
    net, (batch, _, heads, _) = problem.net, problem.keys.shape
    rows = batch * heads

    def shared(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(batch, *x.shape).reshape(rows, *x.shape[1:])

    # An anchor that is the weights stays the same tensors, which spares a second set of gradients.
    flattened: dict[int, Tensor] = {}

    def flat(weights: Weights) -> Weights:
        return tuple(flattened.setdefault(id(w), w.reshape(rows, *w.shape[2:])) for w in weights)

    initial: Weights = ()
    initial_momentum: Weights = ()
    if marks.fresh is not None:
        fresh = problem.fresh_state()
        initial, initial_momentum = flat(fresh.weights), flat(fresh.momentum)
    slow = _Slow(shared(problem.gain), shared(problem.bias), initial, initial_momentum)
    start = _State(flat(state.weights), flat(state.momentum), flat(state.anchor))
    parts: _State
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*tokens, *slow[:2], *initial, *initial_momentum, *sum(start, ()))
    ):
        arguments = _Arguments(net, marks, tokens, slow, start)
        reads, surprise, *leaves = _GroupedScan.apply(arguments, *arguments.flat)
        parts = _State(*(tuple(leaves[i : i + net.depth]) for i in range(0, 3 * net.depth, net.depth)))
    else:
        reads, surprise, parts = _scan_group(net, tokens, _coefficients(net, tokens, marks), marks, slow, start)
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
