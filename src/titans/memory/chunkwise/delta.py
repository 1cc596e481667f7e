"""Chunks of one token, a block of them at a time: the delta rule, exactly.

With chunk_size=1 every token's gradient is taken at the weights just before it. For one matrix and the
squared error it is 2 e_t k_tᵀ with e_t = W_{t−1} k_t − v_t, and W_{t−1} is linear in the state at the block's
start and in the errors before t (`rules.ChunkCoefficients`). So the errors of a block solve

    e_t + Σ_{j<t} steps[t−1, j] (k_j · k_t) e_j = (W_{t−1} k_t without what the block has written) − v_t,

a unit lower triangular system, and nothing weight-sized exists per token. Derivation: docs/how/schedules.md.
This is the gated delta rule (arXiv 2412.06464), whose blocks are computed so in arXiv 2406.06484,
with momentum.

Shapes: rows = batch · heads; tokens (blocks, rows, width, features); weights (rows, out, in).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.memory.chunkwise.groups import (
    Arguments,
    Marks,
    Slow,
    Tokens,
    begin_chunk,
    coefficients_of,
    refuse_second_derivatives,
)
from titans.memory.inner import InnerProblem
from titans.memory.network import MemoryNetwork
from titans.memory.objectives import SquaredError
from titans.memory.precision import autocast_device
from titans.memory.problem import ScanProblem
from titans.memory.rules import MomentumRule
from titans.memory.state import MemoryState
from titans.state import where_rows


def block_width(net: MemoryNetwork) -> int:
    """Tokens in a block. With more of them passes over weights are rarer, and tables of (width, width) and
    triangular systems larger."""
    return 128 if net.head_dim * net.input_dim >= 2**17 else 32


def is_delta_rule(problem: ScanProblem) -> bool:
    """Whether a problem is one that `scan_delta_blocks` computes."""
    net, rule = problem.inner.network, problem.inner.rule
    # Exact types: a subclass may compute something else.
    return (
        problem.chunk_size == 1
        and net.depth == 1
        and not (net.residual or net.norm)
        and type(problem.inner.objective) is SquaredError
        and type(rule) is MomentumRule
        and rule.row_limit is None
        and not problem.forgets_by_row
    )


class _Tables(NamedTuple):
    """What a block's tokens determine without the state; leading dimensions … are any.

    Token t meets the weights before_weights W + before_momentum S − Σ_j …, with W and S of the block's start,
    and its query those at weights and momentum.
    """

    before_weights: Tensor  # (…, width, 1)
    before_momentum: Tensor
    system: Tensor  # (…, width, width), below its unit diagonal
    weights: Tensor  # (…, width, 1)
    momentum: Tensor
    mixing: Tensor  # (…, width, width): reads − mixing · errors
    end_weights: Tensor  # (…, 1, 1), and so on: as in `ChunkCoefficients`
    end_momentum: Tensor
    end_steps: Tensor  # (…, width, 1)
    momentum_momentum: Tensor
    momentum_steps: Tensor

    def at(self, block: int) -> _Tables:
        return _Tables(*(x[block] for x in self))


class _Found(NamedTuple):
    """Of a block: reads, errors, and what the errors add to weights and momentum, each (…, width, out)."""

    reads: Tensor
    errors: Tensor
    to_weights: Tensor
    to_momentum: Tensor


class _Plan(NamedTuple):
    """What one scan is in addition to its tensors.

    read_before: a query is answered with the weights before its token's write. moving: some token carries
    momentum on; without, only the last token of a row determines the momentum. ends: for each block, whether
    some row's momentum is needed after it.
    """

    read_before: bool
    moving: bool
    ends: list[bool]

    def of(self, blocks: slice) -> _Plan:
        return self._replace(ends=self.ends[blocks])


def _shifted(x: Tensor, first: float) -> Tensor:
    """What token t − 1 has, for token t: rows one further down, below a row of `first`."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)


def _tables(plan: _Plan, inner: InnerProblem, tokens: Tokens, marks: Marks) -> _Tables:
    queries, keys = tokens.queries, tokens.keys
    # The gradient is 2 e kᵀ, and the factor belongs to the step as a normalizer does.
    scale: Tensor | float = 2.0
    if inner.rule.normalize_step:
        squares = keys.square().sum(-1)
        scale = 2 / inner.step_normalizers(2.0, torch.ones_like(squares), [squares], [])[0].unsqueeze(1)
    coefficients = coefficients_of(inner, tokens._replace(step_size=tokens.step_size * scale), marks)
    c = type(coefficients)(*(x.squeeze(1) for x in coefficients))
    before = (
        _shifted(c.read_weights, 1.0),
        _shifted(c.read_momentum, 0.0),
        _shifted(c.read_steps, 0.0),
    )
    now = before if plan.read_before else (c.read_weights, c.read_momentum, c.read_steps)
    return _Tables(
        before[0],
        before[1],
        before[2] * (keys @ keys.mT),
        now[0],
        now[1],
        now[2] * (queries @ keys.mT),
        *c[3:],
    )


def _within(tables: _Tables, values: Tensor, by_weights: Tensor, by_momentum: Tensor | None) -> _Found:
    """What happens inside a block, given the products of its keys and queries (…, 2 · width, in) with the
    weights and the momentum it begins with."""
    width = values.shape[-2]
    errors = tables.before_weights * by_weights[..., :width, :] - values
    reads = tables.weights * by_weights[..., width:, :]
    if by_momentum is not None:
        errors = errors + tables.before_momentum * by_momentum[..., :width, :]
        reads = reads + tables.momentum * by_momentum[..., width:, :]
    if width > 1:
        errors = torch.linalg.solve_triangular(tables.system, errors, upper=False, unitriangular=True)
    reads = reads - tables.mixing @ errors
    return _Found(reads, errors, tables.end_steps * errors, tables.momentum_steps * errors)


def _written(
    plan: _Plan, block: int, tables: _Tables, found: _Found, keys: Tensor, state: MemoryState
) -> MemoryState:
    """The state after a block; tables and tokens are those of the block."""
    (weight,), (moment,) = state.weights, state.momentum
    moved = torch.addcmul(weight, weight, tables.end_weights)
    if plan.moving:
        moved.addcmul_(moment, tables.end_momentum)
    moved.baddbmm_(found.to_weights.mT, keys, alpha=-1)
    if plan.ends[block]:
        moment = (moment * tables.momentum_momentum).baddbmm_(found.to_momentum.mT, keys, alpha=-1)
    return MemoryState((moved,), (moment,))


# Of each group: the products that `_within` takes, (blocks, rows, 2 · width, out) each, and the state before.
_Tape = list[tuple[Tensor, Tensor | None, MemoryState]]


def _scan_group(
    plan: _Plan,
    inner: InnerProblem,
    tokens: Tokens,
    marks: Marks,
    slow: Slow,
    state: MemoryState,
    tape: _Tape | None,
) -> tuple[Tensor, Tensor, MemoryState]:
    tables = _tables(plan, inner, tokens, marks)
    asked = torch.cat([tokens.keys, tokens.queries], -2)
    reads, surprises, start = [], [], state
    products: tuple[list[Tensor], list[Tensor]] = ([], [])
    for n, both in enumerate(asked):
        state = begin_chunk(marks.at(n), slow, state)
        by_weights = torch.bmm(both, state.weights[0].mT)
        by_momentum = torch.bmm(both, state.momentum[0].mT) if plan.moving else None
        here = tables.at(n)
        found = _within(here, tokens.values[n], by_weights, by_momentum)
        state = _written(plan, n, here, found, tokens.keys[n], state)
        reads.append(found.reads)
        surprises.append(found.errors.square().sum(-1))
        if tape is not None:
            products[0].append(by_weights)
            products[1].extend([] if by_momentum is None else [by_momentum])
    if tape is not None:
        tape.append((torch.stack(products[0]), torch.stack(products[1]) if plan.moving else None, start))
    return torch.stack(reads), torch.stack(surprises), state


def _groups(blocks: int) -> list[slice]:
    size = math.isqrt(blocks - 1) + 1
    return [slice(i, i + size) for i in range(0, blocks, size)]


def _scan_groups(
    plan: _Plan,
    inner: InnerProblem,
    tokens: Tokens,
    marks: Marks,
    slow: Slow,
    state: MemoryState,
    tape: _Tape | None = None,
) -> tuple[Tensor, Tensor, MemoryState]:
    """Reads, surprise and the state after all blocks; group by group, so that tables exist for one group at
    a time."""
    reads, surprises = [], []
    for group in _groups(tokens.keys.shape[0]):
        part = Tokens(*(x[group] for x in tokens))
        read, surprise, state = _scan_group(plan.of(group), inner, part, marks.at(group), slow, state, tape)
        reads.append(read)
        surprises.append(surprise)
    return torch.cat(reads), torch.cat(surprises), state


class _DeltaScan(torch.autograd.Function):
    """A scan that keeps the state once per group of blocks, and of every token what it found there.

    Going backward, what is inside the blocks of a group is differentiated by autograd, all blocks at once;
    what goes from block to block, which is weight-sized, is written out.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, arguments: Arguments, *flat: Tensor | None) -> tuple[Tensor, ...]:
        tokens, slow, state = arguments.unflatten(flat)
        tape: _Tape = []
        reads, surprise, after = _scan_groups(
            plan, arguments.inner, tokens, arguments.marks, slow, state, tape
        )
        ctx.plan, ctx.arguments, ctx.num_inputs = plan, arguments, len(flat)
        kept = [(*products, *start.weights, *start.momentum) for *products, start in tape]
        ctx.save_for_backward(*flat, *(x for group in kept for x in group))
        ctx.mark_non_differentiable(surprise)
        return (reads, surprise, *pytree.tree_leaves(after))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("chunkwise")
        with torch.autocast(autocast_device(grads[0]), enabled=False):
            return _DeltaScan._recompute(ctx, *grads)

    @staticmethod
    def _recompute(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments: Arguments = ctx.arguments
        inner, marks, saved = arguments.inner, arguments.marks, ctx.saved_tensors
        tokens, slow, _ = arguments.unflatten(saved[: ctx.num_inputs])
        groups = _groups(tokens.keys.shape[0])
        kept = saved[ctx.num_inputs :]
        token_grads = Tokens(*(torch.empty_like(x) for x in tokens))
        after = _StateGradients(grads[2], grads[3], slow)
        for i, group in reversed([*enumerate(groups)]):
            part = Tokens(*(x[group].detach().requires_grad_() for x in tokens))
            here, plan = marks.at(group), ctx.plan.of(group)
            by_weights, by_momentum, weight, moment = kept[4 * i : 4 * i + 4]
            with torch.enable_grad():
                tables = _tables(plan, inner, part, here)
                found = _within(tables, part.values, by_weights, by_momentum)
            start = MemoryState((weight,), (moment,))
            found_grads = _between(plan, part, here, slow, tables, found, start, grads[0][group], after)
            inside = torch.autograd.grad(
                [found.reads, found.to_weights, found.to_momentum, *_ends(tables)],
                part,
                [grads[0][group], *found_grads.inside],
                allow_unused=True,
                materialize_grads=True,
            )
            for into, grad in zip(token_grads, inside, strict=True):
                into[group] = grad
            token_grads.keys[group] += found_grads.keys
            token_grads.queries[group] += found_grads.queries
        by_slow = Slow(None, None, after.fresh, ())
        by_state = MemoryState((after.weights,), (after.momentum,))
        return (None, None, *pytree.tree_leaves((token_grads, by_slow, by_state)))


def _ends(tables: _Tables) -> tuple[Tensor, Tensor, Tensor]:
    return tables.end_weights, tables.end_momentum, tables.momentum_momentum


class _StateGradients:
    """The gradient of the state on its way back through the blocks, and the sum of a fresh row's."""

    def __init__(self, weights: Tensor, momentum: Tensor, slow: Slow) -> None:
        self.weights, self.momentum = weights, momentum
        self.fresh = None if slow.fresh is None else slow.fresh.map(torch.zeros_like)

    def through_begin(self, marks: Marks) -> None:
        """Back through `begin_chunk`."""
        if marks.fresh is None or self.fresh is None:
            return
        fresh = marks.fresh[:, None, None]
        self.fresh.weights[0].add_(torch.where(fresh, self.weights, 0))
        self.fresh.momentum[0].add_(torch.where(fresh, self.momentum, 0))
        self.weights, self.momentum = (torch.where(fresh, 0, x) for x in (self.weights, self.momentum))


class _FoundGradients(NamedTuple):
    """Gradients for a group: of what autograd takes through the inside of its blocks, namely `to_weights`,
    `to_momentum` and `_ends`; and the share of keys and queries that does not go through there."""

    inside: list[Tensor]
    keys: Tensor
    queries: Tensor


def _between(
    plan: _Plan,
    tokens: Tokens,
    marks: Marks,
    slow: Slow,
    tables: _Tables,
    found: _Found,
    start: MemoryState,
    reads_grad: Tensor,
    after: _StateGradients,
) -> _FoundGradients:
    """Back through what is weight-sized in a group's blocks; moves `after` to before the group."""
    tables, found, tokens = (type(x)(*(y.detach() for y in x)) for x in (tables, found, tokens))  # type: ignore
    states, state = [], start
    blocks, _, width, _ = tokens.keys.shape
    for n in range(blocks):
        state = begin_chunk(marks.at(n), slow, state)
        states.append(state)
        if n + 1 < blocks:
            block = _Found(*(x[n] for x in found))
            state = _written(plan, n, tables.at(n), block, tokens.keys[n], state)

    # Of the errors, by what was read.
    errors_grad = -(tables.mixing.mT @ reads_grad)
    inside = [torch.zeros_like(x) for x in (found.to_weights, found.to_momentum, *_ends(tables))]
    keys_grad, queries_grad = torch.empty_like(tokens.keys), torch.empty_like(tokens.queries)
    for n in reversed(range(blocks)):
        here, keys = tables.at(n), tokens.keys[n]
        (weight,), (moment,) = states[n].weights, states[n].momentum
        grad_w, grad_s = after.weights, after.momentum
        # Through `_written`.
        inside[0][n] = torch.bmm(keys, grad_w.mT).neg_()
        inside[2][n] = (grad_w * weight).sum((1, 2), keepdim=True)
        of_errors = torch.addcmul(errors_grad[n], here.end_steps, inside[0][n])
        key_grad = torch.bmm(found.to_weights[n], grad_w).neg_()
        before_w = torch.addcmul(grad_w, grad_w, here.end_weights)
        before_s = grad_s
        if plan.ends[n]:
            inside[1][n] = torch.bmm(keys, grad_s.mT).neg_()
            inside[4][n] = (grad_s * moment).sum((1, 2), keepdim=True)
            of_errors.addcmul_(here.momentum_steps, inside[1][n])
            key_grad.baddbmm_(found.to_momentum[n], grad_s, alpha=-1)
            before_s = grad_s * here.momentum_momentum
        # Through `_within`, to the products with the state that the block began with.
        if width > 1:
            of_errors = torch.linalg.solve_triangular(
                here.system.mT, of_errors, upper=True, unitriangular=True
            )
        both = torch.cat([keys, tokens.queries[n]], 1)
        by_weights = torch.cat([here.before_weights * of_errors, here.weights * reads_grad[n]], 1)
        both_grad = torch.bmm(by_weights, weight)
        before_w.baddbmm_(by_weights.mT, both)
        if plan.moving:
            inside[3][n] = (grad_w * moment).sum((1, 2), keepdim=True)
            by_momentum = torch.cat([here.before_momentum * of_errors, here.momentum * reads_grad[n]], 1)
            both_grad.baddbmm_(by_momentum, moment)
            before_s = torch.addcmul(before_s, grad_w, here.end_momentum)
            before_s.baddbmm_(by_momentum.mT, both)
        keys_grad[n] = key_grad + both_grad[:, :width]
        queries_grad[n] = both_grad[:, width:]
        after.weights, after.momentum = before_w, before_s
        after.through_begin(marks.at(n))
    return _FoundGradients(inside, keys_grad, queries_grad)


def _plan(read_before: bool, tokens: Tokens, marks: Marks) -> _Plan:
    blocks = tokens.keys.shape[0]
    gates = tokens.momentum
    # On an accelerator, looking at values would stop the stream.
    if gates.device.type != "cpu" or (torch.is_grad_enabled() and gates.requires_grad) or gates.any():
        return _Plan(read_before, True, [True] * blocks)
    if marks.filled is None:
        return _Plan(read_before, False, [False] * (blocks - 1) + [True])
    written = marks.filled.any(-1)
    later = written.flip(0).cummax(0).values.flip(0)
    return _Plan(read_before, False, [*(~later[1:]).any(1).tolist(), True])


def scan_delta_blocks(
    read_before: bool, inner: InnerProblem, tokens: Tokens, marks: Marks, slow: Slow, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    """Blocks of tokens in sequence, a gradient for each token at the weights before it.

    Args:
        read_before: answer with the weights before a token's own write and not after it.

    Returns:
        Reads (blocks, rows, width, head_dim), surprise (blocks, rows, width), and the state after them.
    """
    keys, queries, values = tokens.keys, tokens.queries, tokens.values
    added: Tensor | None = None
    if slow.base:
        # (W + B) k − v = W k − (v − B k), so slow weights move the values, and are added to what is read.
        values, added = values - keys @ slow.base[0].mT, queries @ slow.base[0].mT
    if not state.is_shared:
        # The first gradient is taken at the anchor A, and A k − v = W k − (v − (A − W) k).
        ahead = state.anchor[0] - state.weights[0]
        if marks.fresh is not None:
            ahead = torch.where(marks.fresh[0][:, None, None], 0, ahead)
        padding = (0, 0, 0, keys.shape[2] - 1, 0, 0, 0, len(keys) - 1)
        values = values - F.pad(keys[:1, :, :1] @ ahead.mT, padding)
        if read_before:
            more = F.pad(queries[:1, :, :1] @ ahead.mT, padding)
            added = more if added is None else added + more
    known = replace(state, anchor=state.weights)
    plan, slow = _plan(read_before, tokens, marks), Slow(None, None, slow.fresh, ())
    arguments = Arguments(inner, marks._replace(complete=True), tokens._replace(values=values), slow, known)
    if arguments.needs_grad:
        reads, surprise, *leaves = _DeltaScan.apply(plan, arguments, *arguments.flat)
        after = arguments.state_after(leaves)
    else:
        reads, surprise, after = _scan_groups(plan, inner, tokens._replace(values=values), marks, slow, known)
    if not state.is_shared and marks.filled is not None:
        # A row without a token keeps its anchor.
        after = where_rows(marks.filled.any(-1).any(0), after, state)
    return reads if added is None else reads + added, surprise, after
