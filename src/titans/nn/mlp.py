"""The feed-forward half of a block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.nn.kernels import token
from titans.nn.norm import RMSNorm


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), no biases, gate and up in one matrix; (..., hidden_size) → the same."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def feed_forward(norm: RMSNorm, mlp: SwiGLU, x: Tensor) -> Tensor:
    """x + mlp(norm(x)), (batch, time, hidden_size)."""
    if token.allows(x) and type(mlp) is SwiGLU and token.is_plain(mlp):
        weights = token.weights_of(x, norm, mlp.gate_up, mlp.down)
        if weights is not None:
            return torch.ops.titans_native.feed_forward(x, weights[0], norm.eps, *weights[1:])
    return x + mlp(norm(x))
