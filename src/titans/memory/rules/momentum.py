"""The rule of the paper, with rows of limited length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans.memory.rules.rule import UpdateRule
from titans.memory.state import MemoryState


@dataclass(frozen=True, kw_only=True)
class MomentumRule(UpdateRule):
    """Gradient descent with momentum and forgetting, and, at each chunk's end, rows of limited length.

    Args:
        normalize_step, length_floor: see `UpdateRule`.
        row_limit: at each chunk end shorten the rows that are longer than this to it; None for no limit.

    Raises:
        ValueError: for a `row_limit` that is not above 0 and finite.
    """

    row_limit: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_limit is not None and not 0 < self.row_limit < math.inf:
            raise ValueError(f"row_limit={self.row_limit!r}: give None or a finite number above 0")

    def end(self, state: MemoryState) -> MemoryState:
        if self.row_limit is None:
            return state
        return replace(state, weights=tuple(shorten_rows(w, self.row_limit) for w in state.weights))

    def end_backward(self, written: MemoryState, grads: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """`chunkwise.groups.end_backward` by hand, for the `end` of this class and no other."""
        weights, momentum, extra = grads
        if self.row_limit is not None:
            pairs = zip(written.weights, weights, strict=True)
            weights = [shorten_rows_backward(w, self.row_limit, grad) for w, grad in pairs]
        return [weights, momentum, extra, []]


def shorten_rows(weight: Tensor, longest: float) -> Tensor:
    """weight (…, out, in), its rows longer than `longest` shortened to that."""
    return weight * _row_scales(weight, longest)[0]


def shorten_rows_backward(weight: Tensor, longest: float, grad: Tensor) -> Tensor:
    """The gradient of `shorten_rows` in the weight; autograd would take three times as long."""
    scale, long = _row_scales(weight, longest)
    along = (weight * grad).sum(-1, keepdim=True) * scale**3 / longest**2
    return (grad * scale).addcmul_(weight, torch.where(long, along, 0), value=-1)


def _row_scales(weight: Tensor, longest: float) -> tuple[Tensor, Tensor]:
    """What each row is multiplied by, and whether it is shortened: (…, out, 1)."""
    length = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    # A row of zeros has no slope: the inner where keeps its gradient finite.
    long = length > longest
    return torch.where(long, longest / torch.where(long, length, 1), 1), long
