"""Memora: each row of the weights is a distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from titans.memory.rules.momentum import MomentumRule


@dataclass(frozen=True)
class Memora(MomentumRule):
    """KL retention of MIRAS (arXiv 2504.13173, equation 27): W ← c softmax((1 − α) log W − θ ∇ℓ), row by row.

    The state carries Z = log W up to a number for each row, which softmax does not see: Z ← (1 − α) Z − θ ∇ℓ,
    W = c softmax(Z). Forgetting brings W to the uniform distribution, or to that of the base. The weights are
    never negative and each row sums to c.

    Args:
        mass: c, above 0.
        normalize_step, length_floor, row_limit: see `MomentumRule`; `row_limit` holds for rows of Z.

    Raises:
        ValueError: for a mass that is not finite and above 0.
    """

    mass: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mass < math.inf:
            raise ValueError(f"mass={self.mass!r}: give a finite number above 0")

    def network_weight(self, carried: Tensor) -> Tensor:
        return self.mass * carried.softmax(-1)

    @property
    def slope(self) -> float:
        """Of c softmax, at most c / 2; the steps of a small c are no longer for it."""
        return max(1.0, self.mass / 2)
