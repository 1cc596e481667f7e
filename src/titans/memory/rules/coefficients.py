"""The weights within a chunk and after it as sums over the chunk's gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ChunkCoefficients(NamedTuple):
    """The weights after token t of a chunk, and the state after its last token, as sums over the chunk.

    With W, S at the chunk's first token and u_j the gradient of token j (leading dimensions … shared):
      W_t   = read_weights_t W + read_momentum_t S − Σ_j read_steps[t, j] u_j
      W_end = W + end_weights W + end_momentum S − Σ_j end_steps_j u_j
      S_end = momentum_momentum S − Σ_j momentum_steps_j u_j
    """

    read_weights: Tensor  # (…, time, 1)
    read_momentum: Tensor  # (…, time, 1)
    read_steps: Tensor  # (…, time, time)
    end_weights: (
        Tensor  # (…, 1, 1), the change: half-lives of 10⁶ tokens would be 4 % off as a float32 factor
    )
    end_momentum: Tensor  # (…, 1, 1)
    end_steps: Tensor  # (…, time, 1)
    momentum_momentum: Tensor  # (…, 1, 1)
    momentum_steps: Tensor  # (…, time, 1)


class EndCoefficients(NamedTuple):
    """Of `ChunkCoefficients` what the state after the chunk takes, and what tokens read does not."""

    end_weights: Tensor  # (…, 1, 1)
    end_momentum: Tensor  # (…, 1, 1)
    end_steps: Tensor  # (…, time, 1)
    momentum_momentum: Tensor  # (…, 1, 1)
    momentum_steps: Tensor  # (…, time, 1)


def rounded(products: Tensor, dtype: torch.dtype) -> Tensor:
    """The products in the compute dtype, those that vanish compared with 1 as zeros: as denormal numbers they
    would make matrix products ten times slower."""
    limits = torch.finfo(dtype)
    vanishing = torch.where(products < limits.tiny / limits.eps**2, products, 0)
    # Subtracted, because a product that is 0 has a gradient.
    return (products - vanishing.detach()).to(dtype)
