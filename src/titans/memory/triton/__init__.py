"""The fast path on a GPU: one kernel forward and one backward, a head's state in one processor throughout.

What is run is `chunk.py`, for the networks and chunks that `refuses` lets through; chunks that are not whole,
or begin afresh, or are masked, take the plain path. A few tokens that need no gradient have a kernel of their
own, `decode.py`. Needs the package triton.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from titans.memory.checks import hand_written_refuses
from titans.memory.chunkwise import scan_laid_out
from titans.memory.grouped import (
    Marks,
    Slow,
    State,
    Tokens,
    coefficients_of,
    refuse_second_derivatives,
    scan_chunks,
)
from titans.memory.network import MemoryNetwork
from titans.memory.problem import ScanProblem
from titans.memory.state import MemoryState

__all__ = ["refuses", "triton_scan"]

# The longest stretch that is decoded token by token. A longer one may have chunks in it.
FEW_TOKENS = 8
# Bytes of states that a backward may keep; beyond, it keeps one in a group of chunks and recomputes the rest.
KEPT_BYTES = 2**31
_WARPS = 8
_INSTALLED = find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuses(problem: ScanProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    net, keys = problem.net, problem.keys
    if not _INSTALLED:
        return "the package triton is not installed: pip install 'titans-ltm[triton]'"
    if keys.device.type != "cuda" and not interpreted():
        return f"it runs on a CUDA device, and the tensors are on {keys.device}"
    if not interpreted() and not _is_new_enough(keys.device):
        return "it needs a GPU with tensor cores for tf32 (compute capability 8.0)"
    if net.objective != "squared_error" or net.update_rule != "momentum":
        return "it knows the objective 'squared_error' and the update rule 'momentum'"
    if keys.dtype == torch.float64 and not interpreted():
        return "it computes in float32, and the problem is in float64"
    return hand_written_refuses() or (None if decodes(problem) else _refuses_chunks(problem))


def _refuses_chunks(problem: ScanProblem) -> str | None:
    net = problem.net
    if net.depth != 2 or net.norm:
        return "it knows networks of depth 2 without norm"
    hidden = net.head_dim * net.expansion
    for name, size, most in (
        ("chunk_size", problem.chunk_size, 16),
        ("head_dim", net.head_dim, 64),
        ("head_dim · expansion", hidden, 128),
    ):
        if not _is_power_of_two(size, most):
            return f"{name} is {size}: it knows powers of two from 16 to {most}"
    return None


def decodes(problem: ScanProblem) -> bool:
    """Whether the kernels for single tokens run a problem that the device can: any chunk, masked or not."""
    net = problem.net
    return (
        1 <= problem.keys.shape[1] <= FEW_TOKENS
        and not problem.needs_grad
        # Tangents would be lost without a word.
        and torch.autograd.forward_ad._current_level < 0
        and problem.reset is None
        and not problem.read_anchor
        and net.depth <= 2
        and not net.norm
        and _is_power_of_two(net.head_dim, 128)
        and (net.depth == 1 or _is_power_of_two(net.head_dim * net.expansion, 512))
    )


def _is_power_of_two(size: int, most: int) -> bool:
    """From 16 on, the smallest tile of a tensor core."""
    return 16 <= size <= most and not size & (size - 1)


def runs_on(x: Tensor) -> bool:
    """Whether kernels other than the scan's take this tensor: float32 on a CUDA device, not in torch.func."""
    return (
        x.device.type == "cuda"
        and x.dtype == torch.float32
        and _INSTALLED
        and _is_new_enough(x.device)
        and hand_written_refuses() is None
    )


def _is_new_enough(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def triton_scan(problem: ScanProblem) -> tuple[Tensor, MemoryState, Tensor]:
    """Reads (batch, time, heads, head_dim), new state, and surprise (batch, time, heads) of every token."""
    if decodes(problem):
        from titans.memory.triton.decode import decode

        return decode(problem)

    def run(
        net: MemoryNetwork, tokens: Tokens, marks: Marks, slow: Slow, state: State
    ) -> tuple[Tensor, Tensor, State]:
        plain = marks.filled is None and marks.fresh is None and marks.complete is True
        if not plain or tokens.keys.shape[2] != problem.chunk_size:
            return scan_chunks(net, tokens, marks, slow, state)
        if not state.is_anchored:
            # The anchor is a tensor with a gradient of its own: for one chunk.
            one, others = (Tokens(*(x[part] for x in tokens)) for part in (slice(1), slice(1, None)))
            reads, surprise, state = scan_chunks(net, one, marks, slow, state)
            state = state._replace(anchor=state.weights)
            if len(others.keys):
                more, wonder, state = run(net, others, marks, slow, state)
                reads, surprise = torch.cat([reads, more]), torch.cat([surprise, wonder])
            return reads, surprise, state
        flat = (
            *tokens[:3],
            *coefficients_of(net, tokens, marks),
            *state.weights,
            *state.momentum,
            *slow.base,
        )
        reads, surprise, *end = _Scan.apply(net, *(x.contiguous() for x in flat))
        weights, momentum = tuple(end[:2]), tuple(end[2:])
        return reads, surprise, State(weights, momentum, weights)

    return scan_laid_out(problem, run)


def _options(net: MemoryNetwork, has_base: bool, chunk: int, double: bool) -> dict[str, Any]:
    # Products of float32 are as exact as the user has asked of PyTorch's own.
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return dict(
        FLOOR=net.length_floor**2,
        RADIUS=net._radius,
        CHUNK=chunk,
        DIM=net.head_dim,
        HIDDEN=net.head_dim * net.expansion,
        HAS_BASE=has_base,
        RESIDUAL=net.residual,
        NORMALIZE=net.normalize_step,
        RESCALE=net._rescales,
        GELU=net.activation == "gelu",
        PRECISION="ieee" if double else precision,
        num_warps=_WARPS,
        num_stages=1,
    )


def _forward(
    net: MemoryNetwork,
    inputs: Sequence[Tensor],
    start: Sequence[Tensor],
    base: Sequence[Tensor],
    group: int = 0,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """All chunks from a state: reads, surprise, the state after them, and what the backward wants.

    That is, for `group` 0 nothing; for 1 the tape, states before and after every chunk first; otherwise the
    state before every `group` chunks.
    """
    from titans.memory.triton.kernels import forward_kernel

    keys = inputs[1]
    chunks, rows, chunk, dim = keys.shape
    hidden = dim * net.expansion
    reads, surprise, unused = torch.empty_like(keys), keys.new_empty(chunks, rows, chunk), keys.new_empty(1)
    kept, tape = [unused] * 4, [unused] * 6
    if group == 1:
        states = [x.new_empty(chunks + 1, *x.shape) for x in start]
        for into, x in zip(states, start, strict=True):
            into[0] = x
        shapes = ((chunk, hidden), (chunk, hidden), (chunk, dim), (chunk, hidden), (hidden,), (dim,))
        tape = [keys.new_empty(chunks, rows, *shape) for shape in shapes]
    else:
        states = [x.clone(memory_format=torch.contiguous_format) for x in start]
        if group:
            kept = [x.new_empty(-(-chunks // group), *x.shape) for x in start]
    launch: Any = forward_kernel[(rows,)]
    launch(
        *inputs, *(base or [unused, unused]), *states, reads, surprise, *kept, *tape,
        chunks, rows, max(group, 1),
        TAPE=group == 1, KEEP=group > 1, **_options(net, bool(base), chunk, keys.dtype == torch.float64),
    )  # fmt: skip
    if group == 1:
        return reads, surprise, [x[-1] for x in states], [*states, *tape]
    return reads, surprise, states, kept


class _Scan(torch.autograd.Function):
    """Queries, keys, values, eight coefficients, weights, momentum and base to reads, surprise, weights and
    momentum."""

    @staticmethod
    def forward(ctx: Any, net: MemoryNetwork, *flat: Tensor) -> tuple[Tensor, ...]:
        inputs, start, base = flat[:11], flat[11:15], flat[15:]
        chunks = flat[1].shape[0]
        ctx.net, ctx.group = net, 0
        if any(ctx.needs_input_grad):
            fits = sum(x.nbytes for x in start) * chunks <= KEPT_BYTES
            ctx.group = 1 if fits else math.isqrt(chunks - 1) + 1
        reads, surprise, end, kept = _forward(net, inputs, start, base, ctx.group)
        ctx.save_for_backward(*inputs, *base, *kept)
        ctx.mark_non_differentiable(surprise)
        return reads, surprise, *end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from titans.memory.triton.kernels import backward_kernel

        refuse_second_derivatives("triton")
        saved = list(ctx.saved_tensors)
        num_base = len(ctx.needs_input_grad) - 16
        inputs, base, kept = saved[:11], saved[11 : 11 + num_base], saved[11 + num_base :]
        chunks, rows, chunk, _ = inputs[1].shape
        # Written in place, by one group of chunks after the other.
        state = [x.clone(memory_format=torch.contiguous_format) for x in grads[2:]]
        base_grads = [torch.zeros_like(x) for x in base]
        input_grads = [torch.empty_like(x) for x in inputs]
        unused = inputs[1].new_empty(1)
        grad_reads = grads[0].contiguous()
        size = chunks if ctx.group == 1 else ctx.group
        for begin in reversed(range(0, chunks, size)):
            part = slice(begin, begin + size)
            here = [x[part] for x in inputs]
            tape = kept
            if ctx.group > 1:
                start = [x[begin // size] for x in kept]
                tape = _forward(ctx.net, here, start, base, group=1)[-1]
            launch: Any = backward_kernel[(rows,)]
            launch(
                *here[:2], *here[3:], *(base or [unused, unused]), *tape,
                grad_reads[part], *state, *(base_grads or [unused, unused]), *(x[part] for x in input_grads),
                len(here[0]), rows, **_options(ctx.net, bool(base), chunk, grad_reads.dtype == torch.float64),
            )  # fmt: skip
        return (None, *input_grads, *state, *base_grads)
