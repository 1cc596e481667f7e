"""Inner objectives: what the memory minimises while it reads. To add one, write a class and register it.

Those that compiled backends know are sums over the features of φ(answer − target): a kernel needs φ′, φ″ and
one switch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.registry import Registry


class Objective(Protocol):
    """A loss per token between the memory's answer and the value it should have given.

    An objective with parameters that depend on the token also has two class attributes and a method:
    `num_inputs`, how many numbers it takes for each token and head; `input_range`, between which two numbers
    they are; and `from_logits`, which maps any numbers to that range, for a layer that learns them. They
    come last in `target`, which then is (…, head_dim + num_inputs).
    """

    def value(self, answer: Tensor, target: Tensor) -> Tensor:
        """The loss: (…, head_dim) each to (…)."""
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


@dataclass(frozen=True)
class DotProduct:
    """−⟨answer, target⟩: every write adds, whatever has been written before (LaCT, arXiv 2505.23884).

    It has no smallest value: forgetting, or rows of limited length, have to bound what is written.
    """

    def value(self, answer: Tensor, target: Tensor) -> Tensor:
        return -(answer * target).sum(-1)

    def gradient(self, answer: Tensor, target: Tensor) -> Tensor:
        return -target

    def curvature(self, answer: Tensor, target: Tensor) -> float:
        """Its second derivative is 0, by which nothing can be divided: steps are divided by their input's
        length alone."""
        return 1.0


class _WithThreshold:
    """What objectives with a threshold δ ≥ 0 of each token share."""

    num_inputs: ClassVar[int] = 1
    input_range: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def from_logits(self, logits: Tensor) -> Tensor:
        return F.softplus(logits)

    def _split(self, answer: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The error (…, head_dim), and δ (…, 1)."""
        value, delta = target.split([target.shape[-1] - 1, 1], -1)
        return answer - value, delta


@dataclass(frozen=True)
class AdaptiveHuber(_WithThreshold):
    """`Huber` with a δ of each token: an error beyond it moves the memory no further than δ would (equation
    14 of MIRAS, arXiv 2504.13173, without its factor ½)."""

    def value(self, answer: Tensor, target: Tensor) -> Tensor:
        error, delta = self._split(answer, target)
        within = error.clamp(-delta, delta)
        return (within * (2 * error - within)).sum(-1)

    def gradient(self, answer: Tensor, target: Tensor) -> Tensor:
        error, delta = self._split(answer, target)
        return 2 * error.clamp(-delta, delta)

    def curvature(self, answer: Tensor, target: Tensor) -> float:
        return 2.0


@dataclass(frozen=True)
class Yaad(_WithThreshold):
    """‖e‖² where the error e is no longer than the token's δ, and δ Σ|e| where it is (Yaad of MIRAS, equation
    26: its update with ∇‖e‖² or δ ∇‖e‖₁).

    The loss and its gradient jump at ‖e‖ = δ, from 2 e to δ sign(e). `AdaptiveHuber` is continuous there.
    """

    def value(self, answer: Tensor, target: Tensor) -> Tensor:
        error, delta = self._split(answer, target)
        square = error.square().sum(-1)
        long = square > delta.squeeze(-1).square()
        return torch.where(long, delta.squeeze(-1) * error.abs().sum(-1), square)

    def gradient(self, answer: Tensor, target: Tensor) -> Tensor:
        error, delta = self._split(answer, target)
        long = error.square().sum(-1, keepdim=True) > delta.square()
        return torch.where(long, delta * error.sign(), 2 * error)

    def curvature(self, answer: Tensor, target: Tensor) -> Tensor:
        """At least 2, and so large that the gradient, whose length is up to δ √head_dim, divided by it is no
        longer than the error."""
        error, delta = self._split(answer, target)
        square, threshold = error.square().sum(-1), delta.squeeze(-1)
        long = square > threshold.square()
        length = torch.where(long, square, 1).sqrt()
        return torch.where(long, threshold * error.shape[-1] ** 0.5 / length, 2).clamp_min(2)


def num_inputs(objective: Objective) -> int:
    """How many numbers the objective takes for each token and head in addition to answer and value."""
    return getattr(objective, "num_inputs", 0)


OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    ("value", "gradient", "curvature"),
    squared_error=SquaredError,
    huber=Huber,
    lp=Lp,
    adaptive_huber=AdaptiveHuber,
    yaad=Yaad,
    dot_product=DotProduct,
)
