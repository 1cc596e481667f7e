"""What a memory begins with: its hidden features tell keys apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from titans.memory import MemoryNetwork
from titans.nn.memory.initial_weights import InitialWeights


def effective_dimensions(activation: str) -> float:
    """1 / E[cos²] over pairs of a hidden layer's outputs for random keys."""
    torch.manual_seed(0)
    network = MemoryNetwork(32, 2, 4, activation, residual=False, norm=False)
    weights = InitialWeights(network, 1, empty=True)
    keys = F.normalize(torch.randn(1, 400, 32), dim=-1)
    hidden = F.normalize(network.features(list(weights), keys)[0][1][0], dim=-1)
    cosines = (hidden @ hidden.mT)[~torch.eye(len(hidden), dtype=torch.bool)]
    return 1 / cosines.square().mean().item()


def test_sines_begin_with_angles_wide_enough_to_span_more_dimensions_than_the_keys():
    assert effective_dimensions("sin") > 60 > 32 > effective_dimensions("silu")
