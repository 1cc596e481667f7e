"""Inner objectives: what the memory minimises while it reads. To add one, write a class and register it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Objective(Protocol):
    """A loss per token between the memory's answer and the value it should have given."""

    def value(self, answer: Tensor, target: Tensor) -> Tensor:
        """The loss: (…, head_dim) twice to (…)."""
        ...

    def gradient(self, answer: Tensor, target: Tensor) -> Tensor:
        """Its gradient with respect to the answer: (…, head_dim)."""
        ...


class SquaredError:
    """‖answer − target‖², summed over features, without a factor one half (equation 12)."""

    def value(self, answer: Tensor, target: Tensor) -> Tensor:
        return (answer - target).square().sum(-1)

    def gradient(self, answer: Tensor, target: Tensor) -> Tensor:
        return 2 * (answer - target)


OBJECTIVES: dict[str, Objective] = {"squared_error": SquaredError()}
