"""What surrounds a scan in a layer, each as one compiled pass over its tokens (`layer.cpp`).

The same as `titans.nn.memory.heads`, which is the place to read it and what runs where this refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans.memory.backends.native.build import missing
from titans.memory.checks import hand_written_refuses, has_no_values
from titans.memory.chunkwise.groups import refuse_second_derivatives

_SOURCES = Path(__file__).parent
# No vector register is wider.
_VECTOR_BYTES = 64


def refuses(head_dim: int, *tensors: Tensor) -> str | None:
    """Why the compiled passes cannot take these tensors, or None."""
    dtype = tensors[0].dtype
    if any(x.device.type != "cpu" or x.dtype != dtype for x in tensors):
        return "it takes tensors on the CPU, all of the same dtype"
    if dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 or float64, and the tensors are in {dtype}"
    if head_dim * dtype.itemsize % _VECTOR_BYTES:
        return f"head_dim={head_dim} is no multiple of {_VECTOR_BYTES // dtype.itemsize}"
    if any(map(has_no_values, tensors)):
        return "it computes with values, and the tensors have shapes alone"
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        return "it knows neither torch.compile nor forward-mode derivatives"
    return hand_written_refuses() or missing(_SOURCES)


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def filter_heads(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    reset: Tensor | None,
    lengths: Tensor | None,
    longest: Sequence[float],
    head_dim: int,
) -> list[Tensor]:
    """`titans.nn.memory.heads.head_vectors`, without the new tail. longest: 0 for unit vectors."""
    x, tail, weight = _rows(x), tail.contiguous(), weight.contiguous()
    marks = [None if m is None else m.contiguous() for m in (reset, lengths)]
    run = _FilterHeads.apply if _needs_grad(x, tail, weight) else torch.ops.titans_native.filter
    return list(run(x, tail, weight, *marks, list(longest), head_dim))


class _FilterHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, tail, weight)
        ctx.rest = rest
        return tuple(torch.ops.titans_native.filter(x, tail, weight, *rest))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("native")
        found = torch.ops.titans_native.filter_backward(*ctx.saved_tensors, *ctx.rest, [*map(_rows, grads)])
        return (found[0], found[1], found[2].sum(0), *[None] * len(ctx.rest))


def gated_answers(
    reads: Tensor, prior: Tensor, gate: Tensor, taught: Tensor, known: Tensor, eps: float
) -> Tensor:
    """`titans.nn.memory.heads.gated_answers`, given the norms' weights."""
    tensors = [*map(_rows, (reads, prior, gate)), taught.contiguous(), known.contiguous()]
    run = _GatedAnswers.apply if _needs_grad(*tensors) else torch.ops.titans_native.answer
    return run(*tensors, eps)


class _GatedAnswers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:-1])
        ctx.eps = arguments[-1]
        return torch.ops.titans_native.answer(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("native")
        *found, weights = torch.ops.titans_native.answer_backward(
            *ctx.saved_tensors, ctx.eps, _rows(grads[0])
        )
        return (*found, *weights.sum(1), None)
