"""Gates of an association."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gate(nn.Module):
    """Logits of gates: a bias, a linear part and one with a hidden layer, of any inputs.

    Both parts are 0 at first, so that only the bias counts. Inputs should have components of size 1.

    Args:
        inputs: their number. hidden: units of the hidden layer. outputs: number of gates.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.up_weight = nn.Parameter(torch.empty(hidden, inputs))
        self.down_weight = nn.Parameter(torch.zeros(outputs, hidden))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        self.up_weight.normal_(std=self.up_weight.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, inputs), in at least float32, to (…, outputs)."""
        weight, bias, up, down = (
            parameter.to(x.dtype) for parameter in (self.weight, self.bias, self.up_weight, self.down_weight)
        )
        return F.linear(x, weight, bias) + F.linear(F.silu(F.linear(x, up)), down)
