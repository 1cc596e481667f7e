"""What a memory knows before it has read anything."""

from __future__ import annotations

import torch
from torch import nn

from titans.memory import MemoryNetwork

# Of the first of several layers, by activation, 1 by default. Keys have unit length, so that fan-in
# initialisation would leave the activation all but linear, as 1 would leave a sine.
FIRST_STD = {"sin": 2.0}


class InitialWeights(nn.ParameterList):
    """W_0: for each layer of the network (heads, out, in), learned, wide enough to bend the activation.

    An `empty` one has a last layer of zeros at first: what has read nothing, or forgotten everything, answers
    0 (before a LayerNorm), and the little that a token writes is not drowned.
    """

    def __init__(self, network: MemoryNetwork, num_heads: int, empty: bool) -> None:
        super().__init__(torch.empty(num_heads, *shape) for shape in network.weight_shapes)
        self.empty, self.first_std = empty, FIRST_STD.get(network.activation, 1.0)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for layer, weight in enumerate(self):
            first = layer == 0 and len(self) > 1
            nn.init.normal_(weight, std=self.first_std if first else weight.shape[-1] ** -0.5)
        if self.empty:
            nn.init.zeros_(self[-1])
