"""How fast the heads of a memory forget."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# In tokens, the shortest and the longest. Measured: docs/how/stability.md.
HALF_LIVES = (1024.0, 1e6)


def refuses_half_lives(given: Any) -> str | None:
    """Why these are not the shortest and the longest half-life, or None."""
    numbers = isinstance(given, (list, tuple)) and all(type(x) in (int, float) for x in given)
    if numbers and len(given) == 2 and 0 < given[0] <= given[1] < math.inf:
        return None
    return f"half_lives={given!r}: give two numbers above 0, the shorter one first"


def spaced_half_lives(
    heads: int, shortest: float, longest: float, device: torch.device | None = None
) -> Tensor:
    """(heads,) float64, log-spaced from the shortest to the longest, in tokens."""
    spread = torch.linspace(0, 1, heads, dtype=torch.float64, device=device) if heads > 1 else 0.5
    return shortest * (longest / shortest) ** torch.as_tensor(spread, device=device).reshape(heads)


class DecayRate(nn.Module):
    """softplus of the forget gate's logits (…, heads, depth): nats that a head loses with a token.

    bounds: half-lives, shortest and longest, which the heads' own never exceed; None for no bounds.
    """

    def __init__(self, bounds: tuple[float, float] | None) -> None:
        super().__init__()
        self.bounds = bounds

    def forward(self, logits: Tensor) -> Tensor:
        rate = F.softplus(logits)
        if self.bounds is None:
            return rate
        least = math.log(2) / spaced_half_lives(logits.shape[-2], *self.bounds, logits.device)
        return rate + least.to(rate.dtype).unsqueeze(-1)
