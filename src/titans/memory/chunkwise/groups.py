"""Chunks in sequence (`chunk.py`), and their backward, which recomputes a group of chunks at a time.

With √chunks groups, training memory grows with the square root of the length (inputs aside).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans.memory.chunkwise.chunk import Chunk, ChunkGradients, ChunkTape, Weights, chunk_backward, run_chunk
from titans.memory.inner import InnerProblem
from titans.memory.rules import ChunkCoefficients


class Tokens(NamedTuple):
    """Tokens by chunk. `rows` = batch · heads, `width` ≤ chunk_size tokens a chunk."""

    queries: Tensor  # (chunks, rows, width, head_dim), and so on
    keys: Tensor
    values: Tensor
    forget: Tensor  # (chunks, depth, rows, width), and so on
    momentum: Tensor
    step_size: Tensor


class Slow(NamedTuple):
    """What every chunk shares: gain and bias (rows, 1, head_dim); per layer (rows, out, in) the weights of a
    fresh row and the base, empty tuples where there are none."""

    gain: Tensor | None
    bias: Tensor | None
    initial: Weights
    initial_momentum: Weights
    base: Weights


class Marks(NamedTuple):
    """What is known of the chunks before looking at a value; None where the usual case holds everywhere.

    filled: (chunks, rows, width), every slot. fresh: (chunks, rows), no row starts afresh.
    complete: (chunks, rows) or one bool for all.
    """

    filled: Tensor | None
    fresh: Tensor | None
    complete: Tensor | bool

    def at(self, chunks: slice | int) -> Marks:
        """The marks of some chunks."""
        return Marks(
            None if self.filled is None else self.filled[chunks],
            None if self.fresh is None else self.fresh[chunks],
            self.complete[chunks] if isinstance(self.complete, Tensor) else self.complete,
        )


class State(NamedTuple):
    """Weights (rows, out, in) per layer. After a whole chunk `anchor` is `weights`, the same tensors."""

    weights: Weights
    momentum: Weights
    anchor: Weights

    @property
    def is_anchored(self) -> bool:
        """Every layer's anchor is its weights, the same tensor."""
        return all(a is w for a, w in zip(self.anchor, self.weights, strict=True))


def _where(rows: Tensor, chosen: Weights, otherwise: Weights) -> Weights:
    return tuple(torch.where(rows[:, None, None], a, b) for a, b in zip(chosen, otherwise, strict=True))


def begin_chunk(marks: Marks, slow: Slow, state: State) -> State:
    """The state with which a chunk begins: rows that start afresh do so now."""
    if marks.fresh is None:
        return state
    return State(
        _where(marks.fresh, slow.initial, state.weights),
        _where(marks.fresh, slow.initial_momentum, state.momentum),
        _where(marks.fresh, slow.initial, state.anchor),
    )


def end_chunk(
    inner: InnerProblem, marks: Marks, weights: Weights, momentum: Weights, anchor: Weights
) -> State:
    """The state a chunk leaves: where it is complete its weights settle and become the anchor."""
    if isinstance(marks.complete, Tensor):
        settled = inner.rule.settle(weights)
        return State(
            _where(marks.complete, settled, weights), momentum, _where(marks.complete, settled, anchor)
        )
    if marks.complete:
        settled = inner.rule.settle(weights)
        return State(settled, momentum, settled)
    return State(weights, momentum, anchor)


def coefficients_of(inner: InnerProblem, tokens: Tokens, marks: Marks) -> ChunkCoefficients:
    """Of all chunks and layers at once: (chunks, depth, rows, …)."""
    written = None if marks.filled is None else marks.filled.unsqueeze(1)
    return inner.rule.coefficients(tokens.forget, tokens.momentum, tokens.step_size, written)


def _by_layer(coefficients: ChunkCoefficients, chunk: int) -> list[ChunkCoefficients]:
    return [
        ChunkCoefficients(*layer) for layer in zip(*(c[chunk].unbind(0) for c in coefficients), strict=True)
    ]


def scan_group(
    inner: InnerProblem,
    tokens: Tokens,
    coefficients: ChunkCoefficients,
    marks: Marks,
    slow: Slow,
    state: State,
    tapes: list[tuple[ChunkTape, Weights]] | None = None,
) -> tuple[Tensor, Tensor, State]:
    """A few chunks in sequence: reads, surprise, and the state after them; a list collects the tapes."""
    reads, surprises = [], []
    for n in range(tokens.keys.shape[0]):
        here = marks.at(n)
        state = begin_chunk(here, slow, state)
        chunk = Chunk(
            tokens.queries[n],
            tokens.keys[n],
            tokens.values[n],
            _by_layer(coefficients, n),
            slow.gain,
            slow.bias,
            slow.base or None,
        )
        read, weights, momentum, tape = run_chunk(inner, chunk, *state)
        state = end_chunk(inner, here, weights, momentum, state.anchor)
        reads.append(read)
        surprises.append(tape.keys.surprise)
        if tapes is not None:
            tapes.append((tape, weights))
    return torch.stack(reads), torch.stack(surprises), state


class Arguments:
    """The tensors of a scan, flattened for autograd and put back together; optional ones keep their place."""

    def __init__(self, inner: InnerProblem, marks: Marks, tokens: Tokens, slow: Slow, state: State) -> None:
        self.inner, self.marks = inner, marks
        self.has_base = bool(slow.base)
        self.flat = [*tokens, slow.gain, slow.bias, *slow.initial, *slow.initial_momentum, *slow.base]
        self.flat += [w for part in state for w in part]

    @property
    def needs_grad(self) -> bool:
        """Whether autograd has to know of this scan."""
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.flat)

    def unflatten(self, flat: Any) -> tuple[Tokens, Slow, State]:
        depth = self.inner.network.depth
        layered = [tuple(flat[i : i + depth]) for i in range(8, len(flat), depth)]
        # Without resets there are no initial weights to put back.
        initial, initial_momentum = layered[:2] if self.marks.fresh is not None else ((), ())
        base = layered[-4] if self.has_base else ()
        return (
            Tokens(*flat[:6]),
            Slow(flat[6], flat[7], initial, initial_momentum, base),
            State(*layered[-3:]),
        )


def refuse_second_derivatives(backend: str) -> None:
    """Raise RuntimeError in a backward that is to be differentiated: a recomputation would lose terms."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"backend={backend!r} is differentiable once, create_graph=True asks for more: use 'reference'"
        )


class _GroupedScan(torch.autograd.Function):
    """A scan that keeps the state once per group of chunks and recomputes the inside of a group going
    backward."""

    @staticmethod
    def forward(ctx: Any, arguments: Arguments, *flat: Tensor | None) -> tuple[Tensor, ...]:
        inner = arguments.inner
        tokens, slow, state = arguments.unflatten(flat)
        num_chunks = tokens.keys.shape[0]
        size = math.isqrt(num_chunks - 1) + 1
        ctx.arguments, ctx.groups = arguments, [slice(i, i + size) for i in range(0, num_chunks, size)]
        starts: list[Tensor] = []
        # Saved tensors come back as new objects: whether the anchor was the weights has to be remembered.
        ctx.shared = []
        reads, surprises = [], []
        for group in ctx.groups:
            ctx.shared.append(state.is_anchored)
            starts += [*state.weights, *state.momentum, *state.anchor]
            part, marks = Tokens(*(x[group] for x in tokens)), arguments.marks.at(group)
            read, surprise, state = scan_group(
                inner, part, coefficients_of(inner, part, marks), marks, slow, state
            )
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
        refuse_second_derivatives("chunkwise")
        with torch.autocast(grads[0].device.type, enabled=False):
            # Whoever goes backward under autocast must still get the gradient of what went forward.
            return _GroupedScan._recompute(ctx, *grads)

    @staticmethod
    def _recompute(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments: Arguments = ctx.arguments
        inner, marks = arguments.inner, arguments.marks
        depth = inner.network.depth
        saved = ctx.saved_tensors
        tokens, slow, _ = arguments.unflatten(saved[: ctx.num_inputs])
        starts = saved[ctx.num_inputs :]
        token_grads = Tokens(*(torch.empty_like(x) for x in tokens))
        slow_grads = _SlowGradients(slow)
        weights, momentum, anchor = (list(grads[i : i + depth]) for i in range(2, 2 + 3 * depth, depth))
        state_grads = _StateGradients(weights, momentum, anchor)
        for g in reversed(range(len(ctx.groups))):
            group = ctx.groups[g]
            flat = starts[g * 3 * depth : (g + 1) * 3 * depth]
            start = State(*(tuple(flat[i : i + depth]) for i in range(0, 3 * depth, depth)))
            if ctx.shared[g]:
                start = start._replace(anchor=start.weights)
            part, here = Tokens(*(x[group] for x in tokens)), marks.at(group)
            gates = [x.detach().requires_grad_() for x in part[3:]]
            with torch.enable_grad():
                attached = coefficients_of(
                    inner, part._replace(forget=gates[0], momentum=gates[1], step_size=gates[2]), here
                )
            coefficients = ChunkCoefficients(*(c.detach() for c in attached))
            tapes: list[tuple[ChunkTape, Weights]] = []
            scan_group(inner, part, coefficients, here, slow, start, tapes)

            coefficient_grads: list[list[ChunkCoefficients]] = []
            for n in reversed(range(len(tapes))):
                tape, unsettled = tapes.pop()
                at = here.at(n)
                state_grads.through_end(inner, at, unsettled)
                chunk_grads = chunk_backward(
                    inner, tape, grads[0][group.start + n], state_grads.weights, state_grads.momentum
                )
                state_grads.through_chunk(chunk_grads)
                state_grads.through_begin(at, slow_grads)
                for into, grad in zip(token_grads[:3], chunk_grads[:3], strict=True):
                    into[group.start + n] = grad
                slow_grads.add(chunk_grads)
                coefficient_grads.append(chunk_grads.coefficients)
            coefficient_grads.reverse()
            stacked = [
                torch.stack([torch.stack([layer[i] for layer in layers]) for layers in coefficient_grads])
                for i in range(len(attached))
            ]
            for into, grad in zip(
                token_grads[3:], torch.autograd.grad(attached, gates, stacked), strict=True
            ):
                into[group] = grad
        return (None, *token_grads, *slow_grads.flat(), *state_grads.flat(ctx.shared[0]))


class _SlowGradients:
    """Sums over chunks of the gradients of what they share."""

    def __init__(self, slow: Slow) -> None:
        self.gain, self.bias = (None if x is None else torch.zeros_like(x) for x in (slow.gain, slow.bias))
        self.initial = [torch.zeros_like(w) for w in slow.initial]
        self.initial_momentum = [torch.zeros_like(m) for m in slow.initial_momentum]
        self.base = [torch.zeros_like(b) for b in slow.base]

    def add(self, grads: ChunkGradients) -> None:
        for total, part in ((self.gain, grads.gain), (self.bias, grads.bias)):
            if total is not None and part is not None:
                total += part
        for total, part in zip(self.base, grads.base or (), strict=True):
            total += part

    def flat(self) -> list[Tensor | None]:
        return [self.gain, self.bias, *self.initial, *self.initial_momentum, *self.base]


class _StateGradients:
    """The gradient of the state on its way back through the chunks. `anchor` is None while it is in
    `weights`."""

    def __init__(self, weights: list[Tensor], momentum: list[Tensor], anchor: list[Tensor] | None) -> None:
        self.weights, self.momentum, self.anchor = weights, momentum, anchor

    def through_end(self, inner: InnerProblem, marks: Marks, unsettled: Weights) -> None:
        """Back through `end_chunk`."""
        if marks.complete is False:
            return
        if marks.complete is True:
            both = self.weights
            if self.anchor is not None:
                both = [w + a for w, a in zip(self.weights, self.anchor, strict=True)]
            self.weights, self.anchor = inner.rule.settle_backward(unsettled, both), None
            return
        closed = marks.complete[:, None, None]
        assert self.anchor is not None
        settled = [torch.where(closed, w + a, 0) for w, a in zip(self.weights, self.anchor, strict=True)]
        settled = inner.rule.settle_backward(unsettled, settled)
        self.weights = [torch.where(closed, s, w) for s, w in zip(settled, self.weights, strict=True)]
        self.anchor = [torch.where(closed, 0, a) for a in self.anchor]

    def through_chunk(self, grads: ChunkGradients) -> None:
        """Back through `run_chunk`, which uses the anchor and hands it on."""
        self.weights, self.momentum = grads.weights, grads.momentum
        if grads.anchor is not None:
            passed = self.anchor
            self.anchor = (
                grads.anchor
                if passed is None
                else [a.add_(p) for a, p in zip(grads.anchor, passed, strict=True)]
            )
        elif self.anchor is not None:
            self.weights = [w.add_(a) for w, a in zip(self.weights, self.anchor, strict=True)]
            self.anchor = None

    def through_begin(self, marks: Marks, slow: _SlowGradients) -> None:
        """Back through `begin_chunk`."""
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


def scan_chunks(
    inner: InnerProblem, tokens: Tokens, marks: Marks, slow: Slow, state: State
) -> tuple[Tensor, Tensor, State]:
    """Run laid-out chunks: reads (chunks, rows, width, head_dim), surprise (chunks, rows, width), and the
    state."""
    arguments = Arguments(inner, marks, tokens, slow, state)
    if not arguments.needs_grad:
        return scan_group(inner, tokens, coefficients_of(inner, tokens, marks), marks, slow, state)
    reads, surprise, *leaves = _GroupedScan.apply(arguments, *arguments.flat)
    depth = inner.network.depth
    return reads, surprise, State(*(tuple(leaves[i : i + depth]) for i in range(0, 3 * depth, depth)))
