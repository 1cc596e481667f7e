"""Chunks in sequence (`chunk.py`), and their backward, which recomputes a group of chunks at a time.

With √chunks groups, training memory grows with the square root of the length (inputs aside).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.memory.chunkwise.chunk import Chunk, ChunkGradients, ChunkTape, chunk_backward, plus, run_chunk
from titans.memory.inner import InnerProblem
from titans.memory.precision import autocast_device
from titans.memory.rules import ChunkCoefficients, UpdateRule, ended
from titans.memory.state import MemoryState, Weights
from titans.state import map_state, where_rows


class Tokens(NamedTuple):
    """Tokens by chunk. `rows` = batch · heads, `width` ≤ chunk_size tokens a chunk."""

    queries: Tensor  # (chunks, rows, width, head_dim), and so on
    keys: Tensor
    values: Tensor
    forget: Tensor  # (chunks, depth, rows, width), and so on
    momentum: Tensor
    step_size: Tensor


class Slow(NamedTuple):
    """What every chunk shares: gain and bias (rows, 1, head_dim), the state of a fresh row, None where no row
    starts afresh, and per layer the base (rows, out, in), an empty tuple where there is none."""

    gain: Tensor | None
    bias: Tensor | None
    fresh: MemoryState | None
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


def begin_chunk(marks: Marks, slow: Slow, state: MemoryState) -> MemoryState:
    """The state with which a chunk begins: rows that start afresh do so now."""
    if marks.fresh is None or slow.fresh is None:
        return state
    return where_rows(marks.fresh, slow.fresh, state)


def end_chunk(inner: InnerProblem, marks: Marks, written: MemoryState) -> MemoryState:
    """The state a chunk leaves: where it is complete the rule ends it, and its weights become the anchor."""
    if marks.complete is False:
        return written
    closed = ended(inner.rule, written)
    return closed if marks.complete is True else where_rows(marks.complete, closed, written)


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
    state: MemoryState,
    tapes: list[tuple[ChunkTape, MemoryState]] | None = None,
) -> tuple[Tensor, Tensor, MemoryState]:
    """A few chunks in sequence: reads, surprise, and the state after them; a list collects the tapes, each
    with the state after the chunk's last token."""
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
        read, weights, momentum, tape = run_chunk(inner, chunk, state)
        written = MemoryState(weights, momentum, state.anchor, None, state.extra)
        state = end_chunk(inner, here, written)
        reads.append(read)
        surprises.append(tape.keys.surprise)
        if tapes is not None:
            tapes.append((tape, written))
    return torch.stack(reads), torch.stack(surprises), state


class Arguments:
    """The tensors of a scan, flattened for autograd and put back together; what is None keeps its place."""

    def __init__(
        self, inner: InnerProblem, marks: Marks, tokens: Tokens, slow: Slow, state: MemoryState
    ) -> None:
        self.inner, self.marks, self._state = inner, marks, state
        self.flat, self._structure = pytree.tree_flatten((tokens, slow, state))

    @property
    def needs_grad(self) -> bool:
        """Whether autograd has to know of this scan."""
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.flat)

    def unflatten(self, flat: Iterable[Tensor | None]) -> tuple[Tokens, Slow, MemoryState]:
        return pytree.tree_unflatten(flat, self._structure)

    def state_after(self, leaves: Iterable[Tensor]) -> MemoryState:
        """The state after the scan from its leaves: with an anchor of its own unless the last chunk is
        complete in every row."""
        closed = self.marks.complete is True
        after = replace(self._state, anchor=self._state.weights) if closed else self._state.expanded()
        return pytree.tree_unflatten(leaves, pytree.tree_structure(after))


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
        ctx.structures = []
        reads, surprises = [], []
        for group in ctx.groups:
            leaves, structure = pytree.tree_flatten(state)
            starts += leaves
            ctx.structures.append(structure)
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
        return (torch.cat(reads), surprise, *pytree.tree_leaves(state))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("chunkwise")
        with torch.autocast(autocast_device(grads[0]), enabled=False):
            # Whoever goes backward under autocast must still get the gradient of what went forward.
            return _GroupedScan._recompute(ctx, *grads)

    @staticmethod
    def _recompute(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments: Arguments = ctx.arguments
        inner, marks = arguments.inner, arguments.marks
        saved = ctx.saved_tensors
        tokens, slow, first = arguments.unflatten(saved[: ctx.num_inputs])
        starts = iter(saved[ctx.num_inputs :])
        begun = [
            pytree.tree_unflatten([next(starts) for _ in range(structure.num_leaves)], structure)
            for structure in ctx.structures
        ]
        token_grads = Tokens(*(torch.empty_like(x) for x in tokens))
        slow_grads = _SlowGradients(slow)
        state_grads = _StateGradients(arguments.state_after(grads[2:]))
        for group, start in zip(reversed(ctx.groups), reversed(begun), strict=True):
            part, here = Tokens(*(x[group] for x in tokens)), marks.at(group)
            gates = [x.detach().requires_grad_() for x in part[3:]]
            with torch.enable_grad():
                attached = coefficients_of(
                    inner, part._replace(forget=gates[0], momentum=gates[1], step_size=gates[2]), here
                )
            coefficients = ChunkCoefficients(*(c.detach() for c in attached))
            tapes: list[tuple[ChunkTape, MemoryState]] = []
            scan_group(inner, part, coefficients, here, slow, start, tapes)

            coefficient_grads: list[list[ChunkCoefficients]] = []
            for n in reversed(range(len(tapes))):
                tape, written = tapes.pop()
                at = here.at(n)
                state_grads.through_end(inner, at, written)
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
        return (None, *pytree.tree_leaves((token_grads, slow_grads.of(slow), state_grads.of(first))))


class _SlowGradients:
    """Sums over chunks of the gradients of what they share."""

    def __init__(self, slow: Slow) -> None:
        self.gain, self.bias = (None if x is None else torch.zeros_like(x) for x in (slow.gain, slow.bias))
        self.fresh = None if slow.fresh is None else map_state(torch.zeros_like, slow.fresh)
        self.base = tuple(torch.zeros_like(b) for b in slow.base)

    def add(self, grads: ChunkGradients) -> None:
        for total, part in ((self.gain, grads.gain), (self.bias, grads.bias)):
            if total is not None and part is not None:
                total += part
        for total, part in zip(self.base, grads.base or (), strict=True):
            total += part

    def of(self, slow: Slow) -> Slow:
        """In the structure of what they are the gradients of."""
        return Slow(self.gain, self.bias, self.fresh, self.base)


class _StateGradients:
    """The gradient of the state on its way back through the chunks. `anchor` is None while it is in
    `weights`."""

    def __init__(self, grads: MemoryState) -> None:
        self.weights, self.momentum, self.extra = [*grads.weights], [*grads.momentum], [*grads.extra]
        self.anchor = None if grads.is_shared else [*grads.anchor]

    def through_end(self, inner: InnerProblem, marks: Marks, written: MemoryState) -> None:
        """Back through `end_chunk`."""
        if marks.complete is False:
            return
        weights, anchor = self.weights, self.anchor
        if anchor is not None:
            weights = [w + a for w, a in zip(weights, anchor, strict=True)]
        found = end_backward(inner.rule, written, [weights, self.momentum, self.extra])
        if isinstance(marks.complete, Tensor):
            assert anchor is not None
            before = (self.weights, self.momentum, self.extra, anchor)
            found = [
                [old if new is old else _where(marks.complete, new, old) for new, old in zip_longest(*parts)]
                for parts in zip(found, before, strict=True)
            ]
        self.weights, self.momentum, self.extra, by_anchor = found
        self.anchor = by_anchor or None

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
        fresh = slow.fresh
        if marks.fresh is None or fresh is None:
            return
        for into, parts in (
            (fresh.weights, self.weights),
            (fresh.weights, self.anchor or ()),
            (fresh.momentum, self.momentum),
            (fresh.extra, self.extra),
        ):
            for total, part in zip(into, parts, strict=bool(parts)):
                total += _where(marks.fresh, part, None)
        for parts in (self.weights, self.momentum, self.extra, self.anchor or []):
            parts[:] = [_where(marks.fresh, None, part) for part in parts]

    def of(self, state: MemoryState) -> MemoryState:
        """In the structure of what they are the gradients of."""
        anchor = None
        if not state.is_shared:
            anchor = tuple(self.anchor or map(torch.zeros_like, state.anchor))
        return MemoryState(tuple(self.weights), tuple(self.momentum), anchor, None, tuple(self.extra))


def _where(rows: Tensor, chosen: Tensor | None, otherwise: Tensor | None) -> Tensor:
    """Row by row, either of which may be None for zeros."""
    like = otherwise if chosen is None else chosen
    assert like is not None
    rows = rows.view(-1, *[1] * (like.dim() - 1))
    return torch.where(rows, 0 if chosen is None else chosen, 0 if otherwise is None else otherwise)


def end_backward(rule: UpdateRule, written: MemoryState, grads: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    """Gradients of what `rule.end` was given, from those of what it returned: by autograd, unless the class
    that defines `end` defines an `end_backward` too.

    grads: of weights, momentum and extra. Returns those of weights, momentum, extra and anchor, nothing of an
    anchor that the rule has not looked at. What the rule hands on unchanged costs nothing.
    """
    owner = next(cls for cls in type(rule).__mro__ if "end" in vars(cls))
    if "end_backward" in vars(owner):
        return vars(owner)["end_backward"](rule, written, grads)
    given = map_state(lambda x: x.detach().requires_grad_(), written)
    with torch.enable_grad():
        after = rule.end(given)
    wanted = (given.weights, given.momentum, given.extra, given.anchor)
    total: list[list[Any]] = [[None] * len(part) for part in wanted]
    changed: list[tuple[Tensor, Tensor]] = []
    for i, results in enumerate((after.weights, after.momentum, after.extra)):
        for j, (result, grad) in enumerate(zip(results, grads[i], strict=True)):
            if result is wanted[i][j]:
                total[i][j] = grad
            elif result.requires_grad:
                changed.append((result, grad))
    if changed:
        outputs, of_outputs = zip(*changed, strict=True)
        inputs = [x for part in wanted for x in part]
        found = iter(torch.autograd.grad(outputs, inputs, of_outputs, allow_unused=True))
        for part in total:
            part[:] = [plus(before, next(found)) for before in part]
    if all(grad is None for grad in total[3]):
        total[3] = []
    for part, like in zip(total, wanted, strict=True):
        part[:] = [torch.zeros_like(x) if g is None else g for g, x in zip(part, like, strict=False)]
    return total


def scan_chunks(
    inner: InnerProblem, tokens: Tokens, marks: Marks, slow: Slow, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    """Run laid-out chunks: reads (chunks, rows, width, head_dim), surprise (chunks, rows, width), and the
    state."""
    arguments = Arguments(inner, marks, tokens, slow, state)
    if not arguments.needs_grad:
        return scan_group(inner, tokens, coefficients_of(inner, tokens, marks), marks, slow, state)
    reads, surprise, *leaves = _GroupedScan.apply(arguments, *arguments.flat)
    return reads, surprise, arguments.state_after(leaves)
