"""The fast path as one compiled loop: a head's state stays in the core's cache from chunk to chunk.

The algorithm is that of `chunkwise/chunk.py` and `chunkwise/groups.py`; read it there. The C++ in this folder
is compiled on first use (`build.py`); `missing` states why it cannot be.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.memory.backends.known import ACTIVATION_SWITCH, objective_switch, refuses_parts
from titans.memory.backends.native.build import missing
from titans.memory.checks import hand_written_refuses
from titans.memory.chunkwise.delta import is_delta_rule
from titans.memory.chunkwise.groups import Arguments, Marks, Slow, Tokens, refuse_second_derivatives
from titans.memory.chunkwise.scan import chunkwise_scan, scan_laid_out
from titans.memory.inner import InnerProblem
from titans.memory.problem import ScanProblem
from titans.memory.rules import MomentumRule
from titans.memory.state import MemoryState

# Far above any useful chunk, and far below where a table's size would no longer fit its index.
WIDEST_CHUNK = 4096

__all__ = [
    "missing",
    "native_bfloat16_scan",
    "native_scan",
    "operator_sizes",
    "refuses",
    "refuses_bfloat16",
]


def refuses(problem: ScanProblem) -> str | None:
    """Why the compiled loop cannot run this problem, or None."""
    if problem.keys.device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {problem.keys.device}"
    if reason := refuses_parts(problem):
        return reason
    if torch.autograd.forward_ad._current_level >= 0:
        return "it has no forward-mode derivatives; call it outside of dual_level()"
    if min(problem.chunk_size, problem.keys.shape[1]) > WIDEST_CHUNK:
        return f"it holds tables of chunk_size² numbers: give a chunk_size of at most {WIDEST_CHUNK}"
    return hand_written_refuses() or missing()


def refuses_bfloat16(problem: ScanProblem) -> str | None:
    """Why the compiled loop cannot run this problem with operands in bfloat16, or None."""
    reason = refuses(problem)
    if reason is None and not torch.ops.titans_native.has_tiles():
        return (
            "it needs a processor with matrix tiles for bfloat16 (Intel AMX) and a system that permits them"
        )
    return reason


def native_scan(problem: ScanProblem) -> tuple[Tensor, MemoryState, Tensor]:
    """Reads (batch, time, heads, head_dim), new state, and surprise (batch, time, heads) of every token."""
    return _scan(problem, narrow=False)


def native_bfloat16_scan(problem: ScanProblem) -> tuple[Tensor, MemoryState, Tensor]:
    """`native_scan`, the operands of float32 matrix products being rounded to bfloat16.

    Sums, state, gates and everything that is not a matrix product stay in float32, and so does a single token
    without autograd. In float64 nothing is rounded. The error: docs/how/speed.md.
    """
    return _scan(problem, narrow=True)


def _scan(problem: ScanProblem, narrow: bool) -> tuple[Tensor, MemoryState, Tensor]:
    if _blocks_are_faster(problem):
        return chunkwise_scan(problem)
    return scan_laid_out(problem, functools.partial(_scan_chunks, narrow))


def _blocks_are_faster(problem: ScanProblem) -> bool:
    """Whether chunks of one token are better computed a block at a time (`chunkwise/delta.py`) than one by
    one: where tables of a block, made in plain torch, are less work than passes over the weights."""
    net, time = problem.inner.network, problem.keys.shape[1]
    numbers = net.head_dim * net.input_dim
    return time > 1 and numbers >= 2**10 and time * numbers >= 2**17 and is_delta_rule(problem)


def operator_sizes(inner: InnerProblem, narrow: bool = False) -> tuple[list[int], list[float]]:
    """The inner problem as `Network` of network.h has it; narrow: see `native_bfloat16_scan`."""
    net, rule = inner.network, inner.rule
    assert isinstance(rule, MomentumRule)
    hidden = net.head_dim * net.expansion
    limited = rule.row_limit is not None
    flags = (net.residual, net.norm, rule.normalize_step, limited, narrow)
    kind, parameter = objective_switch(inner.objective)
    numbers = [rule.length_floor, rule.row_limit or 0.0, parameter]
    widths = [net.input_dim, net.head_dim, hidden]
    return [net.depth, *widths, ACTIVATION_SWITCH[net.activation], *map(int, flags), kind], numbers


def _problem(
    narrow: bool, inner: InnerProblem, marks: Marks, tokens: Tokens, slow: Slow, state: MemoryState
) -> list[Any]:
    """The arguments that both operators begin with."""
    chunks, rows = tokens.keys.shape[:2]
    complete = marks.complete
    if not isinstance(complete, Tensor):
        complete = torch.full((chunks, rows), complete, device=tokens.keys.device)

    fresh = ((), ()) if slow.fresh is None else (slow.fresh.weights, slow.fresh.momentum)

    def each(tensors: Any) -> list[Tensor]:
        return [x.contiguous() for x in tensors]

    return [
        *operator_sizes(inner, narrow),
        each(tokens),
        *(None if x is None else x.contiguous() for x in (marks.filled, marks.fresh)),
        complete.contiguous(),
        *(None if x is None else x.contiguous() for x in (slow.gain, slow.bias)),
        *map(each, (*fresh, slow.base)),
        each([*state.weights, *state.momentum, *state.anchor]),
        state.is_shared,
    ]


def _is_ragged(marks: Marks) -> bool:
    """Rows differ in the chunks that they complete, so that each needs an anchor of its own."""
    return isinstance(marks.complete, Tensor)


def _scan_chunks(
    narrow: bool, inner: InnerProblem, tokens: Tokens, marks: Marks, slow: Slow, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    # Token by token, flattening the arguments would take longer than anything else here.
    if torch.is_grad_enabled() and (arguments := Arguments(inner, marks, tokens, slow, state)).needs_grad:
        reads, surprise, *leaves = _NativeScan.apply(narrow, arguments, *arguments.flat)
        return reads, surprise, arguments.state_after(leaves)
    problem = _problem(narrow, inner, marks, tokens, slow, state)
    ragged = _is_ragged(marks)
    reads, surprise, *leaves = torch.ops.titans_native.scan(*problem, len(tokens.keys), False, ragged)
    depth = inner.network.depth
    weights, momentum, anchor = (tuple(leaves[i : i + depth]) for i in range(0, 3 * depth, depth))
    if not ragged:
        anchor = weights if marks.complete else state.anchor
    return reads, surprise, MemoryState(weights, momentum, anchor)


class _NativeScan(torch.autograd.Function):
    """A scan that keeps the state once per group of chunks and recomputes the inside of a group going
    backward."""

    @staticmethod
    def forward(ctx: Any, narrow: bool, arguments: Arguments, *flat: Tensor | None) -> tuple[Tensor, ...]:
        inner, marks = arguments.inner, arguments.marks
        depth = inner.network.depth
        ctx.narrow, ctx.arguments, ctx.num_inputs = narrow, arguments, len(flat)
        tokens, slow, state = arguments.unflatten(flat)
        ctx.group = math.isqrt(len(tokens.keys) - 1) + 1
        problem = _problem(narrow, inner, marks, tokens, slow, state)
        found = torch.ops.titans_native.scan(*problem, ctx.group, True, _is_ragged(marks))
        # The anchor comes out in any case; where it is the weights autograd sees it once.
        shared = marks.complete is True
        outputs, starts = found[: 2 + (2 if shared else 3) * depth], found[2 + 3 * depth :]
        ctx.save_for_backward(*flat, *starts)
        ctx.mark_non_differentiable(outputs[1])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments: Arguments = ctx.arguments
        refuse_second_derivatives("native")
        inner, marks = arguments.inner, arguments.marks
        depth = inner.network.depth
        saved = ctx.saved_tensors
        tokens, slow, state = arguments.unflatten(saved[: ctx.num_inputs])
        problem = _problem(ctx.narrow, inner, marks, tokens, slow, state)
        wanted = [x.contiguous() for x in (grads[0], *grads[2:])]
        if marks.complete is True:
            wanted += [torch.zeros_like(x) for x in wanted[1 : 1 + depth]]
        found = torch.ops.titans_native.scan_backward(*problem, ctx.group, saved[ctx.num_inputs :], wanted)
        layered = iter(tuple(found[i : i + depth]) for i in range(8, len(found), depth))
        fresh = None if slow.fresh is None else MemoryState(next(layered), next(layered))
        base = next(layered) if slow.base else ()
        weights, momentum, anchor = layered
        gain, bias = (
            None if x is None else grad.unsqueeze(1)
            for x, grad in zip((slow.gain, slow.bias), found[6:8], strict=True)
        )
        by_slow = Slow(gain, bias, fresh, base)
        by_state = MemoryState(weights, momentum, None if state.is_shared else anchor)
        return (None, None, *pytree.tree_leaves((Tokens(*found[:6]), by_slow, by_state)))
