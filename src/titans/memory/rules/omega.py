"""The Omega rule: every step takes the gradients of the last tokens together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titans.memory.rules.momentum import MomentumRule
from titans.memory.rules.orthogonal import OrthogonalStep
from titans.memory.rules.window import window_shapes


@dataclass(frozen=True, kw_only=True)
class _Windowed(MomentumRule):
    """A step takes the mean of the gradients of the last `window` tokens, each with its own step size:

        G_t = (1/c) Σ_{t−c < i ≤ t} θ_i ∇ℓ(W′; k_i, v_i)

    All gradients of a chunk are taken at its first weights W′, also those of tokens of earlier chunks, whose
    keys and values the state carries. The mean, where the paper has the sum, keeps a window's step as long as
    one token's: a token is in c windows.

    Args:
        window: c, at least 1.
    """

    window: int = 16  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.window) is not int or self.window < 1:
            raise ValueError(f"window={self.window!r}: give a whole number of at least 1")

    def extra_shapes(self, weight_shapes: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
        return window_shapes(self.window, weight_shapes) if self.window > 1 else ()


@dataclass(frozen=True, kw_only=True)
class Omega(_Windowed):
    """OmegaNet (arXiv 2505.23735, equation 9): S_t = η_t S_{t−1} − G_t, W_t = (1 − α_t) W_{t−1} + S_t.

    With a momentum of 0 it is the paper's; with a window of 1 it is the momentum rule.
    """


@dataclass(frozen=True, kw_only=True)
class Atlas(OrthogonalStep, _Windowed):
    """Atlas (arXiv 2505.23735, equations 32 and 33): a momentum of windows' gradients, orthogonalised.

        S_t = η_t S_{t−1} − G_t        W_t = (1 − α_t) W_{t−1} + rate · orthogonalised(S_t)

    The second is taken at chunk ends alone: within a chunk S accumulates, W is only forgotten, and queries
    are answered by the weights with which the chunk began. With chunks of one token it is the paper's, whose
    step η_t is one number here, `rate`. A window of 1 is Muon alone.

    Args:
        rate: singular values of a step, at most.
    """

    rate: float = 1.0
