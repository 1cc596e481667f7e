"""Root-mean-square normalisation, computed in float32 or wider whatever the dtype of its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.nn.kernels import token

# Queries and keys of less than this length are not brought to length 1. `kernels/layer.cpp` has the same.
SHORTEST = 1e-2


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis; (..., dim) → (..., dim) in the dtype of x.

    The learned weight (dim,) starts at `init`.
    """

    def __init__(self, dim: int, eps: float = 1e-6, init: float = 1.0) -> None:
        super().__init__()
        self.eps, self.init = eps, init
        self.weight = nn.Parameter(torch.full((dim,), init))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        if token.allows(x) and token.alike(x, self.weight):
            return torch.ops.titans_native.rms_norm(x, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class HeadRMSNorm(nn.Module):
    """RMSNorm over each head's features with a weight of its own; (..., num_heads, head_dim) → the same."""

    def __init__(self, num_heads: int, head_dim: int, eps: float = 1e-6, init: float = 1.0) -> None:
        super().__init__()
        self.eps, self.init = eps, init
        self.weight = nn.Parameter(torch.full((num_heads, head_dim), init))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (F.rms_norm(wide, self.weight.shape[-1:], eps=self.eps) * self.weight.to(wide.dtype)).to(
            x.dtype
        )


class ReadNorm(nn.Module):
    """A memory's answers at one scale, whatever their size: the update from the text, plus the prior.

    The prior is the answer of a memory that has read nothing. The two are normalised separately, because a
    token writes a few per cent of its value, and in a common norm the prior would hide it.
    """

    def __init__(self, num_heads: int, head_dim: int, has_prior: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.taught = HeadRMSNorm(num_heads, head_dim, eps)
        self.prior = HeadRMSNorm(num_heads, head_dim, eps) if has_prior else None

    def forward(self, reads: Tensor, prior: Tensor | None) -> Tensor:
        """Reads, and those of a memory that has read nothing, if there is one: (..., num_heads, head_dim)."""
        if self.prior is None or prior is None:
            return self.taught(reads)
        return self.taught(reads - prior) + self.prior(prior)


def unit_queries(x: Tensor, shortest: float = SHORTEST) -> Tensor:
    """x / max(‖x‖, shortest) along the last axis, in at least float32.

    Vectors of less than `shortest` become no unit vectors, so that no gradient grows by more than
    1 / shortest: a key that sees the token before a text's first one is exactly 0.
    Reads come in the dtype of their queries, and what a token wrote is small compared with the prior.
    """
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=shortest)


def shorten(x: Tensor, longest: float) -> Tensor:
    """x, vectors along the last axis longer than `longest` being shortened to it."""
    length = torch.linalg.vector_norm(
        x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return x * (longest / length.clamp_min(longest)).to(x.dtype)
