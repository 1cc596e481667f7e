"""Moneta: weights of limited length by a norm of all that has been added up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.memory.rules.momentum import MomentumRule


@dataclass(frozen=True)
class Moneta(MomentumRule):
    """l_q retention of MIRAS (arXiv 2504.13173, equation 24): A ← (1 − α) A − θ ∇ℓ, W = A / ‖A‖_q^(q − 2).

    The state carries A; ‖A‖_q is that of all numbers of a layer's matrix. ‖W‖_q = ‖A‖_q^(3 − q): for q > 3,
    as in the paper, W becomes shorter as A becomes longer, and an empty A has an infinite W. So norms below
    `floor` count as it; W is then no longer than 1 at a floor of 1. The paper has no floor, and a LayerNorm
    behind the last layer, which does not see that layer's length.

    Args:
        q: of the norm, at least 2; at 2 this is the momentum rule.
        floor: below which ‖A‖_q does not count as shorter.
        normalize_step, length_floor, row_limit: see `MomentumRule`; `row_limit` holds for rows of A.

    Raises:
        ValueError: for a q or a floor outside of this, and for no floor where steps are normalised.
    """

    q: float = 4.0
    floor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.q < math.inf:
            raise ValueError(f"q={self.q!r}: give a finite number of at least 2")
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"floor={self.floor!r}: give a finite number of at least 0")
        if self.normalize_step and not self.floor and self.q > 2:
            raise ValueError("floor=0 with normalize_step=True: no step is stable, give a floor above 0")

    def network_weight(self, carried: Tensor) -> Tensor:
        largest = carried.detach().abs().amax((-2, -1), keepdim=True)
        # A norm of numbers around 1, whose powers neither overflow nor vanish.
        largest = torch.where(largest == 0, 1, largest)
        # The square first: q = 4, the paper's, then needs no logarithms.
        powers = (carried / largest).square().pow(self.q / 2).sum((-2, -1), keepdim=True)
        empty = powers == 0
        length = largest * torch.where(empty, 1, powers).pow(1 / self.q)
        length = torch.where(empty, 0, length).clamp_min(self.floor)
        return carried / length.pow(self.q - 2)

    @property
    def slope(self) -> float:
        """Of W in A, by its eigenvalues: 1 where the norm is at the floor, 3 − q along A beyond it."""
        return max(1.0, abs(3 - self.q)) * self.floor ** (2 - self.q) if self.q > 2 else 1.0
