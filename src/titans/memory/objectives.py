"""Inner objectives: what the memory minimises while it reads. To add one, write a class and register it.

All are sums over the features of φ(answer − target), so that a compiled backend needs φ′, φ″ and one switch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from titans.memory.registry import Registry


class Objective(Protocol):
    """A loss per token between the memory's answer and the value it should have given."""

    def value(self, answer: Tensor, target: Tensor) -> Tensor:
        """The loss: (…, head_dim) twice to (…)."""
        ...

    def gradient(self, answer: Tensor, target: Tensor) -> Tensor:
        """Its gradient with respect to the answer: (…, head_dim)."""
        ...

    def curvature(self, answer: Tensor, target: Tensor) -> Tensor | float:
        """A bound on its second derivative in the answer, anywhere between the answer and the target: a
        number, or (…) for (…, head_dim).

        Step normalisation divides by it. Divided so, the gradient is no longer than the error, as for the
        squared error, and `state_bound` of `evaluate.stress` holds for every objective."""
        ...


@dataclass(frozen=True)
class SquaredError:
    """‖answer − target‖², summed over features, without a factor one half (equation 12)."""

    def value(self, answer: Tensor, target: Tensor) -> Tensor:
        return (answer - target).square().sum(-1)

    def gradient(self, answer: Tensor, target: Tensor) -> Tensor:
        return 2 * (answer - target)

    def curvature(self, answer: Tensor, target: Tensor) -> float:
        return 2.0


@dataclass(frozen=True)
class Huber:
    """Squared error up to δ, linear beyond: e² for |e| ≤ δ, 2 δ |e| − δ² for larger errors, per feature.

    An outlier moves the memory no further than an error of δ would (Yaad of MIRAS, arXiv 2504.13173, without
    its data-dependent δ). It is the squared error of equation 12 for δ → ∞.

    Args:
        delta: the error at which the loss turns linear, above 0.
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.delta < math.inf:
            raise ValueError(f"delta={self.delta!r}: give a finite number above 0")

    def value(self, answer: Tensor, target: Tensor) -> Tensor:
        # Without |error|, whose second derivative autograd takes to be 0 where the error is.
        error = answer - target
        within = error.clamp(-self.delta, self.delta)
        return (within * (2 * error - within)).sum(-1)

    def gradient(self, answer: Tensor, target: Tensor) -> Tensor:
        return 2 * (answer - target).clamp(-self.delta, self.delta)

    def curvature(self, answer: Tensor, target: Tensor) -> float:
        return 2.0


@dataclass(frozen=True)
class Lp:
    """Σ |answer − target|^p over features (Moneta of MIRAS, arXiv 2504.13173, without its l_q retention).

    The curvature p (p − 1) |e|^(p − 2) grows with the error, so its bound is that of the largest error. Below
    p = 2 it has no bound at an error of 0, and no step size would be stable.

    Args:
        p: the power, at least 2; 2 is the squared error.
    """

    p: float = 3.0

    def __post_init__(self) -> None:
        if not 2 <= self.p < math.inf:
            raise ValueError(
                f"p={self.p!r}: give a finite number of at least 2, below which no step is stable"
            )

    def value(self, answer: Tensor, target: Tensor) -> Tensor:
        return (answer - target).abs().pow(self.p).sum(-1)

    def gradient(self, answer: Tensor, target: Tensor) -> Tensor:
        error = answer - target
        return self.p * self._weight(error.abs()) * error

    def curvature(self, answer: Tensor, target: Tensor) -> Tensor:
        return self.p * (self.p - 1) * self._weight((answer - target).abs().amax(-1))

    def _weight(self, size: Tensor) -> Tensor:
        """size^(p − 2), and a gradient without NaN where size is 0."""
        nothing = size == 0
        return torch.where(nothing, float(self.p == 2), torch.where(nothing, 1, size).pow(self.p - 2))


OBJECTIVES: Registry[Objective] = Registry(
    "objective", ("value", "gradient", "curvature"), squared_error=SquaredError, huber=Huber, lp=Lp
)
