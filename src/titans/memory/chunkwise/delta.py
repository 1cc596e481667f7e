"""Chunks of one token, a block of them at a time: the delta rule, exactly (`delta_block.py`).

Here blocks follow each other, in groups, and gradients are taken through them.

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

from titans.memory.chunkwise.delta_block import (
    Found,
    Plan,
    Tables,
    after_block,
    ends_of,
    inside_block,
    plan_of,
    tables_of,
)
from titans.memory.chunkwise.groups import (
    Arguments,
    Marks,
    Slow,
    Tokens,
    begin_chunk,
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


# Of each group: the products that `inside_block` takes, (blocks, rows, 2 · width, out) each, and the state
# before.
_Tape = list[tuple[Tensor, Tensor | None, MemoryState]]


def _scan_group(
    plan: Plan,
    inner: InnerProblem,
    tokens: Tokens,
    marks: Marks,
    slow: Slow,
    state: MemoryState,
    tape: _Tape | None,
) -> tuple[Tensor, Tensor, MemoryState]:
    tables = tables_of(plan, inner, tokens, marks)
    asked = torch.cat([tokens.keys, tokens.queries], -2)
    reads, surprises, start = [], [], state
    products: tuple[list[Tensor], list[Tensor]] = ([], [])
    for n, both in enumerate(asked):
        state = begin_chunk(marks.at(n), slow, state)
        by_weights = torch.bmm(both, state.weights[0].mT)
        by_momentum = torch.bmm(both, state.momentum[0].mT) if plan.moving else None
        here = tables.at(n)
        found = inside_block(here, tokens.values[n], by_weights, by_momentum)
        state = after_block(plan, n, here, found, tokens.keys[n], state)
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
    plan: Plan,
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
    def forward(ctx: Any, plan: Plan, arguments: Arguments, *flat: Tensor | None) -> tuple[Tensor, ...]:
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
                tables = tables_of(plan, inner, part, here)
                found = inside_block(tables, part.values, by_weights, by_momentum)
            start = MemoryState((weight,), (moment,))
            found_grads = _between(plan, part, here, slow, tables, found, start, grads[0][group], after)
            inside = torch.autograd.grad(
                [found.reads, found.to_weights, found.to_momentum, *ends_of(tables)],
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
    `to_momentum` and `ends_of`; and the share of keys and queries that does not go through there."""

    inside: list[Tensor]
    keys: Tensor
    queries: Tensor


def _between(
    plan: Plan,
    tokens: Tokens,
    marks: Marks,
    slow: Slow,
    tables: Tables,
    found: Found,
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
            block = Found(*(x[n] for x in found))
            state = after_block(plan, n, tables.at(n), block, tokens.keys[n], state)

    # Of the errors, by what was read.
    errors_grad = -(tables.mixing.mT @ reads_grad)
    inside = [torch.zeros_like(x) for x in (found.to_weights, found.to_momentum, *ends_of(tables))]
    keys_grad, queries_grad = torch.empty_like(tokens.keys), torch.empty_like(tokens.queries)
    for n in reversed(range(blocks)):
        here, keys = tables.at(n), tokens.keys[n]
        (weight,), (moment,) = states[n].weights, states[n].momentum
        grad_w, grad_s = after.weights, after.momentum
        # Through `after_block`.
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
        # Through `inside_block`, to the products with the state that the block began with.
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
    plan, slow = plan_of(read_before, tokens, marks), Slow(None, None, slow.fresh, ())
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
