"""How memory and attention are combined."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans.nn.kernels import token
from titans.nn.norm import RMSNorm

# The attention's weight starts small, so that a fresh block changes the residual stream little.
_ATTENTION_WEIGHT = 0.1


class MemoryGate(nn.Module):
    """Norm(attention) ⊙ σ(Norm(memory)): the memory decides what of the attention passes (equations 25 and
    28).

    The paper asks for learnable vector weights on both branches and a non-linearity, without more detail.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(hidden_size, eps, init=_ATTENTION_WEIGHT)
        self.memory_norm = RMSNorm(hidden_size, eps)

    def forward(self, attention: Tensor, memory: Tensor) -> Tensor:
        """(batch, time, hidden_size) twice to the same shape."""
        if token.allows(attention) and attention.shape == memory.shape:
            weights = token.weights_of(attention, self.attention_norm, self.memory_norm)
            if weights is not None and memory.dtype == attention.dtype:
                eps = self.attention_norm.eps, self.memory_norm.eps
                return torch.ops.titans_native.gate(attention, memory, *weights, *eps)
        return self.attention_norm(attention) * torch.sigmoid(self.memory_norm(memory))


class MemorySum(nn.Module):
    """Norm(attention) + memory: what was recalled reaches the residual stream itself.

    The memory keeps its own scale: one that has nothing to say can be silent, which a norm would undo.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(hidden_size, eps, init=_ATTENTION_WEIGHT)

    def forward(self, attention: Tensor, memory: Tensor) -> Tensor:
        """(batch, time, hidden_size) twice to the same shape."""
        return self.attention_norm(attention) + memory


COMBINATIONS: dict[str, type[MemoryGate | MemorySum]] = {"gate": MemoryGate, "sum": MemorySum}
