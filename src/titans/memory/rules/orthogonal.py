"""Steps that move the weights at a chunk's end, all their directions equally far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans.memory.rules.coefficients import ChunkCoefficients
from titans.memory.rules.rule import UpdateRule
from titans.memory.state import MemoryState


def orthogonalized(step: Tensor, floor: float, iterations: int) -> Tensor:
    """step (…, out, in) with its singular values near 1: the orthogonalisation of Muon.

    X ← step / √(‖step‖² + floor²), and `iterations` times X ← 1.5 X − 0.5 X Xᵀ X, which never makes a
    singular value larger than 1, nor changes their order. It multiplies small ones by 1.5 each time, and so
    a disturbance by at most 1.5^iterations / floor. The quintic of Muon is faster and not monotone: updates
    with it amplify a disturbance from chunk to chunk (docs/how/windows.md).
    """
    square = step.square().sum((-2, -1), keepdim=True) + floor**2
    x = step * torch.rsqrt(square)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return x.mT if tall else x


@dataclass(frozen=True, kw_only=True)
class OrthogonalStep(UpdateRule):
    """Within a chunk the step accumulates; at its end the weights move by the step, orthogonalised.

        S_t = η_t S_{t−1} − θ_t u_t        W_t = (1 − α_t) W_{t−1}        at the end W ← W + rate · O(S)

    Queries are answered by the weights with which the chunk began, for nothing has been written since.

    Args:
        rate: what the singular values of O(S) are multiplied by, 1 being their limit.
        floor: the length that is added to S (in squares) before it is divided by its length: steps much
            shorter than it are not brought to the length of others.
        iterations: see `orthogonalized`.
    """

    rate: float = 1.0
    floor: float = 1.0
    iterations: int = 8
    reads_anchor = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rate", "floor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a finite number above 0")
        if type(self.iterations) is not int or self.iterations < 1:
            raise ValueError(f"iterations={self.iterations!r}: give a whole number of at least 1")

    def step(
        self,
        weight: Tensor,
        momentum: Tensor,
        gradient: Tensor,
        forget: Tensor,
        momentum_gate: Tensor,
        step_size: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return (1 - forget) * weight, momentum_gate * momentum - step_size * gradient

    def coefficients(
        self, forget: Tensor, momentum: Tensor, step_size: Tensor, written: Tensor | None
    ) -> ChunkCoefficients:
        c = super().coefficients(forget, momentum, step_size, written)
        nothing = ("read_momentum", "read_steps", "end_momentum", "end_steps")
        return c._replace(**{name: torch.zeros_like(getattr(c, name)) for name in nothing})

    def orthogonalized(self, step: Tensor) -> Tensor:
        """What the weights move by, for a rate of 1: (…, out, in) both."""
        return orthogonalized(step, self.floor, self.iterations)

    def end(self, state: MemoryState) -> MemoryState:
        pairs = zip(state.weights, state.momentum, strict=True)
        weights = tuple(w + self.rate * self.orthogonalized(s) for w, s in pairs)
        return super().end(replace(state, weights=weights))


@dataclass(frozen=True, kw_only=True)
class LaCT(OrthogonalStep):
    """LaCT (arXiv 2505.23884): after each chunk's orthogonalised step, rows as long as they were at first.

    The state carries these lengths. So the fast weights cannot be offsets, which begin at 0: in a
    `NeuralMemory` it needs `decay_to_initial=False` in the form.
    """

    needs_first_weights = True

    def extra_shapes(self, weight_shapes: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
        return tuple((out, 1) for out, _ in weight_shapes)

    def fresh_extra(self, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.linalg.vector_norm(w, dim=-1, keepdim=True) for w in weights)

    def end(self, state: MemoryState) -> MemoryState:
        after = super().end(state)
        pairs = zip(after.weights, after.extra, strict=True)
        weights = tuple(w * (length / (_lengths(w) + 1e-5)) for w, length in pairs)
        return replace(after, weights=weights)


def _lengths(weight: Tensor) -> Tensor:
    """Of each row, (…, out, 1)."""
    return torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
