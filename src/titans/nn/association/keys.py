"""Keys of an association: features of a model's states, of length below 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from titans.nn.memory.features import BANDWIDTH, SOFTNESS

FEATURES = ("product", "sin")


class KeyMap(nn.Module):
    """φ = h / √(‖h‖² + 0.01 · feature_size) for each head, where with x_l the state of layer l

        h = (P_1 x_l1) ⊙ (P_2 x_l2) ⊙ …      of "product",
        h = sin(b (P_1 x_l1 + P_2 x_l2 + …))   of "sin", b being learned.

    Projections P (feature_size, hidden_size) have rows of length √hidden_size at first, orthogonal in groups
    of hidden_size. ‖φ‖ < 1, which keeps the delta rule stable at any step size up to 1.

    Args:
        places: for each head the places of its layers among the states; one may come twice.
        features: "product" or "sin".
    """

    def __init__(
        self, hidden_size: int, places: Sequence[Sequence[int]], features: str, feature_size: int
    ) -> None:
        super().__init__()
        self.places = tuple(tuple(of_head) for of_head in places)
        self.features, self.feature_size = features, feature_size
        shape = (feature_size, hidden_size)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(len(of_head), *shape)) for of_head in self.places
        )
        heads = len(self.places)
        self.log_bandwidth = nn.Parameter(torch.empty(heads)) if features == "sin" else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        for weight in self.weights:
            for projection in weight:
                for rows in projection.split(projection.shape[1]):
                    nn.init.orthogonal_(rows, math.sqrt(projection.shape[1]), generator)
        if self.log_bandwidth is not None:
            self.log_bandwidth.fill_(math.log(BANDWIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, time, layers, hidden_size), unit vectors, to (batch, time, heads, feature_size)."""
        hidden = []
        for head, (weight, places) in enumerate(zip(self.weights, self.places, strict=True)):
            weight = weight.to(x.dtype)
            found = x[..., places[0], :] @ weight[0].mT
            for place, projection in zip(places[1:], weight[1:], strict=True):
                other = x[..., place, :] @ projection.mT
                found = found * other if self.log_bandwidth is None else found + other
            if self.log_bandwidth is not None:
                found = torch.sin(self.log_bandwidth[head].to(x.dtype).exp() * found)
            hidden.append(found)
        h = torch.stack(hidden, -2)
        return h * torch.rsqrt(h.square().sum(-1, keepdim=True) + SOFTNESS * self.feature_size)
